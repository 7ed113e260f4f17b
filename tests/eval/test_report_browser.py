"""The report in a browser: on a phone and on a desk, light and dark, by keyboard, and without JavaScript.

Needs playwright and a Chromium (`tests/browser.py`).
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune.eval.report.page import write_report

from ..browser import Browser, Page, browser_or_skip, launched
from .fake_run import build_run

HOSTILE = "</script><script>document.title='owned'</script><img src=//nowhere/x onerror=document.title='owned'>\u2028"
SCREENS = [(width, theme) for width in (390, 1440) for theme in ("light", "dark")]

browser_or_skip()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = build_run(tmp_path_factory.mktemp("runs") / "quickstart", hostile=HOSTILE)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    yield from launched()


@pytest.fixture
def visit(chromium, run):
    """visit(width, theme) opens the report; afterwards nothing may have been said on the console or been fetched."""
    contexts, heard = [], []

    def open_page(width: int = 1440, theme: str = "light", folder: Path = run, **options) -> "Page":
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith("file:") else heard.append(request.url))
        page.goto((folder / "report.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []


@pytest.mark.parametrize(("width", "theme"), SCREENS)
def test_nothing_is_wider_than_the_screen_and_all_figures_are_drawn(visit, width, theme):
    page = visit(width, theme)
    assert page.title() == "quickstart – preftune report"
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    drawn = page.get_by_role("img").all()
    assert len(drawn) > 40
    for figure in drawn:
        assert len(figure.get_attribute("aria-label") or "") > 8
        box = figure.bounding_box()
        assert box is not None and box["width"] > 50 and box["height"] > 10
    assert len(page.get_by_role("img", name="What was trained from what").all()) == 1  # one of the two layouts


@pytest.mark.parametrize(("width", "theme"), SCREENS)
def test_small_print_in_figures_can_still_be_read(visit, width, theme):
    page = visit(width, theme)
    heights = page.evaluate(
        "[...document.querySelectorAll('main svg.plot text')].filter((t) => t.getClientRects().length)"
        ".map((t) => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
    )
    assert len(heights) > 100 and min(heights) >= 8.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_theme_follows_the_system_until_the_button_is_used_and_is_remembered(visit, theme):
    page = visit(theme=theme)
    ground = "getComputedStyle(document.body).backgroundColor"
    button = page.locator("#theme")
    other = "Light theme" if theme == "dark" else "Dark theme"
    before = page.evaluate(ground)
    assert button.inner_text() == other
    button.click()
    after = page.evaluate(ground)
    assert after != before and button.inner_text() != other
    assert (sum(map(int, after[4:-1].split(", "))) > 384) == (theme == "dark")
    assert any(reloaded(page) == after for _ in range(20))


def reloaded(page: "Page") -> str:
    """The page's ground once it is loaded anew. What it keeps reaches the browser's other processes a moment later."""
    page.wait_for_timeout(100)
    page.reload()
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_filter_shows_what_the_data_say(visit, run):
    lines = [
        json.loads(line) for line in (run / "eval" / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    outcomes = [
        (line["policy"], judge, value) for line in lines for judge, value in (line.get("outcomes") or {}).items()
    ]
    page = visit()
    count = page.locator("#count")
    assert count.inner_text() == "64 of 64 prompts, showing number 1"
    for policy, judge, word, value in (
        ("dpo", "rubric", "win", 1),
        ("ppo", "rubric", "tie", 0.5),
        ("base", "reward", "loss", 0),
    ):
        page.select_option("#f-policy", policy)
        page.select_option("#f-judge", judge)
        page.select_option("#f-verdict", word)
        expected = outcomes.count((policy, judge, value))
        assert 0 < expected < 64
        assert count.inner_text() == f"{expected} of 64 prompts, showing number 1"
        shown = page.locator(".sample:visible")
        assert shown.count() == 1
        reply = shown.locator(".reply", has_text=policy).first
        assert f"{word} {judge}" in " ".join(reply.inner_text().split())
    for field in ("#f-policy", "#f-judge", "#f-verdict"):
        page.select_option(field, "")
    page.fill("#f-text", "UKULELE")
    expected = len({line["prompt_index"] for line in lines if "ukulele" in line["prompt"][0]["content"]})
    assert count.inner_text().startswith(f"{expected} of 64 prompts")
    page.fill("#f-text", "no such words")
    assert count.inner_text() == "0 of 64 prompts"
    assert page.locator(".sample:visible").count() == 0 and page.locator("#next").is_disabled()


def test_by_keyboard_alone(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    box = page.locator(".skip").bounding_box()
    assert box is not None and box["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.focus("#f-policy")
    page.keyboard.press("ArrowDown")  # the first policy
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "f-judge"
    outline = page.evaluate(
        "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
    )
    assert outline == "solid3px"
    page.select_option("#f-policy", "")
    page.focus("#next")
    page.keyboard.press("Enter")
    assert page.locator(".sample:visible h3").inner_text() == "Prompt 2"
    page.keyboard.press("ArrowRight")
    assert page.locator(".sample:visible h3").inner_text() == "Prompt 3"
    page.keyboard.press("ArrowLeft")
    page.focus("#previous")
    page.keyboard.press("Space")
    assert page.locator(".sample:visible h3").inner_text() == "Prompt 1"
    assert page.locator("#previous").is_disabled()
    # arrows move the cursor in a field, not the prompts
    page.focus("#f-text")
    page.keyboard.press("ArrowRight")
    assert page.locator(".sample:visible h3").inner_text() == "Prompt 1"


def test_hostile_replies_are_only_text(visit):
    page = visit()
    assert page.title() == "quickstart – preftune report"
    assert page.locator("main img").count() == 0
    assert HOSTILE in page.locator(".sample").first.locator(".said p").evaluate("(p) => p.textContent")


def test_without_javascript_everything_is_there(visit):
    page = visit(java_script_enabled=False)
    assert page.locator(".sample:visible").count() == 64
    assert page.locator("#filter").is_hidden() and page.locator("#theme").is_hidden()
    assert page.get_by_role("heading", level=2).count() == 10


def test_printed_it_is_light(visit):
    page = visit(theme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 33, 37)"
    assert page.locator("nav").is_hidden()


NASTY = "<img src=x onerror=document.title='owned'>\"'&<svg onload=document.title='owned'>"
STRUCTURE = ("state", "created", "started", "severity", "role", "sha256", "status", "level")
"""Keys whose values are words of ours."""


def poisoned(value: Any, names: Collection[str], key: str = "") -> Any:
    """The same with something hostile in every text: names in every place alike, so that they still belong together."""
    if isinstance(value, dict):
        return {f"{k}{NASTY}" if k in names else k: poisoned(v, names, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(each, names, key) for each in value]
    if not isinstance(value, str) or key in STRUCTURE:
        return value
    return value + (NASTY if value in names else HOSTILE)


@pytest.fixture(scope="module")
def poisoned_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every name and text of every file is hostile: stages, judges, data, base, kinds, findings."""
    folder = build_run(tmp_path_factory.mktemp("runs") / f"quickstart{NASTY}", hostile=HOSTILE)
    stages = [each.name for each in folder.iterdir() if each.is_dir() and each.name != "eval"]
    rows = json.loads((folder / "eval" / "results.json").read_text())
    names = {*stages, *(row["judge"] for row in rows)} - {"base"}
    for file in [each for each in folder.rglob("*") if each.is_file()]:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            file.write_text(json.dumps(poisoned(json.loads(text), names)))
        elif file.suffix == ".jsonl":
            lines = [json.dumps(poisoned(json.loads(line), names)) for line in text.split("\n") if line.strip()]
            file.write_text("\n".join(lines) + "\n")
        elif file.suffix == ".yaml":
            file.write_text(yaml.safe_dump(poisoned(yaml.safe_load(text), names), allow_unicode=True))
    for name in stages:
        (folder / name).rename(folder / f"{name}{NASTY}")
    write_report(folder)
    return folder


def test_no_name_or_text_of_a_run_becomes_part_of_the_page(visit, poisoned_run: Path):
    clean = visit()
    parts = "document.querySelectorAll('script, style, link, iframe, object, form').length"
    expected = clean.evaluate(parts)
    page = visit(folder=poisoned_run)
    page.wait_for_timeout(200)
    assert page.title() != "owned"
    assert page.evaluate(parts) == expected
    assert page.locator("img").count() == 0
    assert page.evaluate("[...document.querySelectorAll('*')].filter(e => e.onerror || e.onload).length") == 0
    assert page.locator(f"text={NASTY}").count() > 0
