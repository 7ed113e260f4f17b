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
        gigabytes: of memory, as it is sold.
        tflops: bf16 products with fp32 sums, dense, in 10^12 operations a second.
        bandwidth: of its memory, in 10^9 bytes a second.
        bf16: whether it computes in bfloat16.
    """

    name: str
    gigabytes: int
    tflops: float
    bandwidth: float
    bf16: bool = True


CARDS = (
    Card("t4", 16, 65, 320, bf16=False),
    Card("rtx-3090", 24, 71, 936),
    Card("rtx-4090", 24, 165, 1008),
    Card("a10g", 24, 70, 600),
    Card("l4", 24, 121, 300),
    Card("rtx-5090", 32, 209, 1792),
    Card("a6000", 48, 155, 768),
    Card("l40s", 48, 362, 864),
    Card("a100-40gb", 40, 312, 1555),
    Card("a100-80gb", 80, 312, 2039),
    Card("h100", 80, 989, 3350),
    Card("h200", 141, 989, 4800),
)
"""From the data sheets of NVIDIA (the T4 computes in fp16, and the consumer cards at their rate with fp32 sums)."""

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
