"""The options of the term in a framework's own configuration file: a block called ``plot``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plot_align.config import PlotConfig
from plot_align.errors import InputError, did_you_mean
from plot_align.preference.distribution import PreferenceDistribution


@dataclass(frozen=True)
class PlotBlock:
    """The options of the term, and the preference distribution; ``None``: the trainer's own pairs are counted."""

    config: PlotConfig
    preference: PreferenceDistribution | None = None


def read_block(block: Any, *, place: str = "plot") -> PlotBlock | None:
    """Reads a block of options, so that a mistake stops a run before its model is loaded.

        plot:
          alpha: 0.1                            # any option of docs/options.md, by name
          preference: preference.safetensors    # from `plot-align estimate`; without it the training pairs are counted

    Args:
        block: the mapping; ``None`` means that there is none, and an empty one takes the defaults.
        place: where it came from, in messages.

    Returns:
        The options; ``None`` without a block.

    Raises:
        InputError: no mapping, an unknown option or one outside its range, or a preference that cannot be read.
    """
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise InputError(f"{place} is {block!r}, expected a mapping of options; write {{}} for the defaults")
    options = dict(block)
    known = {*PlotConfig().to_dict(), "preference"}
    for name in options:
        if name not in known:
            advice = did_you_mean(str(name), known, "see docs/options.md")
            raise InputError(f"unknown option {str(name)!r} in {place}; {advice}")
    preference = options.pop("preference", None)
    try:
        config = PlotConfig.from_options(**options)
        return PlotBlock(config, None if preference is None else PreferenceDistribution.load(preference))
    except InputError as error:
        raise InputError(f"in {place}: {error}") from None
