"""The endpoint judge against a real server of a real model: `transformers serve`."""

import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from preftune.eval.judges.endpoint_judge import PairwiseEndpointJudge, ScoreEndpointJudge
from preftune.eval.judges.registry import plan_judges
from preftune.eval.samples import EncodedPrompt, Sample
from preftune.models.tiny import random_model

pytestmark = pytest.mark.slow
_STARTS_WITHIN = 180


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """(url, model) of a server of its own, which ends with the tests."""
    for package in ("fastapi", "uvicorn", "openai"):
        why = (
            f"{package} cannot be imported: `transformers serve` needs transformers[serving], as preftune[test] has it"
        )
        pytest.importorskip(package, reason=why)
    model = str(random_model("random:llama"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log: Path = tmp_path_factory.mktemp("served") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--device", "cpu"]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        until = time.monotonic() + _STARTS_WITHIN
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.mark.parametrize("mode", ["pairwise", "score"])
def test_a_served_model_is_asked_and_its_nonsense_is_no_verdict(served, tmp_path, mode):
    url, model = served
    raw = {"kind": "endpoint", "url": url, "model": model, "mode": mode, "name": "served", "concurrency": 2}
    raw["parameters"] = {"max_tokens": 8}
    prompt = EncodedPrompt([{"role": "user", "content": "hi"}], [1])
    ours, theirs = (
        [Sample(policy, place, prompt, f"{policy} {place}", [3, 2], True) for place in range(2)]
        for policy in ("sft", "dpo")
    )

    def verdicts():
        (plan,) = plan_judges([raw], tmp_path)
        judge = plan.open(None, None)  # pyright: ignore[reportArgumentType]: an endpoint reads neither
        if mode == "pairwise":
            assert isinstance(judge, PairwiseEndpointJudge)
            return judge.compare(ours, theirs), judge.usage
        assert isinstance(judge, ScoreEndpointJudge)
        return judge.score(ours), judge.usage

    found, usage = verdicts()
    # a random model writes no verdict
    assert all(map(math.isnan, found))
    assert usage.requests == (4 if mode == "pairwise" else 2)
    assert usage.prompt_tokens > 100 * usage.requests
    assert 0 < usage.completion_tokens <= 8 * usage.requests
    again, free = verdicts()
    assert all(map(math.isnan, again))
    # what holds no verdict is not kept: it is asked again
    assert (free.requests, free.cached) == (usage.requests, 0)
