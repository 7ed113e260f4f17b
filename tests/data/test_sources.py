"""Readers: every format gives the same rows, and every row knows its place."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preftune.data.sources import read_source
from preftune.data.spec import SourceSpec
from preftune.errors import UserError

ROWS = [{"prompt": "Hi?", "completion": 'Hello,\n"friend"'}, {"prompt": "Ünï?", "completion": "Yes."}]


def read(path, split=None):
    return list(read_source(SourceSpec(str(path), split=split), ()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "json", "data", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(form, packed, tmp_path) -> None:
    suffix = "json" if form == "data" else form
    path = tmp_path / f"rows.{suffix}"
    if form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    elif form in ("json", "data"):
        content = ROWS if form == "json" else {"data": ROWS}
        path.write_text(json.dumps(content), encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    if packed:
        bigger = path.with_name(path.name + ".gz")
        bigger.write_bytes(gzip.compress(path.read_bytes()))
        path = bigger
    origins, rows = zip(*read(path), strict=True)
    assert list(rows) == ROWS
    if form == "jsonl":
        assert origins == (f"{path}:1", f"{path}:2")
    elif form in ("csv", "tsv"):
        # The first row's cell holds a line break: the second starts on line 4.
        assert origins == (f"{path}:2", f"{path}:4")
    else:
        assert origins == (f"{path}: row 1", f"{path}: row 2")


def test_broken_json_line_is_named(write) -> None:
    path = write("rows.jsonl", '{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(UserError) as error:
        read(path)
    assert error.value.where == f"{path}:3"
    assert "broken JSON" in error.value.problem
    assert "\n" not in str(error.value)


def test_broken_json_file_names_the_line(write) -> None:
    path = write("rows.json", '[\n{"prompt": "a"},\n{"prompt" "b"}]')
    with pytest.raises(UserError) as error:
        read(path)
    assert error.value.where == f"{path}:3"


def test_json_lines_in_a_json_file(write) -> None:
    assert [row for _, row in read(write("rows.json", '{"a": 1}\n{"a": 2}\n'))] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("line", ["3", '"text"', "[1]"])
def test_a_line_that_is_no_object(line, write) -> None:
    with pytest.raises(UserError, match="expected an object"):
        read(write("rows.jsonl", line + "\n"))


@pytest.mark.parametrize("line", ["only", "a,b,c"])
def test_csv_line_with_too_few_or_too_many_cells(line, write) -> None:
    path = write("rows.csv", f"prompt,completion\nx,y\n{line}\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert error.value.where == f"{path}:3"


@pytest.mark.parametrize(("cells", "said"), [(";", "a semicolon"), ("\t", "a tab"), ("|", "a bar")])
def test_csv_with_another_delimiter_is_read_as_such_and_said(cells, said, write) -> None:
    path = write("rows.csv", f'prompt{cells}completion\nx{cells}"y, z"\n')
    notes: list[tuple[str, str]] = []
    rows = list(read_source(SourceSpec(str(path)), (), lambda *note: notes.append(note)))
    assert rows == [(f"{path}:2", {"prompt": "x", "completion": "y, z"})]
    assert notes == [(f"read with {said} between the cells", str(path))]
    # one column is no sign of another delimiter
    assert read(write("one.csv", "text\nx; y\n")) == [(str(path.with_name("one.csv")) + ":2", {"text": "x; y"})]


def test_utf_16_is_read_and_said_and_cp1252_is_refused_with_its_name(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,completion\nd\u00e9j\u00e0,vu\n".encode("utf-16"))
    notes: list[tuple[str, str]] = []
    rows = list(read_source(SourceSpec(str(path)), (), lambda *note: notes.append(note)))
    assert [row for _, row in rows] == [{"prompt": "d\u00e9j\u00e0", "completion": "vu"}]
    assert notes == [("read as utf-16, as it is not UTF-8", str(path))]
    path.write_bytes("prompt,completion\nd\u00e9j\u00e0,vu\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"not UTF-8 .*cp1252.*; save it as UTF-8"):
        read(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_half_a_character_names_its_row(name, write) -> None:
    whole, half = '{"prompt": "\\ud83d\\ude00"}', '{"prompt": "nice \\ud83d"}'
    path = write(name, f"{whole}\n{half}\n" if name == "rows.jsonl" else f"[{whole}, {half}]")
    with pytest.raises(UserError, match="lone surrogate") as error:
        read(path)
    assert error.value.where == f"{path}:2" if name == "rows.jsonl" else f"{path}: row 2"


def test_what_is_not_there_names_where_it_was_sought(tmp_path) -> None:
    with pytest.raises(UserError) as error:
        list(read_source(SourceSpec("absent.jsonl"), (tmp_path,)))
    assert str(tmp_path) in error.value.problem


def test_unknown_format(write) -> None:
    with pytest.raises(UserError, match=r"\.jsonl"):
        read(write("rows.xml", "<a/>"))


def test_not_utf8_and_not_gzip(tmp_path) -> None:
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"):
        (tmp_path / name).write_bytes(b'{"prompt": "\xff"}')
        with pytest.raises(UserError):
            read(tmp_path / name)


def test_folders_are_searched_in_order(write, tmp_path) -> None:
    write("first/rows.jsonl", [{"a": 1}])
    write("second/rows.jsonl", [{"a": 2}])
    write("second/other.jsonl", [{"a": 3}])
    folders = (tmp_path / "first", tmp_path / "second")
    assert list(read_source(SourceSpec("rows.jsonl"), folders)) == [("rows.jsonl:1", {"a": 1})]
    assert list(read_source(SourceSpec("other.jsonl"), folders)) == [("other.jsonl:1", {"a": 3})]


def test_folder_of_files_keeps_test_rows_out_of_training(write, tmp_path) -> None:
    write("set/train-00000-of-00002.jsonl", [{"a": 1}])
    write("set/train-00001-of-00002.jsonl", [{"a": 2}])
    write("set/test.jsonl", [{"a": 3}])
    assert [row["a"] for _, row in read(tmp_path / "set")] == [1, 2]
    assert [row["a"] for _, row in read(tmp_path / "set", "test")] == [3]
    with pytest.raises(UserError, match="holdout"):
        read(tmp_path / "set", "holdout")


def test_saved_datasets(tmp_path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "several")
    assert [row for _, row in read(tmp_path / "one")] == ROWS
    assert [row for _, row in read(tmp_path / "several")] == ROWS
    assert read(tmp_path / "several", "test") == [(f"{tmp_path / 'several'}[test]: row 1", ROWS[1])]
    with pytest.raises(UserError, match="train, test"):
        read(tmp_path / "several", "dev")


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "a/b.arrow", "..", "a\\b.arrow", 3])
def test_a_saved_dataset_names_no_file_but_its_own(tmp_path, name) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    state = tmp_path / "one" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match="is no file of its own"):
        read(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "several")
    (tmp_path / "several" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(UserError, match="is no file of its own"):
        read(tmp_path / "several")


def test_hub_id_offline_says_what_to_do() -> None:
    with pytest.raises(UserError) as error:
        read("nobody/no-such-dataset")
    assert "go online" in error.value.remedy
    assert "\n" not in str(error.value)


def test_unknown_column_name_in_a_mapping() -> None:
    with pytest.raises(UserError, match="did you mean 'chosen'"):
        SourceSpec("rows.jsonl", columns={"choosen": "better"})


def test_what_no_reader_can_take_is_refused_in_one_line(tmp_path: Path):
    whole = gzip.compress(b"".join(b'{"prompt": "%d?", "completion": "yes"}\n' % n for n in range(2000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:200] + b"\xff" * 50 + whole[250:])
    (tmp_path / "long.jsonl").write_text('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}\n")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    for name in ("cut.jsonl.gz", "long.jsonl", "deep.jsonl"):
        with pytest.raises(UserError, match=name) as caught:
            list(read_source(SourceSpec(str(tmp_path / name)), ()))
        assert "\n" not in str(caught.value)


def test_json_in_utf_16_is_refused(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "x"}\n'.encode("utf-16"))
    with pytest.raises(UserError, match=r"rows\.jsonl: not UTF-8 .*; save it as UTF-8"):
        read(path)


@pytest.mark.checklist("B6")
def test_b06_a_hub_dataset_is_streamed_and_no_copy_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By datasets' own reader, of a folder that stands for the hub's repository."""
    (tmp_path / "hub").mkdir()
    for part in range(3):
        rows = [{"prompt": f"{part}.{n}?", "completion": "yes"} for n in range(100)]
        (tmp_path / "hub" / f"train-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real: Any = datasets.load_dataset
    asked: list[tuple[str, dict[str, object]]] = []

    def load(path: str, *args: object, **options: object) -> object:
        asked.append((path, options))
        given = {"split": options["split"], "streaming": options.get("streaming", False)}
        return real(str(tmp_path / "hub"), cache_dir=str(tmp_path / "copies"), **given)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = SourceSpec("some/rows", streaming=True, revision="main")
    found = list(read_source(source, ()))
    assert len(found) == 300 and found[299] == ("some/rows[train]: row 300", {"prompt": "2.99?", "completion": "yes"})
    assert asked == [("some/rows", {"split": "train", "revision": "main", "streaming": True})]
    assert not list((tmp_path / "copies").rglob("*.arrow"))
    assert found == list(read_source(SourceSpec("some/rows"), ()))


def test_a_stream_that_breaks_off_says_where(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> object:
        yield {"prompt": "a", "completion": "b"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(UserError, match=r"some/rows: the hub's stream ends after row 1 \(gone\)"):
        list(read_source(SourceSpec("some/rows", streaming=True), ()))


def test_what_lies_here_is_not_streamed_from_anywhere(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="leave `streaming` out"):
        read_source(SourceSpec(str(tmp_path / "a.jsonl"), streaming=True), ())
