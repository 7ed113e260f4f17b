"""`preftune push`: a finished stage on the Hugging Face hub."""

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LINEAGE, METRICS
from ..intact import check_intact
from ..models.added_tokens import AddedTokens, without_tokens
from ..printed import holds_key, printable
from .cards import evaluated
from .export_model import stage_folder

_CARD = "README.md"
_PUSHED = (
    *(ADAPTER_CONFIG, ADAPTER_WEIGHTS, "value_head.safetensors", LINEAGE, METRICS, _CARD),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model"),
    *("vocab.json", "merges.txt", "added_tokens.json"),
)
"""All that may go: no checkpoint, no log, no replies, nothing that somebody else put there."""
_TEXT = (".json", ".md", ".jinja", ".txt")
_KNOWN_WORDS = (LINEAGE, METRICS, ADAPTER_CONFIG, _CARD)
"""Files that a key could have come into; a vocabulary holds anything that looks like one."""


def push_stage(given: Path, repo: str, private: bool, dry_run: bool, revision: str | None) -> None:
    """Upload a finished stage: adapter, tokenizer, lineage, metrics and card; print what goes, and where it is.

    What goes is a copy in which places on this machine are names: data files without their folders, and a base that no
    hub has by its spec. The repository is made if it is not there.

    Args:
        given: RUN/STAGE.
        repo: `OWNER/NAME`, or `NAME` for one's own.
        private: of a repository that is made.
        dry_run: only print.
        revision: a branch, made if it is not there; None: main.

    Raises:
        UserError: no such stage, a file with a key in it, no token, or the hub refuses or cannot be reached.
    """
    folder = stage_folder(given, None)
    check_intact(folder)
    _check_repo(repo)
    with tempfile.TemporaryDirectory(prefix="preftune-push-") as made:
        staged = Path(made)
        _stage(folder, staged)
        files = sorted(staged.iterdir())
        for file in files:
            print(printable(f"{file.stat().st_size:>12,}  {file.name}"))
        total = f"{len(files)} files, {sum(file.stat().st_size for file in files):,} bytes"
        if dry_run:
            print(printable(f"{total} would go to {repo}: nothing was sent"))
            return
        where = _upload(staged, repo, private, revision, f"{folder.name}, by preftune")
    print(printable(f"{total}: {where}"))


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        said = " ".join(str(error).split())[:160]
        raise UserError("REPO", said, "write OWNER/NAME, such as me/my-adapter") from error


def _stage(folder: Path, staged: Path) -> None:
    """What goes, in a folder of its own.

    Raises:
        UserError: something in it looks like a key.
    """
    from ..models.model_card import CARD, card, keeps_card

    for name in _PUSHED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staged / name)
    if not keeps_card(folder):
        text = card(folder, evaluated(folder.resolve().parent))
        (staged / CARD).write_text(text, encoding="utf-8")
    lineage = json.loads((staged / LINEAGE).read_text(encoding="utf-8")) if (staged / LINEAGE).is_file() else {}
    config = json.loads((staged / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    spec = (lineage.get("base") or {}).get("spec") or config.get("base_model_name_or_path")
    # of a base that was given tokens it is the base before: the adapter has their rows, by which PEFT lets it grow
    config["base_model_name_or_path"] = _named(without_tokens(str(spec))[0]) if spec else None
    metrics = staged / METRICS
    measured = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {}
    for name, content in ((ADAPTER_CONFIG, config), (LINEAGE, _placeless(lineage)), (METRICS, _placeless(measured))):
        if content:
            (staged / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in _KNOWN_WORDS:
        if (staged / name).is_file() and holds_key((staged / name).read_text(encoding="utf-8")):
            raise UserError(str(folder / name), "holds what looks like a key or a password", "take it out first")


def _placeless(value: Any) -> Any:
    """The same with paths of this machine as names."""
    if isinstance(value, dict):
        return {_named(key): _placeless(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_placeless(each) for each in value]
    return _named(value) if isinstance(value, str) else value


def _named(text: str) -> str:
    if (asked := AddedTokens.read(text)) is not None:
        return replace(asked, base=_named(asked.base)).spec
    return Path(text).name if text.startswith(("/", "~", "./", "../")) or Path(text).is_absolute() else text


def _upload(staged: Path, repo: str, private: bool, revision: str | None, message: str) -> str:
    """Make the repository and the branch where they are missing, and commit; the address.

    Raises:
        UserError: no token, or the hub refuses or cannot be reached.
    """
    import httpx2 as httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars

    api = HfApi(library_name="preftune")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api.whoami()
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            folder_path=staged,
            repo_id=url.repo_id,
            revision=revision,
            commit_message=message,
            allow_patterns=[*_PUSHED],
        )
    except LocalTokenNotFoundError as error:
        raise UserError("hub", "there is no token", "set $HF_TOKEN, or run: hf auth login") from error
    except HfHubHTTPError as error:
        raise _refused(error, repo, api.endpoint) from error
    except RuntimeError as error:  # an upload of its own threads, with what went wrong as its cause
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(error.__cause__, repo, api.endpoint) from error
        said = f"{error} ({' '.join(str(error.__cause__ or '').split())[:120]})"
        raise UserError("hub", said, "push again: what is there already is not sent again") from error
    except (httpx.HTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        said = f"{api.endpoint} cannot be reached ({' '.join(str(error).split())[:120]})"
        raise UserError("hub", said, "look at the network, $HF_ENDPOINT and $HF_HUB_OFFLINE, and push again") from error
    return str(done)


def _refused(error: Any, repo: str, endpoint: str) -> UserError:
    code = error.response.status_code if error.response is not None else None
    said = {
        401: ("the token is not valid", "set another in $HF_TOKEN, or run: hf auth login"),
        403: (f"the token may not write to {repo}", "use one with write access, or a repository of your own"),
        404: (f"{repo} is not there, or is not yours", "look at the name"),
        409: (f"{repo} is being changed, or is there as another kind of thing", "push again, or to another name"),
        429: ("too many requests", "wait, and push again"),
    }
    first = str(error.server_message or error).strip().splitlines()[0][:160] if str(error).strip() else "no reason"
    problem, remedy = said.get(code or 0, (f"{endpoint} answered {code}: {first}", "push again later"))
    return UserError("hub", f"{problem} ({code})" if code in said else problem, remedy)
