"""What was trained from what: the graph of the stages, and their table."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from safetensors import SafetensorError

from ...errors import UserError
from ...models.fingerprints import content
from . import svg
from .read import Run, StageRecord
from .text import duration, hash12, listed, short

BASE = "base"
NODE_ACROSS, NODE_DOWN = (144.0, 66.0), (132.0, 66.0)  # width, height
PASS = 0.3  # room of an edge that passes a layer, in boxes
_STATE_WORDS = {"done": "", "running": "running", "stopped": "stopped", "failed": "failed", "not run": "not run"}


@dataclass(frozen=True)
class Node:
    """A box of the graph; `lines` stand under its name, `layer` and `lane` are its place. `taught`: dashed edges come
    from its teacher, and not from what scored it."""

    name: str
    state: str
    lines: tuple[str, ...]
    parents: tuple[tuple[str, bool], ...]
    layer: int
    lane: float
    taught: bool = False


@dataclass(frozen=True)
class Graph:
    """The boxes, and for an edge that passes a layer the lanes where it does: (parent, child) -> lane per layer."""

    nodes: tuple[Node, ...]
    passes: Mapping[tuple[str, str], tuple[float, ...]]


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
                found[stage.name] = content(stage.folder) or ""
            except (UserError, OSError, ValueError, SafetensorError):
                continue
    return found


def stage_graph(run: Run) -> Graph:
    """The base and every stage, each a layer below the lowest of its parents, those of a layer side by side."""
    hashes = stage_hashes(run)
    stages = {stage.name: stage for stage in run.stages}
    base = next((s.lineage["base"] for s in run.stages if s.lineage.get("base")), {})
    spec = str(base.get("spec") or (run.plan.get("model") or {}).get("base") or "")
    parents = {BASE: ()} | {
        s.name: tuple((p, dashed) for p, dashed in s.parents if p == BASE or p in stages) for s in run.stages
    }
    layers = _layers(parents)
    lanes, passes = _lanes(parents, layers)
    lines = {BASE: tuple(filter(None, (_clip(spec), hash12(base.get("sha256")))))}
    lines |= {s.name: _lines(s, hashes.get(s.name)) for s in run.stages}
    states = {BASE: "done"} | {s.name: s.state for s in run.stages}
    taught = {s.name for s in run.stages if s.record is not None and s.record.needs_teacher}
    nodes = tuple(
        Node(name, states[name], lines[name], parents[name], layers[name], lanes[name], name in taught)
        for name in parents
    )
    return Graph(nodes, passes)


_Parents = Mapping[str, tuple[tuple[str, bool], ...]]


def _layers(parents: _Parents) -> dict[str, int]:
    """Each below the lowest of its parents; an edge that would close a circle is not followed."""
    layers: dict[str, int] = {}
    for first in parents:
        # up to what it came from, without recursion: a chain may be longer than Python's stack
        path: dict[str, None] = {first: None} if first not in layers else {}
        while path:
            name = next(reversed(path))
            above = [parent for parent, _ in parents[name] if parent not in path]
            if (unknown := next((each for each in above if each not in layers), None)) is not None:
                path[unknown] = None
                continue
            layers[name] = 1 + max((layers[each] for each in above), default=-1)
            del path[name]
    return layers


def _lanes(
    parents: _Parents, layers: Mapping[str, int]
) -> tuple[dict[str, float], dict[tuple[str, str], tuple[float, ...]]]:
    """A lane for every box and for every layer that an edge passes: what leads on stands in front, leaves last.

    A layer is centred on the mean of what its members come from.
    """
    edges = [(parent, name) for name in parents for parent, _ in parents[name]]
    lanes: dict[str, float] = {}
    passes: dict[tuple[str, str], tuple[float, ...]] = {}
    for depth in range(max(layers.values()) + 1):
        boxes = [name for name in parents if layers[name] == depth]
        long = [edge for edge in edges if layers[edge[0]] < depth < layers[edge[1]]]
        leads_on = [name for name in boxes if any(parent == name for parent, _ in edges)]
        row: list[tuple[Any, float]] = [(name, 1.0) for name in leads_on] + [(edge, PASS) for edge in long]
        row += [(name, 1.0) for name in boxes if name not in leads_on]
        middle, reach, places = [], 0.0, []
        for item, width in row:
            places.append(reach + width / 2)
            reach += width
            above = [item] if isinstance(item, tuple) else [(parent, item) for parent, _ in parents[item]]
            middle += [passes[e][-1] if passes.get(e) else lanes[e[0]] for e in above if e[0] in lanes]
        shift = (sum(middle) / len(middle) if middle else 0.0) - reach / 2
        for (item, _), place in zip(row, places, strict=True):
            if isinstance(item, tuple):
                passes[item] = (*passes.get(item, ()), place + shift)
            else:
                lanes[item] = place + shift
    return lanes, passes


def draw_graph(graph: Graph, *, across: bool) -> Markup:
    """The graph from left to right (`across`) or from top to bottom (for a narrow page)."""
    nodes, (wide, tall) = graph.nodes, NODE_ACROSS if across else NODE_DOWN
    gap = (50.0, 16.0) if across else (36.0, 12.0)
    step_deep, step_wide = (wide + gap[0], tall + gap[1]) if across else (tall + gap[0], wide + gap[1])
    taken = [node.lane for node in nodes] + [lane for lanes in graph.passes.values() for lane in lanes]
    first, last = min(taken), max(taken)
    along = (wide if across else tall) + max(node.layer for node in nodes) * step_deep + 4
    aside = (last - first) * step_wide + (tall if across else wide) + 4

    def place(layer: float, lane: float) -> tuple[float, float]:
        """The middle of a box."""
        deep = 2 + (wide if across else tall) / 2 + layer * step_deep
        side = 2 + (tall if across else wide) / 2 + (lane - first) * step_wide
        return (deep, side) if across else (side, deep)

    at = {node.name: node for node in nodes}
    half = (wide if across else tall) / 2
    parts: list[Markup] = []
    for node in nodes:
        for parent, dashed in node.parents:
            if at[parent].layer >= node.layer:
                continue
            stops = [(at[parent].layer, at[parent].lane)]
            stops += [
                (at[parent].layer + 1 + i, lane) for i, lane in enumerate(graph.passes.get((parent, node.name), ()))
            ]
            stops.append((node.layer, node.lane))
            parts.append(_edge([place(*stop) for stop in stops], half, dashed, across))
    for node in nodes:
        x, y = place(node.layer, node.lane)
        parts += _box(node, x - wide / 2, y - tall / 2, wide, tall)
    size = (along, aside) if across else (aside, along)
    kind = f"plot graph {'across' if across else 'down'}"
    return svg.figure(*size, "What was trained from what", describe(nodes), parts, kind=kind)


def describe(nodes: Sequence[Node]) -> str:
    """The graph in words, for those who do not see it."""
    sentences = []
    for node in nodes:
        if node.layer == 0:
            continue
        starts = [parent for parent, dashed in node.parents if not dashed]
        others = [parent for parent, dashed in node.parents if dashed]
        scored = f", {'taught' if node.taught else 'scored'} by {listed(others)}" if others else ""
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
    said = [_STATE_WORDS.get(stage.state, stage.state), " · ".join(work), hash12(sha256)]
    return tuple(line for line in said if line)


def _sources(data: Mapping[str, Any]) -> str:
    spec = data.get("spec") or {}
    return listed([str(source.get("path")) for source in spec.get("sources") or [] if isinstance(source, Mapping)])


def _clip(text: str, most: int = 20) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _edge(middles: Sequence[tuple[float, float]], half: float, dashed: bool, across: bool) -> Markup:
    """A curve from the parent's edge to the child's, level through the layers that it passes, with an arrow's tip."""
    turned = [point if across else point[::-1] for point in middles]  # as if from left to right
    x, y = turned[0][0] + half, turned[0][1]
    steps = [("M", [(x, y)])]
    for place, (next_x, next_y) in enumerate(turned[1:], start=1):
        last = place == len(turned) - 1
        to = next_x - half - (6 if last else 0)
        steps.append(("C", [((x + to) / 2, y), ((x + to) / 2, next_y), (to, next_y)]))
        x, y = to, next_y
        if not last:
            x = next_x + half
            steps.append(("L", [(x, y)]))
    tip = [("M", [(x, y - 4)]), ("L", [(x + 6, y)]), ("L", [(x, y + 4)])]

    def path(commands: list[tuple[str, list[tuple[float, float]]]]) -> str:
        return "".join(
            letter + " ".join(f"{a:.1f} {b:.1f}" if across else f"{b:.1f} {a:.1f}" for a, b in points)
            for letter, points in commands
        )

    dash = " dashed" if dashed else ""
    return svg.tag("path", d=path(steps), class_=f"edge{dash}") + svg.tag("path", d=path(tip) + "z", class_="tip")


def _box(node: Node, x: float, y: float, wide: float, tall: float) -> list[Markup]:
    state = node.state.replace(" ", "-")
    parts = [
        svg.tag("rect", x=x, y=y, width=wide, height=tall, rx=5, class_=f"node {state}"),
        svg.text(x + 9, y + 20, _clip(node.name, 16), class_="name"),
    ]
    for place, line in enumerate(node.lines[:3]):
        is_hash = place == len(node.lines) - 1 and re.fullmatch("[0-9a-f]{12}", line)
        kind = f"state {state}" if line in _STATE_WORDS else "hash" if is_hash else None
        parts.append(svg.text(x + 9, y + 35 + 13 * place, line, class_=kind))
    return parts
