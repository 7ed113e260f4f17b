"""Scalar heads: what turns a decoder's hidden states into one number a token (rewards, values)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from ..errors import UserError
from .auto import open_config, open_model


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


def _decoder_name(speaker: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """Under which name the causal model holds its decoder: an adapter's tensors are named by it.

    Where the class says the name that another class of its family uses (Llama 4), it is that of its one inner model.
    """
    with torch.device("meta"):
        parts = dict(speaker(config).named_children())
    named = [speaker.base_model_prefix] if speaker.base_model_prefix in parts else []
    inner = [name for name, part in parts.items() if isinstance(part, PreTrainedModel)]
    return (named or inner)[0]


class _GeneralClassifier(GenericForSequenceClassification):
    """transformers' general head, over decoders too whose output lacks fields that it hands on (state-space models)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        getattr(self, self.base_model_prefix).register_forward_hook(_with_all_fields)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not in transformers' sense: all its parts are transformers' own. In a model of somebody else's, buffers that
        a decoder fills for its layers (Falcon-H1's multipliers) would stay what the memory held."""
        return False


def _with_all_fields(_module: nn.Module, _inputs: object, output: Any) -> Any:
    for name in ("past_key_values", "hidden_states", "attentions"):
        if not hasattr(output, name):
            setattr(output, name, None)
    return output


def add_classifier(folder: Path) -> None:
    """Teach `AutoModelForSequenceClassification` the base's architecture, where transformers has no classifier for it:
    its decoder under transformers' general head, `score` on the last token. Plain PEFT then loads a reward adapter of
    such a base as of any other (in a process that has called this).
    """
    config = open_config(folder)
    kind = type(config)
    known: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if kind in known or kind not in causal:
        return
    speaker = causal[kind]
    family = next(each for each in speaker.__mro__[1:] if each.__name__.endswith("PreTrainedModel"))
    if family is PreTrainedModel:
        return
    name = speaker.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    made = type(
        name,
        (_GeneralClassifier, family),
        {"base_model_prefix": _decoder_name(speaker, config), "config_class": kind, "__module__": __name__},
    )
    # without `exist_ok` transformers passes over its own configs; there is nothing yet that this could replace
    AutoModelForSequenceClassification.register(kind, made, exist_ok=True)


def load_classifier(folder: Path, spec: str, seed: int, options: dict[str, Any]) -> PreTrainedModel:
    """The sequence classifier of a base with one label and a fresh fp32 `score` head drawn from `seed`.

    Where transformers has no classifier for the architecture, its decoder gets transformers' general one
    (`add_classifier`).

    Args:
        spec: how the user named the base.

    Raises:
        UserError: the architecture has none, or one without a linear `score` on its decoder; or weights of the decoder
            are not all there.
    """
    add_classifier(folder)
    known: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if (kind := type(open_config(folder))) not in known:
        problem = f"no reward model can be made of it ({kind.__name__} has no classifier)"
        raise UserError("model.base", problem, "use a decoder")
    fresh = ("score.weight", "score.bias")
    model = open_model(AutoModelForSequenceClassification, folder, spec=spec, fresh=fresh, num_labels=1, **options)
    old = getattr(model, "score", None)
    if not isinstance(old, nn.Linear):
        raise UserError("model.base", f"{type(model).__name__} has no linear `score` head", "use a decoder")
    head = Fp32Linear(old.in_features, 1, bias=False, dtype=torch.float32)
    init_score(head, torch.Generator().manual_seed(seed))
    model.score = head.to(old.weight.device)
    return model
