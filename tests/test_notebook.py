"""The notebook of examples/ runs from top to bottom, with a random base in the place of a real one."""

import sys
from pathlib import Path
from typing import Any

import pytest

nbformat: Any = pytest.importorskip("nbformat", reason="the test environment is older than pyproject.toml")
FILE = Path(__file__).parents[1] / "examples" / "preftune.ipynb"


def cells() -> Any:
    return nbformat.read(FILE, as_version=4)


def test_it_is_kept_without_outputs_and_installs_this_package() -> None:
    notebook = cells()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count is not None]
    (install,) = [cell.source for cell in code if "install" in cell.metadata.get("tags", ())]
    assert install == "%pip install -q preftune"


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from nbclient import NotebookClient

    notebook = cells()
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    (base,) = [cell for cell in notebook.cells if "base" in cell.metadata.get("tags", ())]
    base.source = 'BASE = "random:llama"'
    # the console script of this environment, and nothing that a user's own Jupyter is set up with
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    (tmp_path / "work").mkdir()
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "work")}})
    client.execute()
    shown = [str(each.get("data", each.get("text", ""))) for cell in notebook.cells for each in cell.get("outputs", ())]
    assert any("win_rate" in each for each in shown) and any("<iframe srcdoc" in each for each in shown)
    assert (tmp_path / "work" / "runs" / "mine" / "report.html").is_file()
