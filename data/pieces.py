"""Texts -> token ids, a piece at a time.

A special token cuts a text before anything else is done with it, so that the ids of a text are those of its pieces. The
rows of a data set share most of theirs: the sides of a pair their prompt, all rows what the template writes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Steps before the model that look at nothing but the piece, and leave nothing of it out.
_STEPS = {"Split", "Digits", "Punctuation", "ByteLevel"}

# Where a word surely ends: a blank between two visible characters. What GPT-2's pattern, and those that follow, match
# up to there holds no blank behind another character and looks at nothing behind this one, which the next begins with.
_WORD = re.compile(r"(?<=[!-~\w]) (?=[!-~\w])")
_PATTERNS = frozenset(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
"""Those of Llama 3 and of Qwen."""
_TRIED = (
    "It's the boy's 12 345  cats, \n\n (don't) end. \t x\n y z's a_b 1. 2 ! ?\r\n  And 3,000",
    "\u00e9t\u00e9 \u00a0 w \u3042 \u3044 \u2019s \u201cno\u201d \u2026 \U0001f600 x",
    " leading and trailing ",
    "I'LL I'll i ll 'S 's s  two   three    four 1 22 333 4444 \u0301 e\u0301 x \u0301y",
)
_ENDS = tuple(".,!?;:")
_LETTERS = re.compile(r"([A-Za-z]+)([.,!?;:]?)")
_KEPT, _LONG = 1 << 17, 32
"""So many words are remembered, and none that is longer."""


class Pieces:
    """One tokenizer's pieces. Made by `pieces_of`, which says whether it can be cut so.

    Attributes:
        lossless: no text has more tokens than bytes in UTF-8, and two texts without special tokens that it `covers`
            have the same ids only if they are the same.
        special: finds the special tokens in a text.
    """

    def __init__(self, backend: Any, special: dict[str, int], absent: bytes | None, *, words: bool = False) -> None:
        self.lossless, self._absent = absent is not None, absent or b""
        self._backend, self._special = backend, {token: [number] for token, number in special.items()}
        longest_first = sorted(special, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._cut = re.compile(f"({self.special.pattern})")
        # by words: the ids of those that begin a piece, and of those that a blank stands before
        self._firsts: dict[str, list[int]] | None = {} if words else None
        self._others: dict[str, list[int]] = {}

    def covers(self, text: str) -> bool:
        """Whether every byte of the text has a token: one that has none may be left out."""
        raw = text.encode("utf-8", "surrogatepass")
        return not self._absent or len(raw.translate(None, self._absent)) == len(raw)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as the tokenizer gives them without `add_special_tokens`."""
        cut = [[piece for piece in self._cut.split(text) if piece] for text in texts]
        known = dict(self._special)
        new = list(dict.fromkeys(piece for pieces in cut for piece in pieces if piece not in known))
        found = self._whole(new) if self._firsts is None else self._by_words(new, self._firsts, self._others)
        known |= zip(new, found, strict=True)
        return [_joined(known[piece] for piece in pieces) for pieces in cut]

    def _whole(self, pieces: list[str]) -> list[list[int]]:
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        return [each.ids for each in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]

    def _by_words(
        self, pieces: list[str], firsts: dict[str, list[int]], others: dict[str, list[int]]
    ) -> list[list[int]]:
        """The same, with every word tokenised once: a text has some new ones in a hundred."""
        for known in (firsts, others):
            if len(known) > _KEPT:
                known.clear()
        cut = [words_of(piece) for piece in pieces]
        begin = [word for word in {words[0] for words in cut} if word not in firsts]
        follow = [word for word in set(chain.from_iterable(words[1:] for words in cut)) if word not in others]
        letters = [found for word in follow if (found := _LETTERS.fullmatch(word))]
        mixed = [word for word in follow if not _LETTERS.fullmatch(word)]
        ids = self._whole([*begin, *(f" {word}" for word in mixed), *_ENDS])
        firsts |= zip(begin, ids[: len(begin)], strict=True)
        others |= zip(mixed, ids[len(begin) : -len(_ENDS)], strict=True)
        ends = dict(zip(_ENDS, ids[-len(_ENDS) :], strict=True)) | {"": []}
        # one word to every pattern, and another sign behind it: what comes before the model has nothing to do
        tokenize = self._backend.model.tokenize
        for each in letters:
            others[each[0]] = [token.id for token in tokenize(f"\u0120{each[1]}")] + ends[each[2]]
        found = []
        for first, *rest in cut:
            found.append(list(chain(firsts[first], *map(others.__getitem__, rest))))
        for new, known in ((begin, firsts), (follow, others)):
            for word in new:
                if len(word) > _LONG:
                    del known[word]
        return found


def words_of(piece: str) -> list[str]:
    """The piece cut at blanks that no token can reach over; joined by blanks it is the piece again."""
    words = piece.split(" ")
    # every other character is visible but for line breaks, and no blank stands beside one or at an end: the usual text,
    # at a twentieth of what the pattern takes
    plain = "" not in words and piece.replace("\n", "").isprintable() and " \n" not in piece and "\n " not in piece
    return words if plain else _WORD.split(piece)


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
    absent = _absent_bytes(backend) if by_bytes else None
    if len(first) == len(added) and _ends_words(backend):
        words = Pieces(backend, first, absent, words=True)
        if words.ids(_TRIED) == Pieces(backend, first, absent).ids(_TRIED):  # tried before it is trusted
            return words
    return Pieces(backend, first, absent)


def _ends_words(backend: Any) -> bool:
    """Whether no token reaches over the end of a `_WORD`: each word is cut off, and its ids are its own."""
    from tokenizers import models

    state = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
    steps = state.get("pretokenizers", [state])
    kinds = [step.get("type") for step in steps]
    patterns = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    known = set(kinds) <= {"Split", "Digits", "ByteLevel"} and all(
        step.get("behavior") == "Isolated" and not step.get("invert") for step in steps if step.get("type") == "Split"
    )
    by_pattern = bool(patterns) and set(patterns) <= _PATTERNS
    by_itself = not patterns and any(step.get("use_regex", True) for step in steps if step.get("type") == "ByteLevel")
    plain = isinstance(backend.model, models.BPE) and not backend.model.dropout
    return known and plain and (by_pattern or by_itself)


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
