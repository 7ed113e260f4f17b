"""Beam search stands only beside settings that mean something with it, said with the recipe and with the evaluation."""

import pytest

from preftune.cli.keys import Keys, key_of
from preftune.data.spec import DataSpec, SourceSpec
from preftune.errors import UserError
from preftune.eval.spec import EvalSpec
from preftune.models.base import Base
from preftune.recipes.build import eval_spec
from preftune.recipes.load import load_recipe

ALONE = ("eval.temperature=0", "eval.kl=false")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "temperature 0.7 and kl would mean nothing; set eval.temperature to 0, eval.kl to false, or"),
        ({"temperature": 0.0}, "kl would mean nothing; set eval.kl to false, or leave beams out"),
        ({"beams": 0}, "is 0, expected 1 or more"),
    ],
)
def test_an_evaluation_refuses_what_beams_make_meaningless(tmp_path, changes, said):
    base, prompts = Base("random:llama", tmp_path, None, "b" * 64), DataSpec((SourceSpec("none.jsonl"),))
    with pytest.raises(UserError, match=said) as error:
        EvalSpec(**({"base": base, "policies": {}, "reference": "base", "prompts": prompts, "beams": 4} | changes))
    assert error.value.where == "eval.beams"


def test_a_recipe_refuses_it_before_anything_trains():
    with pytest.raises(UserError, match=r"temperature 0\.7 and kl and over_optimisation would mean nothing"):
        load_recipe("quickstart", ["eval.beams=4", "eval.over_optimisation={gold: rubric, proxy: reward}"])


def test_without_beams_neither_recipe_nor_key_speaks_of_them(tmp_path):
    base = Base("random:llama", tmp_path, None, "b" * 64)
    plain, one, four = (load_recipe("quickstart", [*ALONE, *more]) for more in ([], ["eval.beams=1"], ["eval.beams=4"]))
    assert "beams" not in plain.resolved()["eval"] and four.resolved()["eval"]["beams"] == 4
    assert [eval_spec(each, base, tmp_path).beams for each in (plain, one, four)] == [1, 1, 4]
    parts = [Keys(each, base, tmp_path).evaluation(dict.fromkeys(each.stages, "k")) for each in (plain, one, four)]
    assert "eval.beams" not in parts[0] and key_of(parts[0]) == key_of(parts[1])
    assert parts[2] == parts[0] | {"eval.beams": 4}
