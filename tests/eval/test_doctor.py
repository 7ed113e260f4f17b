"""`preftune doctor`: a good tiny run, and runs that were broken on purpose."""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from preftune.cli import main as cli
from preftune.cli.chain import Chain, Options, write_recipe
from preftune.cli.output import Output
from preftune.data.encode import encode_demos
from preftune.models.loading import resolve_base
from preftune.models.lora import SCORE, WEIGHTS, LoraSpec
from preftune.models.reward_model import create_reward_model, reward_tensors
from preftune.models.tokens import load_tokenizer
from preftune.recipes.load import load_recipe
from preftune.stages import dpo as dpo_stage

RECIPE = """\
name: tiny
model: {base: "random:llama", dtype: float32}
lora: {r: 8, alpha: 16}
data:
  demos: {path: demos.jsonl}
  pairs: {path: pairs.jsonl, held_out: 0.4}
stages:
  sft: {data: demos, train: {max_steps: 40, per_device_train_batch_size: 8, learning_rate: 5e-3}}
  reward: {from: sft, data: pairs, train: {max_steps: 16, per_device_train_batch_size: 8, learning_rate: 2e-3}}
  dpo: {from: sft, data: pairs, beta: 0.1, train: {max_steps: 4, per_device_train_batch_size: 8, learning_rate: 1e-4}}
  ppo:
    from: sft
    reward: reward
    data: demos
    rollout_batch_size: 8
    total_episodes: 32
    num_ppo_epochs: 1
    max_new_tokens: 12
    train: {learning_rate: 1e-4}
eval: {prompts: {path: demos.jsonl}, policies: [sft, dpo, ppo], reference: sft, max_new_tokens: 12}
"""
PARTED = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def good_run(tmp_path_factory) -> Path:
    """A run of short replies that the policy learns to end; chosen replies begin otherwise than rejected ones."""
    folder = tmp_path_factory.mktemp("doctor")
    draw = random.Random(0)

    def reply(first: str) -> str:
        return first + "".join(draw.choice("mn") for _ in range(draw.randint(1, 4)))

    demos = [{"prompt": f"say {place}", "completion": reply("a")} for place in range(32)]
    pairs = [{"prompt": f"tell {place}", "chosen": reply("a"), "rejected": reply("z")} for place in range(80)]
    for name, rows in (("demos", demos), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(RECIPE)
    train(folder / "tiny.yaml", folder / "run")
    return folder / "run"


@pytest.fixture
def copy(good_run: Path, tmp_path: Path) -> Path:
    """The good run, to be broken."""
    return Path(shutil.copytree(good_run, tmp_path / "run"))


def train(recipe: Path, run: Path, *overrides: str, only: str | None = None) -> None:
    """The chain up to PPO (no evaluation), or one stage of it again."""
    loaded = load_recipe(recipe, overrides)
    loaded.eval, evaluation = None, loaded.eval
    Chain(loaded, Options(output_dir=run, only=only, force=only is not None), Output(json=True)).run()
    loaded.eval = evaluation
    write_recipe(run, loaded)


def doctor(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, findings, what was said besides)."""
    capsys.readouterr()
    arguments = ["doctor", str(run), "--json", *options]
    code = cli.run_command(arguments)
    said = capsys.readouterr()
    return code, [json.loads(line) for line in said.out.splitlines()], said.err


def broken(findings: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(each["stage"], each["check"]) for each in findings if each["level"] == "broken"}


def test_a_good_run_has_nothing_broken(good_run: Path, capsys):
    code, findings, said = doctor(capsys, good_run)
    assert (code, broken(findings)) == (0, set()), said
    checks = {(each["stage"], each["check"]): each for each in findings}
    assert {check for _, check in checks} == {
        *("base", "template", "tokenizer", "pad and eos", "bos", "parent sft", "parent reward", "data", "rows lost"),
        *("trained", "starts from parent", "first step", "ppo kl", "ppo entropy", "ppo sampler"),
        *("eos rate", "kl to reference", "learned", "adapter against merged"),
        *("reward accuracy", "reward length", "reward of SFT samples", "score head"),
        *("score reload, accuracy", "score reload, mean"),
    }
    assert [each["stage"] for each in findings] == sorted(
        (each["stage"] for each in findings), key=["sft", "reward", "dpo", "ppo"].index
    )
    eos = checks["sft", "eos rate"]
    assert eos["level"] == "OK" and eos["low"] < eos["measured"] <= eos["high"]
    assert checks["dpo", "first step"]["measured"] == checks["ppo", "first step"]["measured"] == 0
    assert checks["dpo", "starts from parent"]["measured"] == pytest.approx(1, abs=0.05)
    written = json.loads((good_run / "doctor.json").read_text())
    assert written["findings"] == findings
    assert all(each["threshold"] and bool(each["remedy"]) == (each["level"] != "OK") for each in findings)


def test_people_get_a_table_and_a_verdict(good_run: Path, capsys):
    assert cli.run_command(["doctor", str(good_run), "--samples", "4"]) == 0
    out = capsys.readouterr().out
    assert "nothing is broken" in out and "of 4 replies end within 12 tokens" in out


@pytest.mark.parametrize("stage", ["ppo", "dpo"])
def test_the_base_as_reference_is_named(copy: Path, capsys, monkeypatch, stage: str):
    def forget(adapters: Any, name: str = "ref") -> None:
        for key, tensor in adapters._state(name).items():
            if "lora_B" in key:
                tensor.data.zero_()

    def base_as_reference(adapters: Any) -> bool:
        adapters.copy("ref")
        forget(adapters)
        return True

    def build(job: Any, original: Callable[[Any], Any] = dpo_stage.build_dpo) -> Any:
        made = original(job)
        forget(made.adapters)
        return made

    # the stages' own checks would stop such a run; older trainers have none
    monkeypatch.setattr("preftune.stages.ppo.trainer.check_reference", lambda *_: None)
    monkeypatch.setattr("preftune.stages.ppo.trainer.add_reference", base_as_reference)
    monkeypatch.setattr("preftune.stages.reference_trainer.check_identity", lambda *_: None)
    monkeypatch.setattr("preftune.stages.dpo.build_dpo", build)
    train(copy / "recipe.yaml", copy, only=stage)
    code, findings, said = doctor(capsys, copy)
    assert code == 1 and (stage, "first step") in broken(findings), said
    # the KL that PPO logged is to the base as well, and large; no other stage is blamed
    assert broken(findings) <= {(stage, "first step"), ("ppo", "ppo kl")}
    assert f"{stage} is broken (first step)" in said and "frozen copy of sft" in said


def saved_so(file: Path, tensors: dict[str, Tensor]) -> None:
    """An adapter that its stage saved like that: the hash beside it fits."""
    save_file(tensors, file, metadata={"format": "pt"})
    stamp = file.parent / ".key.json"
    raw = json.loads(stamp.read_text())
    raw["files"][WEIGHTS] = [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
    stamp.write_text(json.dumps(raw))


@pytest.mark.parametrize("lost", ["absent", "zero", "untrained"])
def test_a_lost_score_head_is_named(copy: Path, capsys, lost: str):
    file = copy / "reward" / WEIGHTS
    tensors = load_file(file)
    if lost == "absent":
        del tensors[SCORE]
    elif lost == "zero":
        tensors[SCORE].zero_()
    else:
        base = resolve_base("random:llama")
        fresh = create_reward_model(base, load_tokenizer(base), LoraSpec(r=8, alpha=16), seed=0)
        tensors[SCORE] = reward_tensors(fresh)[SCORE].detach()
    saved_so(file, tensors)
    code, findings, said = doctor(capsys, copy, "--samples", "8")
    assert code == 1
    assert ("reward", "score head") in broken(findings)
    assert "reward is broken (score head)" in said
    # what hangs on it says so too, and nothing else does
    assert {stage for stage, _ in broken(findings)} == {"reward", "ppo"}
    assert {check for stage, check in broken(findings) if stage == "ppo"} == {"parent reward"}
    if lost == "zero":
        assert ("reward", "score reload, accuracy") in broken(findings)


def test_another_chat_template_is_named(copy: Path, capsys, monkeypatch):
    recipe = (copy / "recipe.yaml").read_text()
    with monkeypatch.context() as patch:
        # the stage itself refuses such a parent
        patch.setattr("preftune.stages.run.check_parent", lambda *_: None)
        train(copy / "recipe.yaml", copy, f"model.chat_template={json.dumps(PARTED)}", only="reward")
    (copy / "recipe.yaml").write_text(recipe)
    code, findings, said = doctor(capsys, copy, "--samples", "8")
    assert code == 1
    assert ("reward", "template") in broken(findings) and ("reward", "tokenizer") not in broken(findings)
    assert "reward is broken (template)" in said and "reward: not measured" in said
    assert not [stage for stage, _ in broken(findings) if stage in ("sft", "dpo")]


def test_a_policy_that_never_ends_is_named(good_run: Path, tmp_path: Path, capsys, monkeypatch):
    def without_eos(rows: Any, tokenizer: Any, spec: Any) -> Any:
        dataset, report = encode_demos(rows, tokenizer, spec)
        eos = tokenizer.eos_token_id
        masked = [[-100 if label == eos else label for label in labels] for labels in dataset["labels"]]
        return dataset.remove_columns("labels").add_column("labels", masked), report

    monkeypatch.setattr("preftune.stages.sft.encode_demos", without_eos)
    train(good_run / "recipe.yaml", tmp_path / "run", only="sft")
    code, findings, said = doctor(capsys, tmp_path / "run")
    assert (code, broken(findings)) == (1, {("sft", "eos rate")}), said
    # the rest of the run is not there yet, and that is no fault
    for stage in ("reward", "dpo", "ppo"):
        assert f"left out: {stage}: not finished" in said


def test_an_interrupted_stage_is_known_by_its_log(copy: Path, capsys):
    (copy / "ppo").rename(copy / ".ppo.partial")
    log = copy / ".ppo.partial" / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[0]["objective/kl"] = 3.0
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "objec')
    code, findings, said = doctor(capsys, copy, "--samples", "4")
    assert (code, broken(findings)) == (1, {("ppo", "first step")})
    assert "ppo: not finished, only its log is looked at" in said


def test_a_parent_trained_again_is_named(copy: Path, capsys):
    train(copy / "recipe.yaml", copy, "seed=1", only="sft")
    _, findings, _ = doctor(capsys, copy, "--samples", "4")
    assert {("reward", "parent sft"), ("dpo", "parent sft"), ("ppo", "parent sft")} <= broken(findings)


def test_weights_that_are_not_finite_are_named(copy: Path, capsys):
    file = copy / "dpo" / WEIGHTS
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = math.nan
    saved_so(file, tensors)
    code, findings, said = doctor(capsys, copy, "--samples", "4")
    assert (code, broken(findings)) == (1, {("dpo", "trained")})
    assert "left out: dpo: not measured" in said and "a weight is not finite" in said


@pytest.mark.parametrize("name", [WEIGHTS, "lineage.json", "metrics.json", "tokenizer.json"])
def test_a_damaged_stage_is_named_and_the_rest_is_examined(copy: Path, capsys, name: str):
    file = copy / "dpo" / name
    file.write_bytes(file.read_bytes()[:-9])
    code, findings, said = doctor(capsys, copy, "--samples", "4")
    assert (code, broken(findings)) == (1, {("dpo", "files")})
    assert f"broken: dpo, files: {name} is cut off" in said and "left out: dpo: not measured" in said


@pytest.mark.parametrize(("path", "said"), [("gone", "no such folder"), (".", "no recipe.yaml")])
def test_what_is_no_run_is_the_users_mistake(tmp_path: Path, capsys, path: str, said: str):
    code, _, err = doctor(capsys, tmp_path / path)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_a_run_without_stages_is_the_users_mistake(good_run: Path, tmp_path: Path, capsys):
    shutil.copy(good_run / "recipe.yaml", tmp_path)
    code, _, err = doctor(capsys, tmp_path)
    assert code == 2 and "holds no stage" in err
    assert doctor(capsys, good_run, "--samples", "0")[0] == 2
