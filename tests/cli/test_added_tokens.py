"""The smoke recipe on a base that is given tokens: its stages, the evaluation, the doctor, what is made of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.cli import main as cli
from preftune.models.loading import resolve_base

from .conftest import Shell

TOKEN = "<|think|>"
ALSO = [
    "stages.distill={from: sft, teacher: {stage: dpo}, data: prompts, rollout_batch_size: 4, total_episodes: 8, "
    "max_new_tokens: 12}",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, preftune_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        words = ["smoke", f"model.add_tokens=['{TOKEN}']", "lora.trainable_token_indices=[9]", *ALSO]
        assert cli.run_command(["run", *words, "--output-dir", str(folder)]) == 0
    return folder


def lineage(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "lineage.json").read_text(encoding="utf-8"))


def test_every_stage_has_the_one_base_and_speaks_in_plain_peft(run: Path):
    states = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
    assert {each["state"] for each in states.values()} == {"done"} and "eval" in states
    trained = [name for name in states if name != "eval"]
    (base,) = {json.dumps(lineage(run, name)["base"]) for name in trained}
    made = resolve_base(json.loads(base)["spec"])
    assert made.sha256 == json.loads(base)["sha256"] and made.added == (264,)
    for stage in trained:
        config = json.loads((run / stage / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["trainable_token_indices"] == {"model.embed_tokens": [9, 264]}, stage
    for stage in ("dpo", "ppo"):
        model: Any = AutoPeftModelForCausalLM.from_pretrained(run / stage)
        with torch.no_grad():
            assert bool(model(input_ids=torch.tensor([[8, 264]])).logits.isfinite().all())
    rows = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))
    assert all(row["kl"] == 0 for row in rows if row["policy"] == "sft")
    assert all(row["kl"] > 0 for row in rows if row["policy"] in ("base", "dpo", "kto"))


def test_what_is_made_of_it_has_the_token_or_is_refused(run: Path, tmp_path: Path, shell: Shell):
    code, out, _ = shell("merge", run / "dpo", tmp_path / "merged")
    assert code == 0, out
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(TOKEN) == 264
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(merged.get_input_embeddings().weight) == 265
    code, _, err = shell("export", run / "dpo", tmp_path / "served", "--to", "vllm")
    assert code == 2 and "trains rows of single tokens" in err and not (tmp_path / "served").exists()
    assert "1: their rows are in the adapter" in (run / "sft" / "README.md").read_text(encoding="utf-8")


def test_the_doctor_finds_nothing_broken_and_the_same_words_run_nothing_again(run: Path, shell: Shell):
    code, out, _ = shell("doctor", run, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert found and not [each for each in found if each.get("level") == "broken"], out
    code, out, _ = shell("run", run / "recipe.yaml", "--output-dir", run)
    assert code == 0 and out.count("skipped") == len(json.loads((run / "run.json").read_text())["stages"])
    code, out, _ = shell(
        "run", run / "recipe.yaml", "model.add_tokens=['<|other|>']", "--output-dir", run, "--only", "dpo"
    )
    assert code == 2
