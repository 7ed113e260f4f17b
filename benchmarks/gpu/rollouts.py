"""Rollouts at 64, 256 and 1 row: our sampler against transformers' continuous batching and `generate`.

One side a process. All draw at temperature 1 from the whole distribution, bf16, prompts of one length that share
nothing, a forced number of new tokens: what a step costs, not where a reply ends. Each count of rows is drawn once to
warm up (graphs, compilers, autotuning) and then against the clock. Peers may lack a kernel here: what attention they
ran with is written beside their rate.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from ...models.adapters import AdapterSet
from ...models.base import Base
from ...models.generate import decoder_for, sample
from ...models.loading import load_model, resolve_base
from ...models.lora import LoraSpec
from ...models.memory import peak_memory_bytes, reset_peak_memory
from ...models.tokens import load_tokenizer, prepare_model
from ..measure import Measured

Draw = Callable[[list[list[int]], int], int]
"""Draws so many new tokens after each prompt; how many it drew in all."""

PROMPT, NEW = 64, 128
_NOT_SPECIAL = 8
"""Ids from here on are bytes of text in the byte tokenizer."""


def measure(options: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    """New tokens a second, and the peak of memory, for each count of rows."""
    base, side = resolve_base(options["base"]), options["side"]
    draw, about = _ours(base) if side == "ours" else _peer(base, side)
    new, prompt = (6, 8) if options["tiny"] else (NEW, PROMPT)
    for name in options["names"]:
        rows = int(name.split()[0])
        if options["tiny"]:
            rows = min(rows, 4)
        prompts = _prompts(rows, prompt)
        draw(prompts, new)
        reset_peak_memory()
        torch.cuda.synchronize()
        began = time.perf_counter()
        drawn = draw(prompts, new)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        if drawn != rows * new:
            raise RuntimeError(f"{side} drew {drawn} tokens, expected {rows} x {new}")
        figures = {"tokens_per_second": drawn / seconds, "seconds": seconds, "ms_per_step": 1e3 * seconds / new}
        yield name, {**figures, "peak_bytes": peak_memory_bytes(), **about()}


def _prompts(rows: int, length: int) -> list[list[int]]:
    ids = torch.randint(_NOT_SPECIAL, 256, (rows, length), generator=torch.Generator().manual_seed(1))
    return ids.tolist()


def _ours(base: Base) -> tuple[Draw, Callable[[], Measured]]:
    """The sampler of PPO and evaluation, its adapter merged as in a rollout."""
    tokenizer: Any = load_tokenizer(base)
    model = load_model(base, dtype=torch.bfloat16, device="cuda")
    prepare_model(model, tokenizer)
    adapters = AdapterSet.create(model, base, LoraSpec(r=16))

    def draw(prompts: list[list[int]], new: int) -> int:
        made = sample(
            adapters,
            "default",
            prompts,
            max_new_tokens=new,
            eos_token_id=-1,
            pad_token_id=tokenizer.pad_token_id,
            seed=0,
            batch_size=len(prompts),
        )
        return sum(map(len, made.tokens))

    return draw, lambda: {"decoder": decoder_for(adapters).__name__}


def _peer(base: Base, side: str) -> tuple[Draw, Callable[[], Measured]]:
    """transformers' own, on the plain model: no adapter slows it."""
    tokenizer: Any = load_tokenizer(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    model.to("cuda").eval().requires_grad_(False)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        # -1: nothing ends
        eos_token_id=-1 if side.endswith("continuous") else None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config.eos_token_id = config.eos_token_id

    def continuous(prompts: list[list[int]], new: int) -> int:
        config.max_new_tokens = new
        # a manager is made for a number of requests, so every number warms up one of its own, which stays
        if getattr(model, "_preftune_rows", None) != len(prompts):
            model.destroy_cached_continuous_batching_manager()
            model._preftune_rows = len(prompts)
        done = model.generate_batch(prompts, generation_config=config, persistent_manager=True)
        return sum(len(each.generated_tokens) for each in done.values())

    @torch.no_grad()
    def generate(prompts: list[list[int]], new: int) -> int:
        ids = torch.tensor(prompts, device="cuda")
        static = {"cache_implementation": "static"} if side.endswith("static") else {}
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            max_new_tokens=new,
            min_new_tokens=new,
            **static,
        )
        return (out.size(1) - ids.size(1)) * len(prompts)

    draw = continuous if side.endswith("continuous") else generate
    return draw, lambda: {"attention": model.config._attn_implementation}
