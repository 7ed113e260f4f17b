"""A sampling stage whose replies a server draws, and servers that stages start themselves."""

import json
import shlex
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.files import ROWS
from preftune.models.lineage import adapter_sha256
from preftune.models.loading import resolve_base
from preftune.stages.job import StageJob
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.ppo.rollout import seed_of
from preftune.stages.run import run_stage

from .served import Faults, Served, ask_at_once

Make = Callable[..., StageJob]
PROGRAM = Path(__file__).with_name("served_program.py")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_at_once(monkeypatch)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    file = tmp_path / "notes.jsonl"
    monkeypatch.setenv("SERVED_NOTES", str(file))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def job(make_job: Make, sft_folder: Path) -> Make:
    def make(kind: str = "sample", name: str = "best", **settings: Any) -> StageJob:
        fields = {key: settings.pop(key) for key in ("parent",) if key in settings}
        asked = {f"rollout_{key}": value for key, value in (settings.pop("rollout", None) or {}).items()}
        return make_job(
            kind,
            name,
            rewards=(RewardSource("function", f"{__package__}.sample_rewards:scored"),),
            method={"max_new_tokens": 8, **settings, **asked},
            **{"parent": sft_folder, **fields},
        )

    return make


@pytest.fixture
def server() -> Generator[Served]:
    with Served(resolve_base("random:llama").path) as found:
        yield found


def rows_of(job: StageJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.output_dir / ROWS).read_text(encoding="utf-8").splitlines()]


def own(**environment: Any) -> dict[str, Any]:
    return {"engine": "vllm", "command": shlex.join([sys.executable, str(PROGRAM)]), "wait": 60.0, "retries": 0}


@pytest.mark.checklist("V17")
def test_v17_a_sampling_stage_asks_the_server_as_its_parents_policy(
    job: Make, server: Served, sft_folder: Path
) -> None:
    kept = {"keep": "all", "unfinished": "keep", "n": 2, "top_k": 5}
    made = job(rollout={"engine": "vllm", "url": server.url, "retries": 0}, **kept)
    metrics = run_stage(made)
    name = f"preftune-{adapter_sha256(sft_folder)[:16]}"
    asked = server.completions
    assert {body["model"] for body in asked} == {name} and not server.adapters
    assert [path for path, body in server.heard if path.endswith("/load_lora_adapter")]
    assert len(asked) == metrics["replies"] == 2 * metrics["prompts"]
    wanted = {seed_of(made.seed, "sample", place, draw) for place in range(metrics["prompts"]) for draw in range(2)}
    assert {body["seed"] for body in asked} == wanted
    # a cut is no matter here: nothing is learned from log-probs
    assert {(body["top_k"], body["max_tokens"]) for body in asked} == {(5, 8)}
    # the same seeds, the same rows
    again = job(name="again", rollout={"engine": "vllm", "url": server.url, "retries": 0}, **kept)
    run_stage(again)
    assert rows_of(again) == rows_of(made)


@pytest.mark.checklist("V17")
def test_v17_the_base_samples_under_its_own_name(job: Make, server: Served) -> None:
    run_stage(job(parent=None, keep="all", unfinished="keep", n=2, rollout={"engine": "vllm", "url": server.url}))
    assert {body["model"] for body in server.completions} == {"base"}
    assert not [path for path, _ in server.heard if path.endswith("_lora_adapter")]


def test_a_server_that_does_not_load_the_policy_is_refused(job: Make, server: Served) -> None:
    server.runtime_lora = False
    with pytest.raises(UserError, match="so that adapters can be loaded while it runs"):
        run_stage(job(rollout={"engine": "vllm", "url": server.url, "retries": 0}))


@pytest.mark.checklist("V15")
def test_v15_a_stage_starts_its_own_server_again_where_it_dies(job: Make, notes, monkeypatch) -> None:
    monkeypatch.setenv("SERVED_DIES", "5")
    method = {"rollout_batch_size": 4, "num_ppo_epochs": 1}
    metrics = run_stage(job("ppo", "ppo", rollout=own(), **method))
    assert metrics["steps"] == 2
    started = notes()
    assert len(started) == 2
    for each in started:
        options = each["options"]
        assert options["--max-lora-rank"] == "8" and options["--dtype"] == "float32"
        assert int(options["--max-model-len"]) >= 80
        assert not _alive(each["pid"])
    assert started[0]["options"]["--port"] == started[1]["options"]["--port"]


@pytest.mark.checklist("V15")
def test_v15_an_error_of_the_stage_ends_its_server(job: Make, notes, monkeypatch) -> None:
    made = job(rollout=own(), n=2)
    monkeypatch.setattr("preftune.stages.sample.stage._Sampler._scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_stage(made)
    monkeypatch.undo()
    assert not _alive(notes()[0]["pid"])


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_command_that_ends_at_once_is_said_with_its_last_words(job: Make) -> None:
    with pytest.raises(UserError, match=r"rollout\.command: the server ended before it answered \(no such model\)"):
        run_stage(job(rollout={"engine": "vllm", "command": "sh -c 'echo no such model; exit 3'"}))


def test_a_server_that_forgets_its_adapter_is_given_it_again(job: Make, server: Served) -> None:
    server.faults = Faults(dies_after=5, back=0.3)
    metrics = run_stage(job(keep="all", unfinished="keep", n=2, rollout={"engine": "vllm", "url": server.url}))
    assert server.deaths == 1 and metrics["replies"] == 2 * metrics["prompts"]
