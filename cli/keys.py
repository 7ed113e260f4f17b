"""Cache keys: everything that can change a step's result, by name, and the hash of it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.overlap import PromptSet, overlap_words, overlaps
from ..data.report import DataReport
from ..data.spec import DataSpec, RowKind
from ..eval.judges.kinds import judge_parts
from ..models.fingerprints import code_sha256, content, folder_sha256
from ..recipes.build import base_dtype, data_spec, data_values, folders, lora_values, reward_stages
from ..recipes.graph import parents
from ..recipes.schema import BASE, Benchmarks, Lora, Recipe, Reward, Teacher
from ..stages.kinds import source_file
from ..stages.scorers.kinds import KINDS as SCORERS
from ..stages.serving.settings import IDLE as SERVER

if TYPE_CHECKING:
    from ..models.base import Base

FORMAT = 1
"""Raise it when the same recipe must give another result: every stage of every run is then run again."""

EVAL_FORMAT = 3
"""The same for the evaluation alone: raise it when the same recipe must write more or other numbers."""

_SHOWN = 3

_IDLE = frozenset(
    f"train.{name}"
    for name in (
        *("logging_steps", "logging_strategy", "logging_first_step", "log_on_each_node", "log_level"),
        *("log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
        *("trackio_bucket_id", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    )
) | {"log_samples_every", "num_log_samples", "batch_size", *SERVER}
"""What says how a stage is shown or fed, and changes no number that comes out of it."""

_SAVING = frozenset({"train.save_strategy", "train.save_steps", "train.save_total_limit"})
"""The same, unless the best of the checkpoints is what comes out."""


def counted(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that can change a result: those that only show or save it are left out, whoever wrote them."""
    best = bool(parts.get("train.load_best_model_at_end")) or parts.get("early_stopping_patience") is not None
    idle = _IDLE if best else _IDLE | _SAVING
    return {name: value for name, value in parts.items() if name not in idle}


def _adapter(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of an adapter, without what came later and says nothing: runs of before keep their keys."""
    first = ("r", "alpha", "dropout", "target_modules", "use_rslora")
    fields = {name: each.get_default(call_default_factory=True) for name, each in Lora.model_fields.items()}
    return {name: value for name, value in values.items() if name in first or value != fields[name]}


def key_of(parts: Mapping[str, object]) -> str:
    """sha256 of the parts in any order; 1 and 1.0 count as the same number."""
    return hashlib.sha256(json.dumps(_plain(parts), sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Keys:
    """The parts of each step's key in one run. Data are read once for each kind of rows."""

    def __init__(self, recipe: Recipe, base: "Base", run_dir: Path) -> None:
        self.recipe, self.base, self.run_dir = recipe, base, run_dir
        self._fingerprints: dict[tuple[str, RowKind], str] = {}
        self._prompts: dict[tuple[str, RowKind], PromptSet] = {}

    def read_data(self, stages: Iterable[str], *, evaluation: bool) -> None:
        """Read the data of these stages and of the evaluation: a bad file is found before the first stage trains."""
        for name in stages:
            stage = self.recipe.stages[name]
            if self.recipe.data[stage.data].stage is None:  # else they are not there before their stage has run
                self.fingerprint(data_spec(self.recipe.data[stage.data], self.recipe.seed), stage.rows)
        if evaluation and self.recipe.eval is not None:
            self.fingerprint(data_spec(self.recipe.eval.prompts, self.recipe.seed), "prompt")

    def evaluated_in_training(self) -> list[str]:
        """In words, for each training data that was read: how many evaluation prompts stand in it, if any do."""
        part = self.recipe.eval
        evaluated = None if part is None else self._prompts.get(self._known(data_spec(part.prompts, self.recipe.seed)))
        if evaluated is None:
            return []
        trained: dict[str, list[PromptSet]] = {}
        for stage in self.recipe.stages.values():
            known = self._known(data_spec(self.recipe.data[stage.data], self.recipe.seed), stage.rows)
            if known in self._prompts:
                trained.setdefault(stage.data, []).append(self._prompts[known])
        return [overlap_words(name, tally, evaluated) for name, tally in overlaps(evaluated, trained).items()]

    def stage(self, name: str, known: Mapping[str, str], from_adapter: Path | None = None) -> dict[str, Any]:
        """What the stage's result depends on.

        Args:
            known: the keys of the stages that it needs.
            from_adapter: an adapter folder that it starts from instead of its parent.
        """
        recipe, stage = self.recipe, self.recipe.stages[name]
        spec = data_spec(recipe.data[stage.data], recipe.seed)
        parts = {
            **self._model(),
            "kind": stage.record.name,
            "seed": recipe.seed if stage.seed is None else stage.seed,
            **(_flat("lora", _adapter(lora_values(recipe, name))) if stage.record.adapts else {}),
            **({"full": True} if stage.full else {}),
            **stage.method(),
            **({} if stage.on_nonfinite in (None, "stop") else {"on_nonfinite": stage.on_nonfinite}),
            **_flat("train", stage.train),
            **_flat("data", data_values(spec)),
        }
        # sampled rows are what their stage made, which is among the parents
        if recipe.data[stage.data].stage is None:
            parts[f"data {stage.data}"] = self.fingerprint(spec, stage.rows)
        for parent in parents(recipe, name):
            if not (from_adapter is not None and parent == stage.parent):
                parts |= {f"stage {parent}": known[parent], f"adapter {parent}": content(self.run_dir / parent)}
        if (outside := from_adapter or stage.imports) is not None:
            parts["from_adapter"] = content(outside)
        elif stage.parent == BASE:
            parts["from"] = BASE
        for index, source in enumerate(stage.rewards):
            parts |= self._reward(index, source)
        parts |= {} if stage.taught_by is None else self._teacher(stage.taught_by)
        if (method := source_file(stage.kind)) is not None:
            parts[f"code of {stage.record.name}"] = hashlib.sha256(method.read_bytes()).hexdigest()
        return counted(parts)

    @staticmethod
    def _reward(index: int, source: Reward) -> dict[str, Any]:
        """What a source's scores depend on: its words, and the code and files that they name."""
        said = source.model_dump(exclude_none=True)
        kind = SCORERS.get(source.scorer or "")
        parts = _flat(f"reward.{index}", said if kind is None else kind.counted(said))
        if source.function is not None:
            parts[f"code of {source.function}"] = code_sha256(source.function)
        if kind is not None and kind.name == "model" and source.model is not None and Path(source.model).is_dir():
            parts[f"files of {source.model}"] = folder_sha256(Path(source.model))
        if isinstance(adapter := said.get("adapter"), str):
            parts[f"files of {adapter}"] = content(Path(adapter).expanduser())
        return parts

    @staticmethod
    def _teacher(teacher: Teacher) -> dict[str, Any]:
        """What a teacher from outside the run says depends on; a stage of it is among the parents."""
        parts = _flat("teacher", teacher.model_dump(exclude_none=True))
        if teacher.adapter is not None:
            parts[f"files of {teacher.adapter}"] = content(Path(teacher.adapter).expanduser())
        elif teacher.model is not None and (folder := Path(teacher.model).expanduser()).is_dir():
            parts[f"files of {teacher.model}"] = folder_sha256(folder)
        return parts

    def evaluation(self, known: Mapping[str, str]) -> dict[str, Any]:
        """What the evaluation's result depends on: its part of the recipe, and the stages that it looks at."""
        part = self.recipe.eval
        assert part is not None
        spec = data_spec(part.prompts, self.recipe.seed)
        values = part.model_dump(exclude={"prompts", "batch_size", "over_optimisation", "benchmarks"})
        if values["beams"] in (None, 1):
            del values["beams"]
        # who draws changes the draws; where it is asked does not
        rollout = values.pop("rollout")
        values |= {} if rollout is None else {"rollout.engine": rollout["engine"]}
        over = part.over_optimisation
        parts = {
            **self._model(),
            "eval.format": EVAL_FORMAT,
            **_flat("eval", values),
            **({} if over is None else _flat("eval.over_optimisation", over.model_dump())),
            **({} if part.benchmarks is None else _benchmark_parts(part.benchmarks)),
            "eval.seed": self.recipe.seed if part.seed is None else part.seed,
            **_flat("prompts", data_values(spec)),
            "data prompts": self.fingerprint(spec, "prompt"),
        }
        for name in eval_needs(self.recipe):
            parts |= {f"stage {name}": known[name], f"adapter {name}": content(self.run_dir / name)}
        for judge in part.judges:
            parts |= judge_parts(judge, self.run_dir)
        return parts

    def fingerprint(self, spec: DataSpec, kind: RowKind) -> str:
        """The hash of the rows' content, independent of where they were read from."""
        from ..data.load import stream_rows
        from ..data.rows import Fingerprint

        known = self._known(spec, kind)
        if known not in self._fingerprints:
            part = self.recipe.eval
            evaluated = part is not None and spec == data_spec(part.prompts, self.recipe.seed)
            content, prompts = Fingerprint(), PromptSet(spec, named=evaluated)
            for row in stream_rows(spec, kind, folders(self.recipe), DataReport(), self._place(spec)):
                content.add(row)
                prompts.add(row)
            self._fingerprints[known], self._prompts[known] = content.hexdigest(), prompts
        return self._fingerprints[known]

    def _place(self, spec: DataSpec) -> str | None:
        """Which entry of the recipe that is."""
        named = (name for name, each in self.recipe.data.items() if data_spec(each, self.recipe.seed) == spec)
        return next((f"data.{name}" for name in named), None)

    @staticmethod
    def _known(spec: DataSpec, kind: RowKind = "prompt") -> tuple[str, RowKind]:
        return repr(spec), kind

    def _model(self) -> dict[str, Any]:
        model = self.recipe.model
        template = model.chat_template
        if template is not None and "{" not in template and Path(template).is_file():
            template = hashlib.sha256(Path(template).read_bytes()).hexdigest()
        return {
            "format": FORMAT,
            "base": self.base.sha256,
            "model.dtype": base_dtype(self.recipe),
            "model.quantization": model.quantization,
            "model.chat_template": template,
            **({} if model.template_date is None else {"model.template_date": str(model.template_date)}),
            "model.packed": model.packed,
            **({"deterministic": True} if self.recipe.deterministic else {}),
        }


def _benchmark_parts(asked: Benchmarks) -> dict[str, Any]:
    """The tasks, with the files that lie beside those of a folder of one's own."""
    folder = None if asked.include_path is None else Path(asked.include_path)
    named = [Path(each) for each in asked.tasks if Path(each).is_file()]
    files = sorted([*named, *(each for each in (folder.rglob("*") if folder else ()) if each.is_file())])
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.suffix != ".pyc"]
    return {**_flat("eval.benchmarks", asked.model_dump()), "files of benchmarks": hashes}


def idle_settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """What the recipe says for a stage and `counted` leaves out of its key."""
    said = recipe.stages[name].method() | _flat("train", recipe.stages[name].train)
    kept = counted(said)
    return {each: value for each, value in said.items() if each not in kept}


def eval_needs(recipe: Recipe) -> list[str]:
    """The stages that the evaluation looks at: policies, reference, reward judges, reward models that it measures.

    A stage's key holds those of its parents and its data, so what is measured on that data is covered as well.
    """
    part = recipe.eval
    if part is None:
        return []
    judges = [judge["stage"] for judge in part.judges if "stage" in judge]
    named = dict.fromkeys([*part.policies, part.reference, *judges, *reward_stages(recipe, left_out=True)])
    if part.over_optimisation is not None:
        # the policies on the way to it follow from its key, and so does where it started
        named |= dict.fromkeys([part.over_optimisation.policy or BASE])
    return [name for name in named if name != BASE]


def difference(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Which parts differ, in words, such as `beta 0.1 -> 0.2, the rows of pairs`."""
    # as they come back from JSON
    new = json.loads(json.dumps(new, default=str))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    stages = {name.partition(" ")[2] for name in changed if name.startswith(("stage ", "adapter "))}
    said = [_words(name, old, new) for name in changed if not name.startswith(("stage ", "adapter "))]
    said += [f"stage {name}" for name in sorted(stages)]
    more = [f"{len(said) - _SHOWN} more"] if len(said) > _SHOWN else []
    return ", ".join([*said[:_SHOWN], *more])


def _words(name: str, old: Mapping[str, object], new: Mapping[str, object]) -> str:
    if name.startswith("data "):
        return f"the rows of {name.partition(' ')[2]}"
    if name in ("base", "from_adapter") or name.startswith(("code of ", "files of ")):
        return name
    return f"{name} {_short(old.get(name))} -> {_short(new.get(name))}"


def _short(value: object) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}
