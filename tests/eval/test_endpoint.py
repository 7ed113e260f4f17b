"""The client of chat endpoints, against a real server on this machine."""

import logging
import time
from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.stages.scorers import posting as room
from preftune.stages.scorers.endpoint_answers import Answers
from preftune.stages.scorers.endpoint_client import Client, Endpoint

from .chat_server import ChatServer, Reply, completion, echo, endpoint, last_words, saying

KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that would have been waited; nobody waits."""
    waited: list[float] = []
    monkeypatch.setattr(room, "pause", lambda seconds, stop: waited.append(seconds))
    return waited


def client(asked: Endpoint, folder: Path | None = None) -> Client:
    return Client(asked, Answers(folder, asked.where))


def failing_first(*failures: Reply):
    """The first requests fail like this, then all are answered."""

    def respond(body, n):
        return failures[n - 1] if n <= len(failures) else echo(body, n)

    return respond


def test_a_request_is_what_openai_clients_send():
    with ChatServer(echo) as server:
        made = client(endpoint(server, key=KEY, parameters={"temperature": 0, "seed": 3}))
        assert made.ask(saying("hello")) == ["you said hello"]
    assert server.paths == ["/v1/chat/completions"]
    assert server.keys == [f"Bearer {KEY}"]
    assert server.bodies == [
        {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "seed": 3}
    ]


def test_without_a_key_none_is_sent():
    with ChatServer(echo) as server:
        client(endpoint(server)).ask(saying("hello"))
    assert server.keys == [None]


def test_answers_keep_their_places_whoever_is_quicker():
    def slow_first(body, n):
        time.sleep(0.2 if last_words(body) == "0" else 0)
        return echo(body, n)

    with ChatServer(slow_first) as server:
        answers = client(endpoint(server)).ask(saying(*map(str, range(12))))
    assert answers == [f"you said {place}" for place in range(12)]


def test_equal_conversations_are_asked_once():
    with ChatServer(echo) as server:
        made = client(endpoint(server))
        assert made.ask(saying("a", "b", "a")) == ["you said a", "you said b", "you said a"]
        assert made.ask(saying("b")) == ["you said b"]
    assert (len(server.bodies), made.usage.requests, made.usage.cached) == (2, 2, 0)


def test_passing_failures_are_asked_again_after_ever_longer_waits(waits):
    failures = ((429, {}, "slow down"), (503, {}, ""), None, (500, {}, {"error": {"message": "oops"}}))
    with ChatServer(failing_first(*failures)) as server:
        made = client(endpoint(server))
        assert made.ask(saying("hello")) == ["you said hello"]
    assert (len(server.bodies), made.usage.requests, made.usage.retries) == (5, 5, 4)
    assert len(waits) == 4
    for attempt, seconds in enumerate(waits):
        assert 0.75 * 2**attempt <= seconds <= 1.25 * 2**attempt


def test_waits_do_not_grow_for_ever(waits):
    with ChatServer(failing_first(*[(503, {}, "")] * 12)) as server:
        client(endpoint(server, retries=12)).ask(saying("hello"))
    assert max(waits) <= 1.25 * 60


def test_the_server_may_say_how_long_to_wait(waits):
    asked = ("7.5", "86400", "Wed, 21 Oct 2026 07:28:00 GMT", "-3")
    with ChatServer(failing_first(*[(429, {"Retry-After": each}, "") for each in asked])) as server:
        client(endpoint(server)).ask(saying("hello"))
    assert waits[:2] == [7.5, 300.0]
    assert 3 <= waits[2] <= 5
    assert 6 <= waits[3] <= 10


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "answered 400 (max_tokens is too large); correct model or parameters"),
        (404, "answered 404 (max_tokens is too large); correct url or model"),
        (451, "answered 451 (max_tokens is too large); correct model or parameters"),
        (401, "answered 401; put a key that it takes into $TEST_KEY, which is not set"),
        (301, "answered 301 (max_tokens is too large); correct url or model"),
    ],
)
def test_a_refused_request_is_not_sent_again(waits, status, said):
    refusal = (status, {}, {"error": {"message": "max_tokens is\n too large"}})
    with ChatServer(lambda body, n: refusal) as server, pytest.raises(UserError) as error:
        client(endpoint(server)).ask(saying("hello"))
    assert str(error.value) == f"eval.judges[0]: {server.url}/chat/completions {said}"
    assert (len(server.bodies), waits) == (1, [])


def test_a_server_that_never_answers_is_given_up(waits):
    with ChatServer(lambda body, n: (503, {}, "overloaded")) as server, pytest.raises(UserError) as error:
        client(endpoint(server, retries=2)).ask(saying("hello"))
    assert len(server.bodies) == 3
    assert len(waits) == 2
    assert "answered 503 (overloaded), after 2 retries" in str(error.value)


def test_no_server_at_all(waits):
    with ChatServer(echo) as server:
        pass
    with pytest.raises(UserError, match=r"cannot be reached \(ConnectError.*after 1 retries"):
        client(endpoint(server, retries=1)).ask(saying("hello"))
    assert len(waits) == 1


def test_a_server_that_says_nothing_is_not_waited_for_longer_than_the_timeout(waits):
    def slow_once(body, n):
        time.sleep(1.0 if n == 1 else 0)
        return echo(body, n)

    with ChatServer(slow_once) as server:
        assert client(endpoint(server, timeout=0.2)).ask(saying("hello")) == ["you said hello"]
    assert (len(server.bodies), len(waits)) == (2, 1)


@pytest.mark.parametrize(
    "payload",
    [
        "<html>",
        "[]",
        {"choices": []},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": [{"message": {"content": [3]}}]},
    ],
)
def test_what_is_no_chat_completion_is_named(payload):
    with (
        ChatServer(lambda body, n: (200, {}, payload)) as server,
        pytest.raises(UserError, match="gave no chat completion"),
    ):
        client(endpoint(server)).ask(saying("hello"))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "inside",
    [
        {"error": {"message": "Provider returned error", "code": 502}},
        {"error": {"message": "oops"}, "choices": []},
        {"choices": [{"message": {"content": ""}, "finish_reason": "error"}]},
        {"choices": [{"message": {"content": "half"}, "error": {"code": 429, "message": "slow down"}}]},
    ],
)
def test_an_error_inside_a_good_answer_is_asked_again(waits, inside):
    with ChatServer(failing_first((200, {}, inside), (200, {}, inside))) as server:
        assert client(endpoint(server)).ask(saying("hello")) == ["you said hello"]
    assert (len(server.bodies), len(waits)) == (3, 2)


def test_a_refusal_inside_a_good_answer_is_not(waits):
    refusal = (200, {}, {"error": {"message": "no such model", "code": 404}})
    with (
        ChatServer(lambda body, n: refusal) as server,
        pytest.raises(UserError, match=r"answered 404 \(no such model\)"),
    ):
        client(endpoint(server)).ask(saying("hello"))
    assert (len(server.bodies), waits) == (1, [])


def test_content_in_parts_is_read_and_thoughts_are_not():
    parts = [{"type": "thinking", "text": "[[A]]"}, {"type": "text", "text": "So: "}, {"text": "[[B]]"}, "."]
    message = {"role": "assistant", "content": parts, "reasoning_content": "[[A]]"}
    with ChatServer(lambda body, n: (200, {}, {"choices": [{"message": message}]})) as server:
        assert client(endpoint(server)).ask(saying("hello")) == ["So: [[B]]."]


def test_a_model_that_says_nothing_has_said_nothing():
    with ChatServer(lambda body, n: completion(None)) as server:
        assert client(endpoint(server)).ask(saying("hello")) == [""]


def test_as_many_requests_at_a_time_as_allowed_and_no_more():
    def wait_for_three(body, n):
        """Each waits for company, so that the limit is reached however slow the machine is."""
        until = time.monotonic() + 5
        while server.at_once < 3 and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.05)
        return echo(body, n)

    with ChatServer(wait_for_three) as server:
        client(endpoint(server, concurrency=3)).ask(saying(*map(str, range(9))))
    assert server.most_at_once == 3


def test_the_first_failure_for_good_ends_the_rest_and_loses_no_answer(tmp_path):
    def refuse_the_fourth(body, n):
        return (400, {}, "no") if n == 4 else echo(body, n)

    texts = saying(*map(str, range(10)))
    with ChatServer(refuse_the_fourth) as server:
        with pytest.raises(UserError, match="answered 400"):
            client(endpoint(server, concurrency=1), tmp_path).ask(texts)
        sent = len(server.bodies)
        assert 4 <= sent < 10
        again = client(endpoint(server, concurrency=1), tmp_path)
        assert again.ask(texts) == [f"you said {place}" for place in range(10)]
    # all that were answered, which is all but the fourth
    assert again.usage.cached == sent - 1
    assert again.usage.requests == 10 - again.usage.cached


def test_nobody_waits_to_ask_again_once_another_was_refused():
    def one_waits(body, n):
        if last_words(body) == "patient":
            return 503, {"Retry-After": "40"}, ""
        time.sleep(0.2)
        return 400, {}, "no"

    started = time.monotonic()
    with ChatServer(one_waits) as server, pytest.raises(UserError, match="answered 400"):
        client(endpoint(server, concurrency=2)).ask(saying("patient", "hasty"))
    assert time.monotonic() - started < 20


def test_a_kept_answer_costs_no_request(tmp_path):
    folder = tmp_path / "deep" / "answers"
    with ChatServer(echo) as server:
        client(endpoint(server, parameters={"temperature": 0}), folder).ask(saying("a", "b"))
        assert len(server.bodies) == 2
        again = client(endpoint(server, parameters={"temperature": 0}, key=KEY, retries=1, timeout=3.0), folder)
        assert again.ask(saying("b", "a")) == ["you said b", "you said a"]
        assert (len(server.bodies), again.usage.requests, again.usage.cached) == (2, 0, 2)
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".json"]


@pytest.mark.parametrize("changes", [{"model": "other"}, {"parameters": {"temperature": 1}}, {"url": "v2"}])
def test_another_question_is_another_answer(tmp_path, changes):
    with ChatServer(echo) as server:
        client(endpoint(server), tmp_path).ask(saying("a"))
        if "url" in changes:
            changes = {"url": server.url.replace("v1", "v2")}
        client(endpoint(server, **changes), tmp_path).ask(saying("a"))
    assert len(server.bodies) == 2


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"answer": 3}', '{"said": "x"}'])
def test_an_unreadable_kept_answer_is_asked_for_again(tmp_path, broken):
    with ChatServer(echo) as server:
        client(endpoint(server), tmp_path).ask(saying("a"))
        (file,) = tmp_path.iterdir()
        whole = file.read_text()
        file.write_text(broken)
        assert client(endpoint(server), tmp_path).ask(saying("a")) == ["you said a"]
    assert len(server.bodies) == 2
    assert file.read_text() == whole


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"eval\.judges\[0\]\.cache: .*cannot be made"):
        Answers(tmp_path / "file" / "answers", "eval.judges[0]")


def test_tokens_are_counted_and_paid(tmp_path, waits):
    def counted(body, n):
        return (503, {}, "") if n == 1 else completion("yes", read=1000, written=20)

    with ChatServer(counted) as server:
        made = client(endpoint(server, price=(2.0, 10.0)), tmp_path)
        made.ask(saying("a", "b", "c"))
        again = client(endpoint(server, price=(2.0, 10.0)), tmp_path)
        again.ask(saying("a", "b", "c"))
        free = client(endpoint(server))
        free.ask(saying("a"))
    usage = made.usage
    assert (usage.requests, usage.retries, usage.prompt_tokens, usage.completion_tokens) == (4, 1, 3000, 60)
    assert usage.cost == pytest.approx(0.0066)
    assert "4 requests (1 of them sent again)" in str(usage)
    assert "cost 0.0066" in str(usage)
    assert (again.usage.cost, again.usage.cached) == (0.0, 3)
    assert free.usage.cost is None
    assert "cost" not in str(free.usage)


def test_answers_without_counts_are_answers():
    bare = {"choices": [{"message": {"content": "hi"}}], "usage": {"prompt_tokens": None}}
    with ChatServer(lambda body, n: (200, {}, bare)) as server:
        made = client(endpoint(server))
        assert made.ask(saying("a")) == ["hi"]
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (0, 0)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 503])
def test_the_key_is_never_shown_or_kept_whatever_the_server_repeats(tmp_path, waits, caplog, capsys, status):
    caplog.set_level(logging.DEBUG)

    def repeat(body, n):
        said = f"Incorrect API key provided: {KEY}, your key is Bearer {KEY}"
        return completion(said) if status == 200 else (status, {}, {"error": {"message": said}})

    asked: Endpoint
    shown = []
    with ChatServer(repeat) as server:
        asked = endpoint(server, key=KEY, retries=1)
        made = client(asked, tmp_path)
        try:
            shown += made.ask(saying("hello"))
        except UserError as error:
            shown += [str(error), repr(error), repr(error.__cause__), repr(error.__context__)]
    assert server.keys[0] == f"Bearer {KEY}"
    shown += [caplog.text, *capsys.readouterr(), repr(asked), repr(made), str(made.usage)]
    shown += [file.name + file.read_text() for file in tmp_path.iterdir()]
    assert not [text for text in shown if KEY in text or "0123456789" in text]
