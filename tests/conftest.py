"""What every test shares: no network, one cache for made bases, and the checklist's listing."""

import os
import re
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Two cores are shared by the parallel test workers: more threads a worker only get in each other's way.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def preftune_cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache of this test run's own, so that nothing of the user's is read or written."""
    folder = tmp_path_factory.mktemp("preftune-cache")
    before = os.environ.get("PREFTUNE_CACHE")
    os.environ["PREFTUNE_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["PREFTUNE_CACHE"]
    else:
        os.environ["PREFTUNE_CACHE"] = before


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class _Root:
    """The repository's root is a package, and no package of tests.

    pytest would import it by the name of its folder, which may be none (`preftune-0.1.0`, `preftune-main`).
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == Path(__file__).parents[1] else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Root())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A checklist test's name starts with its row's id, so that the two cannot drift apart."""
    for item in items:
        for mark in item.iter_markers("checklist"):
            row = mark.args[0]
            prefix = f"test_{row[0].lower()}{int(row[1:]):02d}_"
            if not item.name.startswith(prefix):
                raise pytest.UsageError(f"{item.nodeid} is marked {row}, so its name must start with {prefix}")


def pytest_terminal_summary(terminalreporter) -> None:
    """After `pytest -m checklist`: which row each test stands for."""
    if "checklist" not in (terminalreporter.config.option.markexpr or ""):
        return
    rows: dict[str, list[str]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if getattr(report, "when", "call") == "call" or outcome == "skipped":
                row = re.match(r"test_([a-z])(\d+)_", report.nodeid.rsplit("::", 1)[-1])
                if row is not None:  # `-m "not checklist"` has others
                    rows.setdefault(f"{row[1].upper()}{int(row[2])}", []).append(f"{outcome:7} {report.nodeid}")
    terminalreporter.section("checklist rows")
    for row in sorted(rows, key=lambda r: (r[0], int(r[1:]))):
        for line in rows[row]:
            terminalreporter.write_line(f"{row:4} {line}")
    terminalreporter.write_line(f"{len(rows)} rows")
