"""What the system refuses is one line, whoever raised it: a full disk, a folder or cache that cannot be written."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from preftune.cli.process import exit_code_of
from preftune.errors import UserError
from preftune.faults import system_words
from preftune.models import cache
from preftune.models.cache import cache_dir, remembered
from preftune.models.loading import resolve_base

from .workshop import ALL, Workshop


def code_and_words(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def work() -> None:
        raise error

    code = exit_code_of(work)
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    return code, said


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.ENOSPC, 1, "the disk is full; free some space"),
        (errno.EDQUOT, 1, "quota"),
        (errno.EIO, 1, "cannot be read or written"),
        (errno.EROFS, 2, "read-only"),
        (errno.EACCES, 2, "permission denied"),
        (errno.ENOTDIR, 2, "a file stands where a folder is needed"),
        (errno.EISDIR, 2, "a folder stands where a file is written"),
        (errno.ENAMETOOLONG, 2, "too long"),
        (errno.ELOOP, 2, "in a circle"),
    ],
)
def test_what_the_system_refuses_is_one_line(number: int, code: int, said: str, capsys) -> None:
    found, words = code_and_words(OSError(number, os.strerror(number), "/runs/x/run.json"), capsys)
    assert found == code and "/runs/x/run.json: " in words and said in words
    assert "what is finished is kept, and the same command continues" in words


def test_what_it_came_from_counts(capsys) -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/runs/x/log.jsonl")
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert code_and_words(error, capsys)[0] == 1


def test_other_errors_keep_their_traceback(capsys) -> None:
    for error in (RuntimeError("a bug"), OSError("nothing said"), ConnectionRefusedError(errno.ECONNREFUSED, "no")):
        assert system_words(error) is None

    def work() -> None:
        raise RuntimeError("a bug")

    assert exit_code_of(work) == 1 and "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_the_libraries_own_errors_of_a_full_disk_are_known(tmp_path: Path, capsys, writer: str) -> None:
    """A limit on the size of files is the full disk that a test can have."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tensors = {"a": torch.zeros(100_000)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises((RuntimeError, OSError, SafetensorError)) as raised:
            if writer == "torch":
                torch.save(tensors, tmp_path / "file.pt")
            else:
                save_file(tensors, tmp_path / "file.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    code, said = code_and_words(raised.value, capsys)
    assert code == 1 and ("larger than the system allows" in said or "the disk is full" in said)


def test_a_disk_that_is_full_while_a_stage_runs_loses_nothing_that_is_finished(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str, output: Path) -> None:
        if name == "ppo":
            monkeypatch.setattr("preftune.cli.folder.write_whole", refuse)
            raise OSError(errno.ENOSPC, "No space left on device", str(output / "log.jsonl"))

    def refuse(file: Path, text: str) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    shop.during = full
    code = exit_code_of(shop.run)
    assert code == 1 and "ppo.partial/log.jsonl: the disk is full" in shop.capsys.readouterr().err
    monkeypatch.undo()
    shop.during = lambda name, output: None
    assert shop.run() == ["ppo", "dpo", "eval"]


@pytest.mark.parametrize(
    "place", ["file", "file/below", "/proc/nothing/run", "loop/run", "x" * 300, "~nobody-here/run"]
)
def test_a_run_folder_that_cannot_be_is_one_line(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("loop").symlink_to("loop")
    shop.path = Path(place)
    with pytest.raises(UserError, match=r"is a file|cannot be a run's folder|no user of that name"):
        shop.run()
    assert Path("file").read_text() == "mine"


def test_two_runs_in_one_folder_are_told_apart_from_a_dead_one(shop: Workshop) -> None:
    assert shop.run() == ALL
    code = (
        "import sys, time; from pathlib import Path; from preftune.cli.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(shop.path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert exit_code_of(shop.run) == 2
        assert f"another run (process {other.pid}) is at work" in shop.capsys.readouterr().err
        other.kill()
        other.wait()
    assert shop.run() == []


@pytest.mark.parametrize("place", ["file", "/proc/nothing", "~nobody-here"])
def test_a_cache_that_cannot_be_used_is_one_line_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFTUNE_CACHE", place)
    with pytest.raises(UserError, match=r"cannot be used as the cache .*PREFTUNE_CACHE"):
        resolve_base("random:llama")
    # and costs no more than time where it is not
    assert remembered("test", [tmp_path / "file"], lambda: "a" * 64) == "a" * 64


def test_a_cache_that_turns_out_to_be_full_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with pytest.raises(UserError, match=r"cannot be used as the cache \(No space left on device\)"):
        cache.build_once("something-new", full)
    assert not list(cache_dir().glob(".something-new.partial-*")) and not (cache_dir() / "something-new").exists()


@pytest.mark.parametrize("note", [b"", b"half", b"\xff\xfe", b"0" * 63])
def test_a_damaged_note_in_the_cache_is_computed_again(tmp_path: Path, note: bytes) -> None:
    (tmp_path / "file").write_text("text")
    files = [tmp_path / "file"]
    assert remembered("damaged", files, lambda: "b" * 64) == "b" * 64
    newest = max((cache_dir() / "hashes").iterdir(), key=lambda each: each.stat().st_mtime_ns)
    assert newest.read_text() == "b" * 64
    newest.write_bytes(note)
    assert remembered("damaged", files, lambda: "c" * 64) == "c" * 64
