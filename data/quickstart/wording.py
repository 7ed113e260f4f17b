"""Drawing one wording out of many: choices, slots, sentence joins. Pure functions of a seeded generator."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from . import customers, phrases
from .kinds import Problem
from .products import Product

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Scene:
    """One customer with one problem: what the prompt and the replies to it share."""

    problem: Problem
    product: Product
    said: str  # the wording of the problem that the customer uses
    slots: dict[str, str]
    order_given: bool = False  # the message holds the order number, so a sensible reply does not ask for it


def make_scene(rng: Random, problem: Problem, product: Product, said: str, products: tuple[Product, ...]) -> Scene:
    """Draws the names, dates, colours and the other product of a case."""
    other = rng.choice([p for p in products if not p.plural and p.unit == "" and p != product])
    day, day2 = rng.sample(customers.DAYS, 2)
    colour, colour2 = rng.sample(customers.COLOURS, 2)
    date, number = rng.randint(1, 28), rng.randint(100000, 999999)
    month = rng.choice(customers.MONTHS)
    own = {
        "other": other.name,
        "a_other": other.counted(),
        "day": day,
        "day2": day2 if day2 != "Sunday" else "Monday" if day != "Monday" else "Tuesday",
        "month": month,
        "date": rng.choice((f"{date} {month}", f"{month} {_ordinal(date)}", f"the {_ordinal(date)}")),
        "who": rng.choice(customers.PEOPLE),
        "name": rng.choice(customers.NAMES),
        "surname": rng.choice(customers.SURNAMES),
        "city": rng.choice(customers.CITIES),
        "ago": rng.choice(customers.AGO),
        "order": rng.choice((str(number // 10), f"{rng.choice('ABKPW')}{number // 100}", f"#{number}")),
        "code": rng.choice(customers.CODES),
        "col": colour,
        "col2": colour2,
    }
    slots = product.slots() | own
    slots |= {key[0].upper() + key[1:]: capital(slots[key]) for key in ("it", "this", "who", "col", "a")}
    return Scene(problem, product, said, slots)


def _ordinal(day: int) -> str:
    ending = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def fill(rng: Random, text: str, scene: Scene, **more: str) -> str:
    """Draws one of every `[this|that]` and fills the `{slots}`."""
    while _CHOICE.search(text):
        text = _CHOICE.sub(lambda found: rng.choice(found.group(1).split("|")), text, count=1)
    return text.format(**scene.slots, **more)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def small(text: str) -> str:
    """The small first letter of a sentence that becomes a clause; "I" keeps its capital."""
    return text if re.match(r"I\b", text) else text[:1].lower() + text[1:]


def sentence(text: str) -> str:
    """A capital first, and a full stop unless it has an ending of its own."""
    return capital(text) if text[-1] in ".!?" else capital(text) + "."


def acknowledge(rng: Random, scene: Scene) -> str:
    """An acknowledgement without its full stop: of this kind alone, with the kind's words, or plain."""
    problem, drawn = scene.problem, rng.random()
    if drawn < 0.25:
        return fill(rng, rng.choice(problem.feels), scene)
    if drawn < 0.37:
        return fill(rng, rng.choice(phrases.ACKS_PLAIN), scene)
    about, that = (fill(rng, rng.choice(words), scene) for words in (problem.about, problem.that))
    return fill(rng, rng.choice(phrases.ACKS), scene, about=about, that=that, About=capital(about))


def next_step(rng: Random, scene: Scene) -> str:
    """One concrete step of the problem's own, small first letter, no full stop."""
    steps = [step for step in scene.problem.steps if not (scene.order_given and "order number" in step)]
    return fill(rng, rng.choice(steps), scene)


def good_reply(rng: Random, scene: Scene, named: bool) -> str:
    """Acknowledgement, one concrete step and an offer of help, in one of several orders and joins."""
    ack, step = acknowledge(rng, scene), next_step(rng, scene)
    closer = fill(rng, rng.choice(phrases.CLOSERS), scene)
    question, draw = step.endswith("?"), rng.random()
    if named:
        ack = f"{rng.choice(('Hi', 'Hello', 'Hi', 'Dear'))} {scene.slots['name']}, {small(ack.removeprefix('Oh no, '))}"
    joined = ""
    plain = not any(word in f"{ack} / {step}" for word in (" and ", " so ", ";"))
    if draw < 0.16 and plain and step.startswith("I"):
        link = "so" if "sorry" in ack.lower() and not step.startswith("I can") else "and"
        joined = f"{ack}, {link} {step}"
    elif not question and draw < 0.24:
        joined = f"{ack}{rng.choice((' - ', '; '))}{step}"
    clause = rng.choice(phrases.CLOSING_CLAUSES) if not question and rng.random() < 0.22 else ""
    if joined:
        in_one = clause and not any(mark in joined + clause for mark in (";", " - "))
        return sentence(joined + clause) if in_one else f"{sentence(joined)} {sentence(closer)}"
    if draw > 0.95 and not named:
        return f"{sentence(step)} {sentence(ack)} {sentence(closer)}"
    led = step.startswith(("please", "I can", "I will", "I'll")) and rng.random() < 0.2
    lead = rng.choice(phrases.LEAD_INS) if led else ""
    body = capital(lead + step)
    end = f"{body}{clause}." if clause else f"{sentence(body)} {sentence(closer)}"
    return f"{sentence(ack)} {end}"


def prompt(rng: Random, scene: Scene) -> tuple[str, bool]:
    """A customer's message, and whether it is signed with a name."""
    slots = scene.slots
    terse = scene.said[0].islower() or scene.said.startswith("{p}")
    body = fill(rng, scene.said, scene)
    voice = "terse" if terse else rng.choices(("plain", "polite", "chatty", "angry"), (44, 20, 18, 18))[0]
    detail = _detail(rng, scene, body) if rng.random() < 0.42 else ""
    ask = rng.choice(customers.ASKS) if rng.random() < 0.35 and "?" not in body else ""
    if terse:
        rest = [small(detail), ask.lower() if rng.random() < 0.5 else ""]
        stop = "" if body[-1] in "?!." or not any(rest) else rng.choice((",", ".", " -"))
        return _typed_in_haste(rng, " ".join(part for part in (body + stop, *rest) if part)), False
    opener = fill(rng, rng.choice(customers.OPENERS[voice]), scene)
    ender = fill(rng, rng.choice(customers.ENDERS[voice]), scene)
    order = [body, detail, ask]
    if ask.startswith(("Can", "Could")) and rng.random() < 0.3:
        order = [ask, body, detail]
    elif detail.startswith(("Order", "My order")) and rng.random() < 0.4:
        order = [detail, body, ask]
    text = " ".join(part for part in order if part)
    if opener.endswith(", ") and voice == "plain":
        text = text if re.match(r"I\b", text) else small(text)
    text = f"{opener}{text} {ender}".strip()
    if voice == "angry":
        text = _louder(rng, text)
    elif voice in ("plain", "chatty") and rng.random() < 0.2:
        text = _typed_in_haste(rng, text)
    return text, bool(ender) and slots["name"] in ender


def _detail(rng: Random, scene: Scene, body: str) -> str:
    """A side remark; when and how it was bought only where the message has not said so."""
    own = {"yes": customers.DETAILS_HAVE, "no": customers.DETAILS_WAIT, "any": ()}[scene.problem.has]
    if "ordered" in body or "bought" in body or " for " + scene.slots["who"] in body:
        own = ()
    return fill(rng, rng.choice(own if own and rng.random() < 0.6 else customers.DETAILS), scene)


def _louder(rng: Random, text: str) -> str:
    words = text.split(" ")
    for place in rng.sample(range(1, len(words) - 1), min(2, rng.choice((0, 1, 1, 2)))):
        if words[place].isalpha() and len(words[place]) > 3:
            words[place] = words[place].upper()
    text = " ".join(words)
    return text.replace(". ", "! ", 1) if rng.random() < 0.4 else text


def _typed_in_haste(rng: Random, text: str) -> str:
    """Small letters, slips of the fingers, a missing full stop."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if word.rstrip(".,!?") in customers.TYPOS]
    places = [i for i in places if words[i] != "the" or rng.random() < 0.1]
    for place in rng.sample(places, min(len(places), rng.choice((0, 1, 1, 2)))):
        core = words[place].rstrip(".,!?")
        words[place] = customers.TYPOS[core] + words[place][len(core) :]
    text = " ".join(words)
    if rng.random() < 0.5:
        text = text.lower()
    return text.rstrip(".") if rng.random() < 0.6 else text
