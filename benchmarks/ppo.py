"""PPO: our trainer against the last TRL release that has one, alternating, each measurement in its own process.

    python -m preftune.benchmarks.ppo --data hh_harmless.jsonl.gz

TRL 1.12 is installed into a venv of its own (`--venv`, made when it is not there). Both sides: the same prompts of at
most 128 tokens, responses of 48 tokens that nothing ends, 16 episodes an iteration, 4 epochs of one optimiser step,
forwards of 4 sequences, bf16 base, LoRA r=16 on all linear layers for policy and value, a reward model of the base's
size. Ours with a value adapter (`separate`) and with a head on the policy's trunk (`shared`). The first iteration warms
up and is not counted. `sft` is our SFT on as many tokens a forward, for its memory.
"""

import argparse
import json
import os
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..data.encode import encode_prompts
from ..data.load import load_rows
from ..data.spec import DataSpec, SourceSpec
from ..models.adapters import AdapterSet
from ..models.lineage import Lineage, base_info, library_versions, tokenizer_info, write_lineage
from ..models.loading import load_model
from ..models.lora import linear_names
from ..models.tokens import load_tokenizer, prepare_model
from ..stages.ppo.rollout import stream_rows
from .measure import StepClock, alternate, machine, measured_apart, summary, write_result
from .sides import LORA, our_trainer
from .workload import WORDS, base, write_rows

SIDES = ("separate", "shared", "trl", "sft")
PEER = ("trl==1.12.0", "peft", "torch==" + torch.__version__.partition("+")[0])
EPISODES, EPOCHS, NEW, MICRO, LONGEST, TEMPERATURE, SEED = 16, 4, 48, 4, 128, 0.7, 42
# a token that stands in no prompt and no reply: on our side too, nothing ends before NEW tokens
NEVER = "<repo_name>"


class IterationClock(TrainerCallback):
    """When each iteration ended: an optimiser step an epoch."""

    def __init__(self) -> None:
        self.clock = StepClock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % EPOCHS == 0:
            self.clock.on_step_end()


def main() -> None:
    args = _arguments()
    if args.worker:
        print(json.dumps(_measure(args.worker, json.loads(args.settings.read_text(encoding="utf-8")))))
        return
    with tempfile.TemporaryDirectory(prefix="preftune-benchmark-") as folder:
        settings = Path(folder) / "settings.json"
        settings.write_text(json.dumps(_settings(args, Path(folder))), encoding="utf-8")

        def measure(side: str) -> dict[str, Any]:
            if side == "trl":
                return _peer(args.venv, settings)
            return measured_apart(f"{__package__}.ppo", ["--worker", side, "--settings", str(settings)])

        found = alternate(args.sides, args.rounds, measure)
    sides = {side: summary(each, "episodes_per_second") for side, each in found.items() if side != "sft"}
    sft = max(one["peak_memory_bytes"] for one in found["sft"]) / 1e9 if "sft" in found else None
    for mine in sides.values():
        if "trl" in sides:
            mine["speed / trl"] = mine["episodes_per_second"] / sides["trl"]["episodes_per_second"]
        if sft:
            mine["memory / our sft"] = mine["peak_memory_gb"] / sft
    result = {"machine": machine(), "peer": PEER[0], "sft_peak_memory_gb": sft, "sides": sides}
    for side, mine in sides.items():
        said = {k: round(v, 3) for k, v in mine.items() if isinstance(v, float)}
        print(f"{side}: {json.dumps(said)}", flush=True)
    print(write_result(args.name, result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(Path(__file__).parents[1] / "data/quickstart/prompts.jsonl"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--iterations", type=int, default=3, help="the first one warms up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "preftune-trl-1.12")
    parser.add_argument("--name", default="ppo", help="of the file in benchmarks/results")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both sides are given."""
    spec = DataSpec((SourceSpec(args.data),), max_prompt_length=LONGEST, overflow="drop")
    rows, _ = encode_prompts(load_rows(spec, "prompt", (Path(),)).rows, load_tokenizer(base()), spec)
    count = EPISODES * args.iterations
    if len(rows) < count:
        raise SystemExit(f"{args.data}: {len(rows)} prompts of at most {LONGEST} tokens, expected {count}")
    return {
        "model": str(base().path),
        "prompts": [list(ids) for ids in rows["prompt_ids"]][:count],
        "messages": list(rows["prompt"])[:count],
        "output": str(folder / "out"),
        "pad_token": str(load_tokenizer(base()).pad_token),
        "modules": linear_names(load_model(base())),
        "r": LORA.r,
        "alpha": int(LORA.alpha),
        "episodes": EPISODES,
        "epochs": EPOCHS,
        "iterations": args.iterations,
        "micro": MICRO,
        "new_tokens": NEW,
        "temperature": TEMPERATURE,
    }


def _peer(folder: Path, settings: Path) -> dict[str, Any]:
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER], check=True)
        (folder / "ready").touch()
    script = Path(__file__).with_name("trl_ppo.py")
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    command = [str(python), "-W", "ignore", str(script), str(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"TRL's side ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure(side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a worker of ours does."""
    if not torch.cuda.is_available():
        common: dict[str, Any] = {"use_cpu": True}
    else:
        common = {}
    with tempfile.TemporaryDirectory() as folder:
        if side == "sft":
            return _sft(settings, Path(folder), common)
        trainer = _ppo(side, settings, Path(folder), common)
        clock = IterationClock()
        trainer.add_callback(clock)
        trainer.train()
    episodes = EPISODES * (settings["iterations"] - 1)
    return {
        "episodes_per_second": episodes / clock.clock.seconds,
        "seconds": clock.clock.seconds,
        "peak_memory_bytes": clock.clock.peak,
        "times": {k: v for k, v in trainer.state.log_history[-2].items() if k.startswith("time/")},
        "tokens_per_forward": MICRO * (sum(map(len, settings["prompts"])) / len(settings["prompts"]) + NEW),
    }


def _ppo(side: Any, settings: dict[str, Any], folder: Path, common: dict[str, Any]) -> Any:
    from ..stages.ppo.config import PPOConfig
    from ..stages.ppo.trainer import PPOTrainer

    tokenizer: Any = load_tokenizer(base())
    tokenizer.eos_token = NEVER
    model = load_model(base(), dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else None)
    prepare_model(model, tokenizer)
    adapters = AdapterSet.create(model, base(), LORA)
    reward = _reward_stage(adapters, tokenizer, folder / "reward")
    args = PPOConfig(
        str(folder / "out"),
        bf16=True,
        rollout_batch_size=EPISODES,
        num_ppo_epochs=EPOCHS,
        total_episodes=EPISODES * settings["iterations"],
        per_device_train_batch_size=MICRO,
        max_new_tokens=NEW,
        temperature=TEMPERATURE,
        value=side,
        learning_rate=1e-5,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        log_samples_every=0,
        seed=SEED,
        **common,
    )
    prompts = [{"prompt_ids": ids, "prompt": ""} for ids in settings["prompts"]]
    return PPOTrainer(adapters, None, args, prompts, None, tokenizer, reward_adapter=reward, quiet=True)


def _reward_stage(adapters: AdapterSet, tokenizer: Any, folder: Path) -> Path:
    """An adapter with a random head, as a reward stage leaves it."""
    adapters.copy("reward")
    adapters.add_head("reward", bias=False, trainable=False)
    adapters.save("reward", folder)
    lineage = Lineage(
        stage="reward", kind="reward", base=base_info(base()), tokenizer=tokenizer_info(tokenizer), parents=[],
        config={}, data={"spec": {}, "fingerprint": ""}, seed=0, versions=library_versions(), created="", seconds=0.0,
        reward={"mean": 0.0, "std": 1.0},
    )  # fmt: skip
    write_lineage(folder, lineage)
    adapters.model.delete_adapter("reward")
    del adapters.heads["reward"]
    return folder


def _sft(settings: dict[str, Any], folder: Path, common: dict[str, Any]) -> dict[str, Any]:
    """SFT on rows as long as PPO's: the same prompts with completions of NEW tokens."""
    rows = []
    # as PPO has them: the prompts that its rollouts draw, of each rollout the longest four together, and so on
    lengths = [len(ids) for ids in settings["prompts"]]
    drawn = stream_rows(len(lengths), SEED, 0, len(lengths))
    rollouts = [drawn[start : start + EPISODES] for start in range(0, len(drawn), EPISODES)]
    order = [i for rollout in rollouts for i in sorted(rollout, key=lambda i: -lengths[i])]
    # NEW - 1 words of one token each, and the template's end of turn
    said = " ".join((WORDS.split() * 2)[: NEW - 1])
    for i in order:
        rows.append({"prompt": settings["messages"][i], "chosen": [{"role": "assistant", "content": said}]})
    file = folder / "rows.jsonl"
    write_rows(rows, "sft", file)
    train = {
        # twice: memory is at its height once every length has been met, as in PPO's epochs
        "max_steps": 2 * len(rows) // MICRO,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "per_device_train_batch_size": MICRO,
        "bf16": True,
        "gradient_checkpointing": False,
    }
    trainer = our_trainer("sft", file, train | common, folder / "out", packed=True)
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    tokens = max(entry.get("num_tokens", 0) for entry in trainer.state.log_history) / train["max_steps"]
    return {
        "episodes_per_second": MICRO * (train["max_steps"] - 1) / clock.seconds,
        "peak_memory_bytes": clock.peak,
        "tokens_per_forward": tokens,
    }


if __name__ == "__main__":
    main()
