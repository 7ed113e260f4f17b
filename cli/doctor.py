"""`preftune doctor`: which stage of a run is bad, and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import UserError
from ..recipes.build import ROWS, data_spec, eval_spec, folders, stage_job
from ..recipes.graph import order
from ..recipes.load import load_recipe
from ..recipes.schema import BASE, PPOStage, Recipe
from .chain import hush, import_from_here
from .folder import RunFolder
from .progress import Voice

if TYPE_CHECKING:
    from ..eval.doctor import Checkup, Examination
    from ..eval.spec import EvalSpec
    from ..models.base import Base


def doctor_run(run: Path, samples: int, voice: Voice) -> int:
    """Examine a run, write RUN/doctor.json, say what was found.

    Returns:
        The exit code: 1 where something is broken.

    Raises:
        UserError: no run folder, or nothing in it.
    """
    file = run / "recipe.yaml"
    if not file.is_file():
        raise UserError(str(run), "holds no recipe.yaml", "give the folder of a run (runs/NAME)")
    recipe = load_recipe(file)
    import_from_here(recipe)
    hush()
    from ..eval.doctor import examine, first_broken, write_examination
    from ..models.base import resolve_base

    base = resolve_base(recipe.model.base, recipe.model.revision)
    examination = examine(checkup(recipe, base, run, samples))
    write_examination(run, examination)
    _show(examination, voice)
    return 0 if first_broken(examination.findings) is None else 1


def checkup(recipe: Recipe, base: "Base", run: Path, samples: int) -> "Checkup":
    """What is to be examined of a run of that recipe."""
    from ..eval.doctor import Checkup

    folder = RunFolder(run)
    stamps = {name: folder.stamp(name) for name in recipe.stages}
    rows: Any = ROWS
    return Checkup(
        run_dir=run,
        jobs=tuple(stage_job(recipe, name, base, run, run / name) for name in order(recipe)),
        evaluation=_sampling(recipe, base, run),
        rows=rows,
        elsewhere={name for name, stamp in stamps.items() if stamp is not None and "from_adapter" in stamp.parts},
        samples=samples,
    )


def _sampling(recipe: Recipe, base: "Base", run: Path) -> "EvalSpec":
    """Prompts and settings of fresh samples: the evaluation's, else those of PPO, else the first stage's data."""
    if recipe.eval is not None:
        return eval_spec(recipe, base, run)
    from ..eval.spec import EvalSpec

    ppo = next((stage for stage in recipe.stages.values() if isinstance(stage, PPOStage)), None)
    stage = ppo or next(iter(recipe.stages.values()))
    given = {} if ppo is None else {"max_new_tokens": ppo.max_new_tokens, "temperature": ppo.temperature}
    return EvalSpec(
        base=base,
        policies={},
        reference=BASE,
        prompts=data_spec(recipe.data[stage.data], recipe.seed),
        folders=folders(recipe),
        dtype=recipe.model.dtype,
        quantization=recipe.model.quantization,
        seed=recipe.seed,
        kl=False,
        chat_template=recipe.model.chat_template,
        packed=recipe.model.packed,
        **{key: value for key, value in given.items() if value is not None},
    )


def _show(examination: "Examination", voice: Voice) -> None:
    """The findings; then, for people, what to do about them."""
    from ..eval.doctor import first_broken

    findings = examination.findings
    if voice.json:
        voice.rows(each.as_dict() for each in findings)
    else:
        voice.rows(
            {
                "level": each.level,
                "stage": each.stage,
                "check": each.check,
                "measured": each.number(),
                "threshold": each.threshold,
            }
            for each in findings
        )
    for line in examination.left_out:
        voice.say(f"left out: {line}")
    for each in findings:
        if each.level != "OK":
            voice.say(f"{each.level}: {each.stage}, {each.check}: {each.number()}; {each.remedy}")
    worst, looks = first_broken(findings), sum(each.level == "look" for each in findings)
    if worst is None:
        voice.say(f"nothing is broken in {len(findings)} checks; worth a look: {looks}")
    else:
        voice.say(f"{worst.stage} is broken ({worst.check}); stages that come from it inherit that")
