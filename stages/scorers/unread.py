"""Why answers of an endpoint held no verdict, in words."""

from collections.abc import Mapping

CUT = "cut at max_tokens"
"""The one reason that a recipe can mend."""


def unread_words(unread: Mapping[str, int]) -> str:
    """ "3 answers without a verdict (2 cut at max_tokens, 1 empty), asked again on the next run"."""
    total = sum(unread.values())
    why = ", ".join(f"{n} {reason}" for reason, n in unread.items())
    raise_it = "; raise parameters.max_tokens" if CUT in unread else ""
    return f"{total} answer{'s' if total > 1 else ''} without a verdict ({why}), asked again on the next run{raise_it}"
