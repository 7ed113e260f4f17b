"""The recipe: every key that a YAML file may hold, with its type and default."""

import functools
from collections.abc import Generator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, PrivateAttr, create_model
from pydantic_core import PydanticCustomError

from ..data.spec import RowKind
from ..errors import Summary, UserError, UserErrors
from ..models.added_tokens import spec_with
from ..stages.kinds import StageKind, stage_kind
from ..stages.scorers.kinds import entry_kind, reward_name
from ..stages.serving.settings import PLACE_GROUP, EngineName, PlaceSettings
from ..values import is_number

BASE = "base"
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Precision = Literal["float32", "bfloat16", "float16"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What numpy, torch and transformers all take."""


class Part(BaseModel):
    """What all parts of a recipe obey: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)


class Model(Part):
    """The frozen base. `base`: a hub id, a folder, a .gguf file, pypi:DIST==VERSION or random:NAME.

    `dtype: auto` is bfloat16 where the device computes in it, else float32; a run keeps that of its first start.
    `packed: false` runs padded rows as they are, without leaving out padding and repeated prefixes. `template_date`:
    the day that a chat template writes which writes today's; a run keeps the day of its first start. `add_tokens`: new
    special tokens, whose rows of the embedding and of the output head train in every stage.
    """

    base: str
    revision: str | None = None
    dtype: Literal["auto", Precision] = "auto"
    quantization: Literal["4bit", "8bit"] | None = None
    chat_template: str | None = None
    template_date: date | None = None
    packed: bool = True
    add_tokens: list[str] = Field(default_factory=list)


Names = Annotated[list[str], Field(min_length=1)]
Layer = Annotated[int, Field(ge=0)]
Layers = Annotated[list[Layer], Field(min_length=1)]
Alpha = Annotated[float, Field(gt=0)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


def _one(value: object) -> object:
    """A number is a list of one."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


class Lora(Part):
    """The adapter that trains. Keys have PEFT's names, but for `alpha` and `dropout`."""

    r: Positive = 16
    alpha: float = Field(default=32, gt=0)
    dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | str | Names = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    exclude_modules: str | Names | None = None
    layers_to_transform: Annotated[Layers | None, BeforeValidator(_one)] = None
    layers_pattern: str | Names | None = None
    target_parameters: list[str] = Field(default_factory=list)
    trainable_token_indices: TokenIds | dict[str, TokenIds] | None = None


class LoraChange(Part):
    """What a stage says differently of its adapter."""

    r: Positive | None = None
    alpha: float | None = Field(default=None, gt=0)
    dropout: Fraction | None = None
    target_modules: Literal["all-linear"] | str | Names | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    init_lora_weights: bool | str | None = None
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    exclude_modules: str | Names | None = None
    layers_to_transform: Annotated[Layers | None, BeforeValidator(_one)] = None
    layers_pattern: str | Names | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: TokenIds | dict[str, TokenIds] | None = None


class Source(Part):
    """One file, folder or hub dataset of a mixture. `columns` maps our names to the file's."""

    path: str
    weight: float = Field(default=1.0, gt=0)
    split: str | None = None
    columns: dict[str, str] | None = None
    limit: Positive | None = None
    name: str | None = None
    revision: str | None = None
    streaming: bool = False


class OnProblem(Part):
    """What becomes of rows with something wrong, by the kind of problem (see `data/spec.py`); every one is counted."""

    malformed: Literal["error", "drop"] | None = None
    template: Literal["error", "drop"] | None = None
    unusable: Literal["drop", "error"] | None = None
    repeated: Literal["keep", "drop", "error"] | None = None


class Data(Part):
    """A data entry: one `path`, the rows of a `stage` that samples, or several `sources`; lengths in tokens."""

    path: str | None = None
    stage: str | None = None
    sources: list[Source] | None = None
    split: str | None = None
    columns: dict[str, str] | None = None
    name: str | None = None
    revision: str | None = None
    streaming: bool = False
    limit: Positive | None = None
    max_prompt_length: Positive | None = None
    max_length: Positive | None = 1024
    overflow: Literal["drop", "truncate", "error"] = "drop"
    on_problem: OnProblem = Field(default_factory=OnProblem)
    held_out: Fraction = 0.0
    system: str | None = None
    seed: Seed | None = None


class Imported(str):
    """`from: {adapter: PATH}`: the folder of an adapter from outside the run, of a stage or of plain PEFT."""


def _as_parent(value: object) -> object:
    """A stage's name, `base`, or the folder of an adapter."""
    if isinstance(value, dict) and list(value) == ["adapter"] and isinstance(value["adapter"], str):
        return Imported(value["adapter"])
    if not isinstance(value, str):
        wanted = {"wanted": "a stage's name, base, or {adapter: PATH}"}
        raise PydanticCustomError("parent", "{wanted}", wanted)
    return value


def _as_rule(value: object) -> object:
    """What becomes of a reply without a score."""
    if not (value is None or value in ("stop", "skip") or is_number(value)):
        raise PydanticCustomError("rule", "{wanted}", {"wanted": "stop, skip or a number"})
    return value


class Reward(Part):
    """One source of scores, with its weight in the sum: a `kind` with its fields, as a judge has them
    (`stages/scorers/kinds.py`). `stage`, `model` and `function` alone say their kind by themselves.

    `on_failure`: what becomes of a reply that it fails to score: the stage stops, the source is left out for that
    reply, or the reply gets that number from it.
    """

    model_config = ConfigDict(extra="allow")

    kind: str | None = None
    name: str | None = None
    stage: str | None = None
    model: str | None = None
    function: str | None = None
    weight: float = 1.0
    on_failure: Annotated[Literal["stop", "skip"] | float | None, BeforeValidator(_as_rule)] = None

    def entry(self) -> dict[str, Any]:
        """What it says of its source, as of a judge."""
        return self.model_dump(exclude={"weight", "on_failure"}, exclude_none=True)

    def settings(self) -> dict[str, Any]:
        """The fields of its kind."""
        return {key: value for key, value in self.entry().items() if key not in ("kind", "name")}

    @property
    def scorer(self) -> str | None:
        """The kind that it has or implies; None where it does neither."""
        return entry_kind(self.entry())

    @property
    def called(self) -> str:
        """Its name in messages."""
        return reward_name(self.entry())


class Teacher(Part):
    """Whom a student learns from: a `stage` of the recipe, the folder of an `adapter`, or a `model`."""

    stage: str | None = None
    adapter: str | None = None
    model: str | None = None
    revision: str | None = None

    @property
    def named(self) -> str:
        """Its name in messages."""
        return str(self.stage or self.adapter or self.model)


def _as_teacher(value: object) -> object:
    """`teacher: MODEL` is `{model: MODEL}`."""
    return {"model": value} if isinstance(value, str) else value


class Stage(Part):
    """What every stage has; `stage_model` adds what its kind's record says.

    `train`: fields of the stage's TRL / Transformers config by their own names. `on_nonfinite`: what happens to a step
    whose loss or gradient is NaN or infinite: `stop`, or `skip(N)` for at most N steps. `seeds` and `grid` make it a
    stage for each value (`expansion.py`): a recipe that was read has none of them. `data` may be written as an entry
    of its own, `{stage: NAME}`: it is one by that stage's name once the recipe is read.
    """

    kind: str
    parent: Annotated[str, PlainValidator(_as_parent)] = Field(default=BASE, alias="from")
    data: str
    lora: LoraChange = Field(default_factory=LoraChange)
    full: bool = False
    seed: Seed | None = None
    seeds: list[Seed] | None = None
    grid: dict[str, Any] | None = None
    on_nonfinite: str | None = Field(default=None, pattern=r"^(stop|skip\([1-9]\d*\))$")
    train: dict[str, Any] = Field(default_factory=dict)

    @property
    def imports(self) -> Path | None:
        """The folder of the adapter from outside the run that it starts from; None for a stage or the base."""
        return Path(self.parent) if isinstance(self.parent, Imported) else None

    @property
    def record(self) -> StageKind:
        """The record of its kind."""
        kind = stage_kind(self.kind)
        return kind.of_all_weights() if self.full else kind

    @property
    def rewards(self) -> list[Reward]:
        """Where its scores come from: a stage's name, one source, or a list of them in the recipe."""
        return getattr(self, "reward", [])

    @property
    def taught_by(self) -> Teacher | None:
        """Whom it learns from, if it does so from anyone."""
        return getattr(self, "teacher", None)

    @property
    def rows(self) -> RowKind:
        """The kind of rows that it reads."""
        return self.record.reads(self.method())

    def method(self) -> dict[str, Any]:
        """What the recipe says beside `train`, by the names of the method's parameters (`kl.coef` is `kl_coef`)."""
        kind = self.record
        values = {each.name: getattr(self, each.name) for each in kind.alone()}
        for group, keys in kind.groups.items():
            values |= {name: getattr(getattr(self, group), key) for key, name in keys.items()}
        return {name: value for name, value in values.items() if value is not None}


def _listed(value: object) -> object:
    """`reward: name` and `reward: {stage: name}` are lists of one."""
    several = value if isinstance(value, list) else [value] if isinstance(value, dict | str) else value
    if not isinstance(several, list):
        return several
    return [{"stage": each} if isinstance(each, str) else each for each in several]


@functools.cache
def stage_model(kind: StageKind) -> type[Stage]:
    """The keys of a stage of that kind: what every stage has, its sources of scores, its method's parameters.

    A parameter that the recipe leaves out is None, whatever its default: the record says what holds then.
    """
    added: dict[str, Any] = {}
    if kind.needs_reward:
        added["reward"] = (Annotated[list[Reward], BeforeValidator(_listed)], Field(min_length=1))
    if kind.needs_teacher:
        added["teacher"] = (Annotated[Teacher, BeforeValidator(_as_teacher)], Field())
    for group, keys in kind.groups.items():
        # kinds have groups of one name with other keys
        model = create_model(
            f"{kind.name}_{group}", __base__=Part, **{key: _optional(kind, name) for key, name in keys.items()}
        )
        first = next(iter(keys))
        added[group] = (
            Annotated[model, BeforeValidator(functools.partial(_grouped, first))],
            Field(default_factory=model),
        )
    added |= {each.name: _optional(kind, each.name) for each in kind.alone()}
    return create_model(f"{kind.name}_stage", __base__=Stage, **added)


def _optional(kind: StageKind, name: str) -> Any:
    return (kind.parameter(name).type | None, None)


def _grouped(first: str, value: object) -> object:
    """`kl: 0.1` is `kl: {coef: 0.1}`."""
    return {first: value} if is_number(value) else value


def _as_stage(value: Any) -> Stage:
    if isinstance(value, Stage):
        return value
    # its errors keep their places below the stage's
    return stage_model(stage_kind(str(value["kind"]))).model_validate(value)


class OverOptimisation(Part):
    """Proxy and gold judge against KL, along PPO and with best of n. Judges by name, one of `judges` each.

    `proxy`: without one the judge that reads the reward stage PPO trains on; `policy`: the first PPO stage; `best_of`:
    replies a prompt.
    """

    gold: str
    proxy: str | None = None
    policy: str | None = None
    best_of: int = Field(default=16, ge=2)
    prompts: Positive = 50


class Benchmarks(Part):
    """Tasks of lm-eval that every policy and the base are asked, in lm-eval's own words.

    `tasks`: names of tasks, groups or tags, or YAML files; `limit`: documents of each; `num_fewshot`: examples before
    a question; `include_path`: a folder of further tasks, whose Python runs; `apply_chat_template`: ask as in a chat.
    """

    tasks: list[str] = Field(min_length=1)
    limit: Positive | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    include_path: str | None = None
    apply_chat_template: bool = False


class Rollout(Part):
    """A server that draws an evaluation's replies, as that of stages (`stages/serving/settings.py`)."""

    engine: EngineName
    url: str | None = None
    command: str | None = None
    api_key_env: str | None = None
    concurrency: Positive = 64
    timeout: Annotated[float, Field(gt=0)] = 600.0
    retries: Annotated[int, Field(ge=0)] = 4
    wait: Annotated[float, Field(ge=0)] = 600.0

    def settings(self) -> PlaceSettings:
        """The same, as it is handed on."""
        return PlaceSettings(**{name: getattr(self, key) for key, name in PLACE_GROUP.items()})


class Eval(Part):
    """Samples of every policy on the same prompts, judged against the reference; judges as in `eval/judges/`."""

    prompts: Data
    policies: list[str] = Field(default_factory=list)
    reference: str = BASE
    judges: list[dict[str, Any]] = Field(default_factory=list)
    max_new_tokens: Positive = 48
    temperature: float = Field(default=0.7, ge=0)
    seed: Seed | None = None
    kl: bool = True
    batch_size: Positive = 32
    beams: Positive | None = None
    rollout: Rollout | None = None
    over_optimisation: OverOptimisation | None = None
    benchmarks: Benchmarks | None = None


class Checkpoints(Part):
    """When a stage writes a checkpoint that it continues from if it is cut off; null: not by that measure.

    `share`: of its optimiser steps between two; `minutes`: at most so many between two.
    """

    share: float | None = Field(default=0.1, gt=0, le=1)
    minutes: float | None = Field(default=5, gt=0)


def _several(value: object) -> object:
    """`trackers: wandb` is a list of one."""
    return [value] if isinstance(value, str) else value


class Recipe(Part):
    """A whole chain. Stages form a graph by `from`, `reward` and `teacher`; their order in the file means nothing.

    `deterministic`: a GPU's kernels give the same bits every time, at a price in speed; a CPU's do anyway. `trackers`:
    who is told of every stage that names nobody else in `report_to`, and of the evaluation. `expanded`: the stages that
    seeds and grids made of one.
    """

    name: str = Field(pattern=r"^[\w][\w.-]*$")
    seed: Seed = 0
    seeds: list[Seed] | None = None
    expanded: dict[str, list[str]] = Field(default_factory=dict)
    deterministic: bool = False
    trackers: Annotated[list[str], BeforeValidator(_several)] = Field(default_factory=list)
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    model: Model
    lora: Lora = Field(default_factory=Lora)
    data: dict[str, Data]
    stages: dict[str, Annotated[Stage, PlainValidator(_as_stage)]] = Field(min_length=1)
    eval: Eval | None = None

    _origin: Path | None = PrivateAttr(default=None)
    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """Where the recipe's file lies; None for one made in code."""
        return self._origin.parent if self._origin is not None else None

    @property
    def base_spec(self) -> str:
        """Its base as `models.loading.resolve_base` takes it, with the tokens that are added to it."""
        return spec_with(self.model.base, self.model.add_tokens, self.seed)

    def placed(self, error: UserError) -> UserError:
        """The same error with file and line before the key that it is about; as it is where it is about none."""
        if isinstance(error, UserErrors):
            return UserErrors(self.placed(each) for each in error.errors)
        key = error.where.replace("[", ".").replace("]", "")
        # `data` alone might be the beginning of a file's name
        least = 1 if key.split(".")[0] in ("data", "stages", "eval") and key.count(".") else 0
        while key and key not in self._places:
            key = key.rpartition(".")[0]
        if key.count(".") < least:
            return error
        if not key:
            return error
        where = f"{self._places[key]}: {error.where}"
        if isinstance(error, Summary):
            return Summary(where, error.problem, error.remedy, error.unsaid, error.of)
        return UserError(where, error.problem, error.remedy)

    @contextmanager
    def placing(self) -> Generator[None]:
        """Within it, errors about a key of the recipe are raised with the key's file and line."""
        try:
            yield
        except UserError as error:
            raise self.placed(error) from error

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values with its defaults, as written to RUN/recipe.yaml; loads back as the same."""
        return _written(self)

    def text(self) -> str:
        """`resolved` as YAML."""
        import yaml

        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True, width=120)


def _written(part: Any) -> Any:
    """Plain values by their YAML names, without what is empty by default (a `null` that is no default stays)."""
    if isinstance(part, dict):
        return {key: _written(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_written(value) for value in part]
    if isinstance(part, Imported):
        return {"adapter": str(part)}
    if not isinstance(part, Part):
        return part
    values = {}
    for name, info in type(part).model_fields.items():
        value = _written(getattr(part, name))
        if not (value is None and info.default is None) and value != {}:
            values[info.alias or name] = value
    return values | {name: _written(value) for name, value in (part.model_extra or {}).items()}
