"""`preftune eval alpaca`: outputs as AlpacaEval reads them, and the win-rates that came of them."""

import json
from pathlib import Path

import pytest

from .conftest import EVAL, POLICIES, RECIPE, Shell


@pytest.fixture
def evaluated(run: Path) -> Path:
    (run / "recipe.yaml").write_text(RECIPE + EVAL)
    return run


def test_outputs_of_every_policy(shell: Shell, evaluated: Path) -> None:
    code, out, err = shell("eval", "alpaca", evaluated, "--json")
    assert code == 0, err
    files = {row["policy"]: Path(row["file"]) for row in map(json.loads, out.splitlines())}
    assert list(files) == list(POLICIES)
    rows = {policy: json.loads(file.read_text()) for policy, file in files.items()}
    for policy, lines in rows.items():
        assert [set(line) for line in lines] == [{"instruction", "output", "generator", "dataset"}] * 4
        assert [line["instruction"] for line in lines] == [f"question {place}" for place in range(4)]
        assert {line["generator"] for line in lines} == {f"t-{policy}"}
    assert len({json.dumps([line["output"] for line in lines]) for lines in rows.values()}) == 3
    shell.refused("eval", "alpaca", evaluated, said="exists and is not empty")


def test_alpaca_evals_own_questions_keep_the_name_of_their_set(shell: Shell, run: Path, tmp_path: Path) -> None:
    questions = tmp_path / "alpaca_eval.json"
    questions.write_text(json.dumps([{"instruction": "Sing.", "output": "La.", "generator": "g", "dataset": "koala"}]))
    shell("eval", "alpaca", run, "--data", questions, "--policies", "dpo", "--output-dir", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "dpo.json").read_text())
    assert (row["instruction"], row["generator"], row["dataset"]) == ("Sing.", "t-dpo", "koala")


def test_a_talk_of_several_turns_has_no_place_there(shell: Shell, run: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": talk}) + "\n")
    said = r"1 of 1 prompts are not one turn of a user in words \(the first: 1\)"
    shell.refused("eval", "alpaca", run, "--data", tmp_path / "talks.jsonl", said=said)
    assert not (run / "alpaca").exists()


def test_annotations_are_scored_against_the_runs_reference(shell: Shell, evaluated: Path, tmp_path: Path) -> None:
    shell("eval", "alpaca", evaluated)
    sft, dpo = (json.loads((evaluated / "alpaca" / f"{name}.json").read_text()) for name in ("sft", "dpo"))
    # the reference stands second in half of the rows, as annotators that mix the order write them
    rows = []
    for place, (ours, theirs) in enumerate(zip(dpo, sft, strict=True)):
        first, second = (ours, theirs) if place % 2 else (theirs, ours)
        names = {"generator_1": first["generator"], "generator_2": second["generator"]}
        texts = {"output_1": first["output"], "output_2": second["output"]}
        # dpo wins three times of four
        wins = 1 if (place % 2 == 1) == (place != 0) else 2
        rows.append({"instruction": ours["instruction"], **texts, **names, "preference": wins})
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    code, out, err = shell("eval", "alpaca", evaluated, "--annotations", tmp_path / "annotations.json", "--json")
    assert code == 0, err
    (row,) = map(json.loads, out.splitlines())
    won = [(each["generator_1"] == "t-dpo") == (each["preference"] == 1) for each in rows]
    assert (row["model"], row["baseline"], row["n"]) == ("t-dpo", "t-sft", 4)
    assert row["win_rate"] == pytest.approx(sum(won) / 4) and row["win_rate"] != 0.5
    told = {json.dumps(each) for each in map(json.loads, shell("eval", "winrate", "--annotations",
            tmp_path / "annotations.json", "--baseline", "t-sft", "--json")[1].splitlines())}  # fmt: skip
    assert told == {json.dumps(row)}
