"""`preftune eval benchmarks`: measured, kept in the run's evaluation, and shown."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import BENCHMARKS, EVALUATION, REPORT, write_whole
from .folder import RunFolder, seal
from .output import Output
from .process import quiet_libraries

if TYPE_CHECKING:
    from ..eval.spec import EvalSpec

_COLUMNS = ("policy", "task", "metric", "value", "stderr", "difference", "difference_low", "difference_high", "n")


def measure(spec: "EvalSpec", run: Path) -> dict[str, Any]:
    """Asks every policy, and writes the answers beside what else the run's evaluation holds; report.html with them.

    Raises:
        UserError: before anything is loaded, where a task cannot be asked; see `harness.tasks.load_tasks`.
    """
    quiet_libraries()
    from ..eval.harness.measure import measure_benchmarks
    from ..eval.harness.tasks import load_tasks
    from ..eval.report.page import write_report
    from ..eval.report_state import check_replaceable
    from ..eval.workbench import Workbench

    assert spec.benchmarks is not None
    folder = RunFolder(run)
    with folder.lock(existing=True):
        folder.check_places([EVALUATION])
        check_replaceable(run / REPORT)
        # before the base is loaded, which takes longer
        loaded = load_tasks(spec.benchmarks)
        # nothing is judged: no prompts are read, no rewards opened
        bench = Workbench.open(replace(spec, judges=(), reward_models=(), over_optimisation=None))
        content = measure_benchmarks(bench, spec.benchmarks, loaded)
        stamp, place = folder.stamp(EVALUATION), run / EVALUATION
        place.mkdir(exist_ok=True)
        write_whole(place / BENCHMARKS, json.dumps(content, indent=2) + "\n")
        if stamp is not None:
            seal(place, stamp)
        write_report(run)
    return content


def show_benchmarks(content: Mapping[str, Any], as_json: bool) -> None:
    """A row for each policy, task and metric."""
    output = Output(as_json)
    if as_json:
        output.rows(content["rows"])
        return
    output.rows({key: row.get(key) for key in _COLUMNS} for row in content["rows"])
    output.say(
        "\ndifference: to the base, with its 95% interval over documents that both were asked"
        f" (lm-eval {content['lm_eval']})"
    )
