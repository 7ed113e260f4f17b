"""Every kind of stage and the evaluation on a quantised base on the CPU: the smoke recipe, and the kinds it lacks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preftune.cli import main as cli
from preftune.models.lineage import adapter_sha256
from preftune.models.loading import resolve_base

from .conftest import Shell

ALSO = [
    "stages.distill={from: sft, teacher: {stage: dpo}, data: prompts, rollout_batch_size: 4, total_episodes: 8, "
    "max_new_tokens: 12}",
    # a teacher of another base is quantised as well
    "stages.beside={kind: distill, from: sft, teacher: 'random:llama?seed=1', data: prompts, rollout_batch_size: 4, "
    "total_episodes: 4, max_new_tokens: 12}",
    "stages.best={kind: sample, from: sft, data: prompts, reward: reward, n: 2, keep: best, max_new_tokens: 12}",
    "stages.again={kind: sft, from: sft, data: {stage: best}, train: {max_steps: 1, per_device_train_batch_size: 4}}",
]
TRAINED = ("sft", "reward", "dpo", "ipo", "kto", "again")
ON_POLICY = ("ppo", "grpo", "rloo", "distill", "beside")
Ran = Callable[..., Path]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, preftune_cache: Path) -> Ran:
    """The folder of a run with those words; each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*words: str) -> Path:
        if words not in made:
            made[words] = tmp_path_factory.mktemp("quantised") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OMP_NUM_THREADS", "1")
                assert cli.run_command(["run", "smoke", *words, "--output-dir", str(made[words])]) == 0
        return made[words]

    return run


@pytest.fixture(scope="module")
def four(ran: Ran) -> Path:
    return ran("model.quantization=4bit", *ALSO)


def logged(run: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def lineage(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "lineage.json").read_text(encoding="utf-8"))


pytestmark = pytest.mark.slow


@pytest.mark.checklist("Q3")
def test_q03_every_stage_ends_and_its_adapter_is_one_of_the_base_as_it_lies(four: Path) -> None:
    base = resolve_base("random:llama")
    states = json.loads((four / "run.json").read_text(encoding="utf-8"))["stages"]
    assert {name: each["state"] for name, each in states.items()} == dict.fromkeys(
        (*TRAINED, *ON_POLICY, "best", "eval"), "done"
    )
    ids = torch.tensor([[8, 30, 60, 61]])
    for stage in (*TRAINED, *ON_POLICY):
        found = lineage(four, stage)
        assert found["base"]["sha256"] == base.sha256 and found["config"]["quantization"] == "4bit"
        assert found["versions"]["bitsandbytes"]
        kind: Any = AutoPeftModelForSequenceClassification if stage == "reward" else AutoPeftModelForCausalLM
        with torch.no_grad():
            assert bool(kind.from_pretrained(four / stage, num_labels=1)(input_ids=ids).logits.isfinite().all())
    rows = json.loads((four / "eval" / "results.json").read_text(encoding="utf-8"))
    assert {row["policy"] for row in rows} == {"base", "sft", "dpo", "ipo", "kto", "ppo", "grpo", "rloo"}
    assert all(row["kl"] == 0 for row in rows if row["policy"] == "sft")


@pytest.mark.checklist("Q2")
def test_q02_every_adapter_and_head_is_fp32(ran: Ran) -> None:
    """Of a base in bfloat16: what is below its rounding shows that it was trained so, not only saved."""
    words = [f"stages.{name}.train.learning_rate=1e-3" for name in ("dpo", "ppo", "grpo")]
    run = ran("model.quantization=4bit", "model.dtype=bfloat16", *words, "eval=null")
    for stage in ("sft", "reward", "dpo", "ppo", "grpo"):
        weights = load_file(run / stage / "adapter_model.safetensors")
        if (run / stage / "value_head.safetensors").is_file():
            weights |= load_file(run / stage / "value_head.safetensors")
        assert {each.dtype for each in weights.values()} == {torch.float32}
        moved = torch.cat([each.flatten() for name, each in weights.items() if "lora_B" in name or "score" in name])
        assert not torch.equal(moved, moved.bfloat16().float())


@pytest.mark.checklist("Q4")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_q04_the_first_steps_identities_are_as_close_as_on_a_whole_base(ran: Ran, four: Path, dtype: str) -> None:
    """A stage stops itself where one does not hold; here they are held against those of the base as it is."""
    if dtype == "float32":
        packed, whole = four, ran()
    else:
        words = [f"stages.{name}.train.learning_rate=1e-3" for name in ("dpo", "ppo", "grpo")]
        packed = ran("model.quantization=4bit", "model.dtype=bfloat16", *words, "eval=null")
        whole = ran("model.dtype=bfloat16", *words, "eval=null")
    for stage in ("ppo", "grpo", "rloo"):
        gap, usual = (logged(run, stage)[0]["rollout/logprob_mismatch"] for run in (packed, whole))
        assert gap < max(2 * usual, 1e-5)
    for stage in ("ppo", "rloo"):
        assert abs(logged(packed, stage)[0]["objective/kl"]) < (1e-5 if dtype == "float32" else 0.05)
    for stage in ("dpo", "ipo"):
        assert logged(packed, stage)[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.checklist("Q5")
def test_q05_a_merge_has_the_weights_that_the_adapter_knew_and_says_so(
    four: Path, tmp_path: Path, shell: Shell
) -> None:
    code, out, _ = shell("merge", four / "dpo", tmp_path / "merged")
    assert code == 0 and "the base's weights are those of its 4bit copy, unpacked" in out
    # its cost, in fp32, is none: what is merged is what the adapter beside that base says
    numbers = [float(word) for word in out.replace(",", " ").split() if word.replace(".", "").isdigit() and "." in word]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)
    code, out, _ = shell("export", four / "dpo", tmp_path / "served", "--to", "vllm")
    assert code == 0 and "it was trained beside the base's 4bit copy" in out and "--to merged" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(resolve_base("random:llama").path)
    path = "model.layers.0.mlp.up_proj"
    changed = (merged.get_parameter(f"{path}.weight") - plain.get_parameter(f"{path}.weight")).detach()
    assert type(merged.get_submodule(path)) is torch.nn.Linear and float(changed.abs().max()) > 1e-3


@pytest.mark.checklist("Q6")
def test_q06_processes_change_nothing_divided_or_not(ran: Ran, capfd: pytest.CaptureFixture[str]) -> None:
    """Two with a whole packed base each, and two that divide it, bit for bit as those; one to rounding."""
    stages = ("sft", "reward", "ppo")
    short = [
        *("data.demos.limit=8", "data.judged.limit=8", "data.judged.held_out=0", "eval=null"),
        *(f"stages.{name}.train.max_steps=2" for name in stages[:2]),
        *("stages.ppo.total_episodes=4", "stages.ppo.num_ppo_epochs=1", "stages.ppo.max_new_tokens=8"),
        *(f"stages.{name}=null" for name in ("dpo", "ipo", "kto", "grpo", "rloo")),
        "model.quantization=4bit",
    ]

    def batches(rows: int) -> list[str]:
        return [f"stages.{name}.train.per_device_train_batch_size={rows}" for name in stages[:2]]

    one = ran(*short, *batches(4))
    whole = ran(*short, *batches(2), "--num-processes", "2", "--launch", "ddp")
    capfd.readouterr()
    divided = ran(*short, *batches(2), "--num-processes", "2", "--launch", "fsdp2")
    assert capfd.readouterr().err.count("the frozen base is divided among 2 processes") == len(stages)
    for stage in stages:
        assert adapter_sha256(divided / stage) == adapter_sha256(whole / stage)
        for row, expected in zip(logged(whole, stage), logged(one, stage), strict=True):
            for name in {"loss", "objective/kl", "policy/loss", "value/loss", "objective/scores"} & row.keys():
                assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)


def test_plan_and_validate_know_a_quantised_base_on_a_cpu(shell: Shell) -> None:
    assert shell("validate", "smoke", "model.quantization=4bit")[0] == 0
    code, out, _ = shell("plan", "smoke", "model.quantization=4bit", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and {"cpu", "gpu"} <= set(rows[0]["memory"])
