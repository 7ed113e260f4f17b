"""`preftune join`: a further machine of a run. It follows what the first one says, and runs its share of each step."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import own_code, stopping
from ..errors import UserError
from ..files import EVALUATION, RECIPE
from ..progress import say
from ..recipes.graph import parents
from ..stopping import Stopped
from .folder import RunFolder
from .keys import Keys, difference, eval_needs, key_of
from .launch import Share, alike, check_launch, machines_of, run_share
from .machines import (
    BEAT,
    CALLS,
    DONE,
    ENDED,
    FOLLOWS,
    LEFT,
    LOOK,
    LOST,
    OVER,
    READY,
    STARTS,
    STOPPED,
    WAIT,
    Board,
    Machines,
    Other,
)
from .process import StageFailed, make_functions_importable, quiet_libraries

_OLD = 60.0
"""Seconds after which a run that was over before this machine came is not taken to begin again."""


def join_run(run_dir: Path, config: Path) -> int:
    """Take part in a run until it is over; returns 0 where it is done.

    Raises:
        UserError: a config with which this machine cannot take part, or another one than the first machine's; other
            versions than there; another machine has its rank.
        StageFailed: the run failed, or the first machine does not come.
        Stopped: a signal stopped this machine, or the run.
    """
    check_launch(config)
    machines = machines_of(config, joins=True)
    quiet_libraries()
    return _Follower(run_dir, config, machines).run()


def compare(here: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raise UserError where this machine and the first one differ in what must be alike, `about` of each."""
    for what in ("config", "versions"):
        ours, theirs = here[what], first.get(what, {})
        for name in [*theirs, *ours]:
            if ours.get(name) != theirs.get(name):
                problem = f"{name} is {ours.get(name)} here and {theirs.get(name)} on machine 0"
                remedy = "give all machines the same" + (" but for machine_rank" if what == "config" else "")
                raise UserError("--launch" if what == "config" else "versions", problem, remedy)


def about(config: Path) -> dict[str, Any]:
    """What all machines of a run must have alike."""
    from ..models.lineage import library_versions

    return {"config": alike(config), "versions": library_versions()}


class _Follower:
    def __init__(self, run_dir: Path, config: Path, machines: Machines) -> None:
        self.run_dir, self.config, self.machines = run_dir, config, machines
        self.first = Other(run_dir, 0)
        self.followed = ""
        self.answered: tuple[str, int] = ("", 0)
        self.keys: tuple[str, Keys] | None = None
        self._waiting = ""

    def run(self) -> int:
        self._wait_for_folder()
        self._check_rank()
        with Board(self.run_dir, self.machines.rank, state=FOLLOWS) as self.board:
            try:
                return self._follow()
            finally:
                with suppress(OSError):
                    self.board.say(state=LEFT)

    def _follow(self) -> int:
        while True:
            said = self.first.look()
            if said.get("state") in OVER and (self.first.alive or self._is_old(said)):
                return self._over(said)
            if not self.first.alive or self.first.lost:
                self._wait("is lost, and awaited" if self.followed else "is awaited")
                continue
            if said["id"] != self.followed:
                compare(about(self.config), said["about"])
                self.followed, self._waiting = str(said["id"]), ""
                self.board.say(state=FOLLOWS, follows=self.followed, ended=None)
                say(f"{self.run_dir}: machine {self.machines.rank} of {self.machines.count} takes part")
            call = (self.followed, int(said["attempt"]))
            if said["state"] == CALLS and call != self.answered:
                self.answered = call
                self._answer(said)
            elif said["state"] == STARTS and call == self.answered and self.board.says("state") == READY:
                self._take_part(said)
            else:
                time.sleep(LOOK)

    def _wait_for_folder(self) -> None:
        began = time.monotonic()
        while not self.first.look():
            self._wait("is awaited", time.monotonic() - began)

    def _wait(self, how: str, silent: float | None = None) -> None:
        """A little, for the first machine; says so once."""
        if how != self._waiting:
            self._waiting = how
            say(f"{self.run_dir}: machine 0 {how} (preftune run RECIPE --output-dir {self.run_dir} --launch FILE)")
        if (self.first.silent if silent is None else silent) > WAIT:
            raise StageFailed(f"{self.run_dir}: machine 0 did not come within {WAIT / 60:g} minutes")
        time.sleep(LOOK)

    def _check_rank(self) -> None:
        """Whether another machine that is alive has this one's rank."""
        other = Other(self.run_dir, self.machines.rank)
        began, said = time.monotonic(), other.look()
        while said and said.get("state") != LEFT and time.monotonic() - began < 2 * BEAT:
            said = other.look()
            if other.alive:
                where = f"{said.get('host')}, process {said.get('pid')}"
                problem = f"machine {self.machines.rank} takes part already ({where})"
                raise UserError("--machine-rank", problem, "give every machine its own")
            time.sleep(LOOK)

    def _is_old(self, said: Mapping[str, Any]) -> bool:
        """Whether a run was over before this machine came, and none has begun since."""
        return said["state"] == DONE and self.first.silent > _OLD

    def _over(self, said: Mapping[str, Any]) -> int:
        if said["state"] == DONE:
            say(f"{self.run_dir}: the run is done")
            return 0
        if said["state"] == STOPPED:
            number = int(said["number"])
            raise Stopped(number, f"{self.run_dir}: the run was {Stopped(number)}")
        raise StageFailed(f"{self.run_dir}: the run failed, machine 0 says why")

    def _answer(self, said: Mapping[str, Any]) -> None:
        """Say that this machine is ready for what is called, or what is wrong with it here."""
        attempt = int(said["attempt"])
        try:
            self.machines.reach()
            self._check_work(said)
        except UserError as error:
            self._report(attempt, Share(2, error))
        else:
            self.board.say(state=READY, attempt=attempt, ended=None)

    def _check_work(self, said: Mapping[str, Any]) -> None:
        """Whether this machine would do the same work: the step's key, found from what it sees, is the first one's.

        A shared disk may show late what the first machine wrote, so a difference is looked at for a while.

        Raises:
            UserError: other data, another base, other code; or something of it is not here.
        """
        began = time.monotonic()
        for folder in filter(None, str(said["code"]).split(os.pathsep)):
            if Path(folder).is_dir():
                own_code.look_in([Path(folder)])
        while True:
            stopping.poll()
            parts = self._parts(said)
            if parts is not None and key_of(parts) == said["key"]:
                return
            self.keys = None
            if time.monotonic() - began > LOST:
                break
            time.sleep(BEAT)
        step, where = said["step"], f"machine {self.machines.rank}"
        stamp = RunFolder(self.run_dir).begun(step)
        found = difference(stamp.parts, parts) if stamp is not None and parts is not None else "the stages before it"
        raise UserError(where, f"has for {step} not what machine 0 has: {found}", "give all machines the same")

    def _parts(self, said: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the step's key is made of here; None where a stage that it needs is not there (yet)."""
        step, adapter = str(said["step"]), Path(said["from_adapter"]) if said["from_adapter"] else None
        if self.keys is None or self.keys[0] != self.followed:
            self.keys = (self.followed, self._open())
        keys = self.keys[1]
        folder, known = RunFolder(self.run_dir), dict[str, str]()
        evaluates = step == EVALUATION
        for parent in eval_needs(keys.recipe) if evaluates else parents(keys.recipe, step):
            if adapter is not None and parent == keys.recipe.stages[step].parent:
                continue
            if (stamp := folder.stamp(parent)) is None:
                return None
            known[parent] = stamp.key
        return keys.evaluation(known) if evaluates else keys.stage(step, known, adapter)

    def _open(self) -> Keys:
        from ..models.loading import resolve_base
        from ..recipes.load import load_recipe

        recipe = load_recipe(self.run_dir / RECIPE)
        make_functions_importable(recipe)
        return Keys(recipe, resolve_base(recipe.base_spec, recipe.model.revision), self.run_dir)

    def _take_part(self, said: Mapping[str, Any]) -> None:
        """Run this machine's share of a step."""
        step, attempt = str(said["step"]), int(said["attempt"])
        adapter = Path(said["from_adapter"]) if said["from_adapter"] else None
        with stopping.deferred():
            share = run_share(self.config, self.run_dir, step, adapter, lambda: self._is_over(attempt))
            self._report(attempt, share)

    def _is_over(self, attempt: int) -> bool:
        """Whether the first machine has ended that attempt, or is gone."""
        said = self.first.look()
        return self.first.lost or (said["id"], said["attempt"], said["state"]) != (self.followed, attempt, STARTS)

    def _report(self, attempt: int, share: Share) -> None:
        error, stopped = share.error, share.stopped
        ended = {
            "attempt": attempt,
            "code": share.code,
            "words": share.words,
            "error": [error.where, error.problem, error.remedy] if error is not None else None,
            "stopped": [stopped.number, str(stopped)] if stopped is not None else None,
        }
        self.board.say(state=ENDED, attempt=attempt, ended=ended)
