"""Texts -> token ids, a piece at a time.

A special token cuts a text before anything else is done with it, so that the ids of a text are those of its pieces. The
rows of a data set share most of theirs: the sides of a pair their prompt, all rows what the template writes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Steps before the model that look at nothing but the piece, and leave nothing of it out.
_STEPS = {"Split", "Digits", "Punctuation", "ByteLevel"}


class Pieces:
    """One tokenizer's pieces. Made by `pieces_of`, which says whether it can be cut so.

    Attributes:
        lossless: no text has more tokens than bytes in UTF-8, and two texts without special tokens that it `covers`
            have the same ids only if they are the same.
        special: finds the special tokens in a text.
    """

    def __init__(self, backend: Any, special: dict[str, int], absent: bytes | None) -> None:
        self.lossless, self._absent = absent is not None, absent or b""
        self._backend, self._special = backend, {token: [number] for token, number in special.items()}
        longest_first = sorted(special, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._cut = re.compile(f"({self.special.pattern})")

    def covers(self, text: str) -> bool:
        """Whether every byte of the text has a token: one that has none may be left out."""
        raw = text.encode("utf-8", "surrogatepass")
        return not self._absent or len(raw.translate(None, self._absent)) == len(raw)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as the tokenizer gives them without `add_special_tokens`."""
        cut = [[piece for piece in self._cut.split(text) if piece] for text in texts]
        known = dict(self._special)
        new = list(dict.fromkeys(piece for pieces in cut for piece in pieces if piece not in known))
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        encoded = self._backend.encode_batch_fast(new, add_special_tokens=False)
        known |= {piece: each.ids for piece, each in zip(new, encoded, strict=True)}
        return [_joined(known[piece] for piece in pieces) for pieces in cut]


def fewest_tokens(tokenizer: Any, text: str) -> int:
    """So many tokens the text has at least: as many as there are longest ones in it.

    Of characters that are not white space a quarter counts: a normaliser may leave out some, or join them.
    """
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    return (len(text) - sum(map(text.count, " \n\t\r"))) // (4 * longest)


def _joined(parts: Iterable[list[int]]) -> list[int]:
    whole: list[int] = []
    for part in parts:
        whole += part
    return whole


def pieces_of(tokenizer: "PreTrainedTokenizerBase") -> Pieces | None:
    """The tokenizer's pieces; None where its texts cannot be cut without changing their ids, or nobody can tell."""
    from transformers import PreTrainedTokenizerFast

    usual = isinstance(tokenizer, PreTrainedTokenizerFast)
    if not usual or type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
        return None
    backend: Any = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    # the others are looked for within the pieces, behind the normaliser
    first = {token.content: number for number, token in added.items() if not token.normalized}
    if any(each.lstrip or each.rstrip or each.single_word for each in added.values()):
        return None
    steps = _steps(backend.pre_tokenizer)
    kept = backend.normalizer is None or type(backend.normalizer).__name__ == "NFC"
    if steps is None or not kept or backend.encode_special_tokens or tokenizer.split_special_tokens:
        return None
    by_bytes = backend.normalizer is None and steps[-1:] == ["ByteLevel"]
    return Pieces(backend, first, _absent_bytes(backend) if by_bytes else None)


def _steps(pre: Any) -> list[str] | None:
    """The names of the steps that cut a piece into words; None where one of them is not known here."""
    state = None if pre is None else json.loads(pre.__getstate__())
    states = [] if state is None else state.get("pretokenizers", [state])
    for state in states:
        if state["type"] not in _STEPS or state.get("add_prefix_space") or state.get("behavior") == "Removed":
            return None
    return [state["type"] for state in states]


def _absent_bytes(backend: Any) -> bytes | None:
    """The bytes that have no token; None where a token may stand for less than a byte."""
    from tokenizers import models
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model = backend.model
    plain = isinstance(model, models.BPE) and not (
        model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix or model.byte_fallback
    )
    if not plain:
        return None
    return bytes(byte for byte, letter in bytes_to_unicode().items() if backend.token_to_id(letter) is None)
