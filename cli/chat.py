"""`preftune chat`: talk to one of a run's policies, or compare two of them blind."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..recipes.graph import policies
from ..recipes.schema import BASE, Recipe
from .policies import check_policy, last_policy, recipe_base, run_recipe, sampling_spec
from .process import quiet_libraries
from .speakers import Single, Speaker
from .terminal import Terminal

if TYPE_CHECKING:
    from ..data.rows import Message

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class ChatOptions:
    """What the command line says; None where an option is not given.

    Attributes:
        policy: who speaks. compare: the names of two or more policies, separated by commas.
        samples: vote on the evaluation's samples.
        max_new_tokens, temperature, beams, seed: of the replies; with more than 1 beam they are searched, not drawn.
        system: the conversation's system message.
        voter: the name that votes carry.
    """

    policy: str | None = None
    compare: str | None = None
    samples: bool = False
    max_new_tokens: int | None = None
    temperature: float | None = None
    beams: int | None = None
    seed: int | None = None
    system: str | None = None
    voter: str | None = None


def chat_run(run: Path, options: ChatOptions) -> None:
    """Chat until the person ends it.

    Raises:
        UserError: options that exclude each other, an unknown policy, or a missing adapter or samples.
    """
    recipe = run_recipe(run)
    names = _compared(options)
    quiet_libraries()
    if options.samples:
        from .compare import vote_on_samples

        seed = recipe.seed if options.seed is None else options.seed
        vote_on_samples(run, names, seed, Terminal(), _voter(options))
        return
    if names:
        for name in names:
            check_policy(recipe, run, name, "--compare")
    elif options.policy is not None:
        check_policy(recipe, run, options.policy, "--policy")
    _talk(recipe, run, names, options)


def _compared(options: ChatOptions) -> list[str]:
    """The policies of --compare; an empty list where it is not given."""
    if options.compare is None:
        if options.samples:
            raise UserError("--samples", "needs --compare", "name the policies: --compare sft,ppo")
        if options.voter is not None:
            raise UserError("--voter", "means nothing without --compare", "name the policies: --compare sft,ppo")
        return []
    names = [name.strip() for name in options.compare.split(",") if name.strip()]
    if len(set(names)) < 2:
        raise UserError("--compare", f"{options.compare!r} names no two policies", "write them as sft,ppo")
    if len(set(names)) < len(names):
        raise UserError("--compare", f"{options.compare!r} names a policy twice", "name each once")
    idle = ["policy"] + (["max_new_tokens", "temperature", "beams", "system"] if options.samples else [])
    for option in idle:
        if getattr(options, option) is not None:
            beside = "--samples" if options.samples else "--compare"
            raise UserError(f"--{option.replace('_', '-')}", f"means nothing with {beside}", "leave it out")
    return names


def _voter(options: ChatOptions) -> str | None:
    """The name of --voter.

    Raises:
        UserError: it is none.
    """
    if options.voter is None:
        return None
    from ..eval.chat.votes import voter_name

    if (name := voter_name(options.voter)) is None:
        raise UserError("--voter", f"{options.voter!r} is no name", "write one of 1 to 60 characters")
    return name


def _talk(recipe: Recipe, run: Path, names: list[str], options: ChatOptions) -> None:
    """A conversation with one policy, or with two at a time."""
    policy = options.policy or (names or [last_policy(recipe, run)])[0]
    from ..eval.chat.conversation import Conversation
    from ..eval.workbench import Workbench
    from .compare import Blind, open_votes, show_tally

    votes = open_votes(run) if names else []
    spec = sampling_spec(recipe, recipe_base(recipe), run)
    spec = replace(
        spec,
        policies={name: _folder(run, name) for name in names or [policy]},
        reference=BASE,
        max_new_tokens=options.max_new_tokens or MAX_NEW_TOKENS,
        seed=recipe.seed if options.seed is None else options.seed,
        kl=False,
        **_decoding(options),
    )
    terminal, talk = Terminal(), Conversation(Workbench.open(spec))

    def switch(name: str) -> None:
        check_policy(recipe, run, name, "/policy")
        talk.add(name, _folder(run, name))

    single = Single(talk, terminal, policy, switch, [BASE, *policies(recipe)])
    blind = Blind(talk, terminal, run, names, f"{spec.seed}:{len(votes)}", _voter(options)) if names else None
    system = spec.prompts.system if options.system is None else options.system
    if terminal.person:
        who = f"{' and '.join(names)}, two at a time without their names" if names else policy
        terminal.say(f"{who}, of {run}; /help lists the commands, Ctrl-D ends")
    Chat(blind or single, terminal, system, spec.seed).run()
    if blind is not None:
        show_tally(run, names, blind.cast)


def _decoding(options: ChatOptions) -> dict[str, float]:
    """The decoding settings among the options, under the names that `EvalSpec` gives them."""
    given = {"temperature": options.temperature, "beams": options.beams}
    if options.beams is not None and options.beams > 1:
        if options.temperature:
            said = f"{options.beams} beams search and draw nothing, so a temperature of {options.temperature:g} is idle"
            raise UserError("--beams", said, "leave out --temperature, or --beams")
        given["temperature"] = 0.0
    return {name: value for name, value in given.items() if value is not None}


def _folder(run: Path, policy: str) -> Path | None:
    return None if policy == BASE else run / policy


class Chat:
    """A conversation, line by line.

    Attributes:
        system: the system message, None for none.
        turns: what was said, beginning with the person and ending with a reply.
        draws: replies drawn so far; each has a random stream of its own.
    """

    def __init__(self, speaker: Speaker, terminal: Terminal, system: str | None, seed: int) -> None:
        self.speaker, self.terminal, self.system, self.seed = speaker, terminal, system, seed
        self.turns: list[Message] = []
        self.draws = 0
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "help": ("this list", self._help),
            "new": ("forget the conversation", self._new),
            "system": ("TEXT: the system message from now on; without TEXT: none", self._system),
            "policy": ("NAME: let another policy speak; without NAME: which there are", self._policy),
            "again": ("another reply to what you said last", self._again),
            "quit": ("end; Ctrl-D does so too, and Ctrl-C stops a reply", self._quit),
        }

    def run(self) -> None:
        """Chat until the person ends it. Mistakes are shown to a person, and raised in a script."""
        while True:
            try:
                self._line(self.terminal.ask("you> "))
            except (EOFError, KeyboardInterrupt):
                if self.terminal.person:
                    self.terminal.end()
                return
            except UserError as error:
                if not self.terminal.person:
                    raise
                self.terminal.say(" ".join(str(error).split()))

    def _line(self, line: str) -> None:
        if not line.startswith("/"):
            if line.strip():
                self._turn([*self.turns, {"role": "user", "content": line.strip()}])
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            raise UserError(f"/{name}", "no such command", "/help lists them; put a space before it to say it")
        self.commands[name][1](rest.strip())

    def _turn(self, turns: "list[Message]") -> None:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.draws += 1
        reply = self.speaker.answer([*system, *turns], self.seed + self.draws - 1)
        if reply is not None:
            self.turns = [*turns, {"role": "assistant", "content": reply}]

    def _help(self, _: str) -> None:
        for name, (words, _do) in self.commands.items():
            self.terminal.say(f"/{name:7} {words}")

    def _new(self, _: str) -> None:
        self.turns = []
        self.terminal.say("a new conversation")

    def _system(self, text: str) -> None:
        self.system = text or None
        self.terminal.say(f"system: {text}" if text else "no system message")

    def _policy(self, name: str) -> None:
        self.terminal.say(self.speaker.switch(name))

    def _again(self, _: str) -> None:
        if not self.turns:
            raise UserError("/again", "nothing was said yet", "say something first")
        self._turn(self.turns[:-1])

    def _quit(self, _: str) -> None:
        raise EOFError
