"""What `preftune ui` is told."""

from dataclasses import dataclass
from pathlib import Path

PORT = 7860
LOOPBACK = "127.0.0.1"
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class UiOptions:
    """What the command line says; None where an option is not given.

    Attributes:
        host, port: where the page is served; port 0 is any that is free. token: what the address must carry.
        label: a file of prompts to draw replies to. policies: whose, in the order given. replies: of each policy.
        max_new_tokens, temperature, seed, system: of the replies, those of a chat included.
    """

    host: str = LOOPBACK
    port: int = PORT
    token: str | None = None
    label: Path | None = None
    policies: str | None = None
    replies: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    system: str | None = None
