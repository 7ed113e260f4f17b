"""Our fused head against TRL's own, on tiny random models."""

import copy
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from preftune.models.lm_head import use_compact_head

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
SIZES: dict[str, Any] = {
    "vocab_size": 83,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


def gemma():
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0))


def pair_of_heads(make):
    trl = make().eval().requires_grad_(False)
    ours = copy.deepcopy(trl)
    for model in (trl, ours):
        model.get_input_embeddings().requires_grad_(True)
        if model.config.tie_word_embeddings:
            # frozen head beside trained embeddings: untie them
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        add_fused_lm_head(model, outputs=OUTPUTS)
    use_compact_head(ours, mean_logits=True)
    return trl, ours


def batch():
    ids = torch.randint(1, 83, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("make", [llama, gemma])
def test_values_and_gradients_are_those_of_trl(make):
    trl, ours = pair_of_heads(make)
    inputs = batch()
    theirs, mine = trl(**inputs, fused_lm_head=True), ours(**inputs, fused_lm_head=True)
    for name in ("loss", *OUTPUTS, "label_mask"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-6, check_dtype=name == "is_top1")
    upstream = torch.randn_like(theirs.log_probs)
    for model, output in ((trl, theirs), (ours, mine)):
        (output.log_probs * upstream).sum().backward()
        assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    torch.testing.assert_close(
        ours.get_input_embeddings().weight.grad, trl.get_input_embeddings().weight.grad, rtol=1e-5, atol=1e-6
    )


def test_without_the_fused_head_the_forward_is_the_models_own():
    _, ours = pair_of_heads(llama)
    inputs = batch()
    output = ours(**inputs)
    assert output.logits.shape == (3, 11, 83)
    fused = ours(**inputs, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, output.loss, rtol=1e-6, atol=1e-6)


def test_a_batch_without_labels_gives_a_differentiable_zero():
    _, ours = pair_of_heads(llama)
    inputs = batch() | {"labels": torch.full((3, 11), -100)}
    output = ours(**inputs, fused_lm_head=True)
    output.loss.backward()
    assert output.loss.item() == 0
    embedding = ours.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    assert embedding.weight.grad is not None and embedding.weight.grad.abs().sum() == 0


def test_patching_twice_changes_nothing():
    _, ours = pair_of_heads(llama)
    before = ours.forward
    use_compact_head(ours)
    assert ours.forward is before or ours.forward == before
