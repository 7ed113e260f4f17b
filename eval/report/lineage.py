"""What was trained from what: the graph of the stages, and their table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from safetensors import SafetensorError

from ...data.errors import UserError
from ...models.lineage import adapter_sha256
from . import svg
from .read import Run, StageRecord
from .text import duration, hash12, listed, short

BASE = "base"
NODE_WIDTH, NODE_HEIGHT = 138, 66
_STATE_WORDS = {"done": "", "running": "running", "failed": "failed", "not run": "not run"}


@dataclass(frozen=True)
class Node:
    """A box of the graph; `lines` stand under its name, `layer` and `lane` are its place."""

    name: str
    state: str
    lines: tuple[str, ...]
    parents: tuple[tuple[str, bool], ...]
    layer: int
    lane: float


def stage_hashes(run: Run) -> dict[str, str]:
    """Stage -> hash of its adapter: as its children recorded it, else from its weights."""
    found = {
        str(parent.get("stage")): str(parent.get("sha256") or "")
        for stage in run.stages
        for parent in stage.lineage.get("parents") or []
    }
    for stage in run.stages:
        if stage.name not in found and stage.folder is not None and stage.state == "done":
            try:
                found[stage.name] = adapter_sha256(stage.folder)
            except (UserError, OSError, ValueError, SafetensorError):
                continue
    return found


def graph_nodes(run: Run) -> list[Node]:
    """The base and every stage, each a layer below the lowest of its parents, those of a layer side by side."""
    hashes = stage_hashes(run)
    stages = {stage.name: stage for stage in run.stages}
    layers: dict[str, int] = {BASE: 0}

    def layer(name: str, above: tuple[str, ...] = ()) -> int:
        if name not in layers:
            stage = stages.get(name)
            parents = [p for p, _ in stage.parents if p not in (*above, name)] if stage else []
            layers[name] = 1 + max((layer(parent, (*above, name)) for parent in parents), default=0)
        return layers[name]

    for name in stages:
        layer(name)
    base = next((s.lineage["base"] for s in run.stages if s.lineage.get("base")), {})
    spec = str(base.get("spec") or (run.plan.get("model") or {}).get("base") or "")
    drawn: list[tuple[str, str, tuple[str, ...], tuple[tuple[str, bool], ...]]] = [
        (BASE, "done", tuple(filter(None, (_clip(spec), _hash_line(base.get("sha256"))))), ())
    ]
    drawn += [(s.name, s.state, _lines(s, hashes.get(s.name)), s.parents) for s in run.stages]
    nodes = []
    for name, state, lines, parents in drawn:
        beside = [each for each, *_ in drawn if layers[each] == layers[name]]
        lane = beside.index(name) - (len(beside) - 1) / 2
        known = tuple((parent, dashed) for parent, dashed in parents if parent in layers)
        nodes.append(Node(name, state, lines, known, layers[name], lane))
    return nodes


def draw_graph(nodes: Sequence[Node], *, across: bool) -> Markup:
    """The graph from left to right (`across`) or from top to bottom (for a narrow page)."""
    deep = max(node.layer for node in nodes) + 1
    wide = max(abs(node.lane) for node in nodes) * 2 + 1
    gap = (54, 18) if across else (38, 20)
    step_deep = (NODE_WIDTH if across else NODE_HEIGHT) + gap[0]
    step_wide = (NODE_HEIGHT if across else NODE_WIDTH) + gap[1]
    length, breadth = deep * step_deep - gap[0] + 4, wide * step_wide - gap[1] + 4

    def corner(node: Node) -> tuple[float, float]:
        along = 2 + node.layer * step_deep
        aside = breadth / 2 + node.lane * step_wide - (NODE_HEIGHT if across else NODE_WIDTH) / 2
        return (along, aside) if across else (aside, along)

    corners = {node.name: corner(node) for node in nodes}
    parts: list[Markup] = []
    for node in nodes:
        for parent, dashed in node.parents:
            parts.append(_edge(corners[parent], corners[node.name], dashed, across))
    for node in nodes:
        parts += _box(node, *corners[node.name])
    width, height = (length, breadth) if across else (breadth, length)
    kind = f"plot graph {'across' if across else 'down'}"
    return svg.figure(float(width), float(height), "What was trained from what", describe(nodes), parts, kind=kind)


def describe(nodes: Sequence[Node]) -> str:
    """The graph in words, for those who do not see it."""
    sentences = []
    for node in nodes:
        if node.layer == 0:
            continue
        starts = [parent for parent, dashed in node.parents if not dashed]
        rewards = [parent for parent, dashed in node.parents if dashed]
        scored = f", scored by {listed(rewards)}" if rewards else ""
        state = f" ({_STATE_WORDS.get(node.state, node.state)})" if node.state != "done" else ""
        sentences.append(f"{node.name} comes from {listed(starts)}{scored}{state}.")
    return " ".join(sentences)


def table(run: Run) -> list[dict[str, Any]]:
    """One row a stage that left a lineage."""
    hashes = stage_hashes(run)
    return [
        {
            "name": stage.name,
            "kind": stage.kind,
            "sha256": hash12(hashes.get(stage.name)),
            "parents": [(p.get("stage"), hash12(p.get("sha256"))) for p in stage.lineage.get("parents") or []],
            "base": (stage.lineage.get("base") or {}).get("spec"),
            "data": _sources(stage.lineage.get("data") or {}),
            "fingerprint": hash12((stage.lineage.get("data") or {}).get("fingerprint")),
            "rows": (stage.lineage.get("data") or {}).get("rows"),
            "seed": stage.lineage.get("seed"),
            "seconds": stage.seconds,
            "memory": stage.metrics.get("peak_memory_bytes"),
            "created": str(stage.lineage.get("created") or "").replace("T", " ").removesuffix("+00:00"),
        }
        for stage in run.stages
        if stage.lineage
    ]


def _lines(stage: StageRecord, sha256: str | None) -> tuple[str, ...]:
    rows = (stage.lineage.get("data") or {}).get("rows")
    work = [f"{short(rows)} rows"] if rows is not None else []
    work += [duration(stage.seconds)] if stage.seconds is not None else []
    said = [_STATE_WORDS.get(stage.state, stage.state), " · ".join(work), _hash_line(sha256)]
    return tuple(line for line in said if line)


def _hash_line(sha256: object) -> str:
    return hash12(sha256)


def _sources(data: Mapping[str, Any]) -> str:
    spec = data.get("spec") or {}
    return listed([str(source.get("path")) for source in spec.get("sources") or [] if isinstance(source, Mapping)])


def _clip(text: str, most: int = 22) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _edge(parent: tuple[float, float], child: tuple[float, float], dashed: bool, across: bool) -> Markup:
    (px, py), (cx, cy) = parent, child
    if across:
        x1, y1, x2, y2 = px + NODE_WIDTH, py + NODE_HEIGHT / 2, cx - 6, cy + NODE_HEIGHT / 2
        bend = f"M{x1:.1f} {y1:.1f}C{(x1 + x2) / 2:.1f} {y1:.1f} {(x1 + x2) / 2:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
        tip = f"M{x2:.1f} {y2 - 4:.1f}l6 4l-6 4z"
    else:
        x1, y1, x2, y2 = px + NODE_WIDTH / 2, py + NODE_HEIGHT, cx + NODE_WIDTH / 2, cy - 6
        bend = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {(y1 + y2) / 2:.1f} {x2:.1f} {(y1 + y2) / 2:.1f} {x2:.1f} {y2:.1f}"
        tip = f"M{x2 - 4:.1f} {y2:.1f}l4 6l4 -6z"
    dash = " dashed" if dashed else ""
    return svg.tag("path", d=bend, class_=f"edge{dash}") + svg.tag("path", d=tip, class_="tip")


def _box(node: Node, x: float, y: float) -> list[Markup]:
    state = node.state.replace(" ", "-")
    parts = [
        svg.tag("rect", x=x, y=y, width=NODE_WIDTH, height=NODE_HEIGHT, rx=5, class_=f"node {state}"),
        svg.text(x + 10, y + 20, _clip(node.name, 17), class_="name"),
    ]
    for place, line in enumerate(node.lines[:3]):
        last_hash = place == len(node.lines) - 1 and len(line) == 12 and " " not in line
        warn = line in ("failed", "running", "not run")
        kind = f"state {state}" if warn else "hash" if last_hash else None
        parts.append(svg.text(x + 10, y + 35 + 13 * place, line, class_=kind))
    return parts
