"""Commands that read a run whose files are damaged: one line that names the file, and never a number made of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from preftune.cli.folder import Stamp, seal
from preftune.cli.keys import key_of
from preftune.models.loading import resolve_base

from .conftest import EVAL, RECIPE

WEIGHTS = "adapter_model.safetensors"
COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "chat": lambda run: ["chat", run, "--policy", "dpo"],
    "compare": lambda run: ["chat", run, "--compare", "sft,dpo"],
    "merge": lambda run: ["merge", run / "dpo", run.parent / "out"],
    "kl": lambda run: ["eval", "kl", run, "--policies", "dpo", "--data", str(run / "prompts.jsonl")],
    "perplexity": lambda run: ["eval", "perplexity", run, "--policies", "dpo"],
    "winrate": lambda run: ["eval", "winrate", run],
    "eval": lambda run: ["eval", "run", run],
}


def sealed(run: Path) -> None:
    for name in ("sft", "dpo", "ipo"):
        seal(run / name, Stamp(key_of({}), {}, "2026-11-26T00:00:00+00:00"))


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 64
    file.write_bytes(raw)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


DAMAGES: dict[str, Callable[[Path], object]] = {"has other content": flip, "is cut off": cut, "is gone": Path.unlink}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_by_every_command(run: Path, shell, command: str, damage: str) -> None:
    (run / "recipe.yaml").write_text(RECIPE + EVAL)
    sealed(run)
    DAMAGES[damage](run / "dpo" / WEIGHTS)
    shell.refused(*COMMANDS[command](run), said=rf"dpo: is damaged, {WEIGHTS} {damage}.*run it again: preftune run")
    assert not (run.parent / "out").exists() and not (run / "eval").exists()


@pytest.mark.parametrize("command", ["chat", "merge"])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (WEIGHTS, b"", "cannot be read"),
        (WEIGHTS, b"\xff" * 64, "cannot be read"),
        ("lineage.json", b"{", "lineage.json: unreadable"),
        ("lineage.json", b"[" * 100_000, "lineage.json: unreadable"),
        ("lineage.json", b'{"format": 1}', "lineage.json: unreadable"),
        ("adapter_config.json", b"{", "adapter_config.json: no adapter config"),
        ("adapter_config.json", b"[]", "adapter_config.json: no adapter config"),
    ],
)
def test_one_of_an_earlier_version_is_refused_where_it_cannot_be_read(
    run: Path, shell, command: str, name: str, content: bytes, said: str
) -> None:
    (run / "dpo" / name).write_bytes(content)
    shell.refused(*COMMANDS[command](run), said=said)


def test_an_adapter_that_lacks_weights_is_not_merged(run: Path, shell) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(run / "dpo" / WEIGHTS)
    tensors.pop(max(tensors))
    save_file(tensors, run / "dpo" / WEIGHTS, metadata={"format": "pt"})
    shell.refused(*COMMANDS["merge"](run), said="it lacks weights that its config speaks of")
    shell.refused(*COMMANDS["chat"](run), said="does not fit this base")


@pytest.mark.parametrize("content", ["", "{", '{"policy": 3}\n', "3\n4\n", "\x00\n\x00\n"])
def test_damaged_samples_are_not_voted_on(judged: Path, shell, content: str) -> None:
    (judged / "eval" / "samples.jsonl").write_text(content)
    shell.refused("chat", judged, "--compare", "sft,dpo", "--samples", said=r"samples\.jsonl")


def test_samples_that_are_not_those_that_were_written_are_not_voted_on(judged: Path, shell) -> None:
    seal(judged / "eval", Stamp(key_of({}), {}, "2026-11-26T00:00:00+00:00"))
    file = judged / "eval" / "samples.jsonl"
    file.write_text(file.read_text().replace("dpo 1", "dpo 2"))
    shell.refused(
        "chat", judged, "--compare", "sft,dpo", "--samples", said=r"eval: is damaged, samples\.jsonl has other"
    )


def test_votes_that_cannot_be_kept_are_said_before_anybody_votes(judged: Path, shell) -> None:
    (judged / "votes.jsonl").mkdir()
    shell.refused("chat", judged, "--compare", "sft,dpo", "--samples", said="is no file, and votes are kept there")


def test_an_evaluation_is_not_written_over_somebodys_folder(run: Path, shell) -> None:
    (run / "recipe.yaml").write_text(RECIPE + EVAL)
    (run / "eval").mkdir()
    (run / "eval" / "mine.txt").write_text("mine")
    shell.refused("eval", "run", run, said="eval: is no finished step of a run")
    shutil.rmtree(run / "eval")
    (run / "report.html").write_text("<html>mine</html>")
    shell.refused("eval", "run", run, said="is no report of preftune's")
    assert (run / "report.html").read_text() == "<html>mine</html>" and not (run / "eval").exists()


def test_damaged_kept_replies_are_drawn_again(run: Path, shell) -> None:
    (run / "recipe.yaml").write_text(RECIPE + EVAL)
    assert shell("eval", "run", run)[0] == 0
    before = (run / "eval" / "results.json").read_bytes()
    kept = sorted((run / "eval-cache").glob("samples-*.json"))
    raw = json.loads(kept[0].read_text())
    raw["completions"][0] += " and more"
    kept[0].write_text(json.dumps(raw))
    kept[1].write_text("{")
    assert shell("eval", "run", run)[0] == 0
    assert (run / "eval" / "results.json").read_bytes() == before


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_base_whose_weights_are_not_all_there_is_refused_before_anything_trains(
    made: Path, tmp_path: Path, shell, command: str
) -> None:
    base = Path(shutil.copytree(resolve_base("random:llama").path, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 6}
    (base / "config.json").write_text(json.dumps(config))
    shutil.copy(made / "demos.jsonl", tmp_path)
    recipe = (
        f"name: t\nmodel: {{base: {base}}}\ndata: {{demos: {{path: demos.jsonl}}}}\nstages: {{sft: {{data: demos}}}}\n"
    )
    (tmp_path / "t.yaml").write_text(recipe)
    where = [] if command == "validate" else ["--output-dir", tmp_path / "run"]
    shell.refused(command, tmp_path / "t.yaml", *where, said=r"would be random: model\.layers\.4\.")
    assert not (tmp_path / "run" / "sft").exists() and not (tmp_path / "run" / "recipe.yaml").exists()
