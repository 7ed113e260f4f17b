"""Every seam holds with the installed libraries, a name that moves ends the work in words, and none is dead."""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.hooks
import pytest
import torch
import transformers
import trl.trainer.utils
from accelerate.data_loader import BatchSamplerShard
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import BatchSampler
from transformers import AutoModel, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from preftune.models import seams
from preftune.models.adapters import AdapterSet
from preftune.models.dropout import no_dropout
from preftune.models.loading import load_model
from preftune.models.lora import LoraSpec
from preftune.models.row_cache import RowCache, _Layer
from preftune.stages.dpo import DPOStageTrainer
from preftune.stages.kto import KTOStageTrainer
from preftune.stages.ppo.trainer import PPOTrainer
from preftune.stages.reward import RewardStageTrainer
from preftune.stages.sft import SFTStageTrainer
from preftune.stages.trainers import check_identity

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _unchecked():
    seams.forget_checks()
    yield
    seams.forget_checks()


def llama() -> PreTrainedModel:
    return AutoModel.from_config(LlamaConfig(**SMALL), attn_implementation="sdpa")


def lora_layer(make) -> BaseTunerLayer:
    return next(iter(make()._layers.values()))


def token_layer(make) -> Any:
    return next(each for each in make(trainable_token_indices=[5])._layers.values() if hasattr(each, "token_indices"))


def collator(*names: str) -> SimpleNamespace:
    kind = type("DataCollatorForPreference", (), dict.fromkeys(names))
    return SimpleNamespace(data_collator=kind())


def packed_layer(bits: str) -> Any:
    """A linear layer as bitsandbytes holds it."""
    import bitsandbytes

    kinds: Any = bitsandbytes.nn
    layer: Any = kinds.Linear4bit(64, 2) if bits == "4bit" else kinds.Linear8bitLt(64, 2, has_fp16_weights=False)
    return layer.to("cpu")


def _without_scales() -> Any:
    layer = packed_layer("4bit")
    del layer.weight.quant_state.absmax
    return layer


NO_SUBJECT = {
    *("SOFTMAX_BACKWARD", "ONEDNN_LINEAR", "ONEDNN_BF16", "FLEX_ATTENTION", "ATTENTION_FUNCTIONS", "DECODER_FIELDS"),
    *(
        "CALLBACK_STATE",
        "LOGIT_FIELDS",
        "CONV1D",
        "TOKENIZER_CORE",
        "QUANTIZER_MARKS",
        "FAKE_TENSORS",
        "FUSED_HEAD",
        "HOOK_MARK",
        "LAUNCHER",
        "OPTIMIZERS",
    ),
}
SUBJECTS = {
    "MODULE_HOOKS": lambda _: [torch.nn.Linear(2, 2)],
    "DROPOUT": lambda _: [llama()],
    "TREE_HANDOVER": lambda _: [SimpleNamespace(attended=[None])],
    "DECODER_PARTS": lambda _: [llama(), AutoModel.from_config(Qwen3Config(**SMALL))],
    "CACHE_LAYER": lambda _: [_Layer],
    "BASE_NAME": lambda _: [llama()],
    "PACKED_WEIGHTS": lambda _: [packed_layer("4bit"), packed_layer("8bit")],
    "TRAINER_CHECKPOINT": lambda _: [PPOTrainer],
    "TRAINER_RESUME": lambda _: [PPOTrainer],
    "PREPARE_DATASET": lambda _: [SFTStageTrainer, RewardStageTrainer, DPOStageTrainer, KTOStageTrainer],
    "GRAD_NORM": lambda _: [SFTStageTrainer, RewardStageTrainer, DPOStageTrainer, KTOStageTrainer],
    "EPOCHS": lambda _: [SFTStageTrainer, RewardStageTrainer, DPOStageTrainer, KTOStageTrainer],
    "BATCHES": lambda _: [SFTStageTrainer, RewardStageTrainer, DPOStageTrainer, KTOStageTrainer],
    "BATCH_SHARDS": lambda _: [SimpleNamespace(batch_sampler=BatchSamplerShard(BatchSampler(range(4), 2, False), 2))],
    "KL_LOGPS": lambda _: [KTOStageTrainer],
    "ZERO3": lambda _: [None],
    "SHARDED_BASE": lambda _: [sharded_trainer()],
    "COMPUTE_LOSS": lambda _: [DPOStageTrainer, KTOStageTrainer],
    "REFERENCE_LOGPS": lambda _: [DPOStageTrainer, KTOStageTrainer],
    "COLLATOR": lambda _: [
        SimpleNamespace(data_collator=DataCollatorForPreference(pad_token_id=0)),
        SimpleNamespace(data_collator=DataCollatorForUnpairedPreference(pad_token_id=0)),
    ],
    "TRL_SETTINGS": lambda _: [trl.trainer.dpo_config.DPOConfig(use_cpu=True, bf16=False), SimpleNamespace()],
    "METRICS": lambda _: [SimpleNamespace(_metrics={"train": {}})],
    "TRAINED_TOKENS": lambda _: [SimpleNamespace(_total_train_tokens=0)],
    "ADAPTER_SWITCH": lambda make: [lora_layer(make)],
    "LORA_LAYER": lambda make: [lora_layer(make)],
    "TOKEN_ROWS": lambda make: [token_layer(make)],
}


def sharded_trainer() -> SFTStageTrainer:
    """A trainer of which only the names are looked at."""
    trainer = SFTStageTrainer.__new__(SFTStageTrainer)
    trainer.is_distributed_loading_by_transformers = False
    return trainer


NAMES = {name: value for name, value in vars(seams).items() if isinstance(value, seams.Seam)}


# TRL 1.16's configs still set transformers' old name of activation checkpointing
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_it_holds_with_the_installed_versions(name, make):
    assert (name in NO_SUBJECT) != (name in SUBJECTS)
    for subject in SUBJECTS.get(name, lambda _: [None])(make):
        seams.check(NAMES[name], subject)


def test_every_seam_is_declared_with_all_that_its_message_needs():
    assert set(seams.declared()) == set(NAMES.values())
    assert len({seam.key for seam in NAMES.values()}) == len(NAMES)
    assert all(seam.names and seam.purpose and seam.otherwise for seam in NAMES.values())


def test_every_seam_is_checked_somewhere():
    rooms = [file for room in ("models", "stages", "eval", "cli", "api") for file in (ROOT / room).rglob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in rooms if file.name != "seams.py")
    used = set(re.findall(r"\bseams\.([A-Z][A-Z0-9_]+)\b", text))
    assert not set(NAMES) - used


def test_the_tested_versions_are_those_of_the_constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {name: pinned[name] for name in seams.TESTED} == seams.TESTED


def _renamed_norm():
    model = AutoModel.from_config(Qwen3Config(**SMALL))
    attention = model.layers[0].self_attn
    attention.query_norm = attention.q_norm
    del attention.q_norm
    return model


def _with_a_new_part():
    model = llama()
    model.get_submodule("layers.0").post_mlp_norm = torch.nn.Identity()
    return model


def _with_a_new_rate():
    model = llama()
    attention: Any = model.get_submodule("layers.0.self_attn")  # a module's own attributes are typed as tensors
    attention.score_dropout = 0.1
    return model


def _without_hooks():
    module = torch.nn.Linear(2, 2)
    del module.__dict__["_forward_hooks"]
    return module


class _NewCacheLayer(ABC):
    @abstractmethod
    def what_is_new(self) -> None: ...


def _owner(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))


# What moves (patched for the test), the subject, and the word that must be in the message.
MOVES = {
    "SOFTMAX_BACKWARD": (lambda p: p.setattr(torch.ops, "aten", SimpleNamespace()), None, "_softmax_backward_data"),
    "ONEDNN_LINEAR": (lambda p: p.setattr(torch.ops, "mkldnn", SimpleNamespace()), None, "_linear_pointwise"),
    "ONEDNN_BF16": (lambda p: p.setattr(torch.ops, "mkldnn", SimpleNamespace()), None, "_is_mkldnn_bf16_supported"),
    "FLEX_ATTENTION": (lambda p: p.delattr("torch.nn.attention.flex_attention.BlockMask"), None, "BlockMask"),
    "MODULE_HOOKS": (None, _without_hooks, "_forward_hooks"),
    "DROPOUT": (None, _with_a_new_rate, "layers.0.self_attn.score_dropout"),
    "ATTENTION_FUNCTIONS": (lambda p: p.delattr("transformers.masking_utils.sdpa_mask"), None, "sdpa_mask"),
    "TREE_HANDOVER": (None, lambda: SimpleNamespace(attended=[]), "hand-over"),
    "DECODER_FIELDS": (lambda p: p.delattr(PreTrainedModel, "_is_stateful"), None, "_is_stateful"),
    "LOGIT_FIELDS": (lambda p: p.setattr(transformers, "CohereConfig", LlamaConfig), None, "logit_scale"),
    "DECODER_PARTS": (None, _with_a_new_part, "LlamaModel.layers.post_mlp_norm"),
    "DECODER_PARTS, one renamed": (None, _renamed_norm, "self_attn.q_norm"),
    "CACHE_LAYER": (None, lambda: _NewCacheLayer, "what_is_new"),
    "CONV1D": (lambda p: p.delattr("transformers.pytorch_utils.Conv1D"), None, "Conv1D"),
    "FAKE_TENSORS": (
        lambda p: p.delattr("torch._subclasses.fake_tensor.FakeTensorMode"), None, "fake_tensor:FakeTensorMode"
    ),
    "BASE_NAME": (None, lambda: SimpleNamespace(config=SimpleNamespace()), "_name_or_path"),
    "TOKENIZER_CORE": (
        lambda p: p.delattr(_owner(PreTrainedTokenizerFast, "backend_tokenizer"), "backend_tokenizer"),
        None,
        "backend_tokenizer",
    ),
    "QUANTIZER_MARKS": (lambda p: p.setattr(PreTrainedModel, "save_pretrained", lambda self: self), None, "hf_quant"),
    "PACKED_WEIGHTS": (None, _without_scales, "quant_state.absmax"),
    "PACKED_WEIGHTS, in 8 bits": (None, lambda: SimpleNamespace(weight=1, state=1), "Int8Params.SCB"),
    "TRAINER_CHECKPOINT": (lambda p: p.delattr(Trainer, "_save_checkpoint"), lambda: PPOTrainer, "_save_checkpoint"),
    "TRAINER_RESUME": (lambda p: p.delattr(Trainer, "_load_rng_state"), lambda: PPOTrainer, "_load_rng_state"),
    "PREPARE_DATASET": (
        lambda p: p.delattr(SFTTrainer, "_prepare_dataset"), lambda: SFTStageTrainer, "SFTStageTrainer._prepare_dataset"
    ),
    "GRAD_NORM": (
        lambda p: p.delattr(Trainer, "_get_grad_norm"), lambda: SFTStageTrainer, "SFTStageTrainer._get_grad_norm"
    ),
    "EPOCHS": (lambda p: p.delattr(Trainer, "_run_epoch"), lambda: SFTStageTrainer, "SFTStageTrainer._run_epoch"),
    "EPOCHS, one renamed": (
        lambda p: p.setattr(Trainer, "_inner_training_loop", lambda self: self), lambda: SFTStageTrainer,
        "the call of SFTStageTrainer._finalize_training",
    ),
    "BATCHES": (
        lambda p: p.delattr(Trainer, "_get_dataloader"), lambda: SFTStageTrainer, "SFTStageTrainer._get_dataloader"
    ),
    "BATCH_SHARDS": (None, lambda: SimpleNamespace(batch_sampler=BatchSampler(range(4), 2, False)), "even_batches"),
    "ZERO3": (
        lambda p: p.delattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref"), None,
        "_hf_deepspeed_config_weak_ref",
    ),
    "KL_LOGPS": (
        lambda p: p.delattr(KTOTrainer, "_compute_kl_logps"), lambda: KTOStageTrainer, "_compute_kl_logps"
    ),
    "SHARDED_BASE": (
        lambda p: p.delattr(Trainer, "_sync_replicated_trainable_parameters"), sharded_trainer,
        "_sync_replicated_trainable_parameters",
    ),
    "CALLBACK_STATE": (
        lambda p: p.delattr("transformers.trainer_callback.EarlyStoppingCallback"), None, "EarlyStoppingCallback"
    ),
    "COMPUTE_LOSS": (
        lambda p: p.delattr(KTOTrainer, "_compute_loss"), lambda: KTOStageTrainer, "KTOStageTrainer._compute_loss"
    ),
    "COMPUTE_LOSS, not called": (
        lambda p: p.setattr(DPOTrainer, "compute_loss", lambda self, model: self.loss(model)),
        lambda: DPOStageTrainer,
        "the call of DPOStageTrainer._compute_loss",
    ),
    "REFERENCE_LOGPS": (
        lambda p: p.delattr(DPOTrainer, "_precompute_ref_logps"), lambda: DPOStageTrainer, "_precompute_ref_logps"
    ),
    "REFERENCE_LOGPS, key not read": (
        lambda p: p.setattr(DPOTrainer, "_precompute_ref_logps", lambda self, rows: rows),
        lambda: DPOStageTrainer,
        "DPOTrainer._precompute_model_hash",
    ),
    "COLLATOR": (None, lambda: collator("max_length"), "truncation_mode"),
    "TRL_SETTINGS": (None, type("DPOConfig", (), {"ld_alpha": None}), "use_weighting"),
    "METRICS": (None, lambda: SimpleNamespace(metrics={}), "_metrics"),
    "TRAINED_TOKENS": (None, SimpleNamespace, "_total_train_tokens"),
    "FUSED_HEAD": (lambda p: p.setattr(trl.trainer.utils, "add_fused_lm_head", lambda m: m), None, "fused_lm_head"),
    "HOOK_MARK": (lambda p: p.setattr(accelerate.hooks, "add_hook_to_module", lambda m, hook: m), None, "_hf_hook"),
    "OPTIMIZERS": (lambda p: p.delattr("transformers.trainer_optimizer.OptimizerContext"), None, "OptimizerContext"),
    "LAUNCHER": (lambda p: p.delattr("accelerate.commands.launch.launch_command"), None, "launch:launch_command"),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVES)
def test_a_name_that_has_moved_ends_the_work_in_words(case, monkeypatch):
    seam = NAMES[case.partition(",")[0]]
    move, subject, word = MOVES[case]
    with monkeypatch.context() as patch:
        if move is not None:
            move(patch)
        with pytest.raises(seams.SeamMoved) as raised:
            seams.require(seam, subject() if subject else None)
    text = str(raised.value)
    assert word in text and "\n" not in text
    assert f"install {seam.library}=={seams.TESTED[seam.library]}" in text


def test_pefts_switch_and_the_names_of_its_tensors(make, monkeypatch):
    """These need real layers, which are made before their names move."""
    layer, rows = lora_layer(make), token_layer(make)
    seams.forget_checks()
    with monkeypatch.context() as patch:
        patch.setattr(BaseTunerLayer, "disable_adapters", property(lambda self: self._switched_off))
        with pytest.raises(seams.SeamMoved, match=r"_disable_adapters.*policy and reference would be the same"):
            seams.require(seams.ADAPTER_SWITCH, layer)
    with monkeypatch.context() as patch:
        patch.setattr(LoraLayer, "adapter_layer_names", ("lora_left", "lora_right"))
        with pytest.raises(seams.SeamMoved, match="without lora_A"):
            seams.require(seams.LORA_LAYER, layer)
    with monkeypatch.context() as patch:
        patch.setattr(type(rows), "adapter_layer_names", ("rows",))
        with pytest.raises(seams.SeamMoved, match=r"without trainable_tokens_delta.*speak with the base's rows"):
            seams.require(seams.TOKEN_ROWS, rows)
    seams.require(seams.ADAPTER_SWITCH, layer)
    assert layer.active_adapters == ["default"] and not layer.disable_adapters


def test_every_move_is_simulated():
    assert {case.partition(",")[0] for case in MOVES} | {"ADAPTER_SWITCH", "LORA_LAYER", "TOKEN_ROWS"} == set(NAMES)


def test_a_seam_is_checked_once_for_a_type():
    seen = []
    seam = seams.Seam("x", "torch", ("x",), "x", "x", lambda subject: seen.append(subject) or [])
    for subject in (1, 2, "text"):
        seams.require(seam, subject)
    assert seen == [1, "text"]


def test_an_import_that_fails_says_so():
    words = r"torch .* has moved .*nowhere.*install torch=="
    with pytest.raises(seams.SeamMoved, match=words), seams.importing(seams.FLEX_ATTENTION):
        from torch.nn.attention.flex_attention import nowhere  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]: fails on purpose


# --- where they are checked ------------------------------------------------------------------------------------------


def test_adapters_are_not_made_where_their_switch_has_moved(base, monkeypatch):
    monkeypatch.setattr(BaseTunerLayer, "active_adapters", property(lambda self: ["default"]))
    with pytest.raises(seams.SeamMoved, match="_active_adapter"):
        AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4))


@pytest.mark.parametrize("trainer", [DPOStageTrainer, KTOStageTrainer])
def test_a_stage_does_not_begin_where_trl_passes_over_its_methods(trainer, monkeypatch):
    upstream = DPOTrainer if trainer is DPOStageTrainer else KTOTrainer
    monkeypatch.setattr(upstream, "compute_loss", lambda self, model: None)
    with pytest.raises(seams.SeamMoved, match="_compute_loss"):
        trainer()


def test_a_first_step_without_log_ratios_is_not_passed_over():
    renamed = {"reward/chosen": [0.0], "reward/rejected": [0.0]}
    trainer = SimpleNamespace(model=llama(), _metrics={"train": renamed}, args=SimpleNamespace(bf16=False, fp16=False))
    with pytest.raises(seams.SeamMoved, match="rewards/chosen"):
        check_identity(trainer, 0.1)


def test_a_cache_is_not_made_of_layers_that_lack_something(monkeypatch):
    monkeypatch.setattr(_Layer, "__abstractmethods__", frozenset({"crop"}))
    with pytest.raises(seams.SeamMoved, match=r"CacheLayerMixin\.crop"):
        RowCache(1, 1)


def test_no_dropout_is_left_anywhere():
    config = LlamaConfig(**SMALL, attention_dropout=0.3)
    model = AutoModel.from_config(config, attn_implementation="sdpa").train()
    model.layers[0].mlp.extra = torch.nn.Dropout(0.2)
    no_dropout(model)
    assert model.layers[0].self_attn.attention_dropout == model.config.attention_dropout == 0
    assert model.layers[0].mlp.extra.p == 0 and model.training
    # a module's own rate has many names
    model.layers[0].self_attn.score_dropout = 0.1
    no_dropout(model)
    assert model.layers[0].self_attn.score_dropout == 0

    class StableDropout(torch.nn.Module):
        p = 0.1

    model.layers[0].mlp.other = StableDropout()
    with pytest.raises(seams.SeamMoved, match=r"layers\.0\.mlp\.other\.p"):
        no_dropout(model)
