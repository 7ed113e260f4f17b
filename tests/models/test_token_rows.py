"""Rows of single tokens that train, and bases that are given tokens: what plain PEFT makes of them, at every role."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.data.encode import encode_demos
from preftune.data.rows import Row
from preftune.data.spec import DataSpec, SourceSpec
from preftune.errors import UserError
from preftune.eval.kl import sequence_kls
from preftune.files import ADAPTER_CONFIG
from preftune.models.adapters import AdapterSet
from preftune.models.added_tokens import AddedTokens, spec_with
from preftune.models.base import Base
from preftune.models.divergence import divergences
from preftune.models.generate import merged, sample
from preftune.models.lineage import adapter_sha256, check_base, load_adapter_base
from preftune.models.loading import load_model, resolve_base
from preftune.models.logprobs import LmHead
from preftune.models.lora import LoraSpec
from preftune.models.merging import merge_adapter
from preftune.models.outline import outline
from preftune.models.reward_model import create_reward_model, load_reward_model, save_reward_model
from preftune.models.tokens import load_tokenizer, prepare_model, vocabulary_size

from .conftest import IDS, logits

NEW = ("<|think|>", "<|/think|>")


@pytest.fixture(scope="module")
def untied(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The tiny base with a head of its own, which has a bias."""
    folder = tmp_path_factory.mktemp("untied")
    model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() * 1.5)
    model._tied_weights_keys, model.all_tied_weights_keys = {}, {}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base.path).save_pretrained(folder)
    return resolve_base(str(folder))


@pytest.fixture(params=["tied", "untied"])
def either(request: pytest.FixtureRequest, base: Base, untied: Base) -> Base:
    return base if request.param == "tied" else untied


def grown(base: Base) -> Base:
    return resolve_base(spec_with(base.spec, NEW, 3))


def trained(base: Base, parent: Path | None = None, **lora: Any) -> AdapterSet:
    """An adapter after a few steps on rows that hold all of its tokens."""
    adapters = AdapterSet.create(load_model(base), base, LoraSpec(**{"r": 4, "alpha": 8, **lora}), parent)
    optimizer = torch.optim.SGD(adapters.parameters("default"), lr=0.03)
    for _ in range(3):
        adapters.model(input_ids=ids_of(base), labels=ids_of(base)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapters


def ids_of(base: Base) -> torch.Tensor:
    return torch.cat([IDS, torch.tensor([base.added or (5, 6)] * 2)], dim=1)


@torch.no_grad()
def spoken(adapters: AdapterSet, role: str | None, ids: torch.Tensor) -> torch.Tensor:
    with adapters.using(role):
        return adapters.model(input_ids=ids).logits.log_softmax(-1)


@torch.no_grad()
def in_auto_peft(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return model.eval()(input_ids=ids).logits.log_softmax(-1)


@pytest.mark.checklist("L7")
def test_l07_every_role_speaks_with_rows_of_its_own(either: Base, tmp_path: Path):
    adapters, ids = trained(either, trainable_token_indices=[8, 30, 263]), ids_of(either)
    before, bare = adapters.digest(None), spoken(adapters, None, ids)
    wanted = spoken(adapters, "default", ids)
    adapters.save("default", tmp_path)
    adapters.load("reward", tmp_path)
    adapters.copy("ref")
    adapters.copy("value", trainable=True)
    with torch.no_grad():
        for name, each in adapters._state("value").items():
            each.mul_(2) if "trainable_tokens" in name else None
    assert (spoken(adapters, "value", ids) - wanted).abs().max() > 0.1
    for role in ("default", "ref", "reward"):
        torch.testing.assert_close(spoken(adapters, role, ids), wanted, rtol=0, atol=0)
    torch.testing.assert_close(spoken(adapters, None, ids), bare, rtol=0, atol=0)
    assert adapters.digest(None) == before
    for role in ("default", "value", None):
        hidden = adapters.hidden(role, ids, torch.ones_like(ids))
        torch.testing.assert_close(
            adapters.head_under(role).logits(hidden[0]).log_softmax(-1), spoken(adapters, role, ids)[0]
        )
    adapters.remove("value")
    torch.testing.assert_close(spoken(adapters, "default", ids), wanted, rtol=0, atol=0)


@pytest.mark.checklist("L7")
@pytest.mark.parametrize("asked", [[8, 30, 263], {"embed_tokens": [8, 30], "lm_head": [8, 30]}])
def test_l07_gradients_of_rows_are_plain_pefts(either: Base, asked: Any):
    adapters = AdapterSet.create(load_model(either), either, LoraSpec(r=4, alpha=8, trainable_token_indices=asked))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], trainable_token_indices=asked)
    plain: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(either.path, dtype=torch.float32), config)
    plain(input_ids=IDS, labels=IDS).loss.backward()
    theirs = {name: each.grad for name, each in plain.named_parameters() if "trainable_tokens" in name}
    with adapters.using("default"):
        hidden = adapters.backbone(input_ids=IDS).last_hidden_state[:, :-1].flatten(0, 1)
        logps, _ = adapters.head.token_logprobs(hidden, IDS[:, 1:].flatten(), chunk=5)
        (-logps.mean()).backward()
    ours = {name: each.grad for name, each in adapters.model.named_parameters() if "trainable_tokens" in name}
    assert ours.keys() == theirs.keys() and len(theirs) == (1 if "lm_head" not in str(theirs.keys()) else 2)
    for name, each in theirs.items():
        assert each is not None and each.abs().max() > 1e-4, name
        torch.testing.assert_close(ours[name], each, rtol=0, atol=1e-5)


@pytest.mark.checklist("L7")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_l07_gradients_of_a_head_with_everything(temperature: float):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 6), torch.randn(11, 6), torch.randn(11)
    index, targets = torch.tensor([2, 9]), torch.tensor([2, 0, 9, 9, 5, 2, 1])
    found = []
    for plain in (True, False):
        rows, x = weight[index].clone().requires_grad_(), hidden.clone().requires_grad_()
        whole = weight.index_copy(0, index, rows)
        head = LmHead(whole, bias, softcap=3.0, scale=0.5)
        if not plain:
            from preftune.models.token_rows import HeadRows

            head = dataclasses.replace(head, rows=HeadRows(index, rows))
        logps, _ = head.token_logprobs(x, targets, temperature, chunk=3)
        (logps * torch.arange(7)).sum().backward()
        found.append((logps.detach(), rows.grad, x.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.checklist("L7")
def test_l07_a_student_s_head_learns_in_distillation(untied: Base):
    torch.manual_seed(0)
    weight, index = torch.randn(11, 6), torch.tensor([2, 9])
    rows = weight[index].clone().requires_grad_()
    student = LmHead(weight.index_copy(0, index, rows))
    states, targets = torch.randn(7, 6, requires_grad=True), torch.arange(7)
    teacher = LmHead(torch.randn(11, 6))
    found = divergences(states, states.detach(), targets, student=student, teacher=teacher, beta=0.5, chunk=3)
    found.divergence_N.sum().backward()
    assert rows.grad is not None and states.grad is not None and rows.grad.abs().max() > 1e-3
    with torch.no_grad():
        frozen = divergences(
            states, states, targets, student=LmHead(student.weight.detach()), teacher=teacher, beta=0.5
        )
    for ours, theirs in zip(found, frozen, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)


@pytest.mark.checklist("L7")
def test_l07_rollouts_and_kl_go_by_each_role_s_rows(either: Base):
    adapters = trained(grown(either))
    with torch.no_grad():  # so far from the base's that the head says much else of these tokens
        for name, each in adapters._state("default").items():
            each.add_(0.5) if "trainable_tokens" in name else None
    adapters.copy("ref")
    before = adapters.digest(None)
    prompt = [*IDS[0].tolist(), *adapters.base.added]
    for merge in (True, False):
        drawn = sample(
            adapters, "default", [prompt], max_new_tokens=8, eos_token_id=1, pad_token_id=0, seed=0, merge=merge
        )
        whole = torch.tensor([prompt + drawn.tokens[0]])
        own = spoken(adapters, "default", whole)[0, len(prompt) - 1 : -1]
        own = own.gather(1, torch.tensor(drawn.tokens[0])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(drawn.logprobs[0]), own, rtol=0, atol=1e-4)
    asked: Any = ([prompt], drawn.tokens)
    (none,) = sequence_kls(adapters, "default", "ref", *asked, temperature=1.0, pad_token_id=0)
    (kl,) = sequence_kls(adapters, "default", None, *asked, temperature=1.0, pad_token_id=0)
    ours, theirs = (spoken(adapters, role, whole)[0, len(prompt) - 1 : -1] for role in ("default", None))
    assert none == 0 and kl == pytest.approx(float((ours.exp() * (ours - theirs)).sum()), rel=1e-3) and kl > 0.01
    with torch.no_grad(), merged(adapters, "default"):
        found = adapters.causal(input_ids=whole).logits.log_softmax(-1)
    torch.testing.assert_close(found, spoken(adapters, "default", whole), rtol=0, atol=1e-4)
    assert adapters.digest(None) == before


@pytest.mark.checklist("L8")
def test_l08_a_base_with_tokens_is_transformers_resize_under_the_seed(either: Base):
    base = grown(either)
    plain: Any = AutoModelForCausalLM.from_pretrained(either.path, dtype=torch.float32)
    size = plain.get_input_embeddings().weight.shape[0]
    torch.manual_seed(3)
    plain.resize_token_embeddings(size + 2)
    made: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    for name, each in plain.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], each, rtol=0, atol=1e-6)
    assert base.added == (size, size + 1) and vocabulary_size(base) == size + 2
    tokenizer = load_tokenizer(base)
    assert tokenizer("a<|think|>b", add_special_tokens=False)["input_ids"].count(base.added[0]) == 1
    said = "<|think|>So it is.<|/think|>Yes."
    row = Row([{"role": "user", "content": "Is it?"}], [{"role": "assistant", "content": said}])
    encoded = encode_demos([row], tokenizer, DataSpec((SourceSpec("none"),)))[0][0]
    assert {*base.added} <= {*encoded["labels"]}
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == plain.config.tie_word_embeddings


@pytest.mark.checklist("L8")
def test_l08_which_tokens_a_base_was_given_is_part_of_what_it_is(base: Base):
    one = grown(base)
    others = [spec_with(base.spec, NEW[:1], 3), spec_with(base.spec, NEW[::-1], 3), spec_with(base.spec, NEW, 4)]
    hashes = {each.sha256 for each in (base, one, *map(resolve_base, others))}
    assert len(hashes) == 5 and resolve_base(one.spec) == one
    assert AddedTokens.read(one.spec) == AddedTokens(NEW, 3, base.spec)
    assert spec_with(base.spec, (), 3) == base.spec and AddedTokens.read(base.spec) is None
    planned = outline(one.spec)
    assert planned.added == one.added and planned.config.vocab_size == vocabulary_size(one)


@pytest.mark.checklist("L8")
def test_l08_a_stage_on_it_trains_the_new_rows_and_loads_in_plain_peft(either: Base, tmp_path: Path):
    base = grown(either)
    adapters, ids = trained(base), ids_of(base)
    tables = [each for each in adapters._state("default") if "trainable_tokens" in each]
    assert len(tables) == (1 if either.spec == "random:llama" else 2)
    for name in tables:
        row = adapters._state("default")[name]
        assert row.dtype == torch.float32 and row.shape[0] == 2
    adapters.save("default", tmp_path)
    load_tokenizer(base).save_pretrained(tmp_path)
    wanted = spoken(adapters, "default", ids)
    torch.testing.assert_close(in_auto_peft(tmp_path, ids), wanted, rtol=0, atol=1e-4)
    # on the base as it was: PEFT lets it grow by the tokenizer, and the adapter brings the rows
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(either.path)}))
    torch.testing.assert_close(in_auto_peft(tmp_path, ids), wanted, rtol=0, atol=1e-4)


@pytest.mark.checklist("L8")
def test_l08_a_hub_model_stays_the_adapter_s_base(base: Base):
    of = dataclasses.replace(base, spec="owner/name", revision="abc")
    made = dataclasses.replace(grown(base), of=of, revision="abc")
    assert made.model_id == "owner/name" and grown(base).model_id == str(grown(base).path)


@pytest.mark.checklist("L8")
def test_l08_a_child_starts_with_its_parent_s_rows_at_either_head(either: Base, tmp_path: Path):
    base = grown(either)
    parent, ids = trained(base), ids_of(base)
    parent.save("default", tmp_path / "sft")
    child = AdapterSet.create(load_model(base), base, LoraSpec(r=8, alpha=16), tmp_path / "sft")
    torch.testing.assert_close(spoken(child, "default", ids), spoken(parent, "default", ids), rtol=0, atol=1e-6)
    more = LoraSpec(r=4, alpha=8, trainable_token_indices=[5])
    wider = AdapterSet.create(load_model(base), base, more, tmp_path / "sft")
    torch.testing.assert_close(spoken(wider, "default", ids), spoken(parent, "default", ids), rtol=0, atol=1e-6)
    tokenizer = load_tokenizer(base)
    reward: Any = create_reward_model(base, tokenizer, LoraSpec(r=4, alpha=8), tmp_path / "sft")
    hidden = parent.hidden("default", ids, torch.ones_like(ids))
    with torch.no_grad():
        found = reward.get_base_model().model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, hidden, rtol=0, atol=1e-5)
    optimizer = torch.optim.SGD([each for each in reward.parameters() if each.requires_grad], lr=0.03)
    reward(input_ids=ids).logits.sum().backward()
    optimizer.step()
    save_reward_model(reward, base, tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    scores = load_reward_model(tmp_path / "reward", base, tokenizer)(input_ids=ids).logits
    plain: Any = AutoPeftModelForSequenceClassification.from_pretrained(
        str(tmp_path / "reward"), num_labels=1, dtype=torch.float32
    )
    prepare_model(plain.get_base_model(), tokenizer)
    torch.testing.assert_close(plain.eval()(input_ids=ids).logits, scores, rtol=0, atol=1e-4)
    parent.load("reward", tmp_path / "reward")
    states = parent.hidden("reward", ids, torch.ones_like(ids))
    torch.testing.assert_close(parent.heads["reward"](states)[:, -1:], scores, rtol=0, atol=1e-4)


@pytest.mark.checklist("L8")
def test_l08_an_adapter_of_other_tokens_or_without_its_rows_is_refused(base: Base, tmp_path: Path):
    one = grown(base)
    trained(one).save("default", tmp_path)
    with pytest.raises(UserError, match=r"holds the row 265 of the embedding, and this base has 264"):
        AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8)).load("ref", tmp_path)
    with pytest.raises(UserError, match=r"leaves out 264, 265 of model\.embed_tokens, whose rows"):
        AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8), tmp_path)


@pytest.mark.checklist("L8")
@pytest.mark.parametrize("task", ["policy", "reward"])
def test_l08_merged_it_is_one_model_with_its_tokens(either: Base, tmp_path: Path, task: str):
    base = grown(either)
    tokenizer, ids, adapters = load_tokenizer(base), ids_of(base), None
    if task == "policy":
        adapters = trained(base)
        adapters.save("default", tmp_path / "a")
    else:
        reward: Any = create_reward_model(base, tokenizer, LoraSpec(r=4, alpha=8))
        reward(input_ids=ids).logits.sum().backward()
        torch.optim.SGD([each for each in reward.parameters() if each.requires_grad], lr=0.03).step()
        save_reward_model(reward, base, tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    done = merge_adapter(tmp_path / "a", tmp_path / "out", "float32")
    assert done.reward == (task == "reward") and load_adapter_base(tmp_path / "a").path == base.path
    if adapters is not None:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        found = model.eval()(input_ids=ids).logits.log_softmax(-1)
        torch.testing.assert_close(found, spoken(adapters, "default", ids), rtol=0, atol=1e-4)
        assert model.config.tie_word_embeddings == (either.spec == "random:llama")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == vocabulary_size(base)


@pytest.mark.checklist("L8")
@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["<|im_end|>"], r"is a token of the base already.*trainable_token_indices: \[\d+\]"),
        (["a"], "is a token of the base already"),
        (["<x>", "<x>"], "stands there twice"),
        ([" "], "is no token"),
        (["<x> "], "is no token"),
    ],
)
def test_l08_tokens_that_add_nothing_are_refused(base: Base, tokens: list[str], said: str):
    with pytest.raises(UserError, match=said) as raised:
        resolve_base(spec_with(base.spec, tokens, 0))
    assert raised.value.where == "model.add_tokens"


@pytest.mark.checklist("L7")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([264], "264, and the embedding has the rows 0 to 263"),
        ([5, 5], "5 stands there twice"),
        ([], "no id is given"),
        ({"norm": [5]}, "'norm' is neither the embedding nor the output head"),
        ({"embed_tokens": [5], "lm_head": [6]}, "other ids of the head than of the embedding"),
        ({"embed_tokens": [-1]}, "-1 is no token's id"),
    ],
)
def test_l07_rows_that_are_not_there_are_refused(base: Base, asked: Any, said: str):
    with pytest.raises(UserError, match=said):
        AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8, trainable_token_indices=asked))


@pytest.mark.checklist("L7")
def test_l07_a_saved_adapter_of_plain_peft_is_taken_with_its_rows(either: Base, tmp_path: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(either.path, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], trainable_token_indices=[9, 8], task_type="CAUSAL_LM"
    )
    plain: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, each in plain.named_parameters():
            each.normal_(std=0.1) if "default" in name else None
        wanted = plain.eval()(input_ids=IDS).logits
    plain.save_pretrained(tmp_path)
    spec = LoraSpec(r=4, alpha=8, target_modules=["q_proj"], trainable_token_indices=[7, 8, 9])
    adapters = AdapterSet.create(load_model(either), either, spec, tmp_path)
    adapters.load("ref", tmp_path)
    for role in ("default", "ref"):
        torch.testing.assert_close(logits(adapters, role), wanted, rtol=0, atol=1e-5)
    assert LoraSpec.of(tmp_path).trainable_token_indices == [9, 8]
    with pytest.raises(UserError, match=r"leaves out 8 of model\.embed_tokens"):
        AdapterSet.create(load_model(either), either, dataclasses.replace(spec, trainable_token_indices=[9]), tmp_path)


def test_an_adapter_without_rows_is_answered_with_the_base_s(base: Base, tmp_path: Path):
    plain = AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8))
    plain.save("default", tmp_path)
    adapters = trained(base, trainable_token_indices=[8])
    adapters.load("ref", tmp_path)
    torch.testing.assert_close(logits(adapters, "ref"), logits(plain, "default"), rtol=0, atol=1e-6)
    assert adapter_sha256(tmp_path) == adapters.digest("ref")
    check_base(tmp_path, base)
    assert isinstance(adapters.model, PeftModel)
