"""Who answers in a chat."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .terminal import Terminal

if TYPE_CHECKING:
    from ..data.rows import Message
    from ..eval.chat.conversation import Conversation, Reply


class Speaker(Protocol):
    """What answers in a chat."""

    def answer(self, messages: "list[Message]", seed: int) -> str | None:
        """The reply to go on with; None if there is none."""
        ...

    def switch(self, name: str) -> str:
        """Let another policy answer; returns what to tell the person. With an empty name: which policies there are."""
        ...


class Single:
    """One policy answers, until another one is asked for."""

    def __init__(
        self,
        talk: "Conversation",
        terminal: Terminal,
        policy: str,
        ready: Callable[[str], None],
        policies: list[str],
    ) -> None:
        self.talk, self.terminal, self.policy, self._ready, self._policies = talk, terminal, policy, ready, policies

    def answer(self, messages: "list[Message]", seed: int) -> str | None:
        """The policy's reply, as far as it got; None if it was stopped before it said anything."""
        label = f"{self.policy}> " if self.terminal.person else ""
        reply = show_reply(self.talk, self.terminal, label, self.policy, messages, seed)
        return None if reply.stopped and not reply.text.strip() else reply.text

    def switch(self, name: str) -> str:
        """Let another policy answer."""
        if not name:
            return f"{self.policy} speaks; there are {', '.join(self._policies)}"
        self._ready(name)
        self.policy = name
        return f"{name} speaks from now on"


def show_reply(
    talk: "Conversation", terminal: Terminal, label: str, policy: str, messages: "list[Message]", seed: int
) -> "Reply":
    """One reply, shown as it is generated; Ctrl-C ends it."""
    terminal.begin(label)
    note = ""
    try:
        with terminal.stoppable() as stop:
            reply = talk.reply(policy, messages, seed=seed, on_text=terminal.write, stop=stop)
        if reply.stopped:
            note = "stopped"
        elif not reply.finished:
            note = f"cut at {reply.tokens} tokens"
        elif not reply.text.strip():
            note = "says nothing"
    finally:
        terminal.end(note)
    return reply
