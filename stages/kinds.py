"""The kinds of stage: one frozen record each, read by everything that must know them.

A training method is one file with its run function, and one record here: the recipe's schema, the command line, `plan`,
the cache keys, the report and the doctor all read the record. A method outside the package is one file with both, and a
recipe names it as `kind: my_method.py:KIND`. Nothing here imports torch.
"""

import functools
import hashlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from annotated_types import Ge, Gt, Interval

from ..data.spec import RowKind
from ..errors import UserError, nearest, user_code
from ..own_code import FILE_MODULE, import_named, look_in
from .ppo.settings import DistillSettings, GRPOSettings, PPOSettings, RLOOSettings
from .sample.settings import SampleSettings, gives_rows
from .serving.settings import PLACE_GROUP, ROLLOUT_GROUP


class Panel(NamedTuple):
    """One figure of the report: title, unit of its numbers, keys in log.jsonl, the name of each in the figure."""

    title: str
    unit: str
    keys: tuple[str, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """A parameter of the method: what stands in a stage of the recipe beside `train`.

    Attributes:
        type: what the recipe may say, as an annotation; bounds as `annotated_types` within `Annotated`.
        default: what holds where the recipe says nothing.
        help: one line.
        of_config: whether it is a field of the kind's config; if not, our stage reads it by itself.
    """

    name: str
    type: Any
    default: Any
    help: str
    of_config: bool = True


class OnPolicy(NamedTuple):
    """How often a method that samples its own rows passes over their tokens, in units as in `StageKind.passes`.

    epochs, mini_batches: the parameters that say how often a rollout is passed over, and in how many optimiser steps.
        epochs None: once.
    group: the parameter that says how many replies each prompt gets; None: one.
    """

    rollout_passes: int
    epoch_passes: int
    epochs: str | None
    mini_batches: str
    group: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class StageKind:
    """Everything that the rest of preftune knows of a kind of stage.

    Attributes:
        name: as recipes and the command line say it.
        title: what the command's help calls the stage.
        rows: the kind of rows that it reads (`data/rows.py`).
        config: "module:Class" of its TRL or Transformers config.
        run: "module:function", or the function: takes a `StageJob`, returns what metrics.json holds.
        parameters: of the method.
        groups: recipe words that are written as a group, `kl: {coef: 0.1}`: group -> its key -> the parameter.
        produces: a policy, which samples and can be evaluated, a reward model, or rows, which later stages read.
        full_learning_rate: where all weights train (`full: true`) and the recipe says none; None: it cannot.
        full: all weights train, and what comes out is a model of its own: no adapter of the run's base.
        needs_reference: it measures its policy against the frozen adapter that it started from.
        needs_reward: the recipe says where its scores come from. needs_teacher: and whom it learns from.
        reads_by: of a kind that does not always read `rows`: what it reads, by the values of its parameters.
        orders_pairs: what comes out of it says which of two replies is better, by a score or an implicit reward.
        passes: over a row's tokens in one step, in units of 2 FLOPs a parameter and token: a forward is 1, a backward
            through a frozen base 1 (activations only).
        on_policy: for a method that samples its own rows; `passes` then means nothing.
        panels: what the report draws, in the order of interest; other numbers come after them.
        variants: names of methods that are a loss of this kind -> what to write.
        defaults: fields of its config that a recipe gets where it does not say them: what serves LoRA.
        check: "module:function", or the function: takes a `StageJob` and its built config, returns a list of
            `UserError`s: what the config alone accepts and the run would refuse.
        first: such a stage comes before the others: without `from` it starts from the base, and they start from it.
        gives: of a kind that produces rows: the kinds of rows that may be read, by the values of its parameters.
    """

    name: str
    title: str
    rows: RowKind
    config: str
    run: str | Callable[..., dict[str, Any]]
    parameters: tuple[Parameter, ...] = ()
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: MappingProxyType({}))
    produces: Literal["policy", "reward", "rows"] = "policy"
    full_learning_rate: float | None = None
    full: bool = False
    needs_reference: bool = False
    needs_reward: bool = False
    needs_teacher: bool = False
    reads_by: Callable[[Mapping[str, Any]], RowKind] | None = None
    orders_pairs: bool = False
    passes: int = 2
    on_policy: OnPolicy | None = None
    panels: tuple[Panel, ...] = ()
    variants: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    check: str | Callable[..., list[UserError]] | None = None
    first: bool = False
    gives: Callable[[Mapping[str, Any]], tuple[RowKind, ...]] | None = None

    @property
    def trains(self) -> bool:
        """Whether weights come out of it."""
        return self.produces != "rows"

    @property
    def adapts(self) -> bool:
        """Whether they are an adapter's, which stands beside those of other stages on the run's base."""
        return self.trains and not self.full

    @property
    def speaks(self) -> bool:
        """Whether they are an adapter's that samples and can be evaluated."""
        return self.adapts and self.produces == "policy"

    def of_all_weights(self) -> "StageKind":
        """The same where all weights train: a backward makes their gradients as well."""
        rate = {} if self.full_learning_rate is None else {"learning_rate": self.full_learning_rate}
        return replace(
            self,
            full=True,
            orders_pairs=False,
            passes=self.passes + 1,
            defaults=MappingProxyType({**self.defaults, **rate}),
        )

    @property
    def draws(self) -> bool:
        """Whether its policy answers the prompts that it reads."""
        return self.on_policy is not None or not self.trains

    def row_kinds(self, method: Mapping[str, Any]) -> tuple[RowKind, ...]:
        """The kinds of rows that a stage of it writes; none of a kind that trains.

        Args:
            method: what the recipe says for its parameters.
        """
        return () if self.gives is None else self.gives(self._values(method))

    def reads(self, method: Mapping[str, Any]) -> RowKind:
        """The kind of rows that a stage of it reads.

        Args:
            method: what the recipe says for its parameters.
        """
        return self.rows if self.reads_by is None else self.reads_by(self._values(method))

    def _values(self, method: Mapping[str, Any]) -> dict[str, Any]:
        return {each.name: each.default for each in self.parameters} | dict(method)

    def parameter(self, name: str) -> Parameter:
        """One of the parameters. Raises KeyError for another name."""
        found = next((each for each in self.parameters if each.name == name), None)
        if found is None:
            raise KeyError(f"a {self.name} stage has no parameter {name!r}")
        return found

    def alone(self) -> tuple[Parameter, ...]:
        """The parameters that no group holds."""
        grouped = {name for keys in self.groups.values() for name in keys.values()}
        return tuple(each for each in self.parameters if each.name not in grouped)

    def config_class(self) -> type:
        """Its config. Imports torch and TRL."""
        return pkgutil.resolve_name(self.config)

    def checker(self) -> Callable[..., list[UserError]]:
        """Its check function; it must have one. Imports torch and TRL."""
        assert self.check is not None
        return pkgutil.resolve_name(self.check) if isinstance(self.check, str) else self.check

    def runner(self) -> Callable[..., dict[str, Any]]:
        """Its run function. Imports torch and TRL."""
        return pkgutil.resolve_name(self.run) if isinstance(self.run, str) else self.run


def parameters_of(settings: type, *, of_config: bool = True) -> tuple[Parameter, ...]:
    """The fields of a dataclass as parameters; the help is what each field's metadata says."""
    hints = get_type_hints(settings, include_extras=True)
    return tuple(
        Parameter(
            each.name,
            hints[each.name],
            each.default if each.default is not MISSING else each.default_factory(),  # pyright: ignore[reportCallIssue]: one of them is there
            each.metadata["help"],
            of_config,
        )
        for each in fields(settings)
    )


EARLY_STOPPING = "early_stopping_patience"
_PATIENCE = Parameter(
    EARLY_STOPPING,
    Annotated[int, Ge(1)],
    None,
    "Stop after so many evaluations without a lower loss on held-out rows, and keep the best.",
    of_config=False,
)


def _lora_defaults(learning_rate: float) -> Mapping[str, Any]:
    """Rates about ten times full fine-tuning's, and a small batch: LoRA loses where batches are large.

    "LoRA without regret" (Schulman et al. 2025). PPO's batches are its minibatches.
    """
    return MappingProxyType(
        {"learning_rate": learning_rate, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    )


_LOSS = Panel("Loss", "", ("loss", "eval_loss"), ("training", "held out"))
_ENTROPY = Panel("Entropy", "nats per token", ("rollout/entropy_per_token", "entropy"))
_PAIR_ACCURACY = Panel(
    "Accuracy on pairs",
    "share",
    ("accuracy", "eval_accuracy", "rewards/accuracies", "eval_rewards/accuracies"),
    ("training", "held out", "training", "held out"),
)
_MARGIN = Panel(
    "Reward margin",
    "chosen less rejected",
    ("margin", "eval_margin", "rewards/margins", "eval_rewards/margins"),
    ("training", "held out", "training", "held out"),
)
_IMPLICIT = Panel("Implicit rewards", "", ("rewards/chosen", "rewards/rejected"), ("chosen", "rejected"))
_TOKEN_ACCURACY = Panel(
    "Token accuracy", "share", ("mean_token_accuracy", "eval_mean_token_accuracy"), ("training", "held out")
)

SFT = StageKind(
    name="sft",
    title="The supervised fine-tuning stage",
    rows="demo",
    config="trl:SFTConfig",
    run="preftune.stages.sft:run_sft",
    parameters=(Parameter("loss_type", Literal["nll", "dft"], "nll", "TRL's loss: nll, dft."), _PATIENCE),
    defaults=_lora_defaults(2e-4),
    passes=2,
    panels=(_LOSS, _ENTROPY, _TOKEN_ACCURACY),
    first=True,
    full_learning_rate=2e-5,
)

REWARD = StageKind(
    name="reward",
    title="The reward-model stage",
    rows="pair",
    config="trl:RewardConfig",
    run="preftune.stages.reward:run_reward",
    parameters=(
        # 0.01: what TRL's documentation recommends (R4; arXiv 2312.09244)
        Parameter(
            "center_rewards_coefficient",
            Annotated[float, Ge(0)],
            0.01,
            "Weight of the term that keeps scores around 0.",
        ),
        _PATIENCE,
    ),
    defaults=_lora_defaults(1e-4),
    produces="reward",
    orders_pairs=True,
    full_learning_rate=1e-5,
    passes=2,
    panels=(
        _LOSS,
        _PAIR_ACCURACY,
        _MARGIN,
        Panel("Scores in a batch", "", ("max_reward", "mean_reward", "min_reward"), ("highest", "mean", "lowest")),
    ),
)

DPOLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
"""The losses of TRL's DPOTrainer."""
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

DPO = StageKind(
    name="dpo",
    title="The DPO (or IPO) stage",
    rows="pair",
    config="trl:DPOConfig",
    run="preftune.stages.dpo:run_dpo",
    check="preftune.stages.method_problems:dpo_problems",
    parameters=(
        Parameter("beta", Annotated[float, Ge(0)], 0.1, "Strength of the pull towards the reference."),
        Parameter(
            "loss_type", DPOLoss | list[DPOLoss], ["sigmoid"], "TRL's loss (sigmoid, ipo, hinge, ...), or several."
        ),
        Parameter("loss_weights", list[float], None, "Weights of several losses."),
        Parameter(
            "label_smoothing",
            Annotated[float, Interval(ge=0, lt=0.5)],
            0.0,
            "Share of labels that are taken to be wrong, in robust, exo_pair, aot and aot_unpaired.",
        ),
        Parameter(
            "ld_alpha",
            Annotated[float, Interval(ge=0, le=1)],
            None,
            "LD-DPO's weight of tokens beyond the shorter reply's length.",
        ),
        Parameter("f_divergence_type", Divergence, "reverse_kl", "Divergence to the reference (f-DPO)."),
        Parameter("f_alpha_divergence_coef", float, 0.5, "Alpha of the alpha-divergence."),
        Parameter("use_weighting", bool, False, "WPO's weights of the pairs."),
        Parameter("discopop_tau", Annotated[float, Gt(0)], 0.05, "Temperature of discopop's loss."),
        _PATIENCE,
    ),
    defaults=_lora_defaults(1e-5),
    needs_reference=True,
    orders_pairs=True,
    full_learning_rate=1e-6,
    # the reference's forward comes on top
    passes=3,
    panels=(_LOSS, _PAIR_ACCURACY, _MARGIN, _IMPLICIT, _ENTROPY, _TOKEN_ACCURACY),
    variants=MappingProxyType({"ipo": "write kind: dpo and loss_type: ipo"}),
)

KTO = StageKind(
    name="kto",
    title="The KTO stage",
    rows="label",
    config="trl:KTOConfig",
    run="preftune.stages.kto:run_kto",
    check="preftune.stages.method_problems:kto_problems",
    parameters=(
        Parameter("beta", Annotated[float, Gt(0)], 0.1, "Strength of the pull towards the reference."),
        Parameter("loss_type", Literal["kto", "apo_zero_unpaired"], "kto", "TRL's loss: kto, or apo_zero_unpaired."),
        Parameter("desirable_weight", Annotated[float, Ge(0)], 1.0, "Weight of good replies."),
        Parameter("undesirable_weight", Annotated[float, Ge(0)], 1.0, "Weight of bad replies."),
        _PATIENCE,
    ),
    defaults=_lora_defaults(1e-5),
    needs_reference=True,
    orders_pairs=True,
    full_learning_rate=1e-6,
    passes=3,
    panels=(_LOSS, _MARGIN, _IMPLICIT, _ENTROPY),
    variants=MappingProxyType({"apo": "write kind: kto and loss_type: apo_zero_unpaired"}),
)

_REWARD = Panel(
    "Reward", "judge's units", ("objective/scores", "objective/rlhf_reward"), ("score", "less the KL penalty")
)
_KL = Panel("KL to the reference", "nats per reply", ("objective/kl",))
_LENGTH = Panel("Reply length", "tokens", ("rollout/length",))
_ENDS = Panel("Replies that end by themselves", "share", ("rollout/eos_rate",))
_MISMATCH = Panel(
    "Sampler against trainer",
    "nats per token",
    ("rollout/logprob_mismatch_mean", "rollout/sampler_kl"),
    ("mean difference of log-probs", "KL"),
)

PPO = StageKind(
    name="ppo",
    title="The PPO stage",
    rows="prompt",
    config="preftune.stages.ppo.config:PPOConfig",
    run="preftune.stages.ppo.stage:run_ppo",
    check="preftune.stages.method_problems:ppo_problems",
    parameters=parameters_of(PPOSettings),
    groups=MappingProxyType(
        {
            "rollout": ROLLOUT_GROUP,
            "kl": MappingProxyType(
                {
                    "coef": "kl_coef",
                    "target": "kl_target",
                    "horizon": "kl_horizon",
                    "estimator": "kl_estimator",
                    "in": "kl_in",
                }
            ),
        }
    ),
    defaults=MappingProxyType({"learning_rate": 1e-4, "per_device_train_batch_size": 8}),
    needs_reference=True,
    needs_reward=True,
    # generation, reference, reward and value; then policy and value, forward and backward, in each epoch
    on_policy=OnPolicy(rollout_passes=4, epoch_passes=4, epochs="num_ppo_epochs", mini_batches="num_mini_batches"),
    panels=(
        _REWARD,
        _KL,
        _ENTROPY,
        _LENGTH,
        _ENDS,
        Panel("Clipped tokens", "share", ("policy/clipfrac_avg", "val/clipfrac_avg"), ("policy", "value")),
        Panel("KL of one update", "nats per token", ("policy/approxkl_avg",)),
        Panel("Value: explained variance", "share", ("value/explained_variance",)),
        Panel("KL coefficient", "", ("objective/kl_coef",)),
        _MISMATCH,
    ),
)

SAMPLE = StageKind(
    name="sample",
    title="The sampling stage",
    rows="prompt",
    # nothing trains: of this config the run reads nothing
    config="transformers:TrainingArguments",
    run="preftune.stages.sample.stage:run_sample",
    check="preftune.stages.method_problems:sample_problems",
    parameters=parameters_of(SampleSettings, of_config=False),
    groups=MappingProxyType({"rollout": PLACE_GROUP}),
    produces="rows",
    needs_reward=True,
    variants=MappingProxyType(
        {
            **dict.fromkeys(
                ("best_of_n", "bon", "rejection_sampling", "raft", "rft"),
                "write kind: sample with keep: best, and kind: sft with data: {stage: ...}",
            ),
            **dict.fromkeys(
                ("rlaif", "iterative_dpo", "self_rewarding"),
                "write kind: sample, and kind: dpo with data: {stage: ...}; see the shipped recipe iterative-dpo",
            ),
            **dict.fromkeys(("generate", "rollout", "sampling"), "write kind: sample"),
        }
    ),
    gives=gives_rows,
)

_GROUP_PANELS = (
    _REWARD,
    _KL,
    _ENTROPY,
    Panel("Groups without a difference in score", "share", ("frac_reward_zero_std",)),
    _LENGTH,
    _ENDS,
    Panel(
        "Clipped",
        "share",
        ("clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"),
        ("low", "high", "cispo"),
    ),
    Panel("KL of one update", "nats per token", ("policy/approxkl_avg",)),
    _MISMATCH,
)

GRPO = StageKind(
    name="grpo",
    title="The GRPO stage",
    rows="prompt",
    config="preftune.stages.grpo:GRPOConfig",
    run="preftune.stages.grpo:run_grpo",
    check="preftune.stages.method_problems:grpo_problems",
    parameters=parameters_of(GRPOSettings),
    groups=MappingProxyType({"rollout": ROLLOUT_GROUP}),
    defaults=MappingProxyType({"learning_rate": 1e-4, "per_device_train_batch_size": 8}),
    needs_reference=True,
    needs_reward=True,
    # generation, policy and reference; then the policy, forward and backward, in each pass
    on_policy=OnPolicy(3, 2, epochs="num_iterations", mini_batches="num_mini_batches", group="num_generations"),
    panels=_GROUP_PANELS,
    variants=MappingProxyType(
        {
            "dr_grpo": "write kind: grpo, loss_type: dr_grpo and scale_rewards: none",
            "dapo": "write kind: grpo, loss_type: dapo (the default) and epsilon_high: 0.28",
            "gspo": "write kind: grpo and importance_sampling_level: sequence",
            "cispo": "write kind: grpo, loss_type: cispo and epsilon_high: 5.0",
            "bnpo": "write kind: grpo and loss_type: bnpo",
            "gdpo": "write kind: grpo and multi_objective_aggregation: normalize_then_sum",
        }
    ),
)

RLOO = StageKind(
    name="rloo",
    title="The RLOO stage",
    rows="prompt",
    config="preftune.stages.rloo:RLOOConfig",
    run="preftune.stages.rloo:run_rloo",
    check="preftune.stages.method_problems:on_policy_problems",
    parameters=parameters_of(RLOOSettings),
    groups=MappingProxyType({"rollout": ROLLOUT_GROUP}),
    defaults=MappingProxyType({"learning_rate": 1e-4, "per_device_train_batch_size": 8}),
    needs_reference=True,
    needs_reward=True,
    on_policy=OnPolicy(3, 2, epochs="num_iterations", mini_batches="num_mini_batches", group="num_generations"),
    panels=_GROUP_PANELS,
    variants=MappingProxyType(dict.fromkeys(("reinforce", "reinforce_plus_plus"), "write kind: rloo")),
)


def _distill_rows(values: Mapping[str, Any]) -> RowKind:
    return "prompt" if values["lmbda"] == 1 else "demo"


_LIKE_GKD = "write kind: distill with lmbda: 0.5 and beta: 0.5"

DISTILL = StageKind(
    name="distill",
    title="The distillation stage",
    rows="prompt",
    reads_by=_distill_rows,
    config="preftune.stages.distill:DistillationConfig",
    run="preftune.stages.distill:run_distill",
    check="preftune.stages.method_problems:distill_problems",
    parameters=parameters_of(DistillSettings),
    groups=MappingProxyType({"rollout": ROLLOUT_GROUP}),
    defaults=MappingProxyType({"learning_rate": 1e-4, "per_device_train_batch_size": 8}),
    needs_teacher=True,
    # generation and the student's log-probs; then its forward and backward. The teacher's forward comes on top.
    on_policy=OnPolicy(2, 2, epochs=None, mini_batches="num_mini_batches"),
    panels=(
        Panel("Divergence from the teacher", "nats per token", ("loss", "eval_loss"), ("training", "held out")),
        _ENTROPY,
        _LENGTH,
        _ENDS,
        Panel("KL of one update", "nats per token", ("policy/approxkl_avg",)),
        _MISMATCH,
    ),
    variants=MappingProxyType(
        {
            **dict.fromkeys(("distillation", "on_policy_distillation", "opd", "minillm"), "write kind: distill"),
            **dict.fromkeys(("gkd", "generalized_knowledge_distillation"), _LIKE_GKD),
            **dict.fromkeys(
                ("kd", "knowledge_distillation", "seqkd", "sequence_kd"),
                "write kind: distill, with lmbda: 0 and beta: 0 for the data's replies and the forward KL",
            ),
        }
    ),
)

KINDS: dict[str, StageKind] = {each.name: each for each in (SFT, REWARD, DPO, KTO, PPO, GRPO, RLOO, DISTILL, SAMPLE)}
"""The kinds that come with preftune, in the order in which they are listed."""

_NOT_HERE = "not among the methods here: the nearest is {}; a method of your own is kind: FILE.py:RECORD"

VARIANTS: dict[str, str] = {
    **{name: remedy for kind in KINDS.values() for name, remedy in kind.variants.items()},
    **dict.fromkeys(("simpo", "cpo"), _NOT_HERE.format("kind: dpo with loss_type: sigmoid_norm")),
    "orpo": _NOT_HERE.format("kind: sft, then kind: dpo"),
    "online_dpo": _NOT_HERE.format("kind: sample, then kind: dpo on its pairs (the shipped recipe iterative-dpo)"),
    **dict.fromkeys(("rm", "reward_model", "reward_modeling"), "write kind: reward"),
    **dict.fromkeys(("finetune", "fine_tune", "ft", "instruct", "pt", "pretrain"), "write kind: sft"),
    "rlhf": "write kind: ppo",
}
"""Names of methods that people write as a kind -> what to write."""


def stage_kind(word: str, where: str = "kind") -> StageKind:
    """The record of a kind.

    Args:
        word: the name of one of `KINDS`; or, for a method outside the package, "FILE.py:RECORD" or "module:RECORD".
        where: its place in the recipe, for the message.

    Raises:
        UserError: no such kind, or nothing of the sort under that name.
    """
    if word in KINDS:
        return KINDS[word]
    home, colon, name = word.rpartition(":")
    if not colon:
        remedy = VARIANTS.get(word.lower()) or nearest(word.lower(), KINDS)
        raise UserError(where, f"{word!r} is no kind of stage", remedy)
    with user_code(where, f"{home} cannot be imported", "correct the path, or the file"):
        module = _module(home)
    found = getattr(module, name, None)
    if not isinstance(found, StageKind):
        kind = "nothing" if found is None else f"a {type(found).__name__}"
        raise UserError(where, f"{name!r} in {home} is {kind}, expected a StageKind", "name the method's record")
    if found.name in KINDS:
        raise UserError(where, f"the record {word} is called {found.name!r}, as a kind of preftune's own", "rename it")
    return found


def source_file(word: str) -> Path | None:
    """The file of a kind outside the package; None for one of `KINDS`."""
    return None if word in KINDS else Path(str(inspect.getsourcefile(_module(word.rpartition(":")[0]))))


def forget_methods() -> None:
    """Methods outside the package are read from their files again the next time that they are named."""
    _module.cache_clear()


@functools.cache
def _module(home: str) -> ModuleType:
    """The module of that name, or from that file; run once in a process."""
    if not home.endswith(".py"):
        return import_named(home)
    file = Path(home).expanduser().resolve()
    # under a name of its own, so that a method called `random.py` hides nothing
    name = f"{FILE_MODULE}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    # it may import what lies beside it
    look_in([file.parent])
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
