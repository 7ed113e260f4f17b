"""What a stage will hold and do, before it runs: from its job, its rows in tokens and the base's config.

A stage is a list of `Work`: a step, on which rows, how often. The heaviest rows give its memory (`rehearsal.py`), usual
ones its time (`calibration.py`). What it holds all the time comes on top: weights, adapters, optimiser.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedConfig

from ..data.spec import RowKind
from ..models.batching import TOKENS_PER_BATCH, TokenIds, tokens_in
from ..models.cost import (
    ADAPTER_BYTES,
    BYTES,
    activation_bytes,
    is_paged,
    optimiser_bytes,
    rows_at_once,
    sizes,
    training_flops,
)
from ..models.lora import LoraSpec
from ..models.memory import COMPILED_BYTES, COMPILED_PRODUCTS, Holes
from ..models.rehearsal import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    Batch,
    Build,
    Parts,
    Program,
    forward_only,
    policy_step,
    prefill_only,
    rehearsed,
    score_step,
)
from .job import StageJob
from .options import stage_config

if TYPE_CHECKING:
    from datasets import Dataset

Device = Literal["cpu", "cuda"]
WEIGHTS, MERGED, CACHE, ADAPTERS = "weights", "merged weights", "key-value cache", "adapters"
OPTIMISER, BUCKETS, LIBRARIES, HOLES = "optimiser", "gradient buckets", "libraries", "allocator"
TEACHER, REFERENCE = "teacher", "reference"
PRODUCTS = "compiled products"
_REWARD = "reward"

_BYTES_A_TOKEN = 5
"""Of sampled text on the disk."""
_TRAINER, _HOLES = 50_000_000, 0.25
"""What a process on a CPU holds beside the tensors that are counted: the trainer with what it imports, and of what a
step makes, the share that the allocator holds for nothing after one step. Over its steps a process then grows by a
percent each until `memory.Holes` hands back what it has grown by."""
_GROWTH_A_STEP = 0.01
_ATTENTION_PRODUCTS = 4
"""Of a block's length: scores, their gradient, and two whose gradients have the same shapes."""
_TREES = 200
"""At most so many batches are laid out to see how many shapes they have."""


class Rows:
    """The encoded rows of a stage, or of its held-out part.

    Attributes:
        lengths: tokens of each row; of a pair both sides, each with the prompt.
        longest: of one sequence.
        known: whether rows were read; else they are assumed to be as long as they may be.
    """

    def __init__(self, dataset: "Dataset", kind: RowKind, every: int = 1) -> None:
        """Args: every: of so many ids one counts, where bytes stand for tokens."""
        self.known, self._dataset, self._kind, self._every = True, dataset, kind, every
        both = [[*map(len, self.sequences([row]))] for row in range(len(dataset))]
        self.lengths = [*map(sum, both)]
        self.longest = max(map(max, both), default=0)

    def __len__(self) -> int:
        return len(self.lengths)

    def sequences(self, rows: Sequence[int]) -> list[TokenIds]:
        """Token ids of these rows; of pairs the chosen ones, then the rejected ones, as TRL lays them out."""
        found: list[dict[str, Any]] = [self._dataset[i] for i in rows]
        if self._kind == "pair":
            sides = ("chosen_ids", "rejected_ids")
            return [(row["prompt_ids"] + row[side])[:: self._every] for side in sides for row in found]
        names = {"demo": ("input_ids",), "label": ("prompt_ids", "completion_ids"), "prompt": ("prompt_ids",)}
        return [[token for name in names[self._kind] for token in row[name]][:: self._every] for row in found]

    def scored(self, rows: Sequence[int]) -> int:
        """Tokens with a loss in these rows."""
        found: list[dict[str, Any]] = [self._dataset[i] for i in rows]
        if self._kind == "demo":
            return sum(label >= 0 for row in found for label in row["labels"][:: self._every])
        names = {"pair": ("chosen_ids", "rejected_ids"), "label": ("completion_ids",), "prompt": ()}
        return sum(len(row[name][:: self._every]) for row in found for name in names[self._kind])


class AssumedRows:
    """Rows that were not read: each as long as it may be, with nothing in common.

    Args:
        count: how many; 0 where that is not known.
    """

    known = False

    def __init__(self, count: int, longest: int, kind: RowKind) -> None:
        self._count, self.longest, self._sides = count, longest, 2 if kind == "pair" else 1
        self._scored = kind != "prompt"
        self.lengths = [longest * self._sides] * count

    def __len__(self) -> int:
        return self._count

    def sequences(self, rows: Sequence[int]) -> list[TokenIds]:
        # each begins with a token of its own, so that nothing is shared
        return [[n, *[0] * (self.longest - 1)] for n in range(len(rows) * self._sides)]

    def scored(self, rows: Sequence[int]) -> int:
        return len(rows) * self._sides * self.longest if self._scored else 0


AnyRows = Rows | AssumedRows


@dataclass(frozen=True)
class Decodes:
    """The replies of a rollout.

    Attributes:
        at_once: rows that are decoded together.
        lengths: tokens of each reply, as they are expected.
        most: that a reply may have.
    """

    at_once: int
    lengths: tuple[int, ...]
    most: int

    def longest(self) -> "Decodes":
        """Where none ends before it must."""
        return replace(self, lengths=(self.most,) * len(self.lengths))


Step = Literal["policy", "policy and reference", "score", "forward", "prefill"]


@dataclass(frozen=True)
class Work:
    """One kind of forward, with or without its backward.

    Attributes:
        phase: what the plan calls it.
        step: what runs.
        heaviest: the rows with the most tokens that are to be expected.
        typical: usual ones.
        scored: tokens with a loss among these.
        times: how often, on each device; None where that is not known.
        trl: whether the head is that of TRL's trainers.
        passes: micro-batches whose gradients add up.
        holds: bytes that this phase alone holds.
        longer: by so much more tokens the usual rows have where every reply is as long as it may be.
        decodes: the replies of a rollout; as many prompts as are decoded together are `typical`.
    """

    phase: str
    step: Step
    heaviest: Batch
    typical: tuple[TokenIds, ...]
    scored: int
    times: float | None
    trl: bool = True
    passes: int = 1
    holds: Parts = field(default_factory=Counter)
    longer: float = 1.0
    decodes: Decodes | None = None

    def program(self) -> Program:
        """What is rehearsed."""
        if self.step == "score":
            return score_step(self.heaviest, passes=self.passes)
        if self.step == "forward":
            return forward_only(self.heaviest, trl=self.trl)
        if self.step == "prefill":
            return prefill_only(self.heaviest)
        both = self.step == "policy and reference"
        return policy_step(self.heaviest, reference=both, passes=self.passes, trl=self.trl)


@dataclass(frozen=True)
class Place:
    """Where a stage runs.

    Attributes:
        device: "cpu" or "cuda".
        processes: how many, one device each.
        sharded: whether the frozen base is divided among them (`models.sharded`).
        libraries: bytes that a process holds before it loads anything; on a GPU they are not on the device.
        memory: bytes of the GPU, where it is known.
        compiled: products that oneDNN has compiled in the process for earlier stages.
    """

    device: Device
    processes: int = 1
    sharded: bool = False
    libraries: int = 0
    memory: int | None = None
    compiled: int = 0


@dataclass(frozen=True)
class StageCost:
    """What a stage costs.

    Attributes:
        rows, tokens, longest, steps: of its data and its run; rows, tokens and steps are None where that is not known.
        trained: parameters that train.
        flops: of all devices together; None as above.
        phases: bytes by part on each device, of each phase at its peak.
        disk: bytes that it writes, checkpoints included.
        paged: bytes of the optimiser that a GPU without room for them moves to the machine's memory; in no phase.
        compiled: products that oneDNN compiles for the stage on a CPU.
        approximate: why the activations are by a rule of thumb; None: they are rehearsed.
    """

    rows: int | None
    tokens: int | None
    longest: int
    steps: int | None
    trained: int
    flops: float | None
    phases: dict[str, Parts]
    disk: int
    work: tuple[Work, ...]
    paged: int = 0
    compiled: int = 0
    approximate: str | None = None

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that holds the most, and how many bytes."""
        return max(((name, sum(parts.values())) for name, parts in self.phases.items()), key=lambda each: each[1])


def stage_cost(
    job: StageJob,
    config: PreTrainedConfig,
    rows: AnyRows,
    held: AnyRows | None,
    place: Place,
    replies: Sequence[int] = (),
    teacher: PreTrainedConfig | None = None,
) -> StageCost:
    """What a stage costs, on each device.

    Args:
        job: its base and folders are not looked at.
        rows, held: to train on, and held out.
        replies: lengths as sampled replies are expected to have them; without any each is as long as it may be.
        teacher: of a model that is loaded beside the base to learn from.

    Raises:
        UserError: the stage's config refuses a value.
    """
    stage = _Stage(job, config, rows, held, place, replies, teacher)
    work = stage.work()
    peaks, why = _peaks(stage, config, work)
    compiled = stage.compiled() if place.device == "cpu" else 0
    phases: dict[str, Parts] = {}
    for each, peak in zip(work, peaks, strict=True):
        parts = +(stage.constant() + peak + each.holds)
        if place.device == "cpu":
            parts[PRODUCTS] = min(COMPILED_PRODUCTS, compiled + place.compiled) * COMPILED_BYTES
            after_a_step = parts.total() + _TRAINER + _HOLES * peak.total()
            parts[HOLES] = round(after_a_step * (1 + stage.growth())) - parts.total()
        if each.phase not in phases or parts.total() > phases[each.phase].total():
            phases[each.phase] = parts
    return StageCost(
        rows=len(rows) or None,
        tokens=stage.tokens(),
        longest=rows.longest + stage.new_tokens,
        steps=stage.steps(),
        trained=stage.trained_parameters(),
        flops=stage.flops(),
        phases=phases,
        disk=stage.disk_bytes(),
        work=tuple(work),
        paged=stage.optimiser() if stage.paged else 0,
        compiled=compiled,
        approximate=why,
    )


def _peaks(stage: "_Stage", config: PreTrainedConfig, work: Sequence[Work]) -> tuple[list[Parts], str | None]:
    """What each piece of work holds at its peak; and why that is a rule of thumb, where it is."""
    job, size = stage.job, stage.size
    build = Build(
        config,
        job.lora,
        job.torch_dtype(),
        job.quantization,
        stage.place.device,
        stage.checkpointing,
        job.full,
    )
    try:
        return rehearsed(build, [each.program() for each in work]), None
    except Exception as error:  # a model that looks at its numbers cannot be run without them
        said = " ".join(str(error).split())[:200] or type(error).__name__
    unit = BYTES[job.dtype]
    found: list[Parts] = []
    for each in work:
        backward = each.step not in ("forward", "prefill")
        tokens = each.heaviest.tokens
        kept = activation_bytes(size, tokens, unit, checkpointing=stage.checkpointing) if backward else 0
        found.append(Counter({ACTIVATIONS: kept or 16 * tokens * size.hidden * unit, LOGITS: 3 * 4 * (16 << 20)}))
    return found, said


class _Stage:
    """A stage's settings as they will be, and what follows from them."""

    def __init__(
        self,
        job: StageJob,
        config: PreTrainedConfig,
        rows: AnyRows,
        held: AnyRows | None,
        place: Place,
        replies: Sequence[int],
        teacher: PreTrainedConfig | None = None,
    ) -> None:
        self.job, self.config, self.rows, self.held, self.place = job, config, rows, held, place
        # all weights that train are held in fp32
        self.size = sizes(config, job.lora, "float32" if job.full else job.dtype, job.quantization)
        kind = job.record
        self.teacher = None if teacher is None else sizes(teacher, LoraSpec(r=1, alpha=1), job.dtype, job.quantization)
        # what the config says of this machine's devices is not read from it
        self.args: Any = stage_config(kind.config_class(), job, held_out=held is not None)
        self.batch: int = self.args.per_device_train_batch_size
        self.checkpointing = self._checkpoints_layers()
        self.shared = job.method_value("value") == "shared"
        self.served = job.method_value("rollout_engine") is not None
        optim = self.args.optim
        self.optim = str(getattr(optim, "value", optim))  # the name of an enumeration's member says its class too
        self.paged = place.device == "cuda" and is_paged(self.optim)
        self.new_tokens: int = job.method_value("max_new_tokens") if kind.draws else 0
        self._replies = sorted(min(each, self.new_tokens) for each in replies)
        self.reply: float = sum(self._replies) / len(self._replies) if replies else self.new_tokens

    def _checkpoints_layers(self) -> bool:
        names = ("gradient_checkpointing", "activation_checkpointing")
        asked = next((self.job.train[name] for name in names if self.job.train.get(name) is not None), None)
        if asked is not None or self.place.device == "cpu":
            return bool(asked)
        known = {each.name: each.default for each in fields(type(self.args))}
        return any(known.get(name) is True for name in names)

    # --- how often ----------------------------------------------------------------------------------------------------

    def steps(self) -> int | None:
        """Optimiser steps of the run."""
        args, n = self.args, len(self.rows)
        if not self.job.record.trains:
            return 0
        if (policy := self.job.record.on_policy) is not None:
            iterations = self.iterations()
            return None if iterations is None else iterations * self.epochs() * self._value(policy.mini_batches)
        if args.max_steps > 0:
            return args.max_steps
        return math.ceil(math.ceil(n / self.rows_a_step()) * args.num_train_epochs) if n else None

    def rows_a_step(self) -> int:
        return self.batch * self.args.gradient_accumulation_steps * self.place.processes

    def iterations(self) -> int | None:
        """Rollouts of an on-policy run."""
        policy = self.job.record.on_policy
        assert policy is not None
        rollout = self._value("rollout_batch_size")
        if (episodes := self._value("total_episodes")) is not None:
            return episodes // rollout
        if self.args.max_steps > 0:
            return self.args.max_steps // (self.epochs() * self._value(policy.mini_batches))
        n = len(self.rows) * self.group()
        return max(1, math.ceil(n * self.args.num_train_epochs / rollout)) if n else None

    def epochs(self) -> int:
        """Passes over a rollout."""
        policy = self.job.record.on_policy
        return 1 if policy is None or policy.epochs is None else self._value(policy.epochs)

    def sampled_share(self) -> float:
        """Of the rollouts that are sampled here: the others' replies are the data's, or all are a server's."""
        if self.served:
            return 0.0
        return 1.0 if (said := self._value("lmbda")) is None else said

    def refers(self) -> bool:
        """Whether the reference is run: an on-policy method without a KL to it has no need of it."""
        kind = self.job.record
        return kind.needs_reference and (kind.on_policy is None or self._value("beta") != 0)

    def group(self) -> int:
        """Replies to each prompt."""
        policy = self.job.record.on_policy
        return self._value(policy.group) if policy is not None and policy.group is not None else 1

    def _value(self, name: str) -> Any:
        return self.job.method_value(name)

    def replies(self, count: int) -> tuple[int, ...]:
        """Lengths of so many replies, spread as the expected ones are, in no order."""
        known = self._replies or [self.new_tokens]
        found = [known[(2 * i + 1) * len(known) // (2 * count)] for i in range(count)]
        random.Random(self.job.seed).shuffle(found)
        return tuple(found)

    def tokens(self) -> int | None:
        """Tokens of the rows that the run sees, replies included."""
        if not self.job.record.trains:
            n = self._value("n")
            return round(n * (sum(self.rows.lengths) + len(self.rows) * self.reply)) if len(self.rows) else None
        if (steps := self.steps()) is None:
            return None
        mean = sum(self.rows.lengths) / len(self.rows) if len(self.rows) else self.rows.longest
        if self.job.record.on_policy is None:
            return round(mean * steps * self.rows_a_step())
        return round((self.iterations() or 0) * self._value("rollout_batch_size") * (mean + self.reply))

    def flops(self) -> float | None:
        """Of the whole run, by the passes of the kind's record; what rows share is counted once where it is packed."""
        if (tokens := self.tokens()) is None:
            return None
        kind = self.job.record
        if not kind.trains:
            return training_flops(self.size, tokens, 1 + self._reward_stages(), self._replies_in_all() * self.reply, 1)
        again = 1 if self.checkpointing else 0
        if (policy := kind.on_policy) is None:
            work = self.trained()[0]
            share = self._packed_share(work)
            scored = tokens * work.scored / max(sum(map(len, work.typical)), 1)
            head = 0 if kind.produces == _REWARD else 3 if kind.needs_reference else 2
            return training_flops(self.size, tokens * share, kind.passes + again + self._mismatched(), scored, head)
        epochs = self.epochs()
        sides = policy.epoch_passes // (2 if self.shared else 1)
        passes = policy.rollout_passes - (1 - self.sampled_share()) - self.shared + (sides + again) * epochs
        passes -= kind.needs_reference and not self.refers()
        prompt = sum(self.rows.lengths) / max(len(self.rows), 1)
        scored = tokens * self.reply / max(self.reply + prompt, 1)
        if self.job.packed:  # a group's prompt is laid out once
            tokens = round(tokens * (self.reply + prompt / self.group()) / max(self.reply + prompt, 1))
        found = training_flops(self.size, tokens, passes, scored, 2 + self.refers() + 2 * epochs)
        taught = training_flops(self.teacher or self.size, tokens, 1, scored, 1) if kind.needs_teacher else 0
        return found + taught

    def _packed_share(self, work: Work) -> float:
        made = Batch.of(work.typical, 0, packed=self.job.packed, device=self.place.device)
        return made.tokens / max(sum(map(len, work.typical)), 1)

    # --- what is held all the time ------------------------------------------------------------------------------------

    def trained_parameters(self) -> int:
        """Of the adapters that train, or of the model where all of it does; their heads for scores left out."""
        if not self.job.record.trains:
            return 0
        if self.job.full:
            return self.size.parameters
        separate = self.job.record.on_policy is not None and self._value("value") == "separate"
        return self.size.adapter * (2 if separate else 1)

    def optimiser(self) -> int:
        """Bytes of the optimiser's state."""
        return round(self.trained_parameters() * optimiser_bytes(self.optim))

    def _weights(self) -> int:
        """Bytes of the base's weights on each device."""
        whole, place = self.size.weight_bytes, self.place
        if not place.sharded or place.processes == 1:
            return whole
        # the layer that runs and the next one are whole, or the head
        together = max(2 * self.size.largest_layer_bytes, self.size.head * BYTES[self.job.dtype])
        return min(whole, whole // place.processes + together)

    def constant(self) -> Parts:
        """What every phase holds on each device."""
        job, size, place, weights = self.job, self.size, self.place, self._weights()
        refers = self.refers() or not job.record.trains
        frozen = size.adapter * (int(refers) + self._reward_stages() + self._taught_by_adapter())
        trained = self.trained_parameters()
        several = place.processes > 1 and job.record.on_policy is None and job.record.trains
        return Counter(
            {
                WEIGHTS: weights,
                ADAPTERS: 0 if job.full else (trained + frozen) * ADAPTER_BYTES,
                REFERENCE: weights if job.full and refers else 0,
                OPTIMISER: 0 if self.paged else self.optimiser(),
                BUCKETS: trained * ADAPTER_BYTES if several else 0,
                LIBRARIES: place.libraries,
                TEACHER: 0 if self.teacher is None else self.teacher.weight_bytes,
                MERGED: self._merged() if place.device == "cuda" and job.record.draws and not self.served else 0,
            }
        )

    def _merged(self) -> int:
        """Of the weights with the adapter in them, with which rollouts are drawn; a GPU keeps their memory."""
        if self.job.quantization is not None:
            return 0
        laid_out_anew = self.place.device == "cpu" and self.job.dtype == "bfloat16"  # all of them, the head's too
        return self.size.linear_bytes if laid_out_anew else self.size.adapted_bytes

    def disk_bytes(self) -> int:
        """What comes out, two checkpoints with the optimiser (a new one is written beside the old), and kept policies.

        Of a stage that samples: replies as text, until the rows are written beside them.
        """
        if not self.job.record.trains:
            return round(2 * _BYTES_A_TOKEN * (self.tokens() or 0))
        adapter = self.size.adapter * ADAPTER_BYTES
        checkpoint = self.trained_parameters() * ADAPTER_BYTES + self.optimiser()
        every = self.job.method_value("keep_every")
        kept = (self.iterations() or 0) // every if every else 0
        if self.job.full:
            return self.size.parameters * BYTES[self.job.dtype] + 2 * checkpoint
        return adapter * (1 + kept) + 2 * checkpoint

    def growth(self) -> float:
        """By how much a process on a CPU grows over its steps before free memory is handed back."""
        return min(Holes.GROWTH, _GROWTH_A_STEP * (self.steps() or math.inf))

    def compiled(self) -> int:
        """How many products oneDNN, which computes in 16 bits, compiles for the shapes of the run's batches."""
        if self.job.dtype == "float32":
            return 0
        widths, blocks = set[int](), set[int]()
        for rows in self._all_batches():
            batch = self._batch(rows, 0)
            widths.add(batch.tokens)
            blocks.update(batch.blocks)
        return len(widths) * self.size.products + len(blocks) * _ATTENTION_PRODUCTS

    def _all_batches(self) -> Iterator[list[TokenIds]]:
        """The batches of one shuffled pass, or as many as the run has; replies are as they are expected."""
        draw, count = random.Random(self.job.seed), max(1, min(_TREES, self.steps() or _TREES))
        sampled = self.job.record.draws
        for _ in range(count if len(self.rows) else 1):
            rows = draw.sample(range(len(self.rows)), min(self.batch, len(self.rows))) or [*range(self.batch)]
            found = self.rows.sequences(rows)
            lengths = draw.choices(self.replies(len(found)), k=len(found)) if sampled else [0] * len(found)
            yield [[*row, *[-1 - n] * t] for n, (row, t) in enumerate(zip(found, lengths, strict=True))]

    # --- what is done -------------------------------------------------------------------------------------------------

    def work(self) -> list[Work]:
        """All that the stage does."""
        if not self.job.record.trains:
            return self.sampled()
        return self.trained() if self.job.record.on_policy is None else self.on_policy()

    def trained(self) -> list[Work]:
        """The work of a stage on TRL's trainers."""
        kind, args = self.job.record, self.args
        step: Step = (
            "score" if kind.produces == _REWARD else "policy and reference" if kind.needs_reference else "policy"
        )
        steps, passes = self.steps(), args.gradient_accumulation_steps
        times = None if steps is None else steps * passes
        work = [self._step("training step", step, self.rows, self.batch, times, passes=passes)]
        if self._mismatched():
            twice = None if times is None else times * self._mismatched()
            work.append(self._step("estimate of z0", "forward", self.rows, self.batch, twice))
        if self.held is not None:
            size = args.per_device_eval_batch_size
            epochs = math.ceil(args.num_train_epochs) if args.max_steps <= 0 else 1
            times = epochs * math.ceil(len(self.held) / size)
            work.append(self._step("evaluation", "forward", self.held, size, times))
        return work

    def _mismatched(self) -> int:
        """Forwards without gradients that a step makes beside, over as many rows: KTO's z0 is estimated on prompts with
        other rows' replies, under the policy and under the reference."""
        return 2 if getattr(self.args, "loss_type", None) == "kto" else 0

    def _step(self, phase: str, step: Step, rows: AnyRows, count: int, times: float | None, *, passes: int = 1) -> Work:
        heaviest, typical = _batches(rows, count, self.job.seed)
        score = self.job.record.produces == _REWARD
        return Work(
            phase,
            step,
            self._batch(rows.sequences(heaviest), 0 if score else rows.scored(heaviest)),
            tuple(rows.sequences(typical)),
            0 if score else rows.scored(typical),
            times,
            passes=passes,
        )

    def _batch(self, sequences: Sequence[TokenIds], scored: int) -> Batch:
        return Batch.of(sequences, scored, packed=self.job.packed, device=self.place.device)

    def on_policy(self) -> list[Work]:
        """The work of a stage that samples its own rows."""
        policy, processes, iterations = self.job.record.on_policy, self.place.processes, self.iterations()
        assert policy is not None
        rollout = self._value("rollout_batch_size") // processes
        mini = rollout // self._value(policy.mini_batches)
        times = lambda each: None if iterations is None else iterations * each  # noqa: E731
        size = min(self.batch, mini)
        updates = times(self.epochs() * self._value(policy.mini_batches) * math.ceil(mini / size))
        passes = math.ceil(mini / size)
        work = [
            *([] if self.served else [self._rollout(rollout, lambda each: times(each * self.sampled_share()))]),
            *self._forwards(rollout, times),
            self._update("policy", size, updates, passes),
        ]
        if self.job.record.needs_teacher:
            # of another model it is taken to be like the base's, and to last longer by as much as it is larger
            update, held = work[-1], self._logits(work[-1].heaviest.scored)
            larger = 1.0 if self.teacher is None else self.teacher.decoder / self.size.decoder
            often = None if updates is None else updates * larger
            work[-1] = replace(update, holds=update.holds + held)
            work.append(replace(update, phase="teacher", step="forward", times=often, holds=held, passes=1))
        if self._value("value") == "separate":
            work.append(self._update("score", size, updates, passes))
        return work

    def sampled(self) -> list[Work]:
        """The work of a stage that samples rows: replies, and their scores."""
        n, known = self._value("n"), len(self.rows)
        replies = max(1, self._replies_in_all() // self.place.processes) if known else None
        at_once = self._value("batch_size") or self._rows_at_once()
        at_once = min(at_once, replies or at_once)
        count = math.ceil(at_once / n)
        order = sorted(range(known), key=lambda row: self.rows.lengths[row]) or [*range(count)]
        middle = max(0, (len(order) - count) // 2)
        parts = (order[-count:], order[middle : middle + count])
        longest, usual = ([row for row in self.rows.sequences(part) for _ in range(n)][:at_once] for part in parts)
        work = [self._decoding(longest, usual, replies or at_once, None if replies is None else 1)]
        if not self._reward_stages():
            return work
        full = [[*row, *[-1 - i] * self.new_tokens] for i, row in enumerate(longest)]
        rows = max(1, min(len(full), self._forward_tokens() // max(map(len, full))))
        typical = tuple(
            [*row, *[i] * t] for i, (row, t) in enumerate(zip(usual, self.replies(len(usual)), strict=True))
        )
        times = None if replies is None else math.ceil(replies / len(usual)) * self._reward_stages()
        return [*work, Work("scores", "forward", self._batch(full[:rows], 0), typical, 0, times)]

    def _replies_in_all(self) -> int:
        return len(self.rows) * self._value("n")

    def _taught_by_adapter(self) -> bool:
        """Whether the teacher is an adapter: of the base, or of one beside it."""
        return self.job.teacher is not None and self.job.teacher.adapter is not None

    def _reward_stages(self) -> int:
        return sum(each.kind == "stage" for each in self.job.rewards)

    def _rows_at_once(self) -> int:
        return rows_at_once(self.config, BYTES[self.job.dtype], self.rows.longest + self.new_tokens)

    def _rollout(self, rollout: int, times: Callable[[float], float | None]) -> Work:
        # without a number a GPU takes as many rows as its memory has room for; so many it should
        at_once = min(self._value("rollout_micro_batch_size") or self._rows_at_once(), rollout)
        prompts, typical = self._prompts(at_once)
        return self._decoding(prompts, typical, rollout, times(1))

    def _decoding(
        self, prompts: Sequence[TokenIds], typical: Sequence[TokenIds], replies: int, times: float | None
    ) -> Work:
        """So many replies, of which as many as there are prompts are drawn at once."""
        size, unit, cpu, at_once = self.size, BYTES[self.job.dtype], self.place.device == "cpu", len(prompts)
        width = max(map(len, prompts))
        columns = at_once * (width + self.new_tokens)
        holds = Counter(
            {
                # a divided base is whole while it decodes
                WEIGHTS: size.weight_bytes - self._weights(),
                MERGED: self._merged() if cpu else 0,
                CACHE: (columns + at_once * width) * size.kv_bytes,
                # raw, in fp32, and scaled
                LOGITS: at_once * size.vocabulary * (unit + 4 + 4),
                GRADIENTS: self.trained_parameters() * ADAPTER_BYTES,
            }
        )
        batch = self._batch(prompts, 0) if cpu else Batch.even(at_once, width, 0)
        decodes = Decodes(at_once, self.replies(replies), self.new_tokens)
        return Work("rollout", "prefill", batch, tuple(typical), 0, times, holds=holds, decodes=decodes)

    def _forwards(self, rollout: int, times: Callable[[float], float | None]) -> list[Work]:
        """The rollout's log-probs under policy and reference, its values, its scores."""
        tokens = self._forward_tokens()
        longest = max(map(len, self._prompts(rollout)[0]), default=0) + self.new_tokens
        batch, *_ = self._episodes(max(1, min(rollout, tokens // longest)))
        usual = math.ceil(sum(map(len, self._prompts(rollout)[0])) / rollout + self.reply)
        _, typical, scored, longer = self._episodes(count := max(1, min(rollout, tokens // usual)))
        calls = math.ceil(rollout / count)
        held = Counter({GRADIENTS: self.trained_parameters() * ADAPTER_BYTES})
        phase = "log-probs and scores"
        policies = Work(
            phase,
            "forward",
            batch,
            typical,
            scored,
            times((1 + self.refers()) * calls),
            False,
            holds=held,
            longer=longer,
        )
        scalars = self._reward_stages() + (self._value("value") == "separate")
        scores = replace(policies, heaviest=self._unscored(batch), scored=0, times=times(calls * scalars), trl=True)
        return [policies, *([scores] if scalars else [])]

    def _forward_tokens(self) -> int:
        place, size = self.place, self.size
        if place.device == "cpu" or place.memory is None:
            return TOKENS_PER_BATCH
        return tokens_in(place.memory, size.weight_bytes, self.config, self.job.torch_dtype())

    def _logits(self, scored: int) -> Parts:
        """Of the second matrix of logits that a comparison with a teacher makes, a chunk at a time."""
        return Counter({LOGITS: 4 * min(scored * self.size.vocabulary, 16 << 20)})

    def _update(self, step: Step, count: int, times: float | None, passes: int) -> Work:
        batch, typical, scored, longer = self._episodes(count)
        scored = scored if step == "policy" else 0
        batch = batch if scored else self._unscored(batch)
        separate = self._value("value") == "separate"
        # the other adapter's gradients wait for the optimiser
        held = Counter({GRADIENTS: self.size.adapter * ADAPTER_BYTES if separate else 0})
        return Work("update", step, batch, typical, scored, times, False, passes, held, longer)

    @staticmethod
    def _unscored(batch: Batch) -> Batch:
        return replace(batch, scored=0)

    def _prompts(self, count: int) -> tuple[list[TokenIds], list[TokenIds]]:
        """Prompts as long as those of a rollout may be, and usual ones; each as often as it is answered."""
        size, group = self._value("rollout_batch_size") // self.place.processes, self.group()
        drawn, _ = _batches(self.rows, max(1, size // group), self.job.seed)
        ordered = sorted([row for row in self.rows.sequences(drawn) for _ in range(group)], key=len)
        middle = max(0, (len(ordered) - count) // 2)
        return ordered[-count:], ordered[middle : middle + count]

    def _episodes(self, count: int) -> tuple[Batch, tuple[TokenIds, ...], int, float]:
        """The longest prompts of a rollout with replies as long as they may be; usual ones with usual replies, how many
        tokens these replies have, and by how much more tokens the rows had with the longest."""
        heaviest, typical = self._prompts(count)
        longest = [[*each, *[-1 - n] * self.new_tokens] for n, each in enumerate(heaviest)]
        lengths = self.replies(len(typical))
        usual = tuple([*each, *[n] * t] for n, (each, t) in enumerate(zip(typical, lengths, strict=True), start=3))
        more = len(lengths) * self.new_tokens - sum(lengths)
        longer = 1 + more / sum(map(len, usual))
        return self._batch(longest, len(longest) * self.new_tokens), usual, sum(lengths), longer


def _batches(rows: AnyRows, count: int, seed: int) -> tuple[list[int], list[int]]:
    """The heaviest batch of one shuffled pass over the rows, and the one that is nearest to the mean."""
    if not len(rows):
        return [*range(count)], [*range(count)]
    order = [*range(len(rows))]
    random.Random(seed).shuffle(order)
    batches = [order[start : start + count] for start in range(0, len(order), count)]
    full = [each for each in batches if len(each) == count] or batches
    weight = {i: sum(rows.lengths[row] for row in each) for i, each in enumerate(full)}
    mean = sum(weight.values()) / len(full)
    return full[max(weight, key=lambda i: weight[i])], full[min(weight, key=lambda i: abs(weight[i] - mean))]
