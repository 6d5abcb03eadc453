"""What a command lets the libraries below it say: nothing of their own future, and in a file no moving bars."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = "transformers|trl|accelerate|peft|datasets|huggingface_hub|torch"
# Their warnings belong to the module that calls them, which may be ours.
_MODULES = rf"(?:{_LIBRARIES}|plot_align)(?:\.|$)"


@contextmanager
def readable() -> Iterator[None]:
    """Within this context transformers, TRL and what they build on do not announce what they will change or remove.

    What they say of the data, the model or the run stays. ``python -W`` and ``PYTHONWARNINGS`` show everything.
    Characters that standard output cannot hold (half an emoji, Greek in an ASCII terminal) are escaped, as on
    standard error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=_MODULES)
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds: a file keeps every state of a bar
        yield


def drop_deprecations() -> None:
    """The same for what transformers says through its logger; call it once transformers is imported."""
    if not sys.warnoptions:
        for handler in logging.getLogger("transformers").handlers:
            handler.addFilter(_is_of_the_run)


def _is_of_the_run(record: logging.LogRecord) -> bool:
    return " deprecated" not in record.getMessage()
