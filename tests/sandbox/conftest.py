from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from plot_align.sandbox import BaseConfig, base, build_base


@pytest.fixture(scope="session")
def tiny_config() -> BaseConfig:
    return BaseConfig(vocab_size=400, hidden_size=32, layers=1, heads=2, intermediate_size=48, steps=6, batch_size=8)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads only slow a tiny model down, above all beside other test processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_THREADS", 1)
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_config: BaseConfig) -> Path:
    return build_base(seed=3, cache_dir=tmp_path_factory.mktemp("bases"), progress=False, config=tiny_config)
