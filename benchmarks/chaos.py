"""A chain that is killed again and again: is what it makes in the end the same, bit for bit, as if it never had been?

    python -m preftune.benchmarks.chaos smoke --kills 20 stages.sft.train.max_steps=30
    python -m preftune.benchmarks.chaos smoke --kills 20 --launch two_processes.yaml
    python -m preftune.benchmarks.chaos smoke --kills 30 --signal TERM

The recipe runs once in peace. Then `preftune run` is started over and over in another folder and ended each time: half
of the times at random, half of them while a checkpoint or an adapter is being written, which is slowed for it. A chain
that comes to its end is compared with the one that ran in peace, and the next begins in a new folder, until there were
as many kills as asked for. Exit code 1 if anything was not as it should be.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .measure import RESULTS, machine, write_result

_CLOCK = ("runtime", "per_second", "seconds", "peak_memory_bytes", "time")
_STARTED = ("time/", "step_time", "rollout/tokens_per_second")
_SLOW = '''\
"""Found by Python at its start: what makes a file final takes longer than it would."""
import os, time

def slowed(function):
    def slow(*args, **kwargs):
        time.sleep(0.015)
        return function(*args, **kwargs)
    return slow

for name in ("fsync", "rename", "replace"):
    setattr(os, name, slowed(getattr(os, name)))
'''


@dataclass
class Attempt:
    """One start of the command.

    Attributes:
        code: its exit code; None where it was killed.
        saving: whether it was ended while something was written.
        seconds: from its first word. said: all its words.
        wrong: what was not as it should be.
    """

    code: int | None
    saving: bool
    seconds: float
    wrong: list[str] = field(default_factory=list)
    said: str = ""


class Chaos:
    """The recipe's command line, ended again and again.

    Args:
        work: a folder for everything.
    """

    def __init__(self, work: Path, recipe: str, words: list[str], number: signal.Signals, seed: int) -> None:
        self.work, self.recipe, self.words, self.number = work, recipe, words, number
        self.random = random.Random(seed)
        slow = work / "slow"
        slow.mkdir(parents=True)
        (slow / "sitecustomize.py").write_text(_SLOW)
        self.environment = {**os.environ, "PYTHONPATH": str(slow), "PREFTUNE_CHAOS": str(work), "PYTHONUNBUFFERED": "1"}

    def in_peace(self) -> float:
        """Run it once; seconds from its first word to its end."""
        attempt = self.attempt(self.work / "whole", None, saving=False)
        if attempt.code != 0:
            raise RuntimeError(f"the recipe itself fails: {attempt.said[-2000:]}")
        return attempt.seconds

    def attempt(self, folder: Path, after: float | None, *, saving: bool) -> Attempt:
        """Start the command, and end it so many seconds after its first word (None: never).

        Args:
            saving: and from then on as soon as something is being written.
        """
        command = [sys.executable, "-m", "preftune.cli.main", "run", self.recipe, *self.words]
        with (self.work / "said").open("wb") as said:
            process = subprocess.Popen(
                [*command, "--output-dir", str(folder)],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
            began, hit = self._watch(process, folder, after, saving=saving)
            before = (self.work / "said").stat().st_size
            code = process.wait()
        words = (self.work / "said").read_bytes()
        made = Attempt(
            code if code >= 0 else None, hit, time.monotonic() - began, said=words.decode("utf-8", errors="replace")
        )
        made.wrong = self._judge(made, ended=after is not None and process.returncode != 0)
        if code == 0 and b": runs" in words[before:]:
            made.wrong.append("it went on after the signal")
        return made

    def _watch(
        self, process: "subprocess.Popen[bytes]", folder: Path, after: float | None, *, saving: bool
    ) -> tuple[float, bool]:
        """Until it has ended, or been ended; when its first word came, and whether something was being written."""
        began = None
        while process.poll() is None:
            now = time.monotonic()
            if began is None and (self.work / "said").stat().st_size:
                began = now
            if after is not None and began is not None and now - began >= after:
                writing = _writing(folder)
                if writing or not saving or now - began > after + 20:
                    time.sleep(self.random.random() * 0.2 if writing else 0)
                    # Ctrl-C in a terminal reaches everybody
                    (os.killpg if self.number == signal.SIGINT else os.kill)(process.pid, self.number)
                    break
            time.sleep(0.005)
        return began or time.monotonic(), after is not None and _writing(folder)

    def _judge(self, attempt: Attempt, *, ended: bool) -> list[str]:
        """What is not as it should be in how it ended."""
        wrong = []
        if "Traceback" in attempt.said:
            wrong.append("a traceback")
        if self.number == signal.SIGKILL or not ended:
            return [*wrong, *([f"exit code {attempt.code}"] if attempt.code not in (None, 0) else [])]
        last = attempt.said.strip().splitlines()[-1] if attempt.said.strip() else ""
        if last.startswith("adapters: "):
            return wrong  # it had said its last word, and Python was closing down
        if attempt.code != 128 + self.number:
            wrong.append(f"exit code {attempt.code}, expected {128 + self.number}")
        if "; continue with: preftune run " not in last or self.number.name not in last:
            wrong.append(f"last line {last!r}")
        return wrong


def _writing(folder: Path) -> bool:
    """Whether a checkpoint, or a finished stage's folder, is being put in its place."""
    return any(folder.glob(".*.partial/checkpoints/.saving")) or any(folder.glob(".*.partial/adapter_config.json"))


def differences(whole: Path, other: Path) -> list[str]:
    """What two runs of one recipe left that is not the same, the clock's figures aside."""
    files = [{each.relative_to(run).as_posix() for each in run.rglob("*") if each.is_file()} for run in (whole, other)]
    wrong = [f"only in one of them: {name}" for name in sorted(files[0] ^ files[1])]
    for name in sorted(files[0] & files[1]):
        one, two = whole / name, other / name
        if one.suffix in (".safetensors", ".jinja") and one.read_bytes() != two.read_bytes():
            wrong.append(f"other bits: {name}")
        elif one.name in ("log.jsonl", "metrics.json", "rollouts.jsonl", "results.json", "samples.jsonl"):
            found = [_timeless(_read(each), each.parent.parent) for each in (one, two)]
            if found[0] != found[1]:
                wrong.append(f"other numbers: {name}")
    return wrong


def _read(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line] if file.suffix == ".jsonl" else json.loads(text)


def _timeless(found: Any, run: Path) -> Any:
    if isinstance(found, dict):
        kept = {k: x for k, x in found.items() if not (k.endswith(_CLOCK) or k.startswith(_STARTED))}
        return {key: _timeless(value, run) for key, value in kept.items()}
    if isinstance(found, list):
        return [_timeless(each, run) for each in found]
    return found.replace(str(run), "RUN") if isinstance(found, str) else found


def left_over(work: Path) -> int:
    """Processes of ours that still run: each has the folder's name in its environment."""
    mark, found = f"PREFTUNE_CHAOS={work}".encode(), 0
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += mark in file.read_bytes()
        except OSError:
            continue
    return found


def repeated(folder: Path) -> dict[str, int]:
    """Of each stage under way: steps that are in its log and in no checkpoint, which will be made once more."""
    lost = {}
    for partial in folder.glob(".*.partial"):
        log = partial / "log.jsonl"
        steps = [row["step"] for row in map(_parsed, log.read_text().split("\n")) if row] if log.is_file() else []
        kept = [int(each.name.rpartition("-")[2]) for each in partial.glob("checkpoints/checkpoint-*")]
        if steps and not (partial / "lineage.json").is_file():  # which it has at its end: then nothing is made again
            lost[partial.name[1:-8]] = max(steps) - max(kept, default=0)
    return lost


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def torment(chaos: Chaos, kills: int, within: float) -> dict[str, Any]:
    """End the command so many times, each within so many seconds of its first word, over as many chains as that takes,
    and compare each that came to its end."""
    done, saving, rounds, wrong, lost = 0, 0, 0, list[str](), dict[str, int]()
    while done < kills:
        folder = chaos.work / f"round-{rounds}"
        while True:
            after = chaos.random.uniform(0, within) if done < kills else None
            attempt = chaos.attempt(folder, after, saving=bool(done % 2))
            wrong += [f"round {rounds}, kill {done}: {each}" for each in attempt.wrong]
            if attempt.wrong:
                print(attempt.said, file=sys.stderr)
            if attempt.code == 0:
                break
            done, saving = done + 1, saving + attempt.saving
            for name, steps in repeated(folder).items():
                lost[name] = max(steps, lost.get(name, 0))
            print(f"{done} of {kills}, {saving} while writing; wrong: {len(wrong)}", file=sys.stderr, flush=True)
            if attempt.code not in (None, 128 + chaos.number):
                break
        wrong += [f"round {rounds}: {each}" for each in differences(chaos.work / "whole", folder)]
        rounds += 1
    time.sleep(5)
    if left := left_over(chaos.work):
        wrong.append(f"{left} processes are left")
    return {"kills": done, "while_writing": saving, "chains": rounds, "steps_made_twice_at_most": lost, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("words", nargs="*", help="overrides, as `preftune run` takes them")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--launch", help="an accelerate config")
    parser.add_argument("--within", type=float, help="seconds; default: half of what the recipe takes in peace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result file; default: chaos_SIGNAL")
    args = parser.parse_intermixed_args()
    words = [*args.words, *(["--launch", str(Path(args.launch).resolve())] if args.launch else [])]
    with tempfile.TemporaryDirectory(prefix="chaos-") as work:
        # what a shell has started in the background ignores Ctrl-C, and so would all that is started here
        signal.signal(signal.SIGINT, signal.default_int_handler)
        chaos = Chaos(Path(work), args.recipe, words, signal.Signals[f"SIG{args.signal}"], args.seed)
        seconds = chaos.in_peace()
        found = torment(chaos, args.kills, args.within or seconds / 2)
    result = {
        "machine": machine(),
        "recipe": args.recipe,
        "overrides": args.words,
        "processes": "launched" if args.launch else 1,
        "signal": args.signal,
        "seconds_in_peace": round(seconds, 1),
        **found,
    }
    write_result(args.name or f"chaos_{args.signal.lower()}", result)
    print(json.dumps(result, indent=1), file=sys.stderr)
    print(f"wrote {RESULTS / (args.name or f'chaos_{args.signal.lower()}')}.json")
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
