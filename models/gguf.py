"""A GGUF file turned, once, into a plain folder: bf16 safetensors, config, tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from ..errors import UserError
from . import seams
from .auto import open_model, open_tokenizer
from .cache import build_once, file_sha256
from .quiet import quiet_transformers
from .tokens import prepare_model, set_eos, set_pad

# Raise it whenever the conversion below changes: the cached folders carry it in their names.
_VERSION = 1


def convert_gguf(file: Path) -> tuple[Path, str]:
    """The cached folder of a GGUF file and `sha256:...` of that file.

    Raises:
        UserError: no such file, or transformers cannot read its architecture.
    """
    if not file.is_file():
        raise UserError("model.base", f"{str(file)!r} is no file", "give the path of an existing .gguf file")
    sha256 = file_sha256(file)
    return build_once(f"gguf-v{_VERSION}-{sha256[:16]}", lambda folder: unpack_gguf(file, folder)), f"sha256:{sha256}"


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write the dequantised model and its tokenizer into `folder`."""
    try:
        with quiet_transformers():
            model: Any = open_model(
                AutoModelForCausalLM,
                file.parent,
                gguf_file=file.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = open_tokenizer(file.parent, gguf_file=file.name)
    except UserError:
        raise
    except Exception as error:  # a foreign file: readers fail in every way there is
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError("model.base", f"{file.name} cannot be read ({first})", "use its safetensors") from error
    packed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if packed:
        raise UserError("model.base", f"{packed[0]} of {file.name} stayed packed", "use its safetensors original")
    seams.require(seams.QUANTIZER_MARKS)
    # The weights are plain now; with these marks left on, save_pretrained refuses.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # Plain PEFT loads this folder without us, so PAD must be right in its files already.
    if tokenizer.chat_template:
        set_eos(tokenizer)
    set_pad(tokenizer, model.config.get_text_config().vocab_size)
    prepare_model(model, tokenizer)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
