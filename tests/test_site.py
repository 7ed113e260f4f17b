"""The documentation's site: whole, without a warning, and nothing of it comes from elsewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
assert SPEC is not None and SPEC.loader is not None
builder = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(builder)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert builder.build(folder / "site", folder / "work") == 0, "a warning, or an error: see above"
    return folder / "site"


def test_every_page_is_in_the_site_and_in_its_navigation(site: Path):
    menu = (site / "index.html").read_text(encoding="utf-8")
    pages = [builder.page_of(file) for file in (ROOT / "docs").rglob("*.md")] + list(builder.BESIDE.values())
    for page in pages:
        html = page.removesuffix(".md") + ".html"
        assert (site / html).is_file()
        assert re.search(rf'href="(\./)?{html}"', menu) or page == "index.md", (
            f"{page} is not in the nav of docs/zensical.toml"
        )


def test_the_site_loads_nothing_from_elsewhere(site: Path):
    loaded = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="?(?:https?:)?//[^">\s]+')
    for page in site.rglob("*.html"):
        found = [each for each in loaded.findall(page.read_text(encoding="utf-8")) if "canonical" not in each]
        assert not found, f"{page.name}: {found}"


def test_links_out_of_docs_lead_to_the_same_things(tmp_path: Path):
    text = "[s](../../SECURITY.md#promised) [c](../../models/) ![i](../../benchmarks/results/frontier.svg) "
    text += "[w](https://w.org)\n"
    text += "```text\n[s](../../SECURITY.md)\n```\n"
    source = ROOT / "docs" / "stages" / "x.md"
    assert builder.rewritten(text, source, "stages/x.md", tmp_path) == (
        "[s](../SECURITY.md#promised) c ![i](../files/benchmarks/results/frontier.svg) [w](https://w.org)\n"
        "```text\n[s](../../SECURITY.md)\n```\n"
    )
    assert (tmp_path / "files" / "benchmarks" / "results" / "frontier.svg").is_file()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("")
    assert builder.build(tmp_path, tmp_path / "work") == 2
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


def test_every_kind_of_stage_has_its_page():
    from preftune.stages.kinds import DPO, KINDS

    for kind in KINDS.values():
        page = ROOT / "docs" / "stages" / f"{kind.name}.md"
        text = page.read_text(encoding="utf-8")
        assert f"../recipes.md#kind-{kind.name}" in text, f"{page.name} names its keys"
        if not kind.trains:
            continue
        rate = re.sub(r"e-0", "e-", f"{kind.defaults['learning_rate']:.0e}")
        assert f"Learning rate {rate}" in text, f"{page.name}: the default is {rate}"
    losses = DPO.parameter("loss_type").type.__args__[0].__args__
    text = (ROOT / "docs" / "stages" / "dpo.md").read_text(encoding="utf-8")
    assert not [loss for loss in losses if f"`{loss}`" not in text]
