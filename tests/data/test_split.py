"""The held-out split goes by prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.rows import Row
from preftune.data.split import split_rows
from preftune.errors import UserError

questions = st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=40)


def rows_of(texts):
    return [Row([{"role": "user", "content": text}], origin=str(i)) for i, text in enumerate(texts)]


def split(rows, seed=0):
    try:
        return split_rows(rows, 0.5, seed)
    except UserError:
        # All prompts on one side: a property over the sides holds for the empty one.
        return rows, []


def prompts(rows):
    return {row.prompt[0]["content"].strip() for row in rows}


@pytest.mark.checklist("R7")
@given(questions, st.integers(0, 5))
def test_r07_prompts_never_straddle_the_split(texts, seed) -> None:
    rows = rows_of([*texts, *texts, *(text + " " for text in texts)])
    train, held = split(rows, seed)
    assert not prompts(train) & prompts(held)
    assert sorted(int(row.origin) for row in train + held) == list(range(len(rows)))


@pytest.mark.checklist("R7")
def test_r07_adding_rows_moves_none() -> None:
    texts = [f"question {i}" for i in range(60)]
    train, held = split_rows(rows_of(texts), 0.3)
    more_train, more_held = split_rows(rows_of([*(f"new {i}" for i in range(40)), *reversed(texts)]), 0.3)
    assert prompts(train) <= prompts(more_train)
    assert prompts(held) <= prompts(more_held)


def test_the_fraction_is_met_in_expectation_and_depends_on_the_seed() -> None:
    rows = rows_of([f"question {i}" for i in range(4000)])
    _, held = split_rows(rows, 0.1)
    # Four standard deviations of a binomial are 76.
    assert abs(len(held) - 400) < 76
    assert prompts(held) != prompts(split_rows(rows, 0.1, seed=1)[1])


def test_nothing_held_out_and_too_few_rows() -> None:
    rows = rows_of(["a", "b"])
    assert split_rows(rows, 0.0) == (rows, [])
    with pytest.raises(UserError, match="held out"):
        split_rows(rows, 1e-9)
