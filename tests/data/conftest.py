"""Byte-level tokenizers made in code, one a template, and small data files."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from preftune.data.rows import Row
from preftune.data.spec import DataSpec, SourceSpec

SPECIAL = ("<pad>", "<s>", "<|im_start|>", "<|im_end|>")

# As SmolLM2's: a tail (a newline) follows each turn's EOS.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: only the last reply carries a thinking block, so earlier turns look different once others follow.
THINKING = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML, adds_bos: bool = False, merges: Sequence[str] = ()) -> Any:
    """One token a byte, but for `merges` (pairs of letters, "a b")."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(pair.split()) for pair in merges]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *("".join(pair) for pair in pairs)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=pairs))  # pyright: ignore[reportArgumentType]: each is a pair
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", model_max_length=10_000
    )
    tokenizer.chat_template = template
    return tokenizer


class Kit:
    """What the tests of this room build their rows with."""

    CHATML, THINKING = CHATML, THINKING
    tokenizer = staticmethod(byte_tokenizer)

    @staticmethod
    def spec(*paths: str, **options: Any) -> DataSpec:
        return DataSpec(tuple(SourceSpec(path) for path in paths or ("none.jsonl",)), **options)

    @staticmethod
    def user(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    @staticmethod
    def assistant(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text}

    @staticmethod
    def demo(question: str = "Hi?", answer: str = "Hello.", **more: Any) -> Row:
        return Row(prompt=[Kit.user(question)], completion=[Kit.assistant(answer)], origin="here:1", **more)

    @staticmethod
    def pair(chosen: str = "Good.", rejected: str = "Bad.", question: str = "Hi?", **more: Any) -> Row:
        return Row(
            prompt=[Kit.user(question)],
            chosen=[Kit.assistant(chosen)],
            rejected=[Kit.assistant(rejected)],
            origin="here:1",
            **more,
        )


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(scope="session")
def chatml() -> Any:
    return byte_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(name, rows): rows as JSON lines (.gz too), or text as it is."""

    def write(name: str, rows: list[dict[str, Any]] | str) -> Path:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write
