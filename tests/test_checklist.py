"""Every row of the correctness checklist has a test; tests/conftest.py sees to it that its name starts with the row."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = {*(f"P{n}" for n in range(1, 26)), *(f"R{n}" for n in range(1, 8)), *(f"D{n}" for n in range(1, 10))}


def test_no_row_is_without_a_test():
    sources = [file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py")]
    marked = {row for source in sources for row in re.findall(r'@pytest\.mark\.checklist\("([A-Z]\d+)"\)', source)}
    assert marked >= ROWS, f"without a test: {', '.join(sorted(ROWS - marked))}"
