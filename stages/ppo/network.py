"""What on-policy stages ask of the network: log-probs, values and scores, each under its own adapter on the one base.

Legend of shape suffixes: B rows, T positions of prompt + response, R response positions, H hidden size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ...models.adapters import DEFAULT, REF, AdapterSet
from ...models.batching import forward_tokens
from ...models.heads import score_at
from ...models.logprobs import LmHead, ResponseLogprobs, response_logprobs, states_before_response
from ...models.sharded import is_sharded, most_of_all
from .rollout import Episodes, forward_batches


class Trunk:
    """The base with its adapters, at one temperature.

    `autocast` gives the context of a mixed-precision forward (bf16=True: fp32 LoRA weights, bf16 products).

    The caller runs a backward inside the same `adapters.using(role)` as its forward: with gradient checkpointing the
    backward runs the layers again, and must meet the same adapter.

    Attributes:
        forward_tokens: padded tokens of one forward without gradients.
    """

    def __init__(
        self,
        adapters: AdapterSet,
        temperature: float = 1.0,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.adapters, self.temperature, self.autocast = adapters, temperature, autocast
        self.forward_tokens = forward_tokens(adapters.backbone)

    @property
    def head(self) -> LmHead:
        """The output head under the adapter that is active now."""
        return self.adapters.head

    def batches(self, episodes: Episodes, group: int = 1) -> list[torch.Tensor]:
        """The rows of each forward without gradients; those of a group, which follow each other, together where they
        fit. A base that is divided is gathered by every process for every forward: those with fewer of them make their
        last one again."""
        found = forward_batches(episodes, self.forward_tokens, group)
        if is_sharded(self.adapters.backbone):
            most = most_of_all(episodes.start_B.device, len(found))[0]
            found += found[-1:] * (most - len(found))
        return found

    def hidden(self, episodes: Episodes) -> torch.Tensor:
        """Last hidden states [B, T, H] under the adapter that is active now."""
        mask_BT = episodes.attention_mask_BT
        with self.autocast():
            output = self.adapters.backbone(
                input_ids=episodes.input_ids_BT,
                attention_mask=mask_BT,
                position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                rows=episodes.host.forward_rows,
            )
        return output.last_hidden_state

    def logprobs(
        self, hidden_BTH: torch.Tensor, episodes: Episodes, *, differentiable_entropy: bool = False
    ) -> ResponseLogprobs:
        """Log-probs and entropies [B, R] of the response tokens, at the rollout's temperature: of states under the
        adapter that is active now, and by its head."""
        return response_logprobs(
            hidden_BTH,
            episodes.input_ids_BT,
            episodes.start_B,
            episodes.length_B,
            self.head,
            temperature=self.temperature,
            differentiable_entropy=differentiable_entropy,
            tokens=episodes.tokens,
        )

    def values(self, hidden_BTH: torch.Tensor, episodes: Episodes) -> torch.Tensor:
        """V(s_t) [B, R], s_t being everything before response token t; zero outside the response."""
        states_BRH = states_before_response(hidden_BTH, episodes.start_B, episodes.length_B, episodes.host.longest)
        return torch.where(episodes.mask_BR, self.adapters.heads["value"](states_BRH), 0.0)

    def scores(self, role: str, episodes: Episodes) -> torch.Tensor:
        """The scalar head of `role` at the last response token [B], under that adapter."""
        with self.adapters.using(role):
            hidden_BTH = self.hidden(episodes)
        return score_at(self.adapters.heads[role], hidden_BTH, episodes.start_B + episodes.length_B - 1)


def add_reference(adapters: AdapterSet) -> bool:
    """Freeze a copy of the policy as "ref". An `AdapterSet` that brings a "ref" keeps it; then False is returned."""
    if REF in adapters.names:
        return False
    adapters.copy(REF, source=DEFAULT, trainable=False)
    return True
