"""Rows one at a time: nothing is kept, everything is counted, and what is wrong is answered as the entry says."""

import json
import os
from pathlib import Path

import pytest

from preftune.data import encode, problems
from preftune.data.encode import encode_demos, encode_rows, measure_rows
from preftune.data.load import load_rows, stream_rows
from preftune.data.report import DataReport
from preftune.data.rows import Row, fingerprint
from preftune.data.seen import Seen, number_of
from preftune.data.spec import OnProblem
from preftune.errors import UserError, UserErrors
from preftune.recipes.build import data_values

GOOD = {"prompt": "Hi?", "completion": "Hello."}


def rows_of(path: Path, kit, **options) -> tuple[list[Row], DataReport]:
    report = DataReport()
    return list(stream_rows(kit.spec(str(path), **options), "demo", (), report)), report


def test_the_fingerprint_is_what_it_was():
    """Of every finished stage it is in the key: another one would run them all again."""

    def said(role: str, content: str, **more: object) -> dict:
        return {"role": role, "content": content} | more

    pair = Row([said("user", "Grüße?")], chosen=[said("assistant", "ja")], rejected=[said("assistant", "nein")],
               margin=0.5, columns={"b": [1, None], "a": {"z": 1, "y": 2}})  # fmt: skip
    other = Row([said("system", "s"), said("user", " x ")], completion=[said("assistant", "y", train=False)],
                label=True, tools=[{"f": 1}])  # fmt: skip
    assert fingerprint([pair, other]) == "6052f3e49b006c8e4760077f2beba9e65d6d2208dd11234ed3f8accf498d952a"


def test_a_key_says_nothing_of_what_is_answered_by_default(kit):
    assert "on_problem" not in data_values(kit.spec())
    changed = data_values(kit.spec(on_problem=OnProblem(malformed="drop")))
    assert changed["on_problem"] == {"malformed": "drop"}


def test_rows_are_read_when_they_are_asked_for(write, kit):
    path = write("d.jsonl", [GOOD | {"prompt": f"{i}?"} for i in range(50)])
    report = DataReport()
    rows = stream_rows(kit.spec(str(path)), "demo", (), report)
    next(rows)
    assert (report.read, report.used) == (1, 1)
    assert len(list(rows)) == 49 and report.used == 50


def bad_file(write) -> Path:
    """25 broken lines, 3 rows without a reply, one that is empty, one repeated, and 2 good ones."""
    lines = ["{"] * 25 + [json.dumps({"prompt": "a"})] * 3 + [json.dumps({"prompt": "b", "completion": " "})]
    return write(
        "bad.jsonl", "\n".join([*lines, json.dumps(GOOD), json.dumps(GOOD), json.dumps({**GOOD, "prompt": "x"})])
    )


def test_every_bad_row_is_counted_and_the_first_twenty_are_named(write, kit):
    path = bad_file(write)
    with pytest.raises(UserErrors) as error:
        rows_of(path, kit)
    lines = str(error.value).splitlines()
    assert "28 of 32 rows have a problem: 28 malformed" in lines[0] and "on_problem: {malformed: drop}" in lines[0]
    assert [line.split(": ")[0] for line in lines[1:21]] == [f"{path}:{n}" for n in range(1, 21)]
    assert lines[21:] == ["... and 8 more"]


def test_one_bad_row_is_said_as_it_is(write, kit):
    path = write("one.jsonl", json.dumps(GOOD) + "\n{\n")
    with pytest.raises(UserError, match=r"one\.jsonl:2: broken JSON") as error:
        rows_of(path, kit)
    assert not isinstance(error.value, UserErrors)


def test_each_kind_of_problem_is_answered_as_the_entry_says(write, kit):
    path = bad_file(write)
    rows, report = rows_of(path, kit, on_problem=OnProblem(malformed="drop"))
    assert len(rows) == 3 and report.read == 32
    assert report.count(problems.WORDS["malformed"]) == 28
    assert (report.count("empty reply"), report.count("prompt seen before")) == (1, 1)
    rows, report = rows_of(path, kit, on_problem=OnProblem(malformed="drop", repeated="drop"))
    assert len(rows) == report.used == 2 and report.dropped["prompt seen before"].count == 1
    with pytest.raises(UserError, match=r"bad\.jsonl:29: empty reply"):
        rows_of(path, kit, on_problem=OnProblem(malformed="drop", unusable="error"))
    with pytest.raises(UserError, match=r"bad\.jsonl:31: its prompt has been seen before"):
        rows_of(path, kit, on_problem=OnProblem(malformed="drop", repeated="error"))
    with pytest.raises(UserError, match=r"data\.on_problem\.malformed: 'keep' is not possible; use error or drop"):
        OnProblem(malformed="keep")


def test_a_row_that_the_template_refuses_is_dropped_where_that_is_said(kit):
    tokenizer = kit.tokenizer("{{ raise_exception('no') if messages[0]['content'] == 'bad' }}" + kit.CHATML)
    rows = [kit.demo("bad"), kit.demo("good"), kit.demo("bad")]
    with pytest.raises(UserErrors, match="2 of 3 rows have a problem: 2 refused by the chat template"):
        encode_demos(rows, tokenizer, kit.spec())
    dataset, report = encode_demos(rows, tokenizer, kit.spec(on_problem=OnProblem(template="drop")))
    assert len(dataset) == 1 and report.count(problems.WORDS["template"]) == 2


def test_too_long_rows_are_all_named_where_they_are_errors(kit, chatml):
    rows = [kit.demo(answer="y" * 200), kit.demo(), kit.demo(answer="y" * 300)]
    with pytest.raises(UserErrors, match="2 of 3 rows have a problem: 2 too long"):
        encode_demos(rows, chatml, kit.spec(max_length=100, overflow="error"))


@pytest.mark.parametrize("kind", ["demo", "pair", "label", "prompt"])
@pytest.mark.parametrize("template", ["CHATML", "THINKING"])
def test_measuring_says_what_encoding_says(kit, kind, template):
    texts = ["a", "b c", "x" * 40, "y" * 90, "<|im_end|>", "é" * 30, "z" * 400]
    rows = []
    for number, text in enumerate(texts):
        side = {"chosen": [kit.assistant(text)], "rejected": [kit.assistant("b c")]}
        more = {"label": bool(number % 2), "origin": f"f:{number}", **(side if kind == "pair" else {})}
        rows.append(Row([kit.user(text)], completion=[kit.assistant(text)], **more))
    tokenizer = kit.tokenizer(getattr(kit, template))
    for overflow in ("drop", "truncate"):
        for limits in ({"max_length": 120}, {"max_length": 200, "max_prompt_length": 60}):
            spec = kit.spec(overflow=overflow, **limits)
            _, expected = encode_rows(kind, rows, tokenizer, spec)
            seen: list[dict] = []
            report = measure_rows(kind, iter(rows), tokenizer, spec, longest=150, see=seen.append)
            assert report.as_dict() == expected.as_dict()
            assert (report.dropped, report.notes) == (expected.dropped, expected.notes)
            # those that are short for certain were not tokenised, and no others
            assert len(seen) < report.used or template == "THINKING"


def test_a_text_of_millions_of_characters_is_not_tokenised(kit, chatml, monkeypatch):
    monkeypatch.setattr(encode, "_HUGE", 1000)
    rows, spec = [kit.demo(answer="word " * 4000), kit.demo()], kit.spec(max_length=100)
    asked: list[str] = []
    real = encode.Templater.ids
    monkeypatch.setattr(encode.Templater, "ids", lambda self, texts: asked.extend(texts) or real(self, texts))
    _, report = encode_demos(rows, chatml, spec)
    assert report.dropped["longer than max_length"].origins == ["here:1"]
    assert max(map(len, asked)) < 1000
    with pytest.raises(UserError, match=r"here:1: 20\d\d\d characters, at least \d+ tokens"):
        encode_demos(rows, chatml, kit.spec(max_length=100, overflow="truncate"))


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, write, kit):
    write("d/a.jsonl", [GOOD])
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "d" / "b.jsonl")
    for path, said in ((tmp_path / "pipe.jsonl", "is a pipe"), (tmp_path / "d", r"b\.jsonl: is a pipe"),
                       (Path("/dev/zero"), "is a device")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            load_rows(kit.spec(str(path)), "demo")
    (tmp_path / "d" / "b.jsonl").unlink()
    (tmp_path / "d" / "c.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"c\.jsonl: is a link that leads nowhere"):
        load_rows(kit.spec(str(tmp_path / "d")), "demo")


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path, kit):
    (tmp_path / "b.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff{}\n")
    with pytest.raises(UserError, match=r"b\.jsonl:2: not UTF-8"):
        load_rows(kit.spec(str(tmp_path / "b.jsonl")), "demo")


def test_a_missing_source_is_said_before_the_first_is_read(write, kit):
    report = DataReport()
    with pytest.raises(UserError, match="no such file"):
        list(stream_rows(kit.spec(str(write("d.jsonl", [GOOD])), "absent.jsonl"), "demo", (), report))
    assert report.read == 0


def test_a_set_of_numbers_knows_what_it_has_seen(monkeypatch):
    monkeypatch.setattr("preftune.data.seen._RECENT", 4)
    seen, known = Seen(), set()
    for text in [str(i * 7 % 31) for i in range(100)]:
        assert seen.add(number_of(text)) == (text in known)
        known.add(text)
