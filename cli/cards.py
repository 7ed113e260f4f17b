"""The model cards of a run's stages."""

from pathlib import Path

from ..errors import UserError
from ..files import ADAPTER_CONFIG, EVALUATION, LINEAGE, RESULTS
from ..intact import read_json


def evaluated(run: Path) -> list[dict[str, object]]:
    """The rows of a run's evaluation; none where there is none, or a damaged one."""
    try:
        rows = read_json(run / EVALUATION / RESULTS)
    except UserError:
        return []
    return [each for each in rows if isinstance(each, dict)] if isinstance(rows, list) else []


def refresh_cards(run: Path) -> None:
    """Write the cards of a run's finished stages again, with what the evaluation found; changed ones are left alone.

    No card is among the files that a stage is known by, so none damages a run.
    """
    from ..models.model_card import write_card

    rows = evaluated(run)
    for folder in sorted(each.parent for each in run.glob(f"*/{LINEAGE}")):
        if not (folder / ADAPTER_CONFIG).is_file():
            continue  # rows, and no adapter
        try:
            write_card(folder, rows)
        except (UserError, OSError):
            continue  # a damaged stage, which others say; a card is worth no run
