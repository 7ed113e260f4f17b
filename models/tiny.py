"""Random models with a byte tokenizer, made in code: everything a chain does, without a download.

`random:llama` has about a million parameters, for tests, dry runs and continuous integration. The others have the real
shapes of known models (`random:qwen3-1.7b`, `random:llama-3.2-3b`, `random:llama-3.1-8b`), for measuring time and
memory: what they say means nothing, and costs what the real one's would.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from ..errors import UserError, nearest
from .cache import build_once
from .quiet import quiet_transformers

# Raise it whenever what is built below changes: the cached folders carry it in their names.
_VERSION = 1

LLAMA, PREFIX = "llama", "random:"
_SPEC = re.compile(r"random:(?P<name>[a-z0-9.-]+)(?:\?(?P<options>[a-z0-9=&]*))?")
_OPTION = re.compile(r"(?P<key>seed|layers)=(?P<value>\d+)")
_SHARD_BYTES = 1 << 30
"""Of one file of weights: so much memory is all that building a large model takes."""


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen3-1.7b": (
        Qwen3Config,
        dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
            rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    ),
    "llama-3.2-3b": (
        LlamaConfig,
        dict(
            vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, tie_word_embeddings=True,
            rms_norm_eps=1e-5, rope_parameters=_llama3_rope(32.0),
        ),
    ),
    "llama-3.1-8b": (
        LlamaConfig,
        dict(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, tie_word_embeddings=False,
            rms_norm_eps=1e-5, rope_parameters=_llama3_rope(8.0),
        ),
    ),
}  # fmt: skip
"""The shapes of Qwen/Qwen3-1.7B, meta-llama/Llama-3.2-3B and meta-llama/Llama-3.1-8B, as their config.json has them."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(5)))

# ChatML: the format that most small instruction models use.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class RandomSpec:
    """A `random:` spec, read. layers: instead of as many as the shape has; None: all of them."""

    name: str
    seed: int = 0
    layers: int | None = None

    @classmethod
    def read(cls, spec: str) -> "RandomSpec":
        """Read `random:NAME`, `random:NAME?seed=N`, and for the large ones `random:NAME?layers=N&seed=N`.

        Raises:
            UserError: another spec.
        """
        match = _SPEC.fullmatch(spec)
        name = match["name"] if match else ""
        options = [_OPTION.fullmatch(each) for each in (match["options"] or "").split("&") if each] if match else []
        given = {each["key"]: int(each["value"]) for each in options if each}
        known = ("seed",) if name == LLAMA else ("seed", "layers")
        named = name == LLAMA or name in SHAPES
        if not named or None in options or len(given) < len(options) or not given.keys() <= {*known}:
            one = f"write random:{name} or random:{name}?seed=1"
            remedy = one if named else nearest(f"{PREFIX}{name}", random_specs())
            raise UserError("model.base", f"{spec!r} is no random model", remedy)
        if given.get("layers") == 0:
            raise UserError("model.base", f"{spec!r} has no layer", "write layers=1 or more, or leave it out")
        return cls(name, given.get("seed", 0), given.get("layers"))

    def config(self) -> PreTrainedConfig:
        """What its config.json says."""
        tokenizer = byte_tokenizer()
        ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("bos", "eos", "pad")}
        if self.name == LLAMA:
            return _tiny_llama(len(tokenizer), ids)
        kind, values = SHAPES[self.name]
        layers = values["num_hidden_layers"] if self.layers is None else self.layers
        return kind(**{**values, "num_hidden_layers": layers, "dtype": "bfloat16"}, **ids)


def random_specs() -> list[str]:
    """The random models that there are, as a recipe names them."""
    return [f"{PREFIX}{name}" for name in (LLAMA, *SHAPES)]


def random_model(spec: str) -> Path:
    """The cached folder of a `random:` spec: safetensors (fp32; bf16 of a real shape), config, tokenizer.

    Raises:
        UserError: there is no such random model.
    """
    asked = RandomSpec.read(spec)
    layers = "" if asked.layers is None else f"-layers{asked.layers}"
    return build_once(f"random-{asked.name}-v{_VERSION}{layers}-seed{asked.seed}", lambda folder: _build(folder, asked))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a UTF-8 byte, after the special tokens; no merges; ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _tiny_llama(vocab_size: int, ids: dict[str, int]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # Wide enough that the next-token distribution is far from uniform.
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=ids["bos_token_id"],
        eos_token_id=ids["eos_token_id"],
        pad_token_id=ids["pad_token_id"],
    )


def _build(folder: Path, asked: RandomSpec) -> None:
    tokenizer, config = byte_tokenizer(), asked.config()
    with quiet_transformers():
        if asked.name == LLAMA:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(asked.seed)
                model = LlamaForCausalLM(cast(LlamaConfig, config)).float()
            model.save_pretrained(folder)
        else:
            _write_shape(folder, config, asked.seed)
        tokenizer.save_pretrained(folder)


def _write_shape(folder: Path, config: PreTrainedConfig, seed: int) -> None:
    """config.json, and bf16 weights as transformers would draw them, file by file: never the whole model in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # tied weights are one parameter, under the name that comes first
    shapes = {name: each.shape for name, each in model.named_parameters()}
    shards = list(_shards(shapes))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with ThreadPoolExecutor() as pool:
            weights = pool.map(lambda name: _drawn(name, shapes[name], config, seed), names)
            drawn = dict(zip(names, weights, strict=True))
        save_file(drawn, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if shard and size + 2 * shape.numel() > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += 2 * shape.numel()
    yield shard


def _drawn(name: str, shape: torch.Size, config: Any, seed: int) -> torch.Tensor:
    """A weight: ones for a norm's, else normal; by its name, so that a model of fewer layers has the same."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    weight = torch.empty(shape, dtype=torch.bfloat16)
    return weight.normal_(std=config.initializer_range, generator=torch.Generator().manual_seed(own))
