"""A PPO run in a process of its own whose replies a server draws one iteration ahead.

python served_ahead_worker.py OUT URL SAVE_STEPS [KILL]    continued where OUT holds a checkpoint; KILL: a step
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from ppo_worker import Killer, make, train_on

# as the tests' `ask_at_once`: there is no conftest here
for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
    os.environ.pop(name, None)


def main(out: Path, url: str, save_steps: int, kill: int | None = None) -> None:
    """Four iterations of four steps, each followed by an evaluation."""
    callbacks: list[Any] = [] if kill is None else [Killer(kill)]
    trainer = make(
        out, total_episodes=32, save_strategy="steps", save_steps=save_steps, save_total_limit=1, max_new_tokens=4,
        lr_scheduler_type="cosine", rollout_engine="vllm", rollout_url=url, rollout_ahead=1, mismatch_tolerance=None,
        learning_rate=3e-3, held_out=[{"prompt": "held?"}], eval_strategy="steps", eval_steps=4, callbacks=callbacks,
    )  # fmt: skip
    train_on(trainer, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, address, *numbers = sys.argv[1:]
    main(Path(folder), address, *map(int, numbers))
