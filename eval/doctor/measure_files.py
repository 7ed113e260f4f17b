"""The checks that need no model: identities, logs, saved weights."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...data.template import Templater
from ...errors import UserError
from ...files import LINEAGE
from ...models.auto import open_tokenizer
from ...models.base import Base
from ...models.lineage import adapter_sha256, read_lineage, tokenizer_info
from ...models.lora import WEIGHTS, read_tensors
from ...models.quiet import quiet_transformers
from ...stages.ppo.off_policy import STALENESS
from ...stages.ppo.update import sampler_tolerance
from ..spec import BASE
from .finding import Finding
from .identity_checks import check_base, check_bos, check_parent, check_tokenizer
from .log_checks import (
    TREND_ITERATIONS,
    check_divergence,
    check_entropy_trend,
    check_first_step,
    check_kl_trend,
    check_ppo_start,
    check_rows,
    check_sampler,
    first_step_tolerance,
)
from .policy_checks import check_parent_kept, check_trained
from .records import Record, lora_change, lost_rows, score_weight, series
from .reward_model_checks import check_score_head

_PROBE = [{"role": "user", "content": "Hello"}]
_TEXTS = ["Hello, world", " two  spaces\n\tand a tab", "x = 12345.67; naïve – 日本語 🙂", "I'LL don't"]
"""Case, digits, white space and other scripts: where tokenizers part ways."""


def file_findings(
    record: Record, base: Base, tokenizer: Any, elsewhere: Collection[str], left_out: list[str]
) -> Iterator[Finding]:
    """All of them for one stage.

    Args:
        tokenizer: the base's, with the recipe's template.
        elsewhere: stages that were started from an adapter outside the run (--from-adapter).
        left_out: gets a line for every check that could not be made.
    """
    if record.lineage is not None or record.log:
        yield from log_findings(record, left_out)
    if record.lineage is None:
        return
    yield check_base(record.name, record.lineage.base, base.sha256)
    yield from _tokenizers(record, tokenizer, left_out)
    yield from _parents(record, elsewhere, left_out)
    if record.job.record.adapts and record.job.record.produces == "reward":
        yield check_score_head(record.name, *score_weight(record))


def log_findings(record: Record, left_out: list[str]) -> Iterator[Finding]:
    """What log.jsonl and metrics.json tell."""
    name, start = record.name, record.start()
    if record.job.record.needs_reference and not record.job.record.needs_reward:
        gap = _first_gap(record)
        if record.dropout() > 0:
            left_out.append(f"{name}, first step: LoRA dropout is on, so policy and reference differ from the start")
        elif gap is None:
            left_out.append(f"{name}, first step: its log says nothing of step 1")
        else:
            yield check_first_step(name, *gap, start=start)
    if record.job.record.on_policy is not None:
        yield from _ppo(record, left_out)
    if (rows := lost_rows(record.metrics)) is not None:
        yield check_rows(name, *rows)


def _first_gap(record: Record) -> tuple[float, float] | None:
    """(largest |log pi - log pi_ref| of a side at step 1 in nats, what rounding may make of it)."""
    row = next((row for row in record.log if "loss" in row or "rewards/margins" in row), None)
    beta = float(record.setting("beta", record.job.record.parameter("beta").default))
    if row is None or row.get("step") != 1 or beta == 0:
        return None
    sides = [side for side in ("chosen", "rejected") if isinstance(row.get(f"rewards/{side}"), int | float)]
    if not sides:
        return None
    gap = max(abs(row[f"rewards/{side}"]) for side in sides) / beta
    logp = max(abs(row.get(f"logps/{side}") or 0.0) for side in sides)
    return gap, first_step_tolerance(logp, low_precision=record.low_precision())


def _ppo(record: Record, left_out: list[str]) -> Iterator[Finding]:
    name = record.name
    lengths, episodes = series(record.log, "rollout/length", "episode")
    kls, kl_lengths = series(record.log, "objective/kl", "rollout/length")
    if not lengths:
        left_out.append(f"{name}: nothing is logged yet")
        return
    batch = record.setting("rollout_batch_size", record.job.record.parameter("rollout_batch_size").default)
    if not kls and not record.job.record.needs_reference:
        pass  # there is no reference
    elif not kls:
        left_out.append(f"{name}, KL: beta is 0, and none is measured")
    elif episodes[0] <= batch:
        low = record.low_precision()
        yield check_ppo_start(name, kls[0], lengths[0], start=record.start(), low_precision=low)
    else:
        left_out.append(f"{name}, first step: its log does not begin at the first iteration")
    yield from _sampler(record)
    (entropies,) = series(record.log, "rollout/entropy_per_token")
    if len(lengths) < TREND_ITERATIONS or len(entropies) < TREND_ITERATIONS:
        left_out.append(f"{name}, trends of KL and entropy: {len(lengths)} iterations, fewer than {TREND_ITERATIONS}")
        return
    if kls:
        yield check_kl_trend(name, kls, kl_lengths)
    if (
        record.job.record.needs_teacher
        and len(losses := series(record.log, "loss", "rollout/length")[0]) >= TREND_ITERATIONS
    ):
        yield check_divergence(name, losses)
    yield check_entropy_trend(name, entropies)


def _sampler(record: Record) -> Iterator[Finding]:
    """The sampler's log-probs against the trainer's, where both are to be the same policy's."""
    keys = ("rollout/logprob_mismatch_mean", "rollout/sampler_kl")
    means, kls = series(record.log, *keys)
    asked, served = record.setting("mismatch_tolerance", None), record.setting("rollout_engine", None)
    if asked is None and record.setting("rollout_ahead", 0):
        means, kls, ages = series(record.log, *keys, STALENESS)
        means, kls = ([x for x, age in zip(each, ages, strict=True) if not age] for each in (means, kls))
    if means:
        low = record.low_precision() or served is not None
        yield check_sampler(record.name, means, kls, sampler_tolerance(asked, low_precision=low))


def _tokenizers(record: Record, tokenizer: Any, left_out: list[str]) -> Iterator[Finding]:
    """The stage against its parents, the base with the recipe's template, and the files beside its adapter."""
    assert record.lineage is not None
    others = {"the base with the recipe's template": tokenizer_info(tokenizer)}
    for folder in _parent_folders(record):
        if (folder / LINEAGE).is_file():
            with suppress(UserError):  # the parent's own finding
                others[folder.name] = read_lineage(folder).tokenizer
    if not record.job.record.trains:
        yield from check_tokenizer(record.name, record.lineage.tokenizer, others)
        return
    if not (record.folder / "tokenizer_config.json").is_file():
        yield from check_tokenizer(record.name, record.lineage.tokenizer, others)
        left_out.append(f"{record.name}, bos: no tokenizer lies beside its adapter")
        return
    try:
        with quiet_transformers():
            saved = open_tokenizer(record.folder, str(record.folder))
    except UserError as error:  # of an earlier version, whose files carry no hash
        left_out.append(f"{record.name}, tokenizer beside its adapter: {error.problem}")
        return
    others["the tokenizer beside its adapter"] = _saved_info(saved, tokenizer)
    yield from check_tokenizer(record.name, record.lineage.tokenizer, others)
    yield check_bos(record.name, _leading_bos(saved), token=saved.bos_token, base_token=tokenizer.bos_token)


def _saved_info(saved: Any, tokenizer: Any) -> dict[str, Any]:
    """The `tokenizer` entry of a saved tokenizer; reloaded, the same rules may stand in other words than before."""
    info, original = tokenizer_info(saved), tokenizer_info(tokenizer)
    if saved.get_vocab() == tokenizer.get_vocab() and saved(_TEXTS)["input_ids"] == tokenizer(_TEXTS)["input_ids"]:
        info["sha256"] = original["sha256"]
    return info


def _leading_bos(tokenizer: Any) -> int:
    """BOS before a prompt in the way in which others encode one: template, then ids without further specials."""
    templater = Templater(tokenizer)
    text = templater.text(_PROBE, None, generation_prompt=True)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return next((place for place, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))


def _parents(record: Record, elsewhere: Collection[str], left_out: list[str]) -> Iterator[Finding]:
    """What lies in the parents' folders against what the stage was made from."""
    assert record.lineage is not None
    name, job = record.name, record.job
    folders = _parent_folders(record)
    if name in elsewhere:
        left_out.append(f"{name}, parents: started with --from-adapter, outside this run")
        if not job.record.adapts:
            return
        yield check_trained(name, lora_change(record.tensors(), None)[0], start=BASE)
        return
    recorded = {each["stage"]: each["sha256"] for each in record.lineage.parents}
    same = True
    for folder in folders:
        if folder.name not in recorded or not (folder / WEIGHTS).is_file():
            left_out.append(f"{name}, parent {folder.name}: gone, or not what it was made from")
            same = False
            continue
        try:
            there = adapter_sha256(folder)
        except UserError:
            left_out.append(f"{name}, parent {folder.name}: damaged")
            same = False
            continue
        found = check_parent(name, folder.name, recorded[folder.name], there)
        same &= found.level == "OK" or folder != job.parent
        yield found
    if not job.record.adapts:
        return
    if job.parent is None:
        yield check_trained(name, lora_change(record.tensors(), None)[0], start=BASE)
    elif same:
        change, kept = lora_change(record.tensors(), read_tensors(job.parent / WEIGHTS))
        yield check_trained(name, change, start=job.parent.name)
        if kept is not None:
            yield check_parent_kept(name, kept, parent=job.parent.name)


def _parent_folders(record: Record) -> Sequence[Path]:
    """The adapters that the stage needs by the recipe: the one it starts from, then the reward stages of PPO, then the
    teacher."""
    job = record.job
    rewards = [Path(str(source.target)) for source in job.rewards if source.kind == "stage"]
    teacher = [] if job.teacher is None or job.teacher.adapter is None else [job.teacher.adapter]
    return list(dict.fromkeys(([] if job.parent is None else [job.parent]) + rewards + teacher))
