"""Writes the quickstart files anew, byte for byte: `python -m preftune.data.quickstart.compose [FOLDER]`.

demos.jsonl         600 {prompt, completion}; a third of the completions miss a point or two of the rubric
pairs.jsonl         800 {prompt, chosen, rejected}; every chosen reply meets the rubric, no rejected one does
prompts.jsonl       300 {prompt}
eval_prompts.jsonl  200 {prompt}; none of their products or problem kinds is in the other files
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

from . import delivery, faults, held_out, orders, phrases, products, quality
from .kinds import Problem
from .products import Product
from .wording import Scene, acknowledge, fill, good_reply, make_scene, next_step, prompt, sentence

TRAIN_PROBLEMS = delivery.PROBLEMS + orders.PROBLEMS + faults.PROBLEMS + quality.PROBLEMS
HELD_OUT_PROBLEMS = held_out.PROBLEMS
COUNTS = {"demos": 600, "pairs": 800, "prompts": 300, "eval_prompts": 200}
BRIEF = 45  # words: the rubric's own limit
SEED = 20250

Row = dict[str, str]


def cases(rng: Random, problems: tuple[Problem, ...], sold: tuple[Product, ...]) -> Iterator[tuple[Problem, Product]]:
    """Problems in shuffled turns, each with its products in shuffled turns: none comes back soon."""
    fitting = {p.name: [x for x in sold if not p.needs or x.tags & set(p.needs.split("|"))] for p in problems}
    queues: dict[str, list[Product]] = {p.name: [] for p in problems}
    while True:
        for problem in rng.sample(problems, len(problems)):
            if not queues[problem.name]:
                queues[problem.name] = rng.sample(fitting[problem.name], len(fitting[problem.name]))
            yield problem, queues[problem.name].pop()


class Author:
    """Draws prompts and replies without repeating itself."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.prompts: set[str] = set()
        self.replies: set[str] = set()
        self.said: dict[str, list[str]] = {}  # the wordings of each problem whose turn is still to come

    def ask(self, problem: Problem, product: Product, sold: tuple[Product, ...]) -> tuple[str, Scene, bool]:
        """A prompt of 8 to 45 words that nobody wrote before, its scene, and whether the reply may use the name."""
        while True:
            if not self.said.get(problem.name):
                self.said[problem.name] = self.rng.sample(problem.says, len(problem.says))
            scene = make_scene(self.rng, problem, product, self.said[problem.name].pop(), sold)
            text, named = prompt(self.rng, scene)
            if 8 <= len(text.split()) <= BRIEF and text.lower() not in self.prompts:
                self.prompts.add(text.lower())
                return text, replace(scene, order_given=scene.slots["order"].lower() in text.lower()), named

    def fresh(self, write: Callable[[], str], fits: Callable[[int], bool]) -> str:
        """The first new reply whose number of words fits; after many tries an old one may come back."""
        text = ""
        for _ in range(4000):
            text = write()
            if fits(len(text.split())) and text not in self.replies:
                self.replies.add(text)
                return text
        raise RuntimeError(f"no reply of a fitting length was found; the last was {text!r}")

    def good(self, scene: Scene, named: bool, low: int = 18, high: int = 42) -> str:
        return self.fresh(
            lambda: good_reply(self.rng, scene, named and self.rng.random() < 0.5), lambda n: low <= n <= high
        )

    def flawed(self, scene: Scene, flaws: tuple[str, ...], fits: Callable[[int], bool]) -> str:
        """A reply with the named flaws: no_ack, no_step, no_close, long, rude, off_topic."""
        return self.fresh(lambda: self._flawed(scene, flaws), fits)

    def _flawed(self, scene: Scene, flaws: tuple[str, ...]) -> str:
        rng, drawn = self.rng, lambda words, n: [sentence(fill(rng, w, scene)) for w in rng.sample(words, n)]
        if "rude" in flaws:
            parts = drawn(phrases.RUDE, rng.randint(2, 4)) + drawn(phrases.FILLERS, rng.randint(0, 2))
        elif "off_topic" in flaws:
            parts = drawn(phrases.OFF_TOPIC, rng.randint(1, 4))
            if "no_close" not in flaws:
                parts += drawn(phrases.CLOSERS, 1)
            return " ".join(parts)
        else:
            parts = [] if "no_ack" in flaws else [sentence(acknowledge(rng, scene))]
            if "no_step" in flaws:
                parts += drawn(phrases.VAGUE, rng.randint(1, 3))
            else:
                parts.append(sentence(next_step(rng, scene)))
            ballast = rng.randint(1, 3) if "long" in flaws else rng.choice((0, 0, 1, 1, 2))
            for words in drawn(phrases.FILLERS, ballast):
                parts.insert(rng.randint(min(1, len(parts) - 1), len(parts)), words)
            if rng.random() < 0.15:
                parts += drawn(phrases.SHORT_FILLERS, 1)
        if "no_close" not in flaws and "rude" not in flaws:
            parts += drawn(phrases.CLOSERS, 1)
        return " ".join(parts)


DEMO_FLAWS = (
    ("no_ack",), ("no_step",), ("no_close",), ("long",),
    ("no_ack", "no_close"), ("no_step", "no_close"), ("long", "no_close"), ("no_ack", "no_step"), 
    ("long", "no_step"), ("no_close", "no_ack"),
)  # fmt: skip
ONE_FLAW = (("no_ack",), ("no_step",), ("no_close",))
MANY_FLAWS = (
    ("rude", "no_close"), ("rude", "no_close"), ("off_topic", "no_close"), ("off_topic",), ("no_ack", "no_step"),
    ("no_step", "no_close"), ("no_ack", "no_step", "no_close"), ("no_ack", "no_close"),
)  # fmt: skip
LONG_FLAWS = (
    ("long",), ("long",), ("long", "no_step"), ("long", "no_close"), ("long", "no_ack", "no_close"),
    ("rude", "no_close", "long"),
)  # fmt: skip


def length_rule(flaws: tuple[str, ...]) -> Callable[[int], bool]:
    return (lambda n: BRIEF < n <= 75) if "long" in flaws else (lambda n: 5 <= n <= BRIEF)


def demo(author: Author, problem: Problem, product: Product, place: int) -> Row:
    text, scene, named = author.ask(problem, product, products.TRAIN)
    if place % 3:
        return {"prompt": text, "completion": author.good(scene, named)}
    flaws = DEMO_FLAWS[place // 3 % len(DEMO_FLAWS)]
    return {"prompt": text, "completion": author.flawed(scene, flaws, length_rule(flaws))}


def pair(author: Author, problem: Problem, product: Product, place: int) -> Row:
    """Rejected replies are longer and shorter than the chosen one by turns, so that length alone tells nothing."""
    rng = author.rng
    text, scene, named = author.ask(problem, product, products.TRAIN)
    longer = place % 2 == 0
    if longer and place % 6 == 0:
        flaws = rng.choice(LONG_FLAWS)
    else:
        # mostly near misses: rude or idle talk is told apart at once, and teaches a reward model little of the rubric
        flaws = rng.choice(ONE_FLAW if rng.random() < 0.75 else MANY_FLAWS)
    low, high = (18, 30) if longer and "long" not in flaws else (20, 42)
    chosen = author.good(scene, named, low, high)
    size, rule = len(chosen.split()), length_rule(flaws)
    rejected = author.flawed(scene, flaws, lambda n: rule(n) and (n > size if longer else n < size))
    return {"prompt": text, "chosen": chosen, "rejected": rejected}


def compose() -> dict[str, list[Row]]:
    """All rows of the four files, by name."""
    author = Author(SEED)
    train = cases(author.rng, TRAIN_PROBLEMS, products.TRAIN)
    unseen = cases(author.rng, HELD_OUT_PROBLEMS, products.HELD_OUT)
    out: dict[str, list[Row]] = {}
    out["demos"] = [demo(author, *next(train), place) for place in range(COUNTS["demos"])]
    out["pairs"] = [pair(author, *next(train), place) for place in range(COUNTS["pairs"])]
    out["prompts"] = [{"prompt": author.ask(*next(train), products.TRAIN)[0]} for _ in range(COUNTS["prompts"])]
    out["eval_prompts"] = [
        {"prompt": author.ask(*next(unseen), products.HELD_OUT)[0]} for _ in range(COUNTS["eval_prompts"])
    ]
    for name in ("demos", "pairs"):
        author.rng.shuffle(out[name])
    return out


def write(folder: Path) -> None:
    """Writes the four files into `folder`."""
    write_files(folder, compose())


def write_files(folder: Path, files: Mapping[str, Iterable[Row]]) -> None:
    """NAME.jsonl for each name: UTF-8, one JSON object a line."""
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
