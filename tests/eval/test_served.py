"""An evaluation whose replies a server draws: each policy speaks as itself, under the same prompts and seeds."""

import json
import shlex
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import UserError, UserErrors
from preftune.eval.run import run_eval
from preftune.eval.spec import EvalSpec
from preftune.models.adapters import AdapterSet
from preftune.models.lineage import adapter_sha256
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec
from preftune.recipes.load import load_recipe
from preftune.stages.serving.settings import PlaceSettings

from ..stages.served import Faults, Served, ask_at_once
from .conftest import shake
from .test_run import RUBRIC, source


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_at_once(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), parent=None)
    adapters.save("default", root / "sft")
    for seed, name in enumerate(("dpo", "ipo"), 1):
        shake(adapters, "default", seed=seed)
        adapters.save("default", root / name)
    rows = [{"prompt": f"question {place}"} for place in range(6)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def server() -> Generator[Served]:
    with Served(resolve_base("random:llama").path) as found:
        yield found


@pytest.fixture
def spec(made: Path, tmp_path: Path, server: Served) -> Callable[..., EvalSpec]:
    def make(settings: dict[str, Any] | None = None, **changes: Any) -> EvalSpec:
        asked = {"rollout_engine": "vllm", "rollout_url": server.url, "rollout_retries": 0, "rollout_wait": 5.0}
        values = {
            "base": resolve_base("random:llama"),
            "policies": {"base": None, "sft": made / "sft", "dpo": made / "dpo", "ipo": made / "ipo"},
            "reference": "sft",
            "prompts": source("prompts"),
            "folders": (made,),
            "judges": (RUBRIC,),
            "max_new_tokens": 8,
            "output_dir": tmp_path / "run",
            "rollout": PlaceSettings(**(asked | (settings or {}))),
        }
        return EvalSpec(**(values | changes))

    return make


def name_of(folder: Path) -> str:
    return f"preftune-{adapter_sha256(folder)[:16]}"


@pytest.mark.checklist("V12")
def test_v12_each_policy_speaks_as_itself_and_leaves(spec, server: Served, made: Path) -> None:
    # the likeliest tokens are those that are drawn here, whoever draws them
    greedy = {"temperature": 0.0, "kl": False}
    rows = run_eval(spec(**greedy))
    asked = [body["model"] for body in server.completions]
    # sft is the base's equal, and is asked for all the same
    assert asked == [name for each in ("base", "sft", "dpo", "ipo") for name in [_named(each, made)] * 6]
    assert not server.adapters
    loads = [body["lora_path"] for path, body in server.heard if path.endswith("/load_lora_adapter")]
    assert loads == [str((made / each).resolve()) for each in ("sft", "dpo", "ipo")]
    own = run_eval(spec(**greedy, rollout=None, output_dir=made))
    assert {row.pop("server") for row in rows} == {"vllm"} and not any("server" in row for row in own)
    assert rows == own


def _named(policy: str, made: Path) -> str:
    return "base" if policy == "base" else name_of(made / policy)


@pytest.mark.checklist("V13")
def test_v13_seeds_go_by_the_prompt_and_are_those_of_every_policy(spec, server: Served) -> None:
    run_eval(spec(seed=3))
    asked: dict[str, dict[tuple[int, ...], int]] = {}
    for body in server.completions:
        asked.setdefault(body["model"], {})[tuple(body["prompt"])] = body["seed"]
    first, *others = asked.values()
    assert len(set(first.values())) == 6 and others == [first] * 3
    assert {body["temperature"] for body in server.completions} == {0.7}
    run_eval(spec(seed=4))
    assert not {body["seed"] for body in server.completions[24:]} & set(first.values())


@pytest.mark.checklist("V14")
def test_v14_replies_of_a_server_are_kept_apart_from_those_drawn_here(spec, server: Served) -> None:
    run_eval(spec())
    asked = len(server.heard)
    run_eval(spec())  # from what was kept
    assert len(server.heard) == asked
    run_eval(spec(rollout=None))
    assert len(server.heard) == asked
    cache = spec().output_dir / "eval-cache"
    assert len(list(cache.glob("samples-*.json"))) == 4  # those of the last evaluation alone
    run_eval(spec())
    assert len(server.heard) > asked


@pytest.mark.checklist("V12")
def test_v12_a_server_of_another_base_or_one_that_ignores_adapters_is_refused(
    spec, server: Served, tmp_path: Path
) -> None:
    other = load_model(resolve_base("random:llama?seed=5"))
    other.save_pretrained(tmp_path / "other")
    with Served(tmp_path / "other") as wrong, pytest.raises(UserError, match=r"eval\.rollout: .* have it serve"):
        run_eval(spec({"rollout_url": wrong.url}))
    server.faults = Faults(deaf=True)
    with pytest.raises(UserError, match=r"changes the base of .* otherwise than ours"):
        run_eval(spec())


def test_a_server_that_goes_away_is_waited_for(spec, server: Served) -> None:
    whole = run_eval(spec(temperature=0.0, kl=False))
    server.faults = Faults(dies_after=server.done + 15, back=0.3)
    again = run_eval(spec(temperature=0.0, kl=False, output_dir=spec().output_dir.with_name("again")))
    assert server.deaths == 1 and again == whole


@pytest.mark.checklist("V15")
def test_v15_an_evaluation_starts_and_ends_its_own_server(
    spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes.jsonl"
    monkeypatch.setenv("SERVED_NOTES", str(notes))
    command = shlex.join([sys.executable, str(Path(__file__).parents[1] / "stages" / "served_program.py")])
    rows = run_eval(spec({"rollout_url": None, "rollout_command": command}, temperature=0.0, kl=False))
    assert {row["server"] for row in rows} == {"vllm"}
    (seen,) = map(json.loads, notes.read_text().splitlines())
    assert seen["options"]["--max-lora-rank"] == "8" and seen["options"]["--host"] == "127.0.0.1"
    assert not Path(f"/proc/{seen['pid']}").exists()
    assert (spec().output_dir / "eval-cache" / "server.log").is_file()


RECIPE = """\
name: t
model: {base: "random:llama", dtype: float32}
data: {demos: {path: demos.jsonl}, prompts: {path: prompts.jsonl}}
stages:
  sft: {data: demos}
  best: {kind: sample, from: sft, data: prompts, reward: {function: "builtins:len"}, keep: best, n: 2}
eval: {prompts: {path: prompts.jsonl}, policies: [sft], judges: []}
"""


@pytest.mark.checklist("V16")
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (("judges: []", "judges: [], rollout: {engine: vllm}"), r"eval\.rollout\.url: is None"),
        (("judges: []", "judges: [], rollout: {engine: tgi, url: http://x}"), r"eval\.rollout\.engine"),
        (
            ("judges: []", "judges: [], rollout: {engine: vllm, url: http://x}, beams: 4, temperature: 0, kl: false"),
            "a server draws, and 4 beams search",
        ),
        (
            ("keep: best", "keep: best, rollout: {engine: vllm, command: ''}"),
            r"best\.rollout\.command: is empty",
        ),
        (
            ("keep: best", "keep: best, rollout: {engine: vllm, url: https://x, command: vllm}"),
            "answers at http://; leave it out",
        ),
    ],
)
def test_v16_what_no_server_does_is_refused_before_anything_trains(
    tmp_path: Path, said: tuple[str, str], wanted: str
) -> None:
    assert said[0] in RECIPE
    (tmp_path / "t.yaml").write_text(RECIPE.replace(*said))
    with pytest.raises(UserError, match=wanted):
        load_recipe(tmp_path / "t.yaml")


@pytest.mark.checklist("V16")
def test_v16_policies_that_servers_do_not_take_are_refused_before_anything_trains(tmp_path: Path) -> None:
    server = "rollout: {engine: vllm, url: http://x}"
    said = RECIPE.replace("keep: best", f"keep: best, {server}").replace("judges: []", f"judges: [], {server}")
    for changed, wanted in (
        ("lora: {use_dora: true}", "is a DoRA"),
        ("lora: {r: 600}", "has rank 600"),
        ("lora: {r: 300, init_lora_weights: pissa}", "has rank 600"),
    ):
        (tmp_path / "t.yaml").write_text(f"{said}{changed}\n")
        with pytest.raises(UserErrors) as found:
            load_recipe(tmp_path / "t.yaml")
        assert len([each for each in found.value.errors if wanted in str(each) and "policy sft" in str(each)]) == 2
    (tmp_path / "t.yaml").write_text(said.replace("dtype: float32", "dtype: float32, quantization: 4bit"))
    with pytest.raises(UserErrors, match="beside its 4bit copy"):
        load_recipe(tmp_path / "t.yaml")
