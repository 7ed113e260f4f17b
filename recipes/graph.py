"""The stages as a graph: what each needs, in which order they run."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import UserError, nearest
from ..eval.decoding import beam_problem
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DOCTOR, EVAL_CACHE, EVALUATION, RECIPE, REPORT, RUN_STATE, VOTES
from ..models.added_tokens import check_tokens
from ..stages.names import meant
from ..stages.scorers.kinds import IMPLIED
from ..stages.scorers.kinds import KINDS as SCORERS
from .growth import growth_problems, start_problems
from .problems import problem
from .schema import BASE, Data, Recipe, Reward, Stage
from .served import served_problems
from .text import Path_, Text

# Names that mean something else in a run folder, or in `from`.
_RESERVED = (BASE, EVALUATION, EVAL_CACHE)
_FILES = (RECIPE, RUN_STATE, REPORT, DOCTOR, VOTES)
# What files of a run end in, now or one day.
_SUFFIXES = (".json", ".jsonl", ".yaml", ".html", ".lock", ".partial", ".old")
_LONGEST = 100
_SHOWN = 10
_NAME = re.compile(r"\w[\w.-]*")
_LARGEST = 3.4e38
"""Scores are fp32."""


def parents(recipe: Recipe, name: str) -> list[str]:
    """The stages that this one needs: the one it starts from first, then the reward stages that score it, the one that
    teaches it, and the one whose rows it reads."""
    stage = recipe.stages[name]
    needed = [] if stage.parent == BASE or stage.imports else [stage.parent]
    needed += [each.stage for each in stage.rewards if each.stage is not None]
    taught = None if stage.taught_by is None else stage.taught_by.stage
    needed += [each for each in (taught, data_stage(recipe, name)) if each is not None]
    return list(dict.fromkeys(needed))


def data_stage(recipe: Recipe, name: str) -> str | None:
    """The stage that samples the rows which this one reads; None where they come from files."""
    entry = recipe.data.get(recipe.stages[name].data)
    return None if entry is None else entry.stage


def order(recipe: Recipe) -> list[str]:
    """Every stage after the ones that it needs; as in the file where that leaves a choice.

    Raises:
        ValueError: the stages need one another in a circle; its argument is that circle.
    """
    return _ordered({name: parents(recipe, name) for name in recipe.stages})


def _ordered(needs: Mapping[str, list[str]]) -> list[str]:
    done: dict[str, None] = {}
    for first in needs:
        # from each stage up to what it needs, without recursion: a chain may be longer than Python's stack
        path = {first: iter(needs[first])} if first not in done else {}
        while path:
            name = next(reversed(path))
            parent = next(path[name], None)
            if parent is None:
                done[name] = None
                del path[name]
            elif parent in path:
                above = list(path)
                raise ValueError([*above[above.index(parent) :], parent])
            elif parent not in done:
                path[parent] = iter(needs[parent])
    return list(done)


def needed_for(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """These stages and all that they need, in running order."""
    wanted: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += parents(recipe, name)
    return [name for name in order(recipe) if name in wanted]


def policies(recipe: Recipe) -> list[str]:
    """The stages whose adapter speaks, each after the one that it starts from."""
    return [name for name in order(recipe) if name in speaking(recipe)]


def speaking(recipe: Recipe) -> list[str]:
    """The same in the order of the file, whether one can run after another or not."""
    return [name for name, stage in recipe.stages.items() if stage.record.speaks]


def lines_of_descent(recipe: Recipe) -> list[str]:
    """Each stage in running order with what it starts from: "sft (from base)", "ppo (from sft, rewards: reward)",
    "dpo (from sft, rows: pairs1)"."""
    lines = []
    for name in order(recipe):
        stage = recipe.stages[name]
        rewards = [each.stage or each.model or each.function or each.called for each in stage.rewards]
        scored = f", rewards: {' and '.join(map(str, rewards))}" if rewards else ""
        scored += "" if stage.taught_by is None else f", teacher: {stage.taught_by.named}"
        rows = "" if (source := data_stage(recipe, name)) is None else f", rows: {source}"
        lines.append(f"{name} (from {'the adapter ' if stage.imports else ''}{stage.parent}{scored}{rows})")
    return lines


def unused_stages(recipe: Recipe) -> list[str]:
    """The stages that come before others by their kind, judge them or sample for them, and that no stage and no
    evaluation uses.

    A policy at the end of the chain is what the chain is for; an SFT stage or a reward model beside it is not, nor are
    rows, unless they are every reply with its score.
    """
    used = {parent for name in recipe.stages for parent in parents(recipe, name)}
    if recipe.eval is not None:
        used |= {str(judge.get("stage")) for judge in recipe.eval.judges} | {recipe.eval.reference}
    many = len(recipe.stages) > 1
    return [
        name
        for name, stage in recipe.stages.items()
        if many
        and name not in used
        and not stage.full
        and (stage.record.first or stage.record.produces == "reward" or stage.record.row_kinds(stage.method()))
    ]


def reward_models(recipe: Recipe) -> list[str]:
    """The stages that train a reward model as an adapter of the base."""
    return [name for name, stage in recipe.stages.items() if stage.record.adapts and stage.record.produces == "reward"]


def graph_problems(recipe: Recipe, text: Text) -> Iterator[UserError]:
    """Every name in the recipe means something, and its numbers are within what a seed may be.

    Yields:
        An unknown parent, data entry, reward stage or policy, a circle, a word said twice.
    """
    yield from _data_problems(recipe, text)
    rewards = reward_models(recipe)
    folders_: dict[str, str] = {}
    for name, stage in recipe.stages.items():
        here: Path_ = ("stages", name)
        if (said := _misnamed(name)) is not None:
            yield problem(text, here, said, f"use letters, digits, dashes; not {' or '.join(_RESERVED)}")
        if (other := folders_.setdefault(_folder_key(name), name)) != name:
            said = f"{name!r} and {other!r} are one folder where the case of a name does not count"
            yield problem(text, here, said, "rename one of them")
        if stage.imports is not None:
            yield from _import_problems(text, (*here, "from", "adapter"), stage.imports)
        elif stage.parent != BASE and stage.parent not in recipe.stages:
            known = [each for each in (*recipe.stages, BASE) if each != name]
            yield problem(text, (*here, "from"), f"no stage {stage.parent!r}", nearest(stage.parent, known))
        if stage.data not in recipe.data:
            yield problem(text, (*here, "data"), f"no data entry {stage.data!r}", nearest(stage.data, recipe.data))
        yield from _sampled_problems(recipe, text, name, stage)
        yield from _reward_problems(recipe, text, name, stage, rewards)
        yield from _teacher_problems(recipe, text, name, stage)
        if stage.parent in rewards and stage.record.produces != "reward":
            said = f"{stage.parent!r} is a reward model, expected a policy"
            yield problem(text, (*here, "from"), said, "start from a policy, such as the reward model's own parent")
        if (above := recipe.stages.get(stage.parent)) is not None and not above.record.trains:
            said = f"{stage.parent!r} samples rows and trains nothing, expected a policy"
            remedy = f"start from {above.parent}, say, and read the rows with data: {{stage: {stage.parent}}}"
            yield problem(text, (*here, "from"), said, remedy)
        yield from _idle_problems(text, here, stage)
        yield from _full_problems(recipe, text, name, stage)
        yield from _said_twice(text, here, stage)
        yield from growth_problems(recipe, text, name, stage)
    for name, each in recipe.expanded.items():
        for index, stage in enumerate(each):
            if stage not in recipe.stages:
                path: Path_ = ("expanded", name, index)
                yield problem(text, path, f"no stage {stage!r}", nearest(stage, recipe.stages))
    yield from _circle(recipe, text)
    yield from _token_problems(recipe, text)
    yield from start_problems(recipe, text)
    yield from _eval_problems(recipe, text)


def _token_problems(recipe: Recipe, text: Text) -> Iterator[UserError]:
    """Tokens that could be none, whatever the base."""
    try:
        check_tokens(recipe.model.add_tokens)
    except UserError as error:
        yield problem(text, ("model", "add_tokens"), error.problem, error.remedy)


def _import_problems(text: Text, path: Path_, folder: Path) -> Iterator[UserError]:
    if not all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        said = f"no adapter in {str(folder)!r} ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS})"
        yield problem(text, path, said, "give a folder that a stage or PEFT's save_pretrained wrote")


def _misnamed(name: str) -> str | None:
    """What keeps a stage's name from being that of a folder in the run; None: nothing."""
    folder = _folder_key(name)
    taken = folder in _RESERVED or folder in _FILES or folder.endswith(_SUFFIXES) or name.endswith(".")
    fits = _NAME.fullmatch(name) and len(name.encode()) <= _LONGEST
    return f"{name if len(name) <= 60 else name[:57] + '...'!r} is no name for a stage" if taken or not fits else None


def _folder_key(name: str) -> str:
    """The same for names that some file systems take for one: other cases of letters, other ways to write an accent."""
    return unicodedata.normalize("NFKC", name).casefold()


def _sampled_problems(recipe: Recipe, text: Text, name: str, stage: Stage) -> Iterator[UserError]:
    """Rows of another stage: it samples some, and of the kind that this one reads."""
    source = data_stage(recipe, name)
    if source is None or (sampling := recipe.stages.get(source)) is None or sampling.record.trains:
        return  # said of the entry
    there: Path_ = ("stages", name, "data")
    given, wanted = sampling.record.row_kinds(sampling.method()), stage.rows
    if wanted not in given:
        said = f"reads {_ROWS[wanted]}, and {source} samples {_listed([_ROWS[each] for each in given])}"
        fitting = {"pair": "best_worst", "demo": "best", "label": "best_worst", "prompt": "best"}[wanted]
        yield problem(text, there, said, f"set stages.{source}.keep: {fitting}, or read other data")


_OF_ITS_OWN = " (full: true, which makes a model of its own)"
_ROWS = {"demo": "demonstrations", "pair": "pairs", "label": "labelled replies", "prompt": "prompts"}


def _listed(words: list[str]) -> str:
    return " or ".join(words) if words else "replies and their scores for people to look at"


def _idle_problems(text: Text, here: Path_, stage: Stage) -> Iterator[UserError]:
    """What a stage says of its training where nothing trains."""
    if stage.record.trains:
        return
    said = {"train": stage.train, "lora": stage.lora.model_dump(exclude_none=True), "on_nonfinite": stage.on_nonfinite}
    for key, value in said.items():
        if value:
            words = f"has no effect: a {stage.record.name} stage trains nothing"
            yield problem(text, (*here, key), words, "leave it out")


def _is_full(recipe: Recipe, name: object) -> bool:
    return isinstance(name, str) and name in recipe.stages and recipe.stages[name].full


def _full_problems(recipe: Recipe, text: Text, name: str, stage: Stage) -> Iterator[UserError]:
    """A stage that trains the whole model stands alone in its run, where all else is adapters of one base."""
    here: Path_ = ("stages", name)
    if _is_full(recipe, stage.parent):
        said = f"{stage.parent!r} trains a whole model, and a stage of this run starts from an adapter of its base"
        remedy = f"write a recipe of its own, with model.base: RUN/{stage.parent} and from: base"
        yield problem(text, (*here, "from"), said, remedy)
    if not stage.full:
        return
    if not stage.record.trains:
        yield problem(text, (*here, "full"), f"has no effect: a {stage.kind} stage trains nothing", "leave it out")
        return
    if stage.record.full_learning_rate is None:
        said = f"all weights train in stages of kind sft, reward, dpo and kto, and this one is of kind {stage.kind}"
        yield problem(text, (*here, "full"), said, "leave it out, and start from a base whose weights were trained so")
    if stage.parent != BASE:
        said = f"is {stage.parent!r}, and a whole model starts from the base"
        remedy = "merge the adapter (preftune merge ADAPTER OUT) and start from the result: model.base: OUT"
        yield problem(text, (*here, "from"), said, remedy)
    if stage.lora.model_dump(exclude_none=True):
        yield problem(text, (*here, "lora"), "has no effect: the stage trains the whole model", "leave it out")
    if recipe.model.quantization is not None:
        said = "the weights that it trains are packed by model.quantization"
        yield problem(text, (*here, "full"), said, "leave one of them out")


def _circle(recipe: Recipe, text: Text) -> Iterator[UserError]:
    known = {name: [each for each in parents(recipe, name) if each in recipe.stages] for name in recipe.stages}
    try:
        _ordered(known)
    except ValueError as error:
        circle = error.args[0]
        shown = [*circle[:4], "...", *circle[-4:]] if len(circle) > _SHOWN else circle
        reads = any(data_stage(recipe, each) in circle for each in circle)
        where: Path_ = ("stages", circle[0], "from")
        remedy = "let one of them start from base, or read other data" if reads else "let one of them start from base"
        yield problem(text, where, f"a circle: {' -> '.join(shown)}", remedy)


def fill_eval(recipe: Recipe) -> None:
    """Without `policies`, the evaluation looks at the base and every stage that is a policy."""
    if recipe.eval is not None and not recipe.eval.policies:
        recipe.eval.policies = [BASE, *policies(recipe)]


def _data_problems(recipe: Recipe, text: Text) -> Iterator[UserError]:
    entries: list[tuple[Path_, Data]] = [(("data", name), entry) for name, entry in recipe.data.items()]
    if recipe.eval is not None and (recipe.eval.prompts.stage or ("eval", "prompts") not in text.copied):
        entries.append((("eval", "prompts"), recipe.eval.prompts))
    for path, entry in entries:
        if entry.stage is not None:
            yield from _stage_entry_problems(recipe, text, path, entry)
            continue
        if entry.path is None and not entry.sources:
            yield problem(text, path, "has neither path nor sources", "give one path, or a list of sources")
        if entry.path is not None and entry.sources:
            yield problem(text, (*path, "sources"), "stands beside path", "give one path, or a list of sources")
        if entry.sources:
            for key in ("split", "columns", "name", "revision", "streaming"):
                if getattr(entry, key) not in (None, False):
                    yield problem(text, (*path, key), "belongs to one source", "write it into that source")


def _stage_entry_problems(recipe: Recipe, text: Text, path: Path_, entry: Data) -> Iterator[UserError]:
    """An entry that is the rows of a stage."""
    here: Path_ = (*path, "stage")
    for key in ("path", "sources", "split", "columns", "name", "revision", "streaming"):
        if getattr(entry, key) not in (None, False):
            yield problem(
                text, (*path, key), "stands beside stage, whose rows are read as it wrote them", "leave it out"
            )
    sampling = [name for name, stage in recipe.stages.items() if not stage.record.trains]
    if path[0] == "eval":
        yield problem(text, path, "the evaluation's prompts are there before anything trains", "give a path")
    elif entry.stage not in sampling:
        known = recipe.stages.get(str(entry.stage))
        said = f"no stage {entry.stage!r}" if known is None else f"stage {entry.stage!r} is of kind {known.kind}"
        remedy = nearest(str(entry.stage), sampling) if sampling else "add a stage of kind sample"
        yield problem(text, here, f"{said}, expected one that samples rows", remedy)


def _reward_problems(recipe: Recipe, text: Text, name: str, stage: Stage, rewards: list[str]) -> Iterator[UserError]:
    for index, source in enumerate(stage.rewards):
        path: Path_ = ("stages", name, "reward", index)
        kind = source.scorer
        if kind not in SCORERS:
            yield _no_kind(text, path, source)
            continue
        fields = SCORERS[kind].fields
        for key in source.settings():
            if key not in fields:
                remedy = meant(key, "reward") or nearest(key, (*fields, "kind", "name", "weight", "on_failure"))
                yield problem(text, (*path, key), f"a {kind} source takes no {key!r}", remedy)
        if kind == "reward" and (source.stage is None) == (source.settings().get("adapter") is None):
            said = "a reward source needs a stage or an adapter folder, not both"
            yield problem(text, path, said, "write stage: reward")
        if source.stage is not None and kind == "reward" and source.stage not in rewards:
            known = recipe.stages.get(source.stage)
            said = f"no stage {source.stage!r}" if known is None else f"stage {source.stage!r} is of kind {known.kind}"
            said += _OF_ITS_OWN if known is not None and known.full else ""
            remedy = nearest(source.stage, rewards) if rewards else "add a stage of kind reward"
            yield problem(text, path, f"{said}, expected a reward stage", remedy)
        if kind == "function" and ":" not in str(source.function or ""):
            yield problem(
                text, path, f"is {source.function!r}, expected module:function", "write my_module:my_function"
            )
        if kind == "model" and not source.model:
            yield problem(text, path, "names no model", "write model: FOLDER, or a hub id")
        if isinstance(source.on_failure, float) and abs(source.on_failure) > _LARGEST:
            yield problem(text, (*path, "on_failure"), f"is {source.on_failure}", "write stop, skip or a number")


def _teacher_problems(recipe: Recipe, text: Text, name: str, stage: Stage) -> Iterator[UserError]:
    """A teacher that is named in one way, and is there."""
    teacher, path = stage.taught_by, ("stages", name, "teacher")
    if teacher is None:
        return
    given = [key for key in ("stage", "adapter", "model") if getattr(teacher, key) is not None]
    if len(given) != 1:
        said = f"names {' and '.join(given) or 'nobody'}, expected one of stage, adapter and model"
        yield problem(text, path, said, "write a hub id or a folder, or {stage: NAME}")
        return
    if teacher.revision is not None and teacher.model is None:
        yield problem(text, (*path, "revision"), "belongs to a model on the hub", "leave it out")
    if teacher.adapter is not None:
        yield from _import_problems(text, path, Path(teacher.adapter).expanduser())
    if teacher.model in recipe.stages:
        said = f"{teacher.model!r} is a stage of the recipe, expected a hub id or a folder"
        yield problem(text, path, said, f"write teacher: {{stage: {teacher.model}}}")
    if teacher.stage is not None:
        known, others = recipe.stages.get(teacher.stage), [each for each in speaking(recipe) if each != name]
        if known is None or not known.record.speaks:
            kind = "" if known is None else f" is of kind {known.kind}{_OF_ITS_OWN if known.full else ''}"
            said = f"{'no stage' if known is None else 'stage'} {teacher.stage!r}{kind}, expected one that speaks"
            yield problem(text, path, said, nearest(teacher.stage, others))


def _no_kind(text: Text, path: Path_, source: Reward) -> UserError:
    """The error of a source that is of none of the kinds, or of several."""
    known = ", ".join(SCORERS)
    if source.kind is None:
        given = [key for key in IMPLIED if getattr(source, key) is not None]
        if unknown := next(iter(source.model_extra or {}), None):
            known_key = any(unknown in each.fields for each in SCORERS.values())
            if not known_key:
                said = f"{unknown!r} is no key of a source of scores"
                remedy = meant(unknown, "reward") or nearest(unknown, ("kind", *IMPLIED, "weight", "on_failure"))
                return problem(text, (*path, unknown), said, remedy)
        said = f"names {' and '.join(given) or 'nothing'}, expected one of {', '.join(IMPLIED)}, or a kind"
        return problem(text, path, said, "give each source its own entry" if given else f"write kind: one of {known}")
    if source.kind == "human":
        return problem(text, (*path, "kind"), "people compare replies, and a reward scores one", f"use one of {known}")
    return problem(text, (*path, "kind"), f"is {source.kind!r}, expected one of {known}", nearest(source.kind, SCORERS))


def _said_twice(text: Text, here: Path_, stage: Stage) -> Iterator[UserError]:
    for key, value in stage.method().items():
        if key in stage.train:
            said = f"{key} is said twice, as {value!r} beside train and as {stage.train[key]!r} in it"
            yield problem(text, (*here, "train", key), said, "keep the one beside train")


def _eval_problems(recipe: Recipe, text: Text) -> Iterator[UserError]:
    yield from served_problems(recipe, text)
    if recipe.eval is None:
        return
    part = recipe.eval
    known = [BASE, *speaking(recipe)]
    curve = part.over_optimisation is not None
    if found := beam_problem(part.beams or 1, temperature=part.temperature, kl=part.kl, over_optimisation=curve):
        yield problem(text, ("eval", "beams"), *found)
    unknown = [policy for policy in part.policies if policy not in known]
    for index, policy in enumerate(part.policies):
        if policy in unknown:
            stage = recipe.stages.get(policy)
            what = {"reward": " (a reward model)", "rows": " (it samples rows)", "policy": " of this run's base"}
            said = f"{policy!r} is no policy{'' if stage is None else what[stage.record.produces]}"
            remedy = nearest(policy, known)
            if stage is not None and stage.full:
                said += _OF_ITS_OWN
                remedy = f"evaluate it as the base of another recipe: model.base: RUN/{policy}"
            yield problem(text, ("eval", "policies", index), said, remedy)
    if part.reference not in (*part.policies, BASE) and part.policies and not unknown:
        said = f"{part.reference!r} is not among the policies"
        yield problem(text, ("eval", "reference"), said, nearest(part.reference, part.policies))
    for index, judge in enumerate(part.judges):
        named = judge.get("stage")
        rewards = reward_models(recipe)
        if named is not None and named not in rewards:
            said = f"no reward stage {named!r}" + (_OF_ITS_OWN if _is_full(recipe, named) else "")
            remedy = nearest(str(named), rewards) if rewards else "add a stage of kind reward"
            yield problem(text, ("eval", "judges", index, "stage"), said, remedy)
