"""Iteration times of PPO against GPUs by `preftune plan`'s model: the tables in docs/scale.md.

    python -m preftune.benchmarks.scale            # prints them
    python -m preftune.benchmarks.scale --write    # puts them into docs/scale.md

Nothing here is measured: it is a card's published rates, the shares of them that a plan takes to be reached, and the
rates of links below. What plan leaves out, moving a divided base between GPUs, is added.
"""

import argparse
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from transformers import LlamaConfig, PreTrainedConfig

from ..data.spec import DataSpec, SourceSpec
from ..models.base import Base
from ..models.cards import DECODING_SHARE, TRAINING_SHARE, Card, card_named, room
from ..models.cost import ADAPTER_BYTES, Sizes, sizes
from ..models.loading import Quantization
from ..models.lora import LoraSpec
from ..models.tiny import RandomSpec
from ..stages.costs import MERGED, AssumedRows, Place, StageCost, stage_cost
from ..stages.job import StageJob
from ..stages.ppo.rewards import RewardSource
from ..stages.times import card_seconds

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- python -m preftune.benchmarks.scale --write -->\n", "<!-- end -->\n"

CARD = "h100"
EPISODES, PROMPT, REPLY, EPOCHS, MINI_BATCHES, MICRO = 512, 512, 512, 2, 4, 8
GPUS = (1, 8, 16, 64)
MACHINE, WITHIN, BETWEEN = 8, 300e9, 40e9
"""GPUs of a machine, and bytes a second that each receives of the others' within it and from other machines: NVLink and
400 Gbit/s for each GPU, at less than their full rates. Assumed."""
SERVER = 4
"""GPUs of a rollout server, which divide every weight among them."""

_70B = LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A base, as its config has it, how it is held, and how many rows are decoded at once."""

    name: str
    config: PreTrainedConfig = field(compare=False)
    at_once: int
    quantization: Quantization | None = None


M8 = Model("8B", RandomSpec("llama-3.1-8b").config(), 64)
M70 = Model("70B", _70B, 32)
M70Q = Model("70B", _70B, 32, "4bit")


class Row(NamedTuple):
    """One line of a table. Seconds of an iteration; bytes on the fullest GPU."""

    gpus: int
    rollout: float
    update: float
    moved: float
    memory: int

    @property
    def seconds(self) -> float:
        return self.rollout + self.update + self.moved


def job(model: Model) -> StageJob:
    """One iteration of PPO."""
    return StageJob(
        name="ppo",
        kind="ppo",
        base=Base(model.name, Path(), None, ""),
        dtype="bfloat16",
        quantization=model.quantization,
        lora=LoraSpec(r=16, alpha=32),
        data=DataSpec((SourceSpec("prompts"),), max_prompt_length=PROMPT),
        method={
            "rollout_batch_size": EPISODES, "total_episodes": EPISODES, "max_new_tokens": REPLY,
            "num_ppo_epochs": EPOCHS, "num_mini_batches": MINI_BATCHES, "rollout_micro_batch_size": model.at_once,
        },
        train={"per_device_train_batch_size": MICRO, "gradient_checkpointing": True},
        rewards=(RewardSource("stage", "reward"),),
        output_dir=Path(),
    )  # fmt: skip


@cache
def _cost(model: Model, gpus: int, sharded: bool) -> StageCost:
    memory = card_named(CARD).memory
    rows = AssumedRows(EPISODES, PROMPT, "prompt")
    return stage_cost(job(model), model.config, rows, None, Place("cuda", gpus, sharded, 0, memory))


def _sizes(model: Model) -> Sizes:
    return sizes(model.config, LoraSpec(r=16, alpha=32), "bfloat16", model.quantization)


def _seconds(model: Model, cost: StageCost, card: Card, processes: int) -> tuple[float, float]:
    """(of its rollout, of everything else)."""
    size, without = _sizes(model), replace(cost, work=tuple(each for each in cost.work if each.decodes is None))
    whole = card_seconds(job(model), cost, size, card, processes)
    rest = card_seconds(job(model), without, size, card, processes)
    assert whole is not None and rest is not None
    return whole.expected - rest.expected, rest.expected


def _moved(model: Model, cost: StageCost, gpus: int, sharded: bool) -> float:
    """Seconds in which weights and gradients are on their way, as if nothing else were done meanwhile.

    A divided base comes together in every forward and every backward, and once for a rollout; the adapters' gradients
    are added up at every step.
    """
    if gpus == 1:
        return 0.0
    rate = WITHIN if gpus <= MACHINE else BETWEEN
    share, size = (gpus - 1) / gpus, _sizes(model)
    steps = (cost.steps or 0) * 2 * cost.trained * ADAPTER_BYTES
    if not sharded:
        return share * steps / rate
    gathers = {"forward": 1, "prefill": 1, "policy": 2, "score": 2}
    times = sum((work.times or 0) * gathers[work.step] for work in cost.work)
    return share * (times * size.weight_bytes + steps) / rate


def together(model: Model, gpus: int, sharded: bool) -> Row:
    """Every GPU samples and trains, as preftune does it."""
    cost = _cost(model, gpus, sharded)
    rollout, update = _seconds(model, cost, card_named(CARD), gpus)
    return Row(gpus, rollout, update, _moved(model, cost, gpus, sharded), cost.peak[1])


def served(model: Model, gpus: int) -> Row:
    """The same GPUs train on a divided base, and between two updates are servers that divide every weight."""
    card, trains = card_named(CARD), _cost(model, gpus, True)
    server = replace(card, bandwidth=card.bandwidth * SERVER)
    rollout, _ = _seconds(model, _cost(model, gpus // SERVER, False), server, 1)
    # whoever samples elsewhere keeps no merged weights
    held = [sum((parts - Counter({MERGED: parts[MERGED]})).values())
            for name, parts in trains.phases.items() if name != "rollout"]  # fmt: skip
    cache = model.at_once * (PROMPT + REPLY) * _sizes(model).kv_bytes
    serves = (_sizes(model).weight_bytes + cache) // SERVER
    trained = replace(trains, work=tuple(each for each in trains.work if each.decodes is None))
    update = _seconds(model, trains, card, gpus)[1]
    return Row(gpus, rollout, update, _moved(model, trained, gpus, True), max(*held, serves))


def lines(title: str, rows: Sequence[Row]) -> list[str]:
    """A table in Markdown. What does not fit the card is said in place of its times."""
    most = room(card_named(CARD).memory)
    found = [f"**{title}**", "", "| GPUs | rollout | scores and update | moving weights | iteration | GB a GPU |"]
    found.append("|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        gb = f"{row.memory / 1e9:.0f}"
        if row.memory > most:
            found.append(f"| {row.gpus} | does not fit | | | | {gb} |")
            continue
        parts = (row.rollout, row.update, row.moved, row.seconds)
        found.append(f"| {row.gpus} | {' | '.join(f'{each:.1f} s' for each in parts)} | {gb} |")
    return [*found, ""]


_ASSUMED = """\
*A model's prediction, not a measurement: no GPU has run this.* {episodes} episodes an iteration, of {prompt} prompt and
{reply} reply tokens each (none ends earlier), {epochs} epochs of {mini} minibatches, LoRA r=16 on all linear layers, a
value adapter of its own, one reward stage, layers recomputed, {small} rows decoded at once (of 70B {large}) and {micro}
in a forward. One {card} of {tflops:.0f} TFLOP/s and {bandwidth:.0f} GB/s, of which {training:.0%} are taken to be
reached in training and {decoding:.0%} in sampling; {within:.0f} GB/s between the {machine} GPUs of a machine and
{between:.0f} GB/s from one machine to another, in which nothing else is done meanwhile (on the safe side). Checks,
logs, checkpoints and replies of unequal length cost on top. What a divided base moves grows with the number of
forwards: more rows in one (`per_device_train_batch_size`) are fewer of them, where memory has room.
"""


def tables() -> str:
    """All of them, with what they assume."""
    card = card_named(CARD)
    assumed = _ASSUMED.format(
        episodes=EPISODES, prompt=PROMPT, reply=REPLY, epochs=EPOCHS, mini=MINI_BATCHES, micro=MICRO,
        small=M8.at_once, large=M70.at_once,
        card=card.name.upper(), tflops=card.tflops, bandwidth=card.bandwidth, training=TRAINING_SHARE,
        decoding=DECODING_SHARE, within=WITHIN / 1e9, between=BETWEEN / 1e9, machine=MACHINE,
    )  # fmt: skip
    between = f"rollouts by servers of {SERVER} GPUs between the updates"
    made = {
        "8B in bf16, `--launch ddp`: a whole base on each GPU": [together(M8, n, False) for n in GPUS],
        "8B in bf16, `--launch fsdp2`: the frozen base divided": [together(M8, n, True) for n in GPUS],
        "70B in bf16, `--launch fsdp2`: a rollout needs the whole base": [together(M70, n, True) for n in GPUS],
        "70B in 4 bits, `--launch ddp`: a quantised base stays whole": [together(M70Q, n, False) for n in GPUS],
        f"70B in bf16, {between} (verl's way, not preftune's)": [served(M70, n) for n in GPUS if n >= SERVER],
    }
    found = [line for title, rows in made.items() for line in lines(title, rows)]
    return "\n".join([*textwrap.wrap(assumed.replace("\n", " "), 120, break_on_hyphens=False), "", *found, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into docs/scale.md")
    if not parser.parse_args().write:
        print(tables())
        return
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}{tables()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
