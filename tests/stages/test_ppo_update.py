"""The minibatch epochs: what the first one must show, how losses are summed, the steps, the clip and the brakes."""

from pathlib import Path

import pytest
import torch

from preftune.stages.ppo.rollout import Rollout
from preftune.stages.ppo.trainer import PPOTrainer
from preftune.stages.ppo.update import (
    StepReport,
    add_report,
    check_ratio,
    check_reference,
    minibatches,
    of_few,
    update_metrics,
)

from .collecting import ppo_of
from .tiny_ppo import UNEVEN, Steps, move_policy, rollout_of, tiny, trainer, with_reward

EVERYONE = torch.arange(8)


def gradient(made: PPOTrainer, rollout: Rollout, rows: torch.Tensor = EVERYONE) -> torch.Tensor:
    made.updater.gradients(rollout, rows, 0.05)
    return torch.cat([p.grad.flatten() for p in made.trainables.values() if p.grad is not None])


@pytest.mark.checklist("P3")
def test_p03_first_minibatch_has_ratio_one_and_loss_minus_mean_advantage(tmp_path: Path) -> None:
    made = with_reward(tmp_path, whiten_advantages=False)
    move_policy(made)  # policy, reference and value are three, so that a wrong adapter would show
    rollout = rollout_of(made)
    rows = torch.tensor([0, 3, 5, 6])
    report = made.updater.gradients(rollout, rows, 0.05)
    mask = rollout.episodes.mask_BR[rows]
    assert report.mean("policy_loss") == pytest.approx(-float(rollout.advantages_BR[rows][mask].mean()), abs=1e-6)
    assert report.mean("ratio") == pytest.approx(1.0, abs=1e-6)
    assert report.mean("approx_kl") == pytest.approx(0.0, abs=1e-6)
    assert report.mean("value_loss") > 0 and report.norms["policy"] > 0
    check_ratio(report, 0, 1e-6)


@pytest.mark.checklist("P3")
def test_p03_a_reference_or_an_old_policy_that_is_another_is_an_error(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    rollout = rollout_of(made)
    move_policy(made, 0.5)
    with pytest.raises(RuntimeError, match="do not see the same policy"):
        check_ratio(made.updater.gradients(rollout, EVERYONE, 0.05), 0, 1e-4)
    with pytest.raises(RuntimeError, match="the reference is not the adapter"):
        check_reference(rollout_of(made), 1e-4)
    with pytest.raises(RuntimeError, match="the reference is not the adapter"):
        made.train()


@pytest.mark.checklist("P3")
@pytest.mark.parametrize(("tokens", "passes"), [(1, True), (48, True), (400, True), (4000, False), (1e6, False)])
def test_p03_a_mean_over_few_tokens_may_be_further_off(tokens: float, passes: bool) -> None:
    """0.059 nats over 48 tokens is what rounding to 16 bits gave; over 4,000 it would be another policy."""
    report = StepReport(("abs_log_ratio",), torch.tensor([0.059 * tokens]), tokens, {})
    if passes:
        check_ratio(report, 0, 0.05)
    else:
        with pytest.raises(RuntimeError, match=r"expected 0 within 0\.05"):
            check_ratio(report, 0, 0.05)
    assert of_few(0.05, 1) == pytest.approx(0.25) and of_few(0.05, 48) < 0.08


@pytest.mark.checklist("P4")
def test_p04_dropout_is_off_even_in_train_mode(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny(dropout=0.5))
    rollout = rollout_of(made)
    made.adapters.model.train()
    with torch.no_grad():
        for role in ("default", "value"):
            with made.adapters.using(role):
                hidden = made.trunk.hidden(rollout.episodes)
                assert torch.equal(hidden, made.trunk.hidden(rollout.episodes))
    # so the ratio is still 1 there: gradient checkpointing needs this mode
    assert made.updater.gradients(rollout, EVERYONE, 0.05).mean("ratio") == pytest.approx(1.0, abs=1e-6)


@pytest.mark.checklist("P17")
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_p17_gradients_do_not_depend_on_the_micro_batch(tmp_path: Path, value: str) -> None:
    made = trainer(tmp_path, value=value, max_grad_norm=0, entropy_coef=0.01, kl_in="loss", max_new_tokens=9)
    rollout = rollout_of(made)
    rollout.episodes.length_B.copy_(UNEVEN)
    made.args.per_device_train_batch_size = 8
    whole = gradient(made, rollout)
    for size in (1, 3):
        made.args.per_device_train_batch_size = size
        torch.testing.assert_close(gradient(made, rollout), whole, rtol=1e-4, atol=1e-6)
    assert whole.abs().max() > 1e-3


@pytest.mark.checklist("P17")
def test_p17_halves_of_a_batch_add_up_to_the_whole_when_both_know_the_global_count(tmp_path: Path) -> None:
    """What two processes do: each sums its own tokens, both divide by the tokens of both."""
    made = trainer(tmp_path, max_grad_norm=0, max_new_tokens=9)
    rollout = rollout_of(made)
    rollout.episodes.length_B.copy_(UNEVEN)
    whole = gradient(made, rollout)
    # rows, tokens, and those of responses with EOS: with the other process' they are 8, 39 and none
    made.updater.reduce = lambda tensor, _: tensor.new_tensor([8, 39, 0]) if tensor.shape == (3,) else tensor
    halves = [gradient(made, rollout, rows) for rows in (EVERYONE[:2], EVERYONE[2:])]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-4, atol=1e-6)


@pytest.mark.checklist("P18")
def test_p18_optimiser_steps_are_epochs_times_minibatches_freshly_shuffled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, taken = Steps(), []
    made = trainer(tmp_path, num_ppo_epochs=3, num_mini_batches=4, callbacks=[count], total_episodes=16)
    true = made.updater.gradients

    def listen(rollout: Rollout, rows: torch.Tensor, kl_coef: float, *, measures: bool):
        taken.append(rows.tolist())
        return true(rollout, rows, kl_coef, measures=measures)

    monkeypatch.setattr(made.updater, "gradients", listen)
    out = made.train()
    assert count.steps == out.global_step == 2 * 3 * 4
    epochs = [[i for rows in taken[start : start + 4] for i in rows] for start in range(0, 24, 4)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    with pytest.raises(ValueError, match="expected a multiple"):
        minibatches(8, 3, 5)


@pytest.mark.checklist("P19")
def test_p19_a_huge_gradient_is_clipped(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward=lambda completions: [1e4 * len(t) for t in completions], whiten_advantages=False)
    report = made.updater.gradients(rollout_of(made), EVERYONE, 0.05)
    assert min(report.norms.values()) > 100
    method = ppo_of(made)
    for group in (method.policy, method.value):
        norm = torch.cat([p.grad.flatten() for p in group if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(1.0, abs=1e-4)


WILD = {"learning_rate": 0.5, "num_ppo_epochs": 4, "total_episodes": 8}
"""One step of such a size takes the policy far away."""


@pytest.mark.checklist("P20")
def test_p20_epochs_stop_early(tmp_path: Path) -> None:
    count = Steps()
    out = trainer(tmp_path, **WILD, callbacks=[count], target_approx_kl=0.01, max_ratio=None).train()
    assert count.steps == 1  # the second minibatch already finds the policy too far away
    assert out.global_step == 8  # schedule and saving keep their places
    assert count.logs[0]["policy/stopped"] == 1.0
    # KL to the reference is another target: it stops nothing
    count = Steps()
    trainer(tmp_path, **WILD, callbacks=[count], kl_target=0.01, max_ratio=None).train()
    assert count.steps == 8


@pytest.mark.checklist("P20")
def test_p20_the_brake_is_one_and_a_half_times_the_target(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    rollout = rollout_of(made)
    move_policy(made)
    measured = made.updater.gradients(rollout, EVERYONE, 0.05).mean("approx_kl")
    for share, stops in ((1.01, False), (0.99, True)):
        made.args.target_approx_kl = measured / 1.5 * share
        assert made.updater.gradients(rollout, EVERYONE, 0.05).stop is stops


@pytest.mark.checklist("P20")
def test_p20_exploding_minibatches_are_skipped(tmp_path: Path) -> None:
    count = Steps()
    trainer(tmp_path, **WILD, callbacks=[count], max_ratio=1.0001).train()
    assert count.logs[0]["policy/skipped"] >= 1 and count.steps == 8 - count.logs[0]["policy/skipped"]
    # nor does a gradient that is no number move anything
    made = trainer(tmp_path)
    rollout = rollout_of(made)
    rollout.advantages_BR[0, 0] = float("nan")
    assert made.updater.gradients(rollout, EVERYONE, 0.05).skip


@pytest.mark.checklist("P25")
def test_p25_a_padded_batch_logs_what_the_unpadded_rows_log(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_new_tokens=9)
    rollout = rollout_of(made)
    rollout.episodes.length_B.copy_(UNEVEN)
    move_policy(made, 0.2)
    whole = made.updater.gradients(rollout, EVERYONE, 0.05)
    assert whole.tokens == 39
    singles = [made.updater.gradients(rollout, torch.tensor([i]), 0.05) for i in range(8)]
    torch.testing.assert_close(whole.sums, torch.stack([s.sums for s in singles]).sum(0), rtol=1e-4, atol=1e-5)
    # two minibatches of 3 and of 36 tokens are logged as one mean over 39 tokens
    parts = (torch.tensor([0, 2]), torch.tensor([1, 3, 4, 5, 6, 7]))
    small, large = (made.updater.gradients(rollout, rows, 0.05) for rows in parts)
    assert (small.tokens, large.tokens) == (3, 36)
    totals: dict[str, float] = {"lr": 0.0}
    for report in (small, large):
        add_report(totals, report, 0.0)
    logged = update_metrics(totals, made.method)
    for name, stat in (("val/ratio", "ratio"), ("policy/approxkl_avg", "approx_kl"), ("policy/entropy_avg", "entropy")):
        assert logged[name] == pytest.approx(whole.mean(stat), rel=1e-5), name
        assert small.mean(stat) != pytest.approx(large.mean(stat), rel=1e-3), name
