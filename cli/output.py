"""What the commands print: plain lines, and results as a table or as JSON lines."""

import sys
from collections.abc import Iterable, Mapping

from ..printed import printable, printable_json, redacted


class Output:
    """Prints to standard output. With `json` only results go there, one object per line, the rest to standard error."""

    def __init__(self, json: bool = False) -> None:
        self.json = json

    def say(self, line: str) -> None:
        """Print one line for people."""
        print(printable(line), file=sys.stderr if self.json else sys.stdout, flush=True)

    def rows(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Print results: as JSON lines, or as a table."""
        rows = [dict(row) for row in rows]
        if self.json:
            from json import dumps

            for row in rows:
                print(printable_json(redacted(dumps(row, ensure_ascii=False))), flush=True)
        elif rows:
            _print_table(rows)


def duration(seconds: float) -> str:
    """A time in words: `3.2 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


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
