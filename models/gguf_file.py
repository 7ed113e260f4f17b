"""A plain model folder written as one GGUF file: what llama.cpp, Ollama and LM Studio read.

Written with llama.cpp's own `gguf` package, after its converter, for architectures and tokenizers whose every part is
known to mean the same there. What is not known to is refused: a converter that guesses writes a file that loads and
says something else.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UserError
from .auto import open_config, open_model, open_tokenizer
from .quiet import quiet_transformers
from .sound import weight_files

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
"""How a matrix is kept; norms and biases are float32 in each of them."""

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
MERGED_IN = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "float32"}
"""The dtype of the merged model that such a file is written from: its weights are that model's, bit for bit (q8_0:
blocks of 32 with a scale)."""


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp computes one of transformers' models.

    Attributes:
        name: its name there.
        interleaved: rotary pairs are neighbours there, so the rows of q and k are laid out anew.
        biases: the projections that may have one.
    """

    name: str
    arch: gguf.MODEL_ARCH
    interleaved: bool = False
    biases: tuple[str, ...] = ()


_ARCHITECTURES = {
    "llama": _Architecture("llama", gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": _Architecture("llama", gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": _Architecture("qwen2", gguf.MODEL_ARCH.QWEN2, biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": _Architecture("qwen3", gguf.MODEL_ARCH.QWEN3),
}
"""By transformers' model_type. Each is held against the reload in transformers; llama.cpp itself has read llama."""

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_BYTES | {"use_regex": True}], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}], False),
    "qwen2": ([{"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}}, _BYTES | {"use_regex": False}], False),
    "llama-bpe": ([{"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}}, _BYTES | {"use_regex": False}], True),
}
"""llama.cpp's name of how text is cut before the merges: the steps in tokenizer.json, and whether a whole word that is
a token is taken without merging."""
_SPLIT = {"behavior": "Isolated", "invert": False}
_NO_MATTER = ("trim_offsets",)
_HALF_MOST = 65504.0


def write_gguf(folder: Path, file: Path, kind: GgufType, name: str) -> None:
    """Write the model in `folder` as one file.

    Args:
        folder: config.json, safetensors and the tokenizer of a causal model, unquantised.
        file: where; replaced if it is there.
        kind: how matrices are kept.
        name: `general.name`, which programs show.

    Raises:
        UserError: an architecture, a setting of it or a tokenizer that is not known to mean the same in llama.cpp, or
            weights too large for float16.
    """
    config, tokenizer = open_config(folder, str(folder)), open_tokenizer(folder, str(folder))
    architecture = check_architecture(config, str(folder))
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _say_model(writer, config)
    _say_tokenizer(writer, tokenizer, config.vocab_size, str(folder))
    # the header lists every tensor before the first one is written: two passes, and one tensor at a time in memory
    for tensor, wanted, data in _tensors(folder, config, architecture, kind):
        writer.add_tensor_info(tensor, data.shape, data.dtype, data.nbytes, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, data in _tensors(folder, config, architecture, kind):
        writer.write_tensor_data(data)
    writer.close()


def read_gguf(file: Path) -> Any:
    """The model in a GGUF file, in float32, as transformers reads it: another reader than the writer here."""
    with quiet_transformers():
        model = open_model(
            AutoModelForCausalLM,
            file.parent,
            str(file),
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    return model.eval()


def check_architecture(config: PreTrainedConfig, where: str) -> _Architecture:
    """How llama.cpp computes this model.

    Raises:
        UserError: it does not, or not surely the same.
    """
    remedy = "export it with --to merged, and convert that with llama.cpp's own convert_hf_to_gguf.py"
    found = _ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(_ARCHITECTURES)
        said = f"a GGUF of a {config.model_type} model is not written here (of {known} it is)"
        raise UserError(where, said, remedy)
    each: Any = config
    kinds = set(getattr(each, "layer_types", None) or ())
    rope = dict(each.rope_parameters)
    windowed = getattr(each, "sliding_window", None) and getattr(each, "use_sliding_window", True)
    differing = {
        f"hidden_act: {each.hidden_act}": each.hidden_act != "silu",
        "attention_bias: true": getattr(each, "attention_bias", False),
        "mlp_bias: true": getattr(each, "mlp_bias", False),
        f"sliding_window: {getattr(each, 'sliding_window', None)}": windowed or kinds - {"full_attention"},
        f"rope_type: {rope.get('rope_type')}": rope.get("rope_type") not in ("default", "linear", "llama3"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "quantization_config": getattr(each, "quantization_config", None),
    }
    for said, differs in differing.items():
        if differs:
            raise UserError(where, f"{said} of its config.json is not surely the same in a GGUF", remedy)
    return found


def _say_model(writer: gguf.GGUFWriter, config: Any) -> None:
    """What the config says, under llama.cpp's names."""
    width, rope = _head_width(config), dict(config.rope_parameters)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _say_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int, where: str) -> None:
    """Vocabulary, merges, kinds of tokens, special ids, what is added to a text, and the chat template."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    split = _pre_tokenizer(parts, where)
    added = {each["id"]: each for each in parts["added_tokens"]}
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for index in range(size):
        tokens.append(names.get(index, f"[PAD{index}]"))
        if index not in names:
            kinds.append(gguf.TokenType.UNUSED)
        elif index in added:
            kinds.append(gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in parts["model"]["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    first, last = _added_around(tokenizer, where)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(parts: dict[str, Any], where: str) -> str:
    """llama.cpp's name for how this tokenizer cuts text.

    Raises:
        UserError: there is none that surely cuts alike.
    """
    model, remedy = parts["model"], "export it with --to merged, and convert that with llama.cpp's own converter"
    if model["type"] != "BPE" or model.get("byte_fallback"):
        said = "its tokenizer is no byte-level BPE, and of others a GGUF is not written here"
        raise UserError(where, said, remedy)
    if not model["merges"]:
        raise UserError(where, "its tokenizer has no merges, without which llama.cpp opens no file", remedy)
    if any(" " in half for pair in model["merges"] if not isinstance(pair, str) for half in pair):
        raise UserError(where, "its tokenizer has merges with spaces, which a GGUF cannot hold", remedy)
    stripping = [each["content"] for each in parts["added_tokens"] if each["lstrip"] or each["rstrip"]]
    if stripping or any(each["single_word"] for each in parts["added_tokens"]):
        said = (
            f"its token {stripping[0]!r} takes the white space beside it" if stripping else "it has single_word tokens"
        )
        raise UserError(where, f"{said}, which a GGUF cannot say", remedy)
    steps = parts["pre_tokenizer"] or {}
    held = steps.get("pretokenizers", [steps])
    plain = [{key: value for key, value in each.items() if key not in _NO_MATTER} for each in held]
    normalizer = (parts["normalizer"] or {}).get("type")
    for name, (wanted, whole_words) in _PRE_TOKENIZERS.items():
        expected = [each | _SPLIT if each["type"] == "Split" else each for each in wanted]
        composed = normalizer is None or (normalizer == "NFC" and name == "qwen2")
        if plain == expected and bool(model.get("ignore_merges")) == whole_words and composed:
            return name
    raise UserError(where, "its tokenizer cuts text in none of the ways that are known to be llama.cpp's", remedy)


def _added_around(tokenizer: Any, where: str) -> tuple[bool, bool]:
    """Whether BOS is put before a text, and EOS behind it."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    first = whole != bare and whole[:1] == [tokenizer.bos_token_id]
    last = whole != bare and whole[-1:] == [tokenizer.eos_token_id]
    expected = [tokenizer.bos_token_id] * first + bare + [tokenizer.eos_token_id] * last
    if whole != expected:
        said = "its tokenizer puts other tokens around a text than BOS and EOS, which a GGUF cannot say"
        raise UserError(where, said, "export it with --to merged")
    return first, last


Written = tuple[str, gguf.GGMLQuantizationType, "np.ndarray[Any, Any]"]


def _tensors(folder: Path, config: Any, architecture: _Architecture, kind: GgufType) -> Iterator[Written]:
    """Name, type and data of each tensor, in the file's order."""
    names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", gguf.GGMLQuantizationType.F32, _rope_factors(config).numpy()
    for source in weight_files(folder, str(folder)):
        with safe_open(source, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue  # a copy of the embedding, which is taken where none is there
                new = names.get_name(name, try_suffixes=(".weight", ".bias"))
                layer, _, part = name.rpartition(".")
                if new is None or (part == "bias" and layer.rpartition(".")[2] not in architecture.biases):
                    raise UserError(str(folder), f"{name} has no place in a GGUF", "export it with --to merged")
                tensor = opened.get_tensor(name)
                if architecture.interleaved and layer.endswith(("q_proj", "k_proj")):
                    heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
                    tensor = _interleaved(tensor, heads)
                yield new, *_kept(tensor, kind, name, str(folder))


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to pairs, as llama.cpp rotates them."""
    width = weight.shape[0] // heads
    return weight.reshape(heads, 2, width // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _rope_factors(config: Any) -> Tensor:
    """What llama.cpp divides each rotary frequency by: shape [head width / 2], float32."""
    width = _head_width(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).float() / width)
    return (plain / scaled).float().contiguous()


def _kept(
    tensor: Tensor, kind: GgufType, name: str, where: str
) -> tuple[gguf.GGMLQuantizationType, "np.ndarray[Any, Any]"]:
    """A tensor's type and data as they lie in the file."""
    types = gguf.GGMLQuantizationType
    if tensor.dim() < 2 or kind == "f32":
        return types.F32, tensor.float().contiguous().numpy()
    if kind == "f16" or (kind == "q8_0" and tensor.shape[-1] % 32):
        half = tensor.half()
        if not bool(half.isfinite().all()):
            said = f"{name} reaches {float(tensor.abs().max()):.3g}, and float16 ends at {_HALF_MOST:.0f}"
            raise UserError(where, said, "write --dtype bfloat16")
        return types.F16, half.contiguous().numpy()
    wanted = types.BF16 if kind == "bf16" else types.Q8_0
    return wanted, quantize(tensor.float().contiguous().numpy(), wanted)


GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
