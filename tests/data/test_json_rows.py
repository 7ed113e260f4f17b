"""JSON read a row at a time: the same rows and the same refusals as Python's own parser on the whole text."""

import io
import json
import random
import tracemalloc

import pytest

from preftune.data import json_rows
from preftune.errors import UserError


def read(text):
    """Its rows; elements that are no objects are left out."""
    return [row for _, row in json_rows.read_json(io.StringIO(text), "rows.json", lambda error: None)]


def value(draw, depth=0):
    kind = draw.randrange(4 if depth > 2 else 6)
    if kind == 4:
        return [value(draw, depth + 1) for _ in range(draw.randrange(3))]
    if kind == 5:
        return {f"k{n}": value(draw, depth + 1) for n in range(draw.randrange(3))}
    return draw.choice([None, True, -1.5e-7, 12345678901, 'a "quoted" \\ word', "[1, {", "\u00fc\n\u4e2d", "]}"])


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_the_same_rows_and_the_same_refusals_as_of_the_whole_text(piece, monkeypatch) -> None:
    monkeypatch.setattr(json_rows, "_PIECE", piece)
    draw, refused = random.Random(0), 0
    for _ in range(150):
        rows = [{"row": value(draw)} for _ in range(draw.randrange(5))]
        text = json.dumps(rows, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
        text = draw.choice(["", " \n"]) + text + draw.choice(["", "\n\t"])
        assert read(text) == rows
        at = draw.randrange(len(text))
        broken = draw.choice([text[:at], text[:at] + text[at + 1 :], text[:at] + draw.choice('],[{}":0') + text[at:]])
        try:
            whole = json.loads(broken)
        except json.JSONDecodeError as error:
            refused += 1
            with pytest.raises(UserError, match="broken JSON") as found:
                read(broken)
            assert found.value.where == f"rows.json:{error.lineno}"
            assert f"at column {error.colno}" in found.value.problem
        else:
            if isinstance(whole, list) and all(isinstance(row, dict) for row in whole):
                assert read(broken) == whole
    assert refused > 50


def test_an_object_with_data_and_lines_in_a_json_file(monkeypatch) -> None:
    monkeypatch.setattr(json_rows, "_PIECE", 3)
    assert read('{"version": 1, "data": [{"a": 1}, {"a": [2]}]}') == [{"a": 1}, {"a": [2]}]
    assert read('{"a": 1}\n\n {"a": 2}\n') == [{"a": 1}, {"a": 2}]
    assert read(' {"a": {"b": 1}} ') == [{"a": {"b": 1}}]
    for text, said in {"3": "holds a int", '"x"': "holds a str", "": "broken JSON", '{"a": 1} 2': "Extra data"}.items():
        with pytest.raises(UserError, match=said):
            read(text)


def test_only_the_row_at_hand_is_in_memory(tmp_path) -> None:
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        file.write("[\n")
        for number in range(12_000):
            file.write(("" if number == 0 else ",\n") + json.dumps({"number": number, "text": "x" * 2000}))
        file.write("\n]\n")
    tracemalloc.start()
    with path.open(encoding="utf-8") as text:
        total = sum(row["number"] for _, row in json_rows.read_json(text, "rows.json", lambda error: None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == sum(range(12_000))
    assert path.stat().st_size > 24_000_000 and peak < 8_000_000


def test_one_value_without_end_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(json_rows, "_PIECE", 64)
    monkeypatch.setattr(json_rows, "MOST_CHARACTERS", 1000)
    with pytest.raises(UserError, match=r"^rows.json:2: one value of more than 1000 characters"):
        read('[{"a": 1},\n{"a": "' + "x" * 5000)
