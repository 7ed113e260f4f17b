"""A reward stage's adapter, loaded as it lies there, on its pairs and on the demonstrations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from transformers import PreTrainedTokenizerBase

from ...data.encode import IGNORED, encode_demos, encode_pairs
from ...data.rows import Row
from ...data.split import split_rows
from ...models.adapters import module_name
from ...progress import meter
from ...stages.reward import REFERENCE_RESPONSES
from ..reward_scores import reward_scores
from ..samples import EncodedPrompt, generate_samples
from ..statistics.intervals import bootstrap_interval
from ..statistics.pair_ordering import pair_metrics
from ..workbench import Workbench
from .finding import Finding
from .records import Record
from .reward_model_checks import check_accuracy, check_length, check_reload, check_reload_mean, check_sft_reward

MAX_PAIRS = 200
"""Pairs scored at most: the accuracy's interval is then within 7 points."""
MIN_REPLIES = 10
"""Fewer say nothing about a correlation or a difference of means."""
MAX_DEMOS = 500
"""Demonstrations read at most for their lengths."""


@dataclass(frozen=True)
class Demos:
    """Demonstrations of one reply: prompts and replies as token ids, each reply's EOS included."""

    prompts: list[list[int]]
    replies: list[list[int]]

    def share_within(self, tokens: int) -> float | None:
        """Share of the replies that end within so many tokens; None for no replies."""
        return float(np.mean([len(reply) <= tokens for reply in self.replies])) if self.replies else None


def read_demos(record: Record, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Demos:
    """The first demonstrations of an SFT stage that have one reply, whole.

    Args:
        rows: the stage's; none give no demonstrations.
    """
    prompts: list[list[int]] = []
    replies: list[list[int]] = []
    if not rows:
        return Demos(prompts, replies)
    dataset, _ = encode_demos(rows[:MAX_DEMOS], tokenizer, record.data())
    for ids, labels in zip(dataset["input_ids"], dataset["labels"], strict=True):
        start = next(place for place, label in enumerate(labels) if label != IGNORED)
        # several turns, or a reply that was cut
        if labels[start:] == ids[start:] and ids[-1] == getattr(tokenizer, "eos_token_id", None):
            prompts.append(list(ids[:start]))
            replies.append(list(ids[start:]))
    return Demos(prompts, replies)


def score_findings(
    bench: Workbench, record: Record, rows: list[Row], unchanged: bool, left_out: list[str]
) -> Iterator[Finding]:
    """What the scores of pairs tell.

    Args:
        bench: the adapter is loaded into it under the stage's role.
        rows: the stage's pairs.
        unchanged: they are those that it was trained on, so that what it logged can be compared.
    """
    name, spec = record.name, record.data()
    held = spec.held_out > 0
    if held:
        rows = split_rows(rows, spec.held_out, spec.seed)[1]
    dataset, _ = encode_pairs(rows, bench.tokenizer, spec)
    n, total = min(len(dataset), MAX_PAIRS), len(dataset)
    prompts, chosen, rejected = (list(dataset[key][:n]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    scores = _score(bench, record, [*prompts, *prompts], [*chosen, *rejected])
    good, bad = scores[:n].tolist(), scores[n:].tolist()
    if not np.isfinite(scores).all():
        left_out.append(f"{name}, accuracy and length: a score is not finite")
        return
    lengths = [len(reply) for reply in (*chosen, *rejected)]
    sides = [tuple(prompt) for prompt in prompts]
    found = pair_metrics(good, bad, lengths[:n], lengths[n:], prompts=sides, seed=bench.spec.seed)
    interval = (found["ci_low"], found["ci_high"])
    yield check_accuracy(name, found["accuracy"], interval, n, longer_wins=found["longer_wins"], held_out=held)
    if (correlation := _length_correlation(scores, lengths, bench.spec.seed)) is None:
        left_out.append(f"{name}, reward length: fewer than {MIN_REPLIES} pairs, or all scores or lengths are equal")
    else:
        yield check_length(name, *correlation, 2 * n)
    if not unchanged:
        left_out.append(f"{name}, score reload: its pairs have changed since")
        return
    logged = record.metrics.get("held_out_accuracy")
    if isinstance(logged, int | float):
        yield check_reload(name, logged, found["accuracy"], interval, n=n, all_=n == total)
    else:
        left_out.append(f"{name}, score reload, accuracy: none was logged (data.held_out is 0)")
    assert record.lineage is not None
    if record.lineage.reward is not None:
        first = good[:REFERENCE_RESPONSES]
        yield check_reload_mean(name, record.lineage.reward, float(np.mean(first)), len(first))


def sft_findings(
    bench: Workbench, record: Record, sft: str, demos: Demos, samples: int, left_out: list[str]
) -> Iterator[Finding]:
    """The reward of an SFT policy's samples against that of the demonstrations' replies, on the same prompts.

    Args:
        record: of the reward stage. sft: the policy's name.
        samples: prompts at most.
    """
    budget = bench.spec.max_new_tokens
    # what a policy has no room to say cannot be compared
    fitting = [place for place, reply in enumerate(demos.replies) if len(reply) <= budget][:samples]
    if len(fitting) < MIN_REPLIES:
        left_out.append(
            f"{record.name}, reward of SFT samples: {len(fitting)} demonstrations end within {budget} tokens, "
            f"fewer than {MIN_REPLIES}"
        )
        return
    prompts = [demos.prompts[place] for place in fitting]
    with meter(f"doctor {sft}: samples on its demonstrations", len(prompts)) as done:
        replies = generate_samples(
            bench.adapters,
            bench.roles[sft],
            sft,
            [EncodedPrompt([], prompt) for prompt in prompts],
            bench.tokenizer,
            max_new_tokens=budget,
            temperature=bench.spec.temperature,
            seed=bench.spec.seed,
            batch_size=bench.spec.batch_size,
            beams=bench.spec.beams,
            on_batch=done,
        )
    shown = _score(bench, record, prompts, [demos.replies[place] for place in fitting])
    said = _score(bench, record, prompts, [reply.tokens for reply in replies])
    spread = float(shown.std())
    if not spread > 0:
        left_out.append(f"{record.name}, reward of SFT samples: all demonstrations have one score")
        return
    gaps = ((said - shown) / spread).tolist()
    interval = bootstrap_interval(gaps, seed=bench.spec.seed)
    yield check_sft_reward(record.name, float(np.mean(gaps)), interval, len(gaps), policy=sft)


def reward_role(name: str) -> str:
    """The adapter's name in the workbench."""
    return f"reward_{module_name(name)}"


def _score(
    bench: Workbench, record: Record, prompts: Sequence[list[int]], replies: Sequence[Sequence[int]]
) -> np.ndarray:
    """[N] raw scores, in order."""
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    with meter(f"doctor {record.name}: scores", len(rows)) as done:
        pad = bench.tokenizer.pad_token_id
        return np.asarray(reward_scores(bench.adapters, reward_role(record.name), rows, pad, on_batch=done))


def _length_correlation(
    scores: np.ndarray, lengths: Sequence[int], seed: int
) -> tuple[float, tuple[float, float]] | None:
    """Spearman's correlation of score and length with its interval; None where there is none.

    Chosen and rejected replies (the first and the second half) are ranked apart: a good reward follows length where
    people prefer longer replies, and that is no fault. The correlation is the mean product of standardised ranks.
    """
    half = len(scores) // 2
    products: list[float] = []
    for part in (slice(0, half), slice(half, None)):
        if half < MIN_REPLIES or np.ptp(scores[part]) == 0 or np.ptp(lengths[part]) == 0:
            return None
        a, b = (np.asarray(stats.zscore(stats.rankdata(values[part]))) for values in (scores, lengths))
        products += (a * b).tolist()
    return float(np.mean(products)), bootstrap_interval(products, seed=seed)
