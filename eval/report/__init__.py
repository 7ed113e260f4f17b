"""The report of a run: one self-contained page, made from what lies in the run folder.

`read.py` reads the folder and decides nothing; `page.py` puts the page together from the sections' own files, pure
functions from what was read to numbers, words and inline SVG (`svg.py`, `axes.py`); the templates say where it goes.
"""

from .page import render, write_report
from .read import Run, read_run

__all__ = ["Run", "read_run", "render", "write_report"]
