"""`preftune chat` with one policy, through a pipe; what is refused."""

import io
import json
import shutil
import signal
from dataclasses import replace
from typing import Any

import pytest

from preftune.cli.chat import Chat, ChatOptions, _decoding
from preftune.cli.speakers import show_reply
from preftune.cli.terminal import Terminal
from preftune.errors import UserError
from preftune.eval.chat.conversation import Conversation, Reply
from preftune.printed import harmless

from .conftest import POLICIES, SYSTEM, assistant, talk, user


def test_a_pipe_gets_the_replies_and_nothing_else(shell, run):
    code, out, err = shell("chat", run, "--max-new-tokens", 6, typed="Hi?\n\nWhat is up?\n")
    asked, turns, expected = talk(run), [SYSTEM], ""
    # the last finished policy, with the recipe's system message and seed; the second turn knows the first
    for seed, text in ((3, "Hi?"), (4, "What is up?")):
        turns = [*turns, user(text)]
        reply = asked.reply("ipo", turns, seed=seed).text
        turns = [*turns, assistant(reply)]
        expected += harmless(reply.lstrip()) + "\n"
    assert (code, out, err) == (0, expected, "")


def test_policy_seed_temperature_and_system_are_what_was_asked_for(shell, run):
    given = ("--policy", "base", "--seed", 8, "--temperature", 0.5, "--system", "", "--max-new-tokens", 6)
    code, out, _ = shell("chat", run, *given, typed="Hi?\n/policy sft\n/again\n")
    asked = talk(run)
    asked = Conversation(replace(asked.bench, spec=replace(asked.bench.spec, temperature=0.5)))
    replies = [asked.reply("base", [user("Hi?")], seed=8), asked.reply("sft", [user("Hi?")], seed=9)]
    assert code == 0 and out == "".join(harmless(each.text.lstrip()) + "\n" for each in replies)
    assert replies[0].text != replies[1].text


def test_beams_reach_the_conversation(shell, run):
    code, out, err = shell("chat", run, "--policy", "sft", "--beams", 3, "--max-new-tokens", 6, typed="Hi?\n")
    asked = talk(run)
    spec: Any = replace(asked.bench.spec, temperature=0.0, beams=3)
    reply = Conversation(replace(asked.bench, spec=spec)).reply("sft", [SYSTEM, user("Hi?")], seed=3)
    assert (code, out, err) == (0, harmless(reply.text.lstrip()) + "\n", "")


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (ChatOptions(), {}),
        (ChatOptions(temperature=0.5), {"temperature": 0.5}),
        (ChatOptions(beams=1, temperature=0.5), {"beams": 1, "temperature": 0.5}),
        (ChatOptions(beams=4), {"beams": 4, "temperature": 0.0}),
        (ChatOptions(beams=4, temperature=0.0), {"beams": 4, "temperature": 0.0}),
    ],
)
def test_beams_draw_nothing(options, settings):
    assert _decoding(options) == settings


class Echo:
    """A speaker that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[dict], int]] = []
        self.silent = False

    def answer(self, messages, seed):
        self.asked.append((messages, seed))
        return None if self.silent else f"reply {len(self.asked)}"

    def switch(self, name):
        return f"now {name}"


@pytest.fixture
def chat(monkeypatch):
    def made(typed: str, system: str | None = None) -> tuple[Chat, Echo]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        echo = Echo()
        return Chat(echo, Terminal(), system, 10), echo

    return made


def test_the_commands_of_a_chat(chat, capsys):
    talked, echo = chat(
        "one\ntwo\n/again\n/system Be brief.\nthree\n/new\nfour\n/system\n /five\n/policy x\n/quit\nsix\n"
    )
    talked.run()
    first = [user("one"), assistant("reply 1"), user("two")]
    third = [*first, assistant("reply 3"), user("three")]
    system = {"role": "system", "content": "Be brief."}
    assert echo.asked == [
        ([user("one")], 10),
        (first, 11),
        (first, 12),
        ([system, *third], 13),
        ([system, user("four")], 14),
        ([user("four"), assistant("reply 5"), user("/five")], 15),
    ]
    assert "now x" in capsys.readouterr().err


def test_a_reply_that_was_stopped_leaves_the_conversation_as_it_was(chat):
    talked, echo = chat("one\n")
    talked.run()
    echo.silent = True
    talked._turn([*talked.turns, user("two")])
    assert talked.turns == [user("one"), assistant("reply 1")]


def test_a_script_ends_at_its_first_mistake(chat):
    for typed, said in (("/agian\n", "/agian: no such command"), ("/again\n", "nothing was said yet")):
        with pytest.raises(UserError, match=said):
            chat(typed)[0].run()


def test_help_names_every_command(chat, capsys):
    talked, _ = chat("/help\n")
    talked.run()
    said = capsys.readouterr().err
    assert all(f"/{name} " in said for name in ("help", "new", "system", "policy", "again", "quit"))


def test_control_characters_do_not_reach_the_terminal():
    assert harmless("a\x1b[2Jb\tc\nd\x9b\x00é\ud800") == "a[2Jb\tc\ndé"


def test_ctrl_c_stops_a_reply_and_the_second_one_is_an_error(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    terminal = Terminal()

    class Talk:
        def reply(self, policy, messages, *, seed, on_text, stop):
            assert not stop()
            signal.raise_signal(signal.SIGINT)
            assert stop()
            return Reply(policy, "half", 1, False, True)

    assert show_reply(Talk(), terminal, "", "sft", [], 0).text == "half"  # pyright: ignore[reportArgumentType]: all of a Talk that is called
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), terminal.stoppable():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_mistakes_are_one_line(shell, judged):
    refused = shell.refused
    refused("chat", judged / "none", said="no such folder")
    refused("chat", judged / "eval", said="holds no recipe.yaml")
    refused("chat", judged, "--policy", "dpp", said="--policy: no policy 'dpp'.*dpo")
    refused("chat", judged, "--policy", "reward", said="no policy 'reward'")
    refused("chat", judged, "--policy", "kto", said="kto: holds no adapter.*--until kto")
    refused("chat", judged, "--compare", "sft,kto", said="kto: holds no adapter")
    refused("chat", judged, "--compare", "sft", said="names no two policies")
    refused("chat", judged, "--compare", "sft,sft", said="names no two policies")
    beams = ("--beams", 4, "--temperature", 0.5)
    refused("chat", judged, *beams, said="--beams: 4 beams search and draw nothing.*temperature of 0.5")
    refused(
        "chat", judged, "--compare", "sft,dpo", "--samples", "--beams", 4, said="--beams: means nothing with --samples"
    )
    refused("chat", judged, "--compare", "sft,dpo,sft", said="a policy twice")
    refused("chat", judged, "--samples", said="needs --compare")
    refused("chat", judged, "--compare", "sft,dpo", "--policy", "sft", said="--policy: means nothing with --compare")
    refused("chat", judged, "--compare", "sft,dpo", "--samples", "--max-new-tokens", 4, said="nothing with --samples")
    refused("chat", judged, "--compare", "sft,base", "--samples", said="no samples of 'base'.*sft, dpo, ipo")
    refused("chat", judged, "--temperature", -1, said="--temperature")
    vote = {"prompt": 1, "policy_a": "dpo", "policy_b": "sft", "preference": 1, "completion_a": "said before"}
    (judged / "votes.jsonl").write_text(json.dumps(vote) + "\n")
    refused(
        "chat", judged, "--compare", "sft,dpo", "--samples", said=r"votes.jsonl:1: a vote on another reply of 'dpo'"
    )
    (judged / "votes.jsonl").write_text("{}\n")
    refused("chat", judged, "--compare", "sft,dpo", said=r"votes.jsonl:1: prompt is None")
    (judged / "votes.jsonl").unlink()
    shutil.rmtree(judged / "eval")
    refused("chat", judged, "--compare", "sft,dpo", "--samples", said="samples.jsonl: no such file.*eval run")
    for name in POLICIES:
        shutil.rmtree(judged / name)
    refused("chat", judged, said="no policy is finished")
