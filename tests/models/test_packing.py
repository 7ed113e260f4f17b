"""The packed forward gives the padded forward's numbers, on every architecture that takes it."""

import functools
from typing import Any

import pytest
import torch
from transformers import AutoModel, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from preftune.models import seams
from preftune.models.adapters import AdapterSet
from preftune.models.loading import load_model, resolve_base
from preftune.models.lora import LoraSpec
from preftune.models.packing import ATTENTION, forward_tree, packs_now, tree_attention, use_packed_forward
from preftune.models.prefix_tree import build_tree, lay_out, rounded

SMALL: dict[str, Any] = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**SMALL, sliding_window=5, original_max_position_embeddings=4096),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, attn_pdrop=0),
}


def batch(seed: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that share prompts, one row that is a prefix of another, one row twice."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 50, (n,), generator=g).tolist()  # noqa: E731
    system = draw(3)
    rows = []
    for _ in range(3):
        prompt = system + draw(4)
        rows += [prompt + draw(6), prompt + draw(3)]
    rows += [rows[0][:8], rows[1], draw(5)]
    width = max(map(len, rows))
    pad = [[0] * (width - len(r)) for r in rows]
    ids = [p + r if left else r + p for p, r in zip(pad, rows, strict=True)]
    ones = [[1] * len(r) for r in rows]
    mask = [p + o if left else o + p for p, o in zip(pad, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def test_a_rounded_tree_has_tokens_more_that_nobody_meets():
    tree = rounded(build_tree(torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.ones(2, 3)), 6)
    assert tree.ids_N.tolist() == [5, 6, 7, 8, 5, 5]
    assert tree.end_N.tolist() == [4, 4, 3, 4, 5, 6]
    assert tree.blocks == ((0, 4), (4, 6))
    assert int(tree.index_BL.max()) == 3
    assert rounded(tree, 3) is tree


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("left", [False, True])
def test_hidden_states_and_gradients_equal_the_padded_forward(name, left):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name], attn_implementation="sdpa").eval()
    ids, mask = batch(1, left)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    weights = torch.randn(*ids.shape, 32) * mask[..., None]

    def run():
        model.zero_grad()
        hidden = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        (hidden * weights).sum().backward()
        return hidden.detach() * mask[..., None], {n: p.grad.clone() for n, p in model.named_parameters()}

    plain, plain_grads = run()
    assert use_packed_forward(model)
    packed, packed_grads = run()
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    for n, grad in plain_grads.items():
        error = (packed_grads[n] - grad).abs().max() / grad.abs().max()
        assert error < 1e-5, (n, float(error))


@pytest.mark.checklist("D6")
def test_d06_no_sequence_sees_another():
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS["llama"], attn_implementation="sdpa").eval()
    use_packed_forward(model)
    ids, mask = batch(2)
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        changed = ids.clone()
        changed[0, 7:13] = 9  # a reply: every other row keeps its states, its own prompt too
        after = model(input_ids=changed, attention_mask=mask, use_cache=False).last_hidden_state
    # a packed forward that fails its trial would be padded, where nothing can see anything
    assert model.config._attn_implementation == ATTENTION
    torch.testing.assert_close(after[1:], before[1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(after[0, :7], before[0, :7], atol=1e-6, rtol=0)
    assert (after[0, 7:13] - before[0, 7:13]).abs().max() > 1e-2


def test_the_tree_holds_each_shared_prefix_once():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    tree = build_tree(ids, mask)
    assert tree.ids_N.tolist() == [5, 6, 7, 8, 9]
    assert tree.depth_N.tolist() == [0, 1, 2, 3, 2]
    assert tree.end_N.tolist() == [5, 5, 4, 4, 5]
    assert tree.index_BL.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0], [0, 1, 2, 3]]
    assert tree.blocks == ((0, 5),)


def test_a_full_block_is_closed_and_the_next_repeats_its_prefix():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 9]])
    tree = build_tree(ids, torch.ones_like(ids), block_tokens=5)
    assert tree.blocks == ((0, 4), (4, 8))
    assert tree.ids_N.tolist() == [5, 6, 7, 8, 5, 6, 9, 9]


@pytest.mark.parametrize("block_tokens", [1, 12, 1000])
def test_the_size_of_blocks_changes_nothing(monkeypatch, block_tokens):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS["qwen3"], attn_implementation="sdpa").eval()
    ids, mask = batch(3)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state * mask[..., None]
        monkeypatch.setattr("preftune.models.prefix_tree.lay_out", lambda i, m, _: lay_out(i, m, block_tokens))
        use_packed_forward(model)
        packed = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_meets_the_same_tree():
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS["llama"], attn_implementation="sdpa")
    use_packed_forward(model)
    ids, mask = batch(4)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            model.train()
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.square().sum().backward()
        grads.append(model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])


def test_generation_with_a_cache_is_untouched():
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS["llama"], attn_implementation="sdpa").eval()
    ids, mask = batch(5)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, use_cache=True)
        use_packed_forward(model)
        packed = model(input_ids=ids, attention_mask=mask, use_cache=True)
    assert packed.past_key_values is not None
    assert torch.equal(packed.last_hidden_state, plain.last_hidden_state)


def test_a_backbone_that_cannot_take_it_falls_back(caplog):
    from transformers import MambaConfig

    model = AutoModel.from_config(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    ids, mask = batch(3)
    with torch.no_grad():
        alone = [
            model(input_ids=row[kept][None]).last_hidden_state[0] for row, kept in zip(ids, mask.bool(), strict=True)
        ]
        with caplog.at_level("INFO"):
            assert not use_packed_forward(model)
        # positions too, which it does not know: every stage gives them
        found = model(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(-1) - 1).last_hidden_state
    assert "padded rows" in caplog.text and not packs_now(model, CPU)
    torch.testing.assert_close(found[mask.bool()], torch.cat(alone))


def test_without_a_tree_the_attention_is_plain_sdpa():
    q = torch.randn(1, 4, 6, 8)
    module: Any = torch.nn.Module()  # the attribute that attention modules have is no tensor
    module.is_causal = True
    out, _ = tree_attention(module, q, q, q, None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_rows_that_share_nothing_make_blocks_of_their_own() -> None:
    rows = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 9], [1, 2, 3, 4], [2, 2, 2, 2]])
    together, apart = (build_tree(rows, torch.ones_like(rows), 64, apart_tokens) for apart_tokens in (None, 4))
    assert together.blocks == ((0, 14),)
    # [1 2 3 4], [2 2 2 2], and the two that share 5 6
    assert apart.blocks == ((0, 4), (4, 8), (8, 14))
    assert apart.ids_N.tolist() == together.ids_N.tolist()
    assert build_tree(rows, torch.ones_like(rows), 64, 5).blocks == ((0, 8), (8, 14))


def test_blocks_that_look_the_same_make_a_run() -> None:
    rows = torch.tensor([[1, 2, 3, 4], [2, 2, 2, 2], [3, 1, 1, 1], [5, 6, 7, 8], [5, 6, 9, 9]])
    mask = torch.ones_like(rows)
    # three rows by themselves, and two that share 5 6: six tokens
    assert build_tree(rows, mask, 64, 4).runs() == ((0, 12, 4), (12, 18, 6))
    # as long as the block before it, and another tree: [3 1 1 1] and [3 1 1 9], [5 6 7 8 9]
    rows = torch.tensor([[3, 1, 1, 1, 0], [3, 1, 1, 9, 0], [5, 6, 7, 8, 9]])
    mask = (rows > 0).long()
    assert build_tree(rows, mask, 64, 4).runs() == ((0, 5, 5), (5, 10, 5))


# --- the probe -------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def small(name: str = "llama", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name], attn_implementation="sdpa")
    for key, parameter in model.named_parameters():
        if "norm" not in key and "bias" not in key:
            torch.nn.init.normal_(parameter, std=0.3)  # wide enough that positions matter
    return model.to(dtype)


def drops_keyword_arguments(model) -> None:
    """Its layers hand nothing on that they do not know, as decoders with a fixed signature do."""
    for layer in model.layers:
        layer.self_attn.forward = functools.partial(_without_kwargs, layer.self_attn.forward)


def _without_kwargs(attention, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **_):
    return attention(hidden_states, position_embeddings, attention_mask, past_key_values)


def makes_its_own_mask(model) -> None:
    """Its attention is causal and its own: it asks neither for a mask nor for transformers' attention function."""
    for layer in model.layers:
        layer.self_attn.forward = functools.partial(_own_attention, layer.self_attn)


def _own_attention(self, hidden_states, position_embeddings, **kwargs):
    shape = (*hidden_states.shape[:2], -1, self.head_dim)
    q, k, v = (each(hidden_states).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


def drops_its_window(model) -> None:
    for layer in model.layers:
        layer.self_attn.sliding_window = None


def asks_and_ignores(model) -> None:
    """Its attention function gets the tree, and positions of its own."""
    plain = model.rotary_emb.forward
    model.rotary_emb.forward = lambda x, position_ids: plain(x, torch.arange(x.shape[1])[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        ("llama", drops_keyword_arguments, "keyword arguments that reach LlamaAttention"),
        ("llama", makes_its_own_mask, "hand-over"),
        ("llama", asks_and_ignores, "differ by"),
        ("gemma3", drops_its_window, "sliding window of 1 layer"),
    ],
)
def test_a_decoder_that_cannot_be_packed_stays_padded_and_says_so(name, spoil, why, dtype, caplog):
    model = small(name, dtype).eval()
    spoil(model)
    ids, mask = batch(7)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        assert use_packed_forward(model)
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(found, plain)
    assert not packs_now(model, CPU)
    assert model.config._attn_implementation == "sdpa"
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert type(model).__name__ in record.getMessage() and why in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_that_can_be_packed_is(name, dtype, caplog):
    model = small(name, dtype)
    use_packed_forward(model)
    assert packs_now(model, CPU)
    assert not caplog.records


def test_the_probe_leaves_nothing_behind():
    """Modes, random numbers, and the gradients of the first step under autocast, which keeps what it has cast."""
    base = resolve_base("random:llama")

    def first_step(probed: bool):
        adapters = AdapterSet.create(load_model(base), base, LoraSpec(r=4, alpha=8, dropout=0.5))
        adapters.model.train()
        modes = [module.training for module in adapters.model.modules()]
        if probed:
            ids, mask = torch.tensor([[8, 30, 60]]), torch.ones(1, 3)
        else:
            assert packs_now(adapters.backbone, CPU)
            with torch.autocast("cpu", torch.bfloat16):
                assert packs_now(adapters.backbone, CPU)
            ids, mask = torch.tensor([[8, 30, 60]]), torch.ones(1, 3)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            adapters.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum().backward()
        assert modes == [module.training for module in adapters.model.modules()]
        return torch.rand(3), [p.grad for p in adapters.parameters("default")]

    (within, grads), (before, expected) = first_step(True), first_step(False)
    assert torch.equal(within, before)
    assert any(grad is not None and bool(grad.any()) for grad in grads)
    for grad, other in zip(grads, expected, strict=True):
        assert grad is not None and other is not None and torch.equal(grad, other)


def test_a_base_that_is_moved_to_another_precision_is_tried_anew():
    model = small()
    use_packed_forward(model)
    assert packs_now(model, CPU)
    drops_keyword_arguments(model)
    assert packs_now(model, CPU)
    assert not packs_now(model.to(torch.bfloat16), CPU)


def test_no_packed_row_is_attended_to_without_its_tree():
    q = torch.randn(1, 4, 6, 8)
    with pytest.raises(seams.SeamMoved, match=r"tested with transformers==.*packed rows would see one another"):
        tree_attention(torch.nn.Module(), q, q, q, torch.ones(1, 1, 1, 1))
    model = small().eval()
    use_packed_forward(model)
    assert packs_now(model, CPU)
    makes_its_own_mask(model)  # after the probe: what nobody expects
    with pytest.raises(seams.SeamMoved, match="hand-over"):
        forward_tree(model, build_tree(torch.tensor([[5, 6, 7]]), torch.ones(1, 3)))


def test_packing_twice_changes_nothing():
    model = small()
    assert use_packed_forward(model)
    forward = model.forward
    assert use_packed_forward(model)
    assert model.forward is forward
