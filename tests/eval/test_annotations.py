"""`eval winrate --annotations`: preferences that somebody else collected."""

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from preftune.cli import main as cli
from preftune.errors import UserError
from preftune.eval.annotations import annotation_rows, read_annotations

# Real GPT-4 annotations with the figures that AlpacaEval 2 published; beside the project where they are at hand.
ALPACA_EVAL = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval2"
KEYS = ["model", "baseline", "n", "unparsable", "win_rate", "standard_error", "length_controlled_win_rate"]


def preftune(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.run_command([str(each) for each in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(path: Path, rows: list[dict]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def row(prompt: object = 0, baseline: object = 100, model: object = 120, preference: object = 1.5) -> dict[str, Any]:
    return {"prompt": prompt, "baseline_length": baseline, "model_length": model, "preference": preference}


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Three models that only differ in length, and a judge who likes it."""
    rng = np.random.default_rng(0)
    made = []
    for name, longer in (("brief.jsonl", -600), ("same-v1.5.jsonl.gz", 0), ("verbose.jsonl", 600)):
        baseline = rng.integers(1000, 2000, size=200)
        model = np.maximum(baseline + rng.integers(-300, 300, size=200) + longer, 1)
        preference = 1 + expit(0.4 + 1.5 * np.tanh((model - baseline) / 600))
        rows = [row(f"p{place}", int(baseline[place]), int(model[place]), preference[place]) for place in range(200)]
        made.append(write(tmp_path / name, rows))
    return made


@pytest.mark.checklist("E3")
def test_e03_the_command_scores_files_jointly_in_their_order(capsys, files):
    code, out, _ = preftune(capsys, "eval", "winrate", "--annotations", *files, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert rows == annotation_rows(files)
    assert [list(each) for each in rows] == [KEYS] * 3
    assert [each["model"] for each in rows] == ["brief", "same-v1.5", "verbose"]
    assert rows[0]["win_rate"] < 0.4
    assert rows[2]["win_rate"] > 0.75
    # tanh at another scale than the planted one: close, not equal
    assert [each["length_controlled_win_rate"] for each in rows] == pytest.approx([expit(0.4)] * 3, abs=0.02)


@pytest.mark.parametrize("order", [["--json", "--annotations"], ["--annotations"]])
def test_options_stand_anywhere(capsys, files, order):
    code, out, _ = preftune(
        capsys, "eval", "winrate", *order, files[0], "--annotations", files[1], *["--json"][: 2 - len(order)]
    )
    assert code == 0
    assert [json.loads(line)["model"] for line in out.splitlines()] == ["brief", "same-v1.5"]


def test_without_json_it_is_a_table(capsys, files):
    code, out, _ = preftune(capsys, "eval", "winrate", "--annotations", *files)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == [key for key in KEYS if key != "baseline"]  # a column without a value is left out
    assert [line.split()[0] for line in lines[1:]] == ["brief", "same-v1.5", "verbose"]


def test_win_rate_and_standard_error_by_hand(tmp_path):
    preferences = [1.0, 2.0, 2.0, 1.2]
    path = write(tmp_path / "m.jsonl", [row(place, preference=each) for place, each in enumerate(preferences)])
    (only,) = annotation_rows([path])
    assert (only["model"], only["n"], only["win_rate"]) == ("m", 4, pytest.approx(0.55, abs=1e-15))
    assert only["standard_error"] == pytest.approx(math.sqrt((2 * 0.45**2 + 0.55**2 + 0.35**2) / 3 / 4), abs=1e-15)
    # All replies are 20 longer: nothing tells length from quality.
    assert only["length_controlled_win_rate"] == pytest.approx(0.55, abs=1e-7)


@pytest.mark.checklist("E2")
def test_e02_annotations_of_one_prompt_stay_together(tmp_path):
    rows = [row(place, preference=1 + place % 2) for place in range(20)]
    (once,), (thrice,) = (annotation_rows([write(tmp_path / "m.jsonl", rows * times)]) for times in (1, 3))
    assert thrice == pytest.approx(once, abs=1e-7)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "holds no rows"),
        ([row(), {"prompt": 1, "baseline_length": 3, "preference": 1.0}], ":2: no 'model_length'"),
        ([{key: value for key, value in row().items() if key != "prompt"}], ":1: no 'prompt'"),
        ([row(preference=2.5)], ":1: preference is 2.5"),
        ([row(preference=0)], ":1: preference is 0"),
        ([row(preference=float("nan")), row(1, preference=None)], "holds no verdict: all 2 preferences are null"),
        ([{"story": "once"}], ":1: is no comparison that is known here: story"),
        ([row(preference="2")], ":1: preference is '2'"),
        ([row(preference=True)], ":1: preference is True"),
        ([row(model=-1)], ":1: model_length is -1"),
        ([row(baseline="long")], ":1: baseline_length is 'long'"),
        ([row(prompt=[1])], r":1: prompt is \[1\]"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, tmp_path, bad, said):
    path = write(tmp_path / "m.jsonl", bad)
    with pytest.raises(UserError, match=said):
        read_annotations(path)
    code, out, err = preftune(capsys, "eval", "winrate", "--annotations", path, "--json")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert str(path) in err


def scored(path: Path, *columns: str, baseline: str | None = None) -> list[tuple]:
    """The columns of each row, win_rate and n in front."""
    return [
        tuple(each[key] for key in ("model", "n", "win_rate", *columns))
        for each in annotation_rows([path], baseline=baseline)
    ]


def alpaca(place: int, preference: object, model: str = "ours", **changes: Any) -> dict[str, Any]:
    said = {"instruction": f"Say {place}.", "output_1": "one two", "output_2": "three", "annotator": "somebody"}
    return said | {"generator_1": "old", "generator_2": model, "preference": preference} | changes


def test_alpaca_evals_preferences_ties_and_missing_verdicts(tmp_path):
    given = [2, 1.25, 0, 1.5, None, float("nan"), 1]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([alpaca(place, each) for place, each in enumerate(given)]))
    assert scored(path, "baseline", "unparsable") == [("ours", 5, pytest.approx(2.25 / 5), "old", 2)]
    assert scored(write(tmp_path / "a.jsonl", [alpaca(place, each) for place, each in enumerate(given)])) == scored(
        path
    )


def test_several_models_in_one_file_are_several_rows(tmp_path):
    rows = [alpaca(place, 1 + place % 2, model) for place in range(4) for model in ("b", "a")]
    rows += [alpaca(9, 2, "a", generator_1="b", generator_2="a")]
    path = write(tmp_path / "m.jsonl", rows)
    with pytest.raises(UserError, match="no model that all rows compare with"):
        annotation_rows([path])
    assert scored(path, baseline="old") == [("b", 4, 0.5), ("a", 4, 0.5)]
    # on the other side of a row the preference and the lengths turn round
    assert scored(path, baseline="b") == [("old", 4, 0.5), ("a", 1, 1.0)]
    with pytest.raises(UserError, match=r"--baseline c.*there are old, b, a"):
        annotation_rows([path], baseline="c")


def test_lengths_are_those_of_the_replies(tmp_path):
    path = write(tmp_path / "m.jsonl", [alpaca(place, 1 + place % 2) for place in range(4)])
    (only,) = read_annotations(path)
    assert only.differences.tolist() == [len("three") - len("one two")] * 4
    (turned,) = read_annotations(path, "ours")
    assert turned.differences.tolist() == [len("one two") - len("three")] * 4


def test_arena_votes_count_from_either_side(tmp_path):
    def vote(a: str, b: str, winner: object, **changes: Any) -> dict[str, Any]:
        return {"model_a": a, "model_b": b, "winner": winner} | changes

    winners = ["model_a", "model_b", "tie", "tie (bothbad)", "both_bad", None]
    rows = [vote("new", "old", each, id=place) for place, each in enumerate(winners)]
    rows += [vote("old", "new", "model_b", id="x"), vote("old", "third", "model_b", id="y")]
    path = write(tmp_path / "votes.jsonl", rows)
    expected = [("new", 6, pytest.approx(3.5 / 6), 1), ("third", 1, 1.0, 0)]
    assert scored(path, "unparsable", baseline="old") == expected
    (only,) = annotation_rows([write(tmp_path / "two.jsonl", rows[:7])], baseline="old")
    assert only["length_controlled_win_rate"] is None  # no replies, no lengths
    with pytest.raises(UserError, match="winner is 'me'"):
        annotation_rows([write(tmp_path / "bad.jsonl", [vote("new", "old", "me")])])
    with pytest.raises(UserError, match="does not say which model is the baseline"):
        annotation_rows([write(tmp_path / "which.jsonl", rows[:7])])


def test_arena_flags_in_a_csv_file(tmp_path):
    path = tmp_path / "train.csv"
    columns = ["id", "model_a", "model_b", "prompt", "response_a", "response_b"]
    flags = ["winner_model_a", "winner_model_b", "winner_tie"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *flags])
        for place, flag in enumerate([(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]):
            writer.writerow([place, "old", "new", '["Hi", "And?"]', '["Yes.", "No."]', '["Well.", null]', *flag])
    assert scored(path, "unparsable", baseline="old") == [("new", 3, 0.5, 1)]


def test_arena_hard_takes_both_games_or_neither(tmp_path):
    games = [("B>A", "A>B"), ("A>>B", "B>A"), ("A=B", "A>B"), ("B>>A", "B>A"), ("B>A", None), (None, None)]
    rows = [
        {"uid": place, "model": "ours", "baseline": "theirs", "games": [one and {"score": one}, {"score": two}]}
        for place, (one, two) in enumerate(games)
    ]
    path = write(tmp_path / "ours.jsonl", rows)
    assert scored(path, "baseline", "unparsable") == [("ours", 4, pytest.approx(2.25 / 4), "theirs", 2)]
    nameless = write(tmp_path / "old.jsonl", [{k: v for k, v in each.items() if k != "baseline"} for each in rows])
    assert scored(nameless, "baseline") == [("ours", 4, pytest.approx(2.25 / 4), None)]
    assert scored(nameless, "baseline", baseline="gpt") == [("ours", 4, pytest.approx(2.25 / 4), "gpt")]


def test_mt_bench_counts_both_orders_and_leaves_errors_out(tmp_path):
    verdicts = [
        ("model_1", "model_1"),
        ("model_2", "model_1"),
        ("tie", "tie"),
        ("error", "model_1"),
        ("model_2", "model_2"),
    ]
    rows = [
        {"question_id": place, "model_1": "ours", "model_2": "gpt", "g1_winner": one, "g2_winner": two, "turn": 1}
        for place, (one, two) in enumerate(verdicts)
    ]
    path = write(tmp_path / "pair.jsonl", rows)
    assert scored(path, "unparsable", baseline="gpt") == [("ours", 4, 0.5, 1)]
    assert scored(path, baseline="ours") == [("gpt", 4, 0.5)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--annotations", "none.jsonl"], "none.jsonl: no such file"),
        (["--annotations", "a.jsonl", "--policies", "sft"], "--policies"),
        ([], "neither a run folder nor --annotations"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(capsys, arguments, said):
    code, _, err = preftune(capsys, "eval", "winrate", *arguments)
    assert (code, len(err.splitlines())) == (2, 1)
    assert said in err


@pytest.mark.slow
@pytest.mark.checklist("E3")
@pytest.mark.skipif(not ALPACA_EVAL.is_dir(), reason="AlpacaEval 2's annotations are not at hand")
def test_e03_published_figures_of_alpaca_eval_2():
    with (ALPACA_EVAL / "published.csv").open() as file:
        published = {each["model"]: each for each in csv.DictReader(file)}
    rows = annotation_rows(sorted(ALPACA_EVAL.glob("*.jsonl.gz")))
    assert {each["model"] for each in rows} == set(published)

    def both(ours: str, theirs: str) -> tuple[np.ndarray, np.ndarray]:
        points = np.array([100 * each[ours] for each in rows])
        return points, np.array([float(published[each["model"]][theirs]) for each in rows])

    for ours, theirs in (both("win_rate", "win_rate"), both("standard_error", "standard_error")):
        assert abs(ours - theirs).max() < 1e-6
    ours, theirs = both("length_controlled_win_rate", "length_controlled_winrate")
    correlation: Any = spearmanr(ours, theirs)
    assert correlation.statistic >= 0.975
    assert abs(ours - theirs).mean() <= 1.0
