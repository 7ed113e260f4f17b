"""Every row of the correctness checklist has a test, whose name tests/conftest.py looks at, and a break to notice."""

import re
import runpy
from pathlib import Path

TESTS = Path(__file__).parent
COUNTS = {"P": 25, "R": 7, "D": 9, "E": 6, "S": 3, "G": 19, "W": 17, "K": 11, "T": 10, "Q": 6}
COUNTS |= {"F": 4, "L": 8, "B": 7, "V": 18}
ROWS = {f"{letter}{n}" for letter, count in COUNTS.items() for n in range(1, count + 1)}


def test_no_row_is_without_a_test():
    sources = [file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py")]
    marked = {row for source in sources for row in re.findall(r'@pytest\.mark\.checklist\("([A-Z]\d+)"\)', source)}
    assert marked >= ROWS, f"without a test: {', '.join(sorted(ROWS - marked))}"


def test_no_row_is_without_a_break():
    """See mutations.py, which says which tests notice it."""
    broken = {each.row for each in runpy.run_path(str(TESTS / "mutations.py"))["MUTATIONS"]}
    assert broken == ROWS


def test_every_break_can_be_made():
    """The text that it edits stands exactly once where it should."""
    mutations = runpy.run_path(str(TESTS / "mutations.py"))["MUTATIONS"]
    files = {each.file: (TESTS.parent / each.file).read_text(encoding="utf-8") for each in mutations}
    assert not [f"{each.file}: {each.old!r}" for each in mutations if files[each.file].count(each.old) != 1]
