"""Known GPUs by their makers' published figures, and what of a card a training step can have."""

from dataclasses import dataclass

from ..errors import UserError, nearest

CONTEXT_BYTES = 600_000_000
"""What the driver and its libraries take of a card before the first tensor: CUDA's context, its kernels, cuBLAS'
workspace. An allowance, not a measurement."""

FRAGMENTS = 0.05
"""Share of what tensors take that the allocator's holes cost on top. An allowance as well."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        mebibytes: of memory, as nvidia-smi shows it.
        tflops: bf16 products with fp32 sums, dense, in 10^12 operations a second.
        bandwidth: of its memory, in 10^9 bytes a second.
        bf16: whether it computes in bfloat16.
    """

    name: str
    mebibytes: int
    tflops: float
    bandwidth: float
    bf16: bool = True

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.mebibytes << 20


CARDS = (
    Card("t4", 15360, 65, 320, bf16=False),
    Card("rtx-3090", 24576, 71, 936),
    Card("rtx-4090", 24564, 165, 1008),
    Card("a10g", 23028, 70, 600),
    Card("l4", 23034, 121, 300),
    Card("rtx-5090", 32607, 209, 1792),
    Card("a6000", 46068, 155, 768),
    Card("l40s", 46068, 362, 864),
    Card("a100-40gb", 40960, 312, 1555),
    Card("a100-80gb", 81920, 312, 2039),
    Card("h100", 81559, 989, 3350),
    Card("h200", 143771, 989, 4800),
)
"""Rates from the data sheets of NVIDIA (the T4 computes in fp16, and the consumer cards at their rate with fp32 sums).
Memory as owners report it (modal-labs/modal-client, pull request 2797, has the cards of data centres). Error correction
takes a sixteenth of some: an A6000 without it has 49140. Each has the 10^9 bytes a GB at least that it is sold with."""

TRAINING_SHARE, DECODING_SHARE = 0.35, 0.5
"""Of its rate, in training, and of its bandwidth, in decoding: what is taken to be reached. Assumptions, said as such
wherever a time stands that comes of them: no card was measured."""


def card_named(name: str) -> Card:
    """The card of that name, as a user writes it.

    Raises:
        UserError: an unknown one.
    """
    plain = "-".join(name.lower().replace("nvidia", "").replace("geforce", "").split())
    for card in CARDS:
        if plain == card.name:
            return card
    raise UserError("--card", f"{name!r} is not known", nearest(plain, [card.name for card in CARDS]))


def room(memory: int) -> int:
    """Bytes of tensors that a card of so many bytes takes."""
    return int((memory - CONTEXT_BYTES) / (1 + FRAGMENTS))
