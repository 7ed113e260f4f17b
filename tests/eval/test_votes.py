"""Votes by themselves: the file, their win-rates and ratings; what is shown blind."""

import json
import random
from collections import Counter

import pytest

from preftune.errors import UserError
from preftune.eval.chat.blind import Ballot, draw_pair, sample_ballots
from preftune.eval.chat.votes import append_vote, read_votes, vote_ratings, vote_rows

HI = [{"role": "user", "content": "hi"}]


def vote(prompt, a: str, b: str, preference: float) -> dict:
    return {"prompt": prompt, "policy_a": a, "policy_b": b, "preference": preference}


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
    assert ballot.vote(2.0) == {
        "prompt": 7, "policy_a": "dpo", "policy_b": "sft", "preference": 2.0,
        "completion_a": "from dpo", "completion_b": "from sft",
    }  # fmt: skip


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
