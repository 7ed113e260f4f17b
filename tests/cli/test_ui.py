"""`preftune ui` beside the browser: what is refused, who may open the page, what is drawn, asked and kept."""

import asyncio
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preftune.cli.policies import recipe_base, run_recipe, sampling_spec
from preftune.cli.ui import command
from preftune.cli.ui.booth import Booth, Labels, Samples, Seat
from preftune.cli.ui.desk import Desk
from preftune.cli.ui.labelling import Drawing, labelling_of
from preftune.cli.ui.model import Model
from preftune.cli.ui.options import UiOptions
from preftune.cli.ui.server import address, guarded, is_loopback
from preftune.errors import UserError

from .conftest import EVAL, RECIPE, SYSTEM, talk, user, votes_of


def model_of(run: Path) -> Model:
    recipe = run_recipe(run)
    spec = sampling_spec(recipe, recipe_base(recipe), run)
    return Model(recipe, run, replace(spec, max_new_tokens=6))


def test_mistakes_are_one_line(shell, run, tmp_path, monkeypatch):
    refused = shell.refused
    refused("ui", tmp_path / "none", said="no such folder")
    refused("ui", tmp_path, said="holds no recipe.yaml")
    refused("ui", run, "--replies", 3, said="--replies: means nothing without --label")
    refused("ui", run, "--policies", "sft", said="--policies: means nothing without --label")
    refused("ui", run, "--token", " ", said="--token: is empty")
    refused("ui", run, "--host", "192.0.2.7", said="--host: '192.0.2.7' is no address of this machine")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused("ui", run, "--port", port, said=f"--port: {port} cannot be had .*in use.*give another")
    prompts, rows = tmp_path / "p.jsonl", '{"prompt": "Hi?"}\n'
    label = ("ui", run, "--port", 0, "--label", prompts)
    refused(*label, said="--label: no file '.*p.jsonl'")
    prompts.write_text("{}\n")
    refused(*label, said="p.jsonl:1")
    prompts.write_text(rows)
    refused(*label, "--policies", "sft,dpp", said="--policies: no policy 'dpp'")
    refused(*label, "--policies", "sft,sft", said="names a policy twice")
    refused(*label, "--replies", 1, said="--replies: 1 of one policy leaves nothing to choose from")
    refused(*label, "--temperature", 0, said="--replies: 2 replies with temperature 0 are the same 2 times")
    prompts.write_text(json.dumps({"prompt": "x" * 5000}))
    refused(*label, said="p.jsonl: no row is left .*longer than max_length")
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    refused("ui", run, said=r"needs gradio; pip install 'preftune\[ui\]'")
    monkeypatch.undo()
    for name in ("sft", "dpo", "ipo"):
        shutil.rmtree(run / name)
    (run / "run.json").write_text('{"stages": {}}')
    refused("ui", run, said="no policy is finished in it")


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("box.lan", False)],
)
def test_what_only_this_machine_reaches(host, alone):
    assert is_loopback(host) == alone


def test_the_address_carries_the_token():
    assert address("127.0.0.1", 7860, None) == "http://127.0.0.1:7860/"
    assert address("::1", 1, "a b/c") == "http://[::1]:1/?token=a%20b%2Fc"
    assert address("0.0.0.0", 1, None) == f"http://{socket.gethostname()}:1/"


@pytest.fixture
def served():
    """served(run, token) is a function that asks what gradio's page is put into: get(path, **headers)."""
    httpx = pytest.importorskip("httpx")

    def start(run: Path, token: str | None) -> Callable[..., Any]:
        app = guarded(run, "127.0.0.1", token)
        app.add_api_route("/", lambda: "secret")

        def get(path: str, **headers: str) -> Any:
            async def ask() -> Any:
                async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
                    return await client.get(path, headers=headers)

            return asyncio.run(ask())

        return get

    return start


def test_a_page_with_a_token_is_for_those_who_have_it(served: Callable[..., Any], tmp_path: Path):
    (tmp_path / "report.html").write_text("the report")
    get = served(tmp_path, "tök")
    for path in ("/", "/report.html", "/config", "/gradio_api/info", "/?token=other", "/theme.css"):
        answer = get(path)
        assert answer.status_code == 401 and "secret" not in answer.text, path
    answer = get("/?token=t%C3%B6k")
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    assert get("/report.html", cookie=cookie.split(";")[0]).text == "the report"
    answer = get("/", cookie=cookie.split(";")[0])
    assert answer.status_code == 200 and "secret" in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'self';")


def test_a_page_without_a_token_answers_this_machine_alone(served: Callable[..., Any], tmp_path: Path):
    get = served(tmp_path, None)
    assert get("/").status_code == 200 and get("/", host="localhost:7860").status_code == 200
    assert get("/report.html").status_code == 404
    # a name of somebody else's that leads here, as a page elsewhere may ask a browser for
    assert get("/", host="evil.example:80").status_code == 403
    assert get("/", host="localhost:7860", origin="http://localhost:7860").status_code == 200
    assert get("/", host="localhost:7860", origin="http://evil.example").status_code == 403


def test_a_labelling_is_drawn_by_the_policies_and_goes_on_where_it_stopped(run: Path, tmp_path: Path):
    recipe = run_recipe(run)
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {place}"}) + "\n" for place in (0, 1, 1, 2)))
    model = model_of(run)
    options = UiOptions(label=file, policies="sft, dpo", replies=2)
    labelling = labelling_of(recipe, run, options, model.spec)
    assert labelling.name == "mine" and len(labelling.prompts) == 3
    drawing = Drawing(labelling, model)
    assert drawing.waiting().startswith("12 replies are still being drawn")
    drawing.draw()
    drawn = labelling.drawn()
    assert len(drawn) == 12 and drawing.waiting() == ""
    asked = talk(run)
    for wish, text in drawn.items():
        seed = labelling.seed_of(wish)
        assert text == asked.reply(wish.policy, labelling.prompts[wish.prompt], seed=seed).text
        assert labelling.prompts[wish.prompt][0] == SYSTEM
    # what is there is not drawn again
    size = labelling.replies_file.stat().st_size
    Drawing(labelling_of(recipe, run, options, model.spec), model).draw()
    assert labelling.replies_file.stat().st_size == size
    # a policy that was trained again in the meantime does not speak in the old one's name
    shutil.rmtree(run / "dpo")
    shutil.copytree(run / "ipo", run / "dpo")
    labelling.replies_file.unlink()
    drawing._run()
    assert "was trained again since this page was opened; open it again" in drawing.trouble
    assert drawing.waiting() == f"No more replies are drawn: {drawing.trouble}"
    assert {wish.policy for wish in labelling.drawn()} == {"sft"}


def test_a_policy_that_was_trained_again_is_loaded_again(run: Path):
    model = model_of(run)

    def said(policy: str) -> str:
        *_, reply = model.stream(policy, [SYSTEM, user("Hi?")], 3)
        assert not isinstance(reply, str)
        return reply.text

    before = {policy: said(policy) for policy in ("sft", "dpo", "ipo")}
    assert len(set(before.values())) == 3
    asked = talk(run)
    assert before == {policy: asked.reply(policy, [SYSTEM, user("Hi?")], seed=3).text for policy in before}
    shutil.rmtree(run / "sft")
    shutil.copytree(run / "ipo", run / "sft")
    assert [said(policy) for policy in ("sft", "dpo", "ipo")] == [before["ipo"], before["dpo"], before["ipo"]]


def test_a_reply_stops_when_nobody_listens_and_errors_reach_the_listener(run: Path):
    model = model_of(run)
    model.spec = replace(model.spec, max_new_tokens=400)
    parts = model.stream("sft", [user("Hi?")], 3)
    next(parts)
    parts.close()
    # the next one is asked at once, and not after the first one's 400 tokens
    with pytest.raises(UserError, match="no policy 'nobody'"):
        list(model.stream("nobody", [user("Hi?")], 3))


@pytest.fixture
def desk(run: Path) -> Desk:
    return Desk(run_recipe(run), run, model_of(run), Booth(run), None, 3)


def test_two_answer_a_prompt_that_was_typed(desk: Desk):
    seat = Seat()
    assert desk.sources() == {"typed": "prompts that you type"}
    assert desk.policies() == ["ipo", "dpo", "sft", "base"]
    assert not desk.booth.sit(seat, " ") and desk.booth.sit(seat, " Ada ")
    with pytest.raises(UserError, match="choose two or more"):
        desk.ask_both(seat, ["sft"], "Hi?")
    desk.ask_both(seat, ["sft", "dpo"], "Hi?")
    assert seat.ballot is not None and set(seat.ballot.policies) == {"sft", "dpo"}
    asked = talk(desk.run)
    for policy, text in zip(seat.ballot.policies, seat.ballot.completions, strict=True):
        assert text == asked.reply(policy, [SYSTEM, user("Hi?")], seed=3).text
    mark = seat.mark
    assert desk.booth.take(seat, "another") is None
    ballot = desk.booth.take(seat, mark)
    assert ballot is not None and desk.booth.take(seat, mark) is None
    assert desk.booth.vote(seat, ballot, "B", None) and not desk.booth.vote(seat, ballot, "A", None)
    (vote,) = votes_of(desk.run)
    assert (vote["voter"], vote["preference"], seat.cast) == ("Ada", 2.0, 1)
    assert all(len(vote[f"adapter_{side}"]) == 64 for side in "ab")
    assert vote["prompt"] == [SYSTEM, user("Hi?")]


def test_the_evaluations_replies_are_voted_on_as_in_the_terminal(judged: Path, shell):
    desk = Desk(run_recipe(judged), judged, model_of(judged), Booth(judged), None, 3)
    assert list(desk.sources()) == ["samples", "typed"]
    assert desk.suggested("samples") == ["sft", "ipo"]
    file = judged / "eval" / "samples.jsonl"
    file.write_text(file.read_text().replace('"dpo 2"', '"sft 2"'))
    seat, source = Seat(), desk.source("samples")
    assert isinstance(source, Samples) and desk.booth.sit(seat, "Ada")
    desk.booth.next(seat, source, ["sft", "dpo"])
    # the same reply twice is a tie, as there
    assert (seat.alike, seat.left) == (1, 3) and votes_of(judged)[0]["preference"] == 1.5
    first = desk.booth.take(seat, seat.mark)
    assert first is not None
    desk.booth.skip(seat, first)
    desk.booth.next(seat, source, ["sft", "dpo"])
    second = desk.booth.take(seat, seat.mark)
    assert second is not None and second != first and desk.booth.vote(seat, second, "A", source)
    # the terminal goes on for the same person where the page stopped
    code, out, _ = shell(
        "chat", judged, "--compare", "sft,dpo", "--samples", "--voter", "Ada", "--seed", 3, typed="1\n" * 9
    )
    assert code == 0 and "votes.jsonl: 4, 2 of them now" in out
    desk.booth.next(seat, source, ["sft", "dpo"])
    assert seat.ballot is None and seat.left == 0


def test_a_skipped_ballot_comes_again_once_nothing_else_is_left(judged: Path):
    booth, seat, source = Booth(judged), Seat(), Samples(judged, 3)
    booth.sit(seat, "Ada")
    seen = []
    for _ in range(5):
        booth.next(seat, source, ["sft", "dpo"])
        ballot = booth.take(seat, seat.mark)
        assert ballot is not None
        seen.append(ballot)
        booth.skip(seat, ballot)
    assert len({each.prompt for each in seen[:4]}) == 4 and seen[4] == seen[0]
    booth.sit(seat, "Ben")
    assert seat.skipped == set()


def test_votes_on_a_labelling_of_one_policy_are_pairs_and_say_nothing_of_policies(run: Path, tmp_path: Path, shell):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Hi?"}\n{"prompt": "Ho?"}\n')
    model = model_of(run)
    labelling = labelling_of(run_recipe(run), run, UiOptions(label=file), model.spec)
    assert list(labelling.policies) == ["ipo"] and labelling.replies == 2
    Drawing(labelling, model).draw()
    booth, seat, source = Booth(run), Seat(), Labels(labelling)
    booth.sit(seat, "Ada")
    for choice in ("A", "both bad"):
        booth.next(seat, source, [])
        ballot = booth.take(seat, seat.mark)
        assert ballot is not None and booth.vote(seat, ballot, choice, source)
    (pair,) = [json.loads(line) for line in labelling.pairs_file.read_text().splitlines()]
    assert pair["chosen_by"]["policy"] == pair["rejected_by"]["policy"] == "ipo"
    assert pair["votes"][0]["voter"] == "Ada"
    shell.refused(
        "eval", "winrate", "--votes", run / "votes.jsonl", said="each of its votes is on two replies of one policy"
    )
    (run / "recipe.yaml").write_text(RECIPE + EVAL)
    # votes are still counted and cast beside them
    assert shell("chat", run, "--compare", "sft,dpo", "--max-new-tokens", 3, typed="Hi?\n1\n")[0] == 0
