"""Training rows and held-out rows, by prompt."""

import hashlib

from ..errors import UserError
from .rows import Row
from .spec import DataSpec


def split_rows(
    rows: list[Row], held_out: float, seed: int = 0, where: str = "data.held_out"
) -> tuple[list[Row], list[Row]]:
    """(train, held out), each in the order given; all rows of a prompt are on the same side.

    A prompt is held out if a hash of its text and the seed, read as a number in [0, 1), is below `held_out`, so adding
    rows later moves none of the old ones. The fraction is exact only in expectation.

    Raises:
        UserError: a side would be empty though `held_out` is not 0.
    """
    if held_out == 0:
        return list(rows), []
    train: list[Row] = []
    held: list[Row] = []
    for row in rows:
        (held if prompt_position(row, seed) < held_out else train).append(row)
    check_sides(held_out, len(train), len(held), where)
    return train, held


def held_out_rows(rows: list[Row], spec: DataSpec, where: str = "data.held_out") -> list[Row]:
    """What training on the same data leaves out, for measuring; all rows where it leaves out none.

    Args:
        where: what an error names, as in `split_rows`.
    """
    return split_rows(rows, spec.held_out, spec.seed, where)[1] if spec.held_out > 0 else rows


def check_sides(held_out: float, train: int, held: int, where: str = "data.held_out") -> None:
    """Raises UserError where a fraction of the prompts leaves no row on one of the sides."""
    if not train or not held:
        which = "for training" if not train else "held out"
        said = f"{held_out} of {train + held} rows leaves none {which}"
        raise UserError(where, said, "use another fraction or more rows")


def prompt_position(row: Row, seed: int) -> float:
    """A number in [0, 1) from a hash of the row's prompt and the seed, uniform over prompts."""
    digest = hashlib.sha256(f"{seed}\n{row.key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
