"""The meter: silent while work is quick, lines where there is no terminal, rich only when something is shown."""

import io
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from rich.live import Live

from preftune import progress
from preftune.cli.output import Output
from preftune.progress import Meter, ahead, meter, say, sparkline
from preftune.stages.callbacks import ProgressBar


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
    assert capsys.readouterr().err.splitlines() == ["work: 3/4, about 8.3 s left", "work: 4/4"]


def test_the_time_left_goes_by_the_steps_of_this_process_and_the_whole_run_by_what_was_said(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    resumed = Meter("dpo", 75, quiet=0, lines=0, begun=50)
    resumed(50)
    now[0] += 30
    with ahead(65.0):
        resumed(65, "loss 0.5")  # 15 steps in 30 s, 10 to come
    resumed(75)
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == ["dpo: 65/75 loss 0.5, about 20.0 s left, the whole run 1 min 25 s", "dpo: 75/75"]


def test_lines_of_a_command_have_the_time_where_no_terminal_shows_them(capsys, monkeypatch):
    monkeypatch.setattr(progress._Told, "stamps", True)
    say("work: 3/4")
    say("")
    Output(log=True).say("sft: done")
    Output().say("a table's title")
    found = capsys.readouterr()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d work: 3/4\n\n", found.err)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d sft: done\na table's title\n", found.out)
    monkeypatch.setattr("sys.stderr", Terminal())
    say("work: 4/4")
    assert sys.stderr.getvalue() == "work: 4/4\n"  # pyright: ignore[reportAttributeAccessIssue]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ppo_shows_score_kl_and_length(capsys, monkeypatch):
    bar: Any = ProgressBar("ppo")
    state: Any = SimpleNamespace(is_world_process_zero=True, max_steps=8, global_step=0)
    told: list[tuple[int, str]] = []
    bar.on_train_begin(SimpleNamespace(disable_tqdm=True), state, None)
    monkeypatch.setattr(bar, "meter", lambda done, note="", values=(): told.append((done, note)))
    bar.drawing(0, 2, 4)
    bar.on_log(None, state, None, {"objective/scores": 0.5, "objective/kl": 0.0214, "rollout/length": 12.0, "lr": 1.0})
    state.global_step = 4
    bar.on_step_end(None, state, None)
    bar.drawing(4, 2, 4)
    bar.on_log(None, state, None, {"eval_objective/scores": 0.25})
    bar.on_step_end(None, state, None)
    assert told == [
        (0, "(draws 2/4)"),
        (4, "score 0.5 KL 0.0214 length 12"),
        (4, "score 0.5 KL 0.0214 length 12 (draws 2/4)"),
        (4, "score 0.5 KL 0.0214 length 12 held-out score 0.25"),
    ]


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert sparkline([1.0, 2.0]) == ""
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([5.0] * 4) == "▁▁▁▁"
    assert sparkline([1.0, float("nan"), 2.0, 8.0]) == "▁▂█"
    # each character the mean of two
    assert sparkline([0.0, 2.0, 4.0, 4.0, 7.0, 9.0], width=3) == "▁▄█"
    assert len(sparkline(list(range(100)))) == 16


def test_a_bar_draws_the_curve_of_the_loss_where_its_terminal_can(monkeypatch):
    state: Any = SimpleNamespace(is_world_process_zero=True, max_steps=8, global_step=0)
    for encoding, curve in (("utf-8", " █▅▁"), ("latin-1", "")):
        monkeypatch.setattr("sys.stderr", Screen(encoding))
        bar: Any = ProgressBar("sft")
        bar.on_train_begin(SimpleNamespace(disable_tqdm=False), state, None)
        for step, loss in enumerate((3.0, 2.0, 1.0), 1):
            bar.on_log(None, state, None, {"loss": loss, "grad_norm": 9.0 * step})
        state.global_step = 4
        monkeypatch.setattr(bar.meter, "_spoken", 0.0)
        bar.on_step_end(None, state, None)
        shown = bar.meter._bar[0].tasks[0].fields["note"]
        bar.on_train_end(SimpleNamespace(), state, None)
        assert shown.startswith(f"loss 1{curve}") and len(shown.split(",")[0]) == len(f"loss 1{curve}")


class Screen(io.TextIOWrapper):
    """A terminal of that encoding."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True


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
