"""A judge that is a model of its own: `{kind: model, model: FOLDER_OR_HUB_ID}`.

Any sequence-classification model with one output. It reads the conversation in its own chat template, as it does when
it rewards PPO: both are `stages.ppo.rewards.ModelScorer`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ...errors import UserError
from ...models.adapters import AdapterSet
from ...models.fingerprints import folder_sha256
from ...stages.ppo.rewards import ModelScorer, RewardSource
from ...stages.reward_models import check_reward_model
from ..samples import Sample
from ..shared import shared_rows
from .judge import Judge, JudgePlan
from .kinds import Entry
from .names import judge_name


@dataclass(frozen=True)
class ModelJudge:
    """The raw output of another model on the whole conversation; its unit is that model's own."""

    name: str
    scorer: ModelScorer
    shares_rows: ClassVar[bool] = True

    def score(self, samples: Sequence[Sample]) -> list[float]:
        prompts, replies = [sample.prompt.messages for sample in samples], [sample.completion for sample in samples]

        def score(places: Sequence[int], done: Callable[[int], None]) -> list[float]:
            some = [prompts[place] for place in places], [replies[place] for place in places]
            return self.scorer.scores(*some, done).tolist()

        batches = self.scorer.batches(prompts, replies)
        return shared_rows(f"eval {self.name}: replies", len(samples), score, batches)


def plan(entry: dict[str, Any], where: str, run_dir: Path | None) -> JudgePlan:
    """Checks the recipe's entry; the model is loaded when the judge is opened, onto the base's device.

    Args:
        entry: `model`; optional `name` (default: the model as written) and `batch_size` (replies per forward).
        run_dir: where a folder is looked up before it is looked up from here.

    Raises:
        UserError: no model, a folder that is not there; on opening, one that cannot be loaded or has several outputs.
    """
    named = entry.get("model")
    if not isinstance(named, str) or not named:
        raise UserError(f"{where}.model", f"is {named!r}, expected a folder or a hub id", "write model: FOLDER")
    batch_size = entry.get("batch_size")
    wrong = isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
    if batch_size is not None and wrong:
        raise UserError(f"{where}.batch_size", f"is {batch_size!r}, expected 1 or more", "leave it out")
    target = _folder_or_hub_id(named, where, run_dir)
    name = judge_name(entry)

    def open_judge(adapters: AdapterSet, tokenizer: PreTrainedTokenizerBase) -> Judge:
        del tokenizer
        device = next(adapters.model.parameters()).device
        try:
            scorer = ModelScorer(RewardSource("model", target), device, batch_size, where)
        except (OSError, ValueError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            remedy = "name the folder or hub id of a sequence-classification model"
            raise UserError(f"{where}.model", f"{named!r} cannot be loaded ({said})", remedy) from error
        return ModelJudge(name, scorer)

    return JudgePlan(name, open_judge, lambda: check_reward_model(target, f"{where}.model"))


def key_parts(entry: Entry, run_dir: Path) -> dict[str, str | None]:
    """A folder's files; a hub id says by itself which model it is."""
    named = entry.get("model")
    folder = _model_folder(named, run_dir) if isinstance(named, str) else None
    return {} if folder is None else {f"files of {named}": folder_sha256(folder)}


def _model_folder(named: str, run_dir: Path | None) -> Path | None:
    """The folder that a judge's `model` names, looked up from the run folder, then from here; None: there is none."""
    given = Path(named).expanduser()
    places = [folder / given for folder in (run_dir, Path()) if folder is not None]
    return next((place.resolve() for place in places if place.is_dir()), None)


def _folder_or_hub_id(named: str, where: str, run_dir: Path | None) -> str:
    """The folder's absolute path, or the name itself where it can be a hub id."""
    found = _model_folder(named, run_dir)
    if found is not None:
        return str(found)
    # A hub id is NAME or OWNER/NAME; everything else can only have meant a folder.
    if Path(named).expanduser().is_absolute() or named.startswith((".", "~")) or named.count("/") > 1:
        raise UserError(f"{where}.model", f"no folder {named!r}", "correct the path")
    return named
