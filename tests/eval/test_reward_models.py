"""Implicit rewards against plain transformers and PEFT, and what must not be measured."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from preftune.data.load import load_rows
from preftune.data.spec import DataSpec, SourceSpec
from preftune.data.split import prompt_position
from preftune.errors import UserError
from preftune.eval.commands import eval_reward, eval_winrate
from preftune.eval.reward_models import left_out
from preftune.eval.run import run_eval
from preftune.eval.spec import EvalSpec, RewardModel
from preftune.eval.workbench import Workbench
from preftune.models.adapters import AdapterSet
from preftune.models.lineage import Lineage, adapter_sha256, base_info, read_lineage, tokenizer_info, write_lineage
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import SCORE, WEIGHTS, LoraSpec
from preftune.models.tokens import load_tokenizer

from .conftest import shake

PAIRS = [
    {"prompt": f"question {place}", "chosen": "yes " * (place % 3 + 1), "rejected": "no, never" + "!" * (place % 4)}
    for place in range(12)
]
BETA = 0.25


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """sft, its children dpo (other weights) and same (its weights), fresh (from the base), rm, and the pairs."""
    root = tmp_path_factory.mktemp("run")
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), parent=None)
    stir(adapters, seed=1)
    save(adapters, root / "sft", "sft", None, {})
    save(adapters, root / "same", "dpo", root / "sft", {"method": {"beta": BETA}})
    stir(adapters, seed=2)
    save(adapters, root / "dpo", "dpo", root / "sft", {"method": {"beta": BETA}})
    save(adapters, root / "fresh", "kto", None, {"train": {"beta": 0.5}})
    save(adapters, root / "ld", "dpo", root / "sft", {"method": {"ld_alpha": 0.3}})
    adapters.add_head("default", bias=False)
    save(adapters, root / "rm", "reward", root / "sft", {})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    labels = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in PAIRS]
    (root / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return root


def stir(adapters: AdapterSet, seed: int) -> None:
    """A random change so small that float32 sums of log-probs are good to 1e-5."""
    shake(adapters, "default", seed)
    for parameter in adapters.parameters("default"):
        parameter.data.mul_(0.3)


def save(adapters: AdapterSet, folder: Path, kind: str, parent: Path | None, config: dict[str, Any]) -> None:
    """An adapter as a stage leaves it, trained on pairs of which 0.4 are held out."""
    adapters.save("default", folder)
    tokenizer = load_tokenizer(adapters.base)
    lineage = Lineage(
        stage=folder.name,
        kind=kind,
        base=base_info(adapters.base),
        tokenizer=tokenizer_info(tokenizer),
        parents=[] if parent is None else [{"stage": parent.name, "sha256": adapter_sha256(parent)}],
        config=config,
        data={"spec": {"held_out": 0.4, "seed": 0, "system": None}, "fingerprint": ""},
        seed=0,
        versions={},
        created="",
        seconds=0.0,
    )
    write_lineage(folder, lineage)


def pairs(**changes: Any) -> DataSpec:
    return DataSpec((SourceSpec("pairs.jsonl"),), **changes)


def spec_of(run_dir: Path, **changes: Any) -> EvalSpec:
    given: dict[str, Any] = {
        "base": resolve_base("random:llama"),
        "policies": {"sft": run_dir / "sft", "dpo": run_dir / "dpo"},
        "reference": "sft",
        "prompts": pairs(limit=2),
        "folders": (run_dir,),
        "max_new_tokens": 4,
        "kl": False,
    }
    return EvalSpec(**(given | changes))


def implicit(run_dir: Path, stage: str, parent: str | None = "sft", **changes: Any) -> RewardModel:
    above = None if parent is None else run_dir / parent
    return RewardModel(stage=stage, kind="implicit", folder=run_dir / stage, data=pairs(**changes), parent=above)


@torch.no_grad()
def plain_logps(folder: Path | None, side: str) -> tuple[list[list[float]], list[int]]:
    """(log-prob of each token of each reply, the replies' lengths), of the plain libraries, one reply at a time."""
    base = resolve_base("random:llama")
    tokenizer = load_tokenizer(base)
    model: Any = (
        AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        if folder is None
        else AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ).eval()
    logps = []
    for row in PAIRS:
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.encode(str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)))
        reply = [*tokenizer.encode(row[side]), tokenizer.eos_token_id]
        logits = model(torch.tensor([[*prompt, *reply]])).logits[0].double().log_softmax(-1)
        logps.append([float(logits[len(prompt) + place - 1, token]) for place, token in enumerate(reply)])
    return logps, [len(each) for each in logps]


@pytest.mark.parametrize(("stage", "parent", "beta"), [("dpo", "sft", BETA), ("fresh", None, 0.5)])
def test_margins_are_those_of_plain_libraries(run_dir, monkeypatch, stage, parent, beta):
    seen: dict[str, Any] = {}

    def spy(chosen, rejected, chosen_lengths, rejected_lengths, **_):
        seen.update(margins=[a - b for a, b in zip(chosen, rejected, strict=True)], lengths=chosen_lengths)
        return {}

    monkeypatch.setattr("preftune.eval.reward_models.pair_metrics", spy)
    (row,) = eval_reward(spec_of(run_dir), [implicit(run_dir, stage, parent)])
    above = None if parent is None else run_dir / parent
    sums = {
        (name, side): [sum(each) for each in plain_logps(folder, side)[0]]
        for name, folder in (("policy", run_dir / stage), ("reference", above))
        for side in ("chosen", "rejected")
    }
    expected = [
        beta * (good - good_before - (bad - bad_before))
        for good, good_before, bad, bad_before in zip(
            sums["policy", "chosen"],
            sums["reference", "chosen"],
            sums["policy", "rejected"],
            sums["reference", "rejected"],
            strict=True,
        )
    ]
    assert max(map(abs, expected)) > 0.1
    assert seen["margins"] == pytest.approx(expected, abs=1e-5)
    assert seen["lengths"] == plain_logps(None, "chosen")[1]
    assert (row["kind"], row["beta"]) == ("implicit", beta)


def test_tokens_beyond_the_shorter_reply_weigh_what_training_made_them_weigh(run_dir):
    (row,) = eval_reward(spec_of(run_dir), [implicit(run_dir, "ld")])
    logps = {
        (stage, side): plain_logps(run_dir / stage, side)[0]
        for stage in ("ld", "sft")
        for side in ("chosen", "rejected")
    }
    total = 0.0
    for place in range(len(PAIRS)):
        shared = min(len(logps["ld", side][place]) for side in ("chosen", "rejected"))
        for side, sign in (("chosen", 1), ("rejected", -1)):
            ratios = [a - b for a, b in zip(logps["ld", side][place], logps["sft", side][place], strict=True)]
            total += sign * (sum(ratios[:shared]) + 0.3 * sum(ratios[shared:]))
    # beta: TRL's default, as the stage said none
    assert row["beta"] == 0.1
    assert row["margin_mean"] == pytest.approx(0.1 * total / len(PAIRS), abs=1e-5)


def test_equal_policies_tell_nothing_apart(run_dir):
    (row,) = eval_reward(spec_of(run_dir), [implicit(run_dir, "same")])
    assert (row["margin_mean"], row["accuracy"], row["ties"], row["n"]) == (0.0, 0.5, 12, 12)
    assert row["log_loss"] == pytest.approx(math.log(2))
    (only,) = row["calibration"]
    assert (only["n"], only["confidence"], only["accuracy"]) == (12, pytest.approx(0.5), 0.5)


def test_accuracy_is_held_against_length(run_dir):
    (row,) = eval_reward(spec_of(run_dir), [implicit(run_dir, "dpo")])
    # chosen has 4, 8 or 12 bytes, rejected 9 to 12; both an EOS: 12 > 9, 12 > 10, 12 > 11, and 12 = 12 is a half
    assert (row["longer_wins"], row["shorter_wins"]) == (pytest.approx(3.5 / 12), pytest.approx(8.5 / 12))


def test_the_base_is_loaded_once_and_policies_are_not_loaded_again(run_dir):
    bench = Workbench.open(spec_of(run_dir))
    names = list(bench.adapters.names)
    assert bench.load(run_dir / "dpo") == bench.roles["dpo"]
    assert bench.load(run_dir / "rm") == bench.load(run_dir / ".." / run_dir.name / "rm")
    assert len(bench.adapters.names) == len(names) + 1
    assert bench.load(None) is None


def test_the_evaluation_writes_what_training_left_out(run_dir, tmp_path, capsys):
    held: dict[str, Any] = {"held_out": 0.4}
    models = (
        RewardModel(stage="rm", kind="reward", folder=run_dir / "rm", data=pairs(**held)),
        implicit(run_dir, "dpo", **held),
        implicit(run_dir, "fresh", None, held_out=0.5),  # more than its training left out
        implicit(run_dir, "ppo", **held),  # not there
        replace(implicit(run_dir, "same", **held), data=DataSpec((SourceSpec("labels.jsonl"),), held_out=0.4)),
    )
    spec = spec_of(run_dir, reward_models=models)
    run_eval(spec, tmp_path)
    rows = json.loads((tmp_path / "eval" / "rewards.json").read_text())
    assert [(row["stage"], row["kind"], row["held_out"]) for row in rows] == [
        ("rm", "reward", True), ("dpo", "implicit", True)
    ]  # fmt: skip
    loaded = load_rows(pairs(), "pair", (run_dir,)).rows
    kept = sum(prompt_position(row, 0) < 0.4 for row in loaded)
    assert 0 < kept < 12
    assert {row["n"] for row in rows} == {kept}
    keys = {
        *("stage", "kind", "n", "accuracy", "ci_low", "ci_high", "ties", "log_loss", "calibration_error"),
        *("margin_mean", "longer_wins", "shorter_wins", "calibration", "held_out"),
    }
    assert set(rows[0]) == keys and set(rows[1]) == {*keys, "beta"}
    said = capsys.readouterr().err
    assert "eval fresh: its reward is left out: it was trained with another data.held_out" in said
    assert "eval ppo: its reward is left out" in said and "holds no adapter" in said
    assert "eval same: its reward is left out" in said and "no chosen" in said
    # win-rates alone measure no reward model, and a second evaluation without them leaves no old file
    assert "reward" not in str(eval_winrate(spec, tmp_path)[0])
    said = capsys.readouterr().err
    assert [line.partition(": ")[2] for line in said.splitlines()] == ["2 samples as drawn before"] * 2
    run_eval(replace(spec, reward_models=()), tmp_path)
    assert not (tmp_path / "eval" / "rewards.json").exists()


def test_a_reference_that_is_not_the_start_is_refused(run_dir):
    with pytest.raises(UserError, match="did not start from what lies in"):
        eval_reward(spec_of(run_dir), [implicit(run_dir, "dpo", "fresh")])
    with pytest.raises(UserError, match="did not start from the base"):
        eval_reward(spec_of(run_dir), [implicit(run_dir, "dpo", None)])
    with pytest.raises(UserError, match="none of dpo can be measured"):
        eval_reward(spec_of(run_dir), [implicit(run_dir, "dpo", None)], skip=True)
    (row,) = eval_reward(spec_of(run_dir), [implicit(run_dir, "dpo", None), implicit(run_dir, "dpo")], skip=True)
    assert row["stage"] == "dpo"


def test_a_score_that_is_not_finite_costs_its_row_alone(run_dir, tmp_path, capsys):
    broken = Path(shutil.copytree(run_dir / "rm", tmp_path / "rm"))
    tensors = load_file(broken / WEIGHTS)
    tensors[SCORE][0, 0] = math.nan
    save_file(tensors, broken / WEIGHTS, {"format": "pt"})
    models = [RewardModel(stage="rm", kind="reward", folder=broken, data=pairs()), implicit(run_dir, "dpo")]
    (row,) = eval_reward(spec_of(run_dir), models, skip=True)
    assert row["stage"] == "dpo"
    assert "eval rm: its reward is left out" in (said := capsys.readouterr().err) and "holds NaN" in said


@pytest.mark.parametrize(
    ("changes", "surely"),
    [
        ({"held_out": 0.4}, True),
        ({"held_out": 0.1}, True),  # the first part of what was left out
        ({"held_out": 0.41}, False),
        ({"held_out": 0.0}, False),
        ({"held_out": 0.4, "seed": 1}, False),  # another draw
        ({"held_out": 0.4, "system": "be kind"}, False),  # other prompts
    ],
)
def test_left_out(run_dir, changes, surely):
    assert left_out(pairs(**changes), read_lineage(run_dir / "dpo")) is surely
