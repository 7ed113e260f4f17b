"""A decode step as a CUDA graph: launched as one, where a GPU would otherwise wait for the host's next operation."""

import functools
import logging
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)


class StepGraphs:
    """Graphs of one step, one for each shape in which it is met.

    A step must read and write the same memory at every call, ask the host nothing, and may be run for any key at any
    time. The first of a key is run as it is (libraries choose their kernels then), the second is captured, and from
    then on the graph is replayed. Where a step cannot be captured, the log says why, and every step is run as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.works = device, True
        self.met: set[Hashable] = set()
        self.made: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Take the step: as a graph, once there is one for this key."""
        if key in self.met and key not in self.made and self.works:
            self._capture(key, step)
        self.met.add(key)
        if key in self.made:
            self.made[key].replay()
        else:
            step()

    def _capture(self, key: Hashable, step: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # others' threads (a loader's) may ask CUDA for memory meanwhile
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                step()
        except RuntimeError as error:
            self.works = False
            _say(" ".join(str(error).split())[:200])
        else:
            self.made[key] = graph

    def forget(self) -> None:
        """The memory that the step works on is another from now on."""
        self.made.clear()
        self.met.clear()


@functools.cache
def _say(why: str) -> None:
    """Once for each reason, not once a rollout."""
    logger.warning("a decode step cannot be a CUDA graph (%s): it is launched one operation at a time", why)
