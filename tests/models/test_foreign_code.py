"""Nothing that comes with a model, an adapter or a checkpoint runs: no pickle, no code beside it, no named module."""

import ast
import json
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from preftune.errors import UserError
from preftune.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from preftune.models.auto import check_model, open_config, open_model, open_tokenizer
from preftune.models.base import Base
from preftune.models.loading import resolve_base
from preftune.models.merging import merge_adapter
from preftune.models.pickles import check_pickles, pickle_problem
from preftune.models.tokens import load_tokenizer

ROOT = Path(__file__).parents[2]
ROOMS = ("data", "models", "stages", "eval", "recipes", "cli", "api")


class Payload:
    """What a pickle runs when it is read: it makes a file."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.touched,)


@pytest.fixture
def touched(tmp_path: Path):
    """The file that no payload may make: looked for when the test has ended."""
    file = tmp_path / "the-payload-ran"
    yield file
    assert not file.exists()


@pytest.fixture
def model(base: Base, tmp_path: Path) -> Path:
    """A whole model that may be changed."""
    return Path(shutil.copytree(base.path, tmp_path / "model"))


def change(file: Path, **keys: Any) -> None:
    """Keys set in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def remote(folder: Path, touched: Path, name: str = "payload") -> None:
    """Code beside a model, which makes a file when it is imported."""
    (folder / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(touched)!r}).touch()\n")


def test_the_payload_would_run(tmp_path: Path):
    made = tmp_path / "made"
    torch.save({"w": Payload(made)}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert made.exists()


@pytest.mark.parametrize("harmless", [True, False])
def test_weights_that_are_a_pickle_are_refused(model: Path, touched: Path, harmless: bool):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights if harmless else Payload(touched), model / "pytorch_model.bin")
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        with pytest.raises(UserError, match=r"here: the weights of .* are pytorch_model.bin, a pickle"):
            open_model(auto, model, "here")


def test_a_renamed_pickle_is_no_safetensors_file(model: Path, touched: Path):
    torch.save(Payload(touched), model / "model.safetensors")
    with pytest.raises(Exception, match=r"(?i)header"):
        open_model(AutoModelForCausalLM, model, "here")


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "payload.C"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["payload.T", None]}}),
    ],
)
def test_code_beside_a_model_is_neither_run_nor_asked_about(model: Path, touched: Path, monkeypatch, file, keys):
    remote(model, touched)
    change(model / file, **keys)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    base = Base("model", model, None, "")
    with pytest.raises(UserError, match="code of its own only"):
        load_tokenizer(base)
    with pytest.raises(UserError, match="code of its own only"):
        open_tokenizer(model) if "tokenizer" in file else open_model(AutoModelForCausalLM, model)
    if file == "config.json":
        with pytest.raises(UserError, match="code of its own only"):
            open_config(model)


def test_where_transformers_has_the_architecture_the_code_beside_it_is_passed_over(model: Path, touched: Path):
    remote(model, touched)
    change(model / "config.json", auto_map={"AutoConfig": "payload.C", "AutoModelForCausalLM": "payload.M"})
    (model / "custom_generate").mkdir()
    remote(model / "custom_generate", touched, "generate")
    opened = open_model(AutoModelForCausalLM, model)
    assert type(opened).__name__ == "LlamaForCausalLM"
    assert load_tokenizer(resolve_base(str(model))).eos_token_id is not None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attn_implementation": "evil/kernel"}, "kernel from the hub"),
        ({"_attn_implementation": "evil/kernel@main"}, "kernel from the hub"),
        ({"text_config": {"attn_implementation": {"": "evil/kernel"}}}, "kernel from the hub"),
        ({"_experts_implementation": "evil/kernel"}, "kernel from the hub"),
        ({"transformers_weights": "../other/model.safetensors"}, "transformers_weights"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights"),
    ],
)
def test_a_config_neither_fetches_code_nor_takes_weights_from_elsewhere(model: Path, keys: dict[str, Any], said: str):
    change(model / "config.json", **keys)
    with pytest.raises(UserError, match=said):
        check_model(model, "here")
    if "kernel" in said:
        with pytest.raises(UserError, match=said):
            open_config(model, "here")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "pytorch_model.bin", "a/b.safetensors"])
def test_an_index_names_safetensors_beside_it_alone(model: Path, name: str):
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "part.safetensors", "b": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is no safetensors file beside it"):
        open_model(AutoModelForCausalLM, model)


def test_an_adapter_beside_the_base_is_refused_and_not_loaded_in_silence(model: Path):
    (model / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/elsewhere"}))
    with pytest.raises(UserError, match=f"{ADAPTER_CONFIG} beside its config.json"):
        open_model(AutoModelForCausalLM, model)


def adapter_with(make: Any, folder: Path, **keys: Any) -> Path:
    make().save("default", folder)
    change(folder / ADAPTER_CONFIG, **keys)
    return folder


def test_a_merge_runs_nothing_that_the_adapters_tokenizer_names(
    make, tmp_path: Path, touched: Path, tokenizer, monkeypatch
):
    folder = adapter_with(make, tmp_path / "adapter")
    tokenizer.save_pretrained(folder)
    change(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["payload.T", None]})
    remote(folder, touched)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    with pytest.raises(UserError, match="code of its own only"):
        merge_adapter(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"megatron_config": {"hidden_size": 1}, "megatron_core": "payload"}, "imports the module 'payload'"),
        ({"peft_type": "XLORA", "adapters": {"a": "/elsewhere"}, "hidden_size": 8}, "cannot merge"),
        (
            {
                "peft_type": "PROMPT_TUNING",
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "x",
                "tokenizer_name_or_path": "/elsewhere",
            },
            "cannot merge",
        ),
    ],
)
def test_a_merge_follows_no_module_or_path_that_the_adapters_config_names(
    make, tmp_path: Path, touched: Path, monkeypatch, keys: dict[str, Any], said: str
):
    folder = adapter_with(make, tmp_path / "adapter")
    plain = json.loads((folder / ADAPTER_CONFIG).read_text())
    kept = plain if "peft_type" not in keys else {"task_type": "CAUSAL_LM", "base_model_name_or_path": "random:llama"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(kept | keys))
    remote(tmp_path, touched)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=said):
        merge_adapter(folder, tmp_path / "out")


@pytest.mark.parametrize("harmless", [True, False])
def test_a_merge_reads_no_pickled_adapter(make, tmp_path: Path, touched: Path, harmless: bool):
    folder = adapter_with(make, tmp_path / "adapter")
    weights = load_file(folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_WEIGHTS).unlink()
    torch.save(weights if harmless else Payload(touched), folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin, a pickle"):
        merge_adapter(folder, tmp_path / "out")


def checkpoint(folder: Path) -> Path:
    """What transformers writes beside an adapter."""
    folder.mkdir()
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(schedule.state_dict(), folder / "scheduler.pt")

    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    torch.save(state, folder / "rng_state.pth")
    save_file({"w": torch.ones(2)}, folder / ADAPTER_WEIGHTS)
    return folder


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin", "sub/x.pkl"]
)
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
@pytest.mark.checklist("S1")
def test_s01_a_checkpoint_with_a_payload_is_refused(tmp_path: Path, touched: Path, name: str, form: str):
    folder = checkpoint(tmp_path / "checkpoint-3")
    assert pickle_problem(folder) is None
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    if form == "pickle":
        file.write_bytes(pickle.dumps({"state": Payload(touched)}))
    else:
        torch.save({"state": Payload(touched)}, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match=rf"{Path(name).name} (would run code|holds more|cannot be read)"):
        check_pickles(folder)


def test_what_nobody_reads_is_left_alone_and_a_sharded_index_is_not_read(tmp_path: Path, touched: Path):
    folder = checkpoint(tmp_path / "checkpoint-3")
    torch.save(Payload(touched), folder / "training_args.bin")
    assert pickle_problem(folder) is None
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Payload(touched)))
    assert "sharded checkpoint" in str(pickle_problem(folder))
    (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:200])
    shutil.rmtree(folder / "optimizer_0")
    assert "optimizer.pt cannot be read" in str(pickle_problem(folder))


FORBIDDEN = {
    "pickle": ("load", "loads", "Unpickler"),
    "joblib": ("load",),
    "dill": ("load", "loads"),
    "np": ("load",),
    "numpy": ("load",),
    "yaml": ("load", "unsafe_load", "full_load"),
}


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_else_opens_a_model_or_a_pickle(room: str):
    """transformers' Auto classes are asked in `models/auto.py` alone, and pickles read in `models/pickles.py` alone."""
    found = []
    for file in sorted((ROOT / room).rglob("*.py")):
        place = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            auto = name == "from_pretrained" and owner not in ("PeftModel", "PeftConfig") and place != "models/auto.py"
            torch_load = (owner, name) == ("torch", "load") and place != "models/pickles.py"
            # rows that the same function has packed, in memory
            if (place, owner, name) == ("data/load.py", "pickle", "loads"):
                continue
            if auto or torch_load or name in FORBIDDEN.get(owner, ()):
                found.append(f"{place}:{node.lineno} {owner}.{name}")
            trusts = [each for each in node.keywords if each.arg == "trust_remote_code"]
            found += [f"{place}:{node.lineno} trusts" for each in trusts if ast.unparse(each.value) != "False"]
    assert not found, "\n".join(found)


LOADED = """
import sys, types
import preftune.models
asked = types.ModuleType("kernels")
asked.get_kernel = lambda *_, **__: open(sys.argv[1], "w").close()
sys.modules["kernels"] = asked
import bitsandbytes
assert "bitsandbytes.backends.cpu.ops" in sys.modules and sys.modules["kernels"] is asked
import logging
assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.ERROR
"""


def test_bitsandbytes_fetches_no_kernel_when_it_is_imported(touched: Path):
    """On a CPU that multiplies in bfloat16 it would."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED, str(touched)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not touched.exists() and "kernels" not in done.stderr
