"""Votes by themselves: the file, their win-rates and ratings; what is shown blind."""

import json
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from threading import Thread

import pytest

from preftune.errors import UserError
from preftune.eval.chat import votes as files_of_votes
from preftune.eval.chat.blind import CHOICES, Ballot, draw_pair, sample_ballots
from preftune.eval.chat.votes import (
    append_vote,
    cast_vote,
    read_votes,
    vote_ratings,
    vote_rows,
    voter_name,
)
from preftune.journal import append_line, mend

HI = [{"role": "user", "content": "hi"}]


def vote(prompt, a: str, b: str, preference: float) -> dict:
    return {"prompt": prompt, "policy_a": a, "policy_b": b, "preference": preference}


def samples(path, places: int) -> None:
    """Samples of sft and dpo that say whose they are."""
    rows = [
        {"policy": policy, "prompt_index": place, "prompt": HI, "completion": f"{policy} {place}"}
        for policy in ("sft", "dpo")
        for place in range(places)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def votes(tmp_path):
    def made(*rows: dict):
        path = tmp_path / "votes.jsonl"
        path.unlink(missing_ok=True)
        for row in rows:
            append_vote(path, row)
        return read_votes(path)

    return made


def test_a_vote_is_added_as_a_line_of_its_own(tmp_path):
    path = tmp_path / "votes.jsonl"
    first, second = vote(HI, "a", "b", 1), vote([{"role": "user", "content": "ü\n\ud800"}], "a", "b", 2)
    append_vote(path, first)
    assert path.read_bytes().endswith(b"}\n")
    # somebody's editor took the last line break away
    path.write_bytes(path.read_bytes().rstrip())
    append_vote(path, second | {"prompt": HI})
    append_vote(path, first)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [first, second | {"prompt": HI}, first]


def test_win_rates_are_those_of_prompts(votes):
    cast = votes(
        # dpo gets 1, 1, 0 on one conversation, then a half, then 1
        *(vote(HI, "sft", "dpo", each) for each in (2, 2, 1)),
        vote(0, "dpo", "sft", 1.5),
        vote(1, "dpo", "sft", 1),
        *(vote(place, "ppo", "sft", 1) for place in (0, 1)),
    )
    rows = {(row.pop("policy"), row.pop("against")): row for row in vote_rows(cast)}
    # of the 27 equally likely resamples of three prompts the worst is 3 x 1/2 and the best 3 x 1: each more than 2.5%
    assert rows["dpo", "sft"] == pytest.approx({"n": 3, "win_rate": 13 / 18, "ci_low": 0.5, "ci_high": 1.0, "ties": 1})
    assert rows["sft", "dpo"] == pytest.approx({"n": 3, "win_rate": 5 / 18, "ci_low": 0.0, "ci_high": 0.5, "ties": 1})
    # Wilson's interval of 2 in 2 begins at 2 / (2 + 1.96^2)
    assert rows["ppo", "sft"] == pytest.approx(
        {"n": 2, "win_rate": 1, "ci_low": 0.34238, "ci_high": 1, "ties": 0}, 1e-4
    )
    assert set(rows) == {("dpo", "sft"), ("sft", "dpo"), ("ppo", "sft"), ("sft", "ppo")}


def test_the_same_conversation_is_one_prompt_however_it_is_written(votes):
    spaced = [{"content": " hi ", "role": "user", "name": None}]
    (row, _) = vote_rows(votes(vote(HI, "a", "b", 1), vote(spaced, "a", "b", 2)))
    assert (row["n"], row["win_rate"], row["ties"]) == (1, 0.5, 1)


def test_ratings_need_votes_that_join_all_policies(votes):
    circle = votes(vote(0, "a", "b", 1), vote(1, "b", "c", 1), vote(2, "c", "a", 1))
    assert [each.log_odds for each in vote_ratings(circle).values()] == pytest.approx([0, 0, 0], abs=1e-6)
    chain = votes(*(vote(place, *pair, 1) for place in range(4) for pair in (("a", "b"), ("b", "c"))))
    # each pair: 4.5 of 5 with half a win added to both, so log 9 apart; mean 0
    ratings = vote_ratings(chain)
    assert list(ratings) == ["a", "b", "c"]
    assert [each.log_odds for each in ratings.values()] == pytest.approx([2.1972, 0, -2.1972], abs=1e-3)
    apart = votes(vote(0, "a", "b", 1), vote(0, "c", "d", 1))
    assert all(each.log_odds != each.log_odds for each in vote_ratings(apart).values())


def test_a_file_of_votes_is_there_and_not_empty(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_votes(tmp_path / "votes.jsonl")


def test_every_pair_is_as_likely_in_either_order():
    rng = random.Random(0)
    drawn = Counter(draw_pair(rng, ("a", "b", "c")) for _ in range(6000))
    assert len(drawn) == 6
    # 1000 each, standard deviation 29
    assert all(abs(count - 1000) < 120 for count in drawn.values())


def test_a_ballots_vote_names_the_policies_as_they_stood():
    ballot = Ballot(7, HI, ("dpo", "sft"), ("from dpo", "from sft"))
    row = ballot.vote("B")
    assert datetime.fromisoformat(row.pop("cast")).tzinfo is not None
    assert row == {
        "prompt": 7, "policy_a": "dpo", "policy_b": "sft", "preference": 2.0,
        "completion_a": "from dpo", "completion_b": "from sft",
    }  # fmt: skip
    assert [ballot.vote(choice)["preference"] for choice in CHOICES] == [1.0, 2.0, 1.5, 1.5]
    assert ["both_bad" in ballot.vote(choice) for choice in CHOICES] == [False, False, False, True]
    assert ballot.vote("A", "Ada")["voter"] == "Ada"


def test_ballots_stay_as_they_are_when_some_are_done(tmp_path, votes):
    path = tmp_path / "samples.jsonl"
    lines = [
        {"policy": policy, "prompt_index": place, "prompt": HI, "completion": f"{policy} {place}"}
        for policy in ("sft", "dpo")
        for place in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = sample_ballots(path, ["sft", "dpo"], [], 4)
    assert sorted(each.prompt for each in whole) == [0, 1, 2, 3, 4]
    assert {each.policies for each in whole} == {("sft", "dpo"), ("dpo", "sft")}
    assert all(each.completions == tuple(f"{policy} {each.prompt}" for policy in each.policies) for each in whole)
    done = votes(
        vote(whole[0].prompt, "dpo", "sft", 1), vote(HI, "sft", "dpo", 1), vote(whole[1].prompt, "sft", "x", 1)
    )
    assert sample_ballots(path, ["sft", "dpo"], done, 4) == whole[1:]
    with pytest.raises(UserError, match=r"prompt is 5, and the evaluation has 5"):
        sample_ballots(path, ["sft", "dpo"], votes(vote(5, "sft", "dpo", 1)), 4)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    with pytest.raises(UserError, match="'dpo' has not one reply to each prompt"):
        sample_ballots(path, ["sft", "dpo"], [], 4)
    path.write_text(json.dumps({key: value for key, value in lines[0].items() if key != "completion"}))
    with pytest.raises(UserError, match=r"samples\.jsonl:1: no 'completion'"):
        sample_ballots(path, ["sft", "dpo"], [], 4)


def test_everybody_votes_on_everything_in_an_order_of_their_own(tmp_path, votes):
    path = tmp_path / "samples.jsonl"
    samples(path, 8)
    whole = {name: sample_ballots(path, ["sft", "dpo"], [], 4, name) for name in (None, "Ada", "Ben")}
    assert all(sorted(each.prompt for each in ballots) == list(range(8)) for ballots in whole.values())
    orders = [tuple((each.prompt, each.policies) for each in ballots) for ballots in whole.values()]
    assert len(set(orders)) == 3
    cast = votes(whole["Ada"][0].vote("A", "Ada"), whole["Ada"][1].vote("tie", "Ada"), whole[None][0].vote("B"))
    assert sample_ballots(path, ["sft", "dpo"], cast, 4, "Ada") == whole["Ada"][2:]
    assert sample_ballots(path, ["sft", "dpo"], cast, 4, "Ben") == whole["Ben"]
    assert sample_ballots(path, ["sft", "dpo"], cast, 4) == whole[None][1:]


@pytest.mark.checklist("E6")
def test_e06_nobody_votes_twice_on_the_same_two_replies(tmp_path):
    path = tmp_path / "votes.jsonl"
    there, back = Ballot(HI, HI, ("dpo", "sft"), ("x", "y")), Ballot(HI, HI, ("sft", "dpo"), ("y", "x"))
    assert cast_vote(path, there.vote("A", "Ada"))
    assert not cast_vote(path, back.vote("A", "Ada"))
    assert cast_vote(path, there.vote("A", "Ben"))
    assert cast_vote(path, Ballot(HI, HI, ("dpo", "sft"), ("x", "z")).vote("A", "Ada"))
    assert [each.voter for each in read_votes(path)] == ["Ada", "Ben", "Ada"]


VOTER = """
import sys
from pathlib import Path
from preftune.eval.chat.votes import cast_vote
for place in range(20):
    row = {"prompt": place, "policy_a": "a", "policy_b": "b", "preference": 1, "completion_a": "x" * 3000}
    cast_vote(Path(sys.argv[1]), row | {"voter": sys.argv[2]})
"""


@pytest.mark.checklist("E6")
def test_e06_votes_cast_at_the_same_time_are_all_there_and_there_once(tmp_path):
    path = tmp_path / "votes.jsonl"
    others = [subprocess.Popen([sys.executable, "-c", VOTER, path, name]) for name in ("Ada", "Ben")]
    row = vote(0, "a", "b", 1) | {"completion_a": "x", "voter": "Cy"}
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda place: cast_vote(path, row | {"prompt": place % 20}), range(60)))
    assert [each.wait() for each in others] == [0, 0]
    assert sum(added) == 20
    assert Counter(each.voter for each in read_votes(path)) == {"Ada": 20, "Ben": 20, "Cy": 20}


@pytest.mark.checklist("E6")
def test_e06_who_votes_waits_for_a_vote_that_is_being_written(tmp_path, monkeypatch):
    path = tmp_path / "votes.jsonl"
    row = vote(HI, "a", "b", 1) | {"completion_a": "x", "voter": "Ada"}
    added = {}
    second = Thread(target=lambda: added.update(second=cast_vote(path, row)))

    def interrupted(*arguments):
        monkeypatch.setattr(files_of_votes, "append_line", append_line)
        second.start()
        second.join(2)
        append_line(*arguments)

    monkeypatch.setattr(files_of_votes, "append_line", interrupted)
    added["first"] = cast_vote(path, row)
    second.join()
    assert added == {"first": True, "second": False}
    assert len(read_votes(path)) == 1


def test_half_a_line_that_a_kill_left_is_no_vote(tmp_path):
    path = tmp_path / "votes.jsonl"
    row = vote(HI, "a", "b", 1) | {"completion_a": "x" * 200_000}
    append_vote(path, row)
    whole = path.read_bytes()
    for half in (whole[:-9], whole[:50]):
        path.write_bytes(whole + half)
        with pytest.raises(UserError, match=r"votes.jsonl:2"):
            read_votes(path)
        mend(path)
        assert path.read_bytes() == whole
        path.write_bytes(whole + half)
        append_vote(path, row)
        assert path.read_bytes() == whole + whole
    mend(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_two_replies_of_one_policy_are_a_vote_of_a_labelling_only(votes):
    one = vote(HI, "a", "a", 1)
    with pytest.raises(UserError, match="are both 'a'"):
        votes(one)
    with pytest.raises(UserError, match="each of its votes is on two replies of one policy"):
        votes(one | {"labelling": "mine"})
    assert [each.policies for each in votes(one | {"labelling": "mine"}, vote(HI, "a", "b", 1))] == [("a", "b")]


def test_a_name_is_the_same_however_it_was_typed():
    assert voter_name("  Zoe\u0308  B ") == "Zo\u00eb B"
    assert [voter_name(said) for said in ("", "  ", "x" * 61, "a\x1bb")] == [None] * 4
