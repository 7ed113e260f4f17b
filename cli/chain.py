"""The chain: every stage in order, skipping those that are unchanged, then the evaluation and the report."""

import gc
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import stopping
from ..errors import Lost, UserError, gathering, in_brief, nearest, raise_found
from ..files import EVALUATION, LINEAGE, RECIPE, STAMP, write_whole
from ..printed import printable
from ..progress import ahead, duration
from ..recipes.build import eval_spec, stage_job
from ..recipes.expansion import expansion_words, members
from ..recipes.graph import needed_for, order, parents
from ..recipes.schema import Recipe
from ..stopping import Stopped
from ..values import is_number
from .first_start import fix_date, fix_dtype
from .folder import RunFolder, Stamp, finished_entry, seal
from .keys import Keys, counted, difference, idle_settings, key_of
from .output import Output
from .process import make_functions_importable, quiet_libraries

if TYPE_CHECKING:
    from ..eval.spec import EvalSpec
    from ..models.base import Base
    from ..stages.job import StageJob
    from .machines import Lead, Machines

_T = TypeVar("_T")


@dataclass(frozen=True)
class Options:
    """What the command line says besides the recipe.

    Attributes:
        output_dir: the run folder; None: `default_folder`.
        only: run that stage alone, on what is in the run folder.
        until: run that stage and everything that it needs.
        force: run the selected stages even if they are unchanged.
        from_adapter: start `only` from this adapter.
        launch: an accelerate config.
    """

    output_dir: Path | None = None
    only: str | None = None
    until: str | None = None
    force: bool = False
    from_adapter: Path | None = None
    launch: Path | None = None


@dataclass(frozen=True)
class Done:
    """How a step of the chain ended: `state` is "ran" or "skipped"; `problem` says why it is not what was asked for."""

    name: str
    state: str
    seconds: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def default_folder(recipe: Recipe) -> Path:
    """runs/<name>"""
    return Path("runs") / recipe.name


class Chain:
    """One run of a recipe in a folder.

    Args:
        run_stage, run_eval, resolve: called instead of the stages' `run_stage`, `run_eval` and `resolve_base`.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        output: Output,
        *,
        run_stage: "Callable[[StageJob], Mapping[str, Any]] | None" = None,
        run_eval: "Callable[[EvalSpec, Path], object] | None" = None,
        resolve: "Callable[[str, str | None], Base] | None" = None,
    ) -> None:
        self.recipe, self.options, self.output = recipe, options, output
        self.path = _at_home(options.output_dir or default_folder(recipe))
        self._run_stage, self._run_eval, self._resolve = run_stage, run_eval, resolve
        self.keys: dict[str, str] = {}
        self._accepted = self._works = False

    def run(self) -> list[Done]:
        """Run everything. If a step raises, run.json says `failed`, later steps do not run, and the error goes on."""
        with self.recipe.placing(), in_brief():
            try:
                return self._run()
            except Stopped as stopped:
                stopped.kept = self._kept()
                raise
            except Lost as lost:
                remedy = f"see that it runs, then: preftune run {self.path / RECIPE}"
                raise UserError(lost.where, f"{lost.problem}; {self._kept()}", remedy) from None

    def _run(self) -> list[Done]:
        # 1. what is to be done, before anything heavy is imported
        selected = self.selected = self._selected()
        for words in expansion_words(self.recipe.expanded):
            self.output.say(words)
        make_functions_importable(self.recipe)
        quiet_libraries()
        machines = None
        if self.options.launch is not None:
            from .launch import check_launch, machines_of

            stages = {name: self.recipe.stages[name] for name in selected}
            check_launch(
                self.options.launch,
                [name for name, stage in stages.items() if stage.record.on_policy],
                [name for name, stage in stages.items() if stage.full],
            )
            machines = machines_of(self.options.launch, joins=False)
        self.folder = RunFolder(self.path)
        with self.folder.lock(), self._leading(machines) as self.lead:
            if said := self.folder.load():
                self.output.say(said)
            evaluates = self.evaluates = self._evaluates()
            self.folder.check_places([*selected, *([EVALUATION] if evaluates else [])])
            # 2. the base and the data
            self.base = (self._resolve or _resolve_base)(self.recipe.base_spec, self.recipe.model.revision)
            fix_date(self.recipe, self.base, self.path)
            if said := fix_dtype(self.recipe, self.path):
                self.output.say(said)
            if self.options.launch is not None:
                from .launch import check_dtype

                check_dtype(self.options.launch, self.recipe.model.dtype)
            self.parts = Keys(self.recipe, self.base, self.path)
            self.parts.read_data(selected, evaluation=evaluates)
            for words in self.parts.evaluated_in_training():
                self.output.say(f"eval.prompts: {words}")
            # 3. the stages
            done: list[Done] = []
            for place, name in enumerate(selected):
                with ahead(self._ahead(done, name, selected[place + 1 :])):
                    done.append(self._stage(name))
                if done[-1].state == "ran":
                    with suppress(OSError):  # its curves need not wait for what comes; the last one says what is wrong
                        self._report()
            # 4. the evaluation, and the report
            if evaluates:
                done.append(self._evaluation())
            self._accept()
            if selected == order(self.recipe):
                for name in self.folder.forget_partials(self.recipe.stages):
                    self.output.say(f"{name}: no stage of the recipe, what an interrupted run left of it is removed")
            if any(each.state == "ran" for each in done) or self._report_is_old():
                self._report()
        return done

    def _ahead(self, done: list[Done], doing: str, later: list[str]) -> float | None:
        """Seconds that the steps behind the next one took when they last ran; None where there is none, or one that
        has never been done.

        One that is finished, and of whose parents none was made anew, is taken to be skipped.
        """
        anew = {each.name for each in done if each.state == "ran"} | {doing}
        seconds = 0.0
        for name in [*later, *([EVALUATION] if self.evaluates else [])]:
            above = parents(self.recipe, name) if name != EVALUATION else self._looked_at()
            entry = self.folder.stages.get(name, {})
            if entry.get("state") == "done" and not anew.intersection(above):
                continue
            if entry.get("state") != "done" or not is_number(took := entry.get("seconds")):
                return None
            anew.add(name)
            seconds += took
        return seconds or None

    def _looked_at(self) -> set[str]:
        """The stages that the evaluation samples, compares with or asks."""
        part = self.recipe.eval
        assert part is not None
        return {*part.policies, part.reference, *(str(judge.get("stage")) for judge in part.judges)}

    def _kept(self) -> str:
        """What of the run a signal leaves, in words: which steps are done, and from where the one under way goes on."""
        if not hasattr(self, "folder"):
            return ""
        states = {name: self.folder.stages.get(name, {}).get("state") for name in (*self.selected, EVALUATION)}
        finished = [name for name, state in states.items() if state == "done"]
        said = [", ".join(finished) or "no stage is done yet"]
        for name, state in states.items():
            if state in (None, "done"):
                continue
            step, prompts = self.folder.checkpoint_step(name), self.folder.prompts_done(name)
            if name == EVALUATION:
                said.append(f"{name} goes on with the replies that are drawn")
            elif prompts is not None:
                said.append(f"{name} goes on after prompt {prompts}")
            else:
                said.append(f"{name} begins anew" if step is None else f"{name} goes on after step {step}")
        return f"kept in {self.path}: {'; '.join(said)}"

    def _leading(self, machines: "Machines | None") -> "AbstractContextManager[Lead | None]":
        """What the other machines of the run follow; nothing where there are none."""
        if machines is None or machines.count == 1:
            return nullcontext()
        from .join import about
        from .machines import Lead

        assert self.options.launch is not None
        return Lead(self.path, machines, about(self.options.launch), self.output.say)

    def _evaluates(self) -> bool:
        return self.recipe.eval is not None and self.options.only is None and self.options.until is None

    def _selected(self) -> list[str]:
        recipe, options = self.recipe, self.options
        for flag, name in (("--only", options.only), ("--until", options.until)):
            if name is not None and name not in recipe.stages and name not in recipe.expanded:
                raise UserError(f"{flag} {name}", "no such stage", nearest(name, [*recipe.expanded, *recipe.stages]))
        if options.only is not None and options.until is not None:
            raise UserError("--only, --until", "both are given", "keep one of them")
        if options.only is not None:
            wanted = members(recipe.expanded, [options.only])
            return [name for name in order(recipe) if name in wanted]
        return order(recipe) if options.until is None else needed_for(recipe, members(recipe.expanded, [options.until]))

    def _accept(self) -> None:
        """Once nothing is left that could refuse the recipe, write it into the run; before, its own one stays there."""
        if self._accepted:
            return
        self._check_settings()
        self._accepted = True
        write_recipe(self.path, self.recipe)

    def _check_settings(self) -> None:
        """Check all that the selected stages need before the first trains: a typo in the last should not cost hours."""
        if self._run_stage is not None or not self._works:
            return
        from ..models.tokens import load_tokenizer
        from .validate import DataCheck, check_settings, data_uses

        model, found = self.recipe.model, list[UserError]()
        with gathering(found):
            check_settings(
                self.recipe,
                self.base,
                self.selected,
                self.path,
                judges=self.evaluates,
                processes=self._processes(),
            )
        tokenizer = load_tokenizer(self.base, model.chat_template, model.template_date)
        check = DataCheck(self.recipe, self.base, tokenizer, self.output, brief=True)
        for name, entry, kind in data_uses(self.recipe, self.selected, evaluation=self.evaluates):
            with gathering(found):
                list(check.rows(name, entry, kind))
        raise_found(found)

    def _processes(self) -> int:
        """In how many processes each stage will run."""
        if self.options.launch is None:
            return 1
        from .launch import processes_of

        return processes_of(self.options.launch)

    def _stage(self, name: str) -> Done:
        # the parents' keys: from this run, or from the folder where they are not part of it
        adapter = self.options.from_adapter
        for parent in parents(self.recipe, name):
            if parent not in self.keys and not (adapter and parent == self.recipe.stages[name].parent):
                self.keys[parent] = self._finished(name, parent)
        parts = self.parts.stage(name, self.keys, adapter)
        key = self.keys[name] = key_of(parts)
        if (skipped := self._unchanged(name, key, parts)) is not None:
            return skipped
        self._works = True
        self._accept()
        began, started = time.monotonic(), _now()
        stamp = Stamp(key, parts, started, idle=idle_settings(self.recipe, name))
        partial = self.folder.begin(name, stamp, fresh=self.options.force)
        job = stage_job(self.recipe, name, self.base, self.path, partial, adapter)
        metrics: Mapping[str, Any] | None = None
        try:
            with stopping.deferred():
                metrics = self._recorded(name, key, started, lambda: self._work(job))
                stamp = replace(stamp, seconds=time.monotonic() - began)
                kept = self.folder.promote(name, stamp)
                self.folder.record(name, **finished_entry(stamp))
        except Stopped as stopped:
            if metrics is None:
                raise
            raise Stopped(stopped.number, f"{name}: done, {stopped}") from None
        if kept:
            self.output.say(f"{name}: {kept}")
        seconds = stamp.seconds
        self.output.say(f"{name}: done in {duration(seconds)}{_highlights(metrics)}")
        _free_memory()
        return Done(name, "ran", seconds, metrics or {})

    def _work(self, job: "StageJob") -> Mapping[str, Any]:
        if self._run_stage is not None:
            return self._run_stage(job)
        from ..stages.run import finished, run_stage

        if (metrics := finished(job)) is not None:
            self.output.say(f"{job.name}: was cut off after its last step, and takes its place")
            return metrics
        if self.options.launch is not None:
            from .launch import launch_stage

            adapter, key = self.options.from_adapter, self.keys[job.name]
            return launch_stage(self.options.launch, self.path, job, adapter, self.lead, key)
        return run_stage(job)

    def _evaluation(self) -> Done:
        parts = self.parts.evaluation(self.keys)
        key = key_of(parts)
        if (skipped := self._unchanged(EVALUATION, key, parts)) is not None:
            return skipped
        self._works = True
        self._accept()
        began, started = time.monotonic(), _now()
        if self.options.force:
            from ..eval.drawn import DrawnReplies

            DrawnReplies(self.path, keeps=True).forget()
        spec = eval_spec(self.recipe, self.base, self.path)
        rows = self._recorded(EVALUATION, key, started, lambda: self._evaluate(spec, key))
        seconds = time.monotonic() - began
        problem, open_ = _not_answered(rows)
        # made for another key than that of a whole evaluation: the next run asks again
        parts |= open_
        key = key_of(parts)
        seal(self.path / EVALUATION, Stamp(key, parts, started, seconds))
        state = {"state": "failed", "error": problem} if problem else {"state": "done"}
        self.folder.record(EVALUATION, key=key, seconds=round(seconds, 3), started=started, **state)
        self.output.say((problem and f"{EVALUATION}: {problem}") or f"{EVALUATION}: done in {duration(seconds)}")
        _free_memory()
        return Done(EVALUATION, "ran", seconds, problem=problem)

    def _evaluate(self, spec: "EvalSpec", key: str) -> object:
        if self._run_eval is not None:
            return self._run_eval(spec, self.path)
        if self.options.launch is not None and self._processes() > 1:
            from .launch import launch_evaluation

            return launch_evaluation(self.options.launch, self.path, self.lead, key)
        from ..eval.run import run_eval

        return run_eval(spec, self.path)

    def _unchanged(self, name: str, key: str, parts: Mapping[str, object]) -> Done | None:
        """The finished step, if it was made for the same key, else None; says why it is skipped or run."""
        stamp, damage = self.folder.stamp(name), self.folder.damage(name)
        if stamp is not None and damage is None and stamp.made_for(key) and not self.options.force:
            # what earlier versions counted besides is no reason to make it, and what comes from it, again
            self.keys[name] = stamp.key
            if self.folder.stages.get(name) != finished_entry(stamp):
                self.folder.record(name, **finished_entry(stamp))
            idle = "" if name == EVALUATION else difference(stamp.idle_settings(), idle_settings(self.recipe, name))
            more = f" ({idle}: no other result, so nothing is done; --force runs it again)" if idle else ""
            self.output.say(f"{name}: unchanged since {stamp.started[:16].replace('T', ' ')} UTC, skipped{more}")
            return Done(name, "skipped", stamp.seconds)
        if damage is not None:
            self.output.say(f"{name}: runs again, its folder is damaged: {damage}")
        elif stamp is not None and not stamp.made_for(key):
            self.output.say(f"{name}: runs again, changed: {difference(counted(stamp.parts), parts)}")
        elif stamp is not None:
            self.output.say(f"{name}: runs again, forced")
        elif (self.path / name / LINEAGE).is_file():
            self.output.say(
                f"{name}: runs again, nothing says what its folder was made for ({STAMP} is damaged or gone)"
            )
        else:
            before = self.folder.stages.get(name, {}).get("state")
            why = {
                "failed": ", it failed before",
                "running": ", it was interrupted",
                "stopped": ", it was stopped",
                "done": ", its folder is gone",
            }
            self.output.say(f"{name}: runs{why.get(str(before), '')}")
        return None

    def _finished(self, name: str, needed: str) -> str:
        """The key of a stage that this one needs, from the run folder: it is not part of this run."""
        stamp = self.folder.stamp(needed)
        if stamp is None:
            where = f"stages.{name}" if name != EVALUATION else EVALUATION
            said = f"needs {needed}, which is not finished in {self.path}"
            raise UserError(where, said, f"run it first: preftune run ... --until {needed}")
        if (damage := self.folder.damage(needed)) is not None:
            where = f"stages.{name}" if name != EVALUATION else EVALUATION
            said = f"needs {needed}, whose folder in {self.path} is damaged: {damage}"
            raise UserError(where, said, f"run it again: preftune run ... --until {needed}")
        above = {each: self.folder.stamp(each) for each in parents(self.recipe, needed)}
        keys = {each: found.key for each, found in above.items() if found is not None}
        if len(keys) == len(above):
            parts = self.parts.stage(needed, keys)
            if not stamp.made_for(key_of(parts)):
                changed = difference(parts, counted(stamp.parts))
                self.output.say(f"{needed}: taken as it lies there, made with another recipe: {changed}")
        return stamp.key

    def _recorded(self, name: str, key: str, started: str, work: Callable[[], _T]) -> _T:
        """Do the work; run.json says `running` meanwhile, and `failed` if it raises."""
        began = time.monotonic()
        self.folder.record(name, state="running", key=key, seconds=0.0, started=started)
        try:
            return work()
        except BaseException as error:
            if isinstance(error, Stopped) and not str(error).startswith(name):
                error = Stopped(error.number, f"{name}: {error}")
            said = " ".join(printable(str(error)).split())[:300] or type(error).__name__
            seconds = round(time.monotonic() - began, 3)
            state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
            with suppress(OSError):  # a full disk may be what this is about
                self.folder.record(name, state=state, key=key, seconds=seconds, started=started, error=said)
            raise error

    def _report_is_old(self) -> bool:
        """Whether a report is missing, or was written before what lies in the run now: a kill came between."""
        if self._run_stage is not None:
            return False
        from ..eval.report_state import report_is_old

        return report_is_old(self.path)

    def _report(self) -> None:
        if self._run_stage is not None:
            return
        from ..eval.report.page import write_report
        from .cards import refresh_cards

        refresh_cards(self.path)
        write_report(self.path)


def _at_home(path: Path) -> Path:
    """The path with a leading ~ written out."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError("--output-dir", f"{str(path)!r}: no user of that name", "write the path out") from error


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write RUN/recipe.yaml: the recipe with everything resolved, so that it can be run on its own."""
    write_whole(folder / RECIPE, recipe.text())


def _highlights(metrics: Mapping[str, Any] | None) -> str:
    names = {
        "train_loss": "loss",
        "loss": "loss",
        "held_out_accuracy": "held-out accuracy",
        "objective/scores": "score",
        "objective/kl": "KL",
        "score_chosen": "score of the chosen",
        "score_rejected": "of the rejected",
        "score_kept": "score of the kept",
    }
    said = [f"{word} {metrics[key]:.4g}" for key, word in names.items() if metrics and is_number(metrics.get(key))]
    return f" ({', '.join(said)})" if said else ""


def _resolve_base(spec: str, revision: str | None) -> "Base":
    from ..models.loading import resolve_base

    return resolve_base(spec, revision)


def _not_answered(rows: object) -> tuple[str, dict[str, Any]]:
    """(which judges gave no verdict at all, in words; what of the evaluation is still open, by name)."""
    if not isinstance(rows, list):
        return "", {}
    from ..eval.results import silence_words, silent_judges, unread_answers

    open_: dict[str, Any] = {
        f"answers of {judge} without a verdict": sum(unread.values()) for judge, unread in unread_answers(rows).items()
    }
    open_ |= {f"verdicts of {judge}": 0 for judge in silent_judges(rows)}
    return "; ".join(silence_words(rows)), open_


def _free_memory() -> None:
    """Release what a finished stage held before the next one loads."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    from ..models.memory import release_free_memory

    release_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
