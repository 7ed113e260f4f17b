"""What transformers 5 writes so that transformers 4 reads it wrongly, or not at all, is written for both.

Many programs that serve a model still come with transformers 4. It does not know the class `TokenizersBackend`, takes
`extra_special_tokens` for a dict, does not find in tokenizer.json whether BOS is put first, and does not look into
`rope_parameters`: a model whose rotary base is not its class's default would say something else there, in silence.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..files import write_whole

_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"
_EDGES = ("add_bos_token", "add_eos_token")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Its files in a folder, as transformers 4 and 5 read them alike."""
    tokenizer.save_pretrained(folder)
    said = _read(folder / _TOKENIZER)
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = said.get("extra_special_tokens")
    if isinstance(extra, list):
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    if said["tokenizer_class"] != "PreTrainedTokenizerFast":
        # transformers 5 keeps these in tokenizer.json alone; classes of 4 that have them go by their own default
        said |= {name: value for name in _EDGES if isinstance(value := getattr(tokenizer, name, None), bool)}
    _write(folder / _TOKENIZER, said)


def config_for_both(folder: Path) -> None:
    """Say in a saved model's config.json its rotary base and scaling, and its dtype, under their older names as well.

    Configs with rotary parameters per kind of layer are left alone: there every architecture had names of its own.
    """
    said = _read(folder / _CONFIG)
    for part in (said, *(each for each in said.values() if isinstance(each, dict))):
        if "dtype" in part:
            part.setdefault("torch_dtype", part["dtype"])
        rope = part.get("rope_parameters")
        if not isinstance(rope, dict) or any(isinstance(each, dict) for each in rope.values()):
            continue
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        part |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        part["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    _write(folder / _CONFIG, said)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, said: dict[str, Any]) -> None:
    write_whole(file, json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
