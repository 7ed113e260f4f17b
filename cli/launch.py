"""A stage under `accelerate launch`: the chain stays one process, the stage becomes as many as the config says."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import UserError

if TYPE_CHECKING:
    from ..stages.job import StageJob


class StageFailed(Exception):
    """A launched stage ended with another exit code than 0; its own message stands above."""


def launch_stage(config: Path, run_dir: Path, job: "StageJob", from_adapter: Path | None) -> Mapping[str, Any]:
    """Run the stage of RUN/recipe.yaml in its own processes; it writes into the job's output folder.

    Args:
        config: what `accelerate config` wrote.

    Raises:
        UserError: no such config.
        StageFailed: the stage failed.
    """
    if not config.is_file():
        raise UserError("--launch", f"no file {str(config)!r}", "write one with `accelerate config --config_file FILE`")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", __name__, str(run_dir), job.name, *([str(from_adapter)] if from_adapter else [])]
    # functions beside the recipe must be found in there too
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    code = subprocess.run(command, check=False, env=environment).returncode
    if code != 0:
        raise StageFailed(f"{job.name} ended with exit code {code} under accelerate launch")
    return json.loads((job.output_dir / "metrics.json").read_text(encoding="utf-8"))


def _process(run_dir: Path, name: str, from_adapter: Path | None = None) -> None:
    """What each of the stage's processes does."""
    from ..models.base import resolve_base
    from ..recipes.build import stage_job
    from ..recipes.load import load_recipe
    from ..stages.job import run_stage
    from .chain import import_from_here
    from .folder import RunFolder

    recipe = load_recipe(run_dir / "recipe.yaml")
    import_from_here(recipe)
    base = resolve_base(recipe.model.base, recipe.model.revision)
    output = RunFolder(run_dir).partial(name)
    run_stage(stage_job(recipe, name, base, run_dir, output, from_adapter))


if __name__ == "__main__":
    from .main import guarded

    folder, stage, *adapter = sys.argv[1:]
    sys.exit(guarded(lambda: _process(Path(folder), stage, Path(adapter[0]) if adapter else None)))
