"""People's votes as a judge."""

import json
import math

import pytest

from preftune.errors import UserError
from preftune.eval.chat.votes import read_votes
from preftune.eval.judges.human_judge import HumanJudge
from preftune.eval.judges.registry import plan_judges
from preftune.eval.judges.verdicts import Verdicts
from preftune.eval.samples import EncodedPrompt, Sample


def replies(policy: str, n: int = 4) -> list[Sample]:
    prompt = EncodedPrompt([{"role": "user", "content": "hi"}], [1])
    return [Sample(policy, place, prompt, f"{policy} says {place}", [3, 2], True) for place in range(n)]


def vote(
    prompt: object = 0, a: object = "sft", b: object = "dpo", preference: float = 2.0, **others: object
) -> dict[str, object]:
    return {"prompt": prompt, "policy_a": a, "policy_b": b, "preference": preference, **others}


@pytest.fixture
def judge(tmp_path):
    def made(*votes: dict) -> HumanJudge:
        path = tmp_path / "votes.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in votes))
        return HumanJudge("human", read_votes(path))

    return made


def test_votes_are_read_from_either_side(judge):
    people = judge(
        vote(0, preference=2), vote(1, "dpo", "sft", 1.75), vote(3, preference=1.5), vote(2, "ppo", "sft", 1)
    )
    assert people.compare(replies("dpo"), replies("sft")) == pytest.approx([1.0, 0.25, math.nan, 0.5], nan_ok=True)
    assert people.compare(replies("sft"), replies("dpo")) == pytest.approx([0.0, 0.75, math.nan, 0.5], nan_ok=True)
    assert people.compare(replies("ppo"), replies("dpo")) == pytest.approx([math.nan] * 4, nan_ok=True)


def test_several_votes_on_a_pair_are_averaged(judge):
    people = judge(vote(preference=2), vote(preference=2), vote(preference=1), vote(0, "dpo", "sft", 1))
    assert people.compare(replies("dpo", 1), replies("sft", 1)) == [0.75]


def test_votes_on_other_replies_are_refused(judge):
    same = judge(vote(1, completion_a="sft says 1", completion_b="dpo says 1"))
    assert same.compare(replies("dpo"), replies("sft"))[1] == 1.0
    other = judge(vote(1, completion_b="dpo said something else"))
    with pytest.raises(UserError, match=r"votes\.jsonl:1: a vote on another reply of 'dpo'"):
        other.compare(replies("dpo"), replies("sft"))
    with pytest.raises(UserError, match="prompt is 4, and the evaluation has 4 prompts"):
        judge(vote(4)).compare(replies("dpo"), replies("sft"))


def asked(policy: str, *questions: str) -> list[Sample]:
    """One reply per question, each to a prompt of its own."""
    prompts = [EncodedPrompt([{"role": "user", "content": question}], [1]) for question in questions]
    return [Sample(policy, i, prompt, f"{policy} says {i}", [3], True) for i, prompt in enumerate(prompts)]


def cast(question: str, ours: str, theirs: str, preference: float = 1) -> dict:
    """A vote in a chat on these replies of dpo and sft."""
    messages = [{"role": "user", "content": question}]
    return vote(messages, "dpo", "sft", preference, completion_a=ours, completion_b=theirs)


def test_votes_of_a_chat_count_where_the_evaluation_has_the_same(judge, capsys):
    samples = {policy: asked(policy, "one", "two", "one") for policy in ("sft", "dpo")}
    people = judge(
        cast("two", "dpo says 1", "sft says 1"),
        # asked twice in the evaluation: the place with these replies
        cast("one", "dpo says 2", "sft says 2", 2),
        cast("two", "another reply", "sft says 1", 2),
        cast("three", "dpo says 0", "sft says 0", 2),
        vote([{"role": "user", "content": "two"}], "dpo", "ppo", 2),
    )
    people.check(samples)
    said = capsys.readouterr().err
    assert said == "human: 2 of 4 votes are on other prompts or replies, and are left out\n"
    expected = [math.nan, 1.0, 0.0]
    assert people.compare(samples["dpo"], samples["sft"]) == pytest.approx(expected, nan_ok=True)
    assert people.compare(samples["sft"], samples["dpo"]) == pytest.approx([math.nan, 0.0, 1.0], nan_ok=True)
    assert capsys.readouterr().err == ""


def test_votes_that_match_nothing_are_refused_and_those_on_others_are_not(judge, capsys):
    samples = {policy: asked(policy, "one") for policy in ("sft", "dpo")}
    with pytest.raises(UserError, match=r"votes\.jsonl: none of its 2 votes is on .*preftune chat RUN --compare A,B"):
        judge(cast("two", "dpo says 0", "sft says 0"), cast("one", "x", "y")).check(samples)
    judge(vote(0, "ppo", "kto")).check(samples)
    assert "none of the 1 votes is on two of these policies" in capsys.readouterr().err
    judge(vote(0)).check(samples)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="prompt is 1, and the evaluation has 1"):
        judge(vote(1)).check(samples)


def test_verdicts_let_the_judge_look_first(judge):
    samples = {policy: asked(policy, "one") for policy in ("sft", "dpo")}
    with pytest.raises(UserError, match="none of its 1 votes"):
        Verdicts.of(judge(cast("two", "a", "b")), samples)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (vote(prompt="0"), "prompt is '0'"),
        (vote(prompt=-1), "prompt is -1"),
        (vote(prompt=True), "prompt is True"),
        (vote(prompt=[]), r"prompt is \[\], expected a whole number or a list of messages"),
        (vote(prompt=["hi"]), "expected a whole number or a list of messages"),
        (vote(a=None), "policy_a is None"),
        (vote(a="dpo"), "both 'dpo'"),
        (vote(preference=3), "preference is 3"),
        ({"prompt": 0, "policy_a": "x", "policy_b": "y"}, "no 'preference'"),
        (vote(completion_a=3), "completion_a is 3"),
    ],
)
def test_a_malformed_vote_is_named(judge, bad, said):
    with pytest.raises(UserError, match=rf"votes\.jsonl:2: .*{said}"):
        judge(vote(), bad)


def test_no_votes_are_refused(judge):
    with pytest.raises(UserError, match="holds no votes"):
        judge()


def test_a_recipe_names_the_file(tmp_path, judge):
    judge(vote())
    (plan,) = plan_judges([{"kind": "human", "votes": "votes.jsonl"}], tmp_path)
    assert plan.name == "human"
    opened = plan.open(None, None)  # pyright: ignore[reportArgumentType]: people read neither
    assert isinstance(opened, HumanJudge)
    assert opened.compare(replies("dpo", 1), replies("sft", 1)) == [1.0]
    for raw, said in (({}, "expected a file"), ({"votes": "none.jsonl"}, "no file 'none.jsonl'")):
        with pytest.raises(UserError, match=said):
            plan_judges([{"kind": "human", **raw}], tmp_path)
