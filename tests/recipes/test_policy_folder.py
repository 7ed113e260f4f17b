"""Where the evaluation finds an adapter that a stage was started from with `--from-adapter`."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from preftune.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LINEAGE
from preftune.models.lineage import adapter_sha256
from preftune.recipes.build import policy_folder
from preftune.recipes.load import load_recipe

RECIPE = {
    "name": "t",
    "model": {"base": "random:llama"},
    "data": {"d": {"path": "d.jsonl"}, "p": {"path": "p.jsonl"}},
    "stages": {"sft": {"data": "d", "from": "base"}, "dpo": {"data": "p", "from": "sft"}},
}


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / ADAPTER_CONFIG).write_text("{}")
    save_file({"a.lora_A.weight": torch.ones(1, 1)}, folder / ADAPTER_WEIGHTS)
    return folder


def test_the_lineage_of_the_stage_says_where_its_start_lies(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    recipe = load_recipe(str(tmp_path / "r.yaml"), [])
    run, given = tmp_path / "run", adapter(tmp_path / "elsewhere" / "a")
    adapter(run / "dpo")
    assert policy_folder(recipe, run, "sft") == run / "sft"  # nothing is known of another place
    parent = {"stage": "imported, unverified", "sha256": adapter_sha256(given), "adapter": str(given)}
    (run / "dpo" / LINEAGE).write_text(json.dumps({"parents": [parent]}))
    assert policy_folder(recipe, run, "sft") == given
    assert policy_folder(recipe, run, "dpo") == run / "dpo"
    # weights that have changed since are not what the stage started from
    (run / "dpo" / LINEAGE).write_text(json.dumps({"parents": [parent | {"sha256": "0" * 64}]}))
    assert policy_folder(recipe, run, "sft") == run / "sft"
    adapter(run / "sft")
    assert policy_folder(recipe, run, "sft") == run / "sft"
