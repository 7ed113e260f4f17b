"""Scores from a server over HTTP, against a real one on this machine: shapes, failures, the cache, secrets."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.models.tiny import byte_tokenizer
from preftune.stages.ppo.rewards import RewardSource, text_source
from preftune.stages.scorers import posting
from preftune.stages.scorers.opening import OPENERS, Opening, check_source
from preftune.stages.scorers.replies import Replies

from ..eval.chat_server import ChatServer

TOKENIZER: Any = byte_tokenizer()
CHAT = [[{"role": "user", "content": text}] for text in ("a?", "b?", "c?")]
TEXTS = ["one", "two", "three"]
COLUMNS = {"answer": [1, 2, 3], "data_source": ["gsm8k", "gsm8k", "math"]}
SECRET = "rm-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> list[float]:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    waited: list[float] = []
    monkeypatch.setattr(posting, "pause", lambda seconds, stop: waited.append(seconds))
    return waited


def replies() -> Replies:
    ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in ("<a>", "<b>", "<c>")]
    said = [[*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id] for text in TEXTS]
    return Replies(CHAT, TEXTS, COLUMNS, ids, said, rows=[10, 11, 12])


def scorer(server: ChatServer | None, *, run_dir: Path | None = None, on_failure: Any = "stop", **fields: Any) -> Any:
    url = f"{server.url}/reward" if server is not None else "http://127.0.0.1:9/reward"
    return OPENERS["http"](Opening({"url": url, **fields}, "reward remote", on_failure, TOKENIZER, run_dir))


def lengths(body: dict[str, Any], n: int):
    """Each completion's length, in the shape that was asked in."""
    del n
    if "query" in body:
        return (
            200,
            {},
            {"rewards": [float(len(each)) for each in body["query"]], "scores": [-1.0] * 9, "extra_logs": {}},
        )
    if "solution_str" in body:
        return 200, {}, {"score": len(body["solution_str"]), "acc": True}
    return 200, {}, {"scores": [len(each[-1]["content"]) for each in body["completions"]]}


@pytest.mark.checklist("W13")
def test_w13_prompts_completions_and_columns_are_posted_as_the_data_have_them():
    with ChatServer(lengths) as server:
        assert scorer(server)(replies()) == [3.0, 3.0, 5.0]
    (body,) = server.bodies
    assert body["prompts"] == CHAT and body["columns"] == COLUMNS
    assert body["completions"] == [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert server.paths == ["/v1/reward"] and server.keys == [None]


def test_texts_stay_texts():
    with ChatServer(lambda body, n: (200, {}, [1, 2])) as server:
        assert scorer(server)(Replies(["p", "q"], ["a", "b"])) == [1.0, 2.0]
    assert server.bodies == [{"prompts": ["p", "q"], "completions": ["a", "b"], "columns": {}}]


@pytest.mark.checklist("W13")
def test_w13_openrlhfs_shape():
    """`remote_rm_url`: query is prompt and reply as text, special tokens included; the answer's `rewards` train."""
    with ChatServer(lengths) as server:
        found = scorer(server, format="openrlhf", column="answer")(replies())
    (body,) = server.bodies
    end = TOKENIZER.eos_token
    assert body == {
        "query": [f"<a>one{end}", f"<b>two{end}", f"<c>three{end}"],
        "prompts": ["<a>", "<b>", "<c>"],
        "labels": [1, 2, 3],
    }
    assert found == [float(len(each)) for each in body["query"]]


def test_openrlhfs_shape_without_labels():
    with ChatServer(lengths) as server:
        scorer(server, format="openrlhf")(replies())
    assert server.bodies[0]["labels"] == ["", "", ""]


@pytest.mark.checklist("W13")
def test_w13_verls_shape():
    """`compute_score` is called for one reply at a time."""
    with ChatServer(lengths) as server:
        assert scorer(server, format="verl", column="answer")(replies()) == [3.0, 3.0, 5.0]
    bodies = sorted(server.bodies, key=lambda body: body["ground_truth"])
    assert bodies[0] == {"data_source": "gsm8k", "solution_str": "one", "ground_truth": 1, "extra_info": {}}
    assert [each["data_source"] for each in bodies] == ["gsm8k", "gsm8k", "math"] and len(bodies) == 3


@pytest.mark.checklist("W13")
def test_w13_verls_answer_may_be_the_number_alone():
    with ChatServer(lambda body, n: (200, {}, 0.5)) as server:
        assert scorer(server, format="verl")(replies()) == [0.5] * 3
    assert server.bodies[0]["ground_truth"] is None and "answer" in server.bodies[0]["extra_info"]


@pytest.mark.checklist("W14")
def test_w14_requests_hold_batches_and_equal_replies_are_asked_about_once():
    with ChatServer(lengths) as server:
        several = replies().take([0, 1, 0, 2, 1])
        assert scorer(server, batch_size=2, concurrency=1)(several) == [3.0, 3.0, 3.0, 5.0, 3.0]
    assert [len(body["completions"]) for body in server.bodies] == [2, 1]


@pytest.mark.checklist("W15")
def test_w15_passing_failures_are_tried_again(environment):
    answers = [(503, {}, ""), (429, {"retry-after": "7"}, ""), None]

    def respond(body, n):
        return answers[n - 1] if n <= 3 else lengths(body, n)

    with ChatServer(respond) as server:
        assert scorer(server)(replies()) == [3.0, 3.0, 5.0]
    assert len(server.bodies) == 4 and environment[1] == 7.0


BAD = [None, "high", True, math.nan, math.inf, [1.0], 10**400]


@pytest.mark.checklist("W7")
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.filterwarnings("error")
def test_w07_what_is_no_score_is_asked_for_again_and_then_names_the_row(bad: Any):
    def respond(body, n):
        scores = [bad if each[-1]["content"] == "two" else 1.0 for each in body["completions"]]
        return 200, {}, json.dumps({"scores": scores})

    with ChatServer(respond) as server:
        with pytest.raises(UserError) as error:
            scorer(server)(replies())
        for rule, filled in ((-0.5, -0.5), ("skip", math.nan)):
            found = scorer(server, on_failure=rule)(replies())
            assert found[::2] == [1.0, 1.0] and (found[1] == filled or (math.isnan(found[1]) and rule == "skip"))
    said = str(error.value)
    assert said.startswith("reward remote: prompt 12 ('b?'), reply 'two': ") and "the score is" in said
    assert "\n" not in said and len(said) < 400
    # with the others, then alone
    assert [len(body["completions"]) for body in server.bodies[:2]] == [3, 1]


@pytest.mark.checklist("W15")
def test_w15_a_score_that_comes_at_the_second_time_counts():
    def respond(body, n):
        return 200, {}, {"scores": [None, 2.0, 3.0] if n == 1 else [1.0]}

    with ChatServer(respond) as server:
        assert scorer(server)(replies()) == [1.0, 2.0, 3.0]


@pytest.mark.checklist("W15")
def test_w15_a_reply_that_a_server_refuses_fails_alone():
    def respond(body, n):
        texts = [each[-1]["content"] for each in body["completions"]]
        return (400, {}, {"error": "cannot read two"}) if "two" in texts else lengths(body, n)

    with ChatServer(respond) as server:
        assert scorer(server, on_failure=0.0, batch_size=2)(replies()) == [3.0, 0.0, 5.0]
        with pytest.raises(UserError, match=r"prompt 12 .* answered 400 \(cannot read two\)"):
            scorer(server, batch_size=2)(replies())


@pytest.mark.checklist("W9")
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"scores": [1.0]}, "gave 1 scores for 3 replies"),
        ({"scores": [1.0] * 4}, "gave 4 scores for 3 replies"),
        ({"scores": 1.0}, "gave no scores of format plain"),
        ({"reward": [1, 2, 3]}, "gave no scores of format plain"),
        ("not json", "gave no scores of format plain (not json)"),
        ("[" * 50_000, "gave no scores of format plain"),
        (None, "gave no scores of format plain"),
    ],
)
def test_w09_an_answer_of_another_shape_stops_whatever_the_recipe_says(answer: Any, said: str):
    with ChatServer(lambda body, n: (200, {}, answer)) as server:
        for rule in ("stop", 0.0):
            with pytest.raises(UserError) as error:
                scorer(server, on_failure=rule)(replies())
            assert said in str(error.value)


@pytest.mark.checklist("W15")
def test_w15_a_server_that_is_not_there_stops_whatever_the_recipe_says():
    for rule in ("stop", 0.0, "skip"):
        with pytest.raises(UserError, match=r"cannot be reached .* after 2 retries; see that the server runs"):
            scorer(None, on_failure=rule, retries=2)(replies())


@pytest.mark.checklist("W15")
@pytest.mark.parametrize(("status", "said"), [(401, "put a key"), (404, "correct the url")])
def test_w15_what_no_other_request_would_change_stops(status: int, said: str):
    with (
        ChatServer(lambda body, n: (status, {}, {"detail": SECRET})) as server,
        pytest.raises(UserError, match=said) as error,
    ):
        scorer(server, on_failure=0.0)(replies())
    assert str(status) in str(error.value)


def test_a_source_that_scores_nothing_stops():
    with (
        ChatServer(lambda body, n: (200, {}, {"scores": [None] * len(body["prompts"])})) as server,
        pytest.raises(UserError, match="none of 3 replies has a score; prompt 11"),
    ):
        scorer(server, on_failure="skip")(replies())


@pytest.mark.checklist("W14")
def test_w14_scores_are_kept_on_disk(tmp_path: Path):
    with ChatServer(lengths) as server:
        assert scorer(server, run_dir=tmp_path)(replies()) == [3.0, 3.0, 5.0]
        assert scorer(server, run_dir=tmp_path)(replies()) == [3.0, 3.0, 5.0]
        assert len(server.bodies) == 1 and len(list((tmp_path / "eval-cache").iterdir())) == 3
        # another column, another answer; and none is kept where none is wanted
        scorer(server, run_dir=tmp_path, format="openrlhf", column="answer")(replies())
        scorer(server, run_dir=tmp_path, cache=False)(replies())
    assert len(server.bodies) == 3
    for file in (tmp_path / "eval-cache").iterdir():
        file.write_text("{")
    with ChatServer(lambda body, n: (200, {}, [9, 9, 9])) as other:
        assert scorer(other, run_dir=tmp_path)(replies()) == [9.0] * 3


@pytest.mark.checklist("W14")
def test_w14_scores_are_kept_by_everything_that_shapes_them(tmp_path: Path):
    def row(prompt: Any = "p", text: str = "q", **columns: Any) -> Replies:
        return Replies([prompt], [text], {name: [value] for name, value in columns.items()}, [[5]], [[6]])

    with ChatServer(lambda body, n: (200, {}, n if "solution_str" in body else [n])) as server:
        asked: list[tuple[dict[str, Any], Replies]] = [
            ({}, row()),
            ({}, row(prompt="r")),
            ({}, row(prompt=[{"role": "user", "content": "p"}])),
            ({}, row(text="r")),
            ({}, row(answer=1)),
            ({}, row(answer="1")),
            ({}, row(label=1)),
            ({"url": f"{server.url}/other"}, row()),
            ({"format": "openrlhf"}, row()),
            ({"format": "verl"}, row(answer=1)),
            ({"format": "verl", "column": "answer"}, row(answer=1)),
        ]
        for number, (fields, replies) in enumerate(asked, start=1):
            assert scorer(server, run_dir=tmp_path, **fields)(replies) == [number], fields
        for number, (fields, replies) in enumerate(asked, start=1):
            assert scorer(server, run_dir=tmp_path, retries=1, timeout=9, **fields)(replies) == [number], fields
        assert scorer(server, run_dir=tmp_path, concurrency=2, batch_size=3)(row()) == [1]
    assert len(server.bodies) == len(asked)


@pytest.mark.checklist("W14")
def test_w14_scores_that_came_before_a_failure_are_kept(tmp_path: Path):
    def respond(body, n):
        return 200, {}, {"scores": [None if each[-1]["content"] == "two" else 1.0 for each in body["completions"]]}

    with ChatServer(respond) as server:
        with pytest.raises(UserError):
            scorer(server, run_dir=tmp_path)(replies())
        assert len(list((tmp_path / "eval-cache").iterdir())) == 2


@pytest.mark.checklist("W16")
def test_w16_the_key_goes_into_the_header_and_nowhere_else(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RM_KEY", SECRET)

    def respond(body, n):
        return (422, {}, {"error": f"no key {SECRET}"}) if n > 1 else lengths(body, n)

    with ChatServer(respond) as server:
        made = scorer(server, run_dir=tmp_path, api_key_env="RM_KEY")
        made(replies())
        kept = "".join(file.name + file.read_text() for file in (tmp_path / "eval-cache").iterdir())
        with pytest.raises(UserError) as error:
            made(Replies(["p"], ["q"]))
    assert server.keys[0] == f"Bearer {SECRET}"
    assert SECRET not in kept and SECRET not in str(error.value) and SECRET not in repr(made.server)
    source = RewardSource("http", "remote", settings={"url": server.url, "api_key_env": "RM_KEY"})
    assert SECRET not in json.dumps(source.as_dict())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"url": None}, "url: is None, expected an address"),
        ({"url": "localhost:5000"}, "expected http:// or https://"),
        ({"url": f"http://me:{SECRET}@host/"}, "holds a user name, a password or a query"),
        ({"url": f"http://host/?key={SECRET}"}, "holds a user name, a password or a query"),
        ({"format": "trl"}, "format: is 'trl', expected plain, openrlhf, verl"),
        ({"format": "openrlfh"}, "did you mean 'openrlhf'?"),
        ({"column": "answer"}, "column: has no effect"),
        ({"format": "verl", "batch_size": 2}, "batch_size: has no effect"),
        ({"batch_size": 0}, "batch_size: is 0, expected a whole number of at least 1"),
        ({"timeout": 0}, "timeout: is 0"),
        ({"retries": -1}, "retries: is -1"),
        ({"concurrency": 1.5}, "concurrency: is 1.5"),
        ({"api_key_env": SECRET}, "is no name of an environment variable"),
        ({"api_key_env": "NO_SUCH_KEY"}, "$NO_SUCH_KEY is not set"),
        ({"cache": 3}, "cache: is 3, expected a folder"),
    ],
)
def test_what_a_recipe_may_say(fields: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        check_source("http", Opening({"url": "http://127.0.0.1:9/", **fields}, "stages.ppo.reward.0"))
    assert said in str(error.value) and SECRET not in str(error.value)


def test_a_column_that_is_no_json_is_refused():
    with ChatServer(lengths) as server, pytest.raises(UserError, match="cannot be sent as JSON"):
        scorer(server)(Replies(["p"], ["q"], {"x": [math.nan]}))


def test_conversations_without_tokens_are_not_told_as_text():
    with ChatServer(lengths) as server:
        with pytest.raises(UserError, match="use format: plain"):
            scorer(server, format="openrlhf")(Replies(CHAT, TEXTS))
        scorer(server, format="openrlhf")(Replies(["p "], ["q"]))
    assert server.bodies == [{"query": ["p q"], "prompts": ["p "], "labels": [""]}]


def test_it_opens_as_a_trainers_source():
    assert text_source(RewardSource("http", "remote", settings={"url": "http://127.0.0.1:9/"})).name == "remote"
