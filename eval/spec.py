"""What an evaluation is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

from ..data.spec import DataSpec
from ..errors import UserError
from ..files import ADAPTER_CONFIG, LINEAGE
from ..models.base import Base
from ..models.lineage import check_lineage
from ..models.loading import Quantization
from ..stages.job import Trackers
from ..stages.serving.settings import PlaceSettings
from .decoding import beam_problem, server_problem

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Something that orders pairs: a reward stage, or a DPO, IPO or KTO policy by its implicit reward.

    Attributes:
        stage: its name in the recipe.
        kind: "reward" or "implicit".
        folder: of its adapter.
        data: the pairs; with `held_out` only the part that training left out is measured.
        parent: of an implicit one, the adapter that its stage started from, which is its reference; None: the base.
    """

    stage: str
    kind: Literal["reward", "implicit"]
    folder: Path
    data: DataSpec
    parent: Path | None = None


@dataclass(frozen=True, kw_only=True)
class OverOptimisation:
    """Proxy and gold judge along a PPO run, and with best of n (see `overoptimisation.py`).

    Attributes:
        gold, proxy: names of judges that score.
        stage: the PPO stage's name.
        folder: its folder, with the policies that it kept on the way.
        start: the adapter that it started from; None: the base.
        best_of: replies per prompt drawn from the start.
        prompts: at most so many of the evaluation's.
    """

    gold: str
    proxy: str
    stage: str
    folder: Path
    start: Path | None
    best_of: int = 16
    prompts: int = 50


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """Tasks of lm-eval, by its own names for them (see `harness/`).

    Attributes:
        tasks: names of tasks, groups or tags, or YAML files.
        limit: documents of each task; None: all.
        num_fewshot: examples before each question, where the task does not say that it has none; None: the task's own.
        include_path: a folder of further tasks.
        apply_chat_template: ask as in a chat.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """One evaluation.

    Attributes:
        base: the base under all policies.
        dtype: of the base, a torch name such as bfloat16.
        quantization: None, 4bit or 8bit.
        policies: name -> adapter folder, None for the base itself.
        reference: the policy that the others are compared with (win-rate and KL); `base` need not be listed.
        prompts: where the evaluation prompts come from.
        folders: where paths in `prompts` are looked up.
        judges: mappings as in the recipe (see `judges/registry.py`).
        max_new_tokens, temperature, seed, batch_size: of the sampling, alike for every policy.
        beams: width of a beam search instead of sampling, as transformers' `num_beams`; 1: no search.
        kl: measure KL(policy || reference); needs a temperature above 0.
        output_dir: the run folder, used where `run_eval` is given none.
        chat_template: a template instead of the tokenizer's own. template_date: the day that it writes.
        packed: forwards run without padding and repeated prefixes.
        reward_models: measured beside the policies where they are finished and have pairs that training left out.
        over_optimisation, benchmarks: measured besides where they are given.
        seed_groups: policies that differ in their seeds alone, whose results are put together.
        trackers: who is told of the results.
        rollout: a server that draws the replies; None: they are drawn here.
    """

    base: Base
    policies: Mapping[str, Path | None]
    reference: str
    prompts: DataSpec
    folders: tuple[Path, ...] = ()
    judges: tuple[dict[str, Any], ...] = ()
    dtype: str = "float32"
    quantization: Quantization | None = None
    max_new_tokens: int = 48
    temperature: float = 0.7
    seed: int = 0
    kl: bool = True
    batch_size: int = 32
    beams: int = 1
    output_dir: Path | None = None
    chat_template: str | None = None
    template_date: date | None = None
    packed: bool = True
    reward_models: tuple[RewardModel, ...] = ()
    over_optimisation: OverOptimisation | None = None
    benchmarks: Benchmarks | None = None
    seed_groups: tuple[tuple[str, ...], ...] = ()
    trackers: Trackers = field(default_factory=Trackers)
    rollout: PlaceSettings | None = None

    def __post_init__(self) -> None:
        if self.reference not in self.policies and self.reference != BASE:
            raise UserError(
                "eval.reference",
                f"{self.reference!r} is not among the policies ({', '.join(self.policies)})",
                "add it to eval.policies",
            )
        if self.temperature < 0:
            raise UserError("eval.temperature", f"is {self.temperature}, expected 0 or more", "write 0.7, say")
        for name in ("max_new_tokens", "batch_size", "beams"):
            if getattr(self, name) < 1:
                raise UserError(f"eval.{name}", f"is {getattr(self, name)}, expected 1 or more", "raise it")
        asks_for_curve = self.over_optimisation is not None
        found = beam_problem(self.beams, temperature=self.temperature, kl=self.kl, over_optimisation=asks_for_curve)
        if found is not None:
            raise UserError("eval.beams", *found)
        if self.rollout is not None and (found := server_problem(self.beams, self.quantization)) is not None:
            raise UserError("eval.rollout", *found)
        if self.kl and self.temperature == 0:
            raise UserError(
                "eval.kl", "greedy decoding (temperature 0) has no KL", "set eval.kl to false or a temperature above 0"
            )
        if self.over_optimisation is not None and self.temperature == 0:
            said = "greedy decoding (temperature 0) has no KL and one reply per prompt"
            raise UserError("eval.over_optimisation", said, "set eval.temperature above 0, or leave the section out")

    def all_policies(self) -> dict[str, Path | None]:
        """The policies in their order, the base added in front where it is an unlisted reference."""
        listed = dict(self.policies)
        return listed if self.reference in listed else {self.reference: None, **listed}


def check_adapter(folder: Path, base: Base, tokenizer: Any) -> None:
    """Raises UserError where the folder holds no adapter, or one whose lineage names another base or tokenizer."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(str(folder), "holds no adapter", "train that stage first, or correct its name")
    if (folder / LINEAGE).is_file():
        check_lineage(folder, base, tokenizer)
