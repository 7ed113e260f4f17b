"""`load_policy`, `score`, `kl`, `evaluate`: against plain PEFT and the evaluation's own numbers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

import preftune
from preftune.models.merging import merge_adapter

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say two."}]


@pytest.fixture(scope="module")
def merged(small: preftune.RunResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    merge_adapter(small["dpo"].path, folder, "float32")
    return folder


@pytest.fixture(scope="module")
def policy(small: preftune.RunResult) -> preftune.Policy:
    return preftune.load_policy(small["dpo"].path)


def test_greedy_replies_are_those_of_plain_peft(small: preftune.RunResult, policy: preftune.Policy) -> None:
    found = policy.generate(["Say one.", TALK], max_new_tokens=6)
    model: Any = AutoPeftModelForCausalLM.from_pretrained(small["dpo"].path)
    tokenizer: Any = AutoTokenizer.from_pretrained(small["dpo"].path)
    for place, turns in enumerate(([{"role": "user", "content": "Say one."}], TALK)):
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        theirs = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert list(found.token_ids[place]) == theirs.tolist()
    assert len(found) == 2 and list(found) == list(found.completions) and found[1] == found.completions[1]
    table: Any = found.to_pandas()
    assert list(table.columns) == ["policy", "prompt", "completion", "tokens", "finished"]
    assert table["policy"][0] == "dpo" and table["tokens"].max() <= 6


def test_what_is_drawn_goes_by_the_seed_alone(policy: preftune.Policy) -> None:
    ask: Any = {"max_new_tokens": 5, "temperature": 1.0}
    first = policy.generate(["a"] * 4, seed=1, **ask)
    torch.manual_seed(99)
    assert policy.generate(["a"] * 4, seed=1, batch_size=3, **ask) == first
    assert policy.generate(["a"] * 4, seed=2, **ask) != first and len(set(first.token_ids)) > 1
    greedy = policy.generate("a", max_new_tokens=5)
    assert policy.generate("a", top_k=1, **ask).token_ids == greedy.token_ids


def test_a_text_is_a_message_unless_it_is_to_be_gone_on_with(policy: preftune.Policy) -> None:
    as_message = policy.generate("Say one.", max_new_tokens=1)
    assert as_message.prompt_ids == policy.generate([[TALK[1] | {"content": "Say one."}]], max_new_tokens=1).prompt_ids
    plain = policy.generate("Say one.", max_new_tokens=1, apply_chat_template=False)
    assert policy.bench.tokenizer.decode(plain.prompt_ids[0], skip_special_tokens=True) == "Say one."


def test_all_that_holds_a_policy_loads(small: preftune.RunResult, merged: Path, tmp_path: Path) -> None:
    ways = [
        preftune.load_policy(str(small.path)),
        preftune.load_policy(small.path, "dpo"),
        preftune.load_policy(merged),
    ]
    assert [each.name for each in ways] == ["dpo", "dpo", merged.name]
    assert len({each.generate("Say one.", max_new_tokens=6).token_ids for each in ways}) == 1
    base = preftune.load_policy(small.path, "base").generate("Say one.", max_new_tokens=6)
    assert base.token_ids == preftune.load_policy("random:llama").generate("Say one.", max_new_tokens=6).token_ids
    wrong: Any = (
        ((small["reward"].path,), "is a reward model, which says nothing; preftune.score reads it"),
        ((small.path, "reward"), "no policy 'reward'"),
        ((small["dpo"].path, "dpo"), "is no run"),
        ((tmp_path,), "config.json"),
    )
    for arguments, said in wrong:
        with pytest.raises(preftune.UserError, match=said):
            preftune.load_policy(*arguments)


def test_what_cannot_be_asked_is_refused(policy: preftune.Policy) -> None:
    wrong: Any = (
        ([], {}, "prompts: holds none"),
        ([""], {}, r"prompts\[0\]"),
        ([3], {}, "is a int, expected text or messages"),
        (TALK, {}, "is one conversation"),
        (["a"], {"temperature": -1.0}, "temperature: is -1.0"),
        (["a"], {"top_p": 0.0}, "top_p"),
        (["a"], {"max_new_tokens": 100_000}, "prompts"),
    )
    for prompts, settings, said in wrong:
        with pytest.raises(preftune.UserError, match=said):
            policy.generate(prompts, **settings)


def test_scores_are_those_of_the_plain_classifier(small: preftune.RunResult, policy: preftune.Policy) -> None:
    found = preftune.score(small["reward"].path, ["Say one.", TALK], ["one!", "no"])
    classifier: Any = AutoPeftModelForSequenceClassification.from_pretrained(
        small["reward"].path, num_labels=1, dtype=torch.float32
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(small["reward"].path)
    for turns, reply, ours in zip(
        ([{"role": "user", "content": "Say one."}], TALK), ("one!", "no"), found.values, strict=True
    ):
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply}], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        end = (ids[0] == tokenizer.eos_token_id).nonzero()[-1].item() + 1
        assert ours == pytest.approx(classifier(input_ids=ids[:, :end]).logits.item(), abs=1e-5)
    assert list(found.to_pandas()["score"]) == list(found) and found[0] == found.values[0] and len(found) == 2
    # replies of a policy are scored by their very tokens: one that was cut has no end
    model = preftune.load_reward(small.path)
    cut = policy.generate("Say one.", max_new_tokens=2)
    assert not cut.finished[0]
    ids = torch.tensor([[*cut.prompt_ids[0], *cut.token_ids[0]]])
    assert model.score(cut)[0] == pytest.approx(classifier(input_ids=ids).logits.item(), abs=1e-5)
    wrong: Any = (
        ((["a"], ["b", "c"]), "are 2, and the prompts 1"),
        ((["a"], [""]), r"completions\[0\]"),
        ((["a"], None), "are missing"),
        ((cut, ["a"]), "leave them out"),
    )
    for arguments, said in wrong:
        with pytest.raises(preftune.UserError, match=said):
            model.score(*arguments)
    with pytest.raises(preftune.UserError, match="is a policy, expected a reward stage"):
        preftune.score(small["sft"].path, ["a"], ["b"])


def test_kl_is_that_of_the_full_distributions(small: preftune.RunResult, policy: preftune.Policy, merged: Path) -> None:
    found = preftune.kl(policy, (small.path, "sft"), ["Say one.", TALK], max_new_tokens=5)
    ours: Any = AutoPeftModelForCausalLM.from_pretrained(small["dpo"].path)
    theirs: Any = AutoPeftModelForCausalLM.from_pretrained(small["sft"].path)
    for place, value in enumerate(found.values):
        prompt, reply = found.generations.prompt_ids[place], found.generations.token_ids[place]
        ids = torch.tensor([[*prompt, *reply]])
        logps = [model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (ours, theirs)]
        by_hand = (logps[0].exp() * (logps[0] - logps[1])).sum().item()
        assert value == pytest.approx(by_hand, abs=1e-5)
    assert found.per_reply == pytest.approx(sum(found.values) / 2) and found.per_reply > 0
    tokens = sum(map(len, found.generations.token_ids))
    assert found.per_token == pytest.approx(sum(found.values) / tokens)
    assert list(found.to_pandas()["kl"]) == list(found.values) and found.reference == "sft"
    # against itself nothing, and a loaded policy is as it was
    assert preftune.kl(policy, policy, ["Say one."], max_new_tokens=3).values == (0.0,)
    assert preftune.kl(policy, None, ["Say one."], max_new_tokens=3).reference == "base"
    with pytest.raises(preftune.UserError, match="greedy decoding has no KL"):
        preftune.kl(policy, None, ["a"], temperature=0.0)
    with pytest.raises(preftune.UserError, match="two models"):
        preftune.kl(policy, merged, ["a"])


def test_an_evaluation_is_the_runs_own_and_writes_nothing(small: preftune.RunResult) -> None:
    before = sorted(each for each in small.path.rglob("*"))
    again = preftune.evaluate(small)
    assert small.evaluation is not None
    assert [dict(row) for row in again.rows] == [dict(row) for row in small.evaluation.rows]
    judge = {"kind": "reward", "adapter": str(small["reward"].path), "name": "r"}
    found = preftune.evaluate(
        {"mine": small["dpo"].path, "start": (small.path, "sft")}, ["Say one.", TALK], [judge],
        reference="start", max_new_tokens=4,
    )  # fmt: skip
    rows: Any = found.to_pandas().set_index("policy")
    assert set(rows.index) == {"mine", "start"} and rows.loc["mine", "n"] == 2 and rows.loc["start", "kl"] == 0
    assert math.isfinite(rows.loc["mine", "win_rate"]) and len(found.samples) == 4
    assert sorted(each for each in small.path.rglob("*")) == before
    greedy = preftune.evaluate([small["sft"].path, None], ["Say one."], temperature=0.0, max_new_tokens=2)
    assert [row["policy"] for row in greedy.rows] == ["sft", "base"] and greedy.rows[0]["kl"] is None
    wrong: Any = (
        (({"a": small["dpo"].path},), {}, "prompts: are missing"),
        ((small.path,), {"policies": ["dppo"]}, "policies=: no policy 'dppo'"),
        ((small.path,), {"reference": "x"}, "reference=: no policy 'x'"),
        (([small["dpo"].path, small["dpo"].path], ["a"]), {}, "two policies are called 'dpo'"),
        ((small["dpo"].path,), {}, "give a run's folder, or policies by name"),
    )
    for arguments, options, said in wrong:
        with pytest.raises(preftune.UserError, match=said):
            preftune.evaluate(*arguments, **options)
