"""Which number a text writes, which it does not, and where in a reply the answer stands."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.stages.scorers.answers import (
    after_hash,
    after_thinking,
    answer_in,
    boxed,
    last_line,
    last_number,
    read_number,
    tagged,
)

NUMBERS = {
    "12": "12",
    "-3.5": "-7/2",
    ".5": "1/2",
    "+7": "7",
    "12.": "12",
    "1,234,567": "1234567",
    "1,234.5": "2469/2",
    "1\u202f234": "1234",
    "1'234": "1234",
    "3/4": "3/4",
    "1 3/4": "7/4",
    "-1 3/4": "-7/4",
    "½": "1/2",
    "-½": "-1/2",
    "3½": "7/2",
    "6.02e23": "602000000000000000000000",
    "3 x 10^8": "300000000",
    "2\\times 10^{-3}": "1/500",
    "5 million": "5000000",
    "$12": "12",
    "-$5": "-5",
    "$-5": "-5",
    "$5$": "5",
    "\\$1,000": "1000",
    "12%": "12",
    "12\\%": "12",
    "−5": "-5",
    "x = 5": "5",
    "12 apples": "12",
    "5 cm": "5",
    "5cm": "5",
    "12 \\text{ apples}": "12",
    "\\frac{3}{4}": "3/4",
    "-\\frac{1}{2}": "-1/2",
    "\\dfrac{-1}{2}": "-1/2",
    "3\\frac{1}{2}": "7/2",
    "\\frac12": "1/2",
    "1{,}234": "1234",
    "0012": "12",
}
NONE = [
    "", "twelve", "3,5", "1,2,3", "1,23", "1234,567", "12:30", "1/2/2024", "1.2.3", "5k", "5M", "2x", "2\\pi", "2 pi",
    "\\sqrt{2}", "√2", "1/0", "0/0", "1 1/0", "2^10", "10^{3}", "12 and 3", "12, 13", "10-5", "3 + 4", "1e999999999",
    "9" * 400, "1e", "--5", "1/2/", "NaN", "inf", "5\u00b2", "H2O",
]  # fmt: skip


@pytest.mark.checklist("W2")
@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_w02_a_number_is_read_however_it_is_written(text: str, value: str):
    assert read_number(text) == Fraction(value)


@pytest.mark.checklist("W2")
@pytest.mark.parametrize("text", NONE)
def test_w02_what_is_no_number_or_several_or_ambiguous_is_none(text: str):
    assert read_number(text) is None


@pytest.mark.checklist("W2")
def test_w02_percent_and_a_decimal_comma_are_read_as_asked():
    assert read_number("12%", percent=True) == Fraction(12, 100)
    assert read_number("12 percent", percent=True) == Fraction(12, 100)
    assert read_number("12", percent=True) == 12
    assert read_number("3,5", decimal=",") == Fraction(7, 2)
    assert read_number("1.234,5", decimal=",") == Fraction(2469, 2)
    assert read_number("1.5", decimal=",") is None


@given(st.integers(-(10**12), 10**12))
def test_an_integer_comes_back_in_every_spelling(number: int):
    for written in (f"{number}", f"{number:,}", f"{number:,} apples", f"${number:,}$", f"\\text{{{number}}}"):
        assert read_number(written) == number
        assert read_number(last_number(f"Hence the total is {written}.") or "") == number


@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=6))
def test_a_decimal_comes_back_exactly(number):
    assert read_number(f"{number:f}") == Fraction(str(number))


@given(st.fractions(max_denominator=1000))
def test_a_fraction_comes_back_in_latex_and_plain(number: Fraction):
    above, below = number.numerator, number.denominator
    assert read_number(f"{above}/{below}") == number
    sign = "-" if above < 0 else ""
    assert read_number(f"{sign}\\frac{{{abs(above)}}}{{{below}}}") == number


@given(st.text(alphabet="0123456789.,/'-+ $%eE^x*{}\\boxedfrac\u00a0½\n#<>", max_size=60))
def test_no_text_makes_it_fail(text: str):
    read_number(text)
    answer_in(text, ("boxed", "hash", "answer", "last_line", "last_number", "all"))


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("So it is 10-5 = 5.", "5"),
        ("10 - 5", "5"),
        ("answer: **42**", "42"),
        ("H2O has 2", "2"),
        ("- 5 apples", "5"),
        ("a-5", "5"),
        ("it is -5", "-5"),
        ("it is -\\frac{1}{2}", "-1/2"),
        ("it is -½", "-1/2"),
        ("1 3/4 cups.", "7/4"),
        ("costs $1,200.", "1200"),
        ("`7`\n", "7"),
        ("{8}", "8"),
    ],
)
def test_the_last_number_of_a_text(text: str, last: str):
    assert read_number(last_number(text) or "") == Fraction(last)


@pytest.mark.checklist("W1")
@pytest.mark.parametrize(
    "text",
    ["2, then the ratio 3:4", "2, then 2^10", "2, on 5/10/2024", "2, then 3,5", "2, then \\sqrt{5}", "2 then 5k"],
)
def test_w01_where_the_last_is_no_number_an_earlier_one_is_not_taken_for_it(text: str):
    assert read_number(last_number(text) or "") is None


def test_a_text_without_a_number_has_no_last_one():
    assert last_number("none at all") is None


@pytest.mark.checklist("W1")
@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("so \\boxed{\\frac{1}{2}} ok", "\\frac{1}{2}"),
        ("\\boxed{\\sqrt{x^{2} + {1}}} or {3}", "\\sqrt{x^{2} + {1}}"),
        ("\\boxed{1} then \\boxed{ 2 }", "2"),
        ("\\fbox{3}", "3"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{5", None),
        ("\\boxed{1} \\boxed{2", None),
        ("\\boxed 5 {x}", None),
        ("no box", None),
    ],
)
def test_w01_the_last_box_and_only_a_closed_one(text: str, inside: str | None):
    assert boxed(text) == inside


def test_the_other_places():
    assert after_hash("a\n#### 12\n") == "12"
    assert after_hash("#### 1\n#### 2 apples") == "2 apples"
    assert after_hash("### 1") is None
    assert tagged("<answer> 1 </answer><answer>\n2</answer>") == "2"
    assert tagged("<answer>1") is None
    assert last_line("a\nb\n \n") == "b"
    assert last_line(" \n") is None


@pytest.mark.checklist("W1")
def test_w01_the_first_place_that_there_is_decides():
    places = ("boxed", "hash", "last_number")
    assert answer_in("7 \\boxed{x} 9", places) == "x"
    assert answer_in("7 #### 8 \n 9", places) == "8"
    assert answer_in("7 and 9", places) == "9"
    assert answer_in("none", places) is None


@pytest.mark.checklist("W1")
def test_w01_what_was_thought_is_no_answer():
    assert after_thinking("<think>1</think> 2") == " 2"
    assert after_thinking("1</think> 2") == " 2"
    assert after_thinking("<think>1, 2") == ""
    assert answer_in("<think>\\boxed{1}</think> it is 2", ("boxed", "last_number")) == "2"
    assert answer_in("<think>\\boxed{1}", ("boxed", "last_number")) is None


def test_a_long_text_takes_no_time():
    for piece in ("1,", "1 ", "1/", "\\boxed{", "####", "9", "<answer>", "-", "$"):
        text = piece * (100_000 // len(piece))
        answer_in(text, ("boxed", "hash", "answer", "last_number"))
        read_number(text)
