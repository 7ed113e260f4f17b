"""The rows that docs/data.md shows are read as it says."""

import pytest

from preftune.data.formats import normalise
from preftune.errors import UserError

from .format_examples import EXAMPLES, PAGE, A, B, Example, U, written

KINDS = ("demo", "pair", "label", "prompt")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shown_row_is_read_as_the_page_says(example: Example, kind):
    if kind not in example.kinds:
        with pytest.raises(UserError):
            normalise(example.row, kind, "rows.jsonl:1")
        return
    for row in normalise(example.row, kind, "rows.jsonl:1"):
        asked = row.prompt[-1]["content"]
        assert isinstance(asked, str) and asked.endswith(str(U["content"]))
        replies = {"demo": row.completion, "pair": row.chosen, "label": row.completion, "prompt": None}[kind]
        assert replies in (None, [A]) or (kind == "label" and row.label is False and replies == [B])


def test_the_page_shows_these_rows():
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "run `python tests/data/format_examples.py`"
