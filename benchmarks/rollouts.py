"""Rollouts: our sampler against transformers' `generate`, alternating, each measurement in its own process.

    python -m preftune.benchmarks.rollouts --adapter runs/quickstart/sft

Both sample at temperature 0.7 from the whole distribution, in bf16, with the adapter merged into the weights. Work:
`forced` (batch 32, prompts of 64 tokens, the same number of new tokens for every row), `one` (the same at batch 1) and
`natural` (256 quickstart prompts, EOS respected, `generate` in batches of 32 sorted by length). `generate` runs with
each of its caches that works on this device, and the fastest one is what ours is compared with.
"""

import argparse
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
from ..models.generate import merged, sample
from ..models.loading import load_model
from ..models.lora import LoraSpec
from ..models.tokens import load_tokenizer, prepare_model
from .measure import alternate, machine, measured_apart, write_result
from .workload import base

SIDES = ("ours", "generate dynamic", "generate static")
WORK = ("forced", "natural", "one")
PROMPTS = Path(__file__).parents[1] / "data/quickstart/prompts.jsonl"
TEMPERATURE = 0.7


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
        tables.append({"work": work, "tokens_per_second": rates, "ratio": ratio, "runs": found})
        print(f"{work}: {json.dumps({k: round(v, 1) for k, v in rates.items()})}, ratio {ratio}", flush=True)
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
    run = _ours(args, tokenizer, stop, batch) if args.worker == "ours" else _generate(args, tokenizer, stop, batch)
    run(prompts[:batch])
    began = time.perf_counter()
    tokens = run(prompts)
    seconds = time.perf_counter() - began
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds}


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


def _ours(args: argparse.Namespace, tokenizer: Any, stop: int, batch: int) -> Any:
    adapters = _open(args, tokenizer)

    def run(prompts: list[list[int]]) -> int:
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
        )
        return sum(map(len, made.tokens))

    return run


def _generate(args: argparse.Namespace, tokenizer: Any, stop: int, batch: int) -> Any:
    """A plain model whose weights hold the adapter's change; its attention is transformers' own."""
    adapters = _open(args, tokenizer)
    device = adapters.model.device
    with merged(adapters, "default"):
        named = adapters.model.get_base_model().named_parameters()
        weights = {name.replace(".base_layer", ""): parameter.data for name, parameter in named}
        model: Any = AutoModelForCausalLM.from_pretrained(base().path, dtype=torch.bfloat16).to(device).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    del adapters, weights

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
