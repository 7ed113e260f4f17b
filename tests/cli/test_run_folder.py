"""A run's folder: nothing of the user's is touched, what is damaged is seen, what was cut off is put right."""

import json
import os
import shutil
from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.files import replace_folder

from .workshop import ALL, Workshop


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, less what a refused command may leave."""
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def own_files(folder: Path) -> dict[str, bytes]:
    """A folder of somebody's, with the names that a run would write."""
    for name in (
        "sft/weights.bin",
        "eval/notes.txt",
        "recipe.yaml",
        "report.html",
        ".thesis.old/chapter.txt",
        "thesis",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return tree(folder)


@pytest.mark.parametrize("more", [{}, {"run.json": "{}"}, {"run.json": '{"stages": []}'}, {".lock": "mine"}])
def test_a_folder_of_somebody_elses_is_refused_and_stays_as_it_was(shop: Workshop, more: dict[str, str]) -> None:
    own_files(shop.path)
    for name, text in more.items():
        (shop.path / name).write_text(text)
    before = tree(shop.path)
    with pytest.raises(UserError, match=r"run: holds .* and is no run's folder; .*--output-dir"):
        shop.run()
    assert shop.ran == [] and tree(shop.path) == before


def test_old_folders_that_are_not_ours_are_never_renamed_over_anything(shop: Workshop) -> None:
    shop.run()
    for name, holds in ((".notes.old", "mine"), (".empty.old", None)):
        (shop.path / name).mkdir()
        if holds:
            (shop.path / name / "text").write_text(holds)
    (shop.path / "notes").mkdir()
    shop.run()
    assert (shop.path / ".notes.old" / "text").read_text() == "mine" and (shop.path / "notes").is_dir()


@pytest.mark.parametrize("place", ["dpo", ".dpo.old", ".dpo.partial", "eval"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_stands_where_a_step_is_written_is_said_before_anything_trains(
    shop: Workshop, place: str, kind: str
) -> None:
    shop.run(until="sft")
    if kind == "file":
        (shop.path / place).write_text("mine")
    else:
        (shop.path / place).mkdir()
        (shop.path / place / "mine.txt").write_text("mine")
    before = tree(shop.path)
    with pytest.raises(UserError, match=r"move it away"):
        shop.run("stages.sft.train.max_steps=3")
    assert shop.ran == [] and tree(shop.path) == before


def test_what_somebody_put_into_a_stages_folder_is_kept_when_the_stage_runs_again(shop: Workshop) -> None:
    shop.run()
    (shop.path / "dpo" / "notes.txt").write_text("mine")
    (shop.path / "dpo" / "merged").mkdir()
    (shop.path / "dpo" / "merged" / "model").write_text("mine too")
    shop.said()
    shop.run("stages.dpo.beta=0.2")
    assert "dpo: merged, notes.txt, not written by it, now in" in shop.said()
    assert tree(shop.path / "dpo.before") == {"notes.txt": b"mine", "merged/model": b"mine too"}
    assert set(tree(shop.path / "dpo")) == {"result", "metrics.json", ".key.json"}


def test_a_stages_folder_that_is_a_link_is_replaced_and_what_it_leads_to_stays(shop: Workshop) -> None:
    shop.run()
    elsewhere = shop.path.parent / "big-disk"
    shutil.move(shop.path / "dpo", elsewhere)
    (shop.path / "dpo").symlink_to(elsewhere)
    assert shop.run() == []
    assert shop.run("stages.dpo.beta=0.2") == ["dpo", "eval"]
    assert not (shop.path / "dpo").is_symlink() and (elsewhere / "result").is_file()
    assert not (shop.path / ".dpo.old").is_symlink()


def test_folders_of_others_are_not_replaced_by_the_helper_either(tmp_path: Path) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(UserError, match="not ours"):
        replace_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "final"


def flip(file: Path) -> None:
    """One bit, and the time of change as it was: what a disk that goes bad does."""
    before, raw = file.stat(), bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGES = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "other content": flip,
    "has grown": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("step", ["sft", "eval"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_runs_again_and_nothing_that_comes_from_it_does(shop: Workshop, step: str, damage: str) -> None:
    shop.run()
    file = shop.path / step / ("result" if step == "sft" else "results.json")
    before = file.read_bytes()
    DAMAGES[damage](file)
    shop.said()
    assert shop.run() == [step]
    said = shop.said()
    assert f"{step}: runs again, its folder is damaged: {file.name}" in said and damage in said
    assert file.read_bytes() == before
    assert shop.run() == []


def test_a_stage_alone_is_not_trained_on_a_damaged_parent(shop: Workshop) -> None:
    shop.run()
    flip(shop.path / "sft" / "result")
    with pytest.raises(UserError, match=r"stages\.dpo: needs sft, whose folder in .* is damaged: result has other"):
        shop.run("stages.dpo.beta=0.2", only="dpo")
    assert shop.ran == []


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"key": "x"}', '{"key": 1, "parts": 2}'])
def test_a_damaged_key_file_has_that_stage_run_again(shop: Workshop, content: str) -> None:
    shop.run()
    (shop.path / "sft" / "lineage.json").write_text("{}")  # as a stage that trains writes it
    (shop.path / "sft" / "adapter_config.json").write_text("{}")
    (shop.path / "sft" / ".key.json").write_text(content)
    shop.said()
    assert shop.run() == ["sft"]
    assert "sft: runs again, nothing says what its folder was made for" in shop.said()


def test_a_key_file_whose_key_is_not_that_of_its_parts_is_damaged(shop: Workshop) -> None:
    shop.run()
    file = shop.path / "sft" / ".key.json"
    raw = json.loads(file.read_text())
    raw["key"] = ("0" if raw["key"][0] != "0" else "1") + raw["key"][1:]
    file.write_text(json.dumps(raw))
    assert shop.run() == ["sft"]


GARBAGE = [b"", b"{", b"[1]", b'{"stages": [1]}', b'{"stages": {"sft": 3}}', b"\xff\xfe\x00", b"[" * 100_000]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_run_json_is_made_again_from_the_stages(shop: Workshop, content: bytes) -> None:
    shop.run()
    file = shop.path / "run.json"
    before = json.loads(file.read_text())
    file.write_bytes(content)
    shop.said()
    assert shop.run() == []
    assert f"{file} cannot be read" in shop.said()
    after = json.loads(file.read_text())
    assert after == before and set(after["stages"]) == set(ALL)


def test_the_lock_alone_makes_a_folder_a_runs(shop: Workshop) -> None:
    shop.run()
    (shop.path / "run.json").write_text("{")
    for name in ALL:
        shutil.rmtree(shop.path / name)
    assert shop.run() == ALL


def test_what_killed_processes_left_is_cleared_and_nothing_else(shop: Workshop) -> None:
    shop.run()
    gone = 2**22 + 1  # above the kernel's largest process id
    (shop.path / f".eval.{gone}").mkdir()
    (shop.path / f".eval.{gone}" / "results.json").write_text("[")
    for name in ("run.json", "recipe.yaml", "report.html", "doctor.json"):
        (shop.path / f".{name}.{gone}").write_text("half")
    (shop.path / f".eval.{gone + 1}").mkdir()
    (shop.path / f".eval.{gone + 1}" / "mine.txt").write_text("mine")
    (shop.path / f".eval.{os.getppid()}").mkdir()  # somebody is still at it
    (shop.path / f".thesis.{gone}").write_text("mine")
    shop.run()
    left = {each.name for each in shop.path.iterdir()} - {*ALL, "run.json", "recipe.yaml", ".lock"}
    assert left == {f".eval.{gone + 1}", f".eval.{os.getppid()}", f".thesis.{gone}"}


def test_half_written_files_do_not_come_along_into_a_finished_stage(shop: Workshop) -> None:
    def write_half(name: str, output: Path) -> None:
        (output / ".lineage.json.4711").write_text("half")

    shop.during = write_half
    shop.run(until="sft")
    assert ".lineage.json.4711" not in {each.name for each in (shop.path / "sft").iterdir()}


def test_what_an_interrupted_stage_left_goes_once_the_recipe_has_it_no_more(shop: Workshop) -> None:
    def stop(name: str, output: Path) -> None:
        (output / "half").write_text("")
        if name == "ppo":
            raise KeyboardInterrupt

    shop.during = stop
    with pytest.raises(KeyboardInterrupt):
        shop.run()
    (shop.path / ".thesis.partial").mkdir()
    (shop.path / ".thesis.partial" / "chapter").write_text("mine")
    shop.during = lambda name, output: None
    shop.recipe.write_text(shop.recipe.read_text().replace("  ppo: {from: sft, reward: reward, data: demos}\n", ""))
    shop.run(only="dpo")
    assert (shop.path / ".ppo.partial").is_dir()
    shop.said()
    shop.run()
    assert "ppo: no stage of the recipe, what an interrupted run left of it is removed" in shop.said()
    assert not (shop.path / ".ppo.partial").exists()
    assert (shop.path / ".thesis.partial" / "chapter").read_text() == "mine"


def test_a_refused_command_leaves_the_recipe_of_a_finished_run(shop: Workshop) -> None:
    shop.run()
    before = (shop.path / "recipe.yaml").read_bytes()
    (shop.recipe.parent / "wrong.jsonl").write_text('{"prompt": "a", "rejected": "c"}\n')
    for override in ("stages.dpo.data=nothing", f"data.pairs.path={shop.recipe.parent / 'wrong.jsonl'}"):
        with pytest.raises(UserError):
            shop.run(override)
        assert (shop.path / "recipe.yaml").read_bytes() == before
    shop.run("stages.dpo.beta=0.2")
    assert (shop.path / "recipe.yaml").read_bytes() != before


LOGGING = "stages.sft.train.logging_steps=7"


def test_how_a_stage_is_shown_or_fed_is_no_part_of_its_key(shop: Workshop) -> None:
    shop.run()
    shop.said()
    shown = ["report_to=none", "run_name=x", "disable_tqdm=true", "save_steps=5", "save_total_limit=2"]
    assert shop.run(LOGGING, *(f"stages.sft.train.{each}" for each in shown)) == []
    said = shop.said()
    assert (
        "sft: unchanged since" in said and "train.logging_steps unset -> 7" in said and "--force runs it again" in said
    )
    assert "logging_steps: 7" in (shop.path / "recipe.yaml").read_text()


def test_where_the_best_checkpoint_comes_out_what_is_saved_counts(shop: Workshop) -> None:
    best = "stages.sft.train.load_best_model_at_end=true"
    shop.run(best, "stages.sft.train.save_steps=5")
    assert shop.run(best, "stages.sft.train.save_steps=6")[:1] == ["sft"]


def test_an_interrupted_stage_goes_on_whatever_is_shown(shop: Workshop) -> None:
    def stop(name: str, output: Path) -> None:
        (output / "half").write_text("")
        raise KeyboardInterrupt

    shop.during = stop
    with pytest.raises(KeyboardInterrupt):
        shop.run()
    left = []
    shop.during = lambda name, output: left.append((output / "half").exists())
    shop.run(LOGGING, until="sft")
    assert left == [True]


def test_runs_of_an_earlier_version_whose_keys_count_such_settings_stay_valid(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        for module in ("keys", "folder", "chain"):
            earlier.setattr(f"preftune.cli.{module}.counted", dict)
        shop.run(LOGGING)
    assert "train.logging_steps" in json.loads((shop.path / "sft" / ".key.json").read_text())["parts"]
    for name in ALL:  # which knew no hashes either
        file = shop.path / name / ".key.json"
        raw = json.loads(file.read_text())
        file.write_text(json.dumps({key: raw[key] for key in ("key", "parts", "started", "seconds")}))
    assert shop.run(LOGGING) == []
    assert shop.run() == []
    assert shop.run("stages.dpo.beta=0.2") == ["dpo", "eval"]
