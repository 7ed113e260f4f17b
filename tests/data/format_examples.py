"""One row of every common format: read by test_format_examples.py, and shown in docs/data.md.

`python tests/data/format_examples.py` writes them there.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BEGIN, END = "<!-- python tests/data/format_examples.py -->", "<!-- end -->"

U, A = {"role": "user", "content": "Where is my lamp?"}, {"role": "assistant", "content": "On its way."}
B = {"role": "assistant", "content": "No idea."}
HH = "\n\nHuman: Where is my lamp?\n\nAssistant:"


class Example(NamedTuple):
    """kinds: what the row can be read as: demo, pair, label, prompt."""

    title: str
    kinds: tuple[str, ...]
    row: dict[str, Any]


EXAMPLES = (
    Example("Prompt and completion", ("demo", "prompt"), {"prompt": "Where is my lamp?", "completion": "On its way."}),
    Example("Messages (OpenAI, TRL)", ("demo", "prompt"), {"messages": [U, A]}),
    Example(
        "ShareGPT",
        ("demo", "prompt"),
        {
            "conversations": [
                {"from": "human", "value": "Where is my lamp?"},
                {"from": "gpt", "value": "On its way."},
            ]
        },
    ),
    Example(
        "Alpaca",
        ("demo", "prompt"),
        {"instruction": "Answer the customer.", "input": "Where is my lamp?", "output": "On its way."},
    ),
    Example(
        "Preference pair",
        ("pair", "demo", "label", "prompt"),
        {"prompt": "Where is my lamp?", "chosen": "On its way.", "rejected": "No idea."},
    ),
    Example(
        "Preference pair of whole conversations",
        ("pair", "demo", "label", "prompt"),
        {"chosen": [U, A], "rejected": [U, B]},
    ),
    Example(
        "HH-RLHF",
        ("pair", "demo", "label", "prompt"),
        {"chosen": f"{HH} On its way.", "rejected": f"{HH} No idea."},
    ),
    Example(
        "OpenAI's preference data",
        ("pair", "demo", "label", "prompt"),
        {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [B]},
    ),
    Example(
        "Labelled reply (KTO)",
        ("label", "demo", "prompt"),
        {"prompt": "Where is my lamp?", "completion": "On its way.", "label": True},
    ),
    Example("Prompt alone", ("prompt",), {"prompt": "Where is my lamp?"}),
)


def section() -> str:
    """The examples as they stand in the page."""
    words = {"demo": "demonstrations", "pair": "pairs", "label": "labelled replies", "prompt": "prompts"}
    parts = [BEGIN]
    for each in EXAMPLES:
        kinds = ", ".join(words[kind] for kind in each.kinds)
        row = json.dumps(each.row, ensure_ascii=False)
        parts.append(f"### {each.title}\n\nServes as {kinds}.\n\n```json\n{row}\n```\n")
    return "\n".join([*parts, END])


def written(page: str) -> str:
    """The page with the examples as they are now."""
    before, _, rest = page.partition(BEGIN)
    return before + section() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
