"""What stages will cost: shipped recipes on their cards, published figures of other libraries, how it is counted."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig, PreTrainedConfig

from preftune.data.spec import DataSpec, SourceSpec
from preftune.models.base import Base
from preftune.models.cards import room
from preftune.models.cost import sizes
from preftune.models.lora import LoraSpec
from preftune.models.tiny import SHAPES, RandomSpec
from preftune.recipes.build import stage_job
from preftune.recipes.load import load_recipe
from preftune.stages.costs import AssumedRows, Place, Rows, StageCost, stage_cost
from preftune.stages.job import StageJob

GPU = Place("cuda")


def job(kind: str, tmp_path: Path, **given: Any) -> StageJob:
    made: dict[str, Any] = {
        "name": kind,
        "kind": kind,
        "base": Base("x", Path(), None, ""),
        "dtype": "bfloat16",
        "data": DataSpec((SourceSpec("x"),)),
        "output_dir": tmp_path,
    }
    return StageJob(**{**made, **given})


def cost(
    kind: str, tmp_path: Path, config: PreTrainedConfig, rows: AssumedRows | Rows, place: Place = GPU, **given: Any
) -> StageCost:
    return stage_cost(job(kind, tmp_path, **given), config, rows, None, place)


# --- recipes ----------------------------------------------------------------------------------------------------------

CARDS = [
    ("llama-3.1-8b-qlora", "random:llama-3.1-8b", 24),
    ("qwen3-1.7b-ultrafeedback", "random:qwen3-1.7b", 24),
    ("llama-3.2-3b-hh", "random:llama-3.2-3b", 48),
    ("llama-3.1-8b-ultrafeedback", "random:llama-3.1-8b", 80),
]


@pytest.mark.parametrize(("name", "base", "gigabytes"), CARDS)
def test_a_recipe_fits_the_card_that_it_is_for(name: str, base: str, gigabytes: int, tmp_path: Path):
    """Even where every row is as long as it may be."""
    recipe = load_recipe(name, [f"model.base={base}"])
    config = RandomSpec.read(base).config()
    for stage in recipe.stages:
        made = stage_job(recipe, stage, Base(base, Path(), None, ""), tmp_path, tmp_path / stage)
        spec, kind = made.data, made.record.rows
        longest = (spec.max_prompt_length if kind == "prompt" else spec.max_length) or 0
        rows = AssumedRows(1000, longest, kind)
        found = stage_cost(made, config, rows, rows if spec.held_out else None, GPU)
        assert found.approximate is None
        phase, peak = found.peak
        assert peak <= room(gigabytes * 10**9), f"{stage} holds {peak / 1e9:.1f} GB while in its {phase}"


@pytest.mark.parametrize("name", [name for name, _, _ in CARDS])
def test_effective_batches_are_small_and_all_layers_train(name: str):
    recipe = load_recipe(name)
    assert recipe.lora.target_modules == "all-linear"
    for stage in recipe.stages.values():
        train = stage.train
        if stage.record.on_policy is None:
            step = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
        else:
            step = stage.method()["rollout_batch_size"] // stage.method()["num_mini_batches"]
        assert step < 32
        # about ten times full fine-tuning's, as the kinds' defaults have them
        assert train["learning_rate"] == stage.record.defaults["learning_rate"]


# --- what others measured ---------------------------------------------------------------------------------------------


def llama(layers: int, hidden: int, inner: int, heads: int, kv: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=False,
    )  # fmt: skip


LLAMA_8B = llama(32, 4096, 14336, 32, 8, 128256)
LLAMA_65B = llama(80, 8192, 22016, 64, 64, 32000)
LLAMA_70B = llama(80, 8192, 28672, 64, 8, 128256)
TORCHTUNE = "README of pytorch/torchtune, Memory and training speed: batch 2 of 2,048 tokens"
FACTORY = "README of hiyouga/LLaMA-Factory, Hardware Requirement, estimated"
# its script: rank 64 on all linear layers, nf4 with double quantisation, checkpointing, batch 1, paged AdamW in 32 bits
QLORA = "arXiv 2305.14314, abstract, and qlora.py of artidoro/qlora"
PAGED = {"optim": "paged_adamw_32bit"}
PUBLISHED = [
    # config, rank, quantization, checkpointing, rows of tokens, what else, fits, does not fit, source
    (LLAMA_8B, 8, "4bit", True, (2, 2048), {}, 24, 0, f"{TORCHTUNE}: QLoRA 7.4 GiB on an RTX 4090"),
    (LLAMA_8B, 8, None, True, (2, 2048), {}, 24, 16, f"{TORCHTUNE}: LoRA 16.2 GiB on an RTX 4090"),
    (LLAMA_8B, 8, None, False, (2, 2048), {}, 48, 24, f"{TORCHTUNE}: LoRA 30.3 GiB on an A6000"),
    (LLAMA_65B, 64, "4bit", True, (1, 512), PAGED, 48, 24, f"{QLORA}: a 65B model on one 48 GB GPU"),
    (LLAMA_70B, 8, "4bit", True, (1, 1024), {}, 48, 24, f"{FACTORY}: QLoRA of 70B in 4 bits 48 GB"),
    (LLAMA_70B, 8, None, True, (1, 1024), {}, 192, 80, f"{FACTORY}: LoRA of 70B in 16 bits 160 GB"),
]


@pytest.mark.parametrize(
    ("config", "rank", "quantization", "checkpointing", "rows", "also", "fits", "too_small", "source"),
    PUBLISHED,
    ids=[each[-1].rpartition(": ")[2] for each in PUBLISHED],
)
def test_published_figures_land_on_the_right_side(
    config: PreTrainedConfig, rank: int, quantization: str | None, checkpointing: bool, rows: tuple[int, int],
    also: dict[str, Any], fits: int, too_small: int, source: str, tmp_path: Path,
):  # fmt: skip
    found = cost(
        "sft", tmp_path, config, AssumedRows(100, rows[1], "demo"), quantization=quantization, lora=LoraSpec(r=rank),
        train={"per_device_train_batch_size": rows[0], "gradient_checkpointing": checkpointing, **also},
    )  # fmt: skip
    assert found.approximate is None
    peak = found.peak[1]
    assert peak <= room(fits * 10**9), source
    assert peak > room(too_small * 10**9), source


# --- how it is counted ------------------------------------------------------------------------------------------------

SMALL = llama(6, 64, 160, 4, 2, 300)


def test_a_pair_is_counted_with_both_sides_and_what_they_share():
    rows = Rows(
        Dataset.from_dict({"prompt_ids": [[1] * 5], "chosen_ids": [[2] * 3], "rejected_ids": [[3] * 4]}), "pair"
    )
    assert (rows.lengths, rows.longest, rows.scored([0])) == ([17], 9, 7)
    assert rows.sequences([0]) == [[1] * 5 + [2] * 3, [1] * 5 + [3] * 4]
    bytes_as_tokens = Rows(Dataset.from_dict({"prompt_ids": [[1] * 8]}), "prompt", every=4)
    assert bytes_as_tokens.lengths == [2]


def test_devices_and_accumulation_divide_the_steps(tmp_path: Path):
    rows = AssumedRows(960, 32, "demo")
    train = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    one = cost("sft", tmp_path, SMALL, rows, train=train)
    two = cost("sft", tmp_path, SMALL, rows, Place("cuda", processes=2), train=train)
    assert (one.steps, two.steps) == (240, 120)
    assert one.tokens == two.tokens == 960 * 2 * 32 and one.flops == two.flops
    assert two.phases["training step"]["gradient buckets"] == two.trained * 4
    shared = cost("sft", tmp_path, SMALL, rows, Place("cuda", processes=4, sharded=True), train=train)
    assert shared.phases["training step"]["weights"] < one.phases["training step"]["weights"]


def test_rows_that_were_not_read_leave_the_steps_open(tmp_path: Path):
    found = cost("sft", tmp_path, SMALL, AssumedRows(0, 64, "demo"))
    assert (found.rows, found.steps, found.tokens, found.flops) == (None, None, None, None)
    assert found.peak[1] > 0
    known = cost("sft", tmp_path, SMALL, AssumedRows(0, 64, "demo"), train={"max_steps": 7})
    assert known.steps == 7


def test_what_ppo_holds_by_phase(tmp_path: Path):
    method = {
        "rollout_batch_size": 16, "num_mini_batches": 2, "num_ppo_epochs": 3, "total_episodes": 64,
        "max_new_tokens": 20, "rollout_micro_batch_size": 8,
    }  # fmt: skip
    rows = AssumedRows(32, 12, "prompt")
    found = cost("ppo", tmp_path, SMALL, rows, method=method)
    assert found.steps == 64 // 16 * 6
    assert found.tokens == 64 * (12 + 20)
    rollout, update = found.phases["rollout"], found.phases["update"]
    # a cache for prompt and reply, and the prompts' own until they are copied into it
    a_token = 2 * 6 * 2 * 16 * 2
    assert rollout["key-value cache"] == 8 * (12 + 20 + 12) * a_token
    adapted = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) * 2
    # whose memory a GPU keeps; a CPU's is the allocator's again
    assert rollout["merged weights"] == update["merged weights"] == adapted
    here = cost("ppo", tmp_path, SMALL, rows, Place("cpu"), method=method)
    assert "merged weights" in here.phases["rollout"] and "merged weights" not in here.phases["update"]
    # policy, value, reference
    assert update["adapters"] == 3 * found.trained // 2 * 4
    shared = cost("ppo", tmp_path, SMALL, rows, method={**method, "value": "shared"})
    assert shared.trained == found.trained // 2 and (shared.flops or 0) < (found.flops or 0)
    quantised = cost("ppo", tmp_path, SMALL, rows, method=method, quantization="4bit")
    assert "merged weights" not in quantised.phases["rollout"]
    served = cost("ppo", tmp_path, SMALL, rows, method={**method, "rollout_engine": "vllm", "rollout_url": "http://x"})
    assert "rollout" not in served.phases and "merged weights" not in served.phases["update"]
    assert 0 < (served.flops or 0) < (found.flops or 0)


def test_what_a_whole_model_holds(tmp_path: Path):
    rows = AssumedRows(64, 32, "demo")
    whole, adapter = (cost("sft", tmp_path, SMALL, rows, full=full) for full in (True, False))
    step, count = whole.phases["training step"], sizes(SMALL, LoraSpec(), "float32").parameters
    assert whole.trained == count > adapter.trained
    # fp32 whatever the run computes in: weights, AdamW's two moments, and before a step all gradients beside them
    assert (step["weights"], step["optimiser"]) == (4 * count, 8 * count)
    assert step.total() >= (4 + 8 + 4) * count
    assert "adapters" not in step and "reference" not in step
    assert (whole.flops or 0) > 1.2 * (adapter.flops or 0) and whole.disk == 2 * count + 2 * (4 + 8) * count
    pairs = AssumedRows(64, 32, "pair")
    refers = cost("dpo", tmp_path, SMALL, pairs, full=True).phases["training step"]
    assert refers["reference"] == refers["weights"] == 4 * count


def test_a_paged_optimiser_is_the_machines_memory_where_there_is_a_gpu(tmp_path: Path):
    rows = AssumedRows(64, 32, "demo")
    plain, paged = (cost("sft", tmp_path, SMALL, rows, train={"optim": f"{word}adamw_8bit"}) for word in ("", "paged_"))
    assert plain.phases["training step"]["optimiser"] == paged.paged == 2 * plain.trained and plain.paged == 0
    assert plain.peak[1] - paged.peak[1] == paged.paged
    assert cost("sft", tmp_path, SMALL, rows, Place("cpu"), train={"optim": "paged_adamw_8bit"}).paged == 0


def test_replies_are_as_long_as_the_expected_ones_and_no_longer_than_they_may_be(tmp_path: Path):
    method = {"rollout_batch_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 1, "total_episodes": 16,
              "max_new_tokens": 20, "rollout_micro_batch_size": 4}  # fmt: skip
    rows = AssumedRows(32, 12, "prompt")
    made = job("ppo", tmp_path, method=method)
    expected = stage_cost(made, SMALL, rows, None, GPU, replies=[2, 4, 6, 90])
    longest = stage_cost(made, SMALL, rows, None, GPU)
    assert expected.tokens == 16 * (12 + 8) and longest.tokens == 16 * (12 + 20)
    decodes = expected.work[0].decodes
    assert decodes is not None and sorted(decodes.lengths) == [2, 2, 4, 4, 6, 6, 20, 20]
    assert decodes.longest().lengths == (20,) * 8 and (decodes.at_once, decodes.most) == (4, 20)
    # memory is for the longest in either case
    assert expected.phases == longest.phases
    assert all(work.longer == 1 for work in longest.work)
    update = next(work for work in expected.work if work.phase == "update")
    assert sum(map(len, update.typical)) * update.longer == pytest.approx(4 * (12 + 20))


def test_a_gpus_defaults_are_the_librarys_and_a_cpus_are_ours(tmp_path: Path):
    rows = AssumedRows(64, 256, "demo")
    there, here = (cost("sft", tmp_path, SMALL, rows, Place(device)) for device in ("cuda", "cpu"))
    asked = cost("sft", tmp_path, SMALL, rows, train={"gradient_checkpointing": False})
    assert there.phases["training step"]["activations"] < asked.phases["training step"]["activations"]
    assert here.phases["training step"]["activations"] >= asked.phases["training step"]["activations"]


def test_a_model_that_cannot_be_rehearsed_is_estimated_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise RuntimeError("looks at its numbers")

    monkeypatch.setattr("preftune.stages.costs.rehearsed", fails)
    found = cost("sft", tmp_path, SMALL, AssumedRows(64, 256, "demo"))
    assert found.approximate == "looks at its numbers"
    assert found.phases["training step"]["activations"] > 0


def test_shapes_are_those_that_the_recipes_name():
    assert set(SHAPES) == {base.removeprefix("random:") for _, base, _ in CARDS}
