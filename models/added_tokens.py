"""A base that is given tokens of its own for a run (`model: {add_tokens: [...]}`): another base, made once from the one
that the recipe names, with a larger tokenizer, embedding and output head.

Every role and every stage of the run loads it, so they agree by the base's hash as they do on any other. Its spec says
what it was made from; whoever reads that in a lineage makes the same again:

    added:{"tokens": ["<|think|>"], "seed": 0}:HuggingFaceTB/SmolLM2-135M

Its hash is of that, and not of the weights: the new rows are drawn around the mean of the old ones, which other
machines sum in another order.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .base import Base

PREFIX = "added:"
_PLACE = "model.add_tokens"
_IDS = "added_tokens.ids.json"
# Raise it whenever what is made below changes: the cached folders carry it in their names, and so does the hash.
_VERSION = 1


@dataclass(frozen=True)
class AddedTokens:
    """Which tokens a base is given. base: its spec. seed: of their rows."""

    tokens: tuple[str, ...]
    seed: int
    base: str

    @property
    def spec(self) -> str:
        """What `resolve_base` takes."""
        said = json.dumps({"tokens": list(self.tokens), "seed": self.seed}, ensure_ascii=False)
        return f"{PREFIX}{said}:{self.base}"

    @classmethod
    def read(cls, spec: str) -> "AddedTokens | None":
        """The same from a spec; None for any other.

        Raises:
            UserError: one that begins so and says something else.
        """
        if not spec.startswith(PREFIX):
            return None
        try:
            said, end = json.JSONDecoder().raw_decode(spec, len(PREFIX))
            if spec[end] != ":" or not all(isinstance(each, str) for each in said["tokens"]):
                raise ValueError
            return cls(tuple(said["tokens"]), int(said["seed"]), spec[end + 1 :])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            remedy = 'write model.add_tokens, or added:{"tokens": [...], "seed": N}:BASE'
            raise UserError("model.base", f"{spec[:100]!r} does not say which tokens are added", remedy) from error


def without_tokens(spec: str) -> tuple[str, int]:
    """The spec of the base that tokens were added to, and how many; of any other its own, and 0."""
    asked = AddedTokens.read(spec)
    return (spec, 0) if asked is None else (asked.base, len(asked.tokens))


def spec_with(base: str, tokens: Sequence[str], seed: int) -> str:
    """The spec of a base with these tokens added; its own where there are none."""
    return AddedTokens(tuple(tokens), seed, base).spec if tokens else base


def check_tokens(tokens: Sequence[str]) -> None:
    """Tokens as far as they can be right without a tokenizer.

    Raises:
        UserError: an empty one, one that begins or ends with white space, or one twice.
    """
    for token in tokens:
        if not token.strip() or token != token.strip():
            raise UserError(_PLACE, f"{token!r} is no token: it is empty, or has white space around it", "correct it")
        if list(tokens).count(token) > 1:
            raise UserError(_PLACE, f"{token!r} stands there twice", "name it once")


def with_tokens(base: "Base", asked: AddedTokens) -> "Base":
    """The base with the tokens, made in the cache where it is not there yet.

    Raises:
        UserError: tokens that its tokenizer has already, or cannot keep whole; or a quantised base.
    """
    from .cache import build_once

    check_tokens(asked.tokens)
    said = json.dumps([_VERSION, base.sha256, list(asked.tokens), asked.seed])
    key = hashlib.sha256(said.encode()).hexdigest()
    folder = build_once(f"added-v{_VERSION}-{key[:16]}", lambda empty: _write(base, asked, empty))
    ids = json.loads((folder / _IDS).read_text(encoding="utf-8"))
    spec = replace(asked, base=base.spec).spec
    return replace(base, spec=spec, path=folder, sha256=key, added=tuple(ids), of=base)


def _write(base: "Base", asked: AddedTokens, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from .auto import open_config, open_model, open_tokenizer
    from .quiet import quiet_transformers

    tokenizer: Any = open_tokenizer(base.path)
    ids = grow_tokenizer(tokenizer, asked.tokens)
    if getattr(open_config(base.path), "quantization_config", None) is not None:
        said = f"{asked.base!r} is quantised already, and its weights are not written anew"
        raise UserError(_PLACE, said, "name the base that it was made from, with model.quantization")
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        model: Any = open_model(AutoModelForCausalLM, base.path, spec=base.spec, dtype="auto")
        torch.default_generator.manual_seed(asked.seed)
        if max(ids) >= model.get_input_embeddings().weight.shape[0]:
            # around the mean of the rows that there are, with a little of their spread (transformers' mean_resizing)
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=True)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / _IDS).write_text(json.dumps(ids) + "\n", encoding="utf-8")


def grow_tokenizer(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add special tokens to a tokenizer, and give their ids.

    Raises:
        UserError: it has one already, or does not read one as the one token that it is.
    """
    if not tokens:
        return []
    known = tokenizer.get_vocab()
    if had := [token for token in tokens if token in known]:
        remedy = f"leave it out; its row trains with lora: {{trainable_token_indices: [{known[had[0]]}]}}"
        raise UserError(_PLACE, f"{had[0]!r} is a token of the base already", remedy)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    ids: list[int | None] = tokenizer.convert_tokens_to_ids(list(tokens))
    for token, number in zip(tokens, ids, strict=True):
        read = tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]
        if number is None or read.count(number) != 1:
            raise UserError(_PLACE, f"the tokenizer does not keep {token!r} whole", "choose another word")
    return [each for each in ids if each is not None]
