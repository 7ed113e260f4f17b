"""Rollouts: prompts, what the policy answered, and every number about it that the update needs.

Rows are prompt + response, padded on the RIGHT only: under causal attention nothing to the right of a token changes its
hidden state, so padding can never reach a log-prob, a value or a score.

Legend of shape suffixes: B rows (episodes of this process), T positions of prompt + response, R response positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ..models.generate import Generation
from ..models.logprobs import response_positions


@dataclass(frozen=True)
class Episodes:
    """What was sampled.

    input_ids_BT: int64, prompt then response, then padding.
    start_B: int64, where each response starts (the prompt's length).
    length_B: int64, response tokens, EOS included.
    finished_B: bool, whether the response ended in EOS.
    sampler_logps_BR: fp32, the sampler's own log-probs; only for comparison.
    """

    input_ids_BT: torch.Tensor
    start_B: torch.Tensor
    length_B: torch.Tensor
    finished_B: torch.Tensor
    sampler_logps_BR: torch.Tensor

    def __len__(self) -> int:
        return len(self.start_B)

    @property
    def mask_BR(self) -> torch.Tensor:
        """True on response tokens, the first stop token included, nothing after it."""
        return response_positions(self.start_B, self.length_B)[1]

    @property
    def attention_mask_BT(self) -> torch.Tensor:
        """1 on prompt and response tokens; by length, so a PAD that equals EOS cannot be mistaken."""
        step_T = torch.arange(self.input_ids_BT.shape[1], device=self.start_B.device)
        return (step_T < (self.start_B + self.length_B)[:, None]).long()

    def rows(self, index: torch.Tensor) -> "Episodes":
        """The given rows, cut to their own longest row and longest response."""
        start_B, length_B = self.start_B[index], self.length_B[index]
        total, longest = int((start_B + length_B).max()), int(length_B.max())
        return Episodes(
            self.input_ids_BT[index, :total],
            start_B,
            length_B,
            self.finished_B[index],
            self.sampler_logps_BR[index, :longest],
        )

    def responses(self) -> list[list[int]]:
        """Token ids of each response, EOS included."""
        return [
            row[start : start + length].tolist()
            for row, start, length in zip(
                self.input_ids_BT.cpu(), self.start_B.tolist(), self.length_B.tolist(), strict=True
            )
        ]


@dataclass(frozen=True)
class Rollout:
    """Episodes with everything the minibatch epochs read; all fp32, zero outside the mask.

    logps_BR, ref_logps_BR: log-probs of the sampled tokens under old policy and reference, by the training forward.
    values_BR: the value of the state before each token.
    advantages_BR, returns_BR: see `advantages.gae`.
    scores_B: the score that landed on each last token.
    """

    episodes: Episodes
    logps_BR: torch.Tensor
    ref_logps_BR: torch.Tensor
    values_BR: torch.Tensor
    advantages_BR: torch.Tensor
    returns_BR: torch.Tensor
    scores_B: torch.Tensor

    def rows(self, index: torch.Tensor) -> "Rollout":
        """The given rows, cut to their own longest row and longest response."""
        episodes = self.episodes.rows(index)
        r = episodes.sampler_logps_BR.shape[1]
        return Rollout(
            episodes,
            self.logps_BR[index, :r],
            self.ref_logps_BR[index, :r],
            self.values_BR[index, :r],
            self.advantages_BR[index, :r],
            self.returns_BR[index, :r],
            self.scores_B[index],
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Flat, for a checkpoint."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "episodes"}
        return own | {f"episodes.{f.name}": getattr(self.episodes, f.name) for f in fields(self.episodes)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], device: torch.device) -> "Rollout":
        """What `tensors` gave."""
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        episodes = Episodes(**{f.name: moved[f"episodes.{f.name}"] for f in fields(Episodes)})
        return cls(episodes, **{f.name: moved[f.name] for f in fields(cls) if f.name != "episodes"})


def make_episodes(
    prompts: Sequence[Sequence[int]], generation: Generation, pad_token_id: int, device: torch.device
) -> Episodes:
    """Lay prompts and their completions out as right-padded rows.

    Raises:
        ValueError: a completion without a token (there is nothing to score or to train on).
    """
    rows = [torch.tensor([*prompt, *tokens]) for prompt, tokens in zip(prompts, generation.tokens, strict=True)]
    if any(not tokens for tokens in generation.tokens):
        raise ValueError("a completion has no token, expected at least EOS; is max_new_tokens at least 1?")
    logps = [torch.tensor(row, dtype=torch.float32) for row in generation.logprobs]
    pad = torch.nn.utils.rnn.pad_sequence
    return Episodes(
        pad(rows, batch_first=True, padding_value=pad_token_id).to(device),
        torch.tensor([len(prompt) for prompt in prompts], device=device),
        torch.tensor([len(tokens) for tokens in generation.tokens], device=device),
        torch.tensor(generation.finished, dtype=torch.bool, device=device),
        pad(logps, batch_first=True).to(device),
    )


FORWARD_ONLY = 4
"""Sequences in a forward without gradients, for each one in a training forward: a layer's activations are gone with the
layer, and more rows share more of their prompts."""


def micro_batches(episodes: Episodes, rows: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Split `rows` into forwards of `size` sequences of like length, to pad little.

    Every number and every summed loss is per row, so the split changes nothing but the time.
    """
    total = (episodes.start_B + episodes.length_B)[rows]
    return list(rows[total.argsort(descending=True, stable=True)].split(size))
