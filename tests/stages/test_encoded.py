"""Encoded rows: streamed as they were in memory, made once for all who need the same, and left in their file."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preftune.data import stream, unread, workers
from preftune.data.encode import encode_demos, encode_labels, encode_pairs, encode_prompts, encode_replies
from preftune.data.spec import DataSpec, OnProblem, SourceSpec
from preftune.errors import UserError
from preftune.models.cache import cache_dir
from preftune.stages import encoded
from preftune.stages.dpo import build_dpo
from preftune.stages.encoded import trim
from preftune.stages.job import StageJob
from preftune.stages.kto import build_kto
from preftune.stages.reward import build_reward
from preftune.stages.run import StageData, load_data

ENCODERS = {
    "dpo": encode_pairs,
    "sft": encode_demos,
    "kto": encode_labels,
    "ppo": encode_prompts,
    "distill": encode_replies,
}


def wild(count: int = 60) -> str:
    """Lines of pairs among which something is wrong here and there."""
    lines = []
    for number in range(count):
        row = {"prompt": f"Question {number % 50}?", "chosen": f"Yes, {number}.", "rejected": "No.", "margin": 0.5}
        odd = {
            7: {"rejected": row["chosen"]},
            11: {"chosen": " "},
            13: {"chosen": "long " * 60},
            17: {"rejected": None},
            19: {"prompt": f"<|im_start|> {number}", "chosen": "two  blanks \n and \u2019 \u00e9\u0301"},
            23: {"margin": "much"},
        }
        lines.append(json.dumps(row | odd.get(number % 29, {})))
        lines += {3: [""], 5: ["{"], 9: ["[1]"], 27: ['{"prompt": "\\ud800"}']}.get(number % 31, [])
    return "\n".join(lines) + "\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, base: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds nothing yet."""
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def job_of(make_job: Callable[..., StageJob], tmp_path: Path) -> Callable[..., StageJob]:
    """job_of(kind, text, **fields of DataSpec): a job that reads a file with this text."""

    def make(kind: str, text: str | None = None, **said: Any) -> StageJob:
        file = tmp_path / "wild.jsonl"
        file.write_text(wild() if text is None else text, encoding="utf-8")
        made = make_job("sft" if kind == "distill" else kind)
        return dataclasses.replace(made, data=DataSpec((SourceSpec(str(file)),), **said), data_name="wild")

    return make


def kept(data: StageData) -> Any:
    """All that is known of a stage's data."""
    parts = [None if part is None else [dict(row) for row in part] for part in (data.train, data.held)]  # pyright: ignore[reportCallIssue, reportArgumentType]: a row is a dictionary
    return parts, data.fingerprint, data.report, list(data.origins)


def handed(encode: Any) -> Any:
    """The encoder as one of a method's own, which is handed all rows."""
    return partial(encode)


def found(job: StageJob, encode: Any, tokenizer: Any) -> Any:
    """The data, or what is refused in which words."""
    try:
        return kept(load_data(job, encode, tokenizer))
    except UserError as error:
        return str(error)


DROPS = OnProblem(malformed="drop", template="drop")
SAID: list[dict[str, Any]] = [
    {},
    {"on_problem": DROPS},
    {"on_problem": DROPS, "held_out": 0.3, "max_length": 120},
    {"on_problem": OnProblem(malformed="drop", repeated="drop"), "overflow": "truncate", "max_length": 100},
    {"on_problem": OnProblem(malformed="drop", repeated="error", unusable="error")},
    {"on_problem": DROPS, "limit": 9},
    {"on_problem": DROPS, "overflow": "error", "max_length": 120, "system": "Be kind."},
    {"on_problem": DROPS, "max_length": 1},
    {"on_problem": DROPS, "held_out": 0.999999},
]


@pytest.mark.checklist("B1")
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("said", SAID, ids=range(len(SAID)))
def test_b01_a_stream_says_what_rows_in_memory_say(job_of, tokenizer, monkeypatch, kind, said):
    """Rows, order, counts, places and words are those of the plain encoder, which is handed all rows."""
    monkeypatch.setattr(unread, "CHUNK", 7)
    job, encode = job_of(kind, **said), ENCODERS[kind]
    plain = found(job, handed(encode), tokenizer)
    assert found(job, encode, tokenizer) == plain
    assert "rows have a problem" in plain if said == {} else True


@pytest.mark.checklist("B1")
def test_b01_several_processes_say_what_one_says(job_of, tokenizer, monkeypatch):
    monkeypatch.setattr(unread, "CHUNK", 7)
    job = job_of("dpo", wild(200), on_problem=DROPS, held_out=0.3, max_length=120)
    monkeypatch.setenv("PREFTUNE_DATA_PROCESSES", "1")
    alone = found(job, encode_pairs, tokenizer)
    monkeypatch.setenv("PREFTUNE_DATA_PROCESSES", "2")
    monkeypatch.setattr(stream, "_ALONE", 2)
    asked: list[int] = []
    real = workers.Workers.__init__
    monkeypatch.setattr(workers.Workers, "__init__", lambda self, *args: asked.append(1) or real(self, *args))
    monkeypatch.setenv("PREFTUNE_CACHE", str(cache_dir() / "other"))
    assert found(job, encode_pairs, tokenizer) == alone and asked == [1]


@pytest.mark.checklist("B1")
def test_b01_sources_that_are_mixed_are_drawn_as_before(job_of, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(unread, "CHUNK", 7)
    job = job_of("dpo", on_problem=DROPS)
    other = tmp_path / "other.csv"
    other.write_text("prompt,chosen,rejected\n" + "".join(f"a{i}?,y{i},n\n" for i in range(30)), encoding="utf-8")
    for limit, weights in ((None, (1.0, 1.0)), (None, (3.0, 1.0)), (20, (1.0, 1.0))):
        named = zip((*(source.path for source in job.data.sources), str(other)), weights, strict=True)
        sources = tuple(SourceSpec(path, weight=weight, limit=25) for path, weight in named)
        mixed = dataclasses.replace(job, data=dataclasses.replace(job.data, sources=sources, limit=limit))
        plain = found(mixed, handed(encode_pairs), tokenizer)
        assert found(mixed, encode_pairs, tokenizer) == plain and len(plain[0][0]) > 10


def test_what_lies_behind_a_limit_is_not_read(job_of, tokenizer, tmp_path):
    """Not even where it is no text: reading runs ahead, and what it meets there does not count."""
    job = job_of("dpo", limit=3)
    Path(job.data.sources[0].path).write_bytes((wild(3) + "\n").encode() * 2 + b"x" * 20_000 + b"\n\xff\n")
    assert len(load_data(job, encode_pairs, tokenizer).train) == 3


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each chunk that is encoded from now on has."""
    made: list[int] = []
    real = stream.Encoder.encode
    monkeypatch.setattr(stream.Encoder, "encode", lambda self, rows: made.append(len(rows)) or real(self, rows))
    return made


@pytest.mark.checklist("B2")
def test_b02_a_second_stage_with_the_same_needs_encodes_nothing(job_of, make_job, tokenizer, monkeypatch):
    job = job_of("dpo", on_problem=DROPS, held_out=0.2)
    first, made = load_data(job, encode_pairs, tokenizer), count_encoded(monkeypatch)
    reward = dataclasses.replace(make_job("reward"), data=job.data, data_name="wild")
    assert kept(load_data(reward, encode_pairs, tokenizer)) == kept(first) and made == []
    build_reward(reward)
    assert made == []


OTHER = """
import sys
from preftune.stages import encoded
encoded.encode_sources = lambda *_: sys.exit("encoded again")
from preftune.data.encode import encode_pairs
from preftune.data.spec import DataSpec, SourceSpec
from preftune.models.loading import resolve_base
from preftune.stages.job import StageJob
from preftune.stages.run import load_data, open_tokenizer
from pathlib import Path
file, base, out = sys.argv[1:]
spec = DataSpec((SourceSpec(file),), limit=9)
job = StageJob(name="later", kind="reward", base=resolve_base(base), data=spec, output_dir=Path(out))
print(len(load_data(job, encode_pairs, open_tokenizer(job)).train))
"""


@pytest.mark.checklist("B2")
def test_b02_nor_does_another_run(job_of, tokenizer, base, tmp_path):
    job = job_of("dpo", wild(3) * 4, limit=9)
    rows = len(load_data(job, encode_pairs, tokenizer).train)
    arguments = [job.data.sources[0].path, str(base.path), str(tmp_path / "later")]
    command = [sys.executable, "-W", "ignore", "-c", OTHER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip().splitlines()[-1:] == [str(rows)], done.stderr


@pytest.mark.checklist("B2")
@pytest.mark.parametrize(
    "change", ["rows", "path", "template", "limits", "kind", "code", "library", "tokenizer", "split", "order"]
)
def test_b02_other_needs_are_encoded_anew(job_of, tokenizer, base, tmp_path, monkeypatch, change):
    from preftune.models.tokens import load_tokenizer

    job, encode, mine = job_of("dpo", on_problem=DROPS), encode_pairs, tokenizer
    load_data(job, encode, mine)
    made, data = count_encoded(monkeypatch), job.data
    file = Path(data.sources[0].path)
    if change == "rows":
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("Yes, 0.", "Yes, 1."), encoding="utf-8")
        os.utime(file, (1, 1))
    if change == "path":
        data = dataclasses.replace(data, sources=(SourceSpec(str(file.rename(tmp_path / "renamed.jsonl"))),))
    if change in ("template", "tokenizer"):
        mine = load_tokenizer(
            base, "default" if change == "tokenizer" else "{{ messages[0]['content'] }}{{ eos_token }}"
        )
    if change == "limits":
        data = dataclasses.replace(data, max_length=1000)
    if change == "split":
        data = dataclasses.replace(data, held_out=0.3)
    if change == "order":
        data = dataclasses.replace(data, seed=5)
    if change == "kind":
        job, encode = job_of("sft", on_problem=DROPS), encode_demos
        data = job.data
    if change == "code":
        monkeypatch.setattr(encoded, "_code", lambda: "another")
    if change == "library":
        monkeypatch.setattr(encoded, "version", lambda name: "99")
    if change == "template":
        with pytest.raises(UserError, match="no row is left"):
            load_data(dataclasses.replace(job, data=data), encode, mine)
    else:
        load_data(dataclasses.replace(job, data=data), encode, mine)
    assert sum(made) > 0


@pytest.mark.checklist("B3")
def test_b03_rows_that_are_not_whole_are_never_used(job_of, tokenizer, own_cache, monkeypatch):
    job = job_of("dpo", on_problem=DROPS, held_out=0.2)
    first, made = kept(load_data(job, encode_pairs, tokenizer)), count_encoded(monkeypatch)
    (folder,) = [each for each in (own_cache / "rows").iterdir() if each.is_dir()]
    for name, damage in (
        ("train.arrow", lambda file: file.write_bytes(file.read_bytes()[:-100])),
        ("held_out.arrow", lambda file: file.unlink()),
        ("about.json", lambda file: file.write_text(file.read_text()[:50])),
        ("about.json", lambda file: file.unlink()),
    ):
        damage(folder / name)
        assert kept(load_data(job, encode_pairs, tokenizer)) == first
        assert sum(made) > 0, name
        made.clear()
    # one that is written when the process is killed has another name
    (folder.parent / f".{folder.name}.partial-x").mkdir()
    folder.rename(folder.parent / f".{folder.name}.partial-y")
    assert kept(load_data(job, encode_pairs, tokenizer)) == first and sum(made) > 0
    assert [each.name for each in folder.parent.iterdir() if each.is_dir()] == [folder.name]


@pytest.mark.checklist("B3")
def test_b03_of_two_who_need_them_at_once_one_encodes(job_of, tokenizer, monkeypatch):
    job, results = job_of("dpo", on_problem=DROPS), list[Any]()
    made, real = count_encoded(monkeypatch), stream.encode_sources
    monkeypatch.setattr(encoded, "encode_sources", lambda *args: (time.sleep(1), real(*args))[1])
    both = [threading.Thread(target=lambda: results.append(found(job, encode_pairs, tokenizer))) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert results[0] == results[1] and len(made) == 1


@pytest.mark.checklist("B3")
def test_b03_a_file_that_changes_while_it_is_read_is_refused(job_of, tokenizer, own_cache, monkeypatch):
    job, real = job_of("dpo", on_problem=DROPS), stream.encode_sources

    def slowly(*args: Any) -> Any:
        done = real(*args)
        with Path(job.data.sources[0].path).open("a") as file:
            file.write("\n")
        return done

    monkeypatch.setattr(encoded, "encode_sources", slowly)
    with pytest.raises(UserError, match="changed while it was read"):
        load_data(job, encode_pairs, tokenizer)
    assert not [each for each in (own_cache / "rows").iterdir() if each.is_dir()]


def test_the_least_recently_used_go_first(tmp_path, monkeypatch):
    folders = [tmp_path / "rows" / name for name in "abc"]
    for age, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "train.arrow").write_bytes(b"x" * 1000)
        (folder / "about.json").write_text("{}")
        os.utime(folder / "about.json", (10 + age, 10 + age))
    monkeypatch.setenv("PREFTUNE_CACHE_ROWS_GB", "0.0000022")
    trim(folders[0])
    assert [each.is_dir() for each in folders] == [True, False, True]
    os.utime(folders[2] / "about.json")  # used just now
    monkeypatch.setenv("PREFTUNE_CACHE_ROWS_GB", "0")
    trim(folders[0])
    assert folders[2].is_dir()
    monkeypatch.setenv("PREFTUNE_CACHE_ROWS_GB", "many")
    with pytest.raises(UserError, match="'many' is no number"):
        trim(folders[0])


@pytest.mark.checklist("B4")
@pytest.mark.parametrize("build", [build_dpo, build_reward, build_kto])
def test_b04_a_trainer_reads_its_rows_from_their_file(make_job, build):
    stage = build(make_job(build.__name__.removeprefix("build_"), held_out=0.4))
    for rows in (stage.trainer.train_dataset, stage.trainer.eval_dataset):
        assert rows.cache_files and all(type(each).__name__ == "MemoryMappedTable" for each in tables(rows.data))


def tables(data: Any) -> list[Any]:
    """The tables that a dataset's columns stand in."""
    return [each for row in data.blocks for each in row] if hasattr(data, "blocks") else [data]


@pytest.mark.checklist("B5")
def test_b05_memory_does_not_grow_with_the_rows(job_of, tokenizer, monkeypatch):
    """8 bytes a row for the prompts that have been seen, and for the latest of them a bit more."""
    monkeypatch.setattr(unread, "CHUNK", 50)
    monkeypatch.setattr("preftune.data.seen._RECENT", 64)
    monkeypatch.setenv("PREFTUNE_DATA_PROCESSES", "1")

    def peak(name: str, rows: int) -> int:
        row = '{{"prompt": "{} {}?", "chosen": "Yes, because of {}.", "rejected": "No."}}\n'
        job = job_of("dpo", "".join(row.format(name, i, i * i) for i in range(rows)), held_out=0.3)
        tracemalloc.start()
        load_data(job, encode_pairs, tokenizer)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak("warm", 400)
    few, many = peak("few", 1000), peak("many", 5000)
    assert many < few + 100 * 4000


@pytest.fixture
def one_worker(tokenizer) -> Any:
    task = stream.Task(DataSpec((SourceSpec("nowhere"),)), "pair", "pair", tokenizer)
    with workers.Workers(1, task) as started:
        yield started


def test_a_process_that_dies_is_said_in_words(one_worker):
    one_worker._processes[0].kill()
    with pytest.raises(UserError, match=r"ended by signal 9, as a system does that has no memory left; make room"):
        list(one_worker.done([("name", ([0], [("f:1", "{}")]))]))


def test_what_the_work_raises_is_said(one_worker):
    with pytest.raises(RuntimeError, match=r"(?s)a process that encodes rows failed:.*TypeError"):
        list(one_worker.done([("name", 1)]))


def test_progress_says_how_fast_it_goes_and_how_long_it_takes(monkeypatch):
    now = iter([100.0, 110.0, 200.0, 201.0])
    monkeypatch.setattr(stream, "time", SimpleNamespace(monotonic=lambda: next(now)))
    shown = stream._Shown(1000)
    chunk = unread.Chunk([0, 0], [("f:1", "x" * 250), ("f:2", None)], {})
    assert shown.note(chunk, 25_000) == "(2,500 a second, about 30.0 s left)"
    assert stream._Shown(0).note(chunk, 10) == "(10 a second)"
