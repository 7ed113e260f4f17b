"""The command that starts a server of vLLM's or SGLang's for a base and its adapters. Imports nothing heavy."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ...models.served_lora import RANKS, not_served, served_rank

Engine = Literal["vllm", "sglang"]
NAMES: dict[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang"}
"""As their makers write them."""

BASE_NAME = "base"
"""What a server calls the base; an adapter goes by its stage's name, or by its step's."""

CONTEXT = 8192
"""Tokens that a server is asked to keep for a prompt and its reply, where the model can: all of a long context may not
fit into memory."""

_MODULES: dict[Engine, str] = {"vllm": "vllm.entrypoints.openai.api_server", "sglang": "sglang.launch_server"}
_CPU_CACHE_GB = "2"
"""Of keys and values that vLLM keeps on a CPU; by itself it would take the larger part of the memory."""
_OURS = (
    *("--model", "--model-path", "--tokenizer", "--tokenizer-path", "--served-model-name", "--host", "--port"),
    *("--enable-lora", "--max-lora-rank", "--lora-modules", "--lora-paths", "--generation-config"),
)
"""Options without which a server would not be the one that is asked; the others may be said otherwise."""


def asked_rank(where: str, config: Mapping[str, Any], engine: Engine = "vllm") -> int:
    """What `--max-lora-rank` is to say for an adapter.

    Args:
        where: the adapter's place, for messages.
        config: as in its adapter_config.json.

    Raises:
        UserError: an adapter that the server refuses, or reads otherwise than PEFT.
    """
    name = NAMES[engine]
    remedy = f"export it with --to merged, which {name} serves as any model"
    if (said := not_served({"peft_type": None} | dict(config))) is not None:
        raise UserError(where, f"{said}, which {name} does not take", remedy)
    rank = int(config["r"])
    if engine == "sglang":
        return rank
    asked = served_rank(rank)
    if asked is None:
        raise UserError(where, f"has rank {rank}, and vLLM ends at {RANKS[-1]}", remedy)
    return asked


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a server is to serve.

    Attributes:
        base: the base's folder. It is served as `BASE_NAME`.
        tokenizer: a folder with its tokenizer; a finished stage's has the chat template that it was trained with.
        rank: see `asked_rank`.
        dtype: of the base, a torch name.
        max_model_len: tokens of a prompt and its reply.
        adapters: name -> folder of what it has from the start; others come while it runs.
        on_cpu: it runs without a GPU.
    """

    engine: Engine
    base: Path
    tokenizer: Path
    rank: int
    dtype: str
    max_model_len: int
    host: str = "127.0.0.1"
    port: int = 8000
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])
    on_cpu: bool = False

    @property
    def url(self) -> str:
        """Where this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def start_of(engine: Engine, python: Path | None) -> list[str]:
    """The first words of the command: the program itself, or the interpreter of the environment that has it."""
    if python is not None:
        return [str(python), "-m", _MODULES[engine]]
    return ["vllm", "serve"] if engine == "vllm" else ["python", "-m", _MODULES[engine]]


def server_command(serving: Serving, start: Sequence[str], where: str) -> list[str]:
    """The whole command: how it starts, and what makes it the server that is asked for.

    Args:
        start: words that start the engine, with options of one's own where one likes: they hold before ours.
        where: where they come from, for the message.

    Raises:
        UserError: among them is an option that has to be ours.
    """
    given = {word.partition("=")[0] for word in start if word.startswith("--")}
    if taken := [option for option in _OURS if option in given]:
        said = f"says {taken[0]} itself, which is filled in here"
        raise UserError(where, said, "leave it out: preftune serve prints what is filled in")
    build = _vllm_options if serving.engine == "vllm" else _sglang_options
    options = [words for words in build(serving) if words[0] not in given]
    if serving.engine == "vllm" and start[-1:] == ["serve"] and options[0][0] == "--model":
        options[0] = options[0][1:]  # `vllm serve` has the model as its argument
    return [*start, *(word for words in options for word in words)]


def _vllm_options(serving: Serving) -> list[list[str]]:
    # log-probs as training has them, of the tempered distribution; no sampling settings of the model's own
    found = [
        ["--model", str(serving.base)],
        ["--served-model-name", BASE_NAME],
        ["--tokenizer", str(serving.tokenizer)],
        ["--dtype", serving.dtype],
        ["--max-model-len", str(serving.max_model_len)],
        ["--host", serving.host],
        ["--port", str(serving.port)],
        ["--enable-lora"],
        ["--max-lora-rank", str(serving.rank)],
        ["--logprobs-mode", "processed_logprobs"],
        ["--generation-config", "vllm"],
        # the output head in 32 bits: logits near 20 are 0.125 apart in bfloat16, and log-probs as far off
        ["--hf-overrides", '{"head_dtype": "float32"}'],
    ]
    if serving.on_cpu:
        # a prompt read in two pieces sets its reply's random numbers back, which a CPU's cannot be: the engine ends
        found += [["--enforce-eager"], ["--no-enable-chunked-prefill"]]
    named = [f"{name}={folder}" for name, folder in serving.adapters.items()]
    return found + ([["--lora-modules", *named]] if named else []) + _template(serving)


def _sglang_options(serving: Serving) -> list[list[str]]:
    found = [
        ["--model-path", str(serving.base)],
        ["--served-model-name", BASE_NAME],
        ["--tokenizer-path", str(serving.tokenizer)],
        ["--dtype", serving.dtype],
        ["--context-length", str(serving.max_model_len)],
        ["--host", serving.host],
        ["--port", str(serving.port)],
        ["--enable-lora"],
        ["--max-lora-rank", str(serving.rank)],
        ["--lora-target-modules", "all"],
    ]
    found += [["--device", "cpu"]] if serving.on_cpu else []
    named = [f"{name}={folder}" for name, folder in serving.adapters.items()]
    return found + ([["--lora-paths", *named]] if named else []) + _template(serving)


def _template(serving: Serving) -> list[list[str]]:
    file = serving.tokenizer / "chat_template.jinja"
    return [["--chat-template", str(file)]] if file.is_file() else []


def server_environment(serving: Serving, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What its environment has besides ours: all that it reads lies on this machine, and adapters may come and go.

    Args:
        given: the environment, whose own word on memory holds.
    """
    found = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if serving.engine == "vllm":
        found |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
        if serving.on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in given:
            found["VLLM_CPU_KVCACHE_SPACE"] = _CPU_CACHE_GB
    return found
