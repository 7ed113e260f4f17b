"""The form in which problem kinds are written down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One kind of trouble a customer can have.

    Wordings may hold `[this|that]` (one is drawn) and `{slots}` (the product, its number, names, dates).
    `has` says whether the customer has the product in hand ("yes"), is waiting ("no") or it does not matter ("any").
    """

    name: str
    needs: str  # product tags, one of which it must have (`glass|hard`); empty: any product
    has: str
    says: tuple[str, ...]  # what the customer writes
    about: tuple[str, ...] = ()  # noun phrases: "sorry about ..."
    that: tuple[str, ...] = ()  # clauses: "sorry that ..."
    feels: tuple[str, ...] = ()  # whole acknowledgements fit for this kind alone
    steps: tuple[str, ...] = ()  # one concrete next step, small first letter, no full stop
    marks: tuple[str, ...] = ()  # held-out kinds: words by which a text on this kind is known
