"""`preftune doctor`: thresholds, a good tiny run, and runs that were broken on purpose."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from preftune.cli import main as cli
from preftune.cli.chain import Chain, Options, write_recipe
from preftune.cli.progress import Voice
from preftune.data.encode import encode_demos
from preftune.data.spec import DataSpec, SourceSpec
from preftune.eval.doctor.finding import Finding, first_broken, judge
from preftune.eval.doctor.identity_checks import check_bos, check_parent, check_tokenizer
from preftune.eval.doctor.log_checks import (
    check_entropy_trend,
    check_first_step,
    check_kl_trend,
    check_ppo_start,
    check_rows,
    first_step_tolerance,
)
from preftune.eval.doctor.paper import log_findings
from preftune.eval.doctor.policy_checks import (
    check_drift,
    check_eos,
    check_merged,
    check_parent_kept,
    check_trained,
)
from preftune.eval.doctor.records import Record, lora_change, lost_rows, series
from preftune.eval.doctor.reward_checks import (
    check_accuracy,
    check_length,
    check_reload,
    check_reload_mean,
    check_score_head,
    check_sft_reward,
)
from preftune.models.base import Base, load_tokenizer, resolve_base
from preftune.models.lora import SCORE, WEIGHTS, LoraSpec
from preftune.models.reward_model import create_reward_model, reward_tensors
from preftune.recipes.load import load_recipe
from preftune.stages import dpo as dpo_stage
from preftune.stages.job import StageJob

RECIPE = """\
name: tiny
model: {base: "random:llama"}
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
    Chain(loaded, Options(output_dir=run, only=only, force=only is not None), Voice(json=True)).run()
    loaded.eval = evaluation
    write_recipe(run, loaded)


def doctor(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, findings, what was said besides)."""
    capsys.readouterr()
    arguments = ["doctor", str(run), "--json", *options]
    code = cli.guarded(lambda: cli.app(arguments, standalone_mode=False))
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
        *("trained", "starts from parent", "first step", "ppo kl", "ppo entropy"),
        *("eos rate", "kl to reference", "adapter against merged"),
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
    assert cli.guarded(lambda: cli.app(["doctor", str(good_run), "--samples", "4"], standalone_mode=False)) == 0
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
    monkeypatch.setattr("preftune.stages.ppo.check_reference", lambda *_: None)
    monkeypatch.setattr("preftune.stages.ppo.add_reference", base_as_reference)
    monkeypatch.setattr("preftune.stages.reference.check_identity", lambda *_: None)
    monkeypatch.setattr("preftune.stages.dpo.build_dpo", build)
    train(copy / "recipe.yaml", copy, only=stage)
    code, findings, said = doctor(capsys, copy)
    assert code == 1 and (stage, "first step") in broken(findings), said
    # the KL that PPO logged is to the base as well, and large; no other stage is blamed
    assert broken(findings) <= {(stage, "first step"), ("ppo", "ppo kl")}
    assert f"{stage} is broken (first step)" in said and "frozen copy of sft" in said


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
    save_file(tensors, file, metadata={"format": "pt"})
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
        patch.setattr("preftune.stages.job.check_lineage", lambda *_: None)
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
    save_file(tensors, file, metadata={"format": "pt"})
    code, findings, said = doctor(capsys, copy, "--samples", "4")
    assert (code, broken(findings)) == (1, {("dpo", "trained")})
    assert "left out: dpo: not measured" in said and "a weight is not finite" in said


@pytest.mark.parametrize(("path", "said"), [("gone", "no such folder"), (".", "no recipe.yaml")])
def test_what_is_no_run_is_the_users_mistake(tmp_path: Path, capsys, path: str, said: str):
    code, _, err = doctor(capsys, tmp_path / path)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_a_run_without_stages_is_the_users_mistake(good_run: Path, tmp_path: Path, capsys):
    shutil.copy(good_run / "recipe.yaml", tmp_path)
    code, _, err = doctor(capsys, tmp_path)
    assert code == 2 and "holds no stage" in err
    assert doctor(capsys, good_run, "--samples", "0")[0] == 2


def level(finding: Finding) -> str:
    return finding.level


@pytest.mark.parametrize(
    ("accuracy", "interval", "longer", "expected"),
    [
        (0.8, (0.75, 0.85), 0.55, "OK"),
        (0.6, (0.52, 0.68), 0.55, "look"),  # cannot be told from "longer wins"
        (0.6, (0.52, 0.68), 0.3, "look"),  # nor from "shorter wins"
        (0.52, (0.45, 0.59), 0.5, "look"),
        (0.3, (0.24, 0.37), 0.5, "broken"),  # surely worse than a coin
        (0.6, (0.53, 0.67), 0.9, "broken"),  # surely worse than counting tokens
    ],
)
def test_accuracy(accuracy, interval, longer, expected):
    assert level(check_accuracy("r", accuracy, interval, 200, longer_wins=longer, held_out=True)) == expected


def test_few_pairs_cannot_damn_a_reward_model():
    found = check_accuracy("r", 2 / 7, (0.082, 0.641), 7, longer_wins=1 / 7, held_out=False)
    assert found.level == "look" and "TRAINING" in found.unit


@pytest.mark.parametrize(
    ("correlation", "interval", "expected"),
    [
        (0.3, (0.1, 0.5), "OK"),
        (-0.6, (-0.8, -0.4), "look"),
        (0.92, (0.85, 0.97), "look"),
        (-0.95, (-0.99, -0.91), "broken"),
        (0.0, (-0.95, 0.95), "OK"),
    ],
)
def test_length(correlation, interval, expected):
    assert level(check_length("r", correlation, interval, 100)) == expected


@pytest.mark.parametrize(
    ("interval", "expected"), [((-1.0, 0.5), "OK"), ((-3.0, -1.9), "OK"), ((-3.0, -2.1), "look"), ((1.1, 2.0), "look")]
)
def test_sft_reward_is_for_a_person_to_judge(interval, expected):
    assert level(check_sft_reward("r", sum(interval) / 2, interval, 50, policy="sft")) == expected


@pytest.mark.parametrize(
    ("norm", "moved", "expected"),
    [
        (1.0, 0.5, "OK"),
        (None, math.nan, "broken"),
        (0.0, 1.0, "broken"),
        (math.nan, math.nan, "broken"),
        (1, 0, "broken"),
    ],
)
def test_score_head(norm, moved, expected):
    found = check_score_head("r", norm, moved)
    assert found.level == expected
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["stage"] == "r"


@pytest.mark.parametrize(
    ("measured", "n", "all_", "expected"),
    [
        (0.9, 100, True, "OK"),
        (0.89, 100, True, "OK"),
        (0.86, 100, True, "look"),
        (0.7, 100, True, "broken"),
        (0.7, 10, True, "look"),
        (0.87, 100, False, "OK"),
        (0.6, 100, False, "look"),
    ],
)
def test_reload(measured, n, all_, expected):
    interval = (measured - 0.05, measured + 0.05)
    assert level(check_reload("r", 0.9, measured, interval, n=n, all_=all_)) == expected


@pytest.mark.parametrize(("mean", "expected"), [(1.02, "OK"), (1.2, "look"), (0.4, "broken"), (math.nan, "broken")])
def test_reload_mean(mean, expected):
    assert level(check_reload_mean("r", {"mean": 1.0, "std": 2.0}, mean, 128)) == expected


@pytest.mark.parametrize(
    ("finished", "expected_share", "expected"),
    [(60, 0.9, "OK"), (40, 0.9, "look"), (5, 0.9, "broken"), (5, 0.3, "look"), (20, None, "look"), (0, None, "look")],
)
def test_eos(finished, expected_share, expected):
    assert level(check_eos("p", finished, 64, expected=expected_share, budget=64)) == expected


def test_few_silent_replies_are_no_proof():
    assert level(check_eos("p", 0, 8, expected=1.0, budget=64)) == "look"


@pytest.mark.parametrize(("kl", "expected"), [(0.1, "OK"), (0.6, "look"), (1.2, "broken"), (math.nan, "broken")])
def test_drift(kl, expected):
    assert level(check_drift("p", kl, 0.01, reference="sft", n=64)) == expected


@pytest.mark.parametrize(
    ("gap", "low", "expected"),
    [(1e-8, False, "OK"), (1e-4, False, "look"), (2e-3, False, "broken"), (1e-2, True, "OK"), (0.2, True, "broken")],
)
def test_merged(gap, low, expected):
    assert level(check_merged("p", gap, low_precision=low)) == expected


def test_what_did_not_move_or_forgot_its_parent():
    assert [level(check_trained("p", change, start="sft")) for change in (0.1, 0.0, math.nan)] == [
        "OK", "broken", "broken"
    ]  # fmt: skip
    assert [level(check_parent_kept("p", share, parent="sft")) for share in (1.1, 0.5, 0.0)] == ["OK", "look", "broken"]


def test_lora_change_by_hand():
    parent = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.tensor([[3.0], [4.0]])}
    child = {"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.tensor([[3.0, 0.0], [4.0, 5.0]])}
    # a new column of norm 5 on a parent of norm 5; the parent itself is all there
    assert lora_change(child, parent) == (pytest.approx(1.0), pytest.approx(1.0))
    afresh = {"x.lora_B.weight": torch.tensor([[4.0, 1.0], [-3.0, 0.0]])}
    assert lora_change(afresh, parent)[1] == pytest.approx(0.0)
    assert lora_change(parent, None) == (pytest.approx(5.0), None)


@pytest.mark.parametrize(("gap", "expected"), [(0.0, "OK"), (9e-4, "OK"), (2e-3, "broken"), (math.nan, "broken")])
def test_first_step(gap, expected):
    assert level(check_first_step("d", gap, first_step_tolerance(-100.0, low_precision=False), start="sft")) == expected


def record(kind: str, log: list[dict[str, Any]], **settings: Any) -> Record:
    """A stage that has nothing but a log."""
    base = Base("random:llama", Path("."), None, "")
    data = DataSpec((SourceSpec("x.jsonl"),))
    job = StageJob(name=kind, kind=kind, base=base, data=data, output_dir=Path(kind), parent=Path("sft"), **settings)
    return Record(job, None, {}, log)


@pytest.mark.parametrize(
    ("kind", "row", "gap"),
    [
        ("kto", {"step": 1, "loss": 0.5, "rewards/chosen": 0.05, "logps/chosen": -90.0}, 0.1),
        ("dpo", {"step": 1, "loss": 0.7, "rewards/chosen": 0.0, "rewards/rejected": -0.2, "logps/chosen": None}, 0.4),
        ("dpo", {"step": 1, "loss": 0.69, "rewards/chosen": 0.0, "rewards/rejected": 0.0}, 0.0),
    ],
)
def test_first_steps_are_read_from_logs(kind: str, row: dict[str, Any], gap: float):
    left_out: list[str] = []
    (found,) = log_findings(record(kind, [row, {"step": 2, "rewards/chosen": 9.0}], method={"beta": 0.5}), left_out)
    assert (found.measured, found.level) == (pytest.approx(gap), "broken" if gap else "OK")
    assert not left_out


def test_a_log_that_begins_late_is_left_out():
    for made in (
        record("dpo", [{"step": 5, "loss": 0.6, "rewards/chosen": 0.3}]),
        record("dpo", [{"step": 1, "loss": 0.6, "rewards/chosen": 0.3}], lora=LoraSpec(dropout=0.1)),
        record("ppo", [{"objective/kl": 3.0, "rollout/length": 9, "episode": 640}], method={"rollout_batch_size": 64}),
    ):
        left_out: list[str] = []
        assert list(log_findings(made, left_out)) == []
        assert "first step" in left_out[0]


def test_rounding_in_16_bits_is_allowed_for():
    assert first_step_tolerance(-400.0, low_precision=True) == pytest.approx(20 / 128)
    assert level(check_ppo_start("p", 0.1, 40, start="sft", low_precision=True)) == "OK"
    assert level(check_ppo_start("p", 0.1, 40, start="sft", low_precision=False)) == "broken"
    assert level(check_ppo_start("p", -4.0, 40, start="sft", low_precision=True)) == "broken"


@pytest.mark.parametrize(
    ("kls", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], "OK"),
        ([0, 2, 5, 8, 11, 14], "look"),
        ([0, 5, 10, 20, 30, 40], "broken"),
        ([0, -2, -4, -5, -5, -6], "broken"),
        ([0, 0.1, -0.1, -0.5, 0.2, 0.1], "OK"),
    ],
)
def test_kl_trend(kls, expected):
    assert level(check_kl_trend("p", kls, [20] * 6)) == expected


@pytest.mark.parametrize(
    ("entropies", "expected"),
    [
        ([1.4, 1.4, 1.3, 1.2, 1.2, 1.1], "OK"),
        ([1.4, 1.4, 0.9, 0.5, 0.3, 0.3], "look"),
        ([1.4, 1.4, 0.5, 0.1, 0.03, 0.02], "broken"),
        ([1.4, 1.4, 0.5, 0.1, 0.1, 0.1], "look"),
    ],
)
def test_entropy_trend(entropies, expected):
    assert level(check_entropy_trend("p", entropies)) == expected


@pytest.mark.parametrize(("lost", "expected"), [(0, "OK"), (5, "OK"), (6, "look"), (51, "broken")])
def test_rows(lost, expected):
    assert level(check_rows("s", 100, lost)) == expected


def test_lost_rows_are_counted_over_all_parts():
    data = {
        "read": {"read": 100, "dropped": {"bad": 3}, "notes": {"prompt seen before": 9}},
        "train": {"dropped": {"too long": 2}, "notes": {"truncated": 4}},
        "held_out": {"dropped": {}, "notes": {"truncated": 1}},
    }
    assert lost_rows({"data": data}) == (100, 10)
    assert lost_rows({}) is None


def test_a_series_leaves_out_what_is_not_finite():
    log = [{"a": 1, "b": 2}, {"a": 3, "b": None}, {"a": 5}, {"a": 7, "b": 8.5}]
    assert series(log, "a", "b") == [[1, 7], [2, 8.5]]


def test_tokenizers_that_differ():
    ours = {"sha256": "1", "chat_template_sha256": "2", "pad_token": "<pad>", "eos_token": "</s>"}
    same = [each.level for each in check_tokenizer("d", ours, {"sft": dict(ours)})]
    assert same == ["OK"] * 3
    template, tokenizer, pads = check_tokenizer("d", ours, {"sft": ours | {"chat_template_sha256": "3"}, "base": ours})
    assert (template.level, template.measured, tokenizer.level, pads.level) == ("broken", 1, "OK", "OK")
    assert "sft" in template.unit and "base" not in template.unit
    alike = ours | {"pad_token": "</s>"}
    assert [each.level for each in check_tokenizer("d", alike, {"sft": alike})] == ["OK", "OK", "broken"]


def test_bos_and_parents():
    assert level(check_bos("d", 1, token="<s>", base_token="<s>")) == "OK"
    assert level(check_bos("d", 2, token="<s>", base_token="<s>")) == "broken"
    assert level(check_bos("d", 0, token=None, base_token="<s>")) == "broken"
    assert [level(check_parent("d", "sft", "a", other)) for other in ("a", "b")] == ["OK", "broken"]


def test_the_first_broken_stage_is_the_verdict():
    levels = [("sft", "look"), ("reward", "broken"), ("ppo", "broken")]
    findings = [
        judge(stage, "x", 0.0, unit="", threshold="t", remedy="r", look=word == "look", broken=word == "broken")
        for stage, word in levels
    ]
    worst = first_broken(findings)
    assert worst is not None and worst.stage == "reward"
    assert first_broken(findings[:1]) is None
