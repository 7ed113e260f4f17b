"""GRPO and RLOO on the tiny base: what a rollout becomes, what trains, what is shared, logged and refused."""

import dataclasses
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.errors import UserError
from preftune.models import decoder as decoder_file
from preftune.models.adapters import AdapterSet
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.prefill import prefill
from preftune.models.tokens import load_tokenizer
from preftune.stages.ppo.method import Step
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.ppo.rollout import Rollout, forward_batches, micro_batches
from preftune.stages.ppo.shared import own_share
from preftune.stages.ppo.update import minibatches

from .collecting import collect
from .tiny_group import GROUP, MADE, gradient, make, method_of, move, rollout_of
from .tiny_ppo import UNEVEN, eager_tokenizer, letters, tiny

KINDS = list(MADE)
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo"]


def flat_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.1] * len(completions)


def uneven(made: Any) -> Rollout:
    """A rollout whose replies have unlike lengths, every other one ended in EOS."""
    rollout = rollout_of(made)
    rollout.episodes.length_B.copy_(UNEVEN)
    rollout.episodes.finished_B.copy_(torch.arange(8) % 2 == 0)
    return rollout


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_logs_saves_and_resumes_exactly(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "total_episodes": 24}
    whole = make(tmp_path, kind, **options)
    start = whole.adapters.digest("default")
    whole.train()
    logged = [each for each in whole.state.log_history if "objective/kl" in each]
    names = {
        "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean",
        "clip_ratio/region_mean", "completions/mean_length", "completions/clipped_ratio", "rewards/letters/mean",
        "objective/scores", "policy/clipfrac_avg", "policy/grad_norm", "rollout/eos_rate",
    }  # fmt: skip
    assert len(logged) == 3 and all(names <= each.keys() for each in logged)
    assert not any(name.startswith("value/") for name in logged[0]) and "value" not in whole.adapters.names
    assert logged[0]["reward"] == pytest.approx(logged[0]["objective/scores"], abs=1e-6)
    resumed = make(tmp_path, kind, **options)
    # between two minibatches of the second iteration's first pass
    resumed.train(str(tmp_path / "checkpoint-5"))
    assert resumed.adapters.digest("default") == whole.adapters.digest("default") != start


@pytest.mark.checklist("G2")
@pytest.mark.parametrize("kind", KINDS)
def test_g02_groups_of_equal_reward_have_no_gradient_and_are_counted(tmp_path: Path, kind: str) -> None:
    made = make(tmp_path, kind, reward=flat_reward, beta=0.0)
    collected = collect(made, 0, 0.0)
    assert collected.metrics["frac_reward_zero_std"] == 1.0 and collected.metrics["reward_std"] == 0.0
    assert not collected.rollout.advantages_BR.any()
    move(made)
    assert not gradient(made, collected.rollout).any()

    def one_group(completions: list[str], **_: Any) -> list[float]:
        return [0.1] * GROUP + [float(i) for i in range(len(completions) - GROUP)]

    half = collect(make(tmp_path, kind, reward=one_group, beta=0.0), 0, 0.0)
    assert half.metrics["frac_reward_zero_std"] == 0.5
    assert not half.rollout.advantages_BR[:GROUP].any() and half.rollout.advantages_BR[GROUP:].any()


@pytest.mark.checklist("G4")
@pytest.mark.parametrize("loss_type", LOSSES)
def test_g04_neither_micro_batches_nor_processes_change_the_gradient(tmp_path: Path, loss_type: str) -> None:
    made = make(tmp_path, loss_type=loss_type, max_grad_norm=0, max_new_tokens=9, mask_truncated_completions=True)
    rollout = uneven(made)
    move(made)
    made.args.per_device_train_batch_size = 8
    whole = gradient(made, rollout)
    assert whole.abs().max() > 1e-3
    for size in (1, 3, 4):
        made.args.per_device_train_batch_size = size
        torch.testing.assert_close(gradient(made, rollout), whole, rtol=1e-4, atol=1e-6)
    # what two processes do: each has a group, and both divide by the rows and tokens of both (39, 10 of them with EOS)
    made.updater.reduce = lambda tensor, _: tensor.new_tensor([8, 39, 11]) if tensor.shape == (3,) else tensor
    halves = [gradient(made, rollout, rows) for rows in torch.arange(8).split(GROUP)]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-4, atol=1e-6)


@pytest.mark.checklist("G4")
def test_g04_the_loss_of_a_first_step_by_hand(tmp_path: Path) -> None:
    """Ratios are 1, so a token's term is minus its advantage: 1, -1, 0, 0 in both groups, lengths 1 9 2 9, 3 1 5 9."""
    made = make(tmp_path, max_new_tokens=9, beta=0.0)
    rollout = uneven(made)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0] * 2)[:, None]
    rollout = dataclasses.replace(rollout, advantages_BR=torch.where(rollout.episodes.mask_BR, advantages, 0.0))
    # the second group alone is the step, of two that a pass over the rollout has: -(3 - 1) over 18 tokens, 39 / 2,
    # 4 rows of at most 9; rows' own means -(1 - 1)
    expected = {"bnpo": -2 / 18, "dapo": -2 / 19.5, "dr_grpo": -2 / 36, "grpo": 0.0}
    for loss_type, loss in expected.items():
        made.args.loss_type = loss_type
        report = made.updater.gradients(rollout, torch.arange(4, 8), 0.0)
        assert report.mean("policy_loss") == pytest.approx(loss, abs=1e-6), loss_type


@pytest.mark.checklist("G9")
@pytest.mark.parametrize("kind", KINDS)
def test_g09_replies_that_were_cut_off_do_not_train(tmp_path: Path, kind: str) -> None:
    tokenizer = eager_tokenizer(tmp_path)
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 20, "max_grad_norm": 0, "beta": 0.0}
    made = make(tmp_path, kind, mask_truncated_completions=True, **options)
    rollout = rollout_of(made)
    ended = rollout.episodes.finished_B
    assert 0 < int(ended.sum()) < 8
    move(made)
    masked = gradient(made, rollout)
    # whatever the policy says of their tokens, and whatever advantage they have
    loud = torch.where(ended[:, None], rollout.advantages_BR, 1e3 * rollout.episodes.mask_BR)
    assert torch.equal(gradient(made, dataclasses.replace(rollout, advantages_BR=loud)), masked)
    # but they stay in the statistics of their group
    plain = make(tmp_path, kind, **options)
    assert torch.equal(rollout_of(plain).advantages_BR, rollout.advantages_BR)
    move(plain)
    assert not torch.allclose(gradient(plain, rollout), masked, atol=1e-4)


@pytest.mark.checklist("G9")
def test_g09_tokens_that_do_not_train_are_in_no_mean(tmp_path: Path) -> None:
    step = Step.of(uneven(make(tmp_path, max_new_tokens=9)), torch.arange(4), lambda x, _: x)
    assert (step.rows, step.tokens, step.finished_tokens) == (4, 21, 3)
    assert (step.rollout_tokens, step.rollout_finished_tokens) == (39, 11)


@pytest.mark.checklist("G12")
def test_g12_a_rollout_without_a_reference_or_with_entropies_comes_back(tmp_path: Path) -> None:
    given: tuple[dict[str, Any], ...] = ({"beta": 0.0}, {"top_entropy_quantile": 0.5})
    for options in given:
        rollout = rollout_of(make(tmp_path, **options))
        back = Rollout.from_tensors(rollout.tensors(), torch.device("cpu"))
        assert (back.ref_logps_BR is None) is ("beta" in options)
        assert (back.entropy_BR is None) is ("beta" in options)
        assert back.tensors().keys() == rollout.tensors().keys()
        assert all(torch.equal(x, rollout.tensors()[name]) for name, x in back.tensors().items())


@pytest.mark.checklist("G13")
def test_g13_a_group_stays_in_one_minibatch_and_on_one_process(tmp_path: Path) -> None:
    rollout = uneven(make(tmp_path, max_new_tokens=9))
    for rows in minibatches(8, 2, 3, GROUP):
        assert len({row // GROUP for row in rows.tolist()}) == 1
    shares = [own_share(torch.arange(8), rollout, process, 2, GROUP) for process in range(2)]
    assert sorted(torch.cat(shares).tolist()) == list(range(8))
    assert all(len({row // GROUP for row in share.tolist()}) == 1 for share in shares)


@pytest.mark.checklist("G14")
def test_g14_a_group_goes_through_together_where_there_is_room(tmp_path: Path) -> None:
    episodes = uneven(make(tmp_path, max_new_tokens=9)).episodes
    groups = lambda parts: [sorted({row // GROUP for row in part.tolist()}) for part in parts]  # noqa: E731
    assert groups(micro_batches(episodes, torch.arange(8), 4, GROUP)) in ([[0], [1]], [[1], [0]])
    assert groups(micro_batches(episodes, torch.arange(8), 6, GROUP)) in ([[0], [1]], [[1], [0]])
    assert groups(micro_batches(episodes, torch.arange(8), 8, GROUP)) == [[0, 1]]
    # larger than a forward: split, and not mixed with another
    small = micro_batches(episodes, torch.arange(8), 3, GROUP)
    assert [len(part) for part in small] == [3, 1, 3, 1] and all(len(each) == 1 for each in groups(small))
    longest = int(episodes.host.total_B.max())
    for tokens in (GROUP * longest, 2 * GROUP * longest, 10):
        parts = forward_batches(episodes, tokens, GROUP)
        assert sorted(row for part in parts for row in part.tolist()) == list(range(8))
        if tokens > 10:
            assert len(parts) == 2 * GROUP * longest // tokens


@pytest.mark.checklist("G14")
def test_g14_a_groups_prompt_is_prefilled_once_and_laid_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[tuple[int, ...]]] = []

    def listen(backbone: Any, prompts: Any, *args: Any) -> Any:
        ready = prefill(backbone, prompts, *args)
        asked.append(list(ready.row))
        return ready

    monkeypatch.setattr(decoder_file, "prefill", listen)
    base = resolve_base("random:llama")
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8))
    prompts = [{"prompt": f"{word} " * 12} for word in ("red", "blue")]
    made = make(tmp_path, model=adapters, prompts=prompts, tokenizer=load_tokenizer(base), max_new_tokens=5)
    rollout = rollout_of(made)
    prompts_of = [tuple(ids) for ids in made.prompts.ids]
    # (the decoder's trials have prompts of their own)
    seen = Counter(prompt for each in asked for prompt in each if prompt in prompts_of)
    assert seen == dict.fromkeys(prompts_of, 1)
    gradient(made, rollout)
    host = rollout.episodes.host
    assert host._layouts
    replies = int(host.length_B.sum())
    for layout in host._layouts.values():
        rows = len(layout.index_BL)
        apart = rows * len(prompts_of[0])
        # the prompt of each group, and not that of each reply: all replies of a layout are of whole groups
        assert rows % GROUP == 0
        assert len(layout.ids_N) <= apart // GROUP + replies + 64 < apart


@pytest.mark.checklist("G15")
@pytest.mark.parametrize("kind", KINDS)
def test_g15_the_reference_is_the_parent_and_without_beta_there_is_none(tmp_path: Path, kind: str) -> None:
    made = make(tmp_path, kind, beta=0.1)
    parent = made.adapters.digest("default")
    made.train()
    assert made.adapters.digest("ref") == parent != made.adapters.digest("default")
    without = make(tmp_path, kind, beta=0.0, eval_dataset=[{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    roles: list[str | None] = []
    hidden = without.trunk.hidden

    def listen(episodes: Any) -> torch.Tensor:
        roles.append(without.adapters.model.active_adapter)
        return hidden(episodes)

    without.trunk.hidden = listen
    without.train()
    assert "ref" not in without.adapters.names and set(roles) == {"default"}
    entry = next(each for each in without.state.log_history if "objective/scores" in each)
    assert "objective/kl" not in entry and "kl" not in entry
    held = without.evaluate()
    assert "eval_objective/scores" in held and "eval_objective/kl" not in held


@pytest.mark.checklist("G15")
def test_g15_a_reference_that_is_not_the_start_stops_the_run(tmp_path: Path) -> None:
    made = make(tmp_path)
    move(made, 0.5)
    with pytest.raises(RuntimeError, match="the reference is not the adapter that training starts from"):
        made.train()


@pytest.mark.checklist("G16")
def test_g16_weights_are_the_rewards_or_the_configs(tmp_path: Path) -> None:
    def ones(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completions) - i) for i in range(len(completions))]

    by_source = [RewardSource("function", letters, 2.0), RewardSource("function", ones, -0.5)]
    first = rollout_of(make(tmp_path, reward=(), rewards=by_source))
    second = rollout_of(make(tmp_path, reward=[letters, ones], reward_weights=[2.0, -0.5]))
    assert torch.equal(first.scores_B, second.scores_B) and torch.equal(first.advantages_BR, second.advantages_BR)
    with pytest.raises(UserError, match="reward_weights has 1 numbers, and there are 2 rewards"):
        make(tmp_path, reward=[letters, ones], reward_weights=[2.0])
    with pytest.raises(UserError, match="keep one of them"):
        make(tmp_path, reward=(), rewards=by_source, reward_weights=[1.0, 1.0])


@pytest.mark.checklist("G17")
def test_g17_the_share_of_tokens_with_the_highest_entropy_trains(tmp_path: Path) -> None:
    made = make(tmp_path, top_entropy_quantile=0.25, beta=0.0, max_new_tokens=9, max_grad_norm=0)
    rollout = uneven(made)
    assert rollout.entropy_BR is not None
    mask = rollout.episodes.mask_BR
    # of 39 tokens: those at or above the quantile 0.75, which lies at place 0.75 * 38 = 28.5 of them in order
    ordered = rollout.entropy_BR[mask].sort().values
    kept = mask & (rollout.entropy_BR >= (ordered[28] + ordered[29]) / 2)
    assert 10 <= int(kept.sum()) <= 13  # a group's first tokens have one entropy
    move(made)
    found = gradient(made, rollout)
    by_hand = dataclasses.replace(rollout, entropy_BR=None, advantages_BR=rollout.advantages_BR * kept)
    # every reply has its advantage at its first token, which the clip's count reads; the loss reads each token's own
    torch.testing.assert_close(gradient(made, by_hand), found, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(gradient(made, dataclasses.replace(rollout, entropy_BR=None)), found, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "cispo"}, "epsilon_high is None with loss_type 'cispo'"),
        ({"delta": 1.1}, r"delta is 1\.1, expected more than 1 \+ epsilon_high = 1\.2"),
        ({"num_generations": 1}, "num_generations is 1, expected at least 2"),
        (
            {"rollout_batch_size": 12},
            "expected a multiple of num_generations x num_mini_batches x processes = 4 x 2 x 1",
        ),
        ({"loss_type": "sapo"}, "loss_type is 'sapo', expected one of grpo, bnpo, dr_grpo, dapo, cispo"),
        ({"max_steps": 6, "total_episodes": None}, "expected a multiple of num_iterations x num_mini_batches = 2 x 2"),
        ({"gradient_accumulation_steps": 2}, "in GRPO one optimiser step is one minibatch"),
        ({"beta": -1.0}, "beta is -1.0, expected at least 0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(tmp_path, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["value", "gamma", "kl_coef", "cliprange", "max_completion_length", "use_vllm"])
def test_what_others_have_is_answered(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(UserError, match=f"{name!r} is no argument of it") as caught:
        make(tmp_path, kind, **{name: 1})
    assert "PPO" not in str(caught.value)


def test_prompts_of_an_iteration_are_counted_by_groups(tmp_path: Path) -> None:
    made = make(tmp_path, total_episodes=None, num_train_epochs=3)
    # 4 prompts, 2 an iteration, 3 passes over them
    assert made.args.num_rollouts(4) == 6 and made.args.prompts_per_rollout() == 2
    made.train()
    assert made.state.epoch == 3.0 and made.state.global_step == 6 * 4


def test_ppo_and_groups_do_not_take_each_others_config(tmp_path: Path) -> None:
    config, trainer = MADE["grpo"][0], MADE["rloo"][1]
    with pytest.raises(UserError, match="RLOOTrainer: args is a GRPOConfig, expected a RLOOConfig"):
        trainer(tiny(), letters, config(str(tmp_path), use_cpu=True), [{"prompt": "a"}])


def test_the_names_of_statistics_and_their_sums_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind in KINDS:
        made = make(tmp_path, kind)
        report = made.updater.gradients(rollout_of(made), torch.arange(8), 0.0)
        assert len(report.sums) == len(report.names) == len(method_of(made).statistics)
        assert report.mean("ratio") == pytest.approx(1.0, abs=1e-6)
        assert report.mean("counted") == 1.0
    assert not [each for each in caplog.records if each.levelno > logging.WARNING]


@pytest.mark.checklist("G19")
@pytest.mark.parametrize(("kind", "beta"), [("grpo", 0.0), ("grpo", 0.1), ("rloo", 0.0)])
def test_g19_the_first_step_measures_what_a_forward_of_its_own_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, beta: float
) -> None:
    options: dict[str, Any] = {"num_mini_batches": 1, "beta": beta, "total_episodes": 24, "learning_rate": 1e-2}
    asked: list[bool] = []
    forwards = MADE[kind][1].build_method

    def listen(self: Any, *args: Any) -> Any:
        method: Any = forwards(self, *args)
        true = method.forwards
        method.forwards = lambda episodes, *, old=True: (asked.append(old), true(episodes, old=old))[1]
        return method

    monkeypatch.setattr(MADE[kind][1], "build_method", listen)
    found = []
    for early in (False, True):
        made = make(tmp_path / str(early), kind, tiny(strength=0.2), **options)
        if early:
            monkeypatch.setattr(made.args, "first_step_measures", lambda: False)
        made.train()
        found.append((made.state.log_history, {name: p.detach().clone() for name, p in made.trainables.items()}))
    assert asked == [False] * 3 + [True] * 3
    (later, adapter), (early, other) = found
    for one, two in zip(later[:-1], early[:-1], strict=True):
        same = {name for name in one if not re.search("time|per_second", name)}
        assert {name: one[name] for name in same} == pytest.approx({name: two[name] for name in same}, abs=1e-5)
    # a step is 1e-2 wide; a forward with gradients rounds otherwise than one without
    for name, weight in adapter.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=1e-5)


@pytest.mark.checklist("G19")
@pytest.mark.parametrize(
    ("kind", "options", "measures"),
    [
        ("grpo", {"beta": 0.1}, True),
        ("grpo", {"num_mini_batches": 2}, False),
        ("grpo", {"top_entropy_quantile": 0.5}, False),
        ("rloo", {"beta": 0.0}, True),
        ("rloo", {"beta": 0.1}, False),
    ],
)
def test_g19_it_measures_only_where_nothing_asks_before(
    tmp_path: Path, kind: str, options: dict[str, Any], measures: bool
) -> None:
    assert make(tmp_path, kind, **{"num_mini_batches": 1} | options).args.first_step_measures() is measures
