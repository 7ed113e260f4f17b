"""The meter: silent while work is quick, lines where there is no terminal, rich only when something is shown."""

import subprocess
import sys

import pytest
from rich.live import Live

from preftune import progress
from preftune.progress import meter


def test_importing_it_and_quick_work_do_not_import_rich():
    code = (
        "import sys\nfrom preftune.progress import meter, say\n"
        "with meter('work', 2) as done:\n    done(1); done(2)\nsys.exit('rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_slow_work_is_told_in_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with meter("work", 4) as done:
        for step, at in enumerate((1.0, 3.0, 25.0, 26.0), 1):
            now[0] = at
            done(step)
    # step 2 is too soon after the start for a line, step 3 is not, and the last step always has one
    assert capsys.readouterr().err.splitlines() == ["work: 3/4", "work: 4/4"]


def test_a_bar_is_taken_away_when_the_work_fails(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown: list[Live] = []
    with pytest.raises(RuntimeError), meter("work", 2) as done:
        now[0] = 3.0
        done(1)
        assert done._bar is not None
        shown.append(done._bar[0].live)
        assert shown[0].is_started
        raise RuntimeError
    assert done._bar is None and not shown[0].is_started
