"""What is said to a person: without control characters, which would move the cursor or worse, and without keys.

Every line that a command prints, and every error that is kept in a run, goes through `printable`; replies, which are
data, through `harmless` alone. Imports nothing heavy.
"""

import logging
import os
import re
import unicodedata

HIDDEN = "***"

_ADDRESS = re.compile(r"(?<=://)[^\s/@:'\"]*:[^\s/@'\"]*(?=@)")
_USER = re.compile(r"(?<=://)[^\s/@:?#'\"]+(?=@)")
_TOKEN = re.compile(
    # Hugging Face, OpenAI and its like, GitHub, GitLab, AWS, Google, Slack, Weights & Biases; a signed JSON token
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|A(?:KIA|SIA)[A-Z0-9]{16}|AIza[\w-]{30,}|xox[a-z]-[\w-]{10,}|wandb_v1_\w{20,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)
_HEADER = re.compile(r"(?i)(?<=\bbearer )(?=\S*\d)[\w.~+/=-]{16,}|(?<=\bbasic )[A-Za-z0-9+/]{8,}={1,2}")
_QUERY = re.compile(r"(?i)(?<=[?&])((?:api[_-]?key|(?:access_|auth_)?token|key|secret|password|sig)=)[^&\s'\"]+")
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PAT)$")


def harmless(text: str) -> str:
    """The text without control characters, half characters and those that turn the writing's direction around."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(each for each in text if each in "\n\t" or not _is_control(each))


def _is_control(character: str) -> bool:
    # of the format characters those for directions alone: others join emoji and letters
    return unicodedata.category(character) in ("Cc", "Cs") or character in _TURNS


def holds_key(text: str) -> bool:
    """Whether something in it looks like a key or a password: by its form, wherever it stands."""
    return any(pattern.search(text) for pattern in (_ADDRESS, _TOKEN, _HEADER, _QUERY))


def redacted(text: str) -> str:
    """The text with `***` for what looks like a key or a password, and for each key in the environment."""
    for pattern in (_ADDRESS, _USER, _TOKEN, _HEADER):
        text = pattern.sub(HIDDEN, text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and value in text and _SECRET_NAME.search(name) and not value.startswith(("/", "~")):
            text = text.replace(value, HIDDEN)
    return text


def printable(text: str) -> str:
    """As a person may see it: `harmless` and `redacted`."""
    return redacted(harmless(text))


def printable_json(line: str) -> str:
    """A line of JSON for a terminal: what `harmless` would take away is written as an escape, and nothing is lost."""
    if line.isascii() and line.isprintable():
        return line
    return "".join(f"\\u{ord(each):04x}" if _is_control(each) else each for each in line)


class PrintableLogs(logging.Formatter):
    """For the libraries' log lines and our own."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
