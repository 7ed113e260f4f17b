"""What a text of somebody else's may take: time and memory, in every thread, and it costs nothing otherwise."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from preftune import patience
from preftune.data import template
from preftune.data.template import Templater, rendered
from preftune.errors import UserError
from preftune.models.tiny import byte_tokenizer
from preftune.patience import bounded, within

WORDS = ("here", "it", "mend it")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited on Linux alone")


def forever() -> None:
    while True:
        pass


def powers() -> int:
    return len(str(7 ** (7**9)))  # hours within one operation


def elsewhere(work: Callable[[], object]) -> BaseException | None:
    """What the work raises in a thread of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    return raised[0] if raised else None


@pytest.mark.parametrize("work", [forever, powers])
def test_the_main_thread_is_stopped_within_an_operation_too(work: Callable[[], object]):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^here: it takes more than 0\.2 s; mend it$"), within(0.2, *WORDS):
        work()
    with pytest.raises(UserError, match=r"takes more than 0\.2 s"):
        bounded(work, 0.2, *WORDS)
    assert time.monotonic() - began < 15


def test_another_thread_is_stopped_as_well_and_a_quick_one_is_not():
    def endless() -> None:
        with within(0.2, *WORDS):
            forever()

    assert "takes more than 0.2 s" in str(elsewhere(endless))
    assert "takes more than 0.2 s" in str(elsewhere(lambda: bounded(forever, 0.2, *WORDS)))

    def quick() -> None:
        for _ in range(20):
            with within(0.05, *WORDS):
                pass
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass

    assert elsewhere(quick) is None


def test_what_comes_after_is_not_stopped_and_an_inner_limit_is_kept():
    with within(0.2, *WORDS):
        pass
    with within(30, *WORDS):
        with pytest.raises(UserError, match=r"0\.2 s"), within(0.2, *WORDS):
            forever()
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass
    with pytest.raises(UserError, match=r"more than 30 s"), within(0.2, *WORDS), within(30, *WORDS):
        forever()


def test_errors_and_others_timers_come_through():
    alarms = []
    before = signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyError), within(5, *WORDS):
            raise KeyError
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            pass
    finally:
        signal.signal(signal.SIGALRM, before)
    assert alarms == [1]


def test_a_forked_process_is_stopped_as_well():
    with within(5, *WORDS):
        pass
    child = os.fork()
    if child == 0:
        try:
            with within(0.2, *WORDS):
                forever()
        except UserError:
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> int:
    """The limit, an eighth of what it is."""
    monkeypatch.setattr(patience, "MEMORY", 1 << 27)
    patience._SIZE._measure()
    return 1 << 27


@linux
def test_memory_is_limited_and_given_back(little: int):
    with pytest.raises(UserError, match=r"^here: it takes more than 0\.125 GB of memory; mend it$"):
        bounded(lambda: "a" * 10**10, 5, *WORDS)
    assert len(bounded(lambda: "a" * 10**7, 5, *WORDS)) == 10**7
    assert len("a" * 2 * little) == 2 * little  # without the limit


@linux
def test_a_process_that_has_grown_is_measured_again(little: int):
    held = bytearray(little * 7 // 8)
    assert len(bounded(lambda: bytes(little // 2), 5, *WORDS)) == little // 2
    del held


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BOMBS = {
    "a loop": ("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "takes more than"),
    "a loop on long conversations": (
        "{% if messages | length > 1 %}" + "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3 + "{% endif %}",
        "takes more than",
    ),
    "a power": ("{{ 7 ** (7 ** 9) }}", "takes more than"),
    "a product": ("{{ 'a' * 10 ** 10 }}", "GB of memory"),
    "a width": ("{{ 'a'.ljust(10 ** 10) }}{{ 'a' | center(10 ** 10) }}", "GB of memory"),
    "doubling": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "takes more than",
    ),
    "length": ("{{ 'a' * 20000000 }}", "writes 20,000,000 characters"),
}


@linux
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("how", ["a row", "a model's own"])
@pytest.mark.usefixtures("little")
def test_a_template_that_takes_too_much_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, name: str, how: str):
    monkeypatch.setattr(template, "PATIENCE", 0.5)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, said = BOMBS[name]
    with pytest.raises(UserError, match=rf"^data\.jsonl:3: the chat template.*{said}.*; correct the template$"):
        if how == "a row":
            Templater(tokenizer).text(TALK, None, False, "data.jsonl:3")  # pyright: ignore[reportArgumentType]
        else:
            rendered(tokenizer, TALK, "data.jsonl:3")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('touch x') }}",
        "{{ (messages | attr('__class__')).__base__ }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(attack: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = attack
    with pytest.raises(UserError, match="the chat template refuses the turns"):
        Templater(tokenizer).text(TALK, None, False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "end", ["", "raise SystemExit(3)", "bounded(lambda: list(iter(lambda: 0, 1)), 0.2, 'here', 'it', 'x')"]
)
def test_a_process_ends_as_it_would_without(end: str):
    """Python takes its handlers away before a process is over: the signal would then end it by itself."""
    code = (
        "import atexit, time\nfrom preftune.errors import UserError\nfrom preftune.patience import bounded, within\n"
        "class Slow:\n    def __del__(self):\n"
        "        end = time.process_time() + 0.5\n        while time.process_time() < end: pass\n"
        f"slow = Slow()\nbounded(lambda: 1, 0.2, 'here', 'it', 'x')\ntry:\n    {end or 'pass'}\n"
        "except UserError:\n    raise SystemExit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == (3 if "3" in end else 2 if end else 0)
