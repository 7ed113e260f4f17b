"""Rollouts by a server: the policy's adapter goes over after every update, and replies come back as token ids.

What a server draws is the policy's only as far as its base, its adapter and its rounding are ours. So its base is held
against ours before anything trains (`check_served`), an adapter's name says run, content and step, and what is left
is measured in every iteration (`sampler_metrics`) and made up for (`off_policy.py`).

Legend of shape suffixes: B rows, R response positions.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ...errors import UserError
from ...files import ADAPTER_CONFIG, to_disk, whole_folder, write_whole
from ...models.adapters import DEFAULT, AdapterSet
from ...models.generate import Generation
from ...models.loading import resolve_base
from ...models.sound import CONFIG
from ...models.tokens import end_token_ids
from ..processes import Processes
from ..serving.engines import Draw
from ..serving.kinds import check_kind
from ..serving.own import own_server, rank_of
from ..serving.place import Place
from ..serving.server import RolloutServer
from .ahead import Ahead
from .network import Trunk
from .rollout import Episodes, Prompts, Sampling, make_episodes, seed_of

logger = logging.getLogger(__name__)

BASE_TOLERANCE = 0.15
"""Nats a token, in the mean, that a server's base may be from ours on the run's own prompts. Both in bf16
(SmolLM2-135M, vLLM 0.32): 0.044 for the same base, 0.08 for one in 8 bits, 0.63 for one in 4."""
SERVED = "served"
"""In a stage's folder while it trains: the adapter that a server has."""
DRAWS, DRAWS_WEIGHTS = "ppo_ahead.json", "ppo_ahead"
"""In a checkpoint: what is known of the adapter that draws ahead, and the adapter."""
_PROBED, _TOKENS = 8, 64
"""On so many rows of at most so many tokens they are compared."""
_WITHIN = 0.5
"""By so much of it an adapter's own change may be missed on them."""


@dataclass(frozen=True)
class _Known:
    """An adapter that the server has: its name there, where it lies, the hash of its content, the optimiser's step."""

    name: str
    folder: Path
    digest: str
    step: int


class ServedPolicy:
    """The policy's replies, drawn by a server. All processes of a stage call it; the first one asks for all.

    Args:
        folder: where adapters are written, which the server sees under the same path.
        run: what tells this run's adapters from those of others on the same server.

    Attributes:
        probe: what its base and an adapter are held against ours with; None: nothing is.
        awaited: the replies of the iteration after the one that trains are being drawn, or wait to be taken.
        drawer: the adapter that speaks in them; it lies in its folder until another one draws ahead.
        staleness, seconds: of the last replies: the optimiser's steps since their adapter was the policy, and what it
            took to draw them.
    """

    def __init__(
        self,
        server: RolloutServer,
        adapters: AdapterSet,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        run: str,
        these: Processes | None = None,
    ) -> None:
        self.server, self.adapters, self.folder, self.run = server, adapters, folder.absolute(), run
        self.these = Processes() if these is None else these
        self.ends = tuple(end_token_ids(tokenizer, adapters.model))
        pad = tokenizer.pad_token_id
        self.pad = pad if isinstance(pad, int) else self.ends[0]
        self.known: _Known | None = None
        self.probe: Probe | None = None
        self.awaited = False
        self.drawer: _Known | None = None
        self._ahead: Ahead | None = None  # in the first process
        self._asked: list[list[int]] = []  # this process' prompts of it
        self.staleness, self.seconds = 0, 0.0

    def put(self, step: int) -> str:
        """Have the server speak as the policy does now; the adapter that it had goes. Nothing is being drawn.

        Args:
            step: the optimiser's, for the adapter's name.

        Returns:
            The adapter's name on the server.
        """
        digest = self.adapters.digest(DEFAULT)
        if self.known is None or self.known.digest != digest:
            new = self._named(step, digest)
            self._exchange(new, lambda folder: self.adapters.save(DEFAULT, folder))
            if self.probe is not None and not self.probe.seen:
                self.probe.look_at(self.server, new.name, self.these)
            # until here the older one is still what a checkpoint would keep
            old, self.known = self.known, new
            self._forget(old)
        assert self.known is not None
        return self.known.name

    def generate(
        self,
        prompts: Prompts,
        config: Sampling,
        *,
        step: int,
        seed: int,
        first: int = 0,
        device: torch.device,
        on_batch: Callable[[int], None] | None = None,
    ) -> Episodes:
        """One response of the policy to each prompt of this process, as `rollout.generate`.

        Args:
            step: the optimiser's, after which the policy is what it is.
        """
        if self.awaited:  # no adapter goes while it draws; what it has drawn stays
            self.these.by_first(lambda: self._draws().wait())
        began, name, draw = time.perf_counter(), self.put(step), _draw(config, self.ends)
        rows, before = self._rows(prompts, seed, first)

        def told(done: int) -> None:
            if on_batch is not None:
                on_batch(done // self.these.count)

        whole = self.these.by_first(lambda: self._sample(name, rows, draw, told))
        self.staleness, self.seconds = 0, time.perf_counter() - began
        return self._own(whole, before, prompts, device)

    def _rows(self, prompts: Prompts, seed: int, first: int) -> tuple[list[tuple[list[int], int]], int]:
        """All processes' prompts with their seeds, and the place of this one's first among them."""
        own = [(ids, seed_of(seed, "reply", first + place)) for place, ids in enumerate(prompts.ids)]
        parts = self.these.gathered([own])
        return [row for part in parts for row in part], sum(map(len, parts[: self.these.rank]))

    def _sample(
        self, name: str, rows: list[tuple[list[int], int]], draw: Draw, told: Callable[[int], None]
    ) -> Generation:
        prompts, seeds = [ids for ids, _ in rows], [seed for _, seed in rows]
        return self.server.sample(name, prompts, seeds, draw, again=self._again, on_batch=told)

    def _own(self, whole: Generation, before: int, prompts: Prompts, device: torch.device) -> Episodes:
        """This process' part of the replies."""
        part = slice(before, before + len(prompts))
        drawn = Generation(whole.tokens[part], whole.logprobs[part], whole.finished[part])
        return make_episodes(prompts.ids, drawn, self.pad, device)

    # --- one iteration ahead

    def start(self, prompts: Prompts, config: Sampling, *, seed: int, first: int = 0) -> None:
        """Have the adapter that the server has answer these prompts, and do not wait: `take` gets the replies.

        Args:
            the others: as of `generate`.
        """
        assert self.known is not None and not self.awaited
        self.rest()
        self.drawer, self.awaited, self._asked = self.known, True, prompts.ids
        name, draw = self.known.name, _draw(config, self.ends)
        rows, _ = self._rows(prompts, seed, first)
        if self.these.rank == 0:
            self._ahead = Ahead(lambda told: self._sample(name, rows, draw, told))

    def take(
        self, prompts: Prompts, *, step: int, device: torch.device, on_batch: Callable[[int], None] | None = None
    ) -> Episodes:
        """What was drawn ahead, once it is there.

        Args:
            prompts: those that it was asked for. step: the optimiser's now.

        Raises:
            UserError: what the draw has ended with. Stopped: as it is waited for.
            RuntimeError: other prompts were asked for: a method of one's own passed an iteration by.
        """
        if prompts.ids != self._asked:
            raise RuntimeError("the replies that were drawn ahead are to other prompts than this iteration's")

        def told(done: int) -> None:
            if on_batch is not None:
                on_batch(done // self.these.count)

        assert self.drawer is not None
        sizes = self.these.gathered([len(prompts)])
        whole, self.seconds = self.these.by_first(lambda: (self._draws().result(told), self._draws().seconds))
        self.staleness, self.awaited, self._ahead = step - self.drawer.step, False, None
        return self._own(whole, sum(sizes[: self.these.rank]), prompts, device)

    def rest(self) -> None:
        """Nothing is drawn ahead, and nothing that was is missing any more."""
        drawer, self.drawer = self.drawer, None
        self._forget(drawer)

    def keep(self, checkpoint: Path) -> None:
        """Write the adapter that draws ahead into a checkpoint, where there is one."""
        if self.drawer is None or self.these.rank != 0:
            return
        shutil.copytree(self.drawer.folder, checkpoint / DRAWS_WEIGHTS)
        to_disk(checkpoint / DRAWS_WEIGHTS)
        write_whole(checkpoint / DRAWS, json.dumps({"step": self.drawer.step, "digest": self.drawer.digest}))

    def restore(self, checkpoint: Path) -> bool:
        """Have the server speak as the adapter that `keep` wrote; False: the checkpoint has none."""
        if not (checkpoint / DRAWS).is_file():
            return False
        said = json.loads((checkpoint / DRAWS).read_text(encoding="utf-8"))
        self.drawer = new = self._named(said["step"], said["digest"])
        self._exchange(new, lambda folder: shutil.copytree(checkpoint / DRAWS_WEIGHTS, folder, dirs_exist_ok=True))
        old, self.known = self.known, new
        self._forget(old)
        return True

    def close(self) -> None:
        """Take the adapter off the server, and its folder away."""
        self._leave_off()
        known, self.known = self.known, None
        self.rest()
        if self.these.rank == 0 and known is not None:
            try:
                self.server.unload(known.name)
            except UserError as error:  # the run is over, with its server or without
                logger.warning("%s is left on the server: %s", known.name, error.problem)
            shutil.rmtree(known.folder, ignore_errors=True)
            if self.folder.name == SERVED:  # one that the user named stays
                with suppress(OSError):
                    self.folder.rmdir()
        self.stop()

    def stop(self) -> None:
        """End a draw that is under way, and a server that was started for this."""
        if self._ahead is not None:
            self._ahead.leave_off()
        if self.server.own is not None:
            self.server.own.stop()
        self._leave_off()
        if self.server.own is not None:  # the draw may have started it again
            self.server.own.stop()

    def _draws(self) -> Ahead:
        assert self._ahead is not None
        return self._ahead

    def _leave_off(self) -> None:
        ahead, self._ahead, self.awaited = self._ahead, None, False
        if ahead is not None:
            ahead.leave_off()
            ahead.join()

    def _named(self, step: int, digest: str) -> _Known:
        name = f"preftune-{self.run}-{digest[:8]}-step-{step}"
        return _Known(name, self.folder / name, digest, step)

    def _exchange(self, new: _Known, write: Callable[[Path], object]) -> None:
        """Have the first process write an adapter, and exchange it for the one that the server has."""
        if self.known is None and self.server.own is not None:
            self.these.by_first(self.server.own.revive)
        self.these.by_first(lambda: self._replace(new, write))

    def _replace(self, new: _Known, write: Callable[[Path], object]) -> None:
        if self.known is None:
            self._forget_others(new.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_folder(new.folder, lambda there: (there / ADAPTER_CONFIG).is_file()) as beside:
            write(beside)
        if self.known is not None:
            # first, as a server has room for few: one more might push it out by itself
            self.server.unload(self.known.name)
        self.server.load(new.name, new.folder)

    def _forget(self, adapter: _Known | None) -> None:
        """Remove an adapter's folder, unless it is still needed."""
        if adapter is not None and self.these.rank == 0 and adapter not in (self.known, self.drawer):
            shutil.rmtree(adapter.folder, ignore_errors=True)

    def _forget_others(self, name: str) -> None:
        """What this run left before it was cut off, here and on the server."""
        ours = f"preftune-{self.run}-"
        for left in (each for each in self.server.listing().adapters if each.startswith(ours) and each != name):
            self.server.unload(left)
        for folder in self.folder.glob(f"{ours}*"):
            shutil.rmtree(folder)

    def _again(self) -> None:
        """What a server that was gone is held against, and given, before it is asked again."""
        if self.probe is not None:
            self.probe.base_is_ours(self.server)
        assert self.known is not None
        self.server.load(self.known.name, self.known.folder)


class Probe:
    """Some of the run's prompts, and their tokens' log-probs under a server's base and under ours.

    Args:
        trunk: at temperature 1, as a server's log-probs of a prompt are.
        rows: token ids, of two tokens or more each.
        where: of the server in the recipe, for errors.

    Attributes:
        seen: an adapter that changes them has been found to change both alike.
    """

    def __init__(self, trunk: Trunk, rows: Sequence[Sequence[int]], where: str) -> None:
        self.trunk, self.rows, self.where = trunk, [list(row) for row in rows], where
        self.own_N = prompt_logprobs(trunk, self.rows, None)
        self.served_N = torch.zeros_like(self.own_N)
        self.seen = False

    def base_is_ours(
        self, server: RolloutServer, these: Processes | None = None, tolerance: float = BASE_TOLERANCE
    ) -> float:
        """How far the server's base is from ours: nats a token, in the mean.

        Raises:
            UserError: further than the tolerance.
        """
        self.served_N = self._served(server, None, Processes() if these is None else these)
        gap = float((self.served_N - self.own_N).abs().mean())
        if not gap <= tolerance:
            said = f"the base of {server.place.url} is {gap:.2g} nats a token from this stage's on its own prompts"
            remedy = f"have it serve {self.trunk.adapters.base.path}"
            raise UserError(self.where, f"{said}, expected {tolerance:g} at most: it serves another base", remedy)
        return gap

    def look_at(self, server: RolloutServer, name: str, these: Processes, role: str = DEFAULT) -> None:
        """See that an adapter changes the server's base as it changes ours, where it changes enough to tell.

        Args:
            role: what it is called here.

        Raises:
            UserError: it does not.
        """
        own_N = prompt_logprobs(self.trunk, self.rows, role) - self.own_N
        change, noise = float(own_N.abs().mean()), float((self.served_N - self.own_N).abs().mean())
        if change <= max(3 * noise, 1e-4):
            return
        served_N = self._served(server, name, these) - self.served_N
        missed = float((served_N - own_N).abs().mean())
        if not missed <= _WITHIN * change:
            said = f"{name} changes the base of {server.place.url} otherwise than ours: {missed:.2g} nats a token"
            remedy = "see that the server computes with every layer that the adapter has, and with its scaling"
            raise UserError(self.where, f"{said} of {change:.2g} are missed", remedy)
        self.seen = True

    def _served(self, server: RolloutServer, name: str | None, these: Processes) -> torch.Tensor:
        found = these.by_first(lambda: server.scores(name, self.rows))
        return torch.tensor([each for row in found for each in row], device=self.own_N.device)


@torch.no_grad()
def prompt_logprobs(trunk: Trunk, rows: Sequence[Sequence[int]], role: str | None) -> torch.Tensor:
    """Log-probs of each row's tokens but the first, one row after the other [N]; role None: under the bare base."""
    device = next(trunk.adapters.backbone.parameters()).device
    after = [list(row[1:]) for row in rows]
    said = Generation(after, [[0.0] * len(row) for row in after], [False] * len(after))
    episodes = make_episodes([row[:1] for row in rows], said, 0, device)
    with trunk.adapters.using(role):
        found = trunk.logprobs(trunk.hidden(episodes), episodes)
    return found.logps_BR[episodes.mask_BR]


def probe_rows(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The first prompts' tokens, one after the other, in rows of equal length."""
    ids = [token for prompt in prompts[: 4 * _PROBED] for token in prompt][: _PROBED * _TOKENS]
    rows = [ids[start : start + _TOKENS] for start in range(0, len(ids), _TOKENS)]
    return [row for row in rows if len(row) > 1]


def open_served(
    place: Place,
    trunk: Trunk,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: Sampling,
    folder: Path,
    log: Path,
    these: Processes,
) -> ServedPolicy:
    """A server, held against this stage's base. All processes of the stage call it.

    Args:
        trunk: at temperature 1.
        prompts: all that it will be asked to answer, in tokens. config: how.
        folder: where the policy's adapter is written for it.
        log: a file for what a server says that is started here.

    Raises:
        UserError: it is not there, serves another base, or cannot do what it will be asked for.
    """
    adapters = trunk.adapters
    server, probe = open_server(place, trunk, [DEFAULT], prompts, config.max_new_tokens, log, these)
    policy = ServedPolicy(server, adapters, tokenizer, folder, run_name(folder), these)
    policy.probe = probe
    these.by_first(lambda: server.check_draw(_draw(config, policy.ends), prompts[0]))
    return policy


def _draw(config: Sampling, ends: tuple[int, ...]) -> Draw:
    return Draw(config.max_new_tokens, ends, config.temperature, config.top_k, config.top_p)


def open_server(
    place: Place,
    trunk: Trunk,
    roles: Sequence[str],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    log: Path,
    these: Processes,
) -> "tuple[RolloutServer, Probe | None]":
    """The server, started where the place says how, and held against our base; and what adapters are held against.

    Args:
        trunk, prompts, log: as in `open_served`.
        roles: the adapters that it will be given, by their names here.

    Raises:
        UserError: as in `open_served`.
    """
    adapters = trunk.adapters
    configs = [adapters.model.peft_config[role].to_dict() for role in roles]
    for config in configs:
        check_kind(config, place.where)
    longest = max(map(len, prompts)) + max_new_tokens
    rank = max((rank_of(place, config) for config in configs), default=1)
    own = own_server(place, adapters, longest, rank, log)
    if own is not None:
        these.by_first(own.start)
    server = RolloutServer(place, adapters.causal.config.get_text_config().vocab_size, own)
    try:
        these.by_first(lambda: check_served(server, adapters, longest))
        probe = Probe(trunk, probe_rows(prompts), place.where) if probe_rows(prompts) else None
        if probe is not None:
            gap = probe.base_is_ours(server, these)
            said = "%s at %s draws the replies; its base is %.2g nats a token from this one's"
            logger.info(said, place.engine, place.url, gap)
    except BaseException:
        if own is not None:
            own.stop()
        raise
    return server, probe


def check_served(server: RolloutServer, adapters: AdapterSet, longest: int) -> None:
    """What can be known of a server without asking it for a token: its base and its context.

    Args:
        longest: tokens of a prompt and its reply.

    Raises:
        UserError: one of them will not do.
    """
    where, found = server.place.where, server.listing()
    if found.longest is not None and longest > found.longest:
        said = f"{server.place.url} takes {found.longest} tokens, and prompt and reply have up to {longest}"
        raise UserError(where, said, f"start it with --max-model-len {longest} or more")
    folder, base = Path(found.root or ""), adapters.base
    if base.sha256 and folder.is_absolute() and (folder / CONFIG).is_file() and folder != base.path:
        held = resolve_base(str(folder))
        if held.sha256 != base.sha256:
            said = f"{server.place.url} serves {folder}, whose content is not that of {base.spec}"
            raise UserError(where, said, f"have it serve {base.path}")


def run_name(folder: Path) -> str:
    """What tells a stage's adapters from those of others: a hash of where it is written."""
    return hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]
