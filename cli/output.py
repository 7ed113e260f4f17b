"""What the commands print: plain lines, and results as a table or as JSON lines."""

import sys
from collections.abc import Iterable, Mapping

from ..printed import printable, printable_json, redacted
from ..progress import stamped


class Output:
    """Prints to standard output. With `json` only results go there, one object per line, the rest to standard error.

    Args:
        log: its lines say how a run goes on: where they go to no terminal they have the time (`progress.stamp`).
    """

    def __init__(self, json: bool = False, *, log: bool = False) -> None:
        self.json, self.log = json, log

    def say(self, line: str) -> None:
        """Print one line for people."""
        stream = sys.stderr if self.json else sys.stdout
        print(printable(stamped(line, stream) if self.log else line), file=stream, flush=True)

    def rows(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Print results: as JSON lines, or as a table."""
        rows = [dict(row) for row in rows]
        if self.json:
            from json import dumps

            for row in rows:
                print(printable_json(redacted(dumps(row, ensure_ascii=False))), flush=True)
        elif rows:
            _print_table(rows)


def _print_table(rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [key for key in columns if any(row.get(key) is not None for row in rows)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for key in columns:
        number = any(isinstance(row.get(key), int | float) for row in rows)
        table.add_column(Text(printable(key)), justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(printable(_cell(row.get(key)))) for key in columns))
    console = Console()
    # a pipe has no width to keep to: never cut a number there
    console.width = console.width if console.is_terminal else 10_000
    console.print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"
