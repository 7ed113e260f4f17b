"""Loading and saving without transformers' warnings and progress bars."""

from collections.abc import Generator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging


@contextmanager
def quiet_transformers(bar: bool = False) -> Generator[None, None, None]:
    """Within it transformers prints errors only, and progress bars only if `bar`."""
    level, had_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not bar:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if had_bar:
            hf_logging.enable_progress_bar()
