"""A report says what it was written for, so that a run which was killed before it wrote one has it written again."""

from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.eval.report.page import write_report
from preftune.eval.report_state import report_is_old

from .fake_run import build_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path, prompts=4)


def test_a_report_is_old_once_anything_that_it_shows_is_another(run: Path) -> None:
    assert report_is_old(run)
    write_report(run)
    assert not report_is_old(run)
    for name in ("run.json", "recipe.yaml", "eval/results.json", "eval/samples.jsonl", "doctor.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(before + b"\n")
        assert report_is_old(run), name
        (run / name).write_bytes(before)
        assert not report_is_old(run)
    (run / "eval" / "samples.jsonl").unlink()
    assert report_is_old(run)


def test_a_report_that_was_cut_off_or_that_an_earlier_version_wrote_is_old(run: Path) -> None:
    page = write_report(run)
    whole = page.read_bytes()
    page.write_bytes(whole[:-1000])
    assert report_is_old(run)
    page.write_bytes(whole.replace(b"<!-- preftune-made-for", b"<!-- "))
    assert report_is_old(run)


def test_a_page_of_another_kind_is_not_overwritten(run: Path) -> None:
    (run / "report.html").write_text("<html>my thesis</html>")
    with pytest.raises(UserError, match=r"is no report of preftune's"):
        write_report(run)
    assert (run / "report.html").read_text() == "<html>my thesis</html>"


@pytest.mark.parametrize("garbage", [b"\xff\xfe{", b"[" * 100_000, b"{}\n{}\n", b"\n\n", b"3\n{"])
def test_garbage_in_what_a_report_reads_is_one_line_or_left_out(run: Path, garbage: bytes) -> None:
    for name in ("recipe.yaml", "run.json", "eval/samples.jsonl", "sft/log.jsonl", "eval/results.json", "doctor.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(garbage)
        try:
            write_report(run)
        except UserError as error:
            assert "\n" not in str(error) and name.rpartition("/")[2] in error.where
        (run / name).write_bytes(before)
