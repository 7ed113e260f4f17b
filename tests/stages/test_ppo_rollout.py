"""What a rollout samples and what is computed about it: temperature, padding, the end of a response, the seeds."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

from preftune.errors import UserError
from preftune.models.decoder import Decoder
from preftune.models.generate import Generation, decoder_for, sample
from preftune.models.masked import masked_sum
from preftune.models.tiny import byte_tokenizer
from preftune.stages.ppo import rollout as rollout_file
from preftune.stages.ppo.config import PPOConfig
from preftune.stages.ppo.network import Trunk
from preftune.stages.ppo.rollout import Episodes, Prompts, Rollout, make_episodes, rollout_metrics, stream_rows
from preftune.stages.ppo.trainer import PPOTrainer
from preftune.stages.ppo.update import check_sampler, sampler_tolerance

from .collecting import collect, ppo_of
from .tiny_ppo import SPECIAL, TOKENIZER, UNEVEN, eager_tokenizer, move_policy, rollout_of, tiny, trainer, with_reward

CPU = torch.device("cpu")
END = TOKENIZER.eos_token_id


def tensors(made: PPOTrainer, episodes: Episodes) -> list[torch.Tensor]:
    """Log-probs of policy and reference, values, entropies."""
    found = made.method.forwards(episodes)
    assert found.values_BR is not None and found.ref_logps_BR is not None
    return [found.logps_BR, found.ref_logps_BR, found.values_BR, found.entropy_BR]


def absolute(seed: int = 0) -> GPT2LMHeadModel:
    """A tiny GPT-2: its learned positions show a shift that rotary ones would hide."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, **SPECIAL
    )
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


@pytest.mark.checklist("P1")
def test_p01_temperature_reaches_sampler_policy_and_reference_alike(tmp_path: Path) -> None:
    made = trainer(tmp_path, temperature=0.7)
    collected = collect(made, 0, 0.05)
    assert collected.metrics["rollout/logprob_mismatch"] < 1e-5
    assert collected.rollout.ref_logps_BR is not None
    assert torch.equal(collected.rollout.logps_BR, collected.rollout.ref_logps_BR)
    report = made.updater.gradients(collected.rollout, torch.arange(8), 0.05)
    assert report.mean("ratio") == pytest.approx(1.0, abs=1e-6)
    # another temperature is another distribution
    other = Trunk(made.adapters, 1.0)
    episodes = collected.rollout.episodes
    with torch.no_grad(), made.adapters.using("default"):
        at_one = other.logprobs(other.hidden(episodes), episodes).logps_BR
    assert (at_one - collected.rollout.logps_BR).abs().max() > 0.05


@pytest.mark.checklist("P1")
def test_p01_rollouts_sample_from_the_whole_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def listen(*args: Any, **kwargs: Any) -> Generation:
        asked.update(kwargs)
        return sample(*args, **kwargs)

    monkeypatch.setattr(rollout_file, "sample", listen)
    rollout_of(trainer(tmp_path, temperature=0.7))
    assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (0.7, 0, 1.0)
    rollout_of(trainer(tmp_path, top_k=5, top_p=0.9))
    assert (asked["temperature"], asked["top_k"], asked["top_p"]) == (1.0, 5, 0.9)


@pytest.mark.checklist("P2")
def test_p02_old_log_probs_are_the_training_forwards_and_the_mismatch_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_a_quarter(*args: Any, **kwargs: Any) -> Generation:
        made = sample(*args, **kwargs)
        return Generation(made.tokens, [[x + 0.25 for x in row] for row in made.logprobs], made.finished)

    plain = collect(trainer(tmp_path), 0, 0.05)
    monkeypatch.setattr(rollout_file, "sample", off_by_a_quarter)
    shifted = collect(trainer(tmp_path, mismatch_tolerance=0.3), 0, 0.05)
    assert torch.equal(plain.rollout.logps_BR, shifted.rollout.logps_BR)
    assert shifted.metrics["rollout/logprob_mismatch"] == pytest.approx(0.25, abs=1e-4)
    assert shifted.metrics["rollout/logprob_mismatch_mean"] == pytest.approx(0.25, abs=1e-4)
    assert shifted.metrics["rollout/sampler_kl"] == pytest.approx(math.exp(-0.25) - 1 + 0.25, abs=1e-4)
    # and it is an alarm: before anything trains, with iteration, value, tolerance and the key that raises it
    made = trainer(tmp_path)
    before = made.adapters.digest("default")
    with pytest.raises(UserError, match=r"mismatch_tolerance: iteration 0: .* 0\.25 nats per token .* 0\.002 at most"):
        made.train()
    assert made.adapters.digest("default") == before


@pytest.mark.checklist("P2")
def test_p02_single_tokens_ring_no_alarm_but_means_and_kl_do() -> None:
    one_in_a_hundred = {
        "rollout/logprob_mismatch": 0.7,
        "rollout/logprob_mismatch_mean": 0.02,
        "rollout/sampler_kl": 4e-3,
    }
    check_sampler(one_in_a_hundred, 3, sampler_tolerance(None, low_precision=True))
    for metrics in (
        {"rollout/logprob_mismatch_mean": 0.2},
        {"rollout/sampler_kl": 0.2},
        {"rollout/sampler_kl": math.nan},
    ):
        with pytest.raises(UserError, match="iteration 3"):
            check_sampler(one_in_a_hundred | metrics, 3, sampler_tolerance(None, low_precision=True))
    with pytest.raises(UserError, match=r"0\.002 at most"):
        check_sampler(one_in_a_hundred, 3, sampler_tolerance(None, low_precision=False))
    check_sampler(one_in_a_hundred, 3, sampler_tolerance(0.05, low_precision=False))


@pytest.mark.checklist("P2")
@pytest.mark.parametrize("merge", [True, False])
def test_p02_cached_decode_equals_the_full_forward_merged_or_not(tmp_path: Path, merge: bool) -> None:
    """fp32, at rounding level: one engine, whether LoRA runs beside the base or inside its weights."""
    made = trainer(tmp_path, tiny(strength=0.3), temperature=0.7)
    prompts = made.prompts.ids
    generation = sample(
        made.adapters, "default", prompts, max_new_tokens=24, temperature=0.7, eos_token_id=END, pad_token_id=0, seed=5,
        merge=merge,
    )  # fmt: skip
    episodes = make_episodes(prompts, generation, 0, CPU)
    assert decoder_for(made.adapters) is Decoder  # no other way had to step in
    assert episodes.length_B.max() == 24
    logps_BR = made.method.forwards(episodes).logps_BR
    torch.testing.assert_close(logps_BR, episodes.sampler_logps_BR, rtol=1e-5, atol=1e-5)
    # and it is the adapter's doing
    with torch.no_grad(), made.adapters.using(None):
        bare_BR = made.trunk.logprobs(made.trunk.hidden(episodes), episodes).logps_BR
    assert (bare_BR - logps_BR).abs().max() > 0.1


@pytest.mark.checklist("P5")
def test_p05_padding_changes_no_number(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny(model=absolute()))
    episodes = rollout_of(made).episodes
    together = tensors(made, episodes)
    for i in range(len(episodes)):
        one = episodes.rows(torch.tensor([i]))
        for whole, alone in zip(together, tensors(made, one), strict=True):
            torch.testing.assert_close(whole[i : i + 1, : alone.shape[1]], alone, rtol=0, atol=2e-6)


@pytest.mark.checklist("P5")
def test_p05_left_padding_in_the_sampler_changes_no_number(tmp_path: Path) -> None:
    """Prompts of unlike lengths are padded on the left there; the training forward never pads on the left."""
    made = trainer(tmp_path, tiny(model=absolute()), max_new_tokens=12)
    collected = collect(made, 0, 0.05)
    assert len(set(collected.rollout.episodes.start_B.tolist())) > 1
    assert collected.metrics["rollout/logprob_mismatch"] < 5e-6
    assert decoder_for(made.adapters) is Decoder  # no other way had to step in


@pytest.mark.checklist("P6")
@pytest.mark.parametrize("pad", [0, END])
def test_p06_response_length_includes_eos_whether_or_not_pad_is_eos(pad: int) -> None:
    generation = Generation([[7, END], [7, 8, 9]], [[-1.0, -1.0], [-1.0] * 3], [True, False])
    episodes = make_episodes([[5, END, 6], [5]], generation, pad, CPU)
    assert episodes.length_B.tolist() == [2, 3] and episodes.finished_B.tolist() == [True, False]
    assert episodes.mask_BR.tolist() == [[True, True, False], [True, True, True]]
    assert episodes.attention_mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert episodes.responses() == [[7, END], [7, 8, 9]]


@pytest.mark.checklist("P6")
def test_p06_a_tokenizer_whose_pad_is_eos_changes_no_number(tmp_path: Path) -> None:
    tokenizer = eager_tokenizer(tmp_path)
    own = rollout_of(trainer(tmp_path, tokenizer=tokenizer, max_new_tokens=20))
    tokenizer.pad_token = tokenizer.eos_token
    same = rollout_of(trainer(tmp_path, tokenizer=tokenizer, max_new_tokens=20))
    assert 0 < own.episodes.finished_B.sum() < 8
    assert (own.episodes.input_ids_BT != same.episodes.input_ids_BT).any()
    assert own.episodes.responses() == same.episodes.responses()
    for name, tensor in own.tensors().items():
        if name != "episodes.input_ids_BT":
            assert torch.equal(tensor, same.tensors()[name]), name


@pytest.mark.checklist("P7")
def test_p07_tokens_after_the_end_change_no_number(tmp_path: Path) -> None:
    """Log-probs of policy and reference, values, entropies, scores and gradients: all the same, and zero past EOS."""
    made = with_reward(tmp_path, max_grad_norm=0)
    generation = Generation([[20, 21, END], [30, 31, 32, 33, 34, END]], [[-1.0] * 3, [-1.0] * 6], [True, True])
    episodes = make_episodes([[40, 41], [50, 51, 52]], generation, 0, CPU)

    def numbers(episodes: Episodes) -> list[torch.Tensor]:
        found = tensors(made, episodes)
        ones_BR = torch.ones_like(found[0])
        rollout = Rollout(episodes, found[0], found[1], ones_BR, torch.zeros(2), found[2], ones_BR)
        made.updater.gradients(rollout, torch.arange(2), 0.05)
        grads = [p.grad.clone() for p in made.trainables.values() if p.grad is not None]
        return [*found, made.trunk.scores("reward", episodes), *grads]

    before = numbers(episodes)
    episodes.input_ids_BT[0, 5:] = torch.tensor([99, 100, 101, 102])
    for a, b in zip(before, numbers(episodes), strict=True):
        assert torch.equal(a, b)
    for found in before[:4]:
        assert found[0, :3].all() and not found[0, 3:].any()


@pytest.mark.checklist("P10")
def test_p10_non_score_reward_is_minus_coef_times_the_logged_kl(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    move_policy(made)
    metrics = collect(made, 0, 0.25).metrics
    assert abs(metrics["objective/kl"]) > 0.01
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.25 * metrics["objective/kl"], abs=1e-6)
    total = metrics["objective/scores"] - 0.25 * metrics["objective/kl"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(total, abs=1e-6)


@pytest.mark.checklist("P16")
def test_p16_a_rollouts_advantages_are_whitened_over_its_valid_tokens(tmp_path: Path) -> None:
    options = {"max_new_tokens": 20, "kl_coef": 0.0, "tokenizer": eager_tokenizer(tmp_path)}
    made = trainer(tmp_path, **options)
    rollout = rollout_of(made)
    mask_BR = rollout.episodes.mask_BR
    assert not mask_BR.all() and not rollout.advantages_BR[~mask_BR].any()
    valid = rollout.advantages_BR[mask_BR]
    torch.testing.assert_close(valid.mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(valid.std(correction=0), torch.tensor(1.0), rtol=0, atol=1e-5)
    # two processes with the same rollout: the global moments are twice the sums over twice the tokens
    ppo_of(made).reduce = lambda tensor, how: 2 * tensor if how == "sum" else tensor
    torch.testing.assert_close(rollout_of(made).advantages_BR, rollout.advantages_BR)
    # another process with tokens of its own moves the mean: it is no longer this process' own
    ppo_of(made).reduce = lambda tensor, how: tensor + 100 if how == "sum" else tensor
    assert rollout_of(made).advantages_BR[mask_BR].mean().abs() > 0.1


@pytest.mark.checklist("P16")
def test_p16_reward_whitening_keeps_the_mean_and_is_off_by_default(tmp_path: Path) -> None:
    tokenizer = eager_tokenizer(tmp_path)
    options = {"tokenizer": tokenizer, "max_new_tokens": 20, "kl_coef": 0.5, "lam": 1.0, "whiten_advantages": False}
    found = {}
    for name, more in {"plain": {}, "off": {"whiten_rewards": False}, "on": {"whiten_rewards": True}}.items():
        made = trainer(tmp_path, **options, **more)
        move_policy(made)
        rollout = rollout_of(made)
        assert rollout.returns_BR is not None
        # with lambda 1 the return is what is still to come, so neighbours differ by one reward
        to_go_BR = torch.nn.functional.pad(rollout.returns_BR, (0, 1))
        found[name] = (to_go_BR[:, :-1] - to_go_BR[:, 1:])[rollout.episodes.mask_BR]
    assert torch.equal(found["plain"], found["off"])
    torch.testing.assert_close(found["on"].mean(), found["off"].mean(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found["on"].std(correction=0), torch.tensor(1.0), rtol=0, atol=1e-4)
    assert abs(found["off"].std() - 1) > 0.1 and abs(found["off"].mean()) > 0.01


@pytest.mark.checklist("P21")
def test_p21_processes_sample_differently_and_reruns_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # one prompt only, so that nothing but the random streams can tell rollouts apart
    options = {"prompts": [{"prompt": "hello"}]}
    first = rollout_of(trainer(tmp_path, **options)).episodes
    again = rollout_of(trainer(tmp_path, **options)).episodes
    assert torch.equal(first.input_ids_BT, again.input_ids_BT)
    assert len({tuple(row) for row in first.responses()}) == 8
    made = trainer(tmp_path, **options)
    assert rollout_of(made, iteration=1).episodes.responses() != first.responses()
    monkeypatch.setattr(PPOConfig, "process_index", property(lambda _: 1))
    other = rollout_of(made).episodes
    assert not {tuple(row) for row in other.responses()} & {tuple(row) for row in first.responses()}


@pytest.mark.checklist("P25")
def test_p25_a_padded_rollout_logs_what_its_rows_alone_log(tmp_path: Path) -> None:
    made = with_reward(tmp_path, max_new_tokens=9)
    move_policy(made)
    rollout = rollout_of(made)
    rollout.episodes.length_B.copy_(UNEVEN)
    entropy_BR = made.method.forwards(rollout.episodes).entropy_BR
    # what stands outside the mask must not count, whatever it is
    noise_BR = torch.where(rollout.episodes.mask_BR, 0.0, 1e3)
    assert rollout.values_BR is not None and rollout.returns_BR is not None
    for tensor_BR in (rollout.logps_BR, rollout.values_BR, rollout.returns_BR, entropy_BR):
        tensor_BR.add_(noise_BR)

    def logged(rows: torch.Tensor) -> dict[str, float]:
        part = rollout.rows(rows)
        r = part.episodes.sampler_logps_BR.shape[1]
        assert part.ref_logps_BR is not None
        non_score_BR = part.logps_BR - part.ref_logps_BR
        return rollout_metrics(part, non_score_BR, entropy_BR[rows, :r], made.reduce, 8)

    whole, singles = logged(torch.arange(8)), [logged(torch.tensor([i])) for i in range(8)]
    # means over the rollout_batch_size of 8 add up over its rows
    for name in ("objective/kl", "objective/entropy", "objective/non_score_reward", "rollout/entropy_per_token"):
        assert whole[name] == pytest.approx(sum(each[name] for each in singles), rel=1e-6), name
        assert abs(whole[name]) < 100, name
    assert rollout.ref_logps_BR is not None
    kl = masked_sum(rollout.logps_BR - rollout.ref_logps_BR, rollout.episodes.mask_BR) / 8
    assert whole["objective/kl"] == pytest.approx(float(kl), rel=1e-6)
    assert whole["rollout/length"] == 39 / 8
    assert whole["rollout/logprob_mismatch"] == pytest.approx(max(e["rollout/logprob_mismatch"] for e in singles))


def test_the_prompt_stream_is_a_function_of_its_place() -> None:
    whole = stream_rows(5, 3, 0, 15)
    assert [sorted(whole[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert stream_rows(5, 3, 7, 6) == whole[7:13]
    assert whole[:5] != whole[5:10]


def test_a_text_prompt_gets_no_eos_from_a_tokenizer_that_ends_texts_in_one() -> None:
    ends: Any = byte_tokenizer()
    ends.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {ends.eos_token}", special_tokens=[(ends.eos_token, ends.eos_token_id)]
    )
    assert ends("Hi").input_ids[-1] == ends.eos_token_id
    assert Prompts.of([{"prompt": "Hi"}], ends).ids == [TOKENIZER("Hi").input_ids]
    # one that the prompt says itself stays
    said = f"Hi{ends.eos_token}"
    assert Prompts.of([{"prompt": said}], ends).ids[0][-1] == ends.eos_token_id
