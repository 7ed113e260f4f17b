"""`preftune chat` as a process of its own: at a real terminal, and killed."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

from .conftest import votes_of

CODE = "import sys; sys.argv[0] = 'preftune'; from preftune.cli.main import main; main()"


def test_votes_outlive_the_process(judged):
    command = [sys.executable, "-c", CODE, "chat", str(judged), "--compare", "sft,dpo", "--samples"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("1\n2\n")
        process.stdin.flush()
        asked = 0
        while asked < 3:
            asked += process.stdout.readline().startswith("user: ")
        process.kill()
    assert [vote["preference"] for vote in votes_of(judged)] == [1.0, 2.0]


class Typist:
    """A person at a terminal."""

    def __init__(self, *arguments: object) -> None:
        self.process, self.terminal = self._start([str(each) for each in arguments])
        self.seen = ""

    def _start(self, arguments: list[str]) -> tuple[int, int]:
        process, terminal = pty.fork()
        if process == 0:
            os.environ["TERM"] = "dumb"
            # a shell at a terminal hands it on like this; one that starts the tests in the background ignores Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execv(sys.executable, [sys.executable, "-c", CODE, *arguments])
        return process, terminal

    def wait(self, text: str, seconds: float = 90) -> str:
        """What the terminal showed up to and with that text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.terminal, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"no {text!r} in {self.seen!r}") from None
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def interrupt(self) -> None:
        """Press Ctrl-C, not in the very moment in which the question appears: Python's readline hears a signal only
        once it waits for a key, and what comes before is heard with the next one."""
        time.sleep(0.5)
        self.type("\x03")

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def exit_code(self) -> int:
        """After what it still had to show."""
        while True:
            try:
                if not os.read(self.terminal, 4096):
                    break
            except OSError:
                break
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_a_person_votes_at_a_terminal(run):
    person = Typist("chat", run, "--compare", "sft,dpo", "--max-new-tokens", "3")
    assert "sft and dpo, two at a time without their names" in person.wait("you> ")
    person.type("Hi?\n")
    shown = person.wait("better: 1 (A), 2 (B), = (neither), x (both bad), 0 (skip)? ")
    assert re.search(r"A: .*B: ", shown, re.S) and not re.search("sft|dpo", shown)
    person.type("first\n")
    person.wait("'first' is no vote")
    person.wait("(skip)? ")
    person.type("2\n")
    person.wait("A was ")
    person.wait("you> ")
    (vote,) = votes_of(run)
    assert vote["preference"] == 2.0
    person.type("/nonsense\n")
    person.wait("no such command")
    person.wait("you> ")
    person.type("\x04")
    person.wait("votes.jsonl: 1, 1 of them now")
    assert person.exit_code() == 0


def test_ctrl_c_at_the_prompt_ends_with_the_tally(judged):
    person = Typist("chat", judged, "--compare", "sft,dpo", "--samples")
    person.wait("[1 of 4]")
    person.wait("(skip)? ")
    person.type("1\n")
    person.wait("[2 of 4]")
    person.wait("(skip)? ")
    person.interrupt()
    person.wait("votes.jsonl: 1, 1 of them now")
    assert person.exit_code() == 0
