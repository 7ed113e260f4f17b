"""Writes the files of order totals anew, byte for byte: `python -m preftune.data.totals.compose [FOLDER]`.

demos.jsonl         400 {prompt, completion, answer}; each completion counts it out and ends with the total
prompts.jsonl       600 {prompt, answer}
eval_prompts.jsonl  300 {prompt, answer}; new questions about products that no training file has
new_sums.jsonl      100 {prompt, answer}; the same, and none of their sums is in another file

A question is the sum of two amounts, written in words, or an order: so many of a thing at a price, a thing with its
delivery or less a voucher, two things. Every answer is a whole number of pounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ..quickstart import products
from ..quickstart.compose import write_files
from ..quickstart.products import Product

COUNTS = {"demos": 400, "prompts": 600, "eval_prompts": 300, "new_sums": 100}
SEED = 20251

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

Row = dict[str, str]


class Question(NamedTuple):
    """A question and how it is counted out.

    key: equal for two questions that ask for the same sum. counted: its lines of arithmetic.
    """

    text: str
    key: tuple[Any, ...]
    counted: str
    answer: int


def in_words(number: int) -> str:
    """A number from 0 to 99: `forty-two`."""
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def several(product: Product, number: int) -> str:
    """So many of a product: `3 kettles`, `2 pairs of jeans`, `4 jars of honey`."""
    head, rest = product.unit.split()[0] if product.unit else product.name, ""
    if product.unit:
        rest = f" of {product.name}"
    elif " of " in product.name:
        head, _, tail = product.name.partition(" of ")
        rest = f" of {tail}"
    return f"{number} {_plural(head)}{rest}"


def _plural(noun: str) -> str:
    if noun.endswith("shelf"):
        return f"{noun[:-1]}ves"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun}s"


def words(rng: Random, _: Sequence[Product]) -> Question:
    """Two amounts in words."""
    a, b = rng.randint(5, 30), rng.randint(3, 20)
    text = rng.choice(
        (
            "{A} pounds and {b} pounds: how much?",
            "My basket is at {a} pounds. I'm adding something for {b} pounds. What's the total?",
            "I owe you {a} pounds from May and {b} pounds from June. How much in all?",
        )
    ).format(a=in_words(a), A=in_words(a).capitalize(), b=in_words(b))
    return Question(text, ("words", a, b), f"{a} + {b} = {a + b}.", a + b)


def each(rng: Random, sold: Sequence[Product]) -> Question:
    """So many at a price."""
    number, price, what = rng.randint(2, 6), rng.randint(3, 18), rng.choice(sold)
    text = rng.choice(
        (
            "I'd like {many}. They are £{price} each. What do I pay?",
            "How much are {many} at £{price} each?",
            "{many} for £{price} each, what's the total please?",
        )
    ).format(many=several(what, number), price=price)
    total = number * price
    return Question(text, ("each", number, price), f"{number} x {price} = {total}.", total)


def delivered(rng: Random, sold: Sequence[Product]) -> Question:
    """So many at a price, and delivery."""
    number, price, delivery, what = rng.randint(2, 4), rng.randint(3, 12), rng.randint(2, 6), rng.choice(sold)
    text = rng.choice(
        (
            "I'm ordering {many} at £{price} each, and delivery is £{delivery}. What does it come to?",
            "{many}, £{price} each, plus £{delivery} for delivery. How much is that?",
            "What will you charge me for {many} at £{price} each with £{delivery} delivery?",
        )
    ).format(many=several(what, number), price=price, delivery=delivery)
    goods = number * price
    counted = f"{number} x {price} = {goods}. {goods} + {delivery} = {goods + delivery}."
    return Question(text, ("delivered", number, price, delivery), counted, goods + delivery)


def voucher(rng: Random, sold: Sequence[Product]) -> Question:
    """A price less a voucher."""
    price, off, what = rng.randint(12, 40), rng.randint(2, 10), rng.choice(sold)
    text = rng.choice(
        (
            "I want {a} for £{price} and have a voucher for £{off}. What's left to pay?",
            "The {p} is £{price}. My voucher takes £{off} off. How much do I pay?"
            if not what.plural
            else "The {p} are £{price}. My voucher takes £{off} off. How much do I pay?",
        )
    ).format(a=what.counted(), p=what.name, price=price, off=off)
    return Question(text, ("voucher", price, off), f"{price} - {off} = {price - off}.", price - off)


def both(rng: Random, sold: Sequence[Product]) -> Question:
    """Two things."""
    a, b = rng.sample(list(sold), 2)
    first, second = rng.randint(5, 30), rng.randint(3, 20)
    text = rng.choice(
        (
            "I'm buying {a} for £{first} and {b} for £{second}. How much altogether?",
            "What do {a} at £{first} and {b} at £{second} cost together?",
        )
    ).format(a=a.counted(), b=b.counted(), first=first, second=second)
    total = first + second
    return Question(text, ("both", first, second), f"{first} + {second} = {total}.", total)


KINDS: tuple[Callable[[Random, Sequence[Product]], Question], ...] = (words, each, delivered, voucher, both)


class Author:
    """Draws questions that nobody asked before."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.asked: set[str] = set()
        self.kept_out: set[tuple[Any, ...]] = set()

    def questions(self, count: int, sold: Sequence[Product], *, keep_out: bool = False) -> list[Question]:
        """So many new questions, their kinds in turns.

        Args:
            keep_out: from now on no question asks for a sum of these.
        """
        drawn = [self._ask(KINDS[place % len(KINDS)], sold) for place in range(count)]
        if keep_out:
            self.kept_out |= {each.key for each in drawn}
        return drawn

    def _ask(self, kind: Callable[[Random, Sequence[Product]], Question], sold: Sequence[Product]) -> Question:
        while True:
            question = kind(self.rng, sold)
            if question.text not in self.asked and question.key not in self.kept_out:
                self.asked.add(question.text)
                return question


def row(question: Question) -> Row:
    """What an on-policy stage and an evaluation read."""
    return {"prompt": question.text, "answer": str(question.answer)}


def demo(question: Question) -> Row:
    """What SFT reads."""
    completion = f"{question.counted} The total is £{question.answer}."
    return {"prompt": question.text, "completion": completion, "answer": str(question.answer)}


def compose() -> dict[str, list[Row]]:
    """All rows of the four files, by name."""
    author = Author(SEED)
    held = author.questions(COUNTS["new_sums"], products.HELD_OUT, keep_out=True)
    out = {
        "demos": [demo(each) for each in author.questions(COUNTS["demos"], products.TRAIN)],
        "prompts": [row(each) for each in author.questions(COUNTS["prompts"], products.TRAIN)],
        "eval_prompts": [row(each) for each in author.questions(COUNTS["eval_prompts"], products.HELD_OUT)],
        "new_sums": [row(each) for each in held],
    }
    for rows in out.values():
        author.rng.shuffle(rows)
    return out


def write(folder: Path) -> None:
    """Writes the files into `folder`."""
    write_files(folder, compose())


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
