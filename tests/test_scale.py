"""The tables in docs/scale.md are what the model of `preftune plan` says."""

import pytest

from preftune.benchmarks import scale


def written() -> str:
    return scale.DOCUMENT.read_text(encoding="utf-8").partition(scale.BEGIN)[2].partition(scale.END)[0]


def test_a_row_of_the_first_table():
    rows = scale.lines("", [scale.together(scale.M8, 16, False)])
    assert rows[-2].startswith("| 16 | ") and f"\n{rows[-2]}\n" in written().partition("fsdp2")[0]


@pytest.mark.slow
def test_all_of_them():
    assert written() == scale.tables(), "python -m preftune.benchmarks.scale --write"


def test_what_does_not_fit_has_no_times():
    row = scale.Row(8, 1.0, 2.0, 3.0, 200 * 10**9)
    assert scale.lines("t", [row])[-2] == "| 8 | does not fit | | | | 200 |"
    assert scale.lines("t", [row._replace(memory=10**9)])[-2] == "| 8 | 1.0 s | 2.0 s | 3.0 s | 6.0 s | 1 |"
