"""`preftune init`: what it sees in data, and that the recipe it writes is one."""

import json

import pytest
import yaml

from preftune.cli.init import fitting, look
from preftune.errors import UserError
from preftune.recipes.load import load_recipe


def write(file, rows) -> str:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def pairs(count=40):
    return [{"prompt": f"question {i}", "chosen": "yes " * (i + 1), "rejected": "no"} for i in range(count)]


def demos(count=40):
    return [{"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}]}
            for i in range(count)]  # fmt: skip


def labels(count=40):
    return [{"prompt": f"q {i}", "completion": "a", "label": i % 2 == 0} for i in range(count)]


def prompts(count=40):
    return [{"prompt": f"ask {i}"} for i in range(count)]


KINDS = {"pair": pairs, "demo": demos, "label": labels, "prompt": prompts}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def init(shell, *words: str) -> str:
    code, out, err = shell("init", "--base", "random:llama", *words)
    assert code == 0, err
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_rows_is_recognised(tmp_path, kind):
    seen = look(write(tmp_path / "d.jsonl", KINDS[kind]()), tmp_path)
    assert (seen.kind, seen.rows, seen.dropped, seen.more) == (kind, 40, 0, False)


def test_a_few_rows_that_cannot_be_used_do_not_change_what_a_file_is(tmp_path):
    seen = look(write(tmp_path / "d.jsonl", [*pairs(), "{", {"prompt": "x"}]), tmp_path)
    assert (seen.kind, seen.rows, seen.dropped) == ("pair", 40, 2)


@pytest.mark.parametrize(("lengths", "limit"), [([], 1024), ([10], 128), ([130] * 100, 192), ([9000], 2048)])
def test_the_limit_holds_nearly_all_rows(lengths, limit):
    assert fitting(lengths) == limit


def test_one_row_in_a_hundred_may_be_beyond_the_limit():
    assert fitting([200] * 99 + [1900]) == 256
    assert fitting([200] * 98 + [1900] * 2) == 1920


@pytest.mark.parametrize(
    ("kinds", "stages", "policies"),
    [
        (("pair",), ["sft", "reward", "dpo"], ["base", "sft", "dpo"]),
        (("demo",), ["sft"], ["base", "sft"]),
        (("label",), ["sft", "kto"], ["base", "sft", "kto"]),
        (("demo", "prompt"), ["sft"], ["base", "sft"]),
        (("demo", "label"), ["sft", "kto"], ["base", "sft", "kto"]),
        (("demo", "pair", "prompt"), ["sft", "reward", "dpo", "ppo"], ["base", "sft", "dpo", "ppo"]),
    ],
)
def test_the_stages_follow_from_the_data(tmp_path, shell, kinds, stages, policies):
    files = [write(tmp_path / f"{kind}.jsonl", KINDS[kind]()) and f"{kind}.jsonl" for kind in kinds]
    assert "wrote recipe.yaml" in init(shell, *files)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert list(recipe.stages) == stages
    assert recipe.eval is not None and recipe.eval.policies == policies
    assert recipe.eval.prompts.held_out == next(iter(recipe.data.values())).held_out > 0
    code, out, _ = shell("validate", "recipe.yaml")
    assert code == 0 and "stand in the training data" not in out


def test_files_of_one_kind_are_sources_of_one_entry(tmp_path, shell):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", pairs())
    init(shell, "a.jsonl", "b.jsonl", "--output", "my pairs.yaml")
    written = yaml.safe_load((tmp_path / "my pairs.yaml").read_text())
    assert written["data"]["pairs"]["sources"] == [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
    assert written["name"] == "my-pairs"


def test_rows_too_few_to_keep_any_out_are_all_trained_on_and_nothing_is_evaluated(tmp_path, shell):
    write(tmp_path / "d.jsonl", demos(1))
    init(shell, "d.jsonl")
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert "held_out" not in written["data"]["demos"] and "eval" not in written


def test_bad_rows_are_dropped_by_the_recipe_as_well(tmp_path, shell):
    write(tmp_path / "d.jsonl", [*pairs(), "{"])
    init(shell, "d.jsonl")
    assert shell("validate", "recipe.yaml")[0] == 0


def test_a_recipe_in_another_folder_names_the_data_from_there(tmp_path, shell):
    write(tmp_path / "d.jsonl", pairs())
    (tmp_path / "sub").mkdir()
    init(shell, "d.jsonl", "--output", "sub/r.yaml")
    assert yaml.safe_load((tmp_path / "sub" / "r.yaml").read_text())["data"]["pairs"]["path"] == "../d.jsonl"
    assert shell("validate", "sub/r.yaml")[0] == 0


def test_a_hub_that_cannot_be_reached_leaves_lengths_unmeasured(tmp_path, shell, monkeypatch):
    def unreachable(*args, **settings):
        raise UserError("model.base", "'a/b' is no local folder and the hub cannot be reached", "go online once")

    monkeypatch.setattr("preftune.models.loading._download", unreachable)
    write(tmp_path / "d.jsonl", pairs())
    assert "lengths are not measured" in init(shell, "d.jsonl", "--base", "a/b")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["pairs"]["max_length"] == 1024


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pairs.jsonl", "--output", "there.yaml"), "there.yaml: exists, and nothing is overwritten"),
        (("pairs.jsonl", "--output", "no/r.yaml"), "no folder 'no'"),
        (("pairs.jsonl", "--name", "a/b"), "--name: 'a/b' is no name of a folder"),
        (("nothing.jsonl",), "nothing.jsonl: no such file"),
        (("prompts.jsonl",), "prompts.jsonl: are prompts alone"),
        (("odd.jsonl",), "odd.jsonl:1: no completion: found x"),
        (("empty.jsonl",), "empty.jsonl: holds no row"),
        (("broken.jsonl",), "broken.jsonl:1"),
        (("pairs.jsonl", "--base", "random:nothing"), "random:nothing"),
    ],
)
def test_what_makes_no_recipe_is_refused_and_nothing_is_written(tmp_path, shell, words, said):
    write(tmp_path / "pairs.jsonl", pairs())
    write(tmp_path / "prompts.jsonl", prompts())
    write(tmp_path / "odd.jsonl", [{"x": 1}])
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "broken.jsonl", ["{"])
    (tmp_path / "there.yaml").write_text("mine")
    before = sorted(each.name for each in tmp_path.iterdir())
    code, _, err = shell("init", "--base", "random:llama", *words)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == before
    assert (tmp_path / "there.yaml").read_text() == "mine"
