"""What scores for training judges as well: verifiers, servers, and an endpoint that is told what counts."""

from typing import Any

import pytest

from preftune.errors import UserError
from preftune.eval.judges.registry import plan_judges
from preftune.eval.judges.verdicts import Verdicts
from preftune.eval.samples import EncodedPrompt, Sample
from preftune.models.tiny import byte_tokenizer
from preftune.stages.scorers import posting

from .chat_server import ChatServer, completion

TOKENIZER: Any = byte_tokenizer()
NUMERIC = {"kind": "verifier", "check": "numeric", "column": "answer"}


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(posting, "pause", lambda seconds, stop: None)


def samples(policy: str, *texts: str, **columns: list[Any]) -> list[Sample]:
    return [
        Sample(
            policy,
            place,
            EncodedPrompt(
                [{"role": "user", "content": f"{place}?"}],
                TOKENIZER(f"{place}?", add_special_tokens=False)["input_ids"],
                {name: values[place] for name, values in columns.items() if values[place] is not None},
            ),
            text,
            [*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id],
            True,
        )
        for place, text in enumerate(texts)
    ]


def judge(entry: dict[str, Any], run_dir: Any = None) -> Any:
    (plan,) = plan_judges([entry], run_dir)
    return plan.open(None, TOKENIZER)  # pyright: ignore[reportArgumentType]: these read no adapters


def test_a_verifier_compares_policies_by_who_is_right():
    made = judge(NUMERIC)
    said = {
        "base": samples("base", "1", "9", "3", answer=[1, 2, 3]),
        "sft": samples("sft", "1", "2", "4", answer=[1, 2, 3]),
    }
    found = Verdicts.of(made, said)
    assert made.name == "numeric" and found.scores == {"base": [1.0, 0.0, 1.0], "sft": [1.0, 1.0, 0.0]}
    assert found.outcomes["sft", "base"].tolist() == [0.5, 1.0, 0.0]


def test_a_prompt_without_an_answer_is_named():
    with pytest.raises(UserError, match=r"eval\.judges\[0\]: prompt 2 \('1\?'\), reply '2': its row has no 'answer'"):
        judge(NUMERIC).score(samples("sft", "1", "2", answer=[1, None]))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "verifier", "check": "number"}, r"eval\.judges\[0\]\.check: is 'number'"),
        ({**NUMERIC, "on_failure": 0}, "a verifier judge takes no 'on_failure'"),
        ({"kind": "http", "url": "h"}, r"eval\.judges\[0\]\.url: is 'h'"),
        (
            {"kind": "endpoint", "url": "http://h", "model": "m", "criteria": "a", "prompt": "b"},
            "prompt: stands beside",
        ),
    ],
)
def test_malformed_ones_are_refused(entry: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        plan_judges([entry], None)


def test_a_server_scores_samples(tmp_path):
    def respond(body, n):
        return 200, {}, {"scores": [len(each[-1]["content"]) for each in body["completions"]]}

    with ChatServer(respond) as server:
        made = judge({"kind": "http", "url": server.url, "name": "mine"}, tmp_path)
        assert made.score(samples("sft", "a", "bcd", topic=["x", None])) == [1.0, 3.0]
        assert made.score(samples("sft", "a", "bcd", topic=["x", None])) == [1.0, 3.0]
    (body,) = server.bodies
    assert made.name == "mine" and body["columns"] == {"topic": ["x", None]}


def test_a_server_in_openrlhfs_shape_reads_the_tokens():
    with ChatServer(lambda body, n: (200, {}, {"rewards": [1.0]})) as server:
        judge({"kind": "http", "url": server.url, "format": "openrlhf"}).score(samples("sft", "yes"))
    assert server.bodies == [{"query": [f"0?yes{TOKENIZER.eos_token}"], "prompts": ["0?"], "labels": [""]}]


@pytest.mark.parametrize("mode", ["score", "pairwise"])
def test_what_counts_may_stand_in_a_column_of_the_prompts(mode: str):
    entry = {"kind": "endpoint", "model": "m", "mode": mode, "criteria_column": "rubric"}
    ours, theirs = (samples(name, name, rubric=["is brief"]) for name in ("ours", "theirs"))
    with ChatServer(lambda body, n: completion("[[7]]" if mode == "score" else "[[A]]")) as server:
        made = judge({**entry, "url": server.url})
        assert (made.score(ours) if mode == "score" else made.compare(ours, theirs)) == [
            7.0 if mode == "score" else 0.5
        ]
        with pytest.raises(UserError, match="prompt 1: its row has no 'rubric'"):
            bad = samples("ours", "x"), samples("theirs", "y")
            made.score(bad[0]) if mode == "score" else made.compare(*bad)
    assert all("What counts is is brief." in body["messages"][0]["content"] for body in server.bodies)
