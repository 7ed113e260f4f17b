"""What a recipe will cost on a device, stage by stage, before anything is fetched, loaded or run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..recipes.build import base_dtype, folders, stage_job
from ..recipes.graph import order
from ..recipes.load import load_recipe
from ..recipes.schema import Recipe
from .output import Output, duration
from .process import make_functions_importable, quiet_libraries
from .validate import is_on_hub

if TYPE_CHECKING:
    from ..data.spec import DataSpec
    from ..models.calibration import Timed
    from ..models.cards import Card
    from ..models.outline import Outline
    from ..stages.costs import AnyRows, StageCost
    from ..stages.job import StageJob

_CARDS = (24, 48, 80)
"""GB of the cards that a plan speaks of."""
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
        return
    hidden = ("memory", "fits", "with", "devices")
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
            f"on {size} GB": "fits" if fits else row["with"][size] or "does not fit, by no single change"
            for size, fits in row["fits"].items()
        }


class _Plan:
    """A recipe's plan in the making: what its stages share."""

    def __init__(
        self, recipe: Recipe, output: Output, card: "Card | None", launch: Path | None, seconds: float
    ) -> None:
        import torch

        from ..models.outline import outline

        model = recipe.model
        if model.dtype == "auto":
            model.dtype = base_dtype(recipe) if card is None else "bfloat16" if card.bf16 else "float32"
        self.recipe, self.output, self.card = recipe, output, card
        self.outline: Outline = outline(model.base, model.revision, model.chat_template, model.template_date)
        self.processes, self.sharded = _launched(launch)
        self.seconds = seconds / len(recipe.stages)
        self.libraries = _libraries()
        self.has_gpu = torch.cuda.is_available()
        self.notes: list[str] = []
        self._rows: dict[tuple[str, str], tuple[AnyRows, AnyRows | None]] = {}
        self._machines: dict[str, Timed | None] = {}
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
        job = stage_job(recipe, name, Base(recipe.model.base, Path(), None, ""), run, run / name)
        rows, held = self.rows(name, job)
        costs = {device: self._cost(job, rows, held, device) for device in self._devices()}
        here = next(iter(costs.values()))
        gpu = costs.get("gpu", here)
        found = {size: _fits(gpu.peak[1], size) for size in _CARDS}
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
            "seconds": spent,
            "time": None if spent is None else duration(spent),
            "devices": self.processes,
            "memory": {
                device: {key: dict(parts) for key, parts in cost.phases.items()} for device, cost in costs.items()
            },
            "fits": found,
            "with": self._changes(job, rows, held, [size for size, fits in found.items() if not fits]),
        }

    def _devices(self) -> list[str]:
        """For which devices memory is counted: the one that will run first."""
        if self.card is not None or self.has_gpu or self.recipe.model.quantization is not None:
            return ["gpu"]
        return ["cpu", "gpu"]

    def _cost(self, job: "StageJob", rows: "AnyRows", held: "AnyRows | None", device: str) -> "StageCost":
        from ..stages.costs import Place, stage_cost

        if self.sharded and job.record.on_policy is not None:
            said = "the base is to be sharded, but an on-policy stage keeps a whole frozen base on each device"
            raise UserError("--launch", said, "launch with distributed_type MULTI_GPU or MULTI_CPU")
        cpu = device == "cpu"
        memory = None if self.card is None else self.card.gigabytes * 10**9
        place = Place("cpu" if cpu else "cuda", self.processes, self.sharded, self.libraries if cpu else 0, memory)
        cost = stage_cost(job, self.outline.config, rows, held, place, self._reply(job))
        if cost.approximate is not None:
            note = f"{job.name}: activations by a rule of thumb, its model cannot be rehearsed ({cost.approximate})"
            self.notes += [note] if note not in self.notes else []
        return cost

    def _changes(
        self, job: "StageJob", rows: "AnyRows", held: "AnyRows | None", sizes: Sequence[int]
    ) -> dict[int, str | None]:
        """For each card that is too small, the first single change with which it would not be."""
        found: dict[int, str | None] = dict.fromkeys(sizes)
        for words, changed in _changes(job) if sizes else ():
            try:
                peak = self._cost(changed, rows, held, "gpu").peak[1]
            except UserError:
                continue
            for size in sizes:
                if found[size] is None and _fits(peak, size):
                    found[size] = f"{words}: {peak / 1e9:.1f} GB"
            if all(found.values()):
                break
        return found

    # --- rows -----------------------------------------------------------------------------------------------------

    def rows(self, name: str, job: "StageJob") -> "tuple[AnyRows, AnyRows | None]":
        """The rows of a stage in tokens: to train on, and held out."""
        key = (self.recipe.stages[name].data, job.record.rows)
        if key not in self._rows:
            self._rows[key] = self._read(key[0], job)
        return self._rows[key]

    def _read(self, entry: str, job: "StageJob") -> "tuple[AnyRows, AnyRows | None]":
        from ..data.encode import encode_rows
        from ..data.load import load_rows
        from ..data.split import split_rows
        from ..models.tiny import byte_tokenizer
        from ..stages.costs import AssumedRows, Rows

        spec, kind = job.data, job.record.rows
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
        made = [Rows(encode_rows(kind, part, tokenizer, spec)[0], kind, every) if part else None for part in parts]
        assert made[0] is not None
        on_policy = job.record.on_policy is not None
        return made[0], None if on_policy else made[1]

    def _reply(self, job: "StageJob") -> int | None:
        """How long a sampled reply is expected to be: as those that its policy was taught."""
        if job.record.on_policy is None:
            return None
        name = self.recipe.stages[job.name].parent
        while name in self.recipe.stages:
            stage = self.recipe.stages[name]
            rows = self._rows.get((stage.data, "demo"), (None, None))[0]
            if stage.record.rows == "demo" and rows is not None and rows.known and len(rows):
                return max(1, round(rows.scored(range(len(rows))) / len(rows)))
            name = stage.parent
        return None

    # --- time -----------------------------------------------------------------------------------------------------

    def _time(self, job: "StageJob", cost: "StageCost") -> float | None:
        from ..models.cost import sizes
        from ..stages.times import card_seconds, measured_seconds

        if self.card is not None:
            size = sizes(self.outline.config, job.lora, job.dtype, job.quantization)
            return card_seconds(job, cost, size, self.card, self.processes)
        timed = self._timed(job)
        return None if timed is None else measured_seconds(cost, timed, self.seconds)

    def _timed(self, job: "StageJob") -> "Timed | None":
        """This machine with a few of the base's layers; None, and a note, where it cannot be measured."""
        import torch

        from ..models.calibration import Machine, Timed

        if not self.seconds or (job.quantization is not None and not self.has_gpu):
            return None
        device = torch.device("cuda" if self.has_gpu else "cpu")
        machine = Machine(self.outline.config, job.lora, job.torch_dtype(), device, job.packed)
        key = repr(job.lora)
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


def _fits(peak: int, gigabytes: int) -> bool:
    from ..models.cards import room

    return peak <= room(gigabytes * 10**9)


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
    if (at_once := job.method_value("rollout_micro_batch_size")) is not None:
        for size in (at_once // 2, at_once // 4, at_once // 8):
            if size:
                method = {**job.method, "rollout_micro_batch_size": size}
                yield f"{here}.rollout_micro_batch_size={size}", replace(job, method=method)
    if job.quantization is None:
        yield "model.quantization=4bit", replace(job, quantization="4bit")
    if job.method_value("value") == "separate":
        yield f"{here}.value=shared", replace(job, method={**job.method, "value": "shared"})


def _with(job: "StageJob", **train: Any) -> "StageJob":
    return replace(job, train={**job.train, **train})
