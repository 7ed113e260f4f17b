"""From the recipe to what the stages and the evaluation take."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import ADAPTER_CONFIG, LINEAGE, ROWS
from ..intact import read_json_object
from . import schema
from .schema import BASE, Data, Precision, Recipe, Reward, Stage

if TYPE_CHECKING:
    from ..data.spec import DataSpec
    from ..eval.spec import Benchmarks, EvalSpec, OverOptimisation, RewardModel
    from ..models.base import Base
    from ..models.lora import LoraSpec
    from ..stages.job import StageJob, Trackers
    from ..stages.ppo.rewards import RewardSource
    from ..stages.teachers import TeacherSource


def data_spec(entry: Data, seed: int) -> "DataSpec":
    """The data room's description of an entry; `seed` where the entry has none of its own.

    The rows of a stage that samples are a file below the run folder, which `folders` has for who reads them.
    """
    from ..data.spec import DataSpec, OnProblem, SourceSpec

    if entry.sources:
        sources = tuple(SourceSpec(**each.model_dump()) for each in entry.sources)
    elif entry.stage is not None:
        sources = (SourceSpec(f"{entry.stage}/{ROWS}"),)
    else:
        assert entry.path is not None  # the graph's check
        sources = (
            SourceSpec(
                entry.path,
                split=entry.split,
                columns=entry.columns,
                name=entry.name,
                revision=entry.revision,
                streaming=entry.streaming,
            ),
        )
    return DataSpec(
        sources,
        max_prompt_length=entry.max_prompt_length,
        max_length=entry.max_length,
        overflow=entry.overflow,
        limit=entry.limit,
        held_out=entry.held_out,
        seed=seed if entry.seed is None else entry.seed,
        system=entry.system,
        on_problem=OnProblem(**entry.on_problem.model_dump(exclude_none=True)),
    )


def folders(recipe: Recipe, run_dir: Path | None = None) -> tuple[Path, ...]:
    """Where relative paths are looked up; the data room adds the shipped data.

    Args:
        run_dir: the run, for rows that its stages sample: before all else, as a recipe may lie in another run's folder.
    """
    return (*(() if run_dir is None else (run_dir,)), *(() if recipe.folder is None else (recipe.folder,)))


def data_folders(recipe: Recipe, name: str, run_dir: Path) -> tuple[Path, ...]:
    """Where a data entry's paths are looked up."""
    return folders(recipe, None if recipe.data[name].stage is None else run_dir)


def run_folders(recipe: Recipe, run_dir: Path) -> tuple[Path, ...]:
    """Where the paths of any data entry are looked up, those of sampled rows among them."""
    sampled = any(entry.stage is not None for entry in recipe.data.values())
    return folders(recipe, run_dir if sampled else None)


def lora_spec(recipe: Recipe, name: str) -> "LoraSpec":
    """The stage's adapter: the recipe's, with what the stage says differently."""
    from ..models.lora import LoraSpec

    return LoraSpec(**lora_values(recipe, name))


def lora_values(recipe: Recipe, name: str) -> dict[str, Any]:
    """The same as plain values."""
    return recipe.lora.model_dump() | recipe.stages[name].lora.model_dump(exclude_none=True)


def reward_sources(stage: Stage, run_dir: Path) -> "tuple[RewardSource, ...]":
    """Where the stage's scores come from; a reward stage is its folder in the run."""
    return tuple(reward_source(each, run_dir) for each in stage.rewards)


def reward_source(reward: Reward, run_dir: Path) -> "RewardSource":
    """One of them."""
    from ..stages.ppo.rewards import RewardSource

    kind, settings = reward.scorer, reward.settings()
    rule = "stop" if reward.on_failure is None else reward.on_failure
    if kind == "reward":
        folder = run_dir / reward.stage if reward.stage is not None else Path(settings["adapter"]).expanduser()
        return RewardSource("stage", str(folder), reward.weight, on_failure=rule)
    if kind == "model":
        size = {"batch_size": settings["batch_size"]} if "batch_size" in settings else {}
        return RewardSource("model", str(reward.model), reward.weight, size, rule)
    if kind == "function":
        return RewardSource("function", str(reward.function), reward.weight, on_failure=rule)
    assert kind is not None  # the graph's check
    return RewardSource(kind, reward.called, reward.weight, settings, rule, run_dir)  # pyright: ignore[reportArgumentType]: one of them


def teacher_source(recipe: Recipe, name: str, run_dir: Path) -> "TeacherSource | None":
    """Whom the stage learns from, if it does so from anyone; a stage is its folder in the run."""
    from ..stages.teachers import TeacherSource

    named, model = recipe.stages[name].taught_by, recipe.model
    if named is None:
        return None
    loaded = {"quantization": model.quantization, "packed": model.packed, "where": f"stages.{name}.teacher"}
    if named.stage is not None:
        return TeacherSource(adapter=run_dir / named.stage, stage=named.stage, **loaded)
    if named.adapter is not None:
        return TeacherSource(adapter=Path(named.adapter).expanduser(), **loaded)
    if named.model == model.base and named.revision is None:
        # the student's own base, of the revision that it has
        return TeacherSource(model=recipe.base_spec, revision=model.revision, **loaded)
    return TeacherSource(model=named.model, revision=named.revision, **loaded)


def start_folder(stage: Stage, run_dir: Path) -> Path | None:
    """The folder of the adapter that a stage starts from; None for the base."""
    if stage.imports is not None or stage.parent == BASE:
        return stage.imports
    return run_dir / stage.parent


def nonfinite_skips(stage: Stage) -> int:
    """The N of `on_nonfinite: skip(N)`; 0 for `stop`."""
    word = stage.on_nonfinite or "stop"
    return 0 if word == "stop" else int(word.removeprefix("skip(").removesuffix(")"))


def base_dtype(recipe: Recipe) -> Precision:
    """The precision of the base; what `auto` stands for here where the recipe says that.

    A stage that asks for `fp16` in its `train` means a float32 base that is cast to float16 in its products.
    """
    said = recipe.model.dtype
    if said != "auto":
        return said
    if any(stage.train.get("fp16") for stage in recipe.stages.values()):
        return "float32"
    from ..models.devices import auto_dtype

    return auto_dtype()


def stage_job(
    recipe: Recipe, name: str, base: "Base", run_dir: Path, output_dir: Path, parent: Path | None = None
) -> "StageJob":
    """One stage, resolved.

    Args:
        run_dir: where the folders of the stages that it needs lie.
        output_dir: where it writes.
        parent: an adapter folder to start from instead of the recipe's `from`.
    """
    from ..stages.job import CheckpointPlan, StageJob

    stage = recipe.stages[name]
    if parent is None:
        parent = start_folder(stage, run_dir)
    seed = recipe.seed if stage.seed is None else stage.seed
    return StageJob(
        name=name,
        kind=stage.kind,
        base=base,
        dtype=base_dtype(recipe),
        quantization=recipe.model.quantization,
        lora=lora_spec(recipe, name).on(base),
        full=stage.full,
        parent=parent,
        data=data_spec(recipe.data[stage.data], recipe.seed),
        folders=data_folders(recipe, stage.data, run_dir),
        method=stage.method(),
        train=dict(stage.train),
        rewards=reward_sources(stage, run_dir),
        teacher=teacher_source(recipe, name, run_dir),
        seed=seed,
        output_dir=output_dir,
        chat_template=recipe.model.chat_template,
        template_date=recipe.model.template_date,
        packed=recipe.model.packed,
        data_name=stage.data,
        checkpoints=CheckpointPlan(recipe.checkpoints.share, recipe.checkpoints.minutes),
        nonfinite_skips=nonfinite_skips(stage),
        deterministic=recipe.deterministic,
        trackers=trackers(recipe, run_dir),
    )


def trackers(recipe: Recipe, run_dir: Path) -> "Trackers":
    """Who is told of the run: its project is the recipe, and the run's folder says which of its runs it is."""
    from ..stages.job import Trackers

    return Trackers(tuple(recipe.trackers), recipe.name, run_dir.absolute().name)


def policy_folder(recipe: Recipe, run_dir: Path, name: str) -> Path:
    """Where a policy's adapter lies: in the run, or, where a stage was started with `--from-adapter` in its place,
    where that stage's lineage says."""
    own = run_dir / name
    if (own / ADAPTER_CONFIG).is_file():
        return own
    for child, stage in recipe.stages.items():
        file = run_dir / child / LINEAGE
        if stage.parent != name or not file.is_file():
            continue
        above = read_json_object(file).get("parents")
        first = above[0] if isinstance(above, list) and above and isinstance(above[0], dict) else {}
        folder = Path(str(first.get("adapter") or own))
        if (folder / ADAPTER_CONFIG).is_file():
            from ..models.lineage import adapter_sha256

            if adapter_sha256(folder) == first.get("sha256"):
                return folder
    return own


def eval_spec(recipe: Recipe, base: "Base", run_dir: Path, policies: list[str] | None = None) -> "EvalSpec":
    """The recipe's evaluation (it must have one), of all its policies or of some."""
    from ..eval.spec import EvalSpec
    from ..eval.statistics.over_seeds import seed_groups

    part = recipe.eval
    assert part is not None
    return EvalSpec(
        base=base,
        policies={
            name: None if name == BASE else policy_folder(recipe, run_dir, name) for name in policies or part.policies
        },
        reference=part.reference,
        prompts=data_spec(part.prompts, recipe.seed),
        folders=run_folders(recipe, run_dir),
        judges=tuple(part.judges),
        dtype=base_dtype(recipe),
        quantization=recipe.model.quantization,
        max_new_tokens=part.max_new_tokens,
        temperature=part.temperature,
        seed=recipe.seed if part.seed is None else part.seed,
        kl=part.kl,
        batch_size=part.batch_size,
        beams=part.beams or 1,
        output_dir=run_dir,
        chat_template=recipe.model.chat_template,
        template_date=recipe.model.template_date,
        packed=recipe.model.packed,
        reward_models=tuple(reward_model(recipe, name, run_dir) for name in reward_stages(recipe, left_out=True)),
        over_optimisation=None if part.over_optimisation is None else over_optimisation(recipe, run_dir),
        rollout=None if part.rollout is None else part.rollout.settings(),
        seed_groups=tuple(map(tuple, seed_groups(recipe.resolved()["stages"]))),
        trackers=trackers(recipe, run_dir),
        benchmarks=None if part.benchmarks is None else benchmarks(part.benchmarks),
    )


def benchmarks(part: schema.Benchmarks) -> "Benchmarks":
    """The section of the recipe's evaluation, as the evaluation reads it."""
    from ..eval.spec import Benchmarks

    folder = None if part.include_path is None else Path(part.include_path).expanduser()
    return Benchmarks(**{**part.model_dump(), "tasks": tuple(part.tasks), "include_path": folder})


def over_optimisation(recipe: Recipe, run_dir: Path) -> "OverOptimisation":
    """The section of the recipe's evaluation (it must have one, settled when the recipe was loaded)."""
    from ..eval.spec import OverOptimisation

    assert recipe.eval is not None and recipe.eval.over_optimisation is not None
    part = recipe.eval.over_optimisation
    assert part.policy is not None and part.proxy is not None
    return OverOptimisation(
        gold=part.gold,
        proxy=part.proxy,
        stage=part.policy,
        folder=run_dir / part.policy,
        start=start_folder(recipe.stages[part.policy], run_dir),
        best_of=part.best_of,
        prompts=part.prompts,
    )


def reward_stages(recipe: Recipe, *, left_out: bool = False) -> list[str]:
    """The stages that order pairs: reward models, and policies with an implicit reward (DPO, IPO, KTO).

    Args:
        left_out: only those that keep a part of their data out of training, which is what the evaluation measures.
    """
    those = [name for name, stage in recipe.stages.items() if stage.record.orders_pairs]
    return [name for name in those if not left_out or recipe.data[recipe.stages[name].data].held_out > 0]


def reward_model(recipe: Recipe, name: str, run_dir: Path, data: "DataSpec | None" = None) -> "RewardModel":
    """One of `reward_stages`, to be measured on its own data entry or on other pairs."""
    from ..eval.spec import RewardModel

    stage = recipe.stages[name]
    implicit = stage.record.produces == "policy"
    return RewardModel(
        stage=name,
        kind="implicit" if implicit else "reward",
        folder=run_dir / name,
        data=data_spec(recipe.data[stage.data], recipe.seed) if data is None else data,
        parent=start_folder(stage, run_dir) if implicit else None,
    )


def data_values(spec: "DataSpec") -> dict[str, Any]:
    """What of a data entry shapes a stage's rows besides their content: everything but the paths."""
    from ..data.spec import ANSWERS

    values = asdict(spec)
    del values["sources"]
    # what it says by default has always been so: no key of an older run changes
    values["on_problem"] = {kind: said for kind, said in values["on_problem"].items() if said != ANSWERS[kind][0]}
    return values if values["on_problem"] else {key: value for key, value in values.items() if key != "on_problem"}
