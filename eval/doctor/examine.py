"""The examination of a run: every check of every stage, in running order."""

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...data.load import load_rows
from ...data.rows import Row
from ...errors import UserError
from ...files import DOCTOR, write_whole
from ...models.fingerprints import content
from ...models.tokens import load_tokenizer
from ...stages.job import StageJob
from ..spec import BASE, EvalSpec
from ..workbench import Workbench
from .finding import Finding
from .identity_checks import check_data, check_files, check_use
from .measure_files import file_findings
from .measure_policies import policy_findings
from .measure_reward_models import Demos, read_demos, reward_role, score_findings, sft_findings
from .records import Record, read_record

_FORMAT = 1
_NO_MEASURE = ("base", "template", "tokenizer", "pad and eos")
"""A stage that is broken in these reads other ids than the base's tokenizer makes, and cannot be measured with it."""


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """What is to be examined.

    Attributes:
        run_dir: the run folder.
        jobs: the recipe's stages in running order, each with its folder in the run as `output_dir`.
        evaluation: base, prompts, budget, temperature and seed of the samples; its policies and judges are not read.
        elsewhere: stages that were started from an adapter outside the run.
        unused: stages that the others are made to come from, or to be scored by, and that nothing uses.
        samples: replies drawn from each policy at most.
    """

    run_dir: Path
    jobs: tuple[StageJob, ...]
    evaluation: EvalSpec
    elsewhere: Collection[str] = ()
    unused: Collection[str] = ()
    samples: int = 64

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError("--samples", f"is {self.samples}, expected 1 or more", "leave it out for 64")


@dataclass(frozen=True)
class Examination:
    """Findings in running order, and a line for each check that could not be made."""

    findings: list[Finding]
    left_out: list[str]


def examine(checkup: Checkup) -> Examination:
    """Make every check for which there is what it needs. Writes nothing.

    Raises:
        UserError: the run holds no stage at all; data or a base cannot be read.
    """
    run = _Run(checkup)
    # what is said of a stage is said of the adapter that lies there now, and not of one trained later
    adapters = {name: content(record.folder) for name, record in run.records.items() if record.lineage is not None}
    findings = [replace(each, adapter=adapters.get(each.stage)) for each in run.findings()]
    places = {job.name: place for place, job in enumerate(checkup.jobs)}
    return Examination(sorted(findings, key=lambda each: places[each.stage]), run.left_out)


def write_examination(run_dir: Path, examination: Examination) -> Path:
    """Write RUN/doctor.json whole: format, created, findings, left_out. Returns its path."""
    content: dict[str, Any] = {
        "format": _FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "findings": [each.as_dict() for each in examination.findings],
        "left_out": examination.left_out,
    }
    return write_whole(run_dir / DOCTOR, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


class _Run:
    """One examination under way."""

    def __init__(self, checkup: Checkup) -> None:
        self.checkup = checkup
        self.left_out: list[str] = []
        self.records = {job.name: read_record(job, checkup.run_dir) for job in checkup.jobs}
        if not any(record.lineage or record.log or record.damage for record in self.records.values()):
            raise UserError(
                str(checkup.run_dir),
                "holds no stage, finished or begun",
                "run the recipe first, or give another folder",
            )
        self.data: dict[str, tuple[list[Row], bool]] = {}
        self.demos: dict[str, Demos] = {}

    def findings(self) -> Iterator[Finding]:
        # 1. what needs no model
        evaluation = self.checkup.evaluation
        tokenizer = load_tokenizer(evaluation.base, evaluation.chat_template, evaluation.template_date)
        ill: set[str] = set()
        for name, record in self.records.items():
            if record.damage is not None:
                yield check_files(name, record.damage)
            elif record.lineage is None:
                self.left_out.append(
                    f"{name}: not finished, {'only its log is looked at' if record.log else 'its checks are left out'}"
                )
            for found in file_findings(record, evaluation.base, tokenizer, self.checkup.elsewhere, self.left_out):
                if found.level == "broken" and (found.check in _NO_MEASURE or not math.isfinite(found.measured)):
                    ill.add(name)
                yield found
            yield from self._data(record)
            if name in self.checkup.unused:
                yield check_use(name)
        # 2. what needs one
        sound = [record for name, record in self.records.items() if record.lineage is not None and name not in ill]
        ill |= {name for name, record in self.records.items() if record.damage is not None}
        self.left_out += [f"{name}: not measured, for what is broken in it" for name in self.records if name in ill]
        if sound:
            yield from self._measured(sound)

    def _measured(self, records: list[Record]) -> Iterator[Finding]:
        policies = {record.name: record.folder for record in records if record.is_policy}
        bench = Workbench.open(
            replace(self.checkup.evaluation, policies={BASE: None, **policies}, reference=BASE, judges=())
        )
        prompts = bench.prompts()[: self.checkup.samples]
        for record in records:
            if record.is_policy:
                replies = bench.samples(record.name, prompts)
                yield from policy_findings(bench, record, replies, self._expected(bench, record), self.left_out)
            elif record.job.record.adapts:
                yield from self._rewards(bench, record)
            elif record.job.full:
                self.left_out.append(
                    f"{record.name}: its weights are not measured, which are no adapter's (full: true)"
                )

    def _data(self, record: Record) -> Iterator[Finding]:
        """Reads the stage's rows, and says whether they are still those that it was trained on."""
        if record.lineage is None:
            return
        try:
            loaded = load_rows(record.data(), record.job.rows, record.job.folders)
        except UserError as error:
            self.left_out.append(f"{record.name}, data: cannot be read any more ({error.where}: {error.problem})")
            return
        found = check_data(record.name, record.lineage.data["fingerprint"], loaded.fingerprint)
        self.data[record.name] = loaded.rows, found.level == "OK"
        yield found

    def _rewards(self, bench: Workbench, record: Record) -> Iterator[Finding]:
        bench.adapters.load(reward_role(record.name), record.folder)
        if reward_role(record.name) not in bench.adapters.heads:
            self.left_out.append(f"{record.name}: no scores without a score head")
            return
        if record.name in self.data:
            rows, unchanged = self.data[record.name]
            try:
                yield from score_findings(bench, record, rows, unchanged, self.left_out)
            except UserError as error:
                self.left_out.append(f"{record.name}, accuracy and length: no pairs ({error.where}: {error.problem})")
        sft = self._sft_of(record)
        if sft is None or sft.name not in bench.roles:
            self.left_out.append(f"{record.name}, reward of SFT samples: no SFT stage to sample from")
            return
        demos = self._demos(bench, sft)
        yield from sft_findings(bench, record, sft.name, demos, self.checkup.samples, self.left_out)

    def _expected(self, bench: Workbench, record: Record) -> float | None:
        """The demonstrations' share of replies within the budget, by the SFT stage that the policy comes from."""
        sft = self._sft_of(record)
        return None if sft is None else self._demos(bench, sft).share_within(bench.spec.max_new_tokens)

    def _sft_of(self, record: Record) -> Record | None:
        """The stage itself or its nearest SFT ancestor; of a stage without one, the run's first SFT stage."""
        above: Record | None = record
        while above is not None and above.job.record.rows != "demo":
            above = None if above.job.parent is None else self.records.get(above.job.parent.name)
        first = (each for each in self.records.values() if each.job.record.rows == "demo" and each.lineage is not None)
        return above or next(first, None)

    def _demos(self, bench: Workbench, sft: Record) -> Demos:
        if sft.name not in self.demos:
            rows, _ = self.data.get(sft.name, ([], False))
            self.demos[sft.name] = read_demos(sft, rows, bench.tokenizer)
        return self.demos[sft.name]
