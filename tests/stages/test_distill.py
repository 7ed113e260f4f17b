"""Distillation on the tiny base: what trains and what does not, whose replies are learned, the teacher's place."""

from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.errors import UserError
from preftune.models.adapters import TEACHER, AdapterSet
from preftune.models.base import Base
from preftune.models.loading import load_model
from preftune.models.lora import LoraSpec
from preftune.models.tokens import load_tokenizer
from preftune.stages import teachers
from preftune.stages.distill import DistillationConfig, DistillationTrainer
from preftune.stages.grpo import GRPOConfig
from preftune.stages.ppo.method import Step
from preftune.stages.ppo.rollout import decode, micro_batches
from preftune.stages.ppo.shared import own_share
from preftune.stages.teachers import TeacherSource, check_vocabularies

from .collecting import collect
from .tiny_distill import DEMOS, adapter_folder, gradient, loaded_beside, make, method_of, rollout_of
from .tiny_ppo import PROMPTS, TOKENIZER, UNEVEN, eager_tokenizer, tiny, tiny_model, trainer


@pytest.mark.checklist("T8")
def test_t08_it_trains_logs_saves_and_resumes_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "total_episodes": 24, "lmbda": 0.5}
    options["learning_rate"] = 1e-2
    whole = make(tmp_path, prompts=DEMOS, **options)
    start = whole.adapters.digest("default")
    whole.train()
    logged = [each for each in whole.state.log_history if "rollout/length" in each]
    names = {"loss", "entropy", "policy/grad_norm", "completions/mean_length", "rollout/eos_rate", "val/ratio"}
    assert len(logged) == 3 and all(names <= each.keys() for each in logged)
    assert not any("scores" in name or "reward" in name or name == "objective/kl_coef" for name in logged[0])
    # the first and the third iteration take the data's replies, which no sampler has drawn
    assert ["rollout/sampler_kl" in each for each in logged] == [False, True, False]
    # after step 3 a rollout of the student's own is in flight
    resumed = make(tmp_path, prompts=DEMOS, **options)
    resumed.train(str(tmp_path / "checkpoint-3"))
    assert resumed.adapters.digest("default") == whole.adapters.digest("default") != start
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_a_student_comes_to_say_what_its_teacher_says(tmp_path: Path) -> None:
    teacher = adapter_folder(tmp_path / "teacher")
    made = make(tmp_path / "out", teacher, total_episodes=160, num_mini_batches=1, learning_rate=3e-2)
    before = made.evaluate(PROMPTS)["eval_loss"]
    made.train()
    assert made.evaluate(PROMPTS)["eval_loss"] < 0.5 * before


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.checklist("T3")
@pytest.mark.parametrize("size", [1, 3, 8])
def test_t03_the_loss_is_the_mean_over_the_steps_tokens_whatever_the_micro_batches(tmp_path: Path, size: int) -> None:
    made = make(tmp_path, per_device_train_batch_size=size, max_grad_norm=0, max_new_tokens=9, mismatch_tolerance=1e9)
    rollout = rollout_of(made)
    rollout.episodes.length_B.copy_(UNEVEN)
    rollout.episodes.__dict__.pop("host", None)
    whole = gradient(made, rollout)
    alone, tokens = [], int(UNEVEN.sum())
    for row in range(8):
        report = made.updater.gradients(rollout, torch.tensor([row]), 0.0)
        assert report.tokens == UNEVEN[row]
        each = torch.cat([p.grad.flatten() for p in made.trainables.values()])
        alone.append(each * int(UNEVEN[row]) / tokens)
    torch.testing.assert_close(whole, torch.stack(alone).sum(0), rtol=0, atol=1e-6)


@pytest.mark.checklist("T3")
def test_t03_only_the_replys_tokens_count(tmp_path: Path) -> None:
    # what stands after a reply, and whether a prompt's own tokens are likely, changes nothing
    made = make(tmp_path, max_grad_norm=0, mismatch_tolerance=1e9)
    rollout = rollout_of(made)
    lengths_B = UNEVEN.clamp(max=6)
    rollout.episodes.length_B.copy_(lengths_B)
    rollout.episodes.__dict__.pop("host", None)
    found = gradient(made, rollout)
    ids_BT, ends_B = rollout.episodes.input_ids_BT, rollout.episodes.start_B + lengths_B
    for row, end in enumerate(ends_B.tolist()):
        ids_BT[row, end:] = 65
    rollout.episodes.__dict__.pop("host", None)
    torch.testing.assert_close(gradient(made, rollout), found, rtol=0, atol=1e-7)
    with torch.no_grad():
        sums = method_of(made).measured(rollout.episodes)["loss"]
    report = made.updater.gradients(rollout, torch.arange(8), 0.0)
    assert report.tokens == int(lengths_B.sum())
    assert float(sums.sum()) == pytest.approx(report.mean("loss") * report.tokens, rel=1e-5)


@pytest.mark.checklist("T4")
def test_t04_eos_is_learned_and_a_reply_that_was_cut_off_trains_as_far_as_it_goes(tmp_path: Path) -> None:
    tokenizer = eager_tokenizer(tmp_path / "ppo")
    made = make(tmp_path, tokenizer=tokenizer, max_new_tokens=20, max_grad_norm=0, num_mini_batches=1)
    rollout = rollout_of(made)
    episodes = rollout.episodes
    finished = episodes.finished_B.tolist()
    assert any(finished) and not all(finished)
    report = made.updater.gradients(rollout, torch.arange(8), 0.0)
    # EOS is a token of its reply; every other reply has as many as were asked for
    for row, (ids, ended) in enumerate(zip(episodes.responses(), finished, strict=True)):
        assert (ids[-1] == tokenizer.eos_token_id) == ended and (ended or len(ids) == 20), row
    assert report.tokens == int(episodes.length_B.sum())
    logged = collect(made, 0, 0.0).metrics
    assert logged["completions/clipped_ratio"] == pytest.approx(1 - sum(finished) / 8)
    # without its last token, EOS, a reply's gradient is another one
    row = finished.index(True)
    whole = gradient(made, rollout, torch.tensor([row])) * int(episodes.length_B[row])
    episodes.length_B[row] -= 1
    episodes.__dict__.pop("host", None)
    short = gradient(made, rollout, torch.tensor([row])) * int(episodes.length_B[row])
    assert float((whole - short).norm()) > 1e-3 * float(whole.norm())


@pytest.mark.parametrize("rows", [torch.arange(8), torch.tensor([1, 4])])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path, rows: torch.Tensor) -> None:
    student = tiny(strength=0.2)
    student.save("default", tmp_path / "adapter")
    made = make(tmp_path / "out", loaded_beside(tmp_path / "adapter"), student, max_grad_norm=0)
    rollout = rollout_of(made)
    assert float(gradient(made, rollout, rows).norm()) < 1e-5


# plain descent: Adam would make a step of a gradient that is nothing but rounding
PLAIN: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1}

# --- the teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.checklist("T5")
def test_t05_a_teacher_on_the_students_base_is_the_one_that_is_loaded_beside_it(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "teacher")
    student = tiny(strength=0.2)
    student.save("default", tmp_path / "student")
    found = {}
    for name, teacher in (("on", folder), ("beside", loaded_beside(folder))):
        made = make(tmp_path / name, teacher, loaded_beside(tmp_path / "student"), beta=0.5, **PLAIN)
        assert method_of(made).teacher.beside == (name == "beside")
        assert (TEACHER in made.adapters.names) == (name == "on")
        made.train()
        found[name] = torch.cat([p.detach().flatten() for p in made.trainables.values()])
    torch.testing.assert_close(found["on"], found["beside"], rtol=0, atol=1e-6)


@pytest.mark.checklist("T5")
def test_t05_it_is_its_adapter_that_teaches(tmp_path: Path) -> None:
    # a student that is an exact copy of the adapter has nothing to learn from it, on its own base or beside
    folder = adapter_folder(tmp_path / "teacher")
    for teacher in (folder, loaded_beside(folder)):
        made = make(tmp_path / "out", teacher, loaded_beside(folder), max_grad_norm=0)
        assert float(gradient(made, rollout_of(made)).norm()) < 1e-5
    bare = make(tmp_path / "out", tiny_model(), loaded_beside(folder), max_grad_norm=0)
    assert float(gradient(bare, rollout_of(bare)).norm()) > 1e-2


@pytest.mark.checklist("T5")
def test_t05_the_teacher_never_changes_and_holds_no_gradient(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "teacher")
    made = make(tmp_path / "on", folder)
    before = {name: made.adapters.digest(name) for name in (TEACHER, None)}
    made.train()
    assert {name: made.adapters.digest(name) for name in (TEACHER, None)} == before
    assert before[TEACHER] == teachers.parent_entry(folder, folder)["sha256"]
    beside = make(tmp_path / "beside", loaded_beside(folder))
    model = method_of(beside).teacher.trunk.adapters.model
    assert not any(p.requires_grad for p in model.parameters())
    beside.train()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.checklist("T5")
def test_t05_the_students_own_base_teaches_without_its_adapter(tmp_path: Path, base: Base) -> None:
    student = AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8))
    made = make(tmp_path, base.spec, student, tokenizer=load_tokenizer(base), mismatch_tolerance=1e9)
    teacher = method_of(made).teacher
    assert not teacher.beside and teacher.role is None
    assert made.made_of == {"teacher": {"model": base.spec, "revision": base.revision, "sha256": base.sha256}}
    # a fresh adapter says what its base says
    assert float(gradient(made, rollout_of(made)).norm()) < 1e-5


@pytest.mark.checklist("T6")
def test_t06_a_teacher_with_other_tokens_is_refused(tmp_path: Path) -> None:
    other = tiny_model()
    other.resize_token_embeddings(len(TOKENIZER) + 8)
    with pytest.raises(UserError, match=r"teacher_model: its vocabulary has \d+ tokens, and the student's has \d+"):
        make(tmp_path, other)
    vocabulary = TOKENIZER.get_vocab()
    first, second = sorted(vocabulary)[10:12]

    class Swapped:
        pad_token = TOKENIZER.pad_token

        def get_vocab(self) -> dict[str, int]:
            return {**vocabulary, first: vocabulary[second], second: vocabulary[first]}

    check_vocabularies(TOKENIZER, TOKENIZER, 9, 9, "here")
    with pytest.raises(UserError, match=r"here: 2 of its tokens have other ids than the student's \('"):
        check_vocabularies(TOKENIZER, Swapped(), 9, 9, "here")


@pytest.mark.checklist("T6")
def test_t06_a_teacher_that_cannot_read_so_much_is_refused(tmp_path: Path) -> None:
    short = tiny_model(seed=4)
    short.config.max_position_embeddings = 24
    short.save_pretrained(tmp_path / "short")
    TOKENIZER.save_pretrained(tmp_path / "short")
    assert method_of(make(tmp_path, tmp_path / "short", max_new_tokens=8)).teacher.beside
    with pytest.raises(UserError, match=r"teacher_model: it reads 24 positions at most, and a prompt .* may have \d+"):
        make(tmp_path, tmp_path / "short", max_new_tokens=20)


# --- whose replies ----------------------------------------------------------------------------------------------------


@pytest.mark.checklist("T7")
@pytest.mark.parametrize(
    ("lmbda", "expected"),
    [(1.0, [1] * 10), (0.0, [0] * 10), (0.5, [0, 1] * 5), (0.3, [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]), (0.9, [0] + [1] * 9)],
)
def test_t07_lmbda_is_the_share_of_iterations_that_are_the_students_own(
    tmp_path: Path, lmbda: float, expected: list[int]
) -> None:
    config = DistillationConfig(str(tmp_path), use_cpu=True, lmbda=lmbda)
    assert [int(config.speaks(each)) for each in range(10)] == expected
    assert sum(config.speaks(each) for each in range(100)) == round(100 * lmbda)


@pytest.mark.checklist("T7")
def test_t07_the_others_learn_on_the_datas_replies(tmp_path: Path) -> None:
    made = make(tmp_path, prompts=DEMOS, lmbda=0.5)
    found = collect(made, 0, 0.0)
    said = {row["prompt"]: row["completion"] for row in DEMOS}
    assert {row["prompt"]: row["completion"] for row in found.samples} == {
        prompt: said[prompt] for prompt in {row["prompt"] for row in found.samples}
    }
    assert all(row["finished"] for row in found.samples) and "rollout/sampler_kl" not in found.metrics
    ids = found.rollout.episodes.responses()
    assert {text for text in decode(TOKENIZER, ids)} == set(said.values())
    assert all(each[-1] == TOKENIZER.eos_token_id for each in ids)
    sampled = collect(made, 1, 0.0)
    assert "rollout/sampler_kl" in sampled.metrics
    assert not {row["completion"] for row in sampled.samples} & set(said.values())


@pytest.mark.checklist("T7")
def test_t07_without_the_datas_replies_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_dataset row 0: lmbda is 0.5, and the row has no reply of the data"):
        make(tmp_path, lmbda=0.5)
    turns = [{"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]}]
    made = make(tmp_path, prompts=turns, lmbda=0.0)
    reply = made.prompts.replies[0]
    assert TOKENIZER.decode(reply, skip_special_tokens=True) == "ho" and reply[-1] == TOKENIZER.eos_token_id


# --- as others call it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beta": 1.5}, "beta is 1.5, expected 0 to 1"),
        ({"lmbda": -0.1}, "lmbda is -0.1, expected 0 to 1"),
        ({"gradient_accumulation_steps": 2}, "in distillation one optimiser step is one minibatch"),
        (
            {"max_steps": 3, "num_mini_batches": 2, "total_episodes": None},
            "a multiple of num_mini_batches = 2, the opt",
        ),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(tmp_path, **values)


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("max_completion_length", "write max_new_tokens"),
        ("num_generations", "a rollout is passed over once"),
        ("kl_coef", "there is no reference"),
        ("reward_clip", "nothing is scored"),
        ("teacher_model_name_or_path", "pass it as DistillationTrainer's teacher_model"),
    ],
)
def test_words_of_other_configs_are_answered(tmp_path: Path, word: str, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        make(tmp_path, **{word: 1})


def test_what_stands_in_the_wrong_place_is_said(tmp_path: Path) -> None:
    args = DistillationConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match=r"teacher_model is a DistillationConfig, .* the order is model, teacher_model"):
        DistillationTrainer(tiny(), args, processing_class=TOKENIZER)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="no teacher is given"):
        DistillationTrainer(tiny(), None, args, PROMPTS, processing_class=TOKENIZER)
    with pytest.raises(UserError, match="args is a GRPOConfig, expected a DistillationConfig"):
        wrong: Any = GRPOConfig(str(tmp_path), use_cpu=True)
        DistillationTrainer(tiny(), tiny_model(), wrong, PROMPTS, processing_class=TOKENIZER)
    with pytest.raises(UserError, match="'rewards' is no argument of it"):
        DistillationTrainer(tiny(), tiny_model(), args, PROMPTS, processing_class=TOKENIZER, rewards=())


@pytest.mark.checklist("T9")
def test_t09_the_parts_of_two_processes_add_up_to_the_gradient_of_one(tmp_path: Path) -> None:
    made = make(tmp_path, max_new_tokens=9, max_grad_norm=0, mismatch_tolerance=1e9)
    rollout = rollout_of(made)
    rollout.episodes.length_B.copy_(UNEVEN)
    rollout.episodes.__dict__.pop("host", None)
    whole, method = gradient(made, rollout), method_of(made)
    parts = [own_share(torch.arange(8), rollout, process, 2) for process in range(2)]
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    step = Step.of(rollout, torch.arange(8), made.reduce)  # as the sums over both would have it
    found = torch.zeros_like(whole)
    for rows in parts:
        for parameter in made.trainables.values():
            parameter.grad = None
        for part in micro_batches(rollout.episodes, rows, 3):
            method.backward(rollout.rows(part), step, 0.0)
        found += torch.cat([p.grad.flatten() for p in made.trainables.values()])
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_a_source_says_where_it_lies(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "teacher")
    assert TeacherSource.named(folder) == TeacherSource(adapter=folder)
    assert TeacherSource.named("random:llama") == TeacherSource(model="random:llama")
    with pytest.raises(UserError, match=r"teacher_model: .*no-such.* is no folder"):
        make(tmp_path / "out", "./no-such-teacher")


def test_ppo_has_no_teacher_and_still_wants_a_reward(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reward is given"):
        trainer(tmp_path, reward=None)
