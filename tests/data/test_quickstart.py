"""The shipped quickstart files: what they hold, that the generator still writes them, and that the rubric fits them."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product as combinations
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import pytest
import yaml

from preftune.data import quickstart
from preftune.data.quickstart import compose, phrases, products
from preftune.data.quickstart.kinds import Problem
from preftune.data.quickstart.wording import make_scene

FOLDER = Path(quickstart.__file__).parent
TRAIN_FILES = ("demos", "pairs", "prompts")
KINDS: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "max_words": lambda check, text: len(text.split()) <= check["value"],
    "contains_any": lambda check, text: any(value.lower() in text.lower() for value in check["values"]),
    "regex": lambda check, text: re.search(check["pattern"], text) is not None,
}
CHECKS = {check["name"]: check for check in yaml.safe_load((FOLDER / "rubric.yaml").read_text(encoding="utf-8"))}


@cache
def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def passes(name: str, text: str) -> bool:
    return KINDS[CHECKS[name]["kind"]](CHECKS[name], text)


def score(text: str) -> float:
    return mean(passes(name, text) for name in CHECKS)


def wordings(text: str) -> Iterator[str]:
    """Every expansion of the `[this|that]` choices."""
    pieces = re.split(r"\[([^\[\]]*)\]", text)
    for drawn in combinations(*(piece.split("|") if i % 2 else [piece] for i, piece in enumerate(pieces))):
        yield "".join(drawn)


def filled(problem: Problem, texts: tuple[str, ...]) -> Iterator[str]:
    """Every expansion of every text, for one product of each number."""
    fitting = [p for p in products.TRAIN if not problem.needs or p.tags & set(problem.needs.split("|"))]
    for plural in (False, True):
        for item in [p for p in fitting if p.plural is plural][:1]:
            slots = make_scene(Random(0), problem, item, "", products.TRAIN).slots
            yield from (wording.format(**slots) for text in texts for wording in wordings(text))


@pytest.mark.parametrize(
    ("name", "count", "keys"),
    [
        ("demos", 600, {"prompt", "completion"}),
        ("pairs", 800, {"prompt", "chosen", "rejected"}),
        ("prompts", 300, {"prompt"}),
        ("eval_prompts", 200, {"prompt"}),
    ],
)
def test_counts_and_columns(name: str, count: int, keys: set[str]) -> None:
    assert len(rows(name)) == count
    assert all(row.keys() == keys and all(row.values()) for row in rows(name))


def test_generator_writes_the_same_bytes(tmp_path: Path) -> None:
    compose.write(tmp_path)
    for name in compose.COUNTS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes(), name


def test_every_prompt_is_new_and_of_sane_length() -> None:
    prompts = [row["prompt"].lower() for name in compose.COUNTS for row in rows(name)]
    assert len(set(prompts)) == len(prompts)
    assert all(8 <= len(prompt.split()) <= 45 for prompt in prompts)


def test_evaluation_products_and_problems_are_in_no_training_file() -> None:
    names = "|".join(re.escape(p.name) for p in products.HELD_OUT)
    marks = "|".join(re.escape(mark) for problem in compose.HELD_OUT_PROBLEMS for mark in problem.marks)
    held_out_name, held_out_mark = (re.compile(rf"\b(?:{words})", re.IGNORECASE) for words in (names, marks))
    for name in TRAIN_FILES:
        for row in rows(name):
            for text in row.values():
                assert not held_out_name.search(text), text
                assert not held_out_mark.search(text), text
    train_name = re.compile(rf"\b(?:{'|'.join(re.escape(p.name) for p in products.TRAIN)})\b", re.IGNORECASE)
    for row in rows("eval_prompts"):
        meant = row["prompt"].replace(" adn ", " and ")  # a customer's slip of the pen
        assert held_out_name.search(meant) and held_out_mark.search(meant), row
        assert not train_name.search(row["prompt"]), row
    assert {p.name for p in compose.TRAIN_PROBLEMS}.isdisjoint(p.name for p in compose.HELD_OUT_PROBLEMS)


def test_chosen_meet_the_rubric_and_rejected_do_not() -> None:
    assert [row["chosen"] for row in rows("pairs") if score(row["chosen"]) < 1] == []
    rejected = [score(row["rejected"]) for row in rows("pairs")]
    assert max(rejected) < 1
    assert 0.6 <= mean(rejected) <= 0.65  # most miss one point of four
    for name in CHECKS:  # no check alone tells the pairs apart, and each one tells something
        assert 0.2 < mean(passes(name, row["rejected"]) for row in rows("pairs")) < 0.9, name


def test_a_third_of_the_demonstrations_is_flawed() -> None:
    scores = [score(row["completion"]) for row in rows("demos")]
    flawed = [value for value in scores if value < 1]
    assert 0.3 <= len(flawed) / len(scores) <= 0.37
    assert 0.55 <= mean(flawed) <= 0.65


@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_alone_does_not_tell_chosen_from_rejected(length: Callable[[str], int]) -> None:
    longer = [length(row["rejected"]) - length(row["chosen"]) for row in rows("pairs")]
    wins = mean(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in longer)
    assert 0.45 <= wins <= 0.55


def test_replies_do_not_repeat() -> None:
    replies = [row[key] for name in ("demos", "pairs") for row in rows(name) for key in row if key != "prompt"]
    assert max(Counter(replies).values()) == 1


def test_good_replies_fit_a_short_generation() -> None:
    words = [len(row["chosen"].split()) for row in rows("pairs")]
    assert min(words) >= 18 and max(words) <= 42


@pytest.mark.parametrize("problem", compose.TRAIN_PROBLEMS, ids=lambda problem: problem.name)
def test_rubric_tells_the_parts_of_a_reply_apart(problem: Problem) -> None:
    """A step is a step and nothing else is; the same for the acknowledgement and the offer of help."""
    for step in filled(problem, problem.steps):
        assert passes("next_step", step), step
        assert not passes("acknowledges", step) and not passes("offers_help", step), step
    for ack in filled(problem, problem.feels):
        assert passes("acknowledges", ack) and not passes("next_step", ack), ack
    for words in filled(problem, problem.about):
        assert not passes("next_step", f"I'm sorry about {words}"), words
    for words in filled(problem, problem.that):
        assert not passes("next_step", f"I'm sorry to hear that {words}"), words


def test_rubric_on_the_common_phrases() -> None:
    some = compose.TRAIN_PROBLEMS[0]
    for ack in (wording for text in (*phrases.ACKS, *phrases.ACKS_PLAIN) for wording in wordings(text)):
        assert passes("acknowledges", ack) and not passes("offers_help", ack), ack
    for closer in filled(some, (*phrases.CLOSERS, *phrases.CLOSING_CLAUSES)):
        assert passes("offers_help", closer) and not passes("next_step", closer), closer
        assert not passes("acknowledges", closer), closer
    useless = (*phrases.VAGUE, *phrases.RUDE, *phrases.OFF_TOPIC, *phrases.FILLERS, *phrases.SHORT_FILLERS)
    for text in filled(some, useless):
        assert not any(passes(name, text) for name in ("acknowledges", "next_step", "offers_help")), text


@pytest.mark.parametrize(
    ("step", "concrete"),
    [
        ("Please send us your order number so that we can help", True),
        ("I'll arrange a refund for you", True),
        ("Can you please upload a picture of the damage?", True),
        ("We will send you a new one", True),
        ("I can replace it for you", True),
        ("We will look into it and get back to you", False),
        ("Please wait while we investigate", False),
        ("You can check our website for more information", False),
        ("We value your feedback and hope to see you again", False),
    ],
)
def test_next_step_on_sentences_from_elsewhere(step: str, concrete: bool) -> None:
    assert passes("next_step", step) is concrete


def test_the_language_is_varied() -> None:
    assert len(compose.TRAIN_PROBLEMS) >= 40 and len(products.TRAIN) >= 60 and len(products.HELD_OUT) >= 20
    assert sum(1 for text in (*phrases.ACKS, *phrases.ACKS_PLAIN) for _ in wordings(text)) >= 40
    assert len(phrases.CLOSERS) >= 40
    openings = Counter(" ".join(row["chosen"].split()[:4]) for row in rows("pairs"))
    assert openings.most_common(1)[0][1] <= 0.05 * len(rows("pairs"))
