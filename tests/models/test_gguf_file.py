"""A GGUF says what the model that it was written from says, as another reader than its writer reads it."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers import AutoModelForCausalLM as Auto

from preftune.errors import UserError
from preftune.models.gguf_file import _LLAMA3_SPLIT as LLAMA3
from preftune.models.gguf_file import _QWEN2_SPLIT as QWEN2
from preftune.models.gguf_file import GGUF_TYPES, GgufType, check_architecture, read_gguf, write_gguf
from preftune.models.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, byte_tokenizer

TEXTS = ["Hello there, it's 2026 <|im_start|>user\nWhat's 12345 + 1?<|im_end|>\n", "  naïve 日本 \t\n\n x", ""]
CORPUS = ["hello there it's the year 2026 and what is the answer, then", "naïve answers are the answers 12 345"] * 4
SIZE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama untied": (LlamaConfig, {"tie_word_embeddings": False, "head_dim": 32}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 128}),
}
STEPS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
}


def bpe(steps: Any = STEPS["gpt-2"], ignore_merges: bool = False) -> Any:
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer, core.decoder = steps, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def written(folder: Path, kind: str = "llama", tokenizer: Any = None) -> Path:
    """A tiny model's folder, with rows in its embedding that the tokenizer has no token for."""
    tokenizer = tokenizer or bpe()
    config, options = CONFIGS[kind]
    torch.manual_seed(0)
    model = Auto.from_config(config(vocab_size=len(tokenizer) + 4, bos_token_id=1, eos_token_id=2, **SIZE, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None] * 7 % 300).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_architecture_says_the_same_in_float32(tmp_path: Path, kind: str):
    folder = written(tmp_path / "model", kind)
    write_gguf(folder, tmp_path / "x.gguf", "f32", "x")
    wanted = logits(Auto.from_pretrained(folder, dtype=torch.float32).eval())
    torch.testing.assert_close(logits(read_gguf(tmp_path / "x.gguf")), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_tokens_special_ids_and_the_template_are_kept(tmp_path: Path, name: str):
    tokenizer = bpe(STEPS[name], ignore_merges=name == "llama-bpe")
    write_gguf(written(tmp_path / "model", tokenizer=tokenizer), tmp_path / "x.gguf", "f16", "x")
    back: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in TEXTS:
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert back.chat_template == CHAT_TEMPLATE
    assert (back.bos_token, back.eos_token, back.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    kinds, tokens = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("token_type", "tokens"))
    assert tokens[-4:] == [f"[PAD{index}]" for index in range(len(tokens) - 4, len(tokens))]
    assert kinds[:3] == [gguf.TokenType.CONTROL] * 3 and kinds[-1] == gguf.TokenType.UNUSED and kinds[20] == 1


def test_greedy_replies_in_sixteen_bits_are_those_of_the_rounded_model(tmp_path: Path):
    folder = written(tmp_path / "model")
    model: Any = Auto.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = torch.randint(20, 300, (20, 6), generator=torch.Generator().manual_seed(1))
    kinds: dict[GgufType, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16}
    for kind, dtype in kinds.items():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
        model.save_pretrained(folder)
        write_gguf(folder, tmp_path / f"{kind}.gguf", kind, "x")
        options = dict(max_new_tokens=16, do_sample=False, pad_token_id=0)
        wanted, found = (each.generate(prompts, **options) for each in (model, read_gguf(tmp_path / f"{kind}.gguf")))
        assert torch.equal(found, wanted)
    assert set(GGUF_TYPES) == {"f32", "f16", "bf16", "q8_0"}


def test_eight_bits_are_near(tmp_path: Path):
    folder = written(tmp_path / "model")
    write_gguf(folder, tmp_path / "x.gguf", "q8_0", "x")
    wanted, found = (logits(each) for each in (Auto.from_pretrained(folder).eval(), read_gguf(tmp_path / "x.gguf")))
    assert 0 < float((found - wanted).abs().mean()) < 0.1 * float(wanted.std())


def test_llama_3s_rotary_frequencies_are_written(tmp_path: Path):
    folder = written(tmp_path / "model")
    config: Any = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    config.save_pretrained(folder)
    write_gguf(folder, tmp_path / "x.gguf", "f32", "x")
    factors = next(each for each in gguf.GGUFReader(tmp_path / "x.gguf").tensors if each.name == "rope_freqs.weight")
    wavelengths = 2 * torch.pi * 10000.0 ** (torch.arange(0, 16, 2) / 16)
    wanted = torch.where(wavelengths < 4, 1.0, 8.0)
    smooth = (16 / wavelengths[0] - 1.0) / (4.0 - 1.0)  # the one between 16 / 4 and 16 / 1 tokens
    wanted[0] = 1 / ((1 - smooth) / 8.0 + smooth)
    torch.testing.assert_close(torch.tensor(factors.data), wanted, rtol=1e-5, atol=0)


REFUSED = {
    "gpt2": (GPT2Config(), "a GGUF of a gpt2 model is not written here"),
    "window": (MistralConfig(sliding_window=16), "sliding_window: 16"),
    "yarn": (
        LlamaConfig(
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 16,
            }
        ),
        "rope_type: yarn",
    ),
    "bias": (LlamaConfig(attention_bias=True), "attention_bias"),
    "gelu": (LlamaConfig(hidden_act="gelu"), "hidden_act: gelu"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_surely_the_same_is_refused(why: str):
    config, said = REFUSED[why]
    with pytest.raises(UserError, match=said):
        check_architecture(config, "x")


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(tmp_path: Path):
    strips = bpe()
    strips.add_tokens([AddedToken("<x>", rstrip=True)])
    cases = {
        "no merges": byte_tokenizer(),
        "cuts text in none": bpe(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), STEPS["gpt-2"]])),
        "takes the white space": strips,
    }
    for number, (said, tokenizer) in enumerate(cases.items()):
        folder = written(tmp_path / str(number), tokenizer=tokenizer)
        with pytest.raises(UserError, match=said):
            write_gguf(folder, tmp_path / "x.gguf", "f32", "x")


def test_weights_past_float16_are_refused_and_bfloat16_advised(tmp_path: Path):
    folder = written(tmp_path / "model")
    model: Any = Auto.from_pretrained(folder, dtype=torch.float32)
    model.model.embed_tokens.weight.data[5, 5] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"reaches 1e\+06, and float16 ends at 65504; write --dtype"):
        write_gguf(folder, tmp_path / "x.gguf", "f16", "x")
