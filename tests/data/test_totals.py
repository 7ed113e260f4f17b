"""The shipped order totals: what they hold, that the generator still writes them, that every answer is right."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from preftune.data import totals
from preftune.data.quickstart import products
from preftune.data.totals.compose import in_words, several, write

FOLDER = Path(totals.__file__).parent
FILES = ("demos", "prompts", "eval_prompts", "new_sums")
NAMES = {in_words(number): number for number in range(100)}


@cache
def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers(prompt: str) -> tuple[int, ...]:
    """What a question is about, in its order, from its own words."""
    found = re.findall(r"\d+|[a-z]+(?:-[a-z]+)?", prompt.lower())
    # "several of one", "both": a product's name is never a number
    return tuple(int(each) if each.isdigit() else NAMES[each] for each in found if each.isdigit() or each in NAMES)


def total(prompt: str) -> int:
    """The answer, by what the question says and not by the generator."""
    first, *rest = numbers(prompt)
    if "voucher" in prompt:
        return first - rest[0]
    if "deliver" in prompt:
        return first * rest[0] + rest[1]
    return first * rest[0] if " each" in prompt else first + rest[0]


@pytest.mark.parametrize(
    ("name", "count", "keys"),
    [
        ("demos", 400, {"prompt", "completion", "answer"}),
        ("prompts", 600, {"prompt", "answer"}),
        ("eval_prompts", 300, {"prompt", "answer"}),
        ("new_sums", 100, {"prompt", "answer"}),
    ],
)
def test_counts_and_columns(name: str, count: int, keys: set[str]) -> None:
    assert len(rows(name)) == count
    assert all(set(row) == keys for row in rows(name))


def test_generator_writes_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_every_answer_is_what_the_question_asks_for(name: str) -> None:
    for row in rows(name):
        assert int(row["answer"]) == total(row["prompt"]) > 0, row


def test_demonstrations_count_out_and_end_with_the_answer() -> None:
    for row in rows("demos"):
        for left, sign, right, result in re.findall(r"(\d+) ([x+-]) (\d+) = (\d+)\.", row["completion"]):
            a, b = int(left), int(right)
            assert {"x": a * b, "+": a + b, "-": a - b}[sign] == int(result), row
        assert row["completion"].endswith(f"The total is £{row['answer']}.")


def test_no_question_comes_twice() -> None:
    prompts = [row["prompt"] for name in FILES for row in rows(name)]
    assert max(Counter(prompts).values()) == 1


def test_new_sums_are_in_no_other_file_and_evaluation_products_in_no_training_file() -> None:
    def kind(prompt: str) -> str:
        said = ("voucher", "deliver", " each", "pounds")
        return next((word for word in said if word in prompt), "both")

    def sums(name: str) -> set[tuple[object, ...]]:
        return {(kind(row["prompt"]), *numbers(row["prompt"])) for row in rows(name)}

    assert not sums("new_sums") & (sums("demos") | sums("prompts") | sums("eval_prompts"))
    trained = " ".join(row["prompt"] for name in ("demos", "prompts") for row in rows(name))
    for product in products.HELD_OUT:
        assert not re.search(rf"\b{re.escape(product.name)}\b", trained), product


def test_products_are_counted_as_english_counts_them() -> None:
    by_name = {each.name: each for each in (*products.TRAIN, *products.HELD_OUT)}
    said = {"kettle": "3 kettles", "dress": "3 dresses", "jeans": "3 pairs of jeans"}
    said |= {"chest of drawers": "3 chests of drawers", "casserole dish": "3 casserole dishes"}
    assert {name: several(by_name[name], 3) for name in said} == said
    assert [in_words(n) for n in (0, 13, 20, 42, 99)] == ["zero", "thirteen", "twenty", "forty-two", "ninety-nine"]
