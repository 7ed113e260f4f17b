"""Trackers that show a run's curves beside our files: TensorBoard, Trackio and Weights & Biases.

One run of a tracker a stage, and one the evaluation; those of one chain have its name as their group. A stage that
continues goes on in its tracker's run, and tells no row twice. The package of a tracker is imported where it is used.
"""

import contextlib
import importlib
import importlib.util
import json
import netrc
import os
import secrets
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import rewrite_logs

from ..errors import UserError, nearest
from ..files import LOG, LOGS, read_json_lines, write_whole
from ..progress import say
from ..values import is_finite, plain
from .job import StageJob, Trackers

MODULES = {
    "azure_ml": "azureml",
    "flyte": "flytekit",
    **{
        name: name
        for name in (
            *("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow", "mlflow", "neptune", "swanlab"),
            *("tensorboard", "trackio", "wandb"),
        )
    },
}
"""What can be reported to -> the module that it needs. All but the last three are Transformers' own callbacks."""

TOLD = "tracked.json"
"""Beside the event files: the tracker's run, and up to which row it was told."""


class Writer(Protocol):
    """One run of a tracker."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


def reporting(job: StageJob) -> tuple[list[str], list[str]]:
    """Whom a stage reports to: (trackers written to here, others that Transformers writes to).

    What `train: {report_to: ...}` says holds for the stage, else the recipe's `trackers`.
    """
    said = job.train.get("report_to")
    names = list(job.trackers.names) if said is None else [said] if isinstance(said, str) else list(said)
    if names == ["all"]:
        names = [name for name, module in MODULES.items() if _installed(module)]
    names = [name for name in dict.fromkeys(names) if name != "none"]
    return [name for name in names if name in _WRITERS], [name for name in names if name not in _WRITERS]


def writes(name: str) -> bool:
    """Whether `open_writer` knows that tracker."""
    return name in _WRITERS


def tracker_problem(name: str, where: str, *, space: str | None = None) -> UserError | None:
    """Why nothing could be reported to it, found without a network; None where nothing speaks against it.

    Args:
        where: the key that names it. space: of Trackio on the Hub, where the recipe names one.
    """
    if name not in MODULES:
        return UserError(where, f"{name!r} is no tracker", nearest(name, MODULES))
    if not (_installed(MODULES[name]) or (name == "tensorboard" and _installed("tensorboardX"))):
        return UserError(where, f"{name} is not installed", f"pip install {MODULES[name]}")
    if name == "wandb" and (said := _wandb_problem()) is not None:
        return UserError(where, said, "run `wandb login`, or set WANDB_MODE=offline")
    if name == "trackio" and (space or os.environ.get("TRACKIO_SPACE_ID")):
        from huggingface_hub import get_token

        if get_token() is None:
            space = space or os.environ["TRACKIO_SPACE_ID"]
            said = f"trackio is to write to the Space {space}, and nobody is logged in"
            return UserError(where, said, "run `hf auth login`, or leave the Space out")
    return None


def open_writer(
    name: str,
    folder: Path,
    trackers: Trackers,
    run: str,
    *,
    identity: str,
    config: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> Writer:
    """Begin, or continue, a run of a tracker.

    Args:
        folder: where TensorBoard's event files go.
        run: how people know it. identity: tells it from an earlier one of that name; the same again continues it.
        config: what it was made with. settings: the stage's `train`, for the words there that are a tracker's.

    Raises:
        UserError: the tracker refuses.
    """
    try:
        return _WRITERS[name](folder, trackers, run, identity, plain(dict(config)), settings or {})
    except Exception as error:  # each library refuses in its own ways
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"trackers: {name}", f"cannot be reported to ({said})", "correct it, or leave it out"
        ) from error


class Teller:
    """One stage's runs of its trackers: each row is told once, also by a stage that goes on."""

    def __init__(self, job: StageJob) -> None:
        self.job = job
        self.names, self.others = reporting(job)
        self.folder = job.output_dir / LOGS
        self.writers: list[Writer] = []
        self._identity = ""
        self._told = self._at = (-1, 0)
        """(a step, how many rows of it), up to which the trackers were told, and where the log stands."""

    def begin(self, steps: Iterable[int] = ()) -> None:
        """Open the runs, or continue them.

        Args:
            steps: of the rows that the log has already, in their order.

        Raises:
            UserError: a tracker refuses.
        """
        if not self.names:
            return
        for step in steps:
            self._count(step)
        try:
            known = json.loads((self.folder / TOLD).read_text(encoding="utf-8"))
            self._identity, self._told = str(known["run"]), (int(known["step"]), int(known["rows"]))
        except (OSError, ValueError, KeyError, TypeError):
            self._identity = secrets.token_hex(4)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note()
        for name in self.names:
            self.writers.append(
                open_writer(
                    name,
                    self.folder,
                    self.job.trackers,
                    str(self.job.train.get("run_name") or self.job.name),
                    identity=self._identity,
                    config=_config(self.job),
                    settings=self.job.train,
                )
            )

    def tell(self, step: int, logs: Mapping[str, Any]) -> None:
        """Tell a row of the log, unless they know it; what is no finite number in it is left out."""
        if not self.writers:
            return
        self._count(step)
        if self._at <= self._told:
            return
        values = {key: float(value) for key, value in rewrite_logs(dict(logs)).items() if is_finite(value)}
        for writer in self.writers:
            writer.write(step, values)
        self._told = self._at
        self._note()

    def close(self, failed: bool) -> None:
        """Once nothing is logged any more."""
        for writer in self.writers:
            writer.close(failed)
        self.writers = []

    def _count(self, step: int) -> None:
        self._at = (step, self._at[1] + 1 if self._at[0] == step else 1)

    def _note(self) -> None:
        row = {"run": self._identity, "step": self._told[0], "rows": self._told[1]}
        write_whole(self.folder / TOLD, json.dumps(row) + "\n")


class Tracking(Teller, TrainerCallback):
    """Tells the stage's trackers each row that log.jsonl gets; only the first process does.

    A stage that goes on from a checkpoint computes rows again that they have: those are left out.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.is_world_process_zero:
            self.begin(int(row["step"]) for row in read_json_lines(self.job.output_dir / LOG))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        if logs is not None:
            self.tell(state.global_step, logs)


@contextlib.contextmanager
def closing_trackers(trainer: Any) -> Generator[None]:
    """Within it a trainer logs; at its end its trackers' runs are closed, as failed where it raises."""
    with _closing([each for each in trainer.callback_handler.callbacks if isinstance(each, Tracking)]):
        yield


@contextlib.contextmanager
def telling(job: StageJob, *, first: bool) -> Generator[Teller]:
    """What tells the trackers of a stage that has no trainer; their runs are closed at its end.

    Args:
        first: whether this is the first process; the others tell nothing.

    Raises:
        UserError: a tracker refuses.
    """
    teller = Teller(job)
    if first:
        teller.begin()
        if teller.others:
            said = "told of stages that train alone: only tensorboard, trackio and wandb of what is sampled"
            say(f"{job.name}: {', '.join(teller.others)}: {said}")
    with _closing([teller]):
        yield teller


@contextlib.contextmanager
def _closing(tellers: Sequence[Teller]) -> Generator[None]:
    try:
        yield
    except BaseException:
        for each in tellers:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                each.close(failed=True)
        raise
    for each in tellers:
        each.close(failed=False)


class _TensorBoard:
    def __init__(
        self, folder: Path, trackers: Trackers, run: str, identity: str, config: dict[str, Any], settings: Any
    ) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            module = importlib.import_module("tensorboardX")
        self._writer = module.SummaryWriter(log_dir=str(folder))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Trackio:
    def __init__(
        self, folder: Path, trackers: Trackers, run: str, identity: str, config: dict[str, Any], settings: Any
    ) -> None:
        trackio = importlib.import_module("trackio")
        given = {
            "space_id": settings.get("trackio_space_id"),
            "bucket_id": settings.get("trackio_bucket_id"),
        }
        with contextlib.redirect_stdout(sys.stderr):  # ours is for results
            self._run = trackio.init(
                project=settings.get("project") or trackers.project,
                # it knows a run by its name alone
                name=f"{run}-{identity}",
                group=trackers.group,
                config=config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
                **{key: value for key, value in given.items() if value is not None},
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "train/global_step": step}, step=step)

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class _Wandb:
    def __init__(
        self, folder: Path, trackers: Trackers, run: str, identity: str, config: dict[str, Any], settings: Any
    ) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or settings.get("project") or trackers.project,
            group=os.environ.get("WANDB_RUN_GROUP") or trackers.group,
            name=run,
            id=identity,
            resume="allow",
            config=config,
            reinit="create_new",
            settings=wandb.Settings(console="off", save_code=False),
        )
        # as transformers' callback has it, so that curves of both lie over one another
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "train/global_step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


_WRITERS: Mapping[str, Any] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _Wandb}


def _config(job: StageJob) -> dict[str, Any]:
    """What a stage was made with, for a tracker's table of runs. No path of this machine, and no credential."""
    own = ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    return {
        "kind": job.record.name,
        "base": job.base.spec,
        "dtype": job.dtype,
        "seed": job.seed,
        "data": job.data_name,
        **({f"lora.{key}": value for key, value in vars(job.lora).items()} if job.record.adapts else {}),
        **({"full": True} if job.full else {}),
        **{each.name: job.method_value(each.name) for each in job.record.parameters},
        **{f"train.{key}": value for key, value in {**job.record.defaults, **job.train}.items() if key not in own},
    }


def _wandb_problem() -> str | None:
    """Why it would not let us in, by what lies on this machine."""
    settings = importlib.import_module("wandb").setup().settings
    if settings.mode in ("offline", "disabled", "dryrun") or settings.api_key or settings.identity_token_file:
        return None
    host = urlparse(str(settings.base_url)).hostname or ""
    for file in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(Path(file).expanduser()).authenticators(host) is not None:
                return None
    return f"nobody is logged in to wandb at {host}"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
