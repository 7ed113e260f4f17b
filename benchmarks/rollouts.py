"""Rollouts: our sampler against transformers' `generate`, alternating, each measurement in its own process.

    python -m preftune.benchmarks.rollouts --adapter runs/quickstart/sft

Both sample at temperature 0.7 from the whole distribution, in bf16, with the adapter merged into the weights. Work:
`forced` (batch 32, prompts of 64 tokens, the same number of new tokens for every row), `one` (the same at batch 1) and
`natural` (256 quickstart prompts, EOS respected, `generate` in batches of 32 sorted by length). `generate` runs with
each of its caches that works on this device, and the fastest one is what ours is compared with. Beside our rate stand
the floor (what a step's matrix products alone, as laid out, would reach) and what a step takes of it, both of the same
process, and the machine's rate of a large bf16 product.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..data.encode import encode_prompts
from ..data.load import load_rows
from ..data.spec import DataSpec, SourceSpec
from ..models.adapters import AdapterSet
from ..models.batching import left_pad
from ..models.generate import merged, ready, sample
from ..models.loading import load_model
from ..models.lora import LoraSpec
from ..models.token_step import TokenStep
from ..models.tokens import load_tokenizer, prepare_model
from .measure import alternate, machine, measured_apart, product_rate, write_result
from .workload import base

SIDES = ("ours", "generate dynamic", "generate static")
WORK = ("forced", "natural", "one")
PROMPTS = Path(__file__).parents[1] / "data/quickstart/prompts.jsonl"
TEMPERATURE = 0.7
FLOOR = ("floor_tokens_per_second", "step_ms", "products_ms", "step_over_products", "product_gflops")
"""What stands beside our rate."""


def main() -> None:
    args = _arguments()
    if args.worker:
        print(json.dumps(_measure(args)))
        return
    tables = []
    for work in args.work:
        print(work, file=sys.stderr, flush=True)
        options = ["--work", work, "--new", str(args.new), *(["--adapter", args.adapter] if args.adapter else [])]
        found = alternate(
            args.sides,
            args.rounds,
            lambda side, options=options: measured_apart(f"{__package__}.rollouts", ["--worker", side, *options]),
        )
        rates = {side: statistics.median(one["tokens_per_second"] for one in each) for side, each in found.items()}
        peers = [rate for side, rate in rates.items() if side != "ours"]
        ratio = rates["ours"] / max(peers) if peers and "ours" in rates else None
        floor = _middle(found.get("ours", []))
        tables.append({"work": work, "tokens_per_second": rates, "ratio": ratio, **floor, "runs": found})
        print(f"{work}: {json.dumps({k: round(v, 1) for k, v in rates.items()})}, ratio {ratio}, {floor}", flush=True)
    result = {"machine": machine(), "new_tokens": args.new, "adapter": bool(args.adapter), "tables": tables}
    print(write_result(args.name, result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="an SFT stage's folder; without it the base speaks, which seldom ends")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--new", type=int, default=64, help="new tokens a row, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="rollouts", help="of the file in benchmarks/results")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """What a worker does: one whole batch to warm up (products are compiled for the shapes that they meet), then the
    work against the clock."""
    work = args.work[0]
    tokenizer = load_tokenizer(base())
    prompts = _prompts(work, tokenizer)
    # nothing ends a forced rollout
    eos: Any = tokenizer.eos_token_id
    stop = int(eos) if work == "natural" else -1
    batch = 1 if work == "one" else 32
    adapters = _open(args, tokenizer)
    ours = args.worker == "ours"
    run = _ours(args, adapters, tokenizer, stop, batch) if ours else _generate(args, adapters, tokenizer, stop, batch)
    run(prompts[:batch])
    began = time.perf_counter()
    tokens = run(prompts)
    seconds = time.perf_counter() - began
    floor = _floor(adapters, run, prompts[:batch]) if ours else {}
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds, **floor}


def _middle(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each figure about the floor over the rounds."""
    return {name: statistics.median(run[name] for run in runs) for name in FLOOR if runs}


def _floor(adapters: AdapterSet, run: Any, prompts: list[list[int]]) -> dict[str, float]:
    """A step's time and that of its matrix products, in ms: medians, the two measured in turn."""
    step, products, batch = [], [], len(prompts)
    for _ in range(3):
        ticks: list[float] = []
        run(prompts, lambda *_, ticks=ticks: ticks.append(_clock()))
        # the first token is the prefill's
        step += [after - before for before, after in itertools.pairwise(ticks[1:])]
        products += _products(adapters, batch)
    whole, part = statistics.median(step), statistics.median(products)
    rate = product_rate() / 1e9
    figures = (batch / part, whole * 1e3, part * 1e3, whole / part, rate)
    return {name: round(each, 3) for name, each in zip(FLOOR, figures, strict=True)}


@torch.inference_mode()
def _products(adapters: AdapterSet, batch: int) -> list[float]:
    """Seconds of the products of all layers and the head for one token a row, as they are laid out for decoding."""
    with ready(adapters, "default") as (head, joint):
        layers, config = TokenStep(adapters.backbone, joint).layers, adapters.backbone.config
        heads = config.num_attention_heads * layers[0].dim
        x_E, x_S, x_I = (
            torch.randn(batch, width, device=head.weight.device, dtype=head.weight.dtype)
            for width in (config.hidden_size, heads, config.intermediate_size)
        )

        def once() -> float:
            began = _clock()
            for layer in layers:
                for product in (layer.qkv, layer.gate, layer.up):
                    product(x_E)
                layer.out(x_S)
                layer.down(x_I)
            if head.product is None:
                torch.nn.functional.linear(x_E, head.weight, head.bias)
            else:
                head.product(x_E)
            return _clock() - began

        once()
        return [once() for _ in range(20)]


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _prompts(work: str, tokenizer: Any) -> list[list[int]]:
    spec = DataSpec((SourceSpec(str(PROMPTS)),), max_prompt_length=128)
    rows, _ = encode_prompts(load_rows(spec, "prompt").rows, tokenizer, spec)
    prompts = [list(ids) for ids in rows["prompt_ids"]]
    if work == "natural":
        return prompts[:256]
    stream = [token for ids in prompts for token in ids]
    return [stream[64 * i : 64 * (i + 1)] for i in range(32 if work == "forced" else 4)]


def _open(args: argparse.Namespace, tokenizer: Any) -> AdapterSet:
    model = load_model(base(), dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else None)
    prepare_model(model, tokenizer)
    return AdapterSet.create(model, base(), LoraSpec(), Path(args.adapter) if args.adapter else None)


def _ours(args: argparse.Namespace, adapters: AdapterSet, tokenizer: Any, stop: int, batch: int) -> Any:
    def run(prompts: list[list[int]], heard: Any = None) -> int:
        made = sample(
            adapters,
            "default",
            prompts,
            max_new_tokens=args.new,
            eos_token_id=stop,
            pad_token_id=tokenizer.pad_token_id,
            seed=0,
            temperature=TEMPERATURE,
            batch_size=batch,
            on_tokens=heard,
        )
        return sum(map(len, made.tokens))

    return run


def _generate(args: argparse.Namespace, adapters: AdapterSet, tokenizer: Any, stop: int, batch: int) -> Any:
    """A plain model whose weights hold the adapter's change; its attention is transformers' own."""
    device = adapters.model.device
    with merged(adapters, "default"):
        named = adapters.model.get_base_model().named_parameters()
        weights = {name.replace(".base_layer", ""): parameter.data for name, parameter in named}
        model: Any = AutoModelForCausalLM.from_pretrained(base().path, dtype=torch.bfloat16).to(device).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    del weights

    @torch.no_grad()
    def run(prompts: list[list[int]]) -> int:
        total = 0
        ordered = sorted(prompts, key=len)
        for start in range(0, len(ordered), batch):
            ids, mask = left_pad(ordered[start : start + batch], tokenizer.pad_token_id, device)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=args.new,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                eos_token_id=None if stop < 0 else stop,
                min_new_tokens=args.new if stop < 0 else None,
                pad_token_id=tokenizer.pad_token_id,
                **({"cache_implementation": "static"} if args.worker.endswith("static") else {}),
            )
            for row in out[:, ids.size(1) :].tolist():
                total += row.index(stop) + 1 if stop in row else len(row)
        return total

    return run


if __name__ == "__main__":
    main()
