"""PPO end to end on a tiny random model, and the checklist rows that need a trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from preftune.data.errors import UserError
from preftune.models.adapters import AdapterSet, LoraSpec
from preftune.models.base import Base
from preftune.models.generate import Generation
from preftune.models.lineage import Lineage, write_lineage
from preftune.models.tiny import byte_tokenizer
from preftune.stages import ppo_collect
from preftune.stages.ppo import PPOConfig, PPOTrainer
from preftune.stages.ppo_forward import Trunk
from preftune.stages.ppo_metrics import check_ratio, check_reference
from preftune.stages.ppo_prompts import stream_rows
from preftune.stages.ppo_update import minibatches
from preftune.stages.rewards import RewardSource
from preftune.stages.rollout import Rollout, make_episodes

TOKENIZER = byte_tokenizer()
PROMPTS = [{"prompt": text} for text in ("a", "hello there", "what?", "one two three")]


def tiny(seed: int = 0, dropout: float = 0.0, strength: float = 0.05) -> AdapterSet:
    """One layer, 32 wide, byte vocabulary, an adapter that already does something."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=True, attention_dropout=dropout,
        bos_token_id=TOKENIZER.bos_token_id, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    base = Base(spec="tiny", path=Path("tiny"), revision=None, sha256="")
    adapters = AdapterSet.create(model, base, LoraSpec(r=4, alpha=8, dropout=dropout))
    with torch.no_grad():
        for parameter in adapters.parameters("default"):
            parameter.add_(strength * torch.randn_like(parameter))
    return adapters


def letters(completions: list[str], **_: Any) -> list[float]:
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


def trainer(tmp_path: Path, adapters: AdapterSet | None = None, **options: Any) -> PPOTrainer:
    reward = options.pop("reward", letters)
    callbacks = options.pop("callbacks", [])
    rewards = options.pop("rewards", ())
    values = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "rollout_batch_size": 8,
        "num_ppo_epochs": 2, "num_mini_batches": 2, "total_episodes": 16, "max_new_tokens": 6, "learning_rate": 1e-3,
        "per_device_train_batch_size": 3, "seed": 1,
    } | options  # fmt: skip
    made = PPOTrainer(
        adapters or tiny(), PPOConfig(str(tmp_path), **values), TOKENIZER, PROMPTS,
        reward_funcs=reward, rewards=rewards, callbacks=callbacks,
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def gradient(made: PPOTrainer, rollout: Rollout, rows: torch.Tensor) -> torch.Tensor:
    made.updater.gradients(rollout, rows, 0.05)
    return torch.cat([p.grad.flatten() for p in made.trainables.values() if p.grad is not None])


class Steps(TrainerCallback):
    """Counts optimiser steps and keeps every log."""

    def __init__(self) -> None:
        self.steps, self.logs = 0, []

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def on_log(self, *_: Any, logs: dict | None = None, **__: Any) -> None:
        self.logs.append(logs)


@pytest.mark.checklist("P1")
def test_p01_temperature_reaches_sampler_policy_and_reference_alike(tmp_path: Path) -> None:
    made = trainer(tmp_path, temperature=0.7)
    collected = made.collector.collect(0, 0.05)
    assert collected.metrics["rollout/logprob_mismatch"] < 1e-5
    assert torch.equal(collected.rollout.logps_BR, collected.rollout.ref_logps_BR)
    report = made.updater.gradients(collected.rollout, torch.arange(8), 0.05)
    assert report.mean("ratio") == pytest.approx(1.0, abs=1e-6)
    # another temperature is another distribution
    other = Trunk(made.adapters, 1.0)
    episodes = collected.rollout.episodes
    with torch.no_grad(), made.adapters.using("default"):
        at_one = other.logprobs(other.hidden(episodes), episodes).logps_BR
    assert (at_one - collected.rollout.logps_BR).abs().max() > 0.05


@pytest.mark.checklist("P2")
def test_p02_old_log_probs_are_the_training_forwards_and_the_mismatch_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = ppo_collect.sample

    def off_by_a_quarter(*args: Any, **kwargs: Any) -> Generation:
        made = true(*args, **kwargs)
        return Generation(made.tokens, [[x + 0.25 for x in row] for row in made.logprobs], made.finished)

    plain = trainer(tmp_path).collector.collect(0, 0.05)
    monkeypatch.setattr(ppo_collect, "sample", off_by_a_quarter)
    shifted = trainer(tmp_path).collector.collect(0, 0.05)
    assert torch.equal(plain.rollout.logps_BR, shifted.rollout.logps_BR)
    assert shifted.metrics["rollout/logprob_mismatch"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.checklist("P3")
def test_p03_first_minibatch_has_ratio_one_and_loss_minus_mean_advantage(tmp_path: Path) -> None:
    made = trainer(tmp_path, whiten_advantages=False)
    rollout = made.collector.collect(0, 0.05).rollout
    rows = torch.tensor([0, 3, 5, 6])
    report = made.updater.gradients(rollout, rows, 0.05)
    mask = rollout.episodes.mask_BR[rows]
    assert report.mean("policy_loss") == pytest.approx(-float(rollout.advantages_BR[rows][mask].mean()), abs=1e-6)
    assert report.mean("ratio") == pytest.approx(1.0, abs=1e-6)
    assert report.mean("approx_kl") == pytest.approx(0.0, abs=1e-6)
    check_ratio(report, 0, 1e-6)


@pytest.mark.checklist("P3")
def test_p03_a_reference_or_an_old_policy_that_is_another_is_an_error(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    rollout = made.collector.collect(0, 0.05).rollout
    with torch.no_grad():
        made.updater.policy[1].add_(0.5)
    with pytest.raises(RuntimeError, match="do not see the same policy"):
        check_ratio(made.updater.gradients(rollout, torch.arange(8), 0.05), 0, 1e-4)
    with pytest.raises(RuntimeError, match="the reference is not the adapter"):
        check_reference(made.collector.collect(0, 0.05).rollout, 1e-4)


@pytest.mark.checklist("P4")
def test_p04_dropout_is_off_even_in_train_mode(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny(dropout=0.5))
    episodes = made.collector.collect(0, 0.05).rollout.episodes
    made.adapters.model.train()
    with torch.no_grad():
        for role in ("default", "value"):
            with made.adapters.using(role):
                assert torch.equal(made.trunk.hidden(episodes), made.trunk.hidden(episodes))


@pytest.mark.checklist("P5")
def test_p05_padding_changes_no_number(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    episodes = made.collector.collect(0, 0.05).rollout.episodes
    together = made.collector._forwards(episodes)
    for i in range(len(episodes)):
        one = episodes.rows(torch.tensor([i]))
        for whole, alone in zip(together, made.collector._forwards(one), strict=True):
            torch.testing.assert_close(whole[i : i + 1, : alone.shape[1]], alone, rtol=0, atol=2e-6)


@pytest.mark.checklist("P6")
@pytest.mark.parametrize("pad", [0, 2])
def test_p06_response_length_includes_eos_whether_or_not_pad_is_eos(pad: int) -> None:
    eos = 2
    generation = Generation([[7, eos], [7, 8, 9]], [[-1.0, -1.0], [-1.0] * 3], [True, False])
    episodes = make_episodes([[5, eos, 6], [5]], generation, pad, torch.device("cpu"))
    assert episodes.length_B.tolist() == [2, 3] and episodes.finished_B.tolist() == [True, False]
    assert episodes.mask_BR.tolist() == [[True, True, False], [True, True, True]]
    assert episodes.attention_mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert episodes.responses() == [[7, eos], [7, 8, 9]]


@pytest.mark.checklist("P7")
def test_p07_tokens_after_the_end_change_no_number(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    generation = Generation([[20, 21, 2], [30, 31, 32, 33, 34, 2]], [[-1.0] * 3, [-1.0] * 6], [True, True])
    episodes = make_episodes([[40, 41], [50, 51, 52]], generation, 0, torch.device("cpu"))
    before = made.collector._forwards(episodes)
    episodes.input_ids_BT[0, 5:] = torch.tensor([99, 100, 101, 102])
    for a, b in zip(before, made.collector._forwards(episodes), strict=True):
        assert torch.equal(a, b)
    assert not before[0][0, 3:].any() and not before[2][0, 3:].any()


@pytest.mark.checklist("P10")
def test_p10_non_score_reward_is_minus_coef_times_the_logged_kl(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    with torch.no_grad():
        made.updater.policy[1].add_(0.3)
    metrics = made.collector.collect(0, 0.25).metrics
    assert abs(metrics["objective/kl"]) > 0.01
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.25 * metrics["objective/kl"], abs=1e-6)
    total = metrics["objective/scores"] - 0.25 * metrics["objective/kl"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(total, abs=1e-6)


@pytest.mark.checklist("P14")
def test_p14_without_a_reward_adapter_the_value_is_a_copy_of_the_policy_with_a_zero_head(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    rollout = made.collector.collect(0, 0.05).rollout
    assert not rollout.values_BR.any()
    with torch.no_grad():
        with made.adapters.using("default"):
            policy = made.trunk.hidden(rollout.episodes)
        with made.adapters.using("value"):
            assert torch.equal(made.trunk.hidden(rollout.episodes), policy)


def reward_folder(folder: Path, mean: float, std: float) -> Path:
    """A reward stage's folder on `tiny()`'s base: an adapter of its own with a random head."""
    adapters = tiny(strength=0.2)
    adapters.copy("reward")
    adapters.add_head("reward", bias=False, trainable=False, seed=3)
    adapters.save("reward", folder)
    lineage = Lineage(
        stage="reward", kind="reward", base={"spec": "tiny", "revision": None, "sha256": ""}, tokenizer={}, parents=[],
        config={}, data={}, seed=0, versions={}, created="", seconds=0.0, reward={"mean": mean, "std": std},
    )  # fmt: skip
    write_lineage(folder, lineage)
    return folder


def with_reward(tmp_path: Path, mean: float = 0.4, std: float = 2.0, **options: Any) -> PPOTrainer:
    source = RewardSource("stage", str(reward_folder(tmp_path / "reward", mean, std)), options.pop("weight", 1.0))
    return trainer(tmp_path, reward=(), rewards=[source], **options)


@pytest.mark.checklist("P14")
@pytest.mark.parametrize("scale", ["none", "std"])
def test_p14_the_value_starts_at_the_normalised_score(tmp_path: Path, scale: str) -> None:
    made = with_reward(tmp_path, reward_scale=scale, weight=0.5)
    rollout = made.collector.collect(0, 0.05).rollout
    episodes = rollout.episodes
    with torch.no_grad(), made.adapters.using("value"):
        hidden = made.trunk.hidden(episodes)
    last = hidden[torch.arange(8), episodes.start_B + episodes.length_B - 1]
    torch.testing.assert_close(made.adapters.heads["value"](last[:, None])[:, 0], rollout.scores_B, rtol=0, atol=1e-5)
    assert rollout.scores_B.std() > 0.01 and rollout.values_BR.abs().max() > 0.01


@pytest.mark.checklist("P22")
def test_p22_the_lineages_mean_is_subtracted_from_the_raw_score(tmp_path: Path) -> None:
    centred = with_reward(tmp_path, mean=0.4).collector.collect(0, 0.05).rollout.scores_B
    raw = with_reward(tmp_path, mean=0.4, normalize_rewards=False).collector.collect(0, 0.05).rollout.scores_B
    torch.testing.assert_close(centred, raw - 0.4, rtol=0, atol=1e-6)


@pytest.mark.checklist("P24")
def test_p24_the_reward_never_changes_under_training(tmp_path: Path) -> None:
    made = with_reward(tmp_path)
    roles = (None, "ref", "reward", "default", "value")
    before = {role: made.adapters.digest(role) for role in roles}
    made.train()
    assert {role for role in roles if made.adapters.digest(role) != before[role]} == {"default", "value"}


@pytest.mark.checklist("P17")
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_p17_gradients_do_not_depend_on_the_micro_batch(tmp_path: Path, value: str) -> None:
    made = trainer(tmp_path, value=value, max_grad_norm=0, entropy_coef=0.01, kl_in="loss", max_new_tokens=9)
    # responses of unlike lengths, where an average of averages would show
    rollout = made.collector.collect(0, 0.05).rollout
    lengths = torch.tensor([1, 9, 2, 9, 3, 1, 5, 9])
    rollout.episodes.length_B.copy_(lengths)
    made.args.per_device_train_batch_size = 8
    whole = gradient(made, rollout, torch.arange(8))
    for size in (1, 3):
        made.args.per_device_train_batch_size = size
        torch.testing.assert_close(gradient(made, rollout, torch.arange(8)), whole, rtol=1e-4, atol=1e-6)
    assert whole.abs().max() > 1e-3


@pytest.mark.checklist("P18")
def test_p18_optimiser_steps_are_epochs_times_minibatches_freshly_shuffled(tmp_path: Path) -> None:
    count = Steps()
    made = trainer(tmp_path, num_ppo_epochs=3, num_mini_batches=4, callbacks=[count], total_episodes=16)
    out = made.train()
    assert count.steps == out.global_step == 2 * 3 * 4
    parts = minibatches(8, 4, 5, torch.device("cpu"))
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    assert torch.cat(parts).tolist() != torch.cat(minibatches(8, 4, 6, torch.device("cpu"))).tolist()


@pytest.mark.checklist("P19")
def test_p19_a_huge_gradient_is_clipped(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward=lambda completions: [1e4 * len(t) for t in completions], whiten_advantages=False)
    rollout = made.collector.collect(0, 0.05).rollout
    report = made.updater.gradients(rollout, torch.arange(8), 0.05)
    assert report.policy_norm > 100 and report.value_norm > 100
    for group in (made.updater.policy, made.updater.value):
        norm = torch.cat([p.grad.flatten() for p in group if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.checklist("P20")
def test_p20_epochs_stop_early_and_exploding_minibatches_are_skipped(tmp_path: Path) -> None:
    count = Steps()
    wild = {"learning_rate": 0.5, "num_ppo_epochs": 4, "total_episodes": 8, "callbacks": [count]}
    out = trainer(tmp_path, **wild, target_approx_kl=0.01, max_ratio=None).train()
    assert count.steps == 1  # the second minibatch already finds the policy too far away
    assert out.global_step == 8  # schedule and saving keep their places
    assert count.logs[0]["policy/stopped"] == 1.0
    count = Steps()
    trainer(tmp_path, **{**wild, "callbacks": [count]}, max_ratio=1.0001).train()
    assert count.logs[0]["policy/skipped"] >= 1 and count.steps == 8 - count.logs[0]["policy/skipped"]


@pytest.mark.checklist("P21")
def test_p21_processes_sample_differently_and_reruns_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer(tmp_path).collector.collect(0, 0.05).rollout.episodes
    again = trainer(tmp_path).collector.collect(0, 0.05).rollout.episodes
    assert torch.equal(first.input_ids_BT, again.input_ids_BT)
    made = trainer(tmp_path)
    later = made.collector.collect(2, 0.05).rollout.episodes  # the same prompts two laps later
    assert later.responses() != first.responses()
    monkeypatch.setattr(PPOConfig, "process_index", property(lambda _: 1))
    other = made.collector.collect(0, 0.05).rollout.episodes
    assert other.responses() != first.responses()


@pytest.mark.checklist("P24")
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_p24_only_policy_and_value_change(tmp_path: Path, value: str) -> None:
    made = trainer(tmp_path, value=value)
    roles = [None, "ref", "default", *(["value"] if value == "separate" else [])]
    before = {role: made.adapters.digest(role) for role in roles}
    head = made.adapters.heads["value"].score.weight.detach().clone()
    made.train()
    changed = {role for role in roles if made.adapters.digest(role) != before[role]}
    assert changed == set(roles) - {None, "ref"}
    assert not torch.equal(head, made.adapters.heads["value"].score.weight)


@pytest.mark.checklist("P25")
def test_p25_a_padded_batch_logs_what_the_unpadded_rows_log(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_new_tokens=9)
    rollout = made.collector.collect(0, 0.05).rollout
    rollout.episodes.length_B.copy_(torch.tensor([1, 9, 2, 9, 3, 1, 5, 9]))
    with torch.no_grad():
        made.updater.policy[1].add_(0.2)
    whole = made.updater.gradients(rollout, torch.arange(8), 0.05)
    assert whole.tokens == 39
    singles = [made.updater.gradients(rollout, torch.tensor([i]), 0.05) for i in range(8)]
    torch.testing.assert_close(whole.sums, torch.stack([s.sums for s in singles]).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.checklist("P23")
@pytest.mark.parametrize("at", [2, 3])  # an iteration's end; between two minibatches of the second
def test_p23_resumed_equals_never_killed(tmp_path: Path, at: int) -> None:
    options = {
        "num_ppo_epochs": 1, "total_episodes": 24, "save_strategy": "steps", "save_steps": at, "kl_target": 0.1,
        "reward_scale": "running", "lr_scheduler_type": "cosine", "log_samples_every": 1,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", tiny(), **options)
    torch.manual_seed(77)
    resumed.train(str(tmp_path / "whole" / f"checkpoint-{at}"))
    for name, parameter in whole.trainables.items():
        assert torch.equal(parameter, resumed.trainables[name]), name
    kept = ("objective/", "policy/", "val/", "loss/", "value/", "lr", "episode")

    def last(made: PPOTrainer) -> dict[str, float]:
        entry = [each for each in made.state.log_history if "objective/kl" in each][-1]
        return {name: x for name, x in entry.items() if name.startswith(kept)}

    assert last(whole) == last(resumed)
    states = [made.optimizer.state_dict()["state"] for made in (whole, resumed)]
    for one, two in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_a_function_reward_rises(tmp_path: Path, value: str) -> None:
    count = Steps()
    made = trainer(
        tmp_path, rollout_batch_size=32, total_episodes=32 * 11, num_ppo_epochs=4, num_mini_batches=1, kl_coef=0.0,
        learning_rate=0.1, value_learning_rate=5e-3, per_device_train_batch_size=32, value=value, callbacks=[count],
        max_new_tokens=4, log_samples_every=5,
    )  # fmt: skip
    made.train()
    scores = [log["objective/scores"] for log in count.logs if "objective/scores" in log]
    assert len(scores) == 11 and min(scores[-3:]) > scores[0] + 0.25, scores
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["iteration"] for row in rows} == {0, 5, 10} and {"prompt", "completion", "score"} <= rows[0].keys()


def test_the_known_names_are_logged(tmp_path: Path) -> None:
    count = Steps()
    trainer(tmp_path, callbacks=[count], total_episodes=8).train()
    names = """
        objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores
        policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg
        val/ratio val/ratio_var val/num_eos_tokens lr episode policy/grad_norm value/explained_variance
        objective/kl_coef rollout/length rollout/eos_rate rollout/logprob_mismatch rollout/tokens_per_second
        time/rollout time/score time/update
        """

    assert set(names.split()) <= count.logs[0].keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollout_batch_size": 10, "num_mini_batches": 4}, "expected a multiple of num_mini_batches"),
        ({"total_episodes": 20}, "expected a multiple of rollout_batch_size"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "expected k2 or k2_sequence or k3"),
        ({"kl_estimator": "k3"}, "expected k1"),
        ({"gradient_accumulation_steps": 2}, "expected 1"),
        ({"missing_eos_penalty": 1.0, "missing_eos_score": 0.0}, "expected one of them"),
        ({"temperature": 0.0}, "expected more than 0"),
    ],
)
def test_settings_that_do_not_fit_are_errors(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, **options)


def test_no_reward_and_no_prompt_are_errors(tmp_path: Path) -> None:
    args = PPOConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UserError, match="no reward is given"):
        PPOTrainer(tiny(), args, TOKENIZER, PROMPTS)
    with pytest.raises(UserError, match="expected 'prompt'"):
        PPOTrainer(tiny(), args, TOKENIZER, [{"text": "a"}], reward_funcs=letters)


def test_the_prompt_stream_is_a_function_of_its_place() -> None:
    whole = stream_rows(5, 3, 0, 15)
    assert [sorted(whole[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert stream_rows(5, 3, 7, 6) == whole[7:13]
    assert whole[:5] != whole[5:10]
