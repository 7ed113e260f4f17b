"""PPO end to end on a tiny random model: what it takes, that it learns, what it logs, that it resumes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from preftune import PPOConfig, PPOTrainer
from preftune.errors import UserError
from preftune.models.lineage import adapter_sha256, read_lineage, tokenizer_info, write_lineage
from preftune.models.loading import load_model
from preftune.models.lora import LoraSpec

from .tiny_ppo import (
    PROMPTS,
    TOKENIZER,
    Steps,
    letters,
    move_policy,
    reward_folder,
    rollout_of,
    settings,
    tiny,
    tiny_model,
    trainer,
    with_reward,
)


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
    states = [made.optimizer.state_dict()["state"] for made in (whole, resumed) if made.optimizer is not None]
    assert len(states) == 2
    for one, two in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.checklist("P12")
def test_p12_the_coefficient_follows_the_measured_kl_in_steps_of_an_iterations_episodes(tmp_path: Path) -> None:
    count = Steps()
    trainer(tmp_path, callbacks=[count], total_episodes=24, kl_coef=0.1, kl_target=5.0, kl_horizon=16).train()
    logged = [log["objective/kl_coef"] for log in count.logs if "objective/kl_coef" in log]
    # the KL stays far below 5 nats: every iteration of 8 episodes takes off 20% x 8 / 16
    assert logged == pytest.approx([0.1, 0.09, 0.081], rel=1e-9)
    count = Steps()
    trainer(tmp_path, callbacks=[count], total_episodes=24, kl_coef=0.1).train()
    assert [log["objective/kl_coef"] for log in count.logs if "objective/kl_coef" in log] == [0.1] * 3


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_in": "loss"},
        {"kl_in": "loss", "kl_estimator": "k2_sequence"},
        {"kl_in": "loss", "kl_estimator": "k3"},
    ],
)
def test_a_kl_penalty_holds_the_policy_back_wherever_it_stands(tmp_path: Path, options: dict[str, Any]) -> None:
    """Nothing but the penalty pulls: the policy that was moved away comes back towards its reference."""
    count = Steps()
    made = trainer(
        tmp_path, reward=lambda completions: [0.0] * len(completions), kl_coef=1.0, learning_rate=1e-2,
        whiten_advantages=False, rollout_batch_size=128, total_episodes=128 * 10, per_device_train_batch_size=64,
        num_ppo_epochs=1, callbacks=[count], **options,
    )  # fmt: skip
    made.own_reference = False  # it is moved away on purpose
    move_policy(made, 0.5)
    made.train()
    kl = [log["objective/kl"] for log in count.logs if "objective/kl" in log]
    assert kl[0] > 1 and sum(kl[-3:]) / 3 < 0.6 * kl[0], kl
    assert ("loss/kl_avg" in count.logs[0]) == ("kl_in" in options)


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


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [code] = [
        each for each in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "reward_funcs=share_of_e" in each
    ]
    monkeypatch.chdir(tmp_path)
    told: dict[str, Any] = {}
    exec(code, told)
    assert told["trainer"].state.global_step == 2 * 4  # 16 episodes in iterations of 8, 4 epochs each


def policies(folder: Path) -> dict[str, Any]:
    """Every form in which a policy may be given, all with the same LoRA, and the tiny model's tokenizer."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tiny().save("default", folder / "saved")
    return {
        "AdapterSet": tiny(),
        "PeftModel": get_peft_model(tiny_model(), lora),
        "PeftModel, loaded": PeftModel.from_pretrained(tiny_model(), folder / "saved", is_trainable=True),
        "PreTrainedModel": tiny_model(),
    }


def test_every_form_of_policy_trains_and_saves(tmp_path: Path) -> None:
    for name, model in policies(tmp_path).items():
        folder = tmp_path / name
        made = trainer(folder, model, **({"lora": LoraSpec(r=4, alpha=8)} if name == "PreTrainedModel" else {}))
        assert made.adapters.names == ["default", "ref", "value"], name
        before = {role: made.adapters.digest(role) for role in (None, "default", "ref")}
        assert before["default"] == before["ref"], name
        made.train()
        after = {role: made.adapters.digest(role) for role in before}
        assert {role for role in before if after[role] != before[role]} == {"default"}, name
        made.save_model()
        assert adapter_sha256(folder) == after["default"], name
        loaded = PeftModel.from_pretrained(tiny_model(), folder).eval()
        ids = torch.tensor([[20, 21, 22, 23]])
        with torch.no_grad(), made.adapters.using("default"):
            torch.testing.assert_close(loaded(ids).logits, made.adapters.model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["random:llama", "stage"])
def test_a_policy_by_name_brings_its_tokenizer(tmp_path: Path, model: str, sft_folder: Path, base: Any) -> None:
    stage = model == "stage"
    made = PPOTrainer(
        str(sft_folder) if stage else model,
        args=settings(tmp_path, total_episodes=8),
        train_dataset=[{"prompt": [{"role": "user", "content": "Name a colour."}]}],
        reward_funcs=lambda completions: [float(len(turns[0]["content"])) for turns in completions],
    )
    # a stage's own rank and scaling, and its weights; a base gets a fresh adapter, which changes nothing
    spec = made.adapters.model.peft_config["default"]
    assert isinstance(spec, LoraConfig)
    assert (spec.r, spec.lora_alpha) == ((4, 8) if stage else (16, 32))
    assert (made.adapters.digest("default") == adapter_sha256(sft_folder)) is stage
    tokenizer: Any = made.processing_class
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base.path).chat_template
    bare = load_model(base)
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad(), made.adapters.using("ref"):
        assert torch.equal(made.adapters.model(ids).logits, bare(ids).logits) is not stage
    assert made.train().global_step == 4


def test_a_stages_chat_template_comes_with_it_and_another_is_refused(sft_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(sft_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("role", "role ", 1)
    tokenizer.save_pretrained(folder)

    def make() -> PPOTrainer:
        return PPOTrainer(str(folder), letters, settings(tmp_path), PROMPTS)

    with pytest.raises(UserError, match="chat_template_sha256 differs"):
        make()
    lineage = read_lineage(folder)
    lineage.tokenizer.update(tokenizer_info(tokenizer))
    write_lineage(folder, lineage)
    made: Any = make().processing_class
    assert made.chat_template == tokenizer.chat_template


def test_training_twice_goes_on_from_where_the_first_time_ended(tmp_path: Path) -> None:
    made = trainer(tmp_path, learning_rate=0.05, total_episodes=8)
    for _ in range(2):
        before = made.adapters.digest("default")
        assert made.train().global_step == 4
        assert made.adapters.digest("default") != before


def test_adapters_that_have_their_roles_keep_them(tmp_path: Path) -> None:
    first = with_reward(tmp_path, total_episodes=8, learning_rate=0.05)
    first.train()
    reference = first.adapters.digest("ref")
    again = with_reward(tmp_path, model=first.adapters, total_episodes=8)
    assert again.adapters.digest("ref") == reference != again.adapters.digest("default")
    assert again.train().global_step == 4
    with pytest.raises(UserError, match="hold another 'reward' already"):
        trainer(tmp_path, first.adapters, reward=(), reward_adapter=reward_folder(tmp_path / "other", seed=9))


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


def test_what_is_missing_or_does_not_fit_is_an_error_in_words(tmp_path: Path) -> None:
    args = settings(tmp_path)
    with pytest.raises(UserError, match="no reward is given"):
        PPOTrainer(tiny(), None, args, PROMPTS, None, TOKENIZER)
    with pytest.raises(UserError, match="expected 'prompt'"):
        PPOTrainer(tiny(), letters, args, [{"text": "a"}], None, TOKENIZER)
    with pytest.raises(UserError, match="processing_class is missing"):
        PPOTrainer(tiny(), letters, args, PROMPTS)
    with pytest.raises(UserError, match="bias='all'"):
        PPOTrainer(tiny_model(), letters, args, PROMPTS, None, TOKENIZER, peft_config=LoraConfig(bias="all"))


def test_a_config_defaults_to_the_whole_distribution_and_one_pass(tmp_path: Path) -> None:
    made = PPOConfig(str(tmp_path), use_cpu=True, num_train_epochs=1, rollout_batch_size=8)
    assert made.num_rollouts(20) == 3  # 20 prompts in iterations of 8, the last one filled up
    assert rollout_of(trainer(tmp_path, total_episodes=None, num_train_epochs=2)).episodes.start_B.shape == (8,)
