"""The files saved with a tuned model: PLOT's options, the preference distribution, a model card, a training record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save

from plot_align._version import __version__
from plot_align.config import PlotConfig
from plot_align.io import complete_or_absent
from plot_align.preference.distribution import PreferenceDistribution

CONFIG_NAME = "plot_align.json"
PREFERENCE_NAME = "preference.safetensors"
TAG = "plot-align"
_HEADING = "## PLOT"
_HOME = "https://github.com/plot-align/plot-align"


def save(folder: Path, config: PlotConfig, preference: PreferenceDistribution, *, step: int) -> None:
    """Writes ``plot_align.json`` and ``preference.safetensors`` beside the weights."""
    content = {
        "schema_version": 1,
        "plot_align": __version__,
        "config": config.to_dict(),
        "global_step": step,
        "preference": {"file": PREFERENCE_NAME, "provenance": preference.provenance},
    }
    with complete_or_absent(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    preference.save(folder / PREFERENCE_NAME)


def tag(model: Any) -> None:
    """Adds ``plot-align`` to the tags that ``model.push_to_hub`` and a trainer's write into the model card."""
    if hasattr(model, "add_model_tags"):
        model.add_model_tags(TAG)


def extend_model_card(path: Path, config: PlotConfig, preference: PreferenceDistribution, kind: str) -> None:
    """Adds a tag, and a section on the term, to the model card that TRL wrote; replaces that of an earlier save."""
    if not path.exists():
        return
    card = path.read_text(encoding="utf-8").split(f"\n{_HEADING}\n")[0].rstrip("\n")
    options = "\n".join(f"| `{name}` | `{value}` |" for name, value in config.to_dict().items())
    chosen, rejected = int(preference.chosen_counts.sum()), int(preference.rejected_counts.sum())
    section = f"""
{_HEADING}

This model was tuned with {_loss(config)}, with
{_weight(config)} on {kind}'s loss, by [plot-align]({_HOME}) {__version__}. Its preference distribution
was counted over {chosen:,} preferred and {rejected:,} rejected tokens; `{PREFERENCE_NAME}` holds it and
`{CONFIG_NAME}` says from which data.

| option | value |
|---|---|
{options}
"""
    with complete_or_absent(path) as temporary:
        temporary.write_text(card + "\n" + section, encoding="utf-8")
        metadata = metadata_load(temporary) or {}
        tags = metadata.get("tags") or []
        if not config.is_off and TAG not in tags:
            metadata_save(temporary, {**metadata, "tags": [*tags, TAG]})


def _loss(config: PlotConfig) -> str:
    if config.is_reward:  # DEFT's reward instead of a distance
        return "`L = L_vanilla − ω·R` ([arXiv 2604.01787](https://arxiv.org/abs/2604.01787))"
    return "`L = L_vanilla + α·L_PLOT` ([arXiv 2604.01837](https://arxiv.org/abs/2604.01837))"


def _weight(config: PlotConfig) -> str:
    name = "ω" if config.is_reward else "α"
    if config.schedule == "balance":
        return f"{name} balanced to a gradient ratio of {config.ratio:g}"
    suffix = "" if config.schedule == "constant" else f" to {config.alpha_end:g} ({config.schedule})"
    return f"{name} = {config.alpha:g}{suffix}"


def results_of(trainer: Any, metrics: dict[str, Any], *, resumed: bool = False) -> dict[str, Any]:
    """The results of a training record: the metrics of ``trainer.train()``, and the log.

    ``train_loss`` is the mean over all steps. The trainer's is that of the steps after the last interruption, and 0
    where there was none left; it stays where the log does not hold every step, and is left out of a resumed run.
    """
    mean = mean_loss(trainer.state.log_history, trainer.state.global_step)

    def corrected(entry: dict[str, Any]) -> dict[str, Any]:
        if "train_loss" not in entry or (mean is None and not resumed):
            return entry
        rest = {name: value for name, value in entry.items() if name != "train_loss"}
        return rest if mean is None else {**rest, "train_loss": mean}

    return {
        "steps": trainer.state.global_step,
        "metrics": corrected(metrics),
        "last_log": _last_log(trainer, "loss"),
        "eval": _last_log(trainer, "eval_loss"),  # empty without an evaluation
        "history": [corrected(entry) for entry in thinned(trainer.state.log_history)],
    }


def mean_loss(log: list[dict[str, Any]], steps: int) -> float | None:
    """The mean loss of a step; each entry of ``log`` has that of the steps since the one before. None where the log
    does not reach to the last of ``steps``."""
    total, before = 0.0, 0
    for entry in log:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - before)
            before = entry["step"]
    return total / steps if steps and before == steps else None


def _last_log(trainer: Any, having: str) -> dict[str, Any]:
    """The last entry of the log that has the key ``having``; an empty one if there is none."""
    return next((entry for entry in reversed(trainer.state.log_history) if having in entry), {})


def thinned(entries: list[dict[str, Any]], most: int = 1000) -> list[dict[str, Any]]:
    """At most ``most`` entries of a log, evenly spaced and with both ends, because a record is read as a whole."""
    last = len(entries) - 1
    if last < most:
        return entries
    return [entries[round(place * last / (most - 1))] for place in range(most)]
