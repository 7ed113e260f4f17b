"""A base's folder that is damaged, or that lacks what its config says: one line each, and never random numbers."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from preftune.errors import UserError
from preftune.models.base import Base
from preftune.models.loading import check_base_complete, load_model, resolve_base
from preftune.models.tokens import load_tokenizer

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


@pytest.fixture
def folder(base: Base, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base.path, tmp_path / "base"))


def edited(folder: Path, **values: Any) -> None:
    """Values of config.json; None takes a key away."""
    raw = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def stored(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The header of the weights, changed without a look at the rest."""
    raw = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    held = json.loads(raw[8 : 8 + length])
    change(held)
    text = json.dumps(held).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def cut(folder: Path, file: str, at: int | float) -> None:
    raw = (folder / file).read_bytes()
    (folder / file).write_bytes(raw[: at if isinstance(at, int) else int(at * len(raw))])


def sharded(folder: Path, weight_map: object) -> None:
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def pipe(folder: Path, file: str) -> None:
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)


def circle(folder: Path, file: str) -> None:
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(file)


NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
FIRST = "model.layers.0.self_attn.q_proj.weight"

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut off": (lambda f: cut(f, WEIGHTS, 0.5), r"damaged, cut off: it has \d+ bytes, \d+ are due"),
    "weights cut within the header": (lambda f: cut(f, WEIGHTS, 100), "damaged, it has 100 bytes and its header"),
    "weights cut within the length": (lambda f: cut(f, WEIGHTS, 5), "damaged"),
    "empty weights": (lambda f: cut(f, WEIGHTS, 0), "damaged, it has 0 bytes"),
    "weights that go on": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"more"),
        "damaged, it has",
    ),
    "a header of garbage": (lambda f: (f / WEIGHTS).write_bytes(b"\x10" + bytes(7) + os.urandom(99)), "cannot be read"),
    "a huge header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "its header would have"),
    "a header that is a list": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"[]"), "cannot be read"),
    "a nested header": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5),
        "cannot be read",
    ),
    "no offsets": (lambda f: header(f, lambda h: h[NORM].pop("data_offsets")), "cannot be read"),
    "a wrong shape": (lambda f: header(f, lambda h: h[NORM].update(shape=[7])), "does not fill bytes"),
    "a wrong width": (lambda f: header(f, lambda h: h[NORM].update(dtype="F64")), "does not fill bytes"),
    "offsets before the file": (lambda f: header(f, lambda h: h[NORM].update(data_offsets=[-4, 508])), "does not fill"),
    "whole numbers": (lambda f: stored(f, lambda t: t.update({NORM: t[NORM].long()})), "stored as I64, no type of"),
    "NaN": (lambda f: stored(f, lambda t: t[FIRST].view(-1)[7:8].fill_(torch.nan)), "NaN or infinite weights"),
    "infinite": (lambda f: stored(f, lambda t: t[NORM][3:4].fill_(-torch.inf)), f"{NORM} of .* holds NaN or infinite"),
    "NaN in 16 bits": (
        lambda f: stored(f, lambda t: t.update({NORM: torch.full((128,), torch.nan).bfloat16()})),
        "NaN or infinite weights",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "a folder for weights": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), f"has no {WEIGHTS}"),
    "an empty config": (lambda f: (f / CONFIG).write_text(""), "config.json of .* cannot be read"),
    "a broken config": (lambda f: cut(f, CONFIG, 0.5), "config.json of .* cannot be read"),
    "a config in no UTF-8": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "config.json of .* cannot be read"),
    "a config that is a list": (lambda f: (f / CONFIG).write_text("[]"), "holds no object"),
    "a nested config": (lambda f: (f / CONFIG).write_text("[" * 10**5), "cannot be read"),
    "no model_type": (lambda f: edited(f, model_type=None), "has no model_type"),
    "a model_type that is a number": (lambda f: edited(f, model_type=3), "has no model_type"),
    "an unknown model_type": (lambda f: edited(f, model_type="llamma"), "says no model"),
    "another model_type": (lambda f: edited(f, model_type="qwen2"), "model_type qwen2 and the architecture Llama"),
    "no number of heads": (lambda f: edited(f, num_attention_heads=None), "does not say num_attention_heads"),
    "text for a width": (lambda f: edited(f, hidden_size="wide"), "config.json|cannot be loaded"),
    "a width below 0": (lambda f: edited(f, hidden_size=-128), "config.json|cannot be loaded|have another shape"),
    "a broken index": (lambda f: (sharded(f, {}), cut(f, INDEX, 0.5)), "index.json of .* cannot be read"),
    "an index without a map": (lambda f: sharded(f, None), "has no weight_map"),
    "an index of numbers": (lambda f: sharded(f, {NORM: 3}), "has no weight_map"),
    "an index that leads outside": (lambda f: sharded(f, {NORM: "../one.safetensors"}), "outside of its folder"),
    "an index that leads anywhere": (lambda f: sharded(f, {NORM: "/etc/passwd"}), "outside of its folder"),
    "a shard that is not there": (lambda f: sharded(f, {NORM: "two.safetensors"}), "lacks two.safetensors"),
    "a shard that is a pipe": (
        lambda f: (sharded(f, {NORM: "two.safetensors"}), pipe(f, "two.safetensors")),
        "two.safetensors of .* is no file",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "a tokenizer cut off": (lambda f: cut(f, "tokenizer.json", 0.5), "the tokenizer of .* cannot be read"),
    "an empty tokenizer": (lambda f: (f / "tokenizer.json").write_text(""), "the tokenizer of .* cannot be read"),
    "a tokenizer that is a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "the tokenizer of .* cannot be"),
    "a broken tokenizer config": (lambda f: cut(f, "tokenizer_config.json", 0.5), "tokenizer_config.json of .* cannot"),
    "a tokenizer config that is a list": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json of .* holds no object",
    ),
    "a broken generation config": (lambda f: cut(f, "generation_config.json", 0.5), "generation_config.json of .* can"),
    **{
        f"{what} for {file}": (lambda f, make=make, file=file: make(f, file), f"{file} of .* is {said}")
        for what, make, said in (("a pipe", pipe, "no file"), ("a circle", circle, "a link that leads nowhere"))
        for file in (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    },
    "more layers than stored": (lambda f: edited(f, num_hidden_layers=6), r"would be random: model\.layers\.4\."),
    "fewer layers than stored": (lambda f: edited(f, num_hidden_layers=3), "have no place in the model"),
    "another width": (lambda f: edited(f, intermediate_size=512), "have another shape"),
    "another kind, and no architecture": (
        lambda f: edited(f, model_type="qwen2", architectures=None),
        "random: .*proj.bias",
    ),
    "no embedding": (lambda f: stored(f, lambda t: t.pop(EMBEDDING)), "would be random: lm_head.weight and 1 more"),
    "a layer less": (lambda f: stored(f, lambda t: t.pop(FIRST)), f"would be random: {FIRST}"),
    "a head that is not tied": (lambda f: edited(f, tie_word_embeddings=False), "would be random: lm_head.weight"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_one_line_before_anything_is_computed(folder: Path, damage: str) -> None:
    harm, said = DAMAGES[damage]
    harm(folder)

    def use() -> None:
        opened = resolve_base(str(folder))
        load_tokenizer(opened)
        check_base_complete(opened)

    with pytest.raises(UserError, match=said) as raised:
        use()
    assert raised.value.where == "model.base" and "\n" not in str(raised.value)


@pytest.mark.parametrize("task", ["causal", "reward"])
@pytest.mark.parametrize("values", [{"num_hidden_layers": 6}, {"intermediate_size": 512}, {"num_hidden_layers": 3}])
def test_a_model_is_never_loaded_with_weights_that_are_not_there(
    folder: Path, task: Any, values: dict[str, int]
) -> None:
    edited(folder, **values)
    with pytest.raises(UserError, match="weights of"):
        load_model(resolve_base(str(folder)), task=task)


def test_weights_of_a_part_that_the_model_does_not_have_are_no_damage(folder: Path) -> None:
    stored(folder, lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(1, 128)}))
    found = resolve_base(str(folder))
    check_base_complete(found)
    load_model(found)


@pytest.mark.parametrize("path", ["nowhere", "~nobody-of-that-name/base", "a\0b", "x" * 5000, "loop/base"])
def test_a_path_that_leads_nowhere_is_one_line(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"model\.base: "):
        resolve_base(f"./{path}" if path[0] not in "~" else path)


def test_a_base_that_was_hashed_by_an_earlier_version_is_looked_at_again(folder: Path) -> None:
    import hashlib

    from preftune.models.cache import cache_dir

    stored(folder, lambda tensors: tensors[NORM].fill_(torch.nan))
    files = [folder / CONFIG, folder / WEIGHTS]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    note = cache_dir() / "hashes" / hashlib.sha256(json.dumps(["base", stats]).encode()).hexdigest()
    note.parent.mkdir(exist_ok=True)
    note.write_text("0" * 64)
    with pytest.raises(UserError, match="NaN"):
        resolve_base(str(folder))
