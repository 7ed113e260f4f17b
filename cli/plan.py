"""What a recipe will cost on a device, stage by stage, before anything is fetched, loaded or run."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..progress import duration
from ..recipes.build import base_dtype, folders, stage_job
from ..recipes.expansion import expansion_words
from ..recipes.graph import order
from ..recipes.load import load_recipe
from ..recipes.schema import Recipe
from ..stages.sample.settings import ALL, THRESHOLD
from .output import Output
from .process import make_functions_importable, quiet_libraries
from .validate import is_on_hub

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

    from ..data.rows import Row
    from ..data.spec import DataSpec
    from ..models.calibration import Timed
    from ..models.cards import Card
    from ..models.outline import Outline
    from ..stages.costs import AnyRows, StageCost
    from ..stages.job import StageJob
    from ..stages.times import Seconds

_CARDS = (24, 48, 80)
"""GB of the cards that a plan speaks of; each is taken to have 10^9 bytes a GB, as the smallest that are sold so do."""
_BYTES_A_TOKEN = 4
"""Of text in a base whose tokenizer is not there."""


def plan_recipe(
    recipe: str,
    overrides: Sequence[str],
    output: Output,
    *,
    card: str | None = None,
    launch: Path | None = None,
    seconds: float = 10.0,
) -> None:
    """`preftune plan`: memory by phase and part, FLOPs, disk and time of every stage, from the base's config alone.

    Args:
        card: the name of a GPU, by whose published figures times are estimated; None: this machine, which is measured.
        launch: an accelerate config: on how many devices, and whether the base is divided among them.
        seconds: at most so long this machine is measured; 0: not at all.

    Raises:
        UserError: the recipe, its data, the card or the config cannot be used.
    """
    loaded = load_recipe(recipe, overrides)
    for words in expansion_words(loaded.expanded):
        output.say(words)
    make_functions_importable(loaded)
    quiet_libraries()
    from ..models.cards import card_named

    with loaded.placing():
        found = card_named(card) if card is not None else None
        plan = _Plan(loaded, output, found, launch, seconds)
        rows = [plan.stage(name) for name in order(loaded)]
    output.say(plan.about())
    if output.json:
        output.rows(rows)
    else:
        hidden = ("memory", "fits", "with", "devices", "seconds at most")
        output.rows([{key: value for key, value in row.items() if key not in hidden} for row in rows])
        output.rows(_memory_rows(rows))
        output.rows(_fit_rows(rows))
    for line in plan.notes:
        output.say(line)


def _memory_rows(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        for device, phases in row["memory"].items():
            for phase, parts in phases.items():
                found = {name: size / 1e9 for name, size in parts.items() if size >= 5e6}
                yield {
                    "stage": row["stage"],
                    "GB on": device,
                    "phase": phase,
                    "in all": sum(parts.values()) / 1e9,
                } | found


def _fit_rows(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {"stage": row["stage"]} | {
            f"on {name} GB" if name.isdigit() else f"on {name}": (
                "fits" if fits else row["with"][name] or "does not fit, by no single change"
            )
            for name, fits in row["fits"].items()
        }


class _Plan:
    """A recipe's plan in the making: what its stages share."""

    def __init__(
        self, recipe: Recipe, output: Output, card: "Card | None", launch: Path | None, seconds: float
    ) -> None:
        import torch

        from ..models.cards import room
        from ..models.outline import outline

        model = recipe.model
        if model.dtype == "auto":
            model.dtype = base_dtype(recipe) if card is None else "bfloat16" if card.bf16 else "float32"
        self.recipe, self.output, self.card = recipe, output, card
        self.outline: Outline = outline(recipe.base_spec, model.revision, model.chat_template, model.template_date)
        self.processes, self.sharded = _launched(launch)
        self.seconds = seconds / len(recipe.stages)
        self.libraries = _libraries()
        self.has_gpu = torch.cuda.is_available()
        self.cards = {str(size): room(size * 10**9) for size in _CARDS}
        if card is not None:
            self.cards[card.name] = room(card.memory)
        self.notes: list[str] = [self._times_in_words()] if seconds or card else []
        self._rows: dict[tuple[str, str], tuple[AnyRows, AnyRows | None]] = {}
        self._machines: dict[str, Timed | None] = {}
        self._teachers: dict[str, PreTrainedConfig | None] = {}
        self._compiled = 0
        if self.outline.tokenizer is None:
            self.notes.append(f"{model.base} has no tokenizer: a token is taken to be {_BYTES_A_TOKEN} bytes of text")

    def about(self) -> str:
        """One line on the base."""
        from ..models.cost import sizes
        from ..recipes.build import lora_spec

        model = self.recipe.model
        found = sizes(
            self.outline.config, lora_spec(self.recipe, next(iter(self.recipe.stages))), model.dtype, model.quantization
        )
        held = model.dtype if model.quantization is None else f"{model.quantization} and {model.dtype}"
        return (
            f"{model.base}: {found.parameters / 1e6:.0f} M parameters, {found.weight_bytes / 1e9:.2f} GB in {held}; "
            f"{self.processes} {'process' if self.processes == 1 else 'processes'}"
        )

    def stage(self, name: str) -> dict[str, Any]:
        """One stage's row."""
        from ..models.base import Base

        recipe = self.recipe
        stage = recipe.stages[name]
        run = Path("runs") / recipe.name
        job = stage_job(recipe, name, Base(recipe.base_spec, Path(), None, "", self.outline.added), run, run / name)
        rows, held = self.rows(name, job)
        costs = {device: self._cost(job, rows, held, device) for device in self._devices()}
        here = next(iter(costs.values()))
        if self.processes == 1:  # else each stage has processes of its own
            self._compiled += here.compiled
        gpu = costs.get("gpu", here)
        found = {name: gpu.peak[1] <= space for name, space in self.cards.items()}
        if gpu.paged:
            self._note(
                f"{name}: {gpu.paged / 1e9:.1f} GB of optimiser are paged: not counted, because they leave for the "
                "machine's memory when a GPU has no room for them"
            )
        if (engine := job.method_value("rollout_engine")) is not None:
            self._note(f"{name}: {engine} draws its replies, in memory and time of its own that are not counted")
        spent = self._time(job, here)
        return {
            "stage": name,
            "from": stage.parent,
            "rows": here.rows,
            "tokens": here.tokens,
            "longest": here.longest,
            "steps": here.steps,
            "trained parameters": here.trained,
            "PFLOP": None if here.flops is None else here.flops / 1e15,
            "disk GB": here.disk / 1e9,
            "memory GB": here.peak[1] / 1e9,
            "at": here.peak[0],
            "seconds": None if spent is None else spent.expected,
            "seconds at most": None if spent is None else spent.most,
            "time": None if spent is None else _range(spent),
            "devices": self.processes,
            "memory": {
                device: {key: dict(parts) for key, parts in cost.phases.items()} for device, cost in costs.items()
            },
            "fits": found,
            "with": self._changes(job, rows, held, [size for size, fits in found.items() if not fits]),
        }

    def _note(self, line: str) -> None:
        self.notes += [line] if line not in self.notes else []

    def _devices(self) -> list[str]:
        """For which devices memory is counted: the one that will run first."""
        if self.card is not None or self.has_gpu:
            return ["gpu"]
        return ["cpu", "gpu"]

    def _cost(self, job: "StageJob", rows: "AnyRows", held: "AnyRows | None", device: str) -> "StageCost":
        from ..stages.activations import cost_if_kept, says_which
        from ..stages.costs import Place, stage_cost

        cpu = device == "cpu"
        memory = None if self.card is None else self.card.memory
        place = Place(
            "cpu" if cpu else "cuda", self.processes, self.sharded, self.libraries if cpu else 0, memory, self._compiled
        )
        asked = (self.outline.config, rows, held, place, self._replies(job)[1], self._teacher(job))
        cost = None if memory is None or says_which(job) else cost_if_kept(job, *asked)
        if cost is not None:
            return cost
        cost = stage_cost(job, *asked)
        if cost.approximate is not None:
            self._note(
                f"{job.name}: activations by a rule of thumb, its model cannot be rehearsed ({cost.approximate})"
            )
        return cost

    def _teacher(self, job: "StageJob") -> "PreTrainedConfig | None":
        """The config of the model that a stage loads beside the base to learn from; None where it loads none."""
        if job.teacher is None:
            return None
        if job.name not in self._teachers:
            found = job.teacher.outline(job.base)
            self._teachers[job.name] = None if found is None else found.config
        return self._teachers[job.name]

    def _changes(
        self, job: "StageJob", rows: "AnyRows", held: "AnyRows | None", names: Sequence[str]
    ) -> dict[str, str | None]:
        """For each card that is too small, the first single change with which it would not be."""
        found: dict[str, str | None] = dict.fromkeys(names)
        for words, changed in _changes(job) if names else ():
            try:
                peak = self._cost(changed, rows, held, "gpu").peak[1]
            except UserError:
                continue
            for name in names:
                if found[name] is None and peak <= self.cards[name]:
                    found[name] = f"{words}: {peak / 1e9:.1f} GB"
            if all(found.values()):
                break
        return found

    # --- rows -----------------------------------------------------------------------------------------------------

    def rows(self, name: str, job: "StageJob") -> "tuple[AnyRows, AnyRows | None]":
        """The rows of a stage in tokens: to train on, and held out."""
        # of demonstrations a stage that draws reads the prompts
        key = (self.recipe.stages[name].data, f"{job.rows}, {'prompts' if job.record.draws else 'whole'}")
        if key not in self._rows:
            source = self.recipe.data[key[0]].stage
            self._rows[key] = self._read(key[0], job) if source is None else self._sampled(key[0], source, job)
        return self._rows[key]

    def _sampled(self, entry: str, source: str, job: "StageJob") -> "tuple[AnyRows, AnyRows | None]":
        """Rows that are not there yet: at most as many as their stage may keep, each as long as it may be."""
        from ..stages.costs import AssumedRows

        recipe, spec, kind = self.recipe, job.data, job.rows
        run = Path("runs") / recipe.name
        sampling = stage_job(recipe, source, job.base, run, run / source)
        prompts = self.rows(source, sampling)[0]
        longest = min(prompts.longest + sampling.method_value("max_new_tokens"), spec.max_length or sys.maxsize)
        several = sampling.method_value("keep") in (ALL, THRESHOLD)
        count = len(prompts) * (sampling.method_value("n") if several else 1)
        # a pair is two labelled replies
        count *= 2 if kind == "label" and not several else 1
        count = min(count, spec.limit or count)
        self._note(
            f"data.{entry}: {source} has not sampled its rows yet: taken to be {count or 'of unknown number'}, and "
            f"{longest} tokens long each, at most"
        )
        held = round(count * spec.held_out)
        return AssumedRows(count - held, longest, kind), AssumedRows(held, longest, kind) if held else None

    def _read(self, entry: str, job: "StageJob") -> "tuple[AnyRows, AnyRows | None]":
        from ..data.encode import encode_replies, encode_rows
        from ..data.load import load_rows
        from ..data.split import split_rows
        from ..models.tiny import byte_tokenizer
        from ..stages.costs import AssumedRows, Rows

        spec, kind = job.data, job.rows
        away = [source.path for source in spec.sources if is_on_hub(self.recipe, source.path)]
        try:
            loaded = load_rows(spec, kind, folders(self.recipe))
        except UserError as error:
            if not away or "from the hub" not in error.problem:
                raise
            longest = (spec.max_prompt_length if kind == "prompt" else None) or spec.max_length or 1024
            self.notes.append(
                f"data.{entry}: {', '.join(away)} cannot be reached: its rows are taken to be {longest} tokens long, "
                "and how many there are is not known"
            )
            rows = AssumedRows(spec.limit or 0, longest, kind)
            return rows, rows if spec.held_out else None
        tokenizer, every = self.outline.tokenizer or byte_tokenizer(), 1
        if self.outline.tokenizer is None:
            every, spec = _BYTES_A_TOKEN, _longer(spec, _BYTES_A_TOKEN)
        parts = split_rows(loaded.rows, spec.held_out, spec.seed)
        prompts = job.record.draws and kind == "demo"
        shape = "prompt" if prompts else kind

        def encoded(rows: "list[Row]") -> "Dataset":
            return (encode_replies(rows, tokenizer, spec) if prompts else encode_rows(kind, rows, tokenizer, spec))[0]

        made = [Rows(encoded(part), shape, every) if part else None for part in parts]
        assert made[0] is not None
        return made[0], None if job.record.draws else made[1]

    def _replies(self, job: "StageJob") -> "tuple[str, Sequence[int]]":
        """How long sampled replies are expected to be: as those that their policy was taught, of which data entry."""
        name = self.recipe.stages[job.name].parent
        while job.record.draws and name in self.recipe.stages:
            stage = self.recipe.stages[name]
            rows = self._rows.get((stage.data, "demo, whole"), (None, None))[0]
            if stage.record.rows == "demo" and rows is not None and rows.known and len(rows):
                return stage.data, [max(1, rows.scored([row])) for row in range(len(rows))]
            name = stage.parent
        return "", ()

    # --- time -----------------------------------------------------------------------------------------------------

    def _times_in_words(self) -> str:
        from ..models.cards import DECODING_SHARE, TRAINING_SHARE

        if self.card is None:
            return (
                "times: of the training loops alone, from steps of a few layers of this base, timed on this machine now"
            )
        return (
            f"times: of the training loops alone, by the published figures of {self.card.name}, of whose rate "
            f"{TRAINING_SHARE:.0%} are taken to be reached in training and of whose bandwidth {DECODING_SHARE:.0%} in "
            "sampling. These shares are assumed; no card was measured"
        )

    def _time(self, job: "StageJob", cost: "StageCost") -> "Seconds | None":
        from ..models.cost import sizes
        from ..stages.times import card_seconds, measured_seconds

        if self.card is not None:
            size = sizes(self.outline.config, job.lora, job.dtype, job.quantization)
            found = card_seconds(job, cost, size, self.card, self.processes)
        else:
            timed = self._timed(job)
            found = None if timed is None else measured_seconds(cost, timed, self.seconds)
        if found is not None and job.record.draws:
            self._note(f"{job.name}: {self._lengths_in_words(job)}")
        return found

    def _lengths_in_words(self, job: "StageJob") -> str:
        entry, lengths = self._replies(job)
        most = job.method_value("max_new_tokens")
        if not lengths:
            return f"how long replies will be is not known: its time is an upper bound, for {most} tokens each"
        mean = sum(min(each, most) for each in lengths) / len(lengths)
        return (
            f"replies are taken to be as long as those of data.{entry}, {mean:.0f} tokens on average; "
            f"its time at most is for {most} tokens each"
        )

    def _timed(self, job: "StageJob") -> "Timed | None":
        """This machine with a few of the base's layers; None, and a note, where it cannot be measured."""
        import torch

        from ..models.calibration import Machine, Timed

        if not self.seconds or (job.quantization is not None and find_spec("bitsandbytes") is None):
            return None
        device = torch.device("cuda" if self.has_gpu else "cpu")
        machine = Machine(
            self.outline.config, job.lora, job.torch_dtype(), device, job.packed, job.quantization, job.full
        )
        key = "all weights" if job.full else repr(job.lora)
        if key not in self._machines:
            try:
                self._machines[key] = Timed(machine)
            except MemoryError as error:
                self.notes.append(f"no time: {error}; name a GPU with --card")
                self._machines[key] = None
        return self._machines[key]


def _longer(spec: "DataSpec", factor: int) -> "DataSpec":
    def times(tokens: int | None) -> int | None:
        return None if tokens is None else tokens * factor

    return replace(spec, max_length=times(spec.max_length), max_prompt_length=times(spec.max_prompt_length))


def _range(spent: "Seconds") -> str:
    """In words; an upper bound beside it where replies may be longer than they are expected to be."""
    expected = duration(spent.expected)
    return expected if spent.most <= spent.expected else f"{expected} (at most {duration(spent.most)})"


def _libraries() -> int:
    """Bytes that a process of the chain holds before it has loaded anything: what this one does, with all imported."""
    from ..models.memory import resident_bytes
    from ..stages.kinds import KINDS

    for kind in KINDS.values():
        kind.runner()
    return resident_bytes()


def _launched(config: Path | None) -> tuple[int, bool]:
    """(processes, whether the base is divided among them) of an accelerate config."""
    if config is None:
        return 1, False
    from .launch import check_launch, is_sharded, processes_of

    check_launch(config)
    return processes_of(config), is_sharded(config)


def _changes(job: "StageJob") -> "Iterator[tuple[str, StageJob]]":
    """Single changes that need less memory, those that change no result first: in words, and made."""
    here = f"stages.{job.name}"
    if not job.record.trains:
        yield from _sampling_changes(job)
        return
    asked = job.train.get("gradient_checkpointing", job.train.get("activation_checkpointing"))
    if not asked:
        yield f"{here}.train.gradient_checkpointing=true", _with(job, gradient_checkpointing=True)
    batch = job.train.get("per_device_train_batch_size", job.record.defaults.get("per_device_train_batch_size", 8))
    steps = job.train.get("gradient_accumulation_steps", 1)
    for size in (batch // 2, batch // 4, batch // 8):
        if size < 1 or batch % size:
            continue
        words, changed = f"{here}.train.per_device_train_batch_size={size}", {"per_device_train_batch_size": size}
        if job.record.on_policy is None:
            words += f" {here}.train.gradient_accumulation_steps={steps * batch // size}"
            changed["gradient_accumulation_steps"] = steps * batch // size
        yield words, _with(job, **changed)
    if job.data.held_out and job.train.get("per_device_eval_batch_size") != 1:
        yield f"{here}.train.per_device_eval_batch_size=1", _with(job, per_device_eval_batch_size=1)
    if "optim" not in job.train:
        yield f"{here}.train.optim=paged_adamw_32bit", _with(job, optim="paged_adamw_32bit")
    if (at_once := job.method_value("rollout_micro_batch_size")) is not None:
        for size in (at_once // 2, at_once // 4, at_once // 8):
            if size:
                method = {**job.method, "rollout_micro_batch_size": size}
                yield f"{here}.rollout_micro_batch_size={size}", replace(job, method=method)
    if job.quantization is None and not job.full:
        yield "model.quantization=4bit", replace(job, quantization="4bit")
    if job.method_value("value") == "separate":
        yield f"{here}.value=shared", replace(job, method={**job.method, "value": "shared"})


def _sampling_changes(job: "StageJob") -> "Iterator[tuple[str, StageJob]]":
    at_once = job.method_value("batch_size") or 32
    for size in (at_once // 2, at_once // 4, at_once // 8):
        if size:
            yield f"stages.{job.name}.batch_size={size}", replace(job, method={**job.method, "batch_size": size})
    if job.quantization is None:
        yield "model.quantization=4bit", replace(job, quantization="4bit")


def _with(job: "StageJob", **train: Any) -> "StageJob":
    return replace(job, train={**job.train, **train})
