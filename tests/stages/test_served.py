"""Rollouts by a server: what goes over, what comes back and is looked at, what is made up for, where it goes away."""

import copy
import dataclasses
import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.cli.keys import counted
from preftune.errors import Lost, UserError
from preftune.models.lineage import adapter_sha256
from preftune.models.loading import resolve_base
from preftune.models.lora import LoraSpec
from preftune.stages.check import stage_problems
from preftune.stages.grpo import GRPOConfig, GRPOTrainer
from preftune.stages.job import CheckpointPlan, StageJob
from preftune.stages.losses import on_policy_rows, sampling_weights
from preftune.stages.ppo.off_policy import corrected
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.ppo.rollout import seed_of
from preftune.stages.rloo import RLOOConfig
from preftune.stages.run import run_stage
from preftune.stages.serving.engines import ENGINES, Draw, listing
from preftune.stages.serving.place import Place, place_of
from preftune.stages.serving.server import RolloutServer
from preftune.stages.serving.settings import SERVER_GROUP

from .collecting import collect
from .served import Faults, Served, ask_at_once
from .test_on_policy_method import make as own_method
from .tiny_ppo import PROMPTS, TOKENIZER, Steps, letters, tiny, tiny_model, trainer

MISMATCH = "rollout/logprob_mismatch_mean"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_at_once(monkeypatch)


def served(folder: Path, server: Served, **options: Any) -> Any:
    """A PPO trainer on the tiny model whose rollouts that server draws."""
    asked = {"rollout_engine": "vllm", "rollout_url": server.url, "rollout_retries": 1, "rollout_wait": 5.0}
    return trainer(folder, **(asked | options))


def place(server: Served, **changes: Any) -> Place:
    return Place(where="stages.ppo.rollout", engine="vllm", url=server.url, retries=0, concurrency=4, **changes)


# --- what goes over


@pytest.mark.checklist("V1")
def test_v01_the_policy_goes_over_after_every_update_and_the_old_one_goes(tmp_path: Path, server: Served):
    made = served(tmp_path, server)
    steps = Steps()
    made.add_callback(steps)
    made.train()
    loads = [body["lora_name"] for path, body in server.heard if path.endswith("/load_lora_adapter")]
    unloads = [body["lora_name"] for path, body in server.heard if path.endswith("/unload_lora_adapter")]
    assert [name.rpartition("-")[2] for name in loads] == ["0", "4"]
    assert unloads == loads and not server.adapters
    # each iteration's replies are those of its own policy
    assert [body["model"] for body in server.completions] == [loads[0]] * 8 + [loads[1]] * 8
    gaps = [log[MISMATCH] for log in steps.logs if MISMATCH in log]
    assert len(gaps) == 2 and max(gaps) < 1e-5
    assert not list(tmp_path.rglob("preftune-*")), "no adapter is left behind"


@pytest.mark.checklist("V1")
def test_v01_an_adapters_name_says_run_content_and_step(tmp_path: Path, server: Served):
    made, other = served(tmp_path / "a", server), served(tmp_path / "b", server)
    first, same = made.served.put(0), other.served.put(0)
    assert first != same, "two runs on one server do not take each other's adapters away"
    assert made.served.put(3) == first, "what has not changed is not loaded again"
    with torch.no_grad():
        made.method.policy[0].add_(0.1)
    second = made.served.put(3)
    assert second != first and second.endswith("-step-3")
    with torch.no_grad():
        made.method.policy[0].add_(0.1)
    third = made.served.put(3)
    assert third != second and third.endswith("-step-3"), "another content has another name, at the same step too"
    assert sorted(server.adapters) == sorted([third, same])


@pytest.mark.checklist("V1")
def test_v01_the_name_that_an_adapter_has_is_anothers(tmp_path: Path, server: Served):
    made = served(tmp_path, server)
    made.adapters.save("default", tmp_path / "other")
    server.load(
        {"lora_name": made.served._named(0, made.adapters.digest("default")).name, "lora_path": str(tmp_path / "other")}
    )
    with pytest.raises(UserError, match=r"says that preftune-.* is .*/other, expected"):
        made.served.put(0)


@pytest.mark.checklist("V1")
def test_v01_what_a_run_that_was_cut_off_left_goes(tmp_path: Path, server: Served):
    made = served(tmp_path, server)
    left = made.served.put(0)
    again = served(tmp_path, server)
    with torch.no_grad():
        again.method.policy[0].add_(0.1)
    name = again.served.put(4)
    assert list(server.adapters) == [name] and left != name
    assert [each.name for each in made.served.folder.iterdir()] == [name]


class Ranks:
    """Two processes as two threads, which wait for each other as processes do."""

    def __init__(self, rank: int, shared: dict[str, Any]) -> None:
        self.rank, self.count, self.shared = rank, 2, shared

    def gathered(self, found: list[Any]) -> list[Any]:
        self.shared[f"part {self.rank}"] = found
        self.shared["wait"].wait(20)
        both = [*self.shared["part 0"], *self.shared["part 1"]]
        self.shared["wait"].wait(20)
        return both

    def by_first(self, work: Any) -> Any:
        if self.rank == 0:
            self.shared["done"] = work()
        self.shared["wait"].wait(20)
        found = self.shared["done"]
        self.shared["wait"].wait(20)
        return found


@pytest.mark.checklist("V4")
def test_v04_the_number_of_processes_changes_no_reply(tmp_path: Path, server: Served):
    one = served(tmp_path, server)
    prompts = one.prompts.take([0, 1, 2, 3])
    asked = {"step": 0, "seed": 5, "device": torch.device("cpu")}
    whole = one.served.generate(prompts, one.args, **asked).responses()
    shared: dict[str, Any] = {"wait": threading.Barrier(2)}
    found: dict[int, Any] = {}

    def work(rank: int) -> None:
        policy = one.served if rank == 0 else served_copy
        policy.these = Ranks(rank, shared)
        part = one.prompts.take([0, 1, 2] if rank == 0 else [3])
        found[rank] = policy.generate(part, one.args, first=3 * rank, **asked).responses()

    served_copy = copy.copy(one.served)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    before = len(server.completions)
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert found[0] + found[1] == whole
    assert len(server.completions) == before + 4, "one process asks for all"


# --- what comes back


@pytest.mark.checklist("V2")
@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"stale": "preftune-1-2-step-3"}, "is that of preftune-1-2-step-3, expected preftune-.*: it is stale"),
        ({"short": 1}, "has [0-9] log-probs for [0-9] tokens"),
        ({"ends": 97}, "ended with token 97, expected one of"),
        ({"long": True}, "goes on after a token that ends it"),
    ],
)
def test_v02_an_answer_that_is_not_what_was_asked_for_is_refused(
    tmp_path: Path, tiny_base: Path, faults: dict[str, Any], said: str
):
    with Served(tiny_base) as server:
        made = served(tmp_path, server, max_new_tokens=200 if "stale" not in faults and "short" not in faults else 6)
        server.faults = Faults(**faults)
        with pytest.raises(UserError, match=said):
            made.train()
        assert made.state.global_step == 0


def answer(**changes: Any) -> dict[str, Any]:
    """A completion of three tokens."""
    choice = {
        "index": 0, "text": "", "logprobs": {"token_logprobs": [-1.0, -2.0, -3.0]}, "finish_reason": "length",
        "token_ids": [5, 6, 7], "prompt_token_ids": [1, 2],
    }  # fmt: skip
    return {"model": "a", "choices": [choice | changes]}


@pytest.mark.checklist("V2")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_ids": [5, 6, 700]}, "has token 700, and the base has 300"),
        ({"prompt_token_ids": [1, 3]}, "is one to another prompt"),
        ({"logprobs": {"token_logprobs": [-1.0, 0.5, -3.0]}}, "has a log-prob that is none"),
        ({"logprobs": {"token_logprobs": [-1.0, math.nan, -3.0]}}, "has a log-prob that is none"),
        ({"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -2.0]}}, "was cut off at 2 tokens, expected 3"),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "has 0 tokens, expected 1 to 3"),
        ({"token_ids": [5] * 4, "logprobs": {"token_logprobs": [-1.0] * 4}}, "has 4 tokens, expected 1 to 3"),
        ({"finish_reason": "stop"}, "ended with token 7, expected one of 9"),
    ],
)
def test_v02_each_answer_is_looked_at(changes: dict[str, Any], said: str):
    server = RolloutServer(Place("rollout", "vllm", "http://x"), vocabulary=300)
    draw = Draw(3, (9,))
    server._check(server.engine.drawn(answer()), "a", [1, 2], draw)
    with pytest.raises(UserError, match=said):
        server._check(server.engine.drawn(answer(**changes)), "a", [1, 2], draw)


@pytest.mark.checklist("V2")
def test_v02_a_reply_may_end_at_the_last_token_that_it_may_have():
    server = RolloutServer(Place("rollout", "vllm", "http://x"))
    server._check(server.engine.drawn(answer(finish_reason="stop")), "a", [1, 2], Draw(3, (7,)))
    server._check(server.engine.drawn(answer(finish_reason="length")), "a", [1, 2], Draw(3, (7,)))


# --- whose base it is


@pytest.mark.checklist("V3")
def test_v03_another_base_is_refused_before_anything_trains(tmp_path: Path, tiny_base: Path):
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    with Served(tmp_path / "other") as server, pytest.raises(UserError, match="it serves another base"):
        served(tmp_path, server)


@pytest.mark.checklist("V3")
def test_v03_a_base_of_the_same_name_and_other_content_is_refused(tmp_path: Path, tiny_base: Path):
    """Even one whose log-probs could not be told from ours."""
    model = tiny_model()
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 1e-4
    model.save_pretrained(tmp_path / "other")
    adapters = tiny()
    adapters.base = resolve_base(str(tiny_base))
    with Served(tmp_path / "other") as server, pytest.raises(UserError, match="whose content is not that of"):
        served(tmp_path, server, model=adapters)
    with Served(tiny_base) as server:
        assert served(tmp_path, server, model=adapters).served is not None


@pytest.mark.checklist("V3")
def test_v03_a_server_that_loads_an_adapter_and_does_not_use_it_is_refused(tmp_path: Path, server: Served):
    made = served(tmp_path, server, model=tiny(strength=0.5))
    server.faults.deaf = True
    with pytest.raises(UserError, match=r"changes the base of .* otherwise than ours"):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.checklist("V3")
def test_v03_prompts_that_do_not_fit_the_servers_context_are_refused(tmp_path: Path, server: Served):
    server.longest = 10
    with pytest.raises(UserError, match="takes 10 tokens, and prompt and reply have up to"):
        served(tmp_path, server)


@pytest.mark.checklist("V3")
@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "has ranks or scalings of its own by layer"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "trains stacked weights"),
    ],
)
def test_v03_an_adapter_that_servers_do_not_take_is_refused_by_its_settings(make_job, lora: dict[str, Any], said: str):
    method = {"rollout_engine": "vllm", "rollout_url": "http://127.0.0.1:1"}
    job = make_job("ppo", lora=LoraSpec(r=4, alpha=8, **lora), method=method, train={"max_steps": None})
    assert any(said in each.problem and each.where == "stages.ppo.rollout" for each in stage_problems(job))


# --- how it is drawn


def reply_log_probs(server: Served, draw: Draw, prompt: list[int]) -> tuple[list[int], list[float]]:
    found = RolloutServer(place(server)).sample("base", [prompt], [7], draw)
    return found.tokens[0], found.logprobs[0]


@pytest.mark.checklist("V4")
@pytest.mark.parametrize(
    ("draw", "processed"),
    [
        ({}, False),
        ({}, True),
        ({"temperature": 0.5}, True),
        ({"top_k": 3}, False),
        ({"top_p": 0.5}, False),
        ({"temperature": 0.0}, False),
    ],
)
def test_v04_log_probs_are_those_of_the_policy_at_the_draws_temperature_before_any_cut(
    server: Served, draw: dict[str, Any], processed: bool
):
    server.processed = processed
    prompt = TOKENIZER("one two")["input_ids"]
    asked = Draw(8, (TOKENIZER.eos_token_id,), **draw)
    tokens, logprobs = reply_log_probs(server, asked, prompt)
    logits = server.logits([*prompt, *tokens], "base")[len(prompt) - 1 : -1]
    own = (logits / (asked.temperature or 1.0)).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    assert torch.allclose(own, torch.tensor(logprobs), atol=1e-5)


@pytest.mark.checklist("V4")
@pytest.mark.parametrize(
    ("draw", "processed", "said", "remedy"),
    [
        ({"temperature": 0.5}, False, "at temperature 1, and the draw's is 0.5", "processed_logprobs, or set temper"),
        ({"top_k": 3}, True, "says those after the cut", "raw_logprobs .* leave top_k and top_p out"),
        ({"top_p": 0.5, "temperature": 0.5}, True, "has none for a cut", "leave top_k and top_p out"),
        ({"top_p": 0.5, "temperature": 0.5}, False, "has none for a cut", "leave top_k and top_p out"),
    ],
)
def test_v04_a_server_whose_log_probs_mean_something_else_is_refused(
    server: Served, draw: dict[str, Any], processed: bool, said: str, remedy: str
):
    server.processed = processed
    with pytest.raises(UserError, match=said) as found:
        reply_log_probs(server, Draw(8, (1,), **draw), TOKENIZER("one two")["input_ids"])
    assert re.search(remedy, found.value.remedy)
    assert not server.completions


@pytest.mark.checklist("V4")
def test_v04_a_request_says_every_setting_of_the_sampling(tmp_path: Path, server: Served):
    made = served(tmp_path, server, top_k=3, max_new_tokens=5)
    collect(made)
    ends = list(made.served.ends)
    said = {
        "max_tokens": 5, "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 3, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": True, "stop_token_ids": ends,
        "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip
    for body in server.completions:
        assert {name: body[name] for name in said} == said
        assert body.keys() - said.keys() == {"model", "prompt", "seed"}
    seeds = {body["seed"] for body in server.completions}
    drawn = seed_of(made.args.seed, "rollout", 0, 0)
    assert seeds == {seed_of(drawn, "reply", row) for row in range(8)}


@pytest.mark.checklist("V4")
def test_v04_equal_prompts_get_replies_of_their_own(tmp_path: Path, server: Served):
    made = served(tmp_path, server, prompts=[{"prompt": "hello"}])
    found = collect(made).rollout.episodes.responses()
    assert len({tuple(row) for row in found}) > 4


def test_sglang_is_asked_in_its_own_words_and_its_answers_are_read():
    engine = ENGINES["sglang"]
    body = engine.draw("a", [1, 2], Draw(5, (7, 8), temperature=0.5, top_p=0.9), 2**40 + 3)
    assert body["input_ids"] == [1, 2] and body["lora_path"] == "a" and body["return_logprob"] is True
    said = {
        "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "stop_token_ids": [7, 8],
        "ignore_eos": False, "sampling_seed": 3, "min_p": 0.0, "n": 1,
    }  # fmt: skip
    assert {name: body["sampling_params"][name] for name in said} == said
    meta = {
        "finish_reason": {"type": "stop", "matched": 7},
        "output_token_logprobs": [[-0.5, 4, None], [-0.25, 7, None]],
    }
    drawn = engine.drawn({"text": "x", "output_ids": [4, 7], "meta_info": meta})
    assert (drawn.tokens, drawn.logprobs, drawn.ended) == ([4, 7], [-0.5, -0.25], True)
    told = {"input_token_logprobs": [[None, 1, None], [-0.5, 2, None]]}
    assert engine.scores({"meta_info": told}, [1, 2]) == [-0.5]
    assert engine.not_ours(Draw(5, (7,), top_k=2, temperature=0.5), True) is None
    assert engine.not_ours(Draw(5, (7,), temperature=0.5), False) is not None


# --- what is made up for


LOG_RATIO = torch.tensor([[0.5, -0.5, 2.0], [0.1, 0.1, 9.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
E = math.e


@pytest.mark.checklist("V5")
@pytest.mark.parametrize(
    ("mode", "low", "high", "wanted"),
    [
        ("token_truncate", None, 3.0, [[E**0.5, E**-0.5, 3.0], [E**0.1, E**0.1, 1.0]]),
        ("token_truncate", 0.7, None, [[E**0.5, 0.7, E**2], [E**0.1, E**0.1, 1.0]]),
        ("token_mask", None, 3.0, [[E**0.5, E**-0.5, 0.0], [E**0.1, E**0.1, 1.0]]),
        ("token_mask", 0.7, 3.0, [[E**0.5, 0.0, 0.0], [E**0.1, E**0.1, 1.0]]),
        ("sequence_truncate", None, 3.0, [[3.0], [E**0.2]]),
        ("sequence_mask", None, 3.0, [[0.0], [E**0.2]]),
        ("sequence_mask", 1.3, None, [[E**2], [0.0]]),
    ],
)
def test_v05_weights_by_hand(mode: str, low: float | None, high: float | None, wanted: list[list[float]]):
    found = sampling_weights(LOG_RATIO, MASK, mode=mode, clip_min=low, clip_max=high)
    assert torch.allclose(found, torch.tensor(wanted))


@pytest.mark.checklist("V5")
def test_v05_rows_that_are_far_from_the_policy_are_left_out_where_they_are_to_become_less_likely():
    """Three tokens of 0.3 nats each, one of which does not count, on both sides of a threshold of 0.25 and of 0.35."""
    now = torch.tensor([[-1.3, -1.3, -9.0]] * 3)
    drawn, mask = torch.full_like(now, -1.0), torch.tensor([[True, True, False]] * 3)
    advantages = torch.tensor([[-1.0] * 3, [1.0] * 3, [0.0, -1.0, 5.0]])
    for threshold, wanted in ((0.25, [0.0, 1.0, 0.0]), (0.35, [1.0, 1.0, 1.0])):
        found = on_policy_rows(now, drawn, advantages, mask, threshold=threshold)
        assert found.squeeze(1).tolist() == wanted


@pytest.mark.checklist("V5")
def test_v05_advantages_are_weighed_by_the_trainers_log_probs_over_the_servers(tmp_path: Path, server: Served):
    made = served(tmp_path, server)
    rollout = collect(made).rollout
    off = dataclasses.replace(
        rollout.episodes, sampler_logps_BR=rollout.episodes.sampler_logps_BR - 0.01 * rollout.episodes.mask_BR
    )
    moved = dataclasses.replace(rollout, episodes=off)
    lengths_B = rollout.episodes.length_B
    found, metrics = corrected(moved, made.args, made.reduce)
    weight_B1 = (0.01 * lengths_B)[:, None].exp()
    assert torch.allclose(found.advantages_BR, rollout.advantages_BR * weight_B1, atol=1e-5)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(float(weight_B1.max()), abs=1e-5)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(float(weight_B1.min()), abs=1e-5)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(weight_B1.mean()), abs=1e-5)
    assert metrics["sampling/masked"] == 0
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.01, abs=1e-4)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.01, abs=1e-4)
    made.args.importance_sampling_clip_max = 1.01
    found, metrics = corrected(moved, made.args, made.reduce)
    assert metrics["sampling/masked"] == pytest.approx(float((weight_B1 > 1.01).float().mean()))
    assert not found.advantages_BR[(weight_B1 > 1.01).squeeze(1)].any()
    made.args.importance_sampling_correction = False
    assert corrected(moved, made.args, made.reduce) == (moved, {})


@pytest.mark.checklist("V5")
def test_v05_log_probs_that_are_too_far_from_the_trainers_stop_the_stage(tmp_path: Path, server: Served):
    made = served(tmp_path, server, mismatch_tolerance=1e-9)
    with pytest.raises(UserError, match=r"the sampler's log-probs are .* nats per token from the training forward's"):
        made.train()


@pytest.mark.checklist("V5")
def test_v05_grpos_first_step_does_not_measure_what_the_weights_need(tmp_path: Path, server: Served):
    asked = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "rollout_batch_size": 8,
        "num_generations": 4, "max_new_tokens": 6, "total_episodes": 16, "learning_rate": 1e-3, "seed": 1,
    }  # fmt: skip
    args = GRPOConfig(str(tmp_path), rollout_engine="vllm", rollout_url=server.url, **asked)
    assert not args.first_step_measures() and GRPOConfig(str(tmp_path), **asked).first_step_measures()
    made = GRPOTrainer(tiny(), letters, args, PROMPTS, processing_class=TOKENIZER)
    steps = Steps()
    made.add_callback(steps)
    made.train()
    logs = [log for log in steps.logs if MISMATCH in log]
    assert len(logs) == 2 and all(log[MISMATCH] < 1e-5 for log in logs)
    assert all(log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3) for log in logs)


@pytest.mark.checklist("V5")
def test_v05_a_method_of_ones_own_is_weighed_as_those_that_come_with_it(tmp_path: Path, server: Served):
    """Every reply is beyond the bound, so nothing is learned, whatever the method's loss is."""
    options = {"rollout_engine": "vllm", "rollout_url": server.url, "mismatch_tolerance": 9.0}
    masked = own_method(tmp_path / "masked", importance_sampling_clip_max=1e-9, **options)
    before = masked.adapters.digest("default")
    masked.train()
    assert masked.adapters.digest("default") == before
    plain = own_method(tmp_path / "plain", **options)
    plain.train()
    assert plain.adapters.digest("default") != before


@pytest.mark.checklist("V5")
def test_v05_one_weight_a_token_is_refused_where_a_reply_is_one_action(tmp_path: Path):
    with pytest.raises(ValueError, match="importance_sampling_mode is 'token_mask', expected sequence_mask"):
        RLOOConfig(str(tmp_path), rollout_engine="vllm", rollout_url="http://x", importance_sampling_mode="token_mask")


# --- where it goes away


def trained(made: Any, **asked: Any) -> dict[str, torch.Tensor]:
    made.train(**asked)
    return {name: each.detach().clone() for name, each in made.trainables.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.checklist("V6")
def test_v06_a_server_that_dies_in_the_middle_and_comes_back_changes_nothing(tmp_path: Path, tiny_base: Path):
    with Served(tiny_base) as server:
        whole = trained(served(tmp_path / "whole", server))
        asked = {body["seed"]: body["prompt"] for body in server.completions}
    with Served(tiny_base, faults=Faults(dies_after=11, back=0.3)) as server:
        made = served(tmp_path / "cut", server)
        found = trained(made)
        assert server.deaths == 1 and made.served.server.restarts == 1
        loads = [body["lora_name"] for path, body in server.heard if path.endswith("/load_lora_adapter")]
        assert len(loads) == 3 and loads[1] == loads[2], "it had forgotten the adapter"
        assert {body["seed"]: body["prompt"] for body in server.completions} == asked
    assert same(found, whole)


@pytest.mark.checklist("V6")
def test_v06_a_server_that_comes_back_with_another_base_is_refused(tmp_path: Path, tiny_base: Path):
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    with Served(tiny_base, faults=Faults(dies_after=11, back=0.1, another=tmp_path / "other")) as server:
        made = served(tmp_path, server)
        with pytest.raises(UserError, match="it serves another base"):
            made.train()
        assert made.state.global_step == 4


@pytest.mark.checklist("V6")
def test_v06_a_server_that_has_forgotten_its_adapter_is_given_it_again(tmp_path: Path, server: Served):
    made = served(tmp_path, server)
    name = made.served.put(0)
    server.adapters.clear()
    collect(made)
    assert list(server.adapters) == [name]


@pytest.mark.checklist("V7")
def test_v07_a_server_that_stays_away_stops_the_stage_and_it_goes_on_as_if_it_had_not(tmp_path: Path, tiny_base: Path):
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "total_episodes": 24, "rollout_wait": 0.2}
    with Served(tiny_base) as server:
        whole = trained(served(tmp_path / "whole", server, **options))
    with Served(tiny_base, faults=Faults(dies_after=19)) as server:
        made = served(tmp_path / "cut", server, **options)
        with pytest.raises(UserError) as found:
            made.train()
    assert found.value.where == "rollout" and "cannot be reached" in found.value.problem
    assert "run the same command again" in found.value.remedy
    with Served(tiny_base) as server:
        again = served(tmp_path / "cut", server, **options)
        assert same(trained(again, resume_from_checkpoint=True), whole)
        assert {body["model"].rpartition("-")[2] for body in server.completions} == {"8"}


@pytest.mark.checklist("V7")
def test_v07_a_server_that_takes_no_adapters_says_how_it_is_started(tmp_path: Path, server: Served):
    server.runtime_lora = False
    made = served(tmp_path, server)
    with pytest.raises(UserError, match="start the server so that adapters can be loaded while it runs"):
        made.train()


@pytest.mark.checklist("V7")
def test_v07_a_request_that_takes_too_long_is_no_answer(tmp_path: Path, server: Served):
    made = served(tmp_path, server, rollout_timeout=0.2, rollout_retries=0, rollout_wait=0.2)
    made.served.put(0)
    server.faults.slow = 1.0
    with pytest.raises(UserError, match=r"cannot be reached .*Timeout"):
        collect(made)


def test_nobody_listens(tmp_path: Path):
    with pytest.raises(UserError, match=r"http://127.0.0.1:9.*cannot be reached"):
        trainer(tmp_path, rollout_engine="vllm", rollout_url="http://127.0.0.1:9", rollout_retries=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rollout_engine": "vllm"}, "rollout.url: is None"),
        ({"rollout_engine": "vllm", "rollout_url": "http://a:b@x"}, "holds a user name"),
        ({"rollout_engine": "vllm", "rollout_url": "http://x/v1"}, "whose end we add"),
        ({"rollout_url": "http://x"}, "rollout.url: has no effect without engine"),
        ({"rollout_wait": 3.0}, "rollout.wait: has no effect without engine"),
        ({"rollout_engine": "vllm", "rollout_url": "http://x", "rollout_api_key_env": "NO_SUCH"}, "is not set"),
    ],
)
def test_settings_of_a_server_that_cannot_be(settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        place_of(settings, "rollout")


def test_where_a_server_is_changes_no_result_and_who_draws_does():
    said = {name: "x" for name in SERVER_GROUP.values()}
    assert counted(said | {"importance_sampling_mode": "x"}).keys() == {"rollout_engine", "importance_sampling_mode"}


def test_the_evaluation_of_held_out_prompts_is_the_servers_too(tmp_path: Path, server: Served):
    own = trainer(tmp_path / "own", eval_dataset=PROMPTS, eval_strategy="steps", eval_steps=4)
    made = served(tmp_path / "served", server, eval_dataset=PROMPTS, eval_strategy="steps", eval_steps=4)
    before = len(server.completions)
    found = made.evaluate()
    assert len(server.completions) == before + len(PROMPTS)
    assert found.keys() == own.evaluate().keys()


@pytest.mark.checklist("V7")
def test_v07_a_stage_that_loses_its_server_writes_a_checkpoint_where_it_stands(make_job, base):
    """The recipe's plan would have written none before the stage's end."""

    def job(url: str, name: str) -> StageJob:
        method = {
            "rollout_engine": "vllm", "rollout_url": url, "rollout_wait": 0.2, "rollout_retries": 0,
            "rollout_batch_size": 4, "num_ppo_epochs": 1, "total_episodes": 12, "max_new_tokens": 4,
        }  # fmt: skip
        reward = RewardSource("function", lambda completions, **_: [float(len(str(each))) for each in completions])
        plan = CheckpointPlan(share=None, minutes=None)
        return make_job("ppo", name, method=method, train={"max_steps": None}, rewards=(reward,), checkpoints=plan)

    with Served(base.path) as server:
        run_stage(whole := job(server.url, "whole"))
    with Served(base.path, faults=Faults(dies_after=10)) as server:
        cut = job(server.url, "cut")
        with pytest.raises(Lost, match=r"stages\.cut\.rollout: http://127\.0\.0\.1.* cannot be reached"):
            run_stage(cut)
    kept = cut.output_dir / "checkpoints"
    assert [each.name for each in kept.glob("checkpoint-*")] == ["checkpoint-2"]
    with Served(base.path) as server:
        run_stage(job(server.url, "cut"))
        assert len(server.completions) == 4, "only the iteration that was lost is drawn"
    assert adapter_sha256(cut.output_dir) == adapter_sha256(whole.output_dir)
    assert not list(cut.output_dir.rglob("served"))


def shape(given: Any) -> Any:
    """The keys and types of an answer: of lists the first entry's, of tables by token one entry's."""
    if isinstance(given, dict):
        if given and all(re.fullmatch(r"\d+", key) for key in given):
            return {"a token": shape(next(iter(given.values())))}
        by_token = {"top_logprobs": [{"a token": "number"}]}
        return {key: by_token[key] if key in by_token and each else shape(each) for key, each in given.items()}
    if isinstance(given, list):
        told = [each for each in given if each is not None]
        return [shape(told[0])] if told else []
    return "number" if isinstance(given, int | float) else type(given).__name__


def missing(wanted: Any, found: Any, place: str = "") -> list[str]:
    """What the real answer has and the stand-in's has not, or as something else."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            line
            for key in wanted
            for line in (missing(wanted[key], found[key], f"{place}.{key}") if key in found else [f"{place}.{key}"])
        ]
    if isinstance(wanted, list) and isinstance(found, list):
        return missing(wanted[0], found[0], f"{place}[]") if wanted and found else []
    return [] if wanted == found else [f"{place}: {wanted}, not {found}"]


@pytest.mark.parametrize("what", ["models", "draw", "ended", "score", "spread", "load", "unload"])
def test_the_stand_ins_answers_have_the_shape_of_vllms(server: Served, tmp_path: Path, what: str):
    recorded = json.loads((Path(__file__).parent / "recorded_vllm.json").read_text(encoding="utf-8"))
    tiny().save("default", tmp_path)
    engine, ids = ENGINES["vllm"], [1, 2, 3]
    answers: dict[str, tuple[int, Any] | None] = {
        "load": server.load({"lora_name": "a", "lora_path": str(tmp_path)}),
        "models": server.models(),
        "draw": server.complete(engine.draw("a", ids, Draw(3, (258,)), 7)),
        "score": server.complete(engine.score("a", ids)),
        "spread": server.complete(engine.spread(ids, 1.0)),
    }
    drawn = answers["draw"]
    assert drawn is not None
    second = drawn[1]["choices"][0]["token_ids"][1]
    answers["ended"] = server.complete(engine.draw("a", ids, Draw(3, (second,)), 7))
    answers["unload"] = server.unload({"lora_name": "a"})
    found, real = answers[what], recorded[what]
    assert found is not None and found[0] == real["status"]
    assert not missing(shape(real["body"]), shape(found[1]))


def test_what_vllm_really_answers_is_read():
    """Its own answers (SmolLM2-135M in bf16), as they were recorded."""
    recorded = json.loads((Path(__file__).parent / "recorded_vllm.json").read_text(encoding="utf-8"))
    engine, ids = ENGINES["vllm"], recorded["ids"]
    drawn = engine.drawn(recorded["draw"]["body"])
    server = RolloutServer(Place("rollout", "vllm", "http://x"), vocabulary=49152)
    server._check(drawn, "a", ids, Draw(3, (2,)))
    assert len(drawn.tokens) == 3 and recorded["draw_same"] == drawn.tokens
    ended = engine.drawn(recorded["ended"]["body"])
    server._check(ended, "a", ids, Draw(3, (drawn.tokens[1],)))
    assert ended.tokens == drawn.tokens[:2] and ended.ended
    assert len(engine.scores(recorded["score"]["body"], ids)) == len(ids) - 1
    one, two = (engine.spreads(recorded[each]["body"]) for each in ("spread", "spread2"))
    assert len(one) == 5 and one == pytest.approx(two), "as it starts its log-probs do not know of the temperature"
    assert recorded["unknown"]["status"] == 404 and engine.forgotten in str(recorded["unknown"]["body"])
    assert recorded["too_long"]["status"] == 400
    assert listing(recorded["models"]["body"]).adapters == {"a": "ADAPTER"}
