"""The same prompts and the same random streams for every policy."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from preftune.eval.samples import EncodedPrompt, generate_samples, read_prompts
from preftune.models.adapters import AdapterSet
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.tokens import load_tokenizer

from .conftest import shake


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_base("random:llama"))


@pytest.fixture
def adapters() -> AdapterSet:
    base = resolve_base("random:llama")
    made = AdapterSet.create(load_model(base), base, LoraSpec(r=2, alpha=4), parent=None)
    shake(made, "default", seed=1)
    return made


def draw(adapters, tokenizer, role, **changes):
    prompts = [EncodedPrompt([{"role": "user", "content": "x" * n}], [5 + n] * n, {"n": n}) for n in (3, 1, 7)]
    settings = {"max_new_tokens": 6, "temperature": 0.8, "seed": 0} | changes
    return generate_samples(adapters, role, str(role), prompts, tokenizer, **settings)


@pytest.mark.checklist("E5")
def test_e05_two_policies_that_agree_say_the_same(adapters, tokenizer):
    adapters.copy("twin")
    ours, theirs = draw(adapters, tokenizer, "default"), draw(adapters, tokenizer, "twin", batch_size=2)
    assert [sample.tokens for sample in ours] == [sample.tokens for sample in theirs]
    assert [sample.prompt for sample in ours] == [sample.prompt for sample in theirs]
    assert [sample.prompt_index for sample in ours] == [0, 1, 2]


@pytest.mark.checklist("E5")
def test_e05_another_policy_or_seed_says_something_else(adapters, tokenizer):
    ours = [sample.tokens for sample in draw(adapters, tokenizer, "default")]
    assert ours != [sample.tokens for sample in draw(adapters, tokenizer, None)]
    assert ours != [sample.tokens for sample in draw(adapters, tokenizer, "default", seed=1)]


@pytest.mark.checklist("E5")
def test_e05_a_part_of_the_prompts_is_answered_as_among_all_of_them(adapters, tokenizer):
    whole = draw(adapters, tokenizer, "default")
    prompts = [sample.prompt for sample in whole]
    settings = {"max_new_tokens": 6, "temperature": 0.8, "seed": 0}
    parts = [
        generate_samples(adapters, "default", "default", prompts[start:end], tokenizer, first=start, **settings)
        for start, end in ((0, 1), (1, 3), (3, 3))
    ]
    assert [sample for part in parts for sample in part] == whole


def test_a_sample_knows_its_text_and_whether_it_ended(adapters, tokenizer):
    for sample in draw(adapters, tokenizer, "default", max_new_tokens=20):
        assert sample.finished == (sample.tokens[-1] == tokenizer.eos_token_id)
        assert sample.completion == tokenizer.decode(sample.tokens, skip_special_tokens=True)


def test_prompts_from_encoded_rows():
    message = {"role": "user", "content": "hi"}
    rows = [{"prompt_ids": [1, 2], "prompt": [message], "columns": '{"topic": "x"}'}]
    assert read_prompts(rows) == [EncodedPrompt([message], [1, 2], {"topic": "x"})]


def test_beams_are_transformers_own(adapters, tokenizer, tmp_path):
    adapters.save("default", tmp_path)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    done = []
    ours = draw(adapters, tokenizer, "default", beams=4, batch_size=8, max_new_tokens=12, on_batch=done.append)
    for sample in ours:
        ids = torch.tensor([sample.prompt.ids])
        found = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_beams=4,
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[0, ids.size(1) :].tolist()
        end = found.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in found else len(found)
        assert sample.tokens == found[:end]
        assert sample.finished == (tokenizer.eos_token_id in found)
    # two prompts at a time, so that no more rows are decoded at once than without beams
    assert done == [2, 3]
    assert [each.tokens for each in ours] != [
        each.tokens for each in draw(adapters, tokenizer, "default", temperature=0)
    ]
