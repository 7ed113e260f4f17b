"""A labelling by itself: what is drawn, what people see of it, and the pairs that come of their votes."""

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.data.load import load_rows
from preftune.data.spec import DataSpec, SourceSpec
from preftune.errors import UserError
from preftune.eval.chat.blind import Ballot
from preftune.eval.chat.labels import Labelling
from preftune.eval.chat.votes import cast_vote, messages_key

SAMPLING = {"temperature": 1.0, "max_new_tokens": 6, "beams": 1, "seed": 3}


def labelling(run: Path, policies: dict[str, str | None], replies: int, prompts: int = 3, **given: Any) -> Labelling:
    asked = [[{"role": "user", "content": f"question {place}"}] for place in range(prompts)]
    made = Labelling(run, "mine", {messages_key(each): each for each in asked}, policies, replies, SAMPLING | given)
    made.check_places()
    return made


def draw(made: Labelling) -> None:
    """A reply to everything, which says whose it is."""
    drawn = made.drawn()
    for wish in made.wishes():
        if wish not in drawn:
            made.keep(wish, f"{wish.policy} {wish.number} on {made.prompts[wish.prompt][0]['content']}", True)


def cast(made: Labelling, ballot: Ballot, choice: str, voter: str) -> None:
    assert cast_vote(made.run / "votes.jsonl", ballot.vote(choice, voter))


def vote_all(made: Labelling, voter: str, prefer: str) -> list[Ballot]:
    """Vote until nothing is left, for the replies that begin so."""
    seen = []
    while ballots := list(made.ballots(voter)):
        seen.append(ballots[0])
        side = next(
            (letter for letter, text in zip("AB", ballots[0].completions, strict=True) if prefer in text), "tie"
        )
        cast(made, ballots[0], side, voter)
    return seen


def test_what_was_drawn_is_not_drawn_again_unless_it_would_come_out_differently(tmp_path):
    made = labelling(tmp_path, {"sft": "s1"}, 2)
    wishes = made.wishes()
    assert len(wishes) == 6 and made.drawn() == {} and list(made.ballots("Ada")) == []
    made.keep(wishes[0], "one", True)
    # half a line that a kill left is no reply
    with made.replies_file.open("a") as file:
        file.write('{"prompt": [')
    made.keep(wishes[1], "two", False)
    assert made.drawn() == {wishes[0]: "one", wishes[1]: "two"}
    assert [each.prompt for each in made.ballots("Ada")] == [made.prompts[wishes[0].prompt]]
    # a longer file asks for the same replies to the same prompts
    assert labelling(tmp_path, {"sft": "s1"}, 2, prompts=9).drawn() == made.drawn()
    assert labelling(tmp_path, {"sft": "s2"}, 2).drawn() == {}
    assert labelling(tmp_path, {"sft": "s1"}, 2, temperature=0.5).drawn() == {}
    seeds = [made.seed_of(wish) for wish in wishes]
    assert len(set(seeds)) == 6 and seeds == [labelling(tmp_path, {"dpo": "d"}, 2).seed_of(each) for each in wishes]
    assert not set(seeds) & {labelling(tmp_path, {"sft": "s1"}, 2, seed=4).seed_of(each) for each in wishes}


def test_the_better_reply_of_one_policy_stays_and_meets_the_next(tmp_path):
    made = labelling(tmp_path, {"sft": "s1"}, 4)
    draw(made)
    seen = vote_all(made, "Ada", "sft 2")
    # three votes a prompt, and the reply that she likes is in every one from where it first came
    assert len(seen) == 9
    for prompt in made.prompts.values():
        of_prompt = [each for each in seen if each.messages == prompt]
        liked = [any("sft 2" in text for text in each.completions) for each in of_prompt]
        assert len(of_prompt) == 3 and liked == sorted(liked) and liked[-1]
        assert {text for each in of_prompt for text in each.completions} == set(
            text for wish, text in made.drawn().items() if made.prompts[wish.prompt] == prompt
        )
    # somebody else begins anew, elsewhere
    assert len(vote_all(made, "Ben", "sft 0")) == 9
    assert made.write_pairs() == len([json.loads(line) for line in made.pairs_file.read_text().splitlines()])


def test_replies_of_several_policies_meet_number_by_number(tmp_path):
    made = labelling(tmp_path, {"sft": "s1", "dpo": "d1", "base": None}, 2)
    draw(made)
    seen = vote_all(made, "Ada", "dpo")
    assert len(seen) == 3 * 3 * 2
    for each in seen:
        numbers = {text.split()[1] for text in each.completions}
        assert len(numbers) == 1 and each.policies[0] != each.policies[1]
        assert all(text.startswith(policy) for text, policy in zip(each.completions, each.policies, strict=True))
    orders = [[(each.prompt, each.policies) for each in made.ballots(name)] for name in ("Ben", "Cy")]
    assert len(orders[0]) == 18 and orders[0] != orders[1]


def test_a_pair_is_what_most_people_say_with_the_lineage_of_both_replies(tmp_path):
    made = labelling(tmp_path, {"sft": "s1", "base": None}, 1)
    draw(made)
    for voter, prefer in (("Ada", "sft"), ("Ben", "sft"), ("Cy", "base")):
        vote_all(made, voter, prefer)
    first, second, third = made.prompts.values()
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    # of the second prompt they agree on nothing, and of the third everything is bad
    for row in rows:
        if row["prompt"] == second and row["voter"] == "Ben":
            row["preference"] = 1.5
        if row["prompt"] == third:
            row |= {"preference": 1.5, "both_bad": True}
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert made.write_pairs() == 1
    (pair,) = [json.loads(line) for line in made.pairs_file.read_text().splitlines()]
    assert pair["prompt"] == first
    assert pair["chosen"] == [{"role": "assistant", "content": "sft 0 on question 0"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "base 0 on question 0"}]
    assert {each["voter"]: each["prefers"] for each in pair["votes"]} == {
        "Ada": "chosen", "Ben": "chosen", "Cy": "rejected"
    }  # fmt: skip
    assert all(each["cast"] for each in pair["votes"])
    for side, policy, adapter in (("chosen_by", "sft", "s1"), ("rejected_by", "base", None)):
        by = pair[side]
        assert (by["policy"], by["adapter_sha256"], by["sampling"]) == (policy, adapter, SAMPLING)
        assert (
            by["drawn"]
            and by["finished"]
            and by["stream"] == made.seed_of(next(wish for wish in made.wishes() if wish.policy == policy))
        )
    # a stage reads it as it lies there
    loaded = load_rows(DataSpec((SourceSpec(str(made.pairs_file)),)), "pair").rows
    assert [(row.prompt, row.chosen, row.rejected) for row in loaded] == [(first, pair["chosen"], pair["rejected"])]
    # and is made anew: what is no pair any more goes
    (tmp_path / "votes.jsonl").unlink()
    assert made.write_pairs() == 0 and made.pairs_file.read_text() == ""


def test_files_of_somebody_else_stay_as_they_are(tmp_path):
    for name in ("mine.pairs.jsonl", "mine.replies.jsonl"):
        (tmp_path / name).write_text('{"prompt": "hi", "chosen": "a", "rejected": "b"}\n')
        with pytest.raises(UserError, match="holds rows that no labelling wrote"):
            labelling(tmp_path, {"sft": "s1"}, 2)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match="is no file"):
            labelling(tmp_path, {"sft": "s1"}, 2)
        (tmp_path / name).rmdir()
