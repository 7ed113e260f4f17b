"""Where a chat is typed and read: a terminal with line editing, or a pipe with one turn per line."""

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..printed import harmless
from ..progress import say


class Terminal:
    """Standard input and output. Replies go to standard output, everything else to standard error.

    Attributes:
        person: whether a person sits at both ends; prompts are shown to nobody else.
    """

    def __init__(self) -> None:
        self.person = sys.stdin.isatty() and sys.stdout.isatty()
        # half a character that was pasted, or another encoding, should not end the chat
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        if self.person:
            with suppress(ImportError):
                # `input` edits lines and remembers them once this is imported
                import readline  # noqa: F401
        self._begins = False

    def ask(self, prompt: str) -> str:
        """The next line of input.

        Raises:
            EOFError: there is none (Ctrl-D, or the end of the pipe).
        """
        if self.person:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def begin(self, label: str = "") -> None:
        """Begin a reply: its text follows."""
        sys.stdout.write(harmless(label))
        sys.stdout.flush()
        self._begins = True

    def write(self, text: str) -> None:
        """Show the next part of the reply at once."""
        if self._begins:
            text = text.lstrip()
            self._begins = not text
        sys.stdout.write(harmless(text))
        sys.stdout.flush()

    def end(self, note: str = "") -> None:
        """End the reply; the note is shown to a person only."""
        print(f" ({harmless(note)})" if note and self.person else "", flush=True)

    def say(self, line: str) -> None:
        """Show one line that is not part of a reply."""
        say(line)

    @contextmanager
    def stoppable(self) -> Iterator[Callable[[], bool]]:
        """Within it Ctrl-C raises nothing at first: the function that it yields says whether it was pressed."""
        pressed = False

        def press(*_: object) -> None:
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
