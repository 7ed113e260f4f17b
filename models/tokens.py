"""The base's tokenizer, made fit for training: a chat template, the EOS that ends its turns, a PAD that is not EOS."""

import logging
import re
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.template import DEFAULT_CHAT_TEMPLATE, rendered, set_date
from ..errors import UserError
from .added_tokens import grow_tokenizer
from .auto import open_config, open_tokenizer
from .base import Base
from .quiet import quiet_transformers
from .sound import AGAIN

logger = logging.getLogger(__name__)

_MARK = "THE-REPLY"
_KNOWN_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_object.pt"}
_VOCABULARY_ENDS = (".model", ".tiktoken", "merges.txt", "tekken.json", "bpe.codes")
_HELLO = "Hello world"
_SPARE = re.compile(r"pad|reserved|unused|extra|placeholder", re.IGNORECASE)


def load_tokenizer(
    base: Base,
    chat_template: str | None = None,
    template_date: date | None = None,
    added: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """The base's tokenizer with right padding, a chat template, and `pad_token_id != eos_token_id`.

    Args:
        chat_template: a file, Jinja text, the name of one of the tokenizer's templates, or "default" for
            `DEFAULT_CHAT_TEMPLATE`. None: the tokenizer's own, or else that default.
        template_date: the day that templates write which write today's; None: the day on which the process started.
        added: tokens that it is given first, of a base whose embedding will have rows for them.

    Raises:
        UserError: a tokenizer that cannot be read, an unknown template, an EOS that the model cannot say, or no token
            that can serve as PAD.
    """
    tokenizer: Any = _read_tokenizer(base)
    ids = grow_tokenizer(tokenizer, added)
    if tokenizer.eos_token_id is None:
        raise UserError("model.base", f"the tokenizer of {base.spec!r} has no EOS token", "set eos_token in its config")
    tokenizer.padding_side = "right"
    tokenizer.chat_template = _template(tokenizer, chat_template)
    set_date(tokenizer, template_date)
    set_eos(tokenizer)
    size = max(vocabulary_size(base), *(each + 1 for each in ids), 0)
    if tokenizer.eos_token_id >= size:
        said = f"its EOS {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}) is beyond the embedding's {size} rows"
        raise UserError("model.base", said, "take a template that ends turns with a token which the base has")
    set_pad(tokenizer, size)
    return tokenizer


def _read_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    where, held = "model.base", {each.name for each in base.path.iterdir()}
    if not held & _VOCABULARIES and not any(each.endswith(_VOCABULARY_ENDS) for each in held):
        # without any, transformers makes an empty one up
        raise UserError(where, f"{base.spec!r} has no tokenizer.json, nor another vocabulary", AGAIN)
    with quiet_transformers():
        tokenizer = open_tokenizer(base.path)
    if not tokenizer(_HELLO, add_special_tokens=False)["input_ids"]:
        raise UserError(where, f"the tokenizer of {base.spec!r} makes no tokens of {_HELLO!r}", AGAIN)
    return tokenizer


def prepare_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's PAD and EOS ids into the model's config and generation config.

    A sequence classifier reads its score at the last token that is not PAD, so it must know which id that is.
    """
    text = model.config.get_text_config()
    for config in (model.config, text):
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        had = generation.eos_token_id
        others = had if isinstance(had, list) else [had]
        extra = [i for i in others if i not in (None, tokenizer.eos_token_id)]
        generation.eos_token_id = [tokenizer.eos_token_id, *extra] if extra else tokenizer.eos_token_id


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model: Any) -> list[int]:
    """With which tokens a reply ends: the tokenizer's EOS, then those that the base's generation config names.

    Some are no tokens of the chat template (Llama 3's <|end_of_text|>, Qwen's <|endoftext|>): a base writes them all
    the same, and what it says after one is not part of its reply.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    generation = getattr(inner, "generation_config", None)
    # one that only repeats the model's config may hold the default of its class, which is some token of another kind
    derived = getattr(generation, "_from_model_config", True)
    named: Any = None if derived else getattr(generation, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(int(each) for each in ends if isinstance(each, int)))


def set_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make EOS the special token with which the chat template ends an assistant's turn, where it names one."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
    try:
        text = rendered(tokenizer, turns, "model.chat_template")
    except UserError:
        raise
    except Exception as error:
        logger.warning("the chat template does not render a short dialogue (%s); EOS is left as it is", error)
        return
    tail = str(text).rpartition(_MARK)[2].lstrip()
    # The longest match: `<|end|>` and `<|end|>x` may both be tokens.
    # Not only those marked special: some tokenizers forget to mark theirs.
    added = special_tokens(tokenizer).keys() | {str(token) for token in tokenizer.added_tokens_decoder.values()}
    ends = sorted((t for t in added if t and tail.startswith(t)), key=len)
    if ends and ends[-1] != tokenizer.eos_token:
        logger.info("EOS is %s, with which the chat template ends a turn (was %s)", ends[-1], tokenizer.eos_token)
        tokenizer.eos_token = ends[-1]


def set_pad(tokenizer: Any, vocab_size: int) -> None:
    """Make PAD a token that is not EOS: one that is there already, so that the embedding need not grow.

    Args:
        vocab_size: rows of the model's embedding.
    """
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if pad is not None and pad not in (eos, tokenizer.bos_token_id) and pad < vocab_size:
        return
    specials = {t: i for t, i in special_tokens(tokenizer).items() if i < vocab_size and i != eos}
    known = [t for t in _KNOWN_PADS if t in specials]
    unknown = [tokenizer.unk_token] if tokenizer.unk_token in specials else []
    spare = [t for t in specials if _SPARE.search(t)]
    # `ÿ` alone is how byte-level vocabularies write byte 0xFF, which never occurs in UTF-8.
    byte = ["ÿ"] if "ÿ" in tokenizer.get_vocab() and tokenizer.convert_tokens_to_ids("ÿ") < vocab_size else []
    bos = tokenizer.bos_token
    for token in [t for t in (*known, *unknown, *spare) if t != bos] + byte:
        tokenizer.pad_token = token
        return
    if len(tokenizer) < vocab_size:
        # The embedding has rows to spare.
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        return
    raise UserError(
        "model.base", "no token of its vocabulary but EOS can serve as padding", "add a pad token to it and its model"
    )


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Every token marked special, with its id, in order of id."""
    decoder: dict[int, Any] = tokenizer.added_tokens_decoder
    marked = {str(token): i for i, token in sorted(decoder.items()) if token.special}
    named = {t: tokenizer.convert_tokens_to_ids(t) for t in tokenizer.all_special_tokens}
    return marked | named


def check_vocabulary(rows: Iterable[Sequence[int]], tokenizer: Any, size: int, where: str) -> None:
    """Every token has its row in the base's embedding: tokens that were added later may have none.

    Args:
        rows: token ids.
        size: rows of the embedding.
        where: whose rows they are, for the message.

    Raises:
        UserError: the first row with a token beyond it, and which token that is.
    """
    for number, row in enumerate(rows, start=1):
        if len(row) and (highest := max(row)) >= size:
            token = tokenizer.convert_ids_to_tokens([highest])[0]
            raise UserError(
                where,
                f"row {number} holds the token {token!r} (id {highest}), and the base's embedding has {size} rows",
                "take that token out of the tokenizer or the template, or let the base's embedding grow first "
                "(model.resize_token_embeddings, train it, save it as a base of its own)",
            )


def vocabulary_size(base: Base) -> int:
    """Rows of the base's embedding."""
    return open_config(base.path).get_text_config().vocab_size


def _template(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> str:
    own = tokenizer.chat_template
    if wanted is None:
        if isinstance(own, dict):
            own = own.get("default") or next(iter(own.values()), None)
        return own or DEFAULT_CHAT_TEMPLATE
    if "{{" in wanted or "{%" in wanted:
        return wanted
    if isinstance(own, dict) and wanted in own:
        return own[wanted]
    if wanted == "default":
        return DEFAULT_CHAT_TEMPLATE
    if Path(wanted).expanduser().is_file():
        return Path(wanted).expanduser().read_text(encoding="utf-8")
    raise UserError(
        "model.chat_template", f"{wanted!r} is neither a file, nor Jinja text, nor a name", "give one, or `default`"
    )
