"""The reference of recipes, docs/recipes.md: made from the schema, the kinds' records and `meanings.py`.

And the names of TRL's PPO with ours, in docs/migrating/trl-ppo.md, from the tables that answer them. Both are written
by `python -m preftune.recipes.reference`; a test says when they are not up to date. Imports no torch.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..eval.judges.kinds import KINDS as JUDGE_KINDS
from ..stages.kinds import KINDS, StageKind
from ..stages.names import meant, parameter_place
from ..stages.ppo.trl_names import CONFIG, TRAINER
from .json_schema import recipe_schema
from .meanings import JUDGES, PARTS

FILE = Path(__file__).parents[1] / "docs" / "recipes.md"
NAMES = FILE.with_name("migrating") / "trl-ppo.md"
_BEGIN, _END = "<!-- python -m preftune.recipes.reference -->", "<!-- end -->"

_HEAD = """\
# Recipe reference

A recipe is one YAML file. `preftune validate my.yaml` checks it and its data, `preftune schema > recipe.schema.json`
writes what an editor needs to complete and check it, and `KEY=VALUE` behind a command overrides a key:
`stages.dpo.beta=0.2`. A key that does not exist is refused, with the key that was probably meant.

*This page is written by `python -m preftune.recipes.reference` from what the loader reads.*
"""

_ROWS = {
    "demo": "demonstrations",
    "pair": "preference pairs",
    "label": "labelled replies, or pairs",
    "prompt": "prompts",
}


_OTHERWISE = {"distill": "demonstrations where `lmbda` is below 1"}
"""What a kind reads that does not always read the same rows."""


def reference() -> str:
    """The page's text."""
    return "\n".join([_HEAD, *_lines()]).rstrip() + "\n"


def _lines() -> Iterator[str]:
    schema = recipe_schema()
    for part, (title, place) in PARTS.items():
        keys = schema if part == "Recipe" else schema["$defs"]["sft_stage" if part == "Stage" else part]
        yield f"## {title}\n"
        if place:
            yield f"`{place}`\n"
        own = keys["properties"]
        if part == "Stage":
            own = {key: own[key] for key in own if key not in {each.name for each in KINDS["sft"].alone()}}
        yield from _table(own, keys.get("required", ()))
        if part == "Stage":
            for kind in KINDS.values():
                yield from _kind(kind, schema["$defs"])
    yield "## Judges\n"
    yield "`eval.judges`: each entry has a `kind`, the fields of that kind, and a `name` if it wants another one."
    yield "A stage's `reward` takes the same, but for `human`; [Rewards](rewards.md) says more of each.\n"
    yield "| kind | field | meaning |"
    yield "|---|---|---|"
    for name, kind in JUDGE_KINDS.items():
        for place, field in enumerate(kind.fields):
            yield f"| {'' if place else f'`{name}`'} | `{field}` | {JUDGES[name][field]} |"


def _kind(kind: StageKind, definitions: dict[str, Any]) -> Iterator[str]:
    """What a kind of stage has besides what every stage has."""
    yield f"### kind: {kind.name}\n"
    config = kind.config.rpartition(":")[2]
    defaults = ", ".join(f"`{name}: {_plain(value)}`" for name, value in kind.defaults.items())
    if kind.trains:
        rows = _ROWS[kind.rows] if kind.reads_by is None else f"{_ROWS[kind.rows]}, or {_OTHERWISE[kind.name]}"
        yield f"Reads {rows}. `train` takes the fields of `{config}` ([all of them](../stages/FIELDS.md))."
        yield f"Where the recipe does not say them: {defaults}.\n"
    else:
        yield f"Reads {_ROWS[kind.rows]}, and gives rows to stages whose `data` names it ([more](stages/sample.md)):"
        yield "nothing trains, and it has no `train`, `lora` and `on_nonfinite`.\n"
    keys = definitions[f"{kind.name}_stage"]["properties"]
    sources = [each for each, needed in (("reward", kind.needs_reward), ("teacher", kind.needs_teacher)) if needed]
    own = {each: keys[each] for each in sources}
    for parameter in kind.parameters:
        group = next((name for name, each in kind.groups.items() if parameter.name in each.values()), None)
        if group is None:
            own[parameter.name] = keys[parameter.name]
        else:
            key = next(key for key, name in kind.groups[group].items() if name == parameter.name)
            place = parameter_place(kind, parameter.name).replace("...", "N").removesuffix(": N}") + "}"
            own[place] = definitions[f"{kind.name}_{group}"]["properties"][key]
    yield from _table(own, sources)


def _table(keys: dict[str, Any], required: Iterable[str]) -> Iterator[str]:
    yield "| key | takes | default | meaning |"
    yield "|---|---|---|---|"
    for key, schema in keys.items():
        default = "**needed**" if key in required else _default(schema)
        yield f"| `{key}` | {_takes(schema)} | {default} | {_cell(schema.get('description', ''))} |"
    yield ""


def _default(schema: dict[str, Any]) -> str:
    value = schema.get("default")
    return "" if value is None else f"`{_plain(value)}`"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def _takes(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in schema or "allOf" in schema:
        return "a mapping"
    if "enum" in schema:
        return ", ".join(f"`{_plain(each)}`" for each in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema or "if" in schema:
        options = [_takes(each) for each in schema.get("anyOf", ()) if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(options)) or "a mapping"
    kind = schema.get("type")
    if kind == "array":
        return "a list of them" if schema.get("items", {}).get("enum") else "a list"
    words = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "`true`, `false`"}
    return words.get(str(kind), "a mapping") + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    said = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
    found = [words.format(_plain(schema[name])) for name, words in said.items() if name in schema]
    return f" {' '.join(found)}" if found and schema.get("maximum", schema.get("exclusiveMaximum")) != 2**32 else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def names(page: str) -> str:
    """The page of TRL's PPO with its tables of names as they are now."""
    lines = ["### Arguments of PPOTrainer\n", "| there | here |", "|---|---|"]
    lines += [f"| `{word}` | {_cell(says)} |" for word, says in sorted(TRAINER.items())]
    lines += ["\n### Fields of PPOConfig\n", "| there | in Python | in a stage of a recipe |", "|---|---|---|"]
    for word, says in sorted(CONFIG.items()):
        stage = (meant(word, "stages", KINDS["ppo"], "ppo") or "").replace(" in stages.ppo", "")
        lines.append(f"| `{word}` | {_cell(says)} | {'the same' if stage == says else _cell(stage)} |")
    before, _, rest = page.partition(_BEGIN)
    return "\n".join([before + _BEGIN, *lines, "", _END]) + rest.partition(_END)[2]


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
    NAMES.write_text(names(NAMES.read_text(encoding="utf-8")), encoding="utf-8")
