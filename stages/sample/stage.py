"""The sampling stage: the parent's policy answers each prompt several times, and what scores best becomes rows."""

import dataclasses
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from ... import stopping
from ...data.encode import encode_prompts
from ...data.report import DataReport
from ...data.rows import Row
from ...data.spec import DataSpec
from ...errors import UserError
from ...files import CHECKPOINTS, LOG, METRICS, PROGRESS, ROWS, sha256_of, write_whole
from ...models.adapters import AdapterSet
from ...models.devices import own_gpu
from ...models.fingerprints import code_sha256, folder_sha256
from ...models.generate import Generation, sample
from ...models.lineage import (
    Lineage,
    adapter_sha256,
    base_info,
    check_lineage,
    library_versions,
    parent_entry,
    tokenizer_info,
    write_lineage,
)
from ...models.loading import load_model
from ...models.lora import LoraSpec
from ...models.memory import peak_memory_bytes, release_free_memory, reset_peak_memory
from ...models.sharded import is_sharded
from ...models.tokens import end_token_ids, prepare_model
from ...progress import Meter, say, silent
from ...values import plain
from ..callbacks import write_step
from ..job import StageJob, no_reward
from ..ppo.network import Trunk
from ..ppo.reply_scores import ReplyScorer, ScoreRules
from ..ppo.rewards import RewardSource
from ..ppo.rollout import Prompts, decode, seed_of
from ..ppo.served import open_server
from ..processes import Processes
from ..run import StageData, clear_checkpoints, computed, load_data, open_tokenizer
from ..scorers.replies import Replies
from ..serving.engines import Draw
from ..serving.finished import FinishedPolicies
from ..serving.own import LOG as SERVER_LOG
from ..serving.place import place_of
from ..trackers import Teller, telling
from .drawn import Piece, keep_piece, kept_pieces
from .keep import Kept, Reply, check_read_back, keep, mean
from .settings import BEST_WORST, SampleSettings

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

POLICY = "policy"
"""The name of the adapter that speaks."""

_REPLIES_A_PIECE = {"cpu": 512, "cuda": 8192}
"""At most so many are drawn between two savings: enough that a batch seldom waits for the last of its replies."""


def run_sample(job: StageJob) -> dict[str, Any]:
    """Draw, score and keep (see `run_stage`); what a run that was cut off has drawn is kept and gone on behind.

    Returns:
        What metrics.json holds.
    """
    # 1. tokenizer, prompts, settings
    if not job.rewards:
        raise no_reward(job)
    tokenizer, settings = open_tokenizer(job), SampleSettings(**job.method)
    for source in job.rewards:
        if source.kind == "stage":
            check_lineage(Path(str(source.target)), job.base, tokenizer)
    rows, prompts, data = _read_prompts(job, tokenizer)
    check_read_back(rows, settings, job.record.row_kinds(job.method), f"data.{job.data_name}")
    # 2. replies and their scores
    these = Processes.all()
    with silent(these.rank > 0), telling(job, first=these.rank == 0) as teller:
        pieces = these.by_first(lambda: kept_pieces(job.output_dir / CHECKPOINTS))
        done = pieces[-1].end if pieces else 0
        if done:
            say(f"{job.name}: goes on after {done} of {len(prompts)} prompts")
        more: dict[str, Any] = {}
        for piece in pieces:
            teller.tell(piece.end, _log_row(piece))
        if done < len(prompts):
            sampler = _Sampler(job, settings, tokenizer, these)
            try:
                sampler.open_server(prompts)
                pieces += _draw(job, sampler, prompts, pieces, teller)
            finally:
                sampler.close()
            more = {"computed": computed(sampler.adapters.backbone)}
        # 3. what is kept of them
        replies = [each for piece in pieces for each in piece.replies]
        kept = [keep(*each, settings) for each in zip(rows, replies, strict=True)]
        metrics = _metrics(job, settings, data, pieces, kept)
        reasons = {f"left_out/{reason}": count for reason, count in metrics["left_out"].items()}
        teller.tell(len(prompts), {**metrics, **reasons})
        if these.rank == 0:
            _write(job, settings, tokenizer, data, kept, metrics, more)
    return metrics


def _read_prompts(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Row], Prompts, StageData]:
    """The prompts as rows, and encoded; those that the data entry holds out are left out."""
    found: list[list[Row]] = []

    def encode(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> "tuple[Dataset, DataReport]":
        given = list(rows)
        encoded, report = encode_prompts(given, tokenizer, spec)
        found.append(_of_origins(given, report.origins))
        return encoded, report

    data = load_data(job, encode, tokenizer)
    columns: Any = data.train
    return found[0], Prompts.of(columns, tokenizer, f"data.{job.data_name}"), data


def _of_origins(rows: Sequence[Row], origins: Sequence[str]) -> list[Row]:
    """The rows that were encoded, in their order."""
    left, found = iter(rows), list[Row]()
    for origin in origins:
        found.append(next(row for row in left if row.origin == origin))
    return found


class _Sampler:
    """The base with the policy and with what scores its replies.

    Raises:
        UserError: the base is divided among processes; or see `ReplyScorer`.
    """

    def __init__(
        self, job: StageJob, settings: SampleSettings, tokenizer: PreTrainedTokenizerBase, these: Processes
    ) -> None:
        self.job, self.settings, self.tokenizer, self.these = job, settings, tokenizer, these
        with stopping.interruptible():
            model = load_model(
                job.base,
                dtype=job.torch_dtype(),
                quantization=job.quantization,
                device=own_gpu() if torch.cuda.is_available() else None,
                packed=job.packed,
            )
        prepare_model(model, tokenizer)
        # the set wants a trainable adapter; nothing trains here, so the smallest one, which nobody uses
        self.adapters = AdapterSet.create(model, job.base, LoraSpec(r=1, alpha=1), parent=None)
        if is_sharded(self.adapters.backbone):
            said = "divides the base, and a sampling stage needs the whole of it in each process"
            raise UserError("--launch", said, "leave out the environment variable that divides it")
        self.role = None if job.parent is None else POLICY
        if job.parent is not None:
            self.adapters.load(POLICY, job.parent)
        self.device = self.adapters.head.weight.device
        # as the sources give them: what is kept is compared with other replies, and with a threshold in their units
        rules = ScoreRules(
            normalize_rewards=False,
            reward_combination=settings.reward_combination,
            ensemble_penalty=settings.ensemble_penalty,
        )
        self.scorer = ReplyScorer(job.rewards, self.adapters, tokenizer, rules, self._autocast, these)
        self.served: FinishedPolicies | None = None
        self.place = place_of(settings, f"stages.{job.name}.rollout")

    def open_server(self, prompts: Prompts) -> None:
        """Where a server draws: it is held against the base of this stage, and its policy against ours.

        Raises:
            UserError: it is not there, or another one.
        """
        if self.place is None:
            return
        trunk, log = Trunk(self.adapters, 1.0, self._autocast), self.job.output_dir / SERVER_LOG
        roles, most = [] if self.role is None else [self.role], self.settings.max_new_tokens
        server, probe = open_server(self.place, trunk, roles, prompts.ids, most, log, self.these)

        def check(folder: Path, name: str) -> None:
            if probe is not None:
                probe.look_at(server, name, Processes(), POLICY)

        self.served = FinishedPolicies(server, check)

    def close(self) -> None:
        """End a server that was started for this."""
        if self.served is not None:
            self.served.close()

    def _autocast(self) -> Any:
        """Of the forwards that score: as in training, and as the evaluation scores."""
        low = self.job.torch_dtype() in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.job.torch_dtype() if low else None, enabled=low)

    def replies(self, prompts: Prompts, first: int, on_batch: Callable[[int], None]) -> list[list[Reply]]:
        """Of each of these prompts, drawn and scored. What is drawn goes by the prompt's place and the reply's alone.

        Args:
            first: the place of the first of them among all prompts.
        """
        n = self.settings.n
        each = prompts.take([place for place in range(len(prompts)) for _ in range(n)])
        seeds = [seed_of(self.job.seed, "sample", first + i // n, i % n) for i in range(len(each))]
        release_free_memory()
        generation = self._drawn(each.ids, seeds, on_batch)
        release_free_memory()
        if not len(prompts):
            self.scorer.score_none()
            return []
        texts = decode(self.tokenizer, generation.tokens)
        scores = self._scores(Replies(each.prompts, texts, each.column_lists(), each.ids, generation.tokens, each.rows))
        drawn = [
            Reply(i % n, texts[i], scores[i], len(generation.tokens[i]), generation.finished[i])
            for i in range(len(each))
        ]
        return [drawn[start : start + n] for start in range(0, len(drawn), n)]

    def _drawn(self, ids: Sequence[list[int]], seeds: Sequence[int], on_batch: Callable[[int], None]) -> Generation:
        """A reply to each prompt, by this process or by a server; all processes ask it, and the first one for all."""
        settings, ends = self.settings, end_token_ids(self.tokenizer, self.adapters.model)
        if self.served is not None:
            draw = Draw(settings.max_new_tokens, tuple(ends), settings.temperature, settings.top_k, settings.top_p)
            parts = self.these.gathered([list(zip(ids, seeds, strict=True))])
            rows, before = [row for part in parts for row in part], sum(map(len, parts[: self.these.rank]))
            asked = [list(row) for row, _ in rows], [seed for _, seed in rows]
            policies = self.served

            def heard(done: int) -> None:
                on_batch(done // self.these.count)

            whole = self.these.by_first(lambda: policies.sample(self.job.parent, *asked, draw, heard))
            part = slice(before, before + len(ids))
            return Generation(whole.tokens[part], whole.logprobs[part], whole.finished[part])
        if not ids:
            return Generation([], [], [])
        pad = ends[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return sample(
            self.adapters,
            self.role,
            ids,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos_token_id=ends,
            pad_token_id=pad,
            seed=seeds,
            batch_size=settings.batch_size,
            recompute=True,
            on_batch=on_batch,
        )

    def _scores(self, replies: Replies) -> list[float | None]:
        """Of the sources together; None where none has one."""
        scores_B, parts_SB = self.scorer.scores(replies)
        unscored = parts_SB.isnan().all(0).tolist()
        if not bool(scores_B.isfinite().all()):
            said = "gave a score that is not finite"
            raise UserError(f"stages.{self.job.name}.reward", said, "look at the reward stage, the model or its input")
        return [None if none else score for score, none in zip(scores_B.tolist(), unscored, strict=True)]


def _draw(job: StageJob, sampler: _Sampler, prompts: Prompts, before: Sequence[Piece], teller: Teller) -> list[Piece]:
    """The pieces that are still to come, each kept as soon as it is there, and told to the trackers.

    Raises:
        Stopped: a signal asked for it; the pieces so far are kept.
    """
    these, total, n = sampler.these, len(prompts), sampler.settings.n
    done = before[-1].end if before else 0
    most = _prompts_a_piece(job, sampler.settings, total, sampler.device.type)
    began, began_at, found = time.monotonic(), done, list[Piece]()
    _log(job, before, these)
    reset_peak_memory()
    # several processes leave off together, between two pieces
    meter = Meter(f"{job.name}: replies", total * n, begun=done * n, stoppable=these.count == 1)
    try:
        while done < total:
            if these.rank == 0:
                write_step(job.output_dir / PROGRESS, done, total, began_at, time.monotonic() - began)
            started, size = time.monotonic(), min(most, total - done)
            own = these.share(size)
            part, so_far = prompts.take([done + place for place in own]), done * n

            def heard(count: int, so_far: int = so_far) -> None:
                meter(so_far + count * these.count)

            with stopping.interruptible() if these.count == 1 else nullcontext():
                replies = these.gathered(sampler.replies(part, done + own.start, heard))
                piece = Piece(done, replies, time.monotonic() - started)
                if these.rank == 0:
                    keep_piece(job.output_dir / CHECKPOINTS, piece)
                found.append(piece)
                done = piece.end
            _log(job, [*before, *found], these)
            teller.tell(done, _log_row(piece))
            if (number := these.asked_to_stop()) is not None and done < total:
                raise stopping.Stopped(number)
    except stopping.Stopped as stopped:
        words = f"{job.name}: {stopping.Stopped(stopped.number)} after prompt {done} of {total}"
        raise stopping.Stopped(stopped.number, words) from None
    finally:
        meter.close()
    return found


def _prompts_a_piece(job: StageJob, settings: SampleSettings, prompts: int, device: str) -> int:
    """So many prompts are answered between two savings: the recipe's share of them, but whole batches."""
    share = job.checkpoints.share
    wanted = prompts if share is None else round(share * prompts)
    least = math.ceil((settings.batch_size or 32) / settings.n)
    return max(1, min(_REPLIES_A_PIECE.get(device, 8192) // settings.n, max(wanted, least)))


def _log(job: StageJob, pieces: Sequence[Piece], these: Processes) -> None:
    """log.jsonl: a line a piece."""
    if these.rank:
        return
    lines = [json.dumps({"step": piece.end, **_log_row(piece)}) + "\n" for piece in pieces]
    write_whole(job.output_dir / LOG, "".join(lines))


def _log_row(piece: Piece) -> dict[str, float | None]:
    """Of a piece's replies, under the names of on-policy stages."""
    replies = [reply for each in piece.replies for reply in each]
    return {
        "objective/scores": mean(reply.score for reply in replies),
        "rollout/length": mean(reply.length for reply in replies),
        "rollout/eos_rate": mean(reply.finished for reply in replies),
    }


def _metrics(
    job: StageJob, settings: SampleSettings, data: StageData, pieces: Sequence[Piece], kept: Sequence[Kept]
) -> dict[str, Any]:
    """What was drawn and what of it was kept, in numbers.

    Raises:
        UserError: nothing was kept.
    """
    drawn = [reply for piece in pieces for each in piece.replies for reply in each]
    rows, left_out = sum(len(each.rows) for each in kept), sum((each.left_out for each in kept), Counter[str]())
    if not rows:
        said = f"keeps no row of {len(kept)} prompts ({_listed(left_out)})"
        remedy = "look at the reward, or draw more and other replies: n, temperature, max_new_tokens"
        raise UserError(f"stages.{job.name}", said, remedy)
    seconds = max(sum(piece.seconds for piece in pieces), 1e-9)
    tokens = sum(reply.length for reply in drawn)
    found: dict[str, Any] = {
        "train_seconds": seconds,
        "examples_per_second": len(drawn) / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "prompts": len(kept),
        "replies": len(drawn),
        "rows": rows,
        "score": mean(reply.score for reply in drawn),
        "length": tokens / len(drawn),
        "eos_rate": mean(reply.finished for reply in drawn),
    }
    sides = ("chosen", "rejected") if settings.keep == BEST_WORST else ("kept",)
    for place, side in enumerate(sides):
        those = [each.replies[place::2] if len(sides) == 2 else each.replies for each in kept]
        found[f"score_{side}"] = mean(reply.score for each in those for reply in each)
        found[f"length_{side}"] = mean(reply.length for each in those for reply in each)
    metrics = plain({**found, "left_out": dict(left_out), "data": data.report})
    say(f"{job.name}: {rows} rows of {len(drawn)} replies to {len(kept)} prompts{_in_words(left_out)}")
    return metrics


def _in_words(left_out: Counter[str]) -> str:
    return f"; left out: {_listed(left_out)}" if left_out else ""


def _listed(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())


def _write(
    job: StageJob,
    settings: SampleSettings,
    tokenizer: PreTrainedTokenizerBase,
    data: StageData,
    kept: Sequence[Kept],
    metrics: dict[str, Any],
    more: dict[str, Any],
) -> None:
    """The rows, metrics.json, and last of all lineage.json."""
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for each in kept for row in each.rows]
    file = write_whole(job.output_dir / ROWS, "".join(lines))
    write_whole(job.output_dir / METRICS, json.dumps(metrics, indent=2) + "\n")
    stages = [Path(str(source.target)) for source in job.rewards if source.kind == "stage"]
    folders = [folder for folder in (job.parent, *stages) if folder is not None]
    policy = {"stage": "base", "sha256": job.base.sha256} if job.parent is None else None
    config = {
        "dtype": job.dtype,
        "quantization": job.quantization,
        "method": dataclasses.asdict(settings),
        "policy": policy or parent_entry(folders[0], job.output_dir),
        "rewards": [_reward_entry(source) for source in job.rewards],
        "rows": {
            "file": ROWS,
            "sha256": sha256_of(file),
            "rows": len(lines),
            "read_as": job.record.row_kinds(job.method),
        },
        **more,
    }
    spec = plain(dataclasses.asdict(job.data))
    lineage = Lineage(
        stage=job.name,
        kind=job.record.name,
        base=base_info(job.base),
        tokenizer=tokenizer_info(tokenizer),
        parents=[parent_entry(each, job.output_dir) for each in folders],
        config=plain(config),
        data={"spec": spec, "fingerprint": data.fingerprint, "rows": len(data.train)},
        seed=job.seed,
        versions=library_versions(job.quantization),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=metrics["train_seconds"],
    )
    write_lineage(job.output_dir, lineage)
    clear_checkpoints(job)


def _reward_entry(source: RewardSource) -> dict[str, Any]:
    """A source of scores, with the hash of what it is: an adapter, a model's files, the code of a function."""
    target = str(source.target)
    if source.kind == "stage":
        return {"stage": Path(target).name, "weight": source.weight, "sha256": adapter_sha256(Path(target))}
    if source.kind == "function":
        found = code_sha256(target) if isinstance(source.target, str) else None
    else:
        found = folder_sha256(Path(target)) if Path(target).is_dir() else None
    return {**source.as_dict(), "sha256": found}
