from __future__ import annotations

from collections.abc import Iterator

import pytest

from plot_align.sandbox import base


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads only slow a tiny model down, above all beside other test processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_THREADS", 1)
        yield
