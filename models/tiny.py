"""`random:llama`: a random Llama of about a million parameters with a byte tokenizer, made in code.

For tests, dry runs and continuous integration: everything a chain does, without a download.
"""

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..errors import UserError
from .cache import build_once
from .quiet import quiet_transformers

# Raise it whenever what is built below changes: the cached folders carry it in their names.
_VERSION = 1

_SPEC = re.compile(r"random:llama(?:\?seed=(\d+))?")

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(5)))

# ChatML: the format that most small instruction models use.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def random_llama(spec: str) -> Path:
    """The cached folder of `random:llama` or `random:llama?seed=N` (fp32 safetensors, config, tokenizer).

    Raises:
        UserError: the spec is another `random:` one.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UserError("model.base", f"{spec!r} is no random model", "write random:llama or random:llama?seed=1")
    seed = int(match[1] or 0)
    return build_once(f"random-llama-v{_VERSION}-seed{seed}", lambda folder: _build(folder, seed))


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


def _build(folder: Path, seed: int) -> None:
    tokenizer: Any = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # Wide enough that the next-token distribution is far from uniform.
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
