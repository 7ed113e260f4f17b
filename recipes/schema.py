"""The recipe: every key that a YAML file may hold, with its type and default."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

StageKind = Literal["sft", "reward", "dpo", "kto", "ppo"]
KINDS: tuple[StageKind, ...] = ("sft", "reward", "dpo", "kto", "ppo")
BASE = "base"
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """What all parts of a recipe obey: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)


class Model(Part):
    """The frozen base. `base`: a hub id, a folder, a .gguf file, pypi:DIST==VERSION or random:llama.

    `packed: false` runs padded rows as they are, without leaving out padding and repeated prefixes.
    """

    base: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["4bit", "8bit"] | None = None
    chat_template: str | None = None
    packed: bool = True


class Lora(Part):
    """The adapter that trains."""

    r: Positive = 16
    alpha: float = Field(default=32, gt=0)
    dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    use_rslora: bool = False


class LoraChange(Part):
    """What a stage says differently of its adapter."""

    r: Positive | None = None
    alpha: float | None = Field(default=None, gt=0)
    dropout: Fraction | None = None
    target_modules: Literal["all-linear"] | list[str] | None = None
    use_rslora: bool | None = None


class Source(Part):
    """One file, folder or hub dataset of a mixture. `columns` maps our names to the file's."""

    path: str
    weight: float = Field(default=1.0, gt=0)
    split: str | None = None
    columns: dict[str, str] | None = None
    limit: Positive | None = None
    name: str | None = None
    revision: str | None = None


class Data(Part):
    """A data entry: one `path`, or several `sources`; lengths in tokens."""

    path: str | None = None
    sources: list[Source] | None = None
    split: str | None = None
    columns: dict[str, str] | None = None
    name: str | None = None
    revision: str | None = None
    limit: Positive | None = None
    max_prompt_length: Positive | None = None
    max_length: Positive | None = 1024
    overflow: Literal["drop", "truncate", "error"] = "drop"
    held_out: Fraction = 0.0
    system: str | None = None
    seed: int | None = None


class Stage(Part):
    """What every stage has. `train`: fields of the stage's TRL / Transformers config by their own names."""

    kind: str
    parent: str = Field(default=BASE, alias="from")
    data: str
    lora: LoraChange = Field(default_factory=LoraChange)
    seed: int | None = None
    train: dict[str, Any] = Field(default_factory=dict)


class SFTStage(Stage):
    """Supervised fine-tuning."""

    kind: Literal["sft"]
    loss_type: str | None = None
    early_stopping_patience: Positive | None = None


class RewardStage(Stage):
    """A Bradley-Terry reward model."""

    kind: Literal["reward"]
    center_rewards_coefficient: float | None = None
    early_stopping_patience: Positive | None = None


class DPOStage(Stage):
    """Direct preference optimisation, with every loss of TRL's DPOTrainer (`loss_type: ipo` is IPO)."""

    kind: Literal["dpo"]
    beta: float | None = Field(default=None, ge=0)
    loss_type: str | list[str] | None = None
    loss_weights: list[float] | None = None
    label_smoothing: float | None = None
    ld_alpha: float | None = None
    f_divergence_type: str | None = None
    f_alpha_divergence_coef: float | None = None
    use_weighting: bool | None = None
    discopop_tau: float | None = None
    early_stopping_patience: Positive | None = None


class KTOStage(Stage):
    """Kahneman-Tversky optimisation on single labelled replies."""

    kind: Literal["kto"]
    beta: float | None = Field(default=None, gt=0)
    loss_type: str | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    early_stopping_patience: Positive | None = None


class Reward(Part):
    """One source of PPO's scores: exactly one of `stage`, `model` and `function`, with its weight in the sum."""

    stage: str | None = None
    model: str | None = None
    function: str | None = None
    weight: float = 1.0


class KL(Part):
    """PPO's KL penalty; `target` and `horizon` make it adaptive (nats per sequence, episodes)."""

    coef: float | None = Field(default=None, ge=0)
    target: float | None = Field(default=None, gt=0)
    horizon: float | None = Field(default=None, gt=0)
    estimator: Literal["k1", "k2", "k3", "k2_sequence"] | None = None
    place: Literal["reward", "loss"] | None = Field(default=None, alias="in")


def _kl(value: Any) -> Any:
    return {"coef": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def _rewards(value: Any) -> Any:
    if isinstance(value, dict):
        return [value]
    if isinstance(value, str):
        value = [value]
    return [{"stage": each} if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


class PPOStage(Stage):
    """Proximal policy optimisation. `reward`: a stage's name, one source, or a list of them."""

    kind: Literal["ppo"]
    reward: Annotated[list[Reward], BeforeValidator(_rewards)] = Field(min_length=1)
    kl: Annotated[KL, BeforeValidator(_kl)] = Field(default_factory=KL)
    rollout_batch_size: Positive | None = None
    num_ppo_epochs: Positive | None = None
    num_mini_batches: Positive | None = None
    total_episodes: Positive | None = None
    max_new_tokens: Positive | None = None
    temperature: float | None = Field(default=None, gt=0)
    top_k: int | None = None
    top_p: float | None = None
    rollout_micro_batch_size: Positive | None = None
    gamma: float | None = None
    lam: float | None = None
    cliprange: float | None = None
    cliprange_value: float | None = None
    vf_coef: float | None = None
    entropy_coef: float | None = None
    whiten_advantages: bool | None = None
    whiten_rewards: bool | None = None
    target_approx_kl: float | None = None
    max_ratio: float | None = None
    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None
    normalize_rewards: bool | None = None
    reward_scale: Literal["none", "std", "running"] | None = None
    reward_clip: float | None = None
    reward_combination: Literal["sum", "ensemble"] | None = None
    ensemble_penalty: float | None = None
    value: Literal["separate", "shared"] | None = None
    value_learning_rate: float | None = None
    log_samples_every: int | None = None
    num_log_samples: int | None = None
    keep_every: Positive | None = None


AnyStage = SFTStage | RewardStage | DPOStage | KTOStage | PPOStage
STAGE_MODELS: dict[str, type[Stage]] = {
    "sft": SFTStage,
    "reward": RewardStage,
    "dpo": DPOStage,
    "kto": KTOStage,
    "ppo": PPOStage,
}


def method_keys(kind: str) -> tuple[str, ...]:
    """The parameters that stand beside `train` in a stage of this kind, besides what every stage has."""
    shared = {*Stage.model_fields, "reward", "kl"}
    return tuple(name for name in STAGE_MODELS[kind].model_fields if name not in shared)


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


class Eval(Part):
    """Samples of every policy on the same prompts, judged against the reference. Judges as in `eval/judges/`."""

    prompts: Data
    policies: list[str] = Field(default_factory=list)
    reference: str = BASE
    judges: list[dict[str, Any]] = Field(default_factory=list)
    max_new_tokens: Positive = 48
    temperature: float = Field(default=0.7, ge=0)
    seed: int | None = None
    kl: bool = True
    batch_size: Positive = 32
    beams: Positive | None = None
    over_optimisation: OverOptimisation | None = None


class Recipe(Part):
    """A whole chain. Stages form a graph by `from` (and PPO's `reward`); their order in the file means nothing."""

    name: str = Field(pattern=r"^[\w][\w.-]*$")
    seed: int = 0
    model: Model
    lora: Lora = Field(default_factory=Lora)
    data: dict[str, Data]
    stages: dict[str, Annotated[AnyStage, Field(discriminator="kind")]] = Field(min_length=1)
    eval: Eval | None = None

    _origin: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path | None:
        """Where the recipe's file lies; None for one made in code."""
        return self._origin.parent if self._origin is not None else None

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values with its defaults, as written to RUN/recipe.yaml; loads back as the same."""
        return _written(self)


def _written(part: Any) -> Any:
    """Plain values by their YAML names, without what is empty by default (a `null` that is no default stays)."""
    if isinstance(part, dict):
        return {key: _written(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_written(value) for value in part]
    if not isinstance(part, Part):
        return part
    values = {}
    for name, info in type(part).model_fields.items():
        value = _written(getattr(part, name))
        if not (value is None and info.default is None) and value != {}:
            values[info.alias or name] = value
    return values
