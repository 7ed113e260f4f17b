"""Where a chat is typed and read: a terminal with its line editing, or a pipe, one turn a line."""

import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..progress import say


class Terminal:
    """Standard input and output. Replies go to standard output, everything else that is said to standard error.

    Attributes:
        person: whether a person sits at both ends; prompts are shown to nobody else.
    """

    def __init__(self) -> None:
        self.person = sys.stdin.isatty() and sys.stdout.isatty()
        # half a character that was pasted, or another encoding, should not end the chat
        with suppress(AttributeError):
            stdin: Any = sys.stdin
            stdin.reconfigure(errors="replace")
        if self.person:
            with suppress(ImportError):
                # `input` edits lines and remembers them once this is imported
                import readline  # noqa: F401
        self._begins = False

    def ask(self, prompt: str) -> str:
        """The next line that is typed.

        Raises:
            EOFError: there is none (Ctrl-D, or the pipe's end).
        """
        if self.person:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def begin(self, label: str = "") -> None:
        """What follows is the text of one reply."""
        sys.stdout.write(label)
        sys.stdout.flush()
        self._begins = True

    def write(self, text: str) -> None:
        """A part of it, shown at once."""
        if self._begins:
            text = text.lstrip()
            self._begins = not text
        sys.stdout.write(harmless(text))
        sys.stdout.flush()

    def end(self, note: str = "") -> None:
        """It is over; the note is for people alone."""
        print(f" ({note})" if note and self.person else "", flush=True)

    def say(self, line: str) -> None:
        """One line that is no reply."""
        say(harmless(line))

    @contextmanager
    def stoppable(self) -> Iterator[Callable[[], bool]]:
        """Within it Ctrl-C is not an error: what this yields tells whether it was pressed. Pressed again it is one."""
        pressed = False

        def press(*_: Any) -> None:
            nonlocal pressed
            if pressed:
                raise KeyboardInterrupt
            pressed = True

        if threading.current_thread() is not threading.main_thread():
            # only the main thread may listen
            yield lambda: False
            return
        before = signal.signal(signal.SIGINT, press)
        try:
            yield lambda: pressed
        finally:
            signal.signal(signal.SIGINT, before)


def harmless(text: str) -> str:
    """The text without control characters, with which a reply could move the cursor or worse."""
    return "".join(each for each in text if each in "\n\t" or unicodedata.category(each) not in ("Cc", "Cs"))
