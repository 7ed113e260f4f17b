"""Reward models on pairs: those of reward stages, and the implicit ones of DPO, IPO and KTO policies.

A policy pi that was trained from a reference ref holds a reward of its own, beta * (log pi(y|x) - log ref(y|x)), up to
a term of the prompt alone that a margin does not see (Rafailov et al., arXiv 2305.18290, eq. 5 and section 5.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.encode import IGNORED, encode_pairs
from ..data.load import load_rows
from ..data.spec import DataSpec
from ..data.split import held_out_rows
from ..errors import UserError
from ..files import LINEAGE
from ..models.batching import forward_tokens, token_batches
from ..models.lineage import Lineage, adapter_sha256, read_lineage
from ..progress import say
from ..stages.kinds import DPO
from ..values import plain
from .perplexity import sequence_nlls
from .reward_scores import shared_scores
from .shared import shared_rows
from .spec import RewardModel
from .statistics.pair_ordering import pair_metrics
from .workbench import Workbench


@dataclass(frozen=True)
class Pairs:
    """Preference pairs as token ids, each [N]; the replies without their prompt, EOS included."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]

    def replies(self) -> list[list[int]]:
        """[2 N]: all chosen ones, then all rejected ones."""
        return [*self.chosen, *self.rejected]


def read_pairs(bench: Workbench, data: DataSpec) -> Pairs:
    """The pairs of a data entry, with `held_out` only those that training on it left out."""
    rows = held_out_rows(load_rows(data, "pair", bench.spec.folders).rows, data)
    dataset, _ = encode_pairs(rows, bench.tokenizer, data)
    return Pairs(*([list(ids) for ids in dataset[key]] for key in ("prompt_ids", "chosen_ids", "rejected_ids")))


def measure_reward_models(
    bench: Workbench, models: Sequence[RewardModel], *, skip: bool = False
) -> list[dict[str, Any]]:
    """Metrics of each reward model on its pairs.

    Args:
        skip: one that cannot be measured is named in the log and left out, instead of an error.

    Returns:
        One row per model: stage, kind, beta (implicit ones), the keys of `pair_metrics`, and held_out: whether only
        pairs were used that the stage's training left out.

    Raises:
        UserError: a folder without an adapter or of another base, data without pairs, a reference that is not what
            the stage started from.
    """
    read: dict[str, Pairs] = {}
    rows = []
    for model in models:
        try:
            rows.append(_measure(bench, model, read))
        except UserError as error:
            if not skip:
                raise
            say(f"eval {model.stage}: its reward is left out: {error}")
    return rows


def measured_in_evaluation(bench: Workbench) -> list[dict[str, Any]]:
    """The rows of rewards.json: the spec's reward models, on pairs that their training left out, or not at all."""
    rows = measure_reward_models(bench, bench.spec.reward_models, skip=True)
    for row in rows:
        if not row["held_out"]:
            say(f"eval {row['stage']}: its reward is left out: it was trained with another data.held_out or seed")
    return [row for row in rows if row["held_out"]]


def _measure(bench: Workbench, model: RewardModel, read: dict[str, Pairs]) -> dict[str, Any]:
    """One row; `read` keeps the pairs of each data entry."""
    role = bench.load(model.folder)
    lineage = read_lineage(model.folder) if (model.folder / LINEAGE).is_file() else None
    known = repr(model.data)
    pairs = read[known] = read[known] if known in read else read_pairs(bench, model.data)
    beta: dict[str, float] = {}
    if model.kind == "reward":
        if role not in bench.adapters.heads:
            raise UserError(str(model.folder), "holds no score head", "name a stage of kind reward")
        scores = _scores(bench, model, role, pairs)
    else:
        config = _checked(model, lineage).config
        beta["beta"] = float(_setting(config, "beta", DPO.parameter("beta").default))
        reference = bench.load(model.parent)
        ratios = log_ratios(bench, role, reference, pairs, label=model.stage, ld_alpha=_setting(config, "ld_alpha"))
        scores = [beta["beta"] * ratio for ratio in ratios]
    if not np.isfinite(scores).all():
        raise UserError(str(model.folder), "a score is not finite", "see `preftune doctor` for what is broken in it")
    n = len(pairs.prompts)
    lengths = [len(reply) for reply in pairs.replies()]
    metrics = pair_metrics(
        scores[:n],
        scores[n:],
        lengths[:n],
        lengths[n:],
        prompts=[tuple(prompt) for prompt in pairs.prompts],
        seed=bench.spec.seed,
    )
    held_out = lineage is not None and left_out(model.data, lineage)
    return plain({"stage": model.stage, "kind": model.kind, **beta, **metrics, "held_out": held_out})


def _scores(bench: Workbench, model: RewardModel, role: str | None, pairs: Pairs) -> list[float]:
    """[2 N] raw scores of a reward stage's adapter."""
    assert role is not None
    rows = [[*prompt, *reply] for prompt, reply in zip(pairs.prompts * 2, pairs.replies(), strict=True)]
    return shared_scores(f"eval {model.stage}: pairs", bench.adapters, role, rows, bench.tokenizer.pad_token_id)


def log_ratios(
    bench: Workbench,
    policy: str | None,
    reference: str | None,
    pairs: Pairs,
    *,
    label: str,
    ld_alpha: float | None = None,
) -> list[float]:
    """[2 N] log pi(y|x) - log ref(y|x) of all chosen replies, then of all rejected ones, in nats.

    Summed over a reply's tokens, its EOS included, as DPO and KTO train them. (IPO's loss divides by the length; the
    reward that TRL logs for it is the sum as well.)

    Args:
        policy, reference: adapter names; None is the base.
        label: the policy's name, for the progress.
        ld_alpha: weight of the tokens beyond the shorter reply's length, where the stage trained with one
            (LD-DPO, arXiv 2409.06411).
    """
    whole = _summed(bench, policy, reference, pairs, [len(reply) for reply in pairs.replies()], label)
    if ld_alpha is None:
        return whole
    shorter = [min(len(good), len(bad)) for good, bad in zip(pairs.chosen, pairs.rejected, strict=True)]
    shared = _summed(bench, policy, reference, pairs, shorter * 2, label)
    return [ld_alpha * all_ + (1 - ld_alpha) * part for all_, part in zip(whole, shared, strict=True)]


def _summed(
    bench: Workbench, policy: str | None, reference: str | None, pairs: Pairs, counts: Sequence[int], label: str
) -> list[float]:
    """[2 N] the log-ratio of each reply's first `counts` tokens."""
    rows, labels = [], []
    for prompt, reply, count in zip(pairs.prompts * 2, pairs.replies(), counts, strict=True):
        rows.append([*prompt, *reply])
        labels.append([IGNORED] * len(prompt) + reply[:count] + [IGNORED] * (len(reply) - count))
    ours, theirs = (
        _nlls(bench, role, rows, labels, name) for role, name in ((policy, label), (reference, f"{label}'s reference"))
    )
    return [their - our for our, their in zip(ours, theirs, strict=True)]


def _nlls(
    bench: Workbench, role: str | None, rows: Sequence[list[int]], labels: Sequence[list[int]], name: str
) -> list[float]:
    pad = bench.tokenizer.pad_token_id

    def measure(places: Sequence[int], done: Callable[[int], None]) -> list[float]:
        some = [rows[place] for place in places], [labels[place] for place in places]
        return sequence_nlls(bench.adapters, role, *some, pad_token_id=pad, on_batch=done)

    batches = token_batches([len(row) for row in rows], forward_tokens(bench.adapters.backbone))
    return shared_rows(f"eval {name}: pairs", len(rows), measure, batches)


def left_out(data: DataSpec, lineage: Lineage) -> bool:
    """Whether the held-out part of `data` surely has no prompt that the stage trained on.

    A prompt's side hangs on its text and the seed alone (see `split_rows`), whatever file it was read from.
    """
    trained = lineage.data.get("spec", {})
    alike = all(trained.get(key) == getattr(data, key) for key in ("seed", "system"))
    return 0 < data.held_out <= float(trained.get("held_out") or 0) and alike


def _checked(model: RewardModel, lineage: Lineage | None) -> Lineage:
    """The lineage of a policy with an implicit reward, whose reference must be what it started from."""
    if lineage is None:
        raise UserError(str(model.folder), f"holds no {LINEAGE}, so its beta is unknown", "give a finished stage")
    ours = [] if model.parent is None else [adapter_sha256(model.parent)]
    if [parent["sha256"] for parent in lineage.parents] != ours:
        said = "the base" if model.parent is None else f"what lies in {model.parent} now"
        raise UserError(
            str(model.folder), f"did not start from {said}, so its reference is not at hand", "train it again"
        )
    return lineage


def _setting(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """A method's setting as the stage used it; what a config's default says is not written down."""
    for part in ("method", "train"):
        if (value := (config.get(part) or {}).get(key)) is not None:
            return value
    return default
