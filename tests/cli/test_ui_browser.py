"""`preftune ui` in a browser: two people vote on ten prompts, and what they said is used.

Needs gradio, playwright and a Chromium (`tests/browser.py`).
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..browser import REQUIRED, Browser, Page, browser_or_skip, launched
from .conftest import SYSTEM, talk, user, votes_of

browser_or_skip()
if not REQUIRED:
    pytest.importorskip("gradio")

PROMPTS = [f"<b>question</b> {place} & more" for place in range(10)]
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    yield from launched()


@pytest.fixture(scope="module")
def folder(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at which `preftune ui` can look."""
    run = Path(shutil.copytree(made, tmp_path_factory.mktemp("ui") / "run"))
    (run / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS))
    entry = {"state": "done", "started": "2026-11-26T00:00:00+00:00", "seconds": 3}
    (run / "run.json").write_text(json.dumps({"stages": {"sft": entry, "dpo": entry | {"state": "failed"}}}))
    (run / "sft" / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 3 / n}) + "\n" for n in (1, 2)))
    return run


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where the page of that run is."""
    label = ("--label", folder / "prompts.jsonl", "--policies", "sft,dpo", "--max-new-tokens", 6)
    command = [sys.executable, "-m", "preftune.cli.main", "ui", folder, "--port", 0, *label]
    server = subprocess.Popen([str(each) for each in command], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield server.stdout.readline().strip()
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    server.stdout.close()


@pytest.fixture
def visit(chromium: "Browser", address: str) -> Iterator[Open]:
    """visit(width) opens the page as another person; nothing may be fetched from elsewhere or said on the console."""
    contexts, heard = [], []

    def opened(width: int = 1440, **options: str) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)  # pyright: ignore[reportArgumentType]: of a test
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: None if local(request.url) else heard.append(request.url))
        page.goto(address)
        page.get_by_role("tab", name="Vote").wait_for()
        return page

    def local(url: str) -> bool:
        return url.startswith((address, "data:", "blob:"))

    yield opened
    # what a page still asks for when it is left is broken off, and said
    before_leaving = list(heard)
    for context in contexts:
        context.close()
    assert before_leaving == []


def begin(page: Page, name: str) -> None:
    """Sit down to vote, by keyboard alone."""
    page.get_by_role("tab", name="Vote").click()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#name') !== null"):
            break
    ring = page.evaluate("(style => style.outlineStyle + style.outlineWidth)(getComputedStyle(document.activeElement))")
    assert ring == "solid3px"
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.locator("[data-ballot]").wait_for()


def vote(page: Page, key: str, button: str | None = None) -> dict[str, str]:
    """Vote on what is seen, with a key or by pressing a button; what was seen."""
    seen = page.locator("[data-ballot]")
    mark = seen.get_attribute("data-ballot")
    a, b = page.locator("[data-ballot] .reply p").all()
    asked = seen.locator(".said").last.locator("p").inner_text()
    shown = {"asked": asked, "a": a.evaluate("p => p.textContent"), "b": b.evaluate("p => p.textContent"), "key": key}
    if button is None:
        page.locator("body").press(key)
    else:
        page.get_by_role("button", name=button).click()
    page.wait_for_function("mark => document.querySelector('[data-ballot]')?.dataset.ballot !== mark", arg=mark)
    return shown


def test_two_people_vote_on_ten_prompts_and_the_votes_are_used(visit: Open, folder: Path, shell, tmp_path: Path):
    ada, ben = visit(), visit(width=390, color_scheme="dark")
    begin(ada, "Ada")
    begin(ben, "Ben")
    seen: dict[str, list[dict[str, str]]] = {"Ada": [], "Ben": []}
    for place in range(10):
        if place == 3:  # who comes again goes on
            ada.reload()
            begin(ada, "Ada")
            said = ada.locator("#said").inner_text()
            left = re.fullmatch(r"(\d+) to go(?:; replies to (\d+) more prompts? are being drawn)?\.", said)
            assert left is not None, said
            assert sum(int(each or 0) for each in left.groups()) == 7
        seen["Ada"].append(vote(ada, "ab=x"[place % 4]))
        ben.get_by_text("to go").wait_for()
        seen["Ben"].append(vote(ben, "a", "A is better"))
    for page, name in ((ada, "Ada"), (ben, "Ben")):
        assert "Nothing is left to vote on, " + name in page.locator("#said").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    # every vote is there once, on what was seen, for the policy whose reply stood there
    votes = votes_of(folder)
    assert Counter(each["voter"] for each in votes) == {"Ada": 10, "Ben": 10}
    preference = {"a": 1.0, "b": 2.0, "=": 1.5, "x": 1.5}
    for name, shown in seen.items():
        cast = [each for each in votes if each["voter"] == name]
        assert [each["preference"] for each in cast] == [preference[each["key"]] for each in shown]
        assert [each.get("both_bad", False) for each in cast] == [each["key"] == "x" for each in shown]
        assert [each["prompt"][-1]["content"] for each in cast] == [each["asked"] for each in shown]
        assert sorted(each["asked"] for each in shown) == sorted(PROMPTS)
    orders = [[each["asked"] for each in shown] for shown in seen.values()]
    assert orders[0] != orders[1]
    assert {each["policy_a"] for each in votes} == {"sft", "dpo"}

    # `eval winrate --votes` reads them
    code, out, err = shell("eval", "winrate", "--votes", folder / "votes.jsonl", "--json")
    assert code == 0, err
    (row,) = [row for row in map(json.loads, out.splitlines()) if row["policy"] == "dpo"]
    outcomes: dict[str, list[float]] = {}
    for each in votes:
        for_a = 2.0 - each["preference"]
        outcomes.setdefault(str(each["prompt"]), []).append(for_a if each["policy_a"] == "dpo" else 1.0 - for_a)
    rates = [sum(each) / len(each) for each in outcomes.values()]
    assert (row["n"], row["win_rate"]) == (10, pytest.approx(sum(rates) / 10))

    # and a DPO stage trains on them, and on the pairs of the labelling
    pairs = [json.loads(line) for line in (folder / "prompts.pairs.jsonl").read_text().splitlines()]
    decided = sum(each["preference"] != 1.5 for each in votes)
    assert decided == 16 and 0 < len(pairs) <= 10
    for data, rows in ((folder / "votes.jsonl", decided), (folder / "prompts.pairs.jsonl", len(pairs))):
        recipe = tmp_path / "dpo.yaml"
        recipe.write_text(
            f"name: t\nmodel: {{base: 'random:llama', dtype: float32}}\nlora: {{r: 2, alpha: 4}}\n"
            f"data: {{votes: {{path: {data}}}}}\n"
            "stages: {dpo: {from: base, data: votes, train: {max_steps: 1, per_device_train_batch_size: 2}}}\n"
        )
        code, _, err = shell("run", recipe, "--output-dir", tmp_path / data.stem)
        assert code == 0, err
        assert json.loads((tmp_path / data.stem / "dpo" / "lineage.json").read_text())["data"]["rows"] == rows


def test_a_key_pressed_twice_votes_once(visit: Open, folder: Path):
    page = visit()
    begin(page, "Quick")
    page.locator("#said", has_text="10 to go.").wait_for()
    pressed = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'a', bubbles: true}))"
    page.evaluate(f"{pressed}; {pressed}; {pressed}")
    page.locator("#said", has_text="Vote 1 of Quick is kept. 9 to go.").wait_for()
    page.wait_for_timeout(1000)
    assert sum(each["voter"] == "Quick" for each in votes_of(folder)) == 1
    # letters that are written are no votes, and a skipped ballot comes again
    page.get_by_role("button", name="Who votes, and on what").click()
    page.get_by_label("Your name").press("b")
    vote(page, "s", "Skip (S)")
    assert sum(each["voter"] == "Quick" for each in votes_of(folder)) == 1
    assert page.locator("#said").inner_text() == "Skipped. 9 to go."


def test_two_policies_answer_side_by_side(visit: Open, folder: Path):
    page = visit(width=390)
    page.get_by_role("tab", name="Talk").click()
    page.get_by_label("Policy").click()
    page.locator("#policy").get_by_role("option", name="dpo").click()
    page.get_by_label("Beside it").click()
    page.locator("#beside").get_by_role("option", name="sft").click()
    said = page.get_by_label("What you say")
    said.fill("Hi?")
    said.press("Enter")
    page.locator("#right .reply").wait_for()
    page.wait_for_function("!document.querySelector('#right').textContent.includes('…')")
    page.wait_for_timeout(500)
    asked = talk(folder)
    for side, policy in (("left", "dpo"), ("right", "sft")):
        expected = asked.reply(policy, [SYSTEM, user("Hi?")], seed=3).text
        assert page.locator(f"#{side} .reply p").evaluate("p => p.textContent") == expected.strip()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_run_is_looked_at_while_it_goes_on(visit: Open, folder: Path):
    page = visit(width=390)
    page.get_by_role("tab", name="Look").click()
    row = page.locator("#look-states tr", has_text="sft")
    assert row.locator("td").nth(1).inner_text() == "2"
    assert page.locator("#look-states tr", has_text="dpo").locator(".badge").inner_text() == "failed"
    with (folder / "sft" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "loss": 0.75}) + "\n")
    page.locator("#look-states tr", has_text="0.75").wait_for()
    page.locator("#look-curves").get_by_role("img", name="Loss: Loss from 3 to 0.75").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
