"""Replies that are drawn while the policy trains: a thread asks a server for them, until they are taken.

The thread sends requests and gets token ids. The model, the adapters on the disk and the random numbers of torch and
Python are the main thread's.
"""

import threading
import time
from collections.abc import Callable

from ... import stopping
from ...models.generate import Generation

_LOOKS = 0.5
"""Seconds after which who waits for the replies looks whether it was asked to stop."""


class Ahead:
    """A draw under way.

    Args:
        draw: asks for the replies; given is what it tells the number of them so far.

    Attributes:
        seconds: that it took, once it is over.
    """

    def __init__(self, draw: Callable[[Callable[[int], None]], Generation]) -> None:
        self.seconds = 0.0
        self._done, self._told = 0, threading.Event()
        self._drawn: Generation | None = None
        self._error: BaseException | None = None
        # a daemon: whatever happens, it holds up no process that ends
        self._thread = threading.Thread(target=self._run, args=(draw,), name="rollout-ahead", daemon=True)
        self._thread.start()

    def wait(self, on_batch: Callable[[int], None] | None = None) -> None:
        """Until it is over, well or not.

        Raises:
            Stopped: this process was asked to stop, where it may leave off.
        """
        while self._thread.is_alive():
            self._thread.join(_LOOKS)
            stopping.poll()
            if on_batch is not None:
                on_batch(self._done)

    def result(self, on_batch: Callable[[int], None] | None = None) -> Generation:
        """The replies, once they are there. Raises what the draw has ended with; Stopped as `wait`."""
        self.wait(on_batch)
        if self._error is not None:
            raise self._error
        assert self._drawn is not None
        return self._drawn

    def leave_off(self) -> None:
        """Ask for no more; requests under way end by themselves."""
        self._told.set()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self, draw: Callable[[Callable[[int], None]], Generation]) -> None:
        began = time.perf_counter()
        try:
            with stopping.told_by(self._told):
                self._drawn = draw(self._tell)
        except BaseException as error:  # raised again where the replies are taken
            self._error = error
        self.seconds = time.perf_counter() - began

    def _tell(self, done: int) -> None:
        self._done = done
