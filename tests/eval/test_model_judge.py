"""A judge that is a sequence-classification model of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from preftune.errors import UserError
from preftune.eval.judges.registry import plan_judges
from preftune.eval.samples import EncodedPrompt, Sample
from preftune.models.tiny import byte_tokenizer

TALK = [{"role": "user", "content": "What is it?"}]
TEXTS = ["a dog", "", "a very old and rather large tree", "no"]
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def classifier(folder: Path, *, labels: int = 1, template: str | None = CHAT) -> Path:
    """A random classifier over bytes, whose template is none of ours."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        num_labels=labels,  # pyright: ignore[reportCallIssue]: a property, which the constructor takes all the same
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def replies(*texts: str) -> list[Sample]:
    # ids that mean nothing to the judge: it reads the text
    return [Sample("sft", place, EncodedPrompt(TALK, [1]), text, [4, 2], True) for place, text in enumerate(texts)]


def judge_of(adapters: Any, run_dir: Path | None = None, **fields: Any) -> Any:
    (plan,) = plan_judges([{"kind": "model", **fields}], run_dir)
    return plan.open(adapters, None)  # pyright: ignore[reportArgumentType]: this judge has a tokenizer of its own


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_a_score_is_the_models_plain_forward_on_the_conversation(tmp_path, five_tokens, batch_size):
    folder = classifier(tmp_path / "rm")
    judge = judge_of(five_tokens, model=str(folder), batch_size=batch_size)
    assert judge.name == str(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plain = []
    for text in TEXTS:
        ids = tokenizer(f"user: What is it?\nassistant: {text}\n", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            plain.append(model(**ids).logits[0, 0].item())
    scores = judge.score(replies(*TEXTS))
    assert scores == pytest.approx(plain, abs=1e-5)
    assert max(scores) - min(scores) > 0.01


def test_a_folder_is_looked_up_in_the_run_and_from_here(tmp_path, five_tokens, monkeypatch):
    classifier(tmp_path / "run" / "rm")
    classifier(tmp_path / "here" / "models" / "rm")
    monkeypatch.chdir(tmp_path / "here")
    expected = judge_of(five_tokens, model=str(tmp_path / "run" / "rm")).score(replies("x"))
    for named in ("rm", "models/rm"):
        judge = judge_of(five_tokens, tmp_path / "run", model=named, name="mine")
        assert judge.name == "mine"
        assert judge.score(replies("x")) == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "model: is None, expected a folder or a hub id"),
        ({"model": 3}, "model: is 3"),
        ({"model": "./no/such"}, "no folder './no/such'"),
        ({"model": "/no/such"}, "no folder '/no/such'"),
        ({"model": "no/such/folder"}, "no folder 'no/such/folder'"),
        ({"model": "owner/name", "batch_size": 0}, "batch_size: is 0, expected 1 or more"),
        ({"model": "owner/name", "batch_size": True}, "batch_size: is True"),
        ({"model": "owner/name", "stage": "rm"}, "takes no 'stage'"),
    ],
)
def test_malformed_judges_are_refused(tmp_path, fields, said):
    with pytest.raises(UserError, match=said) as error:
        plan_judges([{"kind": "model", **fields}], tmp_path)
    assert error.value.where.startswith("eval.judges[0]")


def test_a_hub_id_is_not_looked_for_before_it_is_needed(five_tokens):
    (plan,) = plan_judges([{"kind": "model", "model": "nobody/none-such"}], None)
    with pytest.raises(UserError, match=r"eval\.judges\[0\]: 'nobody/none-such' is no local folder and the") as error:
        plan.open(five_tokens, None)  # pyright: ignore[reportArgumentType]: this judge has a tokenizer of its own
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_judge_says_so(tmp_path, five_tokens):
    with pytest.raises(UserError, match=r"eval\.judges\[0\]: the model has 2 outputs, expected 1"):
        judge_of(five_tokens, model=str(classifier(tmp_path / "two", labels=2)))
    judge = judge_of(five_tokens, model=str(classifier(tmp_path / "untold", template=None)))
    with pytest.raises(UserError, match=r"eval\.judges\[0\]: its tokenizer has no chat template"):
        judge.score(replies("x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        judge_of(five_tokens, model=str(tmp_path / "empty"))
