"""Rollouts that a server draws one iteration ahead: who draws what, what is weighed, and what a checkpoint keeps."""

import copy
import dataclasses
import json
import logging
import random
import re
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from preftune import stopping
from preftune.cli.keys import counted
from preftune.errors import Lost, UserError
from preftune.models.lineage import adapter_sha256
from preftune.stages.callbacks import LogFile
from preftune.stages.check import stage_problems
from preftune.stages.checkpoints import Continuing, newest
from preftune.stages.distill import DistillationConfig
from preftune.stages.grpo import GRPOConfig, GRPOTrainer
from preftune.stages.job import CheckpointPlan, StageJob
from preftune.stages.ppo import trainer as trainer_file
from preftune.stages.ppo.ahead import Ahead
from preftune.stages.ppo.config import PPOConfig
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.ppo.rollout import Episodes
from preftune.stages.rloo import RLOOConfig, RLOOTrainer
from preftune.stages.run import run_stage
from preftune.stopping import Stopped

from .served import Faults, Served, ask_at_once
from .test_ppo_resume import assert_same, timeless
from .test_served import Ranks
from .tiny_ppo import PROMPTS, TOKENIZER, Steps, letters, tiny, trainer

FOUR: dict[str, Any] = {"total_episodes": 32, "max_new_tokens": 4}
"""Four iterations of 8 replies and 4 steps."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_at_once(monkeypatch)


def asked(server: Served, ahead: int = 1, **options: Any) -> dict[str, Any]:
    said = {"rollout_engine": "vllm", "rollout_url": server.url, "rollout_retries": 1, "rollout_wait": 0.3}
    return said | FOUR | {"rollout_ahead": ahead} | options


def ahead(folder: Path, server: Served, **options: Any) -> Any:
    return trainer(folder, **asked(server, **options))


def groups(kind: str, folder: Path, server: Served, **options: Any) -> Any:
    """A GRPO or RLOO trainer on the tiny model: 4 replies to a prompt, 2 steps an iteration."""
    config, made = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    given = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "rollout_batch_size": 8,
        "num_generations": 4, "num_mini_batches": 2, "learning_rate": 1e-3, "seed": 1,
    }  # fmt: skip
    args = config(str(folder), **given, **asked(server, **options))
    return made(tiny(), letters, args, PROMPTS, processing_class=TOKENIZER)


def trained(made: Any, **options: Any) -> list[dict[str, Any]]:
    """Train; the iterations' logs."""
    steps = Steps()
    made.add_callback(steps)
    made.train(**options)
    return [log for log in steps.logs if "rollout/length" in log]


def drawn(server: Served, size: int = 8) -> list[set[str]]:
    """Of each iteration, by the steps in their names, the adapters that drew it."""
    steps = [body["model"].rpartition("-")[2] for body in server.completions]
    return [set(steps[start : start + size]) for start in range(0, len(steps), size)]


def requests(server: Served, size: int = 8) -> list[list[tuple[int, list[int]]]]:
    """Of each iteration, the seeds and prompts."""
    said = [(body["seed"], body["prompt"]) for body in server.completions]
    return [sorted(said[start : start + size]) for start in range(0, len(said), size)]


def drawers(server: Served) -> dict[int, str]:
    """Of each reply by its seed, the steps in its adapter's name."""
    return {body["seed"]: body["model"].rpartition("-")[2] for body in server.completions}


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("rollout-ahead")]


# --- who draws what


@pytest.mark.checklist("V18")
@pytest.mark.parametrize(("kind", "steps"), [("ppo", 4), ("grpo", 2), ("rloo", 2)])
def test_v18_each_rollout_from_the_second_on_is_one_iteration_old(
    tmp_path: Path, tiny_base: Path, kind: str, steps: int
):
    found: dict[int, Any] = {}
    for number in (0, 1):
        with Served(tiny_base) as server:
            where = tmp_path / str(number)
            made = ahead(where, server, ahead=number) if kind == "ppo" else groups(kind, where, server, ahead=number)
            logs = trained(made)
            assert made.served.server.restarts == 0, "no adapter went while it drew"
            assert not server.adapters and not list(where.rglob("preftune-*")), "no adapter is left behind"
            found[number] = drawn(server), requests(server), logs
    now, then = found[0], found[1]
    assert now[0] == [{"0"}, {str(steps)}, {str(2 * steps)}, {str(3 * steps)}]
    assert then[0] == [{"0"}, {"0"}, {str(steps)}, {str(2 * steps)}]
    assert now[1] == then[1], "the prompts, their order and the seeds are those of a run that does not draw ahead"
    assert [log["rollout/staleness"] for log in then[2]] == [0, steps, steps, steps]
    assert not any("rollout/staleness" in log for log in now[2])
    assert not threads()


@pytest.mark.checklist("V18")
def test_v18_the_replies_log_probs_are_those_of_the_policy_that_drew_them(tmp_path: Path, server: Served):
    made = ahead(tmp_path, server, learning_rate=0.01)
    starts: list[dict[str, torch.Tensor]] = []
    rollouts: list[Any] = []
    draw = made._draw

    def watched() -> Any:
        starts.append({name: each.detach().clone() for name, each in made.trainables.items()})
        rollouts.append(draw())
        return rollouts[-1]

    with patch.object(made, "_draw", watched):
        logs = trained(made)

    def gap(episodes: Episodes, policy: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            for name, each in made.trainables.items():
                each.copy_(policy[name])
            with made.adapters.using("default"):
                found = made.trunk.logprobs(made.trunk.hidden(episodes), episodes)
        return float((found.logps_BR - episodes.sampler_logps_BR)[episodes.mask_BR].abs().mean())

    for place, rollout in enumerate(rollouts):
        own, older = gap(rollout.episodes, starts[place]), gap(rollout.episodes, starts[max(place - 1, 0)])
        assert older < 1e-5, "drawn by the policy of one iteration before"
        assert place == 0 or own > 1e-3
        assert logs[place]["rollout/logprob_mismatch_mean"] == pytest.approx(own, rel=1e-3, abs=1e-5)
    assert all(abs(log["sampling/importance_sampling_ratio/mean"] - 1) > 1e-4 for log in logs[1:])


@pytest.mark.checklist("V18")
def test_v18_a_policy_that_does_not_change_learns_from_the_same_replies(tmp_path: Path, tiny_base: Path):
    found = []
    for number in (0, 1):
        with Served(tiny_base) as server:
            made = ahead(tmp_path / str(number), server, ahead=number, learning_rate=0.0, log_samples_every=1)
            logs = timeless(trained(made))
            texts = (tmp_path / str(number) / "rollouts.jsonl").read_text()
            found.append(([{k: x for k, x in log.items() if k != "rollout/staleness"} for log in logs], texts))
    assert found[0] == found[1] and len(found[0][0]) == 4


@pytest.mark.checklist("V18")
def test_v18_the_thread_takes_no_random_number(tmp_path: Path, server: Served):
    made = ahead(tmp_path, server)
    made.served.put(0)
    states = torch.get_rng_state(), random.getstate()
    made.served.start(made._prompts_at(1), made.args, **made._draw_of(1))
    with pytest.raises(RuntimeError, match="are to other prompts than this iteration's"):
        made.served.take(made._prompts_at(0).take([0]), step=4, device=torch.device("cpu"))
    replies = made.served.take(made._prompts_at(1), step=4, device=torch.device("cpu"))
    assert len(replies) == 8 and made.served.staleness == 4
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


@pytest.mark.checklist("V18")
def test_v18_the_number_of_processes_changes_no_reply(tmp_path: Path, server: Served):
    made = ahead(tmp_path, server)
    made.served.put(0)
    given = {"seed": 5}
    prompts = made.prompts.take([0, 1, 2, 3])
    made.served.start(prompts, made.args, **given)
    whole = made.served.take(prompts, step=4, device=torch.device("cpu")).responses()
    shared: dict[str, Any] = {"wait": threading.Barrier(2)}
    found: dict[int, Any] = {}
    policies = [made.served, copy.copy(made.served)]

    def work(rank: int) -> None:
        policy, part = policies[rank], made.prompts.take([0, 1, 2] if rank == 0 else [3])
        policy.these = Ranks(rank, shared)
        policy.start(part, made.args, first=3 * rank, **given)
        found[rank] = policy.take(part, step=4, device=torch.device("cpu")).responses()
        assert policy.staleness == 4 and not policy.awaited

    both = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    before = len(server.completions)
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    assert found[0] + found[1] == whole
    assert len(server.completions) == before + 4, "one process asks for all"


@pytest.mark.checklist("V18")
def test_v18_an_evaluation_waits_for_the_draw_and_loses_none_of_it(tmp_path: Path, tiny_base: Path):
    with Served(tiny_base) as server:
        plain = ahead(tmp_path / "plain", server)
        plain.train()
        by = drawers(server)
    options: dict[str, Any] = {"eval_dataset": PROMPTS, "eval_strategy": "steps", "eval_steps": 4}
    gate = threading.Event()
    with Served(tiny_base) as server:
        made = ahead(tmp_path / "evaluated", server, rollout_concurrency=1, **options)
        evaluate, complete = made.evaluate, server.complete

        def slowly(body: Any) -> Any:
            if len(server.completions) > 8:  # the second rollout is still drawn when the first evaluation begins
                gate.wait(60)
            return complete(body)

        def evaluating(*args: Any, **given: Any) -> Any:
            threading.Timer(0.5, gate.set).start()
            return evaluate(*args, **given)

        with patch.object(server, "complete", slowly), patch.object(made, "evaluate", evaluating):
            made.train()
        found = drawers(server)
        loads = [body["lora_name"] for path, body in server.heard if path.endswith("/load_lora_adapter")]
    assert made.served.server.restarts == 0
    assert [name.rpartition("-")[2] for name in loads] == ["0", "4", "8", "12", "16"]
    assert {seed: found[seed] for seed in by} == by and len(found) == 32 + 4
    assert_same(*[{name: each.detach() for name, each in one.trainables.items()} for one in (plain, made)])


# --- what is bounded


@pytest.mark.checklist("V18")
def test_v18_the_bound_on_log_probs_holds_where_the_policy_is_the_same(
    tmp_path: Path, server: Served, monkeypatch: pytest.MonkeyPatch
):
    """One that the user says holds for every iteration."""
    far: dict[str, Any] = {"learning_rate": 0.3, "max_grad_norm": 1e9, "max_ratio": None}
    logs = trained(ahead(tmp_path / "far", server, **far))
    assert max(log["rollout/logprob_mismatch_mean"] for log in logs) > 0.2
    with pytest.raises(UserError, match=r"iteration 1: the sampler's log-probs are .* expected 0\.15 at most"):
        ahead(tmp_path / "said", server, mismatch_tolerance=0.15, **far).train()
    monkeypatch.setattr(trainer_file, "sampler_tolerance", lambda asked, low_precision: 1e-9)
    with pytest.raises(UserError, match=r"iteration 0: the sampler's log-probs are"):
        ahead(tmp_path / "first", server).train()


# --- where it ends in between


@pytest.mark.checklist("V18")
@pytest.mark.parametrize(
    ("save_steps", "step"),
    [
        # at an iteration's end, after an evaluation by the newest policy; the next one takes what is drawn
        pytest.param(4, 8, id="between"),
        # between two minibatches, while the next replies are drawn
        pytest.param(5, 5, id="within"),
    ],
)
def test_v18_a_resumed_run_draws_with_the_policy_that_drew(tmp_path: Path, tiny_base: Path, save_steps: int, step: int):
    options: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": save_steps, "eval_dataset": PROMPTS[:1], "eval_strategy": "steps",
        "eval_steps": 4,
    }  # fmt: skip
    with Served(tiny_base) as server:
        whole = ahead(tmp_path, server, **options)
        logs = trained(whole)
        by = drawers(server)
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert json.loads((checkpoint / "ppo_ahead.json").read_text())["step"] == 4
    assert adapter_sha256(checkpoint / "ppo_ahead") != adapter_sha256(checkpoint)
    with Served(tiny_base) as server:
        again = ahead(tmp_path, server, **options)
        resumed = trained(again, resume_from_checkpoint=str(checkpoint))
        found = drawers(server)
    assert found == {seed: by[seed] for seed in found} and len(found) == 2 * 8 + 1, "two rollouts, and what is held out"
    assert timeless(resumed) == timeless(logs)[-len(resumed) :]
    assert_same(*[{name: each.detach() for name, each in made.trainables.items()} for made in (whole, again)])


@pytest.mark.checklist("V18")
@pytest.mark.parametrize(("save_steps", "step"), [(4, 8), (5, 5)], ids=["between", "within"])
def test_v18_a_checkpoint_that_does_not_say_who_draws_is_gone_on_from_in_words(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture, save_steps: int, step: int
):
    saving = {"save_strategy": "steps", "save_steps": save_steps}
    with Served(tiny_base) as server:
        ahead(tmp_path, server, ahead=0, **saving).train()
    found = tmp_path / f"checkpoint-{step}"
    assert found.is_dir() and not (found / "ppo_ahead.json").exists()
    with Served(tiny_base) as server, caplog.at_level(logging.WARNING):
        logs = trained(ahead(tmp_path, server, **saving), resume_from_checkpoint=str(found))
        assert drawn(server) == [{"8"}, {"8"}]
    assert len([each for each in caplog.messages if "does not say which policy draws ahead" in each]) == 1
    assert [log["rollout/staleness"] for log in logs[-2:]] == [0, 4]


def job(make_job: Any, url: str, name: str, plan: CheckpointPlan) -> StageJob:
    """Four iterations of one step."""
    method = {
        "rollout_engine": "vllm", "rollout_url": url, "rollout_wait": 0.2, "rollout_retries": 0, "rollout_ahead": 1,
        "rollout_batch_size": 4, "num_ppo_epochs": 1, "total_episodes": 16, "max_new_tokens": 4,
    }  # fmt: skip
    reward = RewardSource("function", lambda completions, **_: [float(len(str(each))) for each in completions])
    return make_job("ppo", name, method=method, train={"max_steps": None}, rewards=(reward,), checkpoints=plan)


@pytest.mark.checklist("V18")
def test_v18_a_server_that_is_lost_while_it_draws_ahead_stops_the_stage_where_its_replies_are_missing(make_job, base):
    plan = CheckpointPlan(share=None, minutes=None)
    with Served(base.path) as server:
        run_stage(whole := job(make_job, server.url, "whole", plan))
    with Served(base.path, faults=Faults(dies_after=10)) as server:
        cut = job(make_job, server.url, "cut", plan)
        with pytest.raises(Lost, match=r"stages\.cut\.rollout: http://127\.0\.0\.1.* cannot be reached"):
            run_stage(cut)
    # the third rollout is missing, whose replies the second policy draws
    (kept,) = (cut.output_dir / "checkpoints").glob("checkpoint-*")
    assert kept.name == "checkpoint-2" and json.loads((kept / "ppo_ahead.json").read_text())["step"] == 1
    assert not threads()
    with Served(base.path) as server:
        run_stage(job(make_job, server.url, "cut", plan))
        assert drawn(server, 4) == [{"1"}, {"2"}]
    assert adapter_sha256(cut.output_dir) == adapter_sha256(whole.output_dir)
    assert not list(cut.output_dir.rglob("served"))


@pytest.mark.checklist("V18")
@pytest.mark.parametrize("when", ["it trains", "it waits"])
def test_v18_a_signal_ends_the_run_and_the_thread_and_it_goes_on_as_if_it_had_not(
    tmp_path: Path, tiny_base: Path, when: str
):
    gate, leave_off = threading.Event(), Ahead.leave_off

    def train(server: Served, stop: bool = False) -> Any:
        folder = tmp_path / ("cut" if stop or (tmp_path / "cut").exists() else "whole")
        plan = Continuing("ppo", CheckpointPlan(share=None, minutes=None))
        made = ahead(folder, server, callbacks=[LogFile(folder / "log.jsonl"), plan], rollout_concurrency=1)
        found = newest(folder, "ppo", 1)
        step, take = made._minibatch, made.served.take

        def minibatch(rollout: Any, slot: int) -> None:
            if stop and when == "it trains" and made.state.global_step == 5:
                signal.raise_signal(signal.SIGTERM)
            step(rollout, slot)

        def taking(prompts: Any, **options: Any) -> Any:
            if stop and when == "it waits" and made.state.global_step == 8:
                signal.raise_signal(signal.SIGTERM)
            return take(prompts, **options)

        with patch.object(made, "_minibatch", minibatch), patch.object(made.served, "take", taking):
            made.train(None if found is None else str(found))
        return {name: each.detach().clone() for name, each in made.trainables.items()}

    def left_off(self: Ahead) -> None:
        leave_off(self)
        gate.set()

    with Served(tiny_base) as server:
        whole = train(server)
    step = 6 if when == "it trains" else 8
    said = f"ppo: stopped by SIGTERM at step {step} of 16, with a checkpoint"
    with Served(tiny_base) as server:
        complete = server.complete

        def slowly(body: Any) -> Any:
            if len(server.completions) > 18:  # in the middle of the third rollout
                gate.wait(60)
                server.faults.slow = 0.3
            return complete(body)

        with (
            patch.object(server, "complete", slowly),
            patch.object(Ahead, "leave_off", left_off),
            pytest.raises(Stopped, match=said),
            stopping.signals(),
            stopping.deferred(),
        ):
            train(server, stop=True)
        assert gate.is_set() and not threads()
        assert 18 < len(server.completions) < 24, "nothing more is asked for"
    with Served(tiny_base) as server:
        assert_same(train(server), whole)
        assert drawn(server) == [{"4"}, {"8"}]


@pytest.mark.checklist("V18")
def test_v18_an_answer_that_is_refused_while_it_trains_is_refused_where_it_would_be_learned_from(
    tmp_path: Path, server: Served
):
    made = ahead(tmp_path, server)
    step = made._minibatch

    def minibatch(rollout: Any, slot: int) -> None:
        made.served._draws().wait()  # it fails here, and nobody hears of it yet
        step(rollout, slot)

    def short(*_: Any) -> None:
        server.faults.short = 1

    server.faults.slow = 0.02
    with (
        patch.object(made, "_minibatch", minibatch),
        patch.object(made.samples, "write", short),
        pytest.raises(UserError, match=r"log-probs for [0-9] tokens"),
    ):
        made.train()
    assert made.state.global_step == 4 and not threads()


# --- what is refused, and what counts


@pytest.mark.checklist("V18")
def test_v18_it_needs_a_server_and_advantages_to_weigh(tmp_path: Path, make_job):
    with pytest.raises(UserError, match=r"rollout\.ahead: has no effect without engine"):
        trainer(tmp_path, rollout_ahead=1)
    found = stage_problems(make_job("ppo", method={"rollout_ahead": 1}, train={"max_steps": None}))
    assert any(re.fullmatch(r"stages\.ppo\.rollout\.ahead", each.where) for each in found)
    said: dict[str, Any] = {"rollout_engine": "vllm", "rollout_url": "http://x", "use_cpu": True, "report_to": "none"}
    with pytest.raises(ValueError, match="rollout_ahead is 2, expected 0 to 1"):
        PPOConfig(str(tmp_path), rollout_ahead=2, **said)
    method = {"rollout_ahead": 1, "rollout_engine": "vllm", "rollout_url": "http://x"}
    student = dataclasses.replace(make_job("ppo", "student", method=method, train={"max_steps": None}), kind="distill")
    assert any(each.where == "stages.student.rollout.ahead" for each in stage_problems(student))
    with pytest.raises(ValueError, match="rollout_ahead is 1, expected 0: nothing in a distillation"):
        DistillationConfig(str(tmp_path), rollout_ahead=1, **said)


def test_it_changes_what_is_learned_and_so_its_stages_key():
    assert counted({"rollout_ahead": 1}) == {"rollout_ahead": 1}
