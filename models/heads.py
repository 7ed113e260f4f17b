"""Scalar heads: what turns a decoder's hidden states into one number a token (rewards, values)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..errors import UserError


def bias_of(linear: nn.Linear) -> Tensor | None:
    """A linear layer's bias, which it need not have (torch's annotation says that it has)."""
    return linear.bias


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever dtype its input has, autocast included.

    Saved and loaded it is an ordinary linear layer.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = bias_of(self)
            return F.linear(input.float(), self.weight.float(), None if bias is None else bias.float())


class ScalarHead(nn.Module):
    """One number a token, in fp32.

    Args:
        hidden: width H of the hidden states.
        bias: whether it has one (value heads do, reward heads do not).

    The weight starts with standard deviation 1/sqrt(H + 1) and the bias at 0 (arXiv 2403.17031, detail 11), drawn from
    `generator` where one is given.
    """

    def __init__(self, hidden: int, bias: bool, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.score = Fp32Linear(hidden, 1, bias=bias, dtype=torch.float32)
        init_score(self.score, generator)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Hidden states [B, T, H] of any dtype to scores [B, T] in fp32."""
        return self.score(hidden_BTH).squeeze(-1)


def score_at(head: ScalarHead, hidden_BLH: Tensor, position_B: Tensor) -> Tensor:
    """What a head says of one token of each row [B], fp32: a reward is read at the row's last token.

    Args:
        hidden_BLH: last hidden states, of any dtype.
        position_B: the column of the token that is read.
    """
    rows_B = torch.arange(len(position_B), device=hidden_BLH.device)
    return head(hidden_BLH[rows_B, position_B][:, None]).squeeze(1)


def init_score(linear: nn.Linear, generator: torch.Generator | None = None) -> None:
    """Weight ~ N(0, 1/(H + 1)), bias 0, in place."""
    with torch.no_grad():
        linear.weight.normal_(std=(linear.in_features + 1) ** -0.5, generator=generator)
        if (bias := bias_of(linear)) is not None:
            bias.zero_()


def load_classifier(folder: Path, seed: int, options: dict[str, Any]) -> PreTrainedModel:
    """The sequence classifier of a base with one label and a fresh fp32 `score` head drawn from `seed`.

    Raises:
        UserError: the architecture has none, or one without a linear `score` on its decoder.
    """
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **options)
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError("model.base", f"no reward model can be made of it ({first[:200]})", "use a decoder") from error
    old = getattr(model, "score", None)
    if not isinstance(old, nn.Linear):
        raise UserError("model.base", f"{type(model).__name__} has no linear `score` head", "use a decoder")
    head = Fp32Linear(old.in_features, 1, bias=False, dtype=torch.float32)
    init_score(head, torch.Generator().manual_seed(seed))
    model.score = head.to(old.weight.device)
    return model
