"""A source of scores that reads texts and columns, asked as a judge: samples are scored as in training."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...stages.scorers.replies import Replies, TextScorer
from ..samples import Sample


@dataclass(frozen=True)
class TextJudge:
    """The scores of a `TextScorer`."""

    name: str
    scorer: TextScorer

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return self.scorer(replies_of(samples))


def replies_of(samples: Sequence[Sample]) -> Replies:
    """Samples as a source of scores reads them; a column that a row lacks is None there."""
    names = dict.fromkeys(name for sample in samples for name in sample.prompt.columns)
    return Replies(
        prompts=[sample.prompt.messages for sample in samples],
        texts=[sample.completion for sample in samples],
        columns={name: [sample.prompt.columns.get(name) for sample in samples] for name in names},
        prompt_ids=[sample.prompt.ids for sample in samples],
        reply_ids=[sample.tokens for sample in samples],
        rows=[sample.prompt_index for sample in samples],
    )
