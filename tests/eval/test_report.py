"""The report: one page, nothing fetched, whatever the run folder holds."""

import html
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from preftune.errors import UserError
from preftune.eval.report.page import TEMPLATES, render, write_report
from preftune.eval.report.read import read_run
from preftune.eval.report.samples import browser, json_for_script, verdict

from .fake_run import JUDGES, POLICIES, build_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028]]>--><!-- &amp; \"'`{{ 7*7 }}"
SECTIONS = ["trained", "curves", "winrates", "frontier", "rewards", "lengths", "samples", "doctor", "recipe"]
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Outline(HTMLParser):
    """Checks that elements nest, and collects headings, ids, references to ids and figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str | None] = []
        self.targets: set[str | None] = set()
        self.figures: list[dict[str, str | None]] = []
        self.scripts = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        href = given.get("href") or ""
        self.targets |= {href.removeprefix("#")} if href.startswith("#") else set()
        self.targets |= {given["aria-labelledby"]} if "aria-labelledby" in given else set()
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.figures += [given] if tag == "svg" and given.get("aria-hidden") != "true" else []
        self.scripts += tag == "script"
        assert not [name for name in given if name.startswith("on")], given
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def read(run_dir):
    return write_report(run_dir).read_text(encoding="utf-8")


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page)


def test_the_page_stands_alone(run, page):
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://|src=|@import|url\(|<link", page)
    assert sections(page) == ["summary", *SECTIONS]
    assert [path.name for path in run.iterdir() if path.name.startswith(".report")] == []


def test_elements_nest_headings_go_down_one_at_a_time_and_references_lead_somewhere(page):
    outline = Outline(page)
    assert outline.open == []
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(outline.headings))
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.targets <= set(outline.ids)
    assert all(landmark in page for landmark in ("<header", '<main id="main"', "<nav", "<footer", 'class="skip"'))


def test_a_judge_that_was_a_reward_is_named_on_the_first_screen_and_at_its_table(tmp_path):
    folder = build_run(tmp_path / "quickstart")
    recipe = folder / "recipe.yaml"
    given = recipe.read_text().replace(
        "reward: [{stage: reward, weight: 1.0}]",
        "reward: [{kind: rubric, weight: 0.5, checks: [{kind: max_words, value: 60}]}]",
    )
    recipe.write_text(given)
    said = "rubric is word for word a reward that ppo learnt from: a policy may have learnt to please it alone"
    page = render(read_run(folder))
    assert page.count(said) == 2 and "own reward model" not in page
    recipe.write_text(given.replace("value: 60}]}]}", "value: 50}]}]}"))
    assert said not in render(read_run(folder))


def test_every_figure_is_an_image_with_a_name(page):
    figures = Outline(page).figures
    assert len(figures) > 40
    assert all(figure["role"] == "img" and len(figure["aria-label"] or "") > 8 for figure in figures)


def test_the_summary_says_who_won_with_its_interval_and_what_the_doctor_fears(run, page):
    row = max(
        (r for r in json.loads((run / "eval" / "results.json").read_text()) if r["judge"] == "rubric"),
        key=lambda r: r["win_rate"],
    )
    text = re.sub(r"<[^>]+>", "", page[page.index('class="verdict"') : page.index('<dl class="cards"')])
    said = f"it wins {100 * row['win_rate']:.1f}% of 64 prompts against sft (95% interval {100 * row['ci_low']:.1f} to"
    cell = row["against"]["dpo"]
    assert row["policy"] == "ppo" and cell["ci_low"] < 0.5 < cell["ci_high"]
    assert "By rubric, ppo comes first: " in text and said in text and "; it is not clearly better than dpo." in text
    assert "By reward, ppo is best: " in text
    assert "at a KL of 8.9 ± 0.2 nats per reply" in text
    assert "The stage kto failed." in text
    assert "worst finding: ppo is broken, KL 84 (79 to 88.5) nats per reply; 2 more below" in html.unescape(text)


@pytest.mark.parametrize(
    ("rate", "low", "high", "said"),
    [
        (0.6, 0.51, 0.7, "By r, <b>dpo</b> is best: it wins 60.0% of 9"),
        (0.6, 0.49, 0.7, "no policy is clearly better than sft"),
        (0.3, 0.2, 0.4, "By r, no policy beats sft: the nearest, <b>dpo</b>, wins 30.0%"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval(tmp_path, rate, low, high, said):
    shared = {"reference": "sft", "judge": "r", "n": 9, "mean_score": 1.0, "kl": None, "ties": 0, "length": 3.0}
    rows = [
        shared | {"policy": "sft", "win_rate": 0.5, "ci_low": 0.5, "ci_high": 0.5},
        shared | {"policy": "dpo", "win_rate": rate, "ci_low": low, "ci_high": high},
    ]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps(rows))
    assert said in read(tmp_path)


@pytest.mark.parametrize(
    ("gone", "section"),
    [
        ("eval/results.json", "winrates"), ("eval/samples.jsonl", "samples"), ("eval/rewards.json", "rewards"),
        ("recipe.yaml", None), ("run.json", None), ("sft/log.jsonl", None), ("sft/lineage.json", None),
        ("eval/overoptimisation.json", None), ("doctor.json", None),
    ],
)  # fmt: skip
def test_what_is_missing_is_left_out(copied, gone, section):
    (copied / gone).unlink()
    page = read(copied)
    without = {section, "lengths" if section == "samples" else None}
    assert sections(page) == ["summary", *[each for each in SECTIONS if each not in without]]
    assert Outline(page).open == []
    if gone == "doctor.json":
        assert "preftune doctor RUN" in page
    if gone == "eval/overoptimisation.json":
        assert "Over-optimisation" not in page


def test_a_run_that_was_not_evaluated_says_so(copied):
    shutil.rmtree(copied / "eval")
    page = read(copied)
    assert "sft, reward, dpo and ppo are trained; nothing has been evaluated yet." in page
    assert not {"winrates", "frontier", "rewards", "lengths", "samples"} & set(sections(page))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no stage and no evaluation"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("stages: {sft: {from: base}}")
    with pytest.raises(UserError, match="no stage and no evaluation"):
        write_report(tmp_path)


def test_broken_json_is_named_and_a_line_that_was_being_written_is_not_read(copied):
    log = copied / "sft" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 76, "lo')
    write_report(copied)
    log.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:1"):
        write_report(copied)
    log.unlink()
    (copied / "doctor.json").write_text("{")
    with pytest.raises(UserError, match=r"doctor\.json"):
        write_report(copied)


def test_hostile_text_stays_text(tmp_path):
    run_dir = build_run(tmp_path / "run", prompts=3, hostile=HOSTILE)
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: quickstart", "name: <script>alert(3)</script>"))
    (run_dir / "dpo").rename(run_dir / "<b onclick=x>")
    lines = (run_dir / "eval" / "samples.jsonl").read_text().replace('"dpo"', '"</script><i>"')
    (run_dir / "eval" / "samples.jsonl").write_text(lines)
    page = read(run_dir)
    outline = Outline(page)  # which has no element of theirs, and no handler
    assert outline.open == [] and outline.scripts == 3
    assert "<img" not in page and "<script>alert" not in page and "<i>" not in page and "<b onclick" not in page
    assert html.escape(HOSTILE, quote=False).replace('"', "&#34;").replace("'", "&#39;") in page
    assert "49" not in page[page.index('id="samples"') : page.index('id="doctor"')].split("alert(1)")[1][:80]


def test_json_for_a_script_element_holds_nothing_that_ends_it():
    text = json_for_script({HOSTILE: [HOSTILE]})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {HOSTILE: [HOSTILE]}


def test_two_hundred_prompts_are_shown_and_the_page_stays_small(tmp_path):
    run_dir = build_run(tmp_path / "run", prompts=205)
    lines = [json.loads(line) for line in (run_dir / "eval" / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line["completion"] = "word <&> " * 400
    (run_dir / "eval" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read(run_dir)
    assert page.count('<article class="sample"') == 200
    assert "The first 200 of 205 prompts are shown" in page
    found = re.search("Texts longer than ([0-9]+) characters are cut", page)
    assert found is not None
    cut = int(found[1])
    assert cut >= 400 and page.count(f"[{3600 - cut} more characters]") == 800
    assert 1_000_000 < len(page.encode()) < 2_000_000


def test_verdicts_are_those_recorded_or_follow_from_the_scores(run):
    content = read_run(run)
    recorded = browser(content)
    lines = [dict(line) for line in content.samples]
    for line in lines:
        line.pop("outcomes", None)
    derived = browser(type(content)(content.name, content.stages, content.results, tuple(lines)))
    assert recorded is not None and derived is not None
    given, found = json.loads(recorded["data"]), json.loads(derived["data"])
    assert "rubric" not in given[5]["ppo"] and given[5]["ppo"].keys() == {"reward"}
    given[5].pop("ppo")
    found[5].pop("ppo")
    assert found == given
    assert set(given[0]) == {"base", "dpo", "ppo"}
    assert [verdict(outcome) for outcome in (1.0, 0.75, 0.5, 0.25, 0.0)] == ["win", "win", "tie", "loss", "loss"]


def test_everything_in_the_results_is_on_the_page(run, page):
    for row in json.loads((run / "eval" / "results.json").read_text()):
        for cell in row["against"].values():
            assert f"<b>{100 * cell['win_rate']:.1f}%</b>" in page
        assert f"{row['mean_score']:.3f}".replace("-", "−") in page
        assert f"{row['length']:.1f} <small>± {row['length_se']:.1f}</small>" in page
    assert page.count("1 comparison by rubric had no usable verdict and is left out") == 1
    assert all(f"Ratings by {judge}" in page for judge in JUDGES)
    assert all(f"Reply lengths of {policy}" in page for policy in POLICIES)


def test_the_doctor_speaks_in_words_and_keeps_what_is_well_folded(page):
    part = html.unescape(page[page.index('<section id="doctor"') : page.index('<section id="recipe"')])
    assert "2 broken, 1 to look at, 4 OK" in part
    assert part.index("<b>KL</b>: 84 (79 to 88.5) nats per reply") < part.index("<b>loss</b>: the loss is not finite")
    assert "→ Raise kl.coef" in part and "broken: above 50" in part
    assert "<summary>2 checks OK</summary>" in part and "kto: not finished" in part


# Foreground on background; text needs 4.5 : 1, what is drawn 3 : 1 (WCAG 2.2, 1.4.3 and 1.4.11).
TEXT = [(f, b) for f in ("text", "soft", "accent", "ok", "look", "broken") for b in ("page", "card")]
DRAWN = [(f"series-{i}", b) for i in range(6) for b in ("page", "card")] + [("line", "page")]


def colours(theme: int) -> dict[str, tuple[int, ...]]:
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--([\w-]+): light-dark\(#(\w{6}), #(\w{6})\)", style)
    return {name: tuple(bytes.fromhex(both[theme])) for name, *both in pairs}


def luminance(rgb) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme):
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    found = colours(theme)
    weak = [(f, b) for f, b in TEXT if contrast(found[f], found[b]) < 4.5]
    weak += [(f, b) for f, b in DRAWN if contrast(found[f], found[b]) < 3]
    # the strongest cell of the table of all pairs: 26% of the colour
    for side in ("series-1", "series-2"):
        mixed = tuple(0.26 * c + 0.74 * p for c, p in zip(found[side], found["page"], strict=True))
        weak += [(side, "text")] if contrast(mixed, found["text"]) < 4.5 else []
    assert weak == []


def test_the_theme_follows_the_system_and_motion_is_asked_for(page):
    assert "color-scheme: light dark" in page and "prefers-color-scheme: dark" in page
    assert "prefers-reduced-motion: reduce" in page and "@media print" in page
    # an SVG takes its colours from classes alone
    assert not re.search(r'<(?:path|rect|line|text|circle|polygon|polyline)[^>]*(?:fill|stroke)="', page)


def test_render_writes_nothing(run):
    before = sorted(path.name for path in run.iterdir())
    assert "<h1>quickstart</h1>" in render(read_run(run))
    assert sorted(path.name for path in run.iterdir()) == before
