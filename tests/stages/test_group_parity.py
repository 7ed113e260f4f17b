"""Our GRPO and RLOO against TRL's own trainers on the same replies: advantages, loss, gradients and what is logged.

TRL's trainers run padded rows through a plain PEFT model; their replies are put in the place of what they would sample.
The policy is moved after the rollout, so that ratios differ from 1, some are clipped, and the KL is not 0.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl.trainer.grpo_config import GRPOConfig as TrlGRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TrlGRPO
from trl.trainer.rloo_config import RLOOConfig as TrlRLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer as TrlRLOO

from preftune.models.generate import Generation
from preftune.stages.ppo import rollout as rollout_file
from preftune.stages.ppo.rewards import RewardSource
from preftune.stages.ppo.rollout import Rollout

from .tiny_group import make, rollout_of
from .tiny_ppo import TOKENIZER, tiny, tiny_model

TOLERANCE = 1e-6
"""In the loss; in each gradient, relative to the norm of all of them."""
GROUP, LONGEST = 4, 9
PROMPTS = [{"prompt": "so"}, {"prompt": "what is it?"}]
EOS = TOKENIZER.eos_token_id
TRL: dict[str, tuple[Any, Any]] = {"grpo": (TrlGRPOConfig, TrlGRPO), "rloo": (TrlRLOOConfig, TrlRLOO)}


def answers() -> dict[str, list[list[int]]]:
    """Four replies to each prompt, of unlike lengths; some end in EOS, the longest do not."""
    draw = random.Random(3)
    lengths = {"so": (1, 9, 4, 6), "what is it?": (9, 2, 9, 3)}
    return {
        prompt: [[draw.randrange(20, 200) for _ in range(n - (n < LONGEST))] + [EOS] * (n < LONGEST) for n in those]
        for prompt, those in lengths.items()
    }


def letters(completions: Sequence[str], **_: Any) -> list[float]:
    """A score that differs from text to text."""
    return [sum(ord(char) % 7 for char in text) / 10 - len(text) / 5 for text in completions]


def odd(completions: Sequence[str], **_: Any) -> list[float | None]:
    """Another one, of another scale, that does not apply to every reply."""
    return [None if len(text) == 8 else 40.0 * (len(text) % 3) for text in completions]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our prompts are answered by `answers`, in their order."""
    known = {tuple(TOKENIZER(prompt)["input_ids"]): those for prompt, those in answers().items()}

    def sample(_adapters: Any, _role: str, prompts: Sequence[Sequence[int]], **_: Any) -> Generation:
        waiting = {ids: iter(those) for ids, those in known.items()}
        tokens = [next(waiting[tuple(ids)]) for ids in prompts]
        return Generation(tokens, [[0.0] * len(row) for row in tokens], [row[-1] == EOS for row in tokens])

    monkeypatch.setattr(rollout_file, "sample", sample)
    yield


def theirs(kind: str, folder: Path, adapters: Any, rewards: Sequence[Callable[..., Any]], **options: Any) -> Any:
    """TRL's trainer on a plain copy of our policy, whose replies are `answers`."""
    config, trainer = TRL[kind]
    adapters.save("default", folder / "adapter")
    values = {
        "use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False, "num_iterations": 2,
        "per_device_train_batch_size": 8, "num_generations": GROUP, "max_completion_length": LONGEST, "seed": 1,
        "shuffle_dataset": False,
    } | options  # fmt: skip
    model = PeftModel.from_pretrained(tiny_model(), folder / "adapter", is_trainable=True)
    made = trainer(
        model, list(rewards), config(str(folder / "trl"), **values), Dataset.from_list(PROMPTS),
        processing_class=TOKENIZER,
    )  # fmt: skip
    waiting = {tuple(TOKENIZER(prompt)["input_ids"]): iter(those) for prompt, those in answers().items()}

    def generate(prompt_ids: Sequence[Sequence[int]], *_: Any) -> Any:
        tokens = [next(waiting[tuple(ids)]) for ids in prompt_ids]
        return (tokens, None) if kind == "grpo" else tokens

    made._generate_single_turn = generate
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    made.model.train()
    return made


@torch.no_grad()
def move(ours: Any, other: Any, far: float) -> None:
    """Both policies, alike."""
    generator = torch.Generator().manual_seed(1)
    trained = {name: p for name, p in other.model.named_parameters() if p.requires_grad}
    own = {name: p for name, p in ours.adapters.model.named_parameters() if p.requires_grad}
    assert len(trained) == len(own) > 0
    for name, parameter in own.items():
        target = trained[name]
        torch.testing.assert_close(target, parameter, rtol=0, atol=0)
        parameter.add_(far * torch.randn(parameter.shape, generator=generator))
        target.copy_(parameter)


def rows_in_prompts_order(rollout: Rollout, other: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where each of TRL's rows stands in our rollout."""
    said = {tuple(row): place for place, row in enumerate(rollout.episodes.responses())}
    masks = (other["completion_ids"] != TOKENIZER.pad_token_id).sum(1)
    return torch.tensor([said[tuple(row[:n].tolist())] for row, n in zip(other["completion_ids"], masks, strict=True)])


def compare(
    kind: str,
    folder: Path,
    options: dict[str, Any],
    rewards: Sequence[Callable[..., Any]] = (letters,),
    far: float = 0.05,
    before: float = 0.0,
    **trl: Any,
):
    """Run both, `far` from the rollout's policy, which is `before` away from the reference; what each has logged."""
    mini_batches = options.pop("num_mini_batches", 1)
    sources = [RewardSource("function", each) for each in rewards]
    ours = make(
        folder / "ours", kind, tiny(strength=0.2), reward=(), rewards=sources, prompts=PROMPTS, max_new_tokens=LONGEST,
        num_mini_batches=mini_batches, max_grad_norm=0, mismatch_tolerance=1e9, **options,
    )  # fmt: skip
    other = theirs(kind, folder, ours.adapters, rewards, **options, **trl)
    move(ours, other, before)
    rollout = rollout_of(ours)
    batch = other._generate_and_score_completions([row for row in PROMPTS for _ in range(GROUP)])
    place = rows_in_prompts_order(rollout, batch)
    torch.testing.assert_close(rollout.advantages_BR[place, 0], batch["advantages"], rtol=0, atol=1e-5)
    move(ours, other, far)
    # ours takes the whole rollout, or its first minibatch's groups; theirs the same rows, in its own micro-batches
    wanted = torch.arange(8 // mini_batches)
    report = ours.updater.gradients(rollout, wanted, 0.0)
    steps = other.args.gradient_accumulation_steps
    chosen = [i for i, row in enumerate(place.tolist()) if row < len(wanted)]
    loss = 0.0
    for part in torch.tensor(chosen).chunk(steps):
        inputs = {
            name: x[part] if isinstance(x, torch.Tensor) and x.dim() and len(x) == 8 else x for name, x in batch.items()
        }
        each = other._compute_loss(other.model, inputs)
        if kind == "rloo":  # its Trainer divides
            each = each / steps
        each.backward()
        loss += each.item()
    assert report.mean("policy_loss") == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)
    gradients = {name: p.grad for name, p in other.model.named_parameters() if p.requires_grad}
    own = {name: p.grad for name, p in ours.adapters.model.named_parameters() if p.requires_grad}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert norm > 1e-2
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=0, atol=TOLERANCE * norm, msg=name)
    logged = ours.loop.metrics | ours.method.update_metrics(
        {name: report.mean(name) for name in ours.method.statistics} | report.largest
    )
    return logged, {name: values[-1] for name, values in other._metrics["train"].items()}


CASES: dict[str, dict[str, Any]] = {
    "dapo, the default": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05},
    "clip-higher": {"epsilon": 0.1, "epsilon_high": 0.15},
    "two-sided": {"epsilon": 0.05, "delta": 1.1},
    "gspo": {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.01, "epsilon_high": 0.02},
    "gspo with dapo's mean": {"importance_sampling_level": "sequence", "epsilon": 0.01},
    "over the batch": {"scale_rewards": "batch"},
    "plain kl": {"use_bias_correction_kl": False, "beta": 0.3},
    "weighted kl of rows": {"importance_sampling_level": "sequence", "beta": 0.3},
    "no reference": {"beta": 0.0},
    "truncated": {"mask_truncated_completions": True},
    "truncated, grpo": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "truncated, bnpo": {"mask_truncated_completions": True, "loss_type": "bnpo"},
    "colder": {"temperature": 0.7},
}


@pytest.mark.checklist("G10")
@pytest.mark.parametrize("case", CASES)
def test_g10_grpo_is_trls(given: None, tmp_path: Path, case: str) -> None:
    logged, expected = compare("grpo", tmp_path, {"beta": 0.04, **CASES[case]})
    shared = expected.keys() & logged.keys()
    assert {"reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/clipped_ratio"} <= shared
    # what TRL logs and this does not: a time
    assert expected.keys() - shared <= {"step_time"}
    assert ("kl" in shared) is (CASES[case].get("beta") != 0)
    for name in shared:
        assert logged[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), name
    clips = [name for name in shared if "clip_ratio/" in name or name == "cispo_clip_ratio"]
    assert clips
    if case in ("clip-higher", "two-sided", "gspo"):
        assert 0 < max(logged[name] for name in clips if name.endswith("_mean")) < 1


@pytest.mark.checklist("G10")
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_g10_accumulated_steps_are_trls(given: None, tmp_path: Path, loss_type: str) -> None:
    compare(
        "grpo",
        tmp_path,
        {"loss_type": loss_type, "beta": 0.04},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )


@pytest.mark.checklist("G10")
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_g10_a_minibatch_of_the_rollout_is_trls(given: None, tmp_path: Path, loss_type: str) -> None:
    compare(
        "grpo", tmp_path, {"loss_type": loss_type, "beta": 0.04, "num_mini_batches": 2},
        per_device_train_batch_size=4, steps_per_generation=2,
    )  # fmt: skip


@pytest.mark.checklist("G16")
@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_g16_several_rewards_are_trls(given: None, tmp_path: Path, how: str) -> None:
    options = {"beta": 0.0, "multi_objective_aggregation": how, "reward_weights": [1.0, 0.25]}
    logged, expected = compare("grpo", tmp_path, options, (letters, odd))
    for name in expected.keys() & logged.keys():
        assert logged[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), name
    assert {"rewards/letters/mean", "rewards/odd/std"} <= expected.keys() & logged.keys()


@pytest.mark.checklist("G17")
def test_g17_the_tokens_of_highest_entropy_are_trls_while_the_policy_is_the_old_one(
    given: None, tmp_path: Path
) -> None:
    """TRL takes the entropies of the policy that trains, micro-batch by micro-batch; ours are those of the rollout."""
    logged, expected = compare("grpo", tmp_path, {"top_entropy_quantile": 0.4, "beta": 0.04}, far=0.0)
    assert logged["entropy"] == pytest.approx(expected["entropy"], rel=2e-5)


RLOO: dict[str, dict[str, Any]] = {
    "the default": {},
    "far": {"beta": 0.5, "epsilon": 0.1, "epsilon_high": 0.3},
    "normalised": {"normalize_advantages": True},
    "no reference": {"beta": 0.0},
    "truncated": {"mask_truncated_completions": True},
}


@pytest.mark.checklist("G11")
@pytest.mark.parametrize("case", RLOO)
def test_g11_rloo_is_trls(given: None, tmp_path: Path, case: str) -> None:
    logged, expected = compare("rloo", tmp_path, {"beta": 0.05, **RLOO[case]}, before=0.02)
    shared = expected.keys() & logged.keys()
    assert {"reward", "reward_std", "frac_reward_zero_std", "clip_ratio/low_mean", "entropy"} <= shared
    assert expected.keys() - shared <= {"step_time"}
    for name in shared:
        assert logged[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), name


@pytest.mark.checklist("G11")
def test_g11_accumulated_steps_are_trls(given: None, tmp_path: Path) -> None:
    compare("rloo", tmp_path, {"beta": 0.05}, per_device_train_batch_size=4, gradient_accumulation_steps=2)
