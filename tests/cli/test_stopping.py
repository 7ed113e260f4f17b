"""Runs that a signal stops: exit code, line, and the same result after the same command again. Real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from preftune import stopping
from preftune.stopping import Stopped

STEPS = 60
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def preftune(folder: Path, *words: str, signals: tuple[signal.Signals, ...] = (), at: str = "") -> tuple[int, str]:
    """(exit code, standard error) of the smoke recipe's SFT stage, which gets the signals once a line begins like
    that."""
    command = [sys.executable, "-m", "preftune.cli.main", "sft", "smoke", f"stages.sft.train.max_steps={STEPS}", *words]
    process = subprocess.Popen(
        [*command, "--output-dir", str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    lines, waiting = [], bool(signals)
    with process.stderr:
        for line in process.stderr:
            lines.append(line)
            if waiting and re.match(TIME + at, line):
                waiting = False
                for each in signals:
                    process.send_signal(each)
    return process.wait(timeout=300), "".join(lines)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, err = preftune(folder)
    assert code == 0, err
    return folder / "sft"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(whole: Path, tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    # no checkpoint but the one that the signal asks for
    words = ("checkpoints.share=null", "--force")
    code, err = preftune(tmp_path / "run", *words, signals=(number,), at=r"sft: \d+/")
    assert code == 128 + number
    last = err.strip().splitlines()[-1]
    said = rf"sft: stopped by {name} at step (\d+) of {STEPS}, with a checkpoint; continue with: preftune sft smoke "
    found = re.match(said, last)
    assert found and "--force" not in last and str(tmp_path / "run") in last, err
    kept = f"kept in {tmp_path / 'run'}: no stage is done yet; sft goes on after step {found[1]}"
    assert err.strip().splitlines()[-2] == kept
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["sft"]["state"] == "stopped"
    assert "Traceback" not in err

    code, err = preftune(tmp_path / "run", words[0])
    assert code == 0 and f"sft: continues after step {found[1]}\n" in err
    adapters = [folder / "adapter_model.safetensors" for folder in (whole, tmp_path / "run" / "sft")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "sft" / "log.jsonl").read_text().splitlines()]
    assert steps == [*range(1, STEPS + 1), STEPS]  # the last line is the summary
    assert not (tmp_path / "run" / "sft" / "checkpoints").exists()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    both = (signal.SIGTERM, signal.SIGINT)
    code, err = preftune(tmp_path / "run", signals=both, at=r"sft: \d+/")
    assert code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert "again: ends at once" in err


@pytest.mark.slow
def test_processes_of_a_launch_stop_together(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(json.dumps({"distributed_type": "MULTI_CPU", "use_cpu": True, "num_machines": 1,
                                  "num_processes": 2, "main_process_port": 0}))  # fmt: skip
    words = ("--launch", str(config))
    code, err = preftune(tmp_path / "run", *words, signals=(signal.SIGTERM,), at=r"sft: \d+/")
    assert code == 143, err
    assert f"of {STEPS}, with a checkpoint; continue with: preftune sft smoke" in err.strip().splitlines()[-1]
    code, err = preftune(tmp_path / "run", *words)
    assert code == 0 and "sft: continues after step " in err


def test_outside_of_training_a_signal_stops_at_once() -> None:
    with pytest.raises(Stopped) as stopped, stopping.signals():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.exit_code == 143
    assert stopping.requested() is None  # and the next command begins anew


def test_a_signal_that_comes_within_a_destructor_is_not_lost(capsys) -> None:
    class Falling:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0)  # where Python takes the signal, and nobody can catch what it raises

    waited = False
    with pytest.raises(Stopped) as stopped, stopping.signals():
        Falling()
        waited = True
        time.sleep(5)
    assert waited and stopped.value.exit_code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_within_deferred_work_it_waits_for_a_place_to_stop() -> None:
    told: list[int] = []
    reached = False
    with pytest.raises(Stopped), stopping.signals(), stopping.deferred(told.append):
        signal.raise_signal(signal.SIGINT)
        assert told == [signal.SIGINT] and stopping.requested() == signal.SIGINT
        stopping.poll()  # not interruptible
        with pytest.raises(Stopped), stopping.interruptible():
            pass
        reached = True
    assert reached


def test_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def command() -> None:
        with stopping.signals():
            assert signal.getsignal(signal.SIGTERM) is before

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
