"""`preftune export --to verl`: the folder is whole, its names are verl's, and it says what verl does otherwise."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from preftune.cli import verl_reward
from preftune.models.adapters import AdapterSet
from preftune.models.lineage import Lineage, base_info, tokenizer_info, write_lineage
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.reward_model import create_reward_model, save_reward_model
from preftune.models.tokens import load_tokenizer

KEYS = set((Path(__file__).with_name("verl_keys.txt")).read_text().split())
"""Names in the configuration of verl 0.9.1's ppo_trainer, as Hydra composes it from that release's files."""
PPO = """\
  ppo:
    from: sft
    reward: [{REWARD}]
    data: prompts
    kl: {coef: 0.07}
    rollout_batch_size: 4
    total_episodes: 12
    num_ppo_epochs: 2
    num_mini_batches: 2
    max_new_tokens: 8
    temperature: 0.7
    cliprange: 0.3
    train: {learning_rate: 3.0e-5}
  later: {kind: ppo, from: sft, reward: [{REWARD}], data: prompts, rollout_batch_size: 2, total_episodes: 2}
"""
FUNCTIONS = """\
def short(prompts, completions, limit, **_):
    return [-abs(len(each[0]["content"]) - most) for each, most in zip(completions, limit)]
"""
COLUMNS = {"data_source", "prompt", "ability", "reward_model", "extra_info"}


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward stage's folder, with a mean of its scores that is to be taken off."""
    folder, base = tmp_path_factory.mktemp("made") / "reward", resolve_base("random:llama")
    tokenizer = load_tokenizer(base)
    save_reward_model(create_reward_model(base, tokenizer, LoraSpec(r=2, alpha=4)), base, folder)
    tokenizer.save_pretrained(folder)
    entry = {
        "tokenizer": tokenizer_info(tokenizer), "parents": [], "config": {}, "data": {"spec": {}, "fingerprint": ""},
        "seed": 0, "versions": {}, "created": "", "seconds": 0.0, "reward": {"mean": 0.25, "std": 2.0},
    }  # fmt: skip
    write_lineage(folder, Lineage(stage="reward", kind="reward", base=base_info(base), **entry))
    return folder


@pytest.fixture
def ready(run: Path, reward: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose PPO stage is about to begin, with a function for its reward."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    (run / "reward").symlink_to(reward)
    (run / "own_rewards.py").write_text(FUNCTIONS)
    rows = [{"prompt": f"question {place}", "limit": place} for place in range(6)]
    (run / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return with_reward(run, "{function: 'own_rewards:short', weight: 2}")


def with_reward(run: Path, reward: str) -> Path:
    recipe = (run / "recipe.yaml").read_text().split("  ppo:\n")[0]
    recipe = recipe.replace("data:\n", "data:\n  prompts: {path: prompts.jsonl}\n", 0 if "  prompts:" in recipe else 1)
    (run / "recipe.yaml").write_text(recipe + PPO.replace("{REWARD}", reward))
    return run


def started(out: Path, tmp_path: Path, **environment: str) -> dict[str, str]:
    """What verl would be started with, by the script itself with a python3 that only writes down its words."""
    words, fake = tmp_path / "words", tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{words}"\n')
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([out / "run.sh", "trainer.device=cpu"], check=True, cwd="/", env={"PATH": path, **environment})
    module, *overrides = words.read_text().splitlines()[1:]
    assert module == "verl.trainer.main_ppo" and overrides.pop() == "trainer.device=cpu"
    found = [each.split("=", 1) for each in overrides]
    assert len({key for key, _ in found}) == len(found), "a key stands twice"
    return {key: value.strip("'") for key, value in found}


def test_every_name_is_verls_and_the_recipes_values_stand_there(ready: Path, tmp_path: Path, shell):
    out = tmp_path / "out"
    code, said, err = shell("export", ready, "--to", "verl", "--stage", "ppo", "--output-dir", out)
    assert code == 0, err
    found = started(out, tmp_path, NNODES="2", GPUS_PER_NODE="4")
    assert set(found) <= KEYS
    expected = {
        "data.train_batch_size": "4", "actor_rollout_ref.actor.ppo_mini_batch_size": "2",
        "actor_rollout_ref.actor.ppo_epochs": "2", "trainer.total_training_steps": "3", "trainer.total_epochs": "3",
        "algorithm.kl_ctrl.kl_coef": "0.07", "algorithm.use_kl_in_reward": "true", "algorithm.kl_penalty": "kl",
        "actor_rollout_ref.actor.clip_ratio": "0.3", "actor_rollout_ref.actor.clip_ratio_high": "0.3",
        "actor_rollout_ref.actor.clip_ratio_low": "0.3", "actor_rollout_ref.actor.optim.lr": "3e-05",
        "actor_rollout_ref.rollout.temperature": "0.7", "data.max_response_length": "8", "data.seed": "3",
        "actor_rollout_ref.model.lora_rank": "2", "actor_rollout_ref.model.lora_alpha": "4",
        "actor_rollout_ref.model.path": str(out / "model"), "critic.model.path": str(out / "model"),
        "reward.custom_reward_function.path": str(out / "reward.py"), "trainer.nnodes": "2",
        "trainer.n_gpus_per_node": "4", "actor_rollout_ref.rollout.tensor_model_parallel_size": "4",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert (
        found["actor_rollout_ref.model.target_modules"] == "[down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj]"
    )
    assert "actor_rollout_ref.model.lora_adapter_path" not in found
    assert not [key for key in found if key.startswith("reward.reward_model")]
    # what it does otherwise is said, in the folder too
    assert "- lr_scheduler_type linear: verl" in said
    assert all(line in (out / "README.md").read_text() for line in said.splitlines() if line.startswith("- "))


def test_rows_read_back_as_the_tokens_that_preftune_answers(ready: Path, tmp_path: Path, shell):
    assert shell("export", ready, "--to", "verl", "--stage", "later", "--output-dir", tmp_path / "out")[0] == 0
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert len(rows) == 6 and all(
        set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"} for row in rows
    )
    assert rows[1]["prompt"] == [{"role": "user", "content": "question 1"}]
    assert rows[1]["reward_model"] == {"style": "rule", "ground_truth": ""}
    assert json.loads(rows[1]["extra_info"]["columns"]) == {"limit": 1}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    ids = tokenizer.apply_chat_template(rows[1]["prompt"], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == rows[1]["extra_info"]["prompt_text"]


def test_policy_and_reference_start_from_the_parent(ready: Path, tmp_path: Path, shell):
    """verl's reference is its model without the adapter: that must be the parent, and never the bare base."""
    assert shell("export", ready, "--to", "verl", "--stage", "ppo", "--output-dir", tmp_path / "out")[0] == 0
    ids, base = torch.tensor([[5, 9, 17, 4, 31, 8]]), resolve_base("random:llama")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32).eval()
    parent = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), ready / "sft")
    with torch.no_grad():
        torch.testing.assert_close(written(ids).logits, parent.model(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(written(ids).logits, load_model(base)(ids).logits, atol=0.1)


def test_a_stage_that_starts_from_the_base_has_nothing_to_merge(ready: Path, tmp_path: Path, shell):
    recipe = (ready / "recipe.yaml").read_text()
    (ready / "recipe.yaml").write_text(recipe.replace("  ppo:\n    from: sft", "  ppo:\n    from: base"))
    assert shell("export", ready, "--to", "verl", "--stage", "ppo", "--output-dir", tmp_path / "out")[0] == 0
    found, base = started(tmp_path / "out", tmp_path), resolve_base("random:llama")
    assert found["actor_rollout_ref.model.path"] == found["critic.model.path"] == str(base.path)
    assert found["actor_rollout_ref.model.tokenizer_path"] == str(tmp_path / "out" / "tokenizer")
    assert not (tmp_path / "out" / "model").exists()
    assert "start from random:llama itself" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def router(tmp_path: Path) -> Iterator[tuple[str, list[dict]]]:
    """What stands where verl serves the reward model: its address, and what it was asked."""
    asked: list[dict] = []
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "reward_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "reward_model")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            ids = tokenizer(asked[-1]["input"], add_special_tokens=asked[-1]["add_special_tokens"], return_tensors="pt")
            with torch.no_grad():
                score = float(model.eval()(ids["input_ids"]).logits)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"probs": [score]}]}).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(ready: Path, tmp_path: Path, shell) -> Path:
    run = with_reward(ready, "{stage: reward, weight: 3}, {function: 'own_rewards:short'}")
    code, _, err = shell("export", run, "--to", "verl", "--stage", "ppo", "--output-dir", tmp_path / "out")
    assert code == 0, err
    return tmp_path / "out"


def test_a_reply_gets_the_score_that_preftune_gives(exported: Path, tmp_path: Path, reward: Path, router, monkeypatch):
    """3 * (the reward model's score at the reply's EOS - its mean) + the function's."""
    address, asked = router
    monkeypatch.setattr(verl_reward, "_HERE", exported)
    row = pyarrow.parquet.read_table(exported / "train.parquet").to_pylist()[4]
    score = verl_reward.compute_score("prompts", "ok", "", row["extra_info"], reward_router_address=address)
    assert asked[0]["model"] == started(exported, tmp_path)["reward.reward_model.model_path"]
    assert asked[0]["use_activation"] is False
    base = resolve_base("random:llama")
    tokenizer = load_tokenizer(base)
    ids: Any = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids += [*tokenizer("ok", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4))
    adapters.load("reward", reward, trainable=False)
    decoder: Any = adapters.model.get_base_model().model
    with torch.no_grad(), adapters.using("reward"):
        hidden = decoder(input_ids=torch.tensor([ids])).last_hidden_state
        raw = float(adapters.heads["reward"](hidden[:, -1]))
    assert score == pytest.approx(3 * (raw - 0.25) - abs(2 - 4), abs=1e-4)
    assert (exported / "reward.py").read_text() == Path(verl_reward.__file__).read_text()


def test_the_value_starts_from_the_reward(exported: Path):
    """As verl opens it: a token classifier of the reward model, with the adapter; weight 3, mean 0.25."""
    ids = torch.tensor([[5, 9, 17, 4, 31, 8]])
    scored = AutoModelForSequenceClassification.from_pretrained(exported / "reward_model", dtype=torch.float32).eval()
    options: Any = {"num_labels": 1, "dtype": torch.float32}
    value = AutoModelForTokenClassification.from_pretrained(exported / "reward_model", **options)
    made: Any = PeftModel.from_pretrained(value, str(exported / "value_adapter"), is_trainable=True).eval()
    with torch.no_grad():
        expected = 3 * (scored(ids).logits - 0.25)
        torch.testing.assert_close(made(ids).logits[:, -1], expected, rtol=1e-4, atol=1e-4)
    trained = {name.split(".")[-3] for name, each in made.named_parameters() if each.requires_grad}
    assert trained == {"lora_A", "lora_B", "modules_to_save"}


def test_a_reward_stage_is_the_values_start_and_is_served(exported: Path, tmp_path: Path):
    found = started(exported, tmp_path)
    assert set(found) <= KEYS
    assert found["critic.model.path"] == found["reward.reward_model.model_path"] == str(exported / "reward_model")
    assert found["reward.reward_model.enable"] == "true"
    assert found["critic.model.lora_adapter_path"] == str(exported / "value_adapter")
    config = json.loads((exported / "reward_model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


@pytest.mark.parametrize(
    ("scores", "stage", "said"),
    [
        (
            "{function: 'own_rewards:short'}",
            "sft",
            "sft is a sft stage, and only PPO is .*; name one of ppo",
        ),
        ("{function: 'own_rewards:short'}", "never", "no ppo stage of that name"),
        ("{stage: reward}, {model: ./elsewhere}", "ppo", "stages.ppo.reward: 2 reward models, and verl serves one"),
        ("{function: 'own_rewards:missing'}", "ppo", "own_rewards:missing cannot be imported"),
    ],
)
def test_what_verl_would_do_wrongly_is_refused(ready: Path, tmp_path: Path, shell, scores: str, stage: str, said: str):
    run, out = with_reward(ready, scores), tmp_path / "out"
    shell.refused("export", run, "--to", "verl", "--stage", stage, "--output-dir", out, said=said)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"rollout_batch_size: 4": "rollout_batch_size: 12"}, "6 prompts, and a rollout takes 12"),
        ({"cliprange: 0.3": "reward_combination: ensemble"}, "ensemble is none of verl's; write sum"),
        ({"coef: 0.07": "coef: 0.07, in: loss, estimator: k2_sequence"}, "k2_sequence is none of verl's.*; write k2"),
        ({"r: 2, alpha: 4": "r: 2, alpha: 4, use_rslora: true"}, "5.65685 over the rank is no whole number"),
        (
            {"prompts.jsonl}": "prompts.jsonl, max_prompt_length: 4, overflow: truncate}"},
            "other tokens.*: drop",
        ),
    ],
)
def test_a_value_that_verl_cannot_have_is_refused(ready: Path, tmp_path: Path, shell, words: dict, said: str):
    text = (ready / "recipe.yaml").read_text()
    for old, new in words.items():
        text = text.replace(old, new)
    (ready / "recipe.yaml").write_text(text)
    shell.refused("export", ready, "--to", "verl", "--stage", "ppo", "--output-dir", tmp_path / "out", said=said)
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays(ready: Path, tmp_path: Path, shell):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("mine")
    shell.refused("export", ready, "--to", "verl", "--output-dir", tmp_path / "out", said="exists and is not empty")
    (ready / "sft" / "adapter_config.json").unlink()
    shell.refused("export", ready, "--to", "verl", "--output-dir", tmp_path / "new", said="holds no adapter; train it")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["thesis"] and not (tmp_path / "new").exists()
