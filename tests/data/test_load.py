"""Loading: what is dropped is counted, mixing is seeded, the fingerprint is the content's."""

import pytest

from preftune.data.load import load_rows
from preftune.data.spec import DataSpec, SourceSpec
from preftune.errors import UserError


def demos(tag, n):
    return [{"prompt": f"{tag}{i}?", "completion": f"{tag}{i}."} for i in range(n)]


def tags(rows):
    return [row.prompt[-1]["content"][0] for row in rows]


def test_drops_and_duplicates_are_counted_with_their_origins(write, kit) -> None:
    path = write(
        "pairs.jsonl",
        [
            {"prompt": "a", "chosen": "1", "rejected": "2"},
            {"prompt": "a", "chosen": "3", "rejected": "4"},
            {"prompt": "b", "chosen": "5", "rejected": "5"},
            {"prompt": "c", "chosen": "", "rejected": "6"},
        ],
    )
    report = load_rows(kit.spec(str(path)), "pair").report
    assert (report.read, report.used, report.dropped_rows) == (4, 2, 2)
    assert report.count("chosen and rejected are the same") == 1
    assert report.count("empty reply") == 1
    assert report.count("prompt seen before") == 1
    text = "\n".join(report.lines())
    assert f"{path}:3" in text and f"{path}:4" in text and f"{path}:2" in text
    assert report.as_dict()["dropped"] == {"chosen and rejected are the same": 1, "empty reply": 1}


def test_hh_rows_with_two_prompts_are_dropped_and_counted(write, kit) -> None:
    start = "\n\nHuman: a\n\nAssistant:"
    rows = [
        {"chosen": start + " x", "rejected": start + " y"},
        {"chosen": start + " x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
    ]
    loaded = load_rows(kit.spec(str(write("hh.jsonl.gz", rows))), "pair")
    assert (loaded.report.used, loaded.report.count("the two sides differ before the last reply")) == (1, 1)


def test_system_message_only_where_there_is_none(write, kit) -> None:
    rows = [
        {"prompt": "a", "completion": "1"},
        {"messages": [{"role": "system", "content": "own"}, kit.user("b"), kit.assistant("2")]},
    ]
    loaded = load_rows(kit.spec(str(write("d.jsonl", rows)), system="ours"), "demo")
    assert [row.prompt[0] for row in loaded.rows] == [
        {"role": "system", "content": "ours"},
        {"role": "system", "content": "own"},
    ]


def test_sources_without_weights_are_kept_whole_and_in_order(write, kit) -> None:
    a, b = write("a.jsonl", demos("a", 3)), write("b.jsonl", demos("b", 5))
    loaded = load_rows(kit.spec(str(a), str(b)), "demo")
    assert tags(loaded.rows) == list("aaabbbbb")
    assert loaded.report.sources == {str(a): 3, str(b): 5}


def test_weights_are_shares_drawn_without_replacement(write) -> None:
    a, b = write("a.jsonl", demos("a", 30)), write("b.jsonl", demos("b", 100))
    spec = DataSpec((SourceSpec(str(a), weight=3), SourceSpec(str(b), weight=1)))
    rows = load_rows(spec, "demo").rows
    assert sorted(tags(rows)) == ["a"] * 30 + ["b"] * 10
    prompts = [row.prompt[0]["content"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert prompts == [row.prompt[0]["content"] for row in load_rows(spec, "demo").rows]
    other = load_rows(DataSpec(spec.sources, seed=1), "demo").rows
    assert prompts != [row.prompt[0]["content"] for row in other]
    assert len(load_rows(DataSpec(spec.sources, limit=8), "demo").rows) == 8


def test_limits(write, kit) -> None:
    a, b = write("a.jsonl", demos("a", 9)), write("b.jsonl", demos("b", 9))
    assert [r.prompt[0]["content"] for r in load_rows(kit.spec(str(a), limit=2), "demo").rows] == ["a0?", "a1?"]
    spec = DataSpec((SourceSpec(str(a), limit=4), SourceSpec(str(b))))
    assert tags(load_rows(spec, "demo").rows) == list("aaaa") + list("b" * 9)
    both = load_rows(kit.spec(str(a), str(b), limit=6), "demo")
    assert len(both.rows) == 6
    assert sum(both.report.sources.values()) == 6


def test_a_limit_counts_usable_rows(write, kit) -> None:
    rows = [{"prompt": "x", "completion": ""}, *demos("a", 3)]
    assert len(load_rows(kit.spec(str(write("d.jsonl", rows)), limit=2), "demo").rows) == 2


def test_fingerprint_is_of_the_content_not_of_the_place(write, kit) -> None:
    rows = demos("a", 3)
    prints = {
        name: load_rows(kit.spec(str(write(name, content))), "demo").fingerprint
        for name, content in {
            "one.jsonl": rows,
            "deep/two.jsonl.gz": rows,
            "spaced.jsonl": [{"completion": r["completion"], "prompt": r["prompt"]} for r in rows],
            "swapped.jsonl": rows[::-1],
            "changed.jsonl": [*rows[:2], {"prompt": "a2?", "completion": "a2!"}],
        }.items()
    }
    assert prints["one.jsonl"] == prints["deep/two.jsonl.gz"] == prints["spaced.jsonl"]
    assert len(set(prints.values())) == 3
    assert len(prints["one.jsonl"]) == 64


def test_no_usable_row_is_an_error_that_says_why(write, kit) -> None:
    with pytest.raises(UserError, match="empty reply: 1"):
        load_rows(kit.spec(str(write("d.jsonl", [{"prompt": "a", "completion": " "}]))), "demo")
    with pytest.raises(UserError, match="empty"):
        load_rows(kit.spec(str(write("e.jsonl", ""))), "demo")


def test_a_row_without_the_field_names_file_and_line(write, kit) -> None:
    path = write("p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "rejected": "c"}])
    with pytest.raises(UserError, match=r"p\.jsonl:2: no chosen: found prompt, rejected"):
        load_rows(kit.spec(str(path)), "pair")


@pytest.mark.parametrize(
    "wrong", [{"held_out": 1.0}, {"overflow": "wrap"}, {"max_length": 0}, {"limit": -1}, {"max_prompt_length": 0}]
)
def test_a_wrong_spec_is_refused(wrong, kit) -> None:
    with pytest.raises(UserError):
        kit.spec("d.jsonl", **wrong)
