"""`preftune doctor`: which stage of a run is bad, and why."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..recipes.build import stage_job
from ..recipes.graph import order, unused_stages
from ..recipes.schema import Recipe
from .folder import RunFolder
from .output import Output
from .policies import recipe_base, run_recipe, sampling_spec
from .process import quiet_libraries

if TYPE_CHECKING:
    from ..eval.doctor.examine import Checkup, Examination
    from ..models.base import Base


def doctor_run(run: Path, samples: int, output: Output) -> int:
    """Examine a run, write RUN/doctor.json, and print what was found.

    Returns:
        The exit code: 1 where something is broken.

    Raises:
        UserError: there is no run folder, or nothing in it.
    """
    recipe = run_recipe(run)
    quiet_libraries()
    from ..eval.doctor import examine
    from ..eval.doctor.examine import write_examination
    from ..eval.doctor.finding import first_broken

    base = recipe_base(recipe)
    examination = examine(checkup(recipe, base, run, samples))
    write_examination(run, examination)
    _show(examination, output)
    return 0 if first_broken(examination.findings) is None else 1


def checkup(recipe: Recipe, base: "Base", run: Path, samples: int) -> "Checkup":
    """What the doctor needs to know of a run of that recipe."""
    from ..eval.doctor.examine import Checkup

    folder = RunFolder(run)
    stamps = {name: folder.stamp(name) for name in recipe.stages}
    return Checkup(
        run_dir=run,
        jobs=tuple(stage_job(recipe, name, base, run, run / name) for name in order(recipe)),
        evaluation=sampling_spec(recipe, base, run),
        elsewhere={name for name, stamp in stamps.items() if stamp is not None and "from_adapter" in stamp.parts},
        unused=unused_stages(recipe),
        samples=samples,
    )


def _show(examination: "Examination", output: Output) -> None:
    """Print the findings; then, for people, what to do about them."""
    from ..eval.doctor.finding import first_broken

    findings = examination.findings
    if output.json:
        output.rows(each.as_dict() for each in findings)
    else:
        output.rows(
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
        output.say(f"left out: {line}")
    for each in findings:
        if each.level != "OK":
            output.say(f"{each.level}: {each.stage}, {each.check}: {each.number()}; {each.remedy}")
    worst, looks = first_broken(findings), sum(each.level == "look" for each in findings)
    if worst is None:
        output.say(f"nothing is broken in {len(findings)} checks; worth a look: {looks}")
    else:
        output.say(f"{worst.stage} is broken ({worst.check}); stages that come from it inherit that")
