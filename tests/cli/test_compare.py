"""`preftune chat --compare`: blind votes, what becomes of them, and their tally."""

import json
import re

import pytest

from preftune.eval.chat.votes import read_votes

from .conftest import EVAL, POLICIES, RECIPE, SYSTEM, assistant, talk, user, votes_of


def test_votes_are_on_what_was_shown_and_the_talk_goes_on_with_the_better_reply(shell, run):
    typed = "Hi?\n2\nWhat is up?\n1\nWell\n=\nSkipped\n0\n"
    code, out, err = shell("chat", run, "--compare", "sft,dpo", "--max-new-tokens", 6, typed=typed)
    assert code == 0
    votes, asked = votes_of(run), talk(run)
    assert [vote["preference"] for vote in votes] == [2.0, 1.0, 1.5]
    turns = [SYSTEM]
    for seed, (text, vote) in enumerate(zip(("Hi?", "What is up?", "Well"), votes, strict=True), 3):
        turns = [*turns, user(text)]
        assert vote["prompt"] == turns
        assert {vote["policy_a"], vote["policy_b"]} == {"sft", "dpo"}
        for side in "ab":
            assert vote[f"completion_{side}"] == asked.reply(vote[f"policy_{side}"], turns, seed=seed).text
        better = vote["completion_b"] if vote["preference"] == 2 else vote["completion_a"]
        turns = [*turns, assistant(better)]
        assert f"A was {vote['policy_a']}, B was {vote['policy_b']}" in err
    assert err.count("A was") == 3
    assert re.search(r"^votes on sft, dpo in .*votes\.jsonl: 3, 3 of them now$", out, re.M)
    # what stands where is not said before the vote
    assert not re.search("sft|dpo", out.split("\nvotes on")[0])


@pytest.mark.parametrize("typed", ["1", "2"])
def test_a_vote_is_recorded_for_the_policy_that_stood_there(shell, judged, typed):
    seen = set()
    for seed in range(6):
        (judged / "votes.jsonl").unlink(missing_ok=True)
        _, out, _ = shell("chat", judged, "--compare", "sft,dpo", "--samples", "--seed", seed, typed=f"{typed}\n")
        (vote,) = read_votes(judged / "votes.jsonl")
        # the reply's own text says whose it is
        shown = dict(re.findall(r"^([AB]): (sft|dpo)", out, re.M)[:2])
        winner = shown["A" if typed == "1" else "B"]
        assert vote.outcomes[vote.policies.index(winner)] == 1.0
        assert isinstance(vote.prompt, int) and vote.completions == tuple(f"{p} {vote.prompt}" for p in vote.policies)
        seen.add(winner)
    assert seen == {"sft", "dpo"}


def test_samples_are_voted_on_once_and_in_an_order_that_only_the_seed_knows(shell, judged):
    def places(seed: int, typed: str) -> list[int]:
        _, out, _ = shell("chat", judged, "--compare", "sft,dpo", "--samples", "--seed", seed, typed=typed)
        return [int(each) for each in re.findall(r"^user: question (\d)", out, re.M)]

    whole = places(0, "0\n" * 4)
    assert sorted(whole) == [0, 1, 2, 3] and not (judged / "votes.jsonl").exists()
    assert places(0, "0\n" * 4) == whole
    assert len({tuple(places(seed, "0\n" * 4)) for seed in range(5)}) > 1
    # one vote, one skipped, then the input ends at the third
    assert places(0, "1\n0\n") == whole[:3]
    # votes that the chat itself cast are in the same file and change nothing here
    with (judged / "votes.jsonl").open("a") as file:
        row = {"prompt": [user("x")], "policy_a": "sft", "policy_b": "dpo", "preference": 1}
        file.write(json.dumps(row))
    assert places(0, "=\n" * 3) == whole[1:]
    assert places(0, "") == []
    assert [vote["prompt"] for vote in votes_of(judged)] == [whole[0], [user("x")], *whole[1:]]


def test_three_policies_are_compared_pair_by_pair_and_rated(shell, judged):
    typed = "1\n" * 12
    code, out, _ = shell("chat", judged, "--compare", "sft,dpo,ipo", "--samples", typed=typed)
    pairs = [(vote["prompt"], frozenset((vote["policy_a"], vote["policy_b"]))) for vote in votes_of(judged)]
    assert code == 0 and len(set(pairs)) == 12
    assert "votes.jsonl: 12, 12 of them now" in out and "ratings" in out
    assert all(re.search(rf"^{policy} +-?\d", out.split("ratings")[1], re.M) for policy in POLICIES)


def test_equal_replies_are_a_tie_that_nobody_is_asked_about(shell, judged):
    file = judged / "eval" / "samples.jsonl"
    file.write_text(re.sub(r'"(sft|dpo) (\d)"', r'"same \2"', file.read_text()))
    code, _, err = shell("chat", judged, "--compare", "sft,dpo", "--samples")
    assert code == 0 and err.count("a tie") == 4
    assert [vote["preference"] for vote in votes_of(judged)] == [1.5] * 4


def test_the_tally_counts_old_votes_too(shell, judged):
    old = [
        *({"prompt": 0, "policy_a": "sft", "policy_b": "dpo", "preference": each} for each in (2, 2, 1)),
        {"prompt": 1, "policy_a": "dpo", "policy_b": "sft", "preference": 1.5},
        {"prompt": 2, "policy_a": "dpo", "policy_b": "sft", "preference": 1},
        {"prompt": 2, "policy_a": "ipo", "policy_b": "sft", "preference": 1},
    ]
    (judged / "votes.jsonl").write_text("".join(json.dumps(each) + "\n" for each in old))
    code, out, _ = shell("chat", judged, "--compare", "sft,dpo", "--samples")
    assert code == 0 and "votes.jsonl: 5, 0 of them now" in out
    # dpo: 2 of 3, one half and 1, of three prompts; 1 in 27 resamples is the worst prompt three times, 1 in 27 the best
    assert re.search(r"^dpo +sft +3 +0\.7222 +0\.5 +1 +1$", out, re.M), out
    assert re.search(r"^sft +dpo +3 +0\.2778 +0 +0\.5 +1$", out, re.M), out
    code, out, _ = shell("eval", "winrate", "--votes", judged / "votes.jsonl", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(row["policy"], row["against"]) for row in rows] == [
        ("dpo", "sft"), ("sft", "dpo"), ("ipo", "sft"), ("sft", "ipo")
    ]  # fmt: skip
    expected = {"policy": "dpo", "against": "sft", "n": 3, "win_rate": 13 / 18, "ci_low": 0.5, "ci_high": 1, "ties": 1}
    assert rows[0] == pytest.approx(expected)


def test_votes_on_samples_are_a_judge(shell, run):
    (run / "recipe.yaml").write_text(RECIPE + EVAL)
    assert shell("eval", "run", run, "--json")[0] == 0
    # sft wins on two prompts and loses on one, wherever it stands; the fourth is skipped
    code, out, _ = shell("chat", run, "--compare", "sft,dpo", "--samples", typed="1\n1\n2\n0\n")
    assert code == 0
    got = [1.0 if (v["policy_a"] == "dpo") == (v["preference"] == 1) else 0.0 for v in votes_of(run)]
    judge = "eval.judges=[{kind: human, votes: votes.jsonl}]"
    code, out, err = shell("eval", "winrate", run, judge, "--policies", "sft,dpo", "--json")
    assert code == 0, err
    (row,) = [row for row in map(json.loads, out.splitlines()) if row["policy"] == "dpo"]
    assert (row["n"], row["win_rate"]) == (3, pytest.approx(sum(got) / 3))


def test_the_votes_command_stands_alone(shell, judged):
    refused = shell.refused
    refused("eval", "winrate", "--votes", judged / "none.jsonl", said="none.jsonl: no such file")
    refused("eval", "winrate", judged, "--votes", judged / "v.jsonl", said="--votes: stands alone")
    refused("eval", "winrate", said="neither a run folder nor")


def test_people_with_names_vote_on_the_same_samples(shell, judged):
    command = ("chat", judged, "--compare", "sft,dpo", "--samples", "--voter")
    assert shell(*command, "Ada", typed="1\nx\n")[0] == 0
    code, out, _ = shell(*command, " Ben ", typed="=\n" * 4)
    assert code == 0 and "votes.jsonl: 6, 4 of them now" in out
    code, out, _ = shell(*command, "Ada", typed="2\n" * 4)
    assert code == 0 and "votes.jsonl: 8, 2 of them now" in out
    votes = votes_of(judged)
    assert [each["voter"] for each in votes] == ["Ada", "Ada", *["Ben"] * 4, "Ada", "Ada"]
    assert len({(each["voter"], each["prompt"]) for each in votes}) == 8
    assert [each.get("both_bad") for each in votes[:2]] == [None, True] and votes[1]["preference"] == 1.5
    shell.refused("chat", judged, "--voter", "Ada", said="--voter: means nothing without --compare")
    shell.refused(*command, " ", said="--voter: ' ' is no name")
