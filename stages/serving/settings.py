"""What a recipe says of a server that draws replies: `rollout: {engine: vllm, url: ...}`. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

EngineName = Literal["vllm", "sglang"]

CORRECTIONS = (
    "importance_sampling_correction", "importance_sampling_mode", "importance_sampling_clip_max",
    "importance_sampling_clip_min",
)  # fmt: skip
"""Of `SampledSettings`, what corrects for the server's log-probs."""


@dataclass(kw_only=True)
class PlaceSettings:
    """Who draws the replies, where it is no process of ours."""

    rollout_engine: EngineName | None = field(
        default=None, metadata={"help": "A server draws the replies: vllm or sglang. None: the policy's own base."}
    )
    rollout_url: str | None = field(default=None, metadata={"help": "Its address, such as http://127.0.0.1:8000."})
    rollout_command: str | None = field(
        default=None,
        metadata={
            "help": "How the stage starts the server itself, such as /opt/vllm/bin/vllm serve; what it is to serve is "
            "filled in, and it ends with the stage. None: it runs already."
        },
    )
    rollout_api_key_env: str | None = field(
        default=None, metadata={"help": "The environment's variable that holds the server's key. None: no key."}
    )
    rollout_concurrency: Annotated[int, Ge(1)] = field(default=64, metadata={"help": "Requests at a time."})
    rollout_timeout: Annotated[float, Gt(0)] = field(default=600.0, metadata={"help": "Seconds for one request."})
    rollout_retries: Annotated[int, Ge(0)] = field(
        default=4, metadata={"help": "After 429, 5xx or a failed connection, waiting longer each time."}
    )
    rollout_wait: Annotated[float, Ge(0)] = field(
        default=600.0, metadata={"help": "Seconds for which a server that went away is waited for."}
    )


@dataclass(kw_only=True)
class ServerSettings(PlaceSettings):
    """The same, for a policy that changes while it trains."""

    rollout_folder: str | None = field(
        default=None,
        metadata={
            "help": "Where the policy's adapter is written for the server, which sees that folder under the same path. "
            "None: in the stage's folder."
        },
    )


@dataclass(kw_only=True)
class SampledSettings(ServerSettings):
    """The same, where something is learned from the replies: what makes up for log-probs that are not the trainer's.

    Names, defaults and meanings of the others than `rollout_ahead` are those of TRL's GRPOConfig (1.16), there with
    `vllm_` before them.
    """

    rollout_ahead: Annotated[int, Interval(ge=0, le=1)] = field(
        default=0,
        metadata={
            "help": "Iterations by which the server is ahead: at 1 it draws the next rollout while this one trains, "
            "by the policy that this one began with."
        },
    )
    importance_sampling_correction: bool = field(
        default=True, metadata={"help": "Weigh what a server drew by pi / its own probability."}
    )
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = field(
        default="sequence_mask",
        metadata={"help": "A weight a token or a reply; beyond the bounds it is cut to them, or is 0."},
    )
    importance_sampling_clip_max: Annotated[float, Gt(0)] | None = field(
        default=3.0, metadata={"help": "Upper bound of such a weight."}
    )
    importance_sampling_clip_min: Annotated[float, Gt(0)] | None = field(
        default=None, metadata={"help": "Lower bound; None: none."}
    )


PLACE_GROUP: Mapping[str, str] = MappingProxyType(
    {
        "engine": "rollout_engine",
        "url": "rollout_url",
        "command": "rollout_command",
        "api_key_env": "rollout_api_key_env",
        "concurrency": "rollout_concurrency",
        "timeout": "rollout_timeout",
        "retries": "rollout_retries",
        "wait": "rollout_wait",
    }
)
"""`rollout:` of what draws with finished policies: its keys, and the settings that they are."""

SERVER_GROUP: Mapping[str, str] = MappingProxyType({**PLACE_GROUP, "folder": "rollout_folder"})
"""The same of a policy that changes."""

ROLLOUT_GROUP: Mapping[str, str] = MappingProxyType(
    {**SERVER_GROUP, "ahead": "rollout_ahead", **{name: name for name in CORRECTIONS}}
)
"""The same of a method that learns from the replies."""

IDLE = frozenset(set(SERVER_GROUP.values()) - {"rollout_engine"})
"""What says where a server is and how it is asked, and changes nothing that is drawn."""
