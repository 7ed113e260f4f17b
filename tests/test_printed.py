"""Nothing that is shown moves the cursor or tells a key."""

import io
import json
import logging
import sys

import pytest

from preftune import progress
from preftune.cli.output import Output
from preftune.cli.process import exit_code_of
from preftune.errors import UserError
from preftune.printed import PrintableLogs, harmless, holds_key, printable, printable_json, redacted

NASTY = "\x1b[31mred\x1b]0;title\x07\x9b2J\x00\r\x7f\u202e"
KEYS = [
    "hf_" + "aB3" * 8,
    "sk-proj-" + "aB3_" * 6,
    "ghp_" + "a1B2" * 8,
    "AKIA" + "ABCD1234" * 2,
    "xoxb-1234567890-abc",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def",
]


def clean(text: str) -> bool:
    return not any(each in text for each in NASTY if not each.isprintable())


def test_control_characters_go_and_text_stays():
    assert harmless(NASTY + "é日本🧑‍🚀\n\t") == "[31mred]0;title2Jé日本🧑‍🚀\n\t"
    line = json.dumps({"a": NASTY}, ensure_ascii=False)
    assert clean(printable_json(line)) and json.loads(printable_json(line)) == {"a": NASTY}


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_known_by_their_form(key: str):
    assert holds_key(f"see {key}.") and key not in redacted(f"error: key {key}, see {key}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("get http://:pw@h:8/ failed", "get http://***@h:8/ failed"),
        ("postgres://u:p%40@h", "postgres://***@h"),
        ("https://abcdef@h/x", "https://***@h/x"),
        ("https://h/v1?a=b&api_key=xyz&c=d", "https://h/v1?a=b&api_key=***&c=d"),
        ("Authorization: Bearer abc.DEF-123_456~7", "Authorization: Bearer ***"),
        ("https://h/a@b?c=d@e mail me@home:8080", "https://h/a@b?c=d@e mail me@home:8080"),
        ("the bearer certificates of 1901", "the bearer certificates of 1901"),
        ("a risk-averse-and-rather-long-word", "a risk-averse-and-rather-long-word"),
    ],
)
def test_passwords_are_hidden_and_nothing_else(text: str, shown: str):
    assert redacted(text) == shown


def test_what_the_environment_keeps_is_hidden_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_JUDGE_KEY", "plain-but-secret")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-and-long")
    monkeypatch.setenv("HF_TOKEN", "/run/secrets/token")
    assert redacted("said: plain-but-secret, false-and-long, /run/secrets/token") == (
        "said: ***, false-and-long, /run/secrets/token"
    )


def test_every_way_to_the_terminal_is_printable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    key = KEYS[0]
    text = f"{NASTY} {key} https://me:pw@host"

    def fails(error: Exception) -> int:
        def work() -> None:
            raise error

        return exit_code_of(work)

    Output().say(text)
    Output(json=True).say(text)
    progress.say(text)
    meter = progress.Meter(text, 3, quiet=0, lines=0)
    meter(1, text)
    Output().rows([{text: text, "[bold]": "[/x] :smile:"}])
    Output(json=True).rows([{"a": text}])
    assert fails(UserError(text, text, text)) == 2
    assert fails(RuntimeError(text)) == 1
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableLogs())
    logging.LogRecord("x", logging.WARNING, "f", 1, text, (), None)
    handler.emit(logging.LogRecord("x", logging.WARNING, "f", 1, text, (), None))
    out, err = capsys.readouterr()
    assert clean(out.replace("\x1b[1m", "").replace("\x1b[0m", "")) and clean(err)
    assert key not in out + err and "me:pw" not in out + err
    assert "[/x] :smile:" in out and "[bold]" in out


def test_a_long_text_is_looked_through_quickly():
    text = ("https://" + "a" * 50 + "?key " + "bearer ") * 20_000
    assert len(printable(text)) == len(text)
    assert io.StringIO(text).readline()
