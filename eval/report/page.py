"""The page: every section that there is something for, through the templates."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from ...files import REPORT, write_whole
from ...printed import redacted
from ...values import is_number
from ...version import __version__
from .. import replies
from ..judges.verdicts import LENGTH_CONTROL_PROMPTS
from ..report_state import check_replaceable, state_of
from ..statistics.over_seeds import seed_groups, shared_name
from . import benchmarks, doctor, frontier, head, lengths, lineage, reward_models, sampled, samples, svg, text, winrates
from .curves import EVERY_PANEL, seed_curves, stage_curves
from .read import Run, StageRecord, number, read_run

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Section:
    """One section: its id and template's name, its heading, and what the template is given as `it`."""

    id: str
    title: str
    it: Any


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from whatever the run folder holds so far, and returns its path.

    Raises:
        UserError: the folder holds neither a stage nor an evaluation, a file that cannot be read, or a page of another
            kind in its place.
    """
    run_dir = Path(run_dir)
    check_replaceable(run_dir / REPORT)
    # A lone surrogate in a reply has no UTF-8; it becomes a question mark.
    page = render(read_run(run_dir)).encode("utf-8", "replace").decode("utf-8")
    return write_whole(run_dir / REPORT, page)


def render(run: Run) -> str:
    """The page as one HTML text that fetches nothing."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        short=text.short,
        fixed=text.fixed,
        percent=text.percent,
        pm=text.plus_minus,
        pm_percent=text.percent_error,
        duration=text.duration,
        size=text.size,
        hash12=text.hash12,
        listed=text.listed,
    )
    environment.globals.update(key=svg.key, series=svg.series, percents=text.percents)
    sections = [section for section in _sections(run) if section.it]
    return environment.get_template("report.html.j2").render(
        run=run,
        sections=sections,
        facts=head.facts(run),
        verdict=head.verdict(run),
        cards=head.cards(run),
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        made_for=state_of(run.folder) if run.folder is not None else None,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )


def _sections(run: Run) -> list[Section]:
    return [
        Section("trained", "What was trained", _trained(run)),
        Section("curves", "Learning curves", _curves(run)),
        Section("sampled", "What was sampled", sampled.sampled_rows(run)),
        Section("winrates", "Win-rates", _winrates(run)),
        Section("frontier", "Reward against KL", _frontier(run)),
        Section("rewards", "Reward models", reward_models.reward_rows(run)),
        Section("benchmarks", "What was forgotten", benchmarks.benchmark_table(run)),
        Section("lengths", "Reply lengths", lengths.length_figures(run)),
        Section("samples", "Samples", samples.browser(run)),
        Section(
            "doctor",
            "The doctor's findings",
            {
                "groups": doctor.by_stage(run),
                "counts": doctor.counted(run),
                "run": run,
                "stale": doctor.stale(run),
                "unexamined": doctor.unexamined(run),
            },
        ),
        Section("recipe", "Recipe and versions", _recipe(run)),
    ]


def _trained(run: Run) -> dict[str, Any] | None:
    if not any(stage.folder or stage.state != "not run" for stage in run.stages):
        return None
    graph = lineage.stage_graph(run)
    return {
        "across": lineage.draw_graph(graph, across=True),
        "down": lineage.draw_graph(graph, across=False),
        "words": lineage.describe(graph.nodes),
        "scored": any(dashed for node in graph.nodes if not node.taught for _, dashed in node.parents),
        "taught": any(dashed for node in graph.nodes if node.taught for _, dashed in node.parents),
        "sampled": any(not stage.trains for stage in run.stages),
        "rows": lineage.table(run),
    }


def _curves(run: Run) -> list[dict[str, Any]]:
    shown = _over_seeds(run)
    for stage in run.stages:
        main, rest = stage_curves(stage.log, EVERY_PANEL if stage.record is None else stage.record.panels)
        numbers = {k: v for k, v in stage.metrics.items() if is_number(v)}
        if main or rest or numbers:
            shown.append({"stage": stage, "main": main, "rest": rest, "metrics": numbers})
    return shown


def _over_seeds(run: Run) -> list[dict[str, Any]]:
    """The mean curves of stages that differ in their seed alone."""
    stages, shown = {stage.name: stage for stage in run.stages}, []
    for names in seed_groups(run.plan.get("stages") or {}):
        those = [stages[name] for name in names if name in stages and stages[name].log]
        if len(those) < 2:
            continue
        record = those[0].record
        curves = seed_curves([stage.log for stage in those], EVERY_PANEL if record is None else record.panels)
        words = f"mean of {len(those)} seeds, with the 95% interval of the mean"
        group = StageRecord(shared_name(names), words, "done", None, ())
        shown += [{"stage": group, "main": curves, "rest": [], "metrics": {}}] if curves else []
    return shown


def _winrates(run: Run) -> dict[str, Any] | None:
    if not run.results:
        return None
    tables, places = winrates.judge_tables(run), {policy: i for i, policy in enumerate(run.policies())}
    policies = run.by_policy()
    measured = {name for row in policies.values() for name in row if number(row[name]) is not None}
    return {
        "tables": tables,
        "policies": [{**row, "place": places[row["policy"]]} for row in policies.values()],
        "metrics": [each for each in replies.REPLY_METRICS if each.heading and each.name in measured],
        "controlled": any(table["controlled"] for table in tables),
        "length_control_prompts": LENGTH_CONTROL_PROMPTS,
        "first": run.results[0],
    }


def _frontier(run: Run) -> dict[str, Any] | None:
    figures, gains = frontier.frontiers(run), frontier.overoptimisation(run)
    return {"figures": figures, "gains": gains, "reference": run.reference()} if figures or gains else None


def _recipe(run: Run) -> dict[str, Any] | None:
    versions = next((stage.lineage["versions"] for stage in run.stages if stage.lineage.get("versions")), {})
    if not (run.recipe or versions or run.machine):
        return None
    return {"recipe": redacted(run.recipe or ""), "versions": versions, "machine": run.machine}
