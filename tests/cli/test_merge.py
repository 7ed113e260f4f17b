"""What `preftune merge` says of the cost, and what it leaves where it is cut off."""

import os
from pathlib import Path

import pytest

from preftune.cli.merge import cost_in_words
from preftune.models.base import Base
from preftune.models.merging import Cost, Merged

BASE = Base("b", Path("b"), None, "")


def test_what_a_merge_costs_is_said_and_float32_advised_where_it_does():
    dear = Merged(BASE, "bfloat16", Cost(100, 2.158, 2.175, 2.251, 0.2))
    words = cost_in_words(dear)
    assert "2.1580 nats a token in float32" in words and "2.1750 in training's dtype" in words
    assert "costs 0.093 nats a token; --dtype float32 keeps them" in words
    assert "--dtype" not in cost_in_words(Merged(BASE, "bfloat16", Cost(100, 2.158, 2.160, 2.161, 0.01)))
    assert "--dtype" not in cost_in_words(Merged(BASE, "float32", Cost(100, 2.158, None, 2.158, 0.0)))
    assert "not measured" in cost_in_words(Merged(BASE, "bfloat16"))
    assert "mean score" in cost_in_words(Merged(BASE, "bfloat16", Cost(8, 0.5, None, 0.6, 0.1), reward=True))


def test_a_merge_appears_whole_and_takes_over_what_a_killed_one_left(run: Path, tmp_path: Path, shell) -> None:
    out, left = tmp_path / "out", tmp_path / ".out.merging"
    left.mkdir()
    (left / ".preftune-merging").write_text(str(2**22 + 1))
    (left / "model.safetensors").write_text("half")
    assert shell("merge", run / "sft", out)[0] == 0
    held = {each.name for each in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= held and ".preftune-merging" not in held
    assert not left.exists()


@pytest.mark.parametrize("content", ["mine", None])
def test_a_merge_leaves_what_is_not_its_own(run: Path, tmp_path: Path, shell, content: str | None) -> None:
    left = tmp_path / ".out.merging"
    if content is None:
        left.mkdir()
        (left / ".preftune-merging").write_text(str(os.getppid()))
    else:
        left.mkdir()
        (left / "thesis").write_text(content)
    before = sorted(left.iterdir())
    shell.refused("merge", run / "sft", tmp_path / "out", said="exists, and no merge made it|another merge")
    assert sorted(left.iterdir()) == before and not (tmp_path / "out").exists()


def test_a_merge_that_fails_leaves_nothing(run: Path, tmp_path: Path, shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", lambda *_, **__: full())
    code, _, err = shell("merge", run / "sft", tmp_path / "out")
    assert code == 1 and "the disk is full; free some space" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.merging").exists()


def test_a_merge_into_what_cannot_be_a_folder_is_one_line(run: Path, tmp_path: Path, shell) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/out", "/proc/nothing/out"):
        shell.refused("merge", run / "sft", tmp_path / place, said="exists and is not empty|cannot be written")
    assert (tmp_path / "file").read_text() == "mine"
