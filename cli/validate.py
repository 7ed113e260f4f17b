"""A recipe and its data, checked as the chain would check them, without training anything."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.overlap import PromptSet, overlap_words, overlaps
from ..data.report import DataReport
from ..data.spec import RowKind
from ..data.split import check_sides
from ..errors import UserError, gathering, nearest, raise_found
from ..recipes.build import base_dtype, data_spec, eval_spec, folders, stage_job
from ..recipes.expansion import expansion_words
from ..recipes.graph import lines_of_descent, order, unused_stages
from ..recipes.load import load_recipe
from ..recipes.schema import Data, Recipe
from ..stages.scorers.kinds import KINDS as SCORERS
from ..stages.scorers.verifiers import Unusable as UnusableAnswer
from ..stages.scorers.verifiers import Verifier, parse_verifier
from ..values import is_number
from .output import Output
from .process import make_functions_importable, quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.rows import Row
    from ..data.spec import DataSpec
    from ..models.base import Base

EVAL_PROMPTS = "eval.prompts"
_ROW_NAMES = {"demo": "demonstrations", "pair": "pairs", "label": "labelled replies", "prompt": "prompts"}


def validate_recipe(recipe: str, overrides: Sequence[str], output: Output) -> None:
    """`preftune validate`: read all data as each stage would, measure it in tokens, and check every setting.

    What cannot be checked offline is reported, and is not an error.

    Raises:
        UserError: everything that is wrong, as far as one thing does not hide another.
    """
    loaded = load_recipe(recipe, overrides)
    make_functions_importable(loaded)
    quiet_libraries()
    output.say(f"recipe: {loaded.name}, stages in running order: {', '.join(lines_of_descent(loaded))}")
    for words in expansion_words(loaded.expanded):
        output.say(words)
    if unused := unused_stages(loaded):
        output.say(f"nothing uses {', '.join(unused)}: no stage starts from it, and no evaluation looks at it")
    found: list[UserError] = []
    with loaded.placing():
        base, tokenizer = _base(loaded, output)
        check = DataCheck(loaded, base, tokenizer, output)
        for name, entry, kind in data_uses(loaded):
            with gathering(found):
                for row in check.rows(name, entry, kind):
                    if output.json:
                        output.rows([row])
        with gathering(found):
            check_settings(loaded, base, order(loaded), Path("runs") / loaded.name)
            if loaded.model.dtype == "auto":
                from ..models.devices import device_name

                output.say(f"model.dtype: auto is {base_dtype(loaded)} on {device_name()}")
            for name, stage in loaded.stages.items():
                said = stage.method()
                if (engine := said.get("rollout_engine")) is not None:
                    output.say(f"stages.{name}.rollout: {engine} at {said.get('rollout_url')} is not asked yet")
            output.say(f"stages: the config of each of {len(loaded.stages)} stages can be built")
        raise_found(found)
    output.say("nothing wrong found")


def check_settings(
    recipe: Recipe,
    base: "Base | None",
    stages: Sequence[str],
    run_dir: Path,
    *,
    judges: bool = True,
    processes: int = 1,
) -> None:
    """Build the real config of each of these stages, with its rewards, and plan the judges: nothing is trained.

    Args:
        base: None where it cannot be reached: what depends on it is not looked at.
        run_dir: the run folder, whether it is there or not.
        judges: whether the evaluation's judges are looked at.
        processes: in so many the stages will run.

    Raises:
        UserError: everything that the run would refuse.
    """
    from ..models.base import Base
    from ..models.loading import check_base_complete
    from ..stages.check import process_problems, stage_problems

    stand_in = base or Base(recipe.base_spec, Path(), None, "")
    found: list[UserError] = []
    if base is not None:
        with gathering(found):
            check_base_complete(base)
    for name in stages:
        with gathering(found):
            job = stage_job(recipe, name, stand_in, run_dir, run_dir / name)
            found += stage_problems(job)
            found += process_problems(job, processes)
    for index, name in enumerate(recipe.trackers):
        from ..stages.trackers import tracker_problem

        found += [each for each in (tracker_problem(name, f"trackers.{index}"),) if each is not None]
    with gathering(found):
        _check_quantization(recipe)
    if recipe.eval is not None and judges:
        from ..eval.judges.registry import plan_judges

        plans = []
        with gathering(found):
            plans = plan_judges(recipe.eval.judges, run_dir)
        for plan in plans:
            with gathering(found):
                plan.try_out()
        with gathering(found):
            asked = eval_spec(recipe, stand_in, run_dir).benchmarks
            if asked is not None:
                from ..eval.harness.tasks import load_tasks

                load_tasks(asked)
    raise_found(found)


def _check_quantization(recipe: Recipe) -> None:
    """Raises UserError where the base cannot be quantised here."""
    if recipe.model.quantization is None:
        return
    import torch

    from ..models.loading import quantization_config

    quantization_config(recipe.model.quantization, torch.float32)


def data_uses(
    recipe: Recipe, stages: Sequence[str] | None = None, *, evaluation: bool = True
) -> Iterator[tuple[str, Data, RowKind]]:
    """(name, entry, kind of rows) for each distinct way in which an entry is read: by these stages, by the evaluation.

    Args:
        stages: None: all, in running order.
    """
    seen = set()
    for name in order(recipe) if stages is None else stages:
        stage = recipe.stages[name]
        use = (stage.data, stage.rows)
        if use not in seen:
            seen.add(use)
            yield stage.data, recipe.data[stage.data], stage.rows
    if recipe.eval is not None and evaluation:
        yield EVAL_PROMPTS, recipe.eval.prompts, "prompt"


def is_on_hub(recipe: Recipe, path: str) -> bool:
    """Whether a data path can only be a hub dataset, as there is no local file of that name."""
    from ..data.sources import find

    return find(path, folders(recipe)) is None and not Path(path).suffix and path.count("/") <= 1


def offline() -> bool:
    """Whether the user has put the hub's client in offline mode."""
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _base(recipe: Recipe, output: Output) -> "tuple[Base | None, PreTrainedTokenizerBase | None]":
    from ..models.loading import resolve_base
    from ..models.tokens import load_tokenizer

    try:
        base = resolve_base(recipe.base_spec, recipe.model.revision)
    except UserError as error:
        if "cannot be reached" not in error.problem:
            raise
        output.say(f"model: not checked, {recipe.model.base} is on the hub and cannot be reached; no token lengths")
        return None, None
    more = f", with {len(base.added)} tokens added" if base.added else ""
    output.say(f"model: {recipe.model.base}{more}, sha256 {base.sha256[:12]}")
    return base, load_tokenizer(base, recipe.model.chat_template, recipe.model.template_date)


class DataCheck:
    """Every use of the data, read and encoded as the stages and the evaluation would.

    Args:
        base, tokenizer: None where the base cannot be reached: rows are then read, and not measured in tokens.
        output: where the counts are said; None: nowhere.
        brief: say only what is not as one would wish: rows that are dropped, cut or repeated.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: "Base | None",
        tokenizer: "PreTrainedTokenizerBase | None",
        output: Output | None = None,
        *,
        brief: bool = False,
    ) -> None:
        self.recipe, self.base, self.tokenizer, self.output = recipe, base, tokenizer, output
        self.brief = brief
        # by data entry: what is trained on; the evaluation's prompts are compared with it
        self._trained: dict[str, list[PromptSet]] = {}

    def rows(self, name: str, entry: Data, kind: RowKind) -> Iterator[dict[str, Any]]:
        """Read an entry as one kind of rows, and encode them: yields what was found, and says it.

        Raises:
            UserError: it cannot be read, no row is left, or rows are longer than the base's context.
        """
        from ..data.load import stream_rows

        spec = data_spec(entry, self.recipe.seed)
        label = f"data {name} as {_ROW_NAMES[kind]}" if name != EVAL_PROMPTS else name
        if entry.stage is not None:
            if not self.brief:
                self._say(label, [f"not checked, {entry.stage} samples them when the recipe runs"])
            yield {"data": name, "rows": kind, "stage": entry.stage}
            return
        read, prompts, columns = DataReport(), PromptSet(spec, named=name == EVAL_PROMPTS), Columns()
        answers = Answers(self.recipe, name, kind)
        encoded: DataReport | None = None

        def rows() -> "Iterator[Row]":
            for row in stream_rows(spec, kind, folders(self.recipe), read, _place(name)):
                prompts.add(row)
                columns.add(row)
                answers.add(row)
                yield row

        try:
            if self.base is not None and self.tokenizer is not None:
                encoded = self._encoded(name, kind, rows(), spec)
            else:
                deque(rows(), maxlen=0)
        except UserError:
            away = [source.path for source in spec.sources if is_on_hub(self.recipe, source.path)]
            if read.read or not (away and offline()):
                raise
            self._say(label, [f"not checked, {', '.join(away)} is on the hub and we are offline"])
            return
        report: dict[str, Any] = {"data": name, "rows": kind, "read": read.as_dict()}
        self._say(label, read.lines()[self.brief :])
        if name == EVAL_PROMPTS:
            report["in_training_data"] = self._in_training_data(label, prompts, spec.held_out)
        else:
            self._trained.setdefault(name, []).append(prompts)
        if encoded is not None:
            self._say(f"{label}, in tokens", encoded.lines()[self.brief :])
            report["encoded"] = encoded.as_dict()
        yield report
        found: list[UserError] = []
        if spec.held_out > 0:
            with gathering(found):
                trained = prompts.trained_rows
                check_sides(spec.held_out, trained, prompts.rows - trained, f"{_place(name)}.held_out")
        found += self._function_problems(name, kind, columns)
        found += answers.problems(columns)
        found += self._batch_problems(name, kind, prompts.trained_rows)
        raise_found(found)

    def _in_training_data(self, label: str, prompts: PromptSet, held_out: float) -> dict[str, int]:
        """How many of the evaluation's prompts each entry of training data holds; said, unless the run has said it."""
        if held_out > 0 and not self.brief:
            self._say(label, [f"{len(prompts)} of them are held out, and evaluated on"])
        shared = overlaps(prompts, self._trained)
        if not self.brief:
            self._say(label, [overlap_words(other, tally, prompts) for other, tally in shared.items()])
        return {other: tally.count for other, tally in shared.items()}

    def _function_problems(self, name: str, kind: RowKind, columns: "Columns") -> Iterator[UserError]:
        """Functions that score replies to these prompts and need what no column holds."""
        if kind != "prompt":
            return
        named: list[tuple[str, str, set[str]]] = []
        if name == EVAL_PROMPTS:
            judges = self.recipe.eval.judges if self.recipe.eval is not None else []
            functions = ((place, each.get("function")) for place, each in enumerate(judges))
            named = [(f"eval.judges[{i}].function", each, columns.every) for i, each in functions if each]
        for stage_name, stage in self.recipe.stages.items():
            if stage.data == name:
                functions = ((place, each.function) for place, each in enumerate(stage.rewards) if each.function)
                here = f"stages.{stage_name}.reward"
                named += [(f"{here}.{i}", each, columns.some) for i, each in functions if each]
        if named:
            from ..stages.reward_functions import check_signature, import_function

            for where, target, known in named:
                found: list[UserError] = []
                with gathering(found):
                    check_signature(import_function(target, where), where, known)
                yield from found

    def _batch_problems(self, name: str, kind: RowKind, rows: int) -> Iterator[UserError]:
        """Stages that would take no step: every batch is left out for not being full."""
        for stage_name, stage in self.recipe.stages.items():
            record = stage.record
            if stage.data != name or stage.rows != kind or record.draws:
                continue
            train = {**record.defaults, **stage.train}
            batch = train.get("per_device_train_batch_size", 8)
            if train.get("dataloader_drop_last") and is_number(batch) and batch > rows:
                said = f"leaves out every batch: there are {rows} rows, and one takes {batch}"
                yield UserError(f"stages.{stage_name}.train.dataloader_drop_last", said, "use smaller batches")

    def _encoded(self, name: str, kind: RowKind, rows: "Iterator[Row]", spec: "DataSpec") -> DataReport:
        from ..data.encode import measure_rows
        from ..models.context import ContextCheck, row_length
        from ..models.tokens import check_vocabulary, vocabulary_size

        assert self.base is not None and self.tokenizer is not None
        context = ContextCheck(self.base, self._new_tokens(name, kind))
        size, beyond = vocabulary_size(self.base), list[UserError]()
        fits = len(self.tokenizer) <= size  # no token is beyond the embedding, whatever the rows hold

        def see(row: dict[str, Any]) -> None:
            context.add(row_length(row))
            if not fits and not beyond:
                with gathering(beyond):
                    for column in (each for each in row if each.endswith("_ids")):
                        check_vocabulary([row[column]], self.tokenizer, size, _place(name))

        longest = (context.longest or sys.maxsize) if fits else None
        found: list[UserError] = []
        report = DataReport()
        with gathering(found):
            report = measure_rows(kind, rows, self.tokenizer, spec, longest=longest, see=see)
        found += beyond
        with gathering(found):
            context.raise_found(_place(name), report.used)
        raise_found(found)
        return report

    def _new_tokens(self, name: str, kind: RowKind) -> int:
        """The longest reply that is sampled after these prompts."""
        recipe = self.recipe
        if kind != "prompt":
            return 0
        if name == EVAL_PROMPTS:
            return recipe.eval.max_new_tokens if recipe.eval is not None else 0
        readers = [stage for stage in recipe.stages.values() if stage.data == name and stage.rows == kind]
        found = [{each.name: each.default for each in stage.record.parameters} | stage.method() for stage in readers]
        return max((values.get("max_new_tokens", 0) for values in found), default=0)

    def _say(self, label: str, lines: list[str]) -> None:
        if self.output is not None:
            for line in lines:
                self.output.say(f"{label}: {line}")


class Answers:
    """What verifiers and servers read in the columns of an entry's rows, looked at row by row.

    Args:
        name: the data entry. kind: of the rows.
    """

    def __init__(self, recipe: Recipe, name: str, kind: RowKind) -> None:
        self._sources = list(_column_readers(recipe, name)) if kind == "prompt" else []
        self._verifiers = [found for found in map(_verifier, self._sources) if found is not None]
        self._bad: dict[str, tuple[str, int]] = {}

    def add(self, row: "Row") -> None:
        """One more row."""
        for where, verifier in self._verifiers:
            if row.columns.get(verifier.column or "") is None:
                continue  # said once, of all rows
            try:
                verifier.check_row(row.columns)
            except UnusableAnswer as error:
                first, count = self._bad.get(where, (f"{row.origin}: {error}", 0))
                self._bad[where] = first, count + 1

    def problems(self, columns: "Columns") -> Iterator[UserError]:
        """Columns that not every row has, and answers that nothing can be compared with; a source that says what
        becomes of those (`on_failure`) takes them."""
        for where, entry in self._sources:
            if entry.get("on_failure", "stop") != "stop":
                continue
            for column in SCORERS[str(entry["kind"])].columns(entry):
                if column not in columns.every:
                    some = "not every row has it" if column in columns.some else "no row has it"
                    said = f"reads the column {column!r}, and {some}"
                    known = sorted(columns.every)
                    remedy = nearest(column, known) if known else "add the column, or say on_failure"
                    yield UserError(where, said, remedy)
            if where in self._bad:
                first, count = self._bad[where]
                more = f", and {count - 1} more rows" if count > 1 else ""
                yield UserError(where, f"{first}{more}", "correct the data, or say on_failure")


def _column_readers(recipe: Recipe, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry with its kind) of each judge and source that scores replies to the prompts of that data entry."""
    if name == EVAL_PROMPTS and recipe.eval is not None:
        judges = [(f"eval.judges[{place}]", dict(each)) for place, each in enumerate(recipe.eval.judges)]
        yield from (each for each in judges if each[1].get("kind") in SCORERS)
    for stage_name, stage in recipe.stages.items():
        for place, reward in enumerate(stage.rewards if stage.data == name else ()):
            if (kind := reward.scorer) in SCORERS:
                rule = {} if reward.on_failure is None else {"on_failure": reward.on_failure}
                yield f"stages.{stage_name}.reward.{place}", {**reward.entry(), "kind": kind, **rule}


def _verifier(source: tuple[str, dict[str, Any]]) -> tuple[str, Verifier] | None:
    """The verifier that an entry describes; None of another kind, and of a malformed one, of which others tell."""
    where, entry = source
    if entry["kind"] != "verifier":
        return None
    fields = {key: value for key, value in entry.items() if key not in ("kind", "name", "on_failure")}
    try:
        return where, parse_verifier(fields, where)
    except UserError:
        return None


class Columns:
    """The names of other columns: `some` row has each of the first, `every` row each of the second."""

    def __init__(self) -> None:
        self.some, self.every = set[str](), set[str]()
        self._first = True

    def add(self, row: "Row") -> None:
        """One more row."""
        if row.columns.keys() == self.every and not self._first:
            return
        self.every = set(row.columns) if self._first else self.every & set(row.columns)
        self.some |= set(row.columns)
        self._first = False


def _place(name: str) -> str:
    return name if name == EVAL_PROMPTS else f"data.{name}"
