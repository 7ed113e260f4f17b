"""A reward adapter as a judge: `{kind: reward, stage: NAME}`, or `{kind: reward, adapter: FOLDER}`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ...errors import UserError
from ...files import ADAPTER_CONFIG
from ...models.adapters import AdapterSet, module_name
from ...models.fingerprints import content
from ..reward_scores import shared_scores
from ..samples import Sample
from ..spec import check_adapter
from .judge import Judge, JudgePlan
from .kinds import Entry
from .names import judge_name


@dataclass(frozen=True)
class RewardJudge:
    """The raw score of a reward stage's adapter, read at the reply's last token (the EOS where it was reached).

    Attributes:
        role: the reward adapter's name in `adapters`; its score head lies beside it.
    """

    name: str
    adapters: AdapterSet
    role: str
    pad_token_id: int
    shares_rows: ClassVar[bool] = True

    def score(self, samples: Sequence[Sample]) -> list[float]:
        rows = [[*sample.prompt.ids, *sample.tokens] for sample in samples]
        return shared_scores(f"eval {self.name}: replies", self.adapters, self.role, rows, self.pad_token_id)


def plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    """Checks the recipe's entry: `stage`, a reward stage of the run, or `adapter`, a folder.

    Raises:
        UserError: both or neither of them; on opening, no adapter, one of another base, one without a score head.
    """
    if ("adapter" in entry) == ("stage" in entry):
        raise UserError(where, "a reward judge needs a stage or an adapter folder, not both", "write stage: reward")
    if "adapter" in entry:
        folder = Path(entry["adapter"]).expanduser()
        if not (folder / ADAPTER_CONFIG).is_file():
            raise UserError(f"{where}.adapter", f"{str(folder)!r} holds no adapter", "name a reward stage's folder")
    elif run_dir is None:
        raise UserError(where, f"stage {entry['stage']!r} without a run folder", "give adapter: DIR")
    else:
        folder = run_dir / entry["stage"]
    name = judge_name(entry)

    def open_judge(adapters: AdapterSet, tokenizer: PreTrainedTokenizerBase) -> Judge:
        check_adapter(folder, adapters.base, tokenizer)
        role = f"judge_{module_name(name)}"
        adapters.load(role, folder)
        if role not in adapters.heads:
            raise UserError(where, f"{folder} has no score head", "name a stage of kind reward")
        pad = tokenizer.pad_token_id
        assert isinstance(pad, int)  # loading a base sets one
        return RewardJudge(name, adapters, role, pad)

    return JudgePlan(name, open_judge)


def key_parts(entry: Entry, run_dir: Path) -> dict[str, str | None]:
    """The adapter of a folder; a stage of the run has a key of its own."""
    del run_dir
    named = entry.get("adapter")
    return {f"files of {named}": content(Path(named))} if isinstance(named, str) else {}
