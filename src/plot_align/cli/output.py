"""What a command lets the libraries below it say: nothing of their own future, no control characters, and in a file
no moving bars."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from plot_align.text import printable

_LIBRARIES = "transformers|trl|accelerate|peft|datasets|huggingface_hub|torch"
# Their warnings belong to the module that calls them, which may be ours.
_MODULES = rf"(?:{_LIBRARIES}|plot_align)(?:\.|$)"


@contextmanager
def readable() -> Iterator[None]:
    """Within this context transformers, TRL and what they build on do not announce what they will change or remove.

    What they say of the data, the model or the run stays, with control characters escaped. ``python -W`` and
    ``PYTHONWARNINGS`` show everything. Characters that standard output cannot hold (half an emoji, Greek in an ASCII
    terminal) are escaped, as on standard error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def formatted(*args: Any, **kwargs: Any) -> str:
        return printable(format_warning(*args, **kwargs))

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        logging.setLogRecordFactory(_Printable)
        stack.callback(logging.setLogRecordFactory, make_record)
        warnings.formatwarning = formatted
        stack.callback(setattr, warnings, "formatwarning", format_warning)
        if not sys.warnoptions:
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=_MODULES)
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds: a file keeps every state of a bar
        yield


class _Printable(logging.LogRecord):
    """A record whose message may quote a model's files or data."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def drop_deprecations() -> None:
    """The same for what transformers says through its logger; call it once transformers is imported."""
    if not sys.warnoptions:
        for handler in logging.getLogger("transformers").handlers:
            handler.addFilter(_is_of_the_run)


def _is_of_the_run(record: logging.LogRecord) -> bool:
    return " deprecated" not in record.getMessage()
