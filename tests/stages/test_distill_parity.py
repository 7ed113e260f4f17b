"""Our distillation against TRL's own trainer on the same replies, and divergences against numbers worked out by hand.

TRL's trainer (1.16) runs with its own loss, on a plain PEFT copy of the student and on the same teacher, over rows that
are padded as it pads them.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl.trainer.distillation_config import DistillationConfig as TrlConfig
from trl.trainer.distillation_trainer import DistillationTrainer as TrlTrainer

from preftune.models.divergence import divergences, generalised_jsd
from preftune.models.logprobs import LmHead
from preftune.stages.ppo.rollout import Rollout

from .tiny_distill import make, method_of, rollout_of
from .tiny_ppo import PROMPTS, TOKENIZER, UNEVEN, tiny, tiny_model

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
TOLERANCE = 1e-6
LOG = math.log
FAIR, BIASED = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()


@pytest.mark.checklist("T1")
@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        # of the teacher (1/4, 3/4) to the student (1/2, 1/2), and back
        (0.0, 0.25 * LOG(1 / 2) + 0.75 * LOG(3 / 2)),
        (1.0, 0.5 * LOG(2) + 0.5 * LOG(2 / 3)),
        # m = (3/8, 5/8): half of either's divergence from it
        (
            0.5,
            0.5 * (0.25 * LOG(2 / 3) + 0.75 * LOG(6 / 5)) + 0.5 * (0.5 * LOG(4 / 3) + 0.5 * LOG(4 / 5)),
        ),
        # m = 3/4 student + 1/4 teacher = (7/16, 9/16)
        (
            0.25,
            0.25 * (0.25 * LOG(4 / 7) + 0.75 * LOG(4 / 3)) + 0.75 * (0.5 * LOG(8 / 7) + 0.5 * LOG(8 / 9)),
        ),
    ],
)
def test_t01_divergences_by_hand(beta: float, expected: float) -> None:
    assert generalised_jsd(FAIR, BIASED, beta).item() == pytest.approx(expected, abs=1e-7)
    assert generalised_jsd(BIASED, BIASED, beta).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.checklist("T1")
def test_t01_the_temperature_divides_the_logits_of_both() -> None:
    # logits log 3 apart at temperature 1/2 are 2 log 3 apart: odds of 9 to 1; the student's are even
    student, teacher = LmHead(torch.zeros(2, 1)), LmHead(torch.tensor([[math.log(3)], [0.0]]))
    ones_11 = torch.ones(1, 1)
    found = divergences(
        ones_11, ones_11, torch.tensor([0]), student=student, teacher=teacher, beta=0.0, temperature=0.5
    )
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert found.divergence_N.item() == pytest.approx(expected, abs=1e-6)
    assert found.logps_N.item() == pytest.approx(math.log(0.5)) and found.entropy_N.item() == pytest.approx(math.log(2))


@pytest.mark.checklist("T2")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("chunk", [3, None])
def test_t02_chunks_and_other_heads_have_autograds_gradient(beta: float, chunk: int | None) -> None:
    torch.manual_seed(0)
    student = LmHead(torch.randn(11, 6), torch.randn(11), softcap=3.0, scale=0.7)
    teacher = LmHead(torch.randn(11, 9))
    states_NH, taught_NH = torch.randn(8, 6, requires_grad=True), torch.randn(8, 9)
    weights_N = torch.rand(8)
    targets_N = torch.arange(8)
    found = divergences(
        states_NH, taught_NH, targets_N, student=student, teacher=teacher, beta=beta, temperature=0.8, chunk=chunk
    )
    (own,) = torch.autograd.grad((found.divergence_N * weights_N).sum(), states_NH)
    logps_NV = (student.logits(states_NH) / 0.8).log_softmax(-1)
    plain_N = generalised_jsd(logps_NV, (teacher.logits(taught_NH) / 0.8).log_softmax(-1), beta)
    (expected,) = torch.autograd.grad((plain_N * weights_N).sum(), states_NH)
    torch.testing.assert_close(own, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found.divergence_N, plain_N, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found.logps_N, logps_NV.detach().gather(1, targets_N[:, None])[:, 0])


def uneven(made: Any) -> Rollout:
    """A rollout whose replies have unlike lengths, every other one ended in EOS."""
    rollout = rollout_of(made)
    rollout.episodes.length_B.copy_(UNEVEN.clamp(max=6))
    rollout.episodes.finished_B.copy_(torch.arange(8) % 2 == 0)
    rollout.episodes.__dict__.pop("host", None)
    return rollout


def padded(rollout: Rollout) -> dict[str, torch.Tensor]:
    """The same rows as TRL lays them out: prompts padded on the left, completions on the right."""
    episodes = rollout.episodes
    starts, lengths = episodes.start_B.tolist(), episodes.length_B.tolist()
    p, r, pad = max(starts), max(lengths), TOKENIZER.pad_token_id
    found = {name: torch.zeros(len(starts), size, dtype=torch.long) for name, size in
             (("prompt_ids", p), ("prompt_mask", p), ("completion_ids", r), ("completion_mask", r))}  # fmt: skip
    found["prompt_ids"] += pad
    found["completion_ids"] += pad
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        row = episodes.input_ids_BT[i]
        found["prompt_ids"][i, p - start :], found["prompt_mask"][i, p - start :] = row[:start], 1
        found["completion_ids"][i, :length], found["completion_mask"][i, :length] = row[start : start + length], 1
    return found


def theirs(folder: Path, adapters: Any, **options: Any) -> Any:
    """TRL's trainer on a plain copy of our student."""
    adapters.save("default", folder / "adapter")
    config = TrlConfig(
        str(folder / "trl"), use_cpu=True, bf16=False, report_to="none", activation_checkpointing=False, **options
    )
    model = PeftModel.from_pretrained(tiny_model(), folder / "adapter", is_trainable=True)
    made: Any = TrlTrainer(
        model, tiny_model(seed=3), config, Dataset.from_list(PROMPTS), processing_class=TOKENIZER
    )  # fmt: skip
    made.model.train()
    return made


@pytest.mark.checklist("T2")
@pytest.mark.parametrize(
    ("beta", "temperature"), [*((beta, 1.0) for beta in BETAS), (0.0, 0.7), (0.5, 1.6), (1.0, 0.7)]
)
def test_t02_loss_and_gradient_are_trls(tmp_path: Path, beta: float, temperature: float) -> None:
    options = {"beta": beta, "temperature": temperature}
    ours = make(tmp_path / "ours", model=tiny(strength=0.2), max_grad_norm=0, mismatch_tolerance=1e9, **options)
    other = theirs(tmp_path, ours.adapters, **options)
    rollout = uneven(ours)
    report = ours.updater.gradients(rollout, torch.arange(8), 0.0)
    batch, tokens = padded(rollout), float(UNEVEN.clamp(max=6).sum())
    loss, entropy_sum, count = other._compute_loss(other.model, batch, torch.tensor(tokens))
    loss.backward()
    assert int(count) == tokens == report.tokens
    assert report.mean("loss") == pytest.approx(loss.item(), rel=TOLERANCE, abs=TOLERANCE) and loss.item() > 0.05
    assert report.mean("entropy") == pytest.approx(entropy_sum.item() / tokens, rel=1e-5)
    gradients = {name: p.grad for name, p in other.model.named_parameters() if p.requires_grad}
    own = {name: p.grad for name, p in ours.adapters.model.named_parameters() if p.requires_grad}
    norm = torch.cat([each.flatten() for each in gradients.values()]).norm().item()
    assert norm > 1e-2 and own.keys() == gradients.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(own[name], expected, rtol=0, atol=TOLERANCE * norm, msg=name)
    assert method_of(ours).update_metrics({name: 0.0 for name in method_of(ours).statistics}).keys() >= {
        "loss",
        "entropy",
    }


def test_names_and_defaults_are_trls() -> None:
    from dataclasses import fields

    from preftune.stages.kinds import DISTILL

    known = {each.name: each.default for each in fields(TrlConfig)}
    own = {each.name: each.default for each in DISTILL.parameters}
    shared = own.keys() & known.keys()
    assert shared == {"beta", "temperature", "top_k", "top_p"}
    assert {name: own[name] for name in shared} == {name: known[name] for name in shared}
    assert own["lmbda"] == 1  # what TRL's trainer does, which samples every reply
