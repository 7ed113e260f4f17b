"""`preftune export --to merged, gguf, ollama, vllm`: what is written is used as it is said, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from preftune.cli.export_model import _ollama_template
from preftune.errors import UserError
from preftune.models.tiny import byte_tokenizer
from preftune.stages.serving.command import asked_rank

IDS = torch.tensor([[5, 9, 17, 4, 31, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_merged_export_is_what_merge_writes(run: Path, tmp_path: Path, shell) -> None:
    assert shell("export", run, "--stage", "dpo", "--to", "merged", tmp_path / "out")[0] == 0
    wanted = logits(AutoPeftModelForCausalLM.from_pretrained(run / "dpo", dtype=torch.float32))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_vllm_gets_the_adapter_its_base_and_a_command(run: Path, tmp_path: Path, shell, monkeypatch) -> None:
    code, said, _ = shell("export", run / "dpo", tmp_path / "out", "--to", "vllm")
    assert code == 0
    command = said.strip().splitlines()[-1]
    wanted = "vllm serve ./base --tokenizer ./dpo --enable-lora --max-lora-rank 8 --lora-modules dpo=./dpo"
    assert command == wanted
    config = json.loads((tmp_path / "out" / "dpo" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./base" and config["r"] == 2
    # nothing in it leads back to this machine's cache: plain PEFT loads it from that folder
    monkeypatch.chdir(tmp_path / "out")
    wanted = logits(AutoPeftModelForCausalLM.from_pretrained(run / "dpo", dtype=torch.float32))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("dpo", dtype=torch.float32)), wanted)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"trainable_token_indices": {"model.embed_tokens": [5]}}, "trains rows of single tokens"),
        ({"modules_to_save": ["lm_head"]}, r"trains whole modules \(lm_head\)"),
        ({"r": 513}, "has rank 513, and vLLM ends at 512"),
        ({"rank_pattern": {"q_proj": 4}}, "ranks or scalings of its own"),
        ({"bias": "all"}, "trains biases"),
    ],
)
def test_what_vllm_does_not_take_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        asked_rank("x", {"peft_type": "LORA", "r": 8, **changed})


@pytest.mark.parametrize(("rank", "asked"), [(1, 1), (2, 8), (16, 16), (24, 32), (256, 256), (300, 320), (512, 512)])
def test_the_rank_that_vllm_is_asked_for_is_one_that_it_takes(rank: int, asked: int) -> None:
    assert asked_rank("x", {"peft_type": "LORA", "r": rank}) == asked


def test_ollama_is_given_no_bos_that_llama_cpp_puts_there_itself() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    assert _ollama_template(tokenizer).unled == "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert _ollama_template(tokenizer).unled == ""


def test_mistakes_are_one_line(run: Path, tmp_path: Path, shell) -> None:
    out = tmp_path / "out"
    shell.refused("export", run / "dpo", out, "--to", "gguf", said="tokenizer has no merges")
    shell.refused("export", run / "dpo", out, "--to", "ollama", "--dtype", "int4", said="'int4' is unknown for a GGUF")
    shell.refused("export", run, out, "--to", "gguf", said="is a run, and one stage of it is exported; give .*sft")
    shell.refused("export", run / "dpx", out, "--to", "vllm", said="holds no adapter; did you mean 'dpo'")
    shell.refused("export", run / "dpo", "--to", "vllm", said="says no folder to write to")
    shell.refused(
        "export", run / "dpo", out, "--to", "vllm", "--dtype", "float16", said="vLLM gets the adapter|as it is"
    )
    assert not out.exists() and not list(tmp_path.glob(".out*"))
