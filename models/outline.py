"""A base as its config.json says it, without a weight of it being fetched, made or read."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import UserError
from .added_tokens import AddedTokens, check_tokens
from .base import Base, is_hub
from .cache import build_once
from .described import check_config
from .loading import resolve_base
from .sound import CONFIG, read_object
from .tiny import PREFIX, RandomSpec, byte_tokenizer
from .tokens import load_tokenizer

_WHERE = "model.base"
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Outline:
    """What is known of a base.

    Attributes:
        config: as transformers reads it.
        tokenizer: None where none lies beside the config.
        added: ids of the tokens that it is given (see `added_tokens`).
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    added: tuple[int, ...] = ()


def outline(
    spec: str, revision: str | None = None, chat_template: str | None = None, template_date: date | None = None
) -> Outline:
    """Read a base's config and tokenizer. Of a hub id only those are fetched; a folder need hold nothing else.

    Args:
        spec, revision: as of `resolve_base`. chat_template, template_date: as of `load_tokenizer`.

    Raises:
        UserError: not there, not reachable, or no config that says a model.
    """
    asked = AddedTokens.read(spec) or AddedTokens((), 0, spec)
    check_tokens(asked.tokens)
    folder = _folder(asked.base, revision)
    if not (folder / CONFIG).is_file():
        raise UserError(_WHERE, f"{spec!r} has no config.json", "give a folder that save_pretrained wrote, or a hub id")
    config = check_config(folder, spec)
    read_object(folder / CONFIG, spec)
    base, text = Base(spec, folder, None, ""), config.get_text_config()
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        ids = range(text.vocab_size, text.vocab_size + len(asked.tokens))
        text.vocab_size += len(asked.tokens)
        return Outline(config, None, tuple(ids))
    tokenizer = load_tokenizer(base, chat_template, template_date, asked.tokens)
    found: Any = tokenizer.convert_tokens_to_ids(list(asked.tokens))
    ids = tuple(int(each) for each in found)
    text.vocab_size = max(text.vocab_size, *(each + 1 for each in ids), 0)
    return Outline(config, tokenizer, ids)


def _folder(spec: str, revision: str | None) -> Path:
    if spec.startswith(PREFIX):
        asked = RandomSpec.read(spec)
        return build_once(f"random-{asked.name}-outline-layers{asked.layers}", lambda folder: _write(folder, asked))
    if is_hub(spec):
        return _fetched(spec, revision)
    if Path(spec).expanduser().is_dir():
        return Path(spec).expanduser().resolve()
    return resolve_base(spec, revision).path


def _write(folder: Path, asked: RandomSpec) -> None:
    asked.config().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _fetched(spec: str, revision: str | None) -> Path:
    """The hub's small files; what a download has left in the cache serves as well."""
    try:
        folder = snapshot_download(spec, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns=["*/*"])
    except LocalEntryNotFoundError as error:
        said = f"{spec!r} is no local folder and the hub cannot be reached"
        raise UserError(_WHERE, said, "go online once, or give a folder with its config.json") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(_WHERE, f"{spec!r}: {first}", "check the id, the revision and your access (hf auth)") from error
    return Path(folder)
