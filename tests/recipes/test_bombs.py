"""Files that are made to grow, to nest or to run something end in one line, at once; long chains are no such thing."""

import time
from pathlib import Path

import pytest
import yaml

from preftune.bounded_yaml import load_bounded
from preftune.errors import UserError
from preftune.eval.report.lineage import stage_graph
from preftune.eval.report.read import Run, StageRecord, read_run
from preftune.recipes.graph import needed_for, order
from preftune.recipes.load import load_recipe

HEAD = "name: x\nmodel: {base: 'random:llama'}\ndata: {d: {path: quickstart/demos.jsonl}}\n"
NEXT = list(zip("abcdefgh", "bcdefghi", strict=True))
NINE = ", ".join(["*{0}"] * 9)
BOMBS = {
    "aliases": "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{NINE.format(p)}]\n" for p, c in NEXT),
    "merges": "a: &a {x: 1, y: 2}\n" + "".join(f"{c}: &{c} {{<<: [{NINE.format(p)}]}}\n" for p, c in NEXT),
    "itself": "a: &a {b: *a}\n",
    "brackets": "a: " + "[" * 3000,
    "deep": "a: " + "[" * 60 + "]" * 60,
    "values": "".join(f"a{number}: 1\n" for number in range(21_000)),
    "long": "a: " + "x" * 4_000_001,
    "number": "a: " + "9" * 5000,
    "python": "a: !!python/object/apply:os.system ['exit 1']\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_line(tmp_path: Path, name: str):
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMBS[name])
    began = time.process_time()
    with pytest.raises(UserError, match=r"bomb\.yaml"):
        load_recipe(file)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_in_a_run_does_not_hold_up_its_report(tmp_path: Path, name: str):
    began = time.process_time()
    with pytest.raises(yaml.YAMLError):
        load_bounded(BOMBS[name])
    assert time.process_time() - began < 10
    (tmp_path / "recipe.yaml").write_text(BOMBS[name])
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.json").write_text("{}")
    assert read_run(tmp_path).plan == {}


def test_merged_keys_mean_what_they_did(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(
        HEAD.replace("x\n", "x\n", 1) + "lora: {r: 3}\nstages:\n"
        "  sft: &a {data: d, seed: 1, train: {max_steps: 5}}\n"
        "  two: {<<: *a, kind: sft, from: sft, seed: 2}\n"
        "  three: {kind: sft, <<: [{seed: 4, from: sft, data: d}, *a]}\n"
    )
    stages = load_recipe(file).stages
    assert [(each.seed, each.train["max_steps"]) for each in stages.values()] == [(1, 5), (2, 5), (4, 5)]


def chain(folder: Path, count: int, *, backwards: bool = False, last: str = "base") -> Path:
    """A recipe of so many stages, each from the one before."""
    lines = [f"  s{i}: {{kind: sft, data: d, from: {f's{i - 1}' if i else last}}}\n" for i in range(count)]
    file = folder / "chain.yaml"
    file.write_text(HEAD + "stages:\n" + "".join(reversed(lines) if backwards else lines))
    return file


@pytest.mark.parametrize("backwards", [False, True])
def test_a_long_chain_is_ordered_and_drawn(tmp_path: Path, backwards: bool):
    count = 1500
    recipe = load_recipe(chain(tmp_path, count, backwards=backwards))
    names = [f"s{i}" for i in range(count)]
    assert order(recipe) == names
    assert needed_for(recipe, ["s1200"]) == names[:1201]
    records = tuple(
        StageRecord(name, "sft", "not run", None, ((recipe.stages[name].parent, False),)) for name in recipe.stages
    )
    layers = {node.name: node.layer for node in stage_graph(Run("x", records)).nodes}
    assert layers == {"base": 0} | {name: place + 1 for place, name in enumerate(names)}


def test_a_long_circle_is_said_in_short(tmp_path: Path):
    with pytest.raises(UserError, match=r"a circle: s\d+ -> s\d+ -> s\d+ -> s\d+ -> \.\.\. -> ") as error:
        load_recipe(chain(tmp_path, 1500, backwards=True, last="s1499"))
    assert len(str(error.value)) < 300
