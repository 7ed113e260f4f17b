"""Which replies of a prompt become rows: worked out by hand."""

import json
from typing import Any

import pytest

from preftune.data.encode import encode_rows
from preftune.data.formats import normalise
from preftune.data.rows import Row
from preftune.data.spec import DataSpec, SourceSpec
from preftune.errors import UserError
from preftune.models.tiny import byte_tokenizer
from preftune.stages.sample import keep as rules
from preftune.stages.sample.keep import Kept, Reply, check_read_back, keep
from preftune.stages.sample.settings import SampleSettings

ASKED = [{"role": "user", "content": "A colour?"}]
PROMPT = Row(prompt=ASKED, columns={"answer": "red", "id": 7}, origin="prompts.jsonl:3")


def replies(*given: tuple[str, float | None] | tuple[str, float | None, bool]) -> list[Reply]:
    return [Reply(i, text, score, 5 + i, *(rest or [True])) for i, (text, score, *rest) in enumerate(given)]


def kept(*given: Any, **settings: Any) -> Kept:
    return keep(PROMPT, replies(*given), SampleSettings(**settings))


def said(message: list[dict]) -> str:
    assert [each["role"] for each in message] == ["assistant"]
    return message[0]["content"]


@pytest.mark.checklist("K3")
def test_k03_the_best_and_the_worst_are_a_pair_with_both_scores() -> None:
    found = kept(("b", 1.0), ("c", 3.0), ("a", -2.0), ("d", 2.0))
    assert found.rows == [
        {
            "prompt": ASKED,
            "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": [{"role": "assistant", "content": "a"}],
            "score_chosen": 3.0,
            "score_rejected": -2.0,
            "answer": "red",
            "id": 7,
        }
    ]
    assert [each.text for each in found.replies] == ["c", "a"]
    assert not found.left_out


@pytest.mark.checklist("K3")
def test_k03_a_tie_goes_to_the_reply_that_was_drawn_first() -> None:
    row = kept(("first low", 0.0), ("first high", 1.0), ("second high", 1.0), ("second low", 0.0)).rows[0]
    assert (said(row["chosen"]), said(row["rejected"])) == ("first high", "first low")
    assert said(kept(("x", 1.0), ("y", 1.0), keep="best").rows[0]["completion"]) == "x"


@pytest.mark.checklist("K3")
@pytest.mark.parametrize(
    ("given", "margin", "reason"),
    [
        ([("a", 1.0), ("b", 1.0)], 0.0, rules.EQUAL),
        # a source that is not the same every time
        ([("a", 1.0), ("a", 2.0)], 0.0, rules.EQUAL),
        ([("a", 1.0), ("b", 1.5)], 0.5, rules.WITHIN_MARGIN),
        ([("a", 1.0)], 0.0, rules.TOO_FEW),
    ],
)
def test_k03_a_prompt_that_gives_no_pair_is_counted(given: list, margin: float, reason: str) -> None:
    found = kept(*given, margin=margin)
    assert (found.rows, found.replies, found.left_out) == ([], [], {reason: 1})


@pytest.mark.checklist("K3")
def test_k03_the_margin_is_what_scores_must_differ_by_more_than() -> None:
    assert len(kept(("a", 1.0), ("b", 1.75), margin=0.5).rows) == 1
    assert not kept(("a", 1.0), ("b", 1.5), margin=0.5).rows


@pytest.mark.checklist("K5")
@pytest.mark.parametrize("how", ["best_worst", "best", "threshold"])
def test_k05_what_did_not_end_says_nothing_or_has_no_score_is_not_chosen_from(how: str) -> None:
    given = [("best", 9.0, False), (" \n", 8.0, True), ("none", None, True), ("fine", 2.0, True), ("poor", 1.0, True)]
    settings = {"keep": how} | ({"threshold": 1.5} if how == "threshold" else {})
    found = kept(*given, **settings)
    assert said(found.rows[0]["chosen" if how == "best_worst" else "completion"]) == "fine"
    assert {rules.UNFINISHED: 1, rules.EMPTY: 1, rules.UNSCORED: 1}.items() <= found.left_out.items()
    again = kept(*given, unfinished="keep", **settings)
    assert said(again.rows[0]["chosen" if how == "best_worst" else "completion"]) == "best"
    assert rules.UNFINISHED not in again.left_out


@pytest.mark.checklist("K4")
def test_k04_every_reply_from_the_threshold_on_is_kept_once() -> None:
    found = kept(("a", 1.0), ("b", 0.5), ("a", 1.0), ("c", 0.49), keep="threshold", threshold=0.5)
    assert [(said(row["completion"]), row["score"]) for row in found.rows] == [("a", 1.0), ("b", 0.5)]
    assert found.left_out == {rules.REPEATED: 1, rules.BELOW: 1}
    assert kept(("a", 0.0), keep="threshold", threshold=0.5).left_out == {rules.BELOW: 1, rules.NONE_LEFT: 1}


@pytest.mark.checklist("K4")
def test_k04_all_of_them_are_written_with_what_is_known() -> None:
    found = kept(("a", 1.0), ("", None, False), keep="all")
    assert [{k: v for k, v in row.items() if k not in ("prompt", "answer", "id")} for row in found.rows] == [
        {"completion": [{"role": "assistant", "content": "a"}], "score": 1.0, "draw": 0, "length": 5, "finished": True},
        {
            "completion": [{"role": "assistant", "content": ""}],
            "score": None,
            "draw": 1,
            "length": 6,
            "finished": False,
        },
    ]


@pytest.mark.checklist("K4")
def test_k04_all_of_them_are_labels_where_a_threshold_says_which_are_good() -> None:
    found = kept(("a", 1.0), ("b", 0.9), ("c", 3.0, False), keep="all", threshold=1.0)
    assert [(said(row["completion"]), row["label"]) for row in found.rows] == [("a", True), ("b", False)]
    assert found.left_out == {rules.UNFINISHED: 1}


COLUMNS = {"answer": "red", "question_id": 3, "instruction": "say it", "context": "none", "score": 4, "margin": 2.0}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.checklist("K9")
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "pair"),
        ({"keep": "best"}, "demo"),
        ({"keep": "threshold", "threshold": 0.0}, "demo"),
        ({"keep": "all", "threshold": 1.5}, "label"),
    ],
)
def test_k09_rows_are_read_as_what_they_were_written_as(settings: dict, kind) -> None:
    prompt = Row(prompt=[{"role": "system", "content": "Be kind."}, *ASKED], tools=TOOLS, columns=COLUMNS)
    check_read_back([prompt], SampleSettings(**settings), [kind], "data.prompts")
    found = keep(prompt, replies(("good one", 2.0), ("bad one", 1.0)), SampleSettings(**settings))
    read = [row for each in found.rows for row in normalise(json.loads(json.dumps(each)), kind, "rows.jsonl:1")]
    assert all((row.prompt, row.tools) == (prompt.prompt, TOOLS) for row in read)
    assert all(
        row.columns.items() >= {"answer": "red", "question_id": 3, "instruction": "say it"}.items() for row in read
    )
    assert all(row.margin is None for row in read)  # a reward stage would train on it
    texts = [said(side) for row in read for side in (row.chosen or row.completion, row.rejected) if side]
    assert texts == {"pair": ["good one", "bad one"], "label": ["good one", "bad one"]}.get(
        kind, ["good one", "bad one"][: len(read)]
    )


@pytest.mark.checklist("K9")
def test_k09_rows_are_laid_out_by_the_template_as_a_users_are() -> None:
    row = kept((" two  spaces\n", 2.0), ("bad", 1.0)).rows[0]
    ours = {"prompt": "A colour?", "chosen": " two  spaces\n", "rejected": "bad"}
    spec, tokenizer = DataSpec((SourceSpec("x.jsonl"),)), byte_tokenizer()
    sampled, users = (
        encode_rows("pair", normalise(each, "pair", "x.jsonl:1"), tokenizer, spec)[0][0] for each in (row, ours)
    )
    assert {key: sampled[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} == {
        key: users[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")
    }


@pytest.mark.checklist("K9")
def test_k09_a_column_that_makes_another_format_of_the_rows_is_refused_before_anything_is_drawn() -> None:
    votes = {name: "x" for name in ("policy_a", "policy_b", "completion_a", "completion_b")} | {"preference": 1.0}
    prompt = Row(prompt=ASKED, columns=votes, origin="p.jsonl:1")
    with pytest.raises(UserError, match=r"data\.prompts \(p\.jsonl:1\): its column .* another format"):
        check_read_back([prompt], SampleSettings(), ["pair"], "data.prompts")


def test_scores_need_no_mean_where_there_are_none() -> None:
    assert rules.mean([None]) is None
    assert rules.mean([1.0, None, 2.0]) == 1.5
