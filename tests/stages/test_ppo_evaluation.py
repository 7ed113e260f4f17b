"""Held-out prompts while PPO trains: what is measured, when, and that nothing else changes by it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.errors import UserError
from preftune.models.generate import sample
from preftune.models.tokens import end_token_ids
from preftune.stages.ppo.evaluation import HeldOut
from preftune.stages.ppo.rollout import Prompts, seed_of
from preftune.stages.ppo.trainer import PPOTrainer
from preftune.stages.run import run_stage

from .tiny_ppo import PROMPTS, TOKENIZER, letters, move_policy, settings, tiny, trainer

HELD = [{"prompt": text} for text in ("b", "good day", "why?", "four five six", "z")]


def evaluated(made: PPOTrainer) -> list[dict[str, Any]]:
    """The evaluations that were logged, without their times."""
    rows = [each for each in made.state.log_history if "eval_objective/kl" in each]
    return [{name: value for name, value in row.items() if name != "eval_runtime"} for row in rows]


def test_it_is_the_mean_over_one_response_to_each_prompt(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=HELD)
    assert made.evaluate()["eval_objective/kl"] == 0  # the policy is its reference
    move_policy(made)
    found = made.evaluate()
    ids = [list(TOKENIZER(row["prompt"])["input_ids"]) for row in HELD]
    drawn = sample(
        made.adapters, "default", ids, max_new_tokens=6, seed=seed_of(1, "evaluation"),
        eos_token_id=end_token_ids(TOKENIZER, made.adapters.model), pad_token_id=TOKENIZER.pad_token_id,
    )  # fmt: skip
    texts = [TOKENIZER.decode(each, skip_special_tokens=True) for each in drawn.tokens]
    kls = []
    for prompt, reply in zip(ids, drawn.tokens, strict=True):
        logps = []
        for role in ("default", "ref"):
            with torch.no_grad(), made.adapters.using(role):
                logits = made.adapters.model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).sum().item())
        kls.append(logps[0] - logps[1])
    assert found["eval_objective/scores"] == pytest.approx(sum(letters(texts)) / 5, abs=1e-6)
    assert found["eval_objective/kl"] == pytest.approx(sum(kls) / 5, abs=1e-4) and found["eval_objective/kl"] != 0
    assert found["eval_rollout/length"] == pytest.approx(sum(map(len, drawn.tokens)) / 5)
    assert found["eval_rollout/eos_rate"] == sum(drawn.finished) / 5 and found["eval_runtime"] > 0
    reward = found["eval_objective/scores"] - made.args.kl_coef * found["eval_objective/kl"]
    assert found["eval_objective/rlhf_reward"] == pytest.approx(reward)
    other = made.evaluate([{"prompt": "other"}], metric_key_prefix="test")
    assert set(other) == {name.replace("eval_", "test_", 1) for name in found}


def test_it_comes_at_the_end_of_the_iteration_in_which_its_step_fell_and_changes_no_training(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", learning_rate=0.05, total_episodes=24)
    plain.train()
    settings = {"eval_strategy": "steps", "eval_steps": 6, "eval_on_start": True}
    made = trainer(tmp_path / "with", learning_rate=0.05, total_episodes=24, eval_dataset=HELD, **settings)
    made.train()
    # iterations end at steps 4, 8 and 12; steps 6 and 12 are to be evaluated at
    assert [each["step"] for each in evaluated(made)] == [0, 8, 12]
    assert made.adapters.digest("default") == plain.adapters.digest("default")
    kept = [each for each in made.state.log_history if "objective/kl" in each]
    alike = [each for each in plain.state.log_history if "objective/kl" in each]
    assert [each["objective/scores"] for each in kept] == [each["objective/scores"] for each in alike]
    kls = [each["eval_objective/kl"] for each in evaluated(made)]
    assert kls[0] == 0 and kls[1] != 0 and len(set(kls)) == 3


@pytest.mark.checklist("P23")
def test_p23_a_resumed_run_evaluates_what_the_whole_run_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 0.05, "total_episodes": 24, "save_strategy": "steps", "save_steps": 6}
    options |= {"eval_strategy": "steps", "eval_steps": 5}
    whole = trainer(tmp_path, eval_dataset=HELD, **options)
    whole.train()
    resumed = trainer(tmp_path, eval_dataset=HELD, **options)
    # between two minibatches: the step to evaluate at has been, its iteration is not over and has no other one
    resumed.train(str(tmp_path / "checkpoint-6"))
    assert evaluated(resumed) == evaluated(whole)
    assert [each["step"] for each in evaluated(whole)] == [8, 12]
    assert resumed.adapters.digest("default") == whole.adapters.digest("default")


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_what_is_measured_does_not_depend_on_the_number_of_processes(tmp_path: Path, processes: int) -> None:
    made = trainer(tmp_path, eval_dataset=HELD)
    move_policy(made)
    alone: list[torch.Tensor] = []
    measure(made, alone.append, 0, 1)
    parts: list[torch.Tensor] = []
    for process in range(processes):
        measure(made, parts.append, process, processes)
    torch.testing.assert_close(torch.stack(parts).sum(0), alone[0], atol=1e-5, rtol=0)


def measure(made: PPOTrainer, told: Callable[[torch.Tensor], None], process: int, processes: int) -> None:
    """As that process of so many would; `told` gets its sums."""

    class Share:
        world_size, process_index = processes, process

        def __getattr__(self, name: str) -> Any:
            return getattr(made.args, name)

    def reduce(sums: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        told(sums)
        return sums

    assert made.held_out is not None
    held = HeldOut(made.held_out, made.adapters, made.tokenizer, made.scoring, made.method, reduce)
    share: Any = Share()
    held.measure(share, 0.1)


def test_a_running_scale_learns_nothing_of_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=HELD, reward_scale="running", reward_clip=0.01)
    made.scoring.running.update(torch.tensor([4.0, 8.0, 80.0]))
    before = made.scoring.running.state()
    plain = trainer(tmp_path, eval_dataset=HELD).evaluate()
    assert made.evaluate()["eval_objective/scores"] == plain["eval_objective/scores"] > 0.01
    assert made.scoring.running.state() == before


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval_strategy is 'steps', and no eval_dataset is given"):
        trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    with pytest.raises(UserError, match="eval_dataset: is dict of several datasets, expected one"):
        trainer(tmp_path, eval_dataset={"a": HELD})
    with pytest.raises(UserError, match=r"eval_dataset row 0: its columns are text"):
        trainer(tmp_path, eval_dataset=[{"text": "a"}])
    with pytest.raises(UserError, match="no eval_dataset is given"):
        PPOTrainer(tiny(), letters, settings(tmp_path), PROMPTS, None, TOKENIZER).evaluate()
    with pytest.raises(ValueError, match="load_best_model_at_end is true"):
        settings(tmp_path, load_best_model_at_end=True)
    assert Prompts.of(PROMPTS, TOKENIZER).prompts[0] == "a"


def test_a_stage_evaluates_the_prompts_that_it_holds_out(make_job: Callable[..., Any], sft_folder: Path) -> None:
    from preftune.stages.ppo.rewards import RewardSource

    job = make_job(
        "sft",
        name="ppo",
        parent=sft_folder,
        held_out=0.4,
        rewards=(RewardSource("function", letters_of_messages),),
        method={"rollout_batch_size": 2, "num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": 6,
                "max_new_tokens": 4},
        train={"eval_strategy": "steps", "eval_steps": 2, "max_steps": None},
    )  # fmt: skip
    job = replace(job, kind="ppo")
    metrics = run_stage(job)
    lines = [json.loads(line) for line in (job.output_dir / "log.jsonl").read_text().splitlines()]
    rows = [each for each in lines if "eval_objective/scores" in each]
    assert [each["step"] for each in rows] == [2, 3]  # and at the end
    assert metrics["eval_objective/scores"] == rows[-1]["eval_objective/scores"]
    assert metrics["eval_objective/kl"] == rows[-1]["eval_objective/kl"] and "eval_runtime" not in metrics


def letters_of_messages(completions: list[Any], **_: Any) -> list[float]:
    return letters([each[0]["content"] for each in completions])
