"""Show the results of a benchmark as tables and as one line to paste into an issue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_MIB = 2**20
_STEP_ARMS = {
    "trl": "TRL itself",
    "off": "PLOT off",
    "on": "PLOT on",
    "measured": "on, balancing",
    "training": "training",
}


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Rich tables of the steps and, if there is one, the profile."""
    from rich.table import Table

    step = results["step"]
    against = step["against_trl"]["training"]
    notes = Table(show_header=False, box=None)
    notes.add_column()
    notes.add_column(justify="right")
    notes.add_row("training / TRL itself, time", ratio(against["time"]))
    notes.add_row("training / TRL itself, peak memory", ratio(against["memory"]))
    notes.add_row("PLOT's share of a training, from on / off", f"{100 * step['plot_share']:.2f} %")
    found = [arms_table("whole steps", step["arms"], _STEP_ARMS), notes]
    if "profile" in results:
        found.append(profile_table(results["profile"]))
    return found


def arms_table(title: str, arms: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    """A table of all arms against ``off``."""
    from rich.table import Table

    rounds = next(iter(arms.values()))["time"]["n"]
    table = Table("arm", title=f"{title}, {rounds} rounds")
    for column in ("ms", "time / off", "95 % interval", "peak MiB", "/ off", "page faults"):
        table.add_column(column, justify="right")
    for name, arm in arms.items():
        time, memory = arm["time"], arm["memory"]
        measured = memory["n"] > 0
        table.add_row(
            names.get(name, name),
            f"{1e3 * arm['seconds']['value']:,.2f}",
            f"{time['value']:.4f}",
            _between(time["interval"]),
            f"{arm['peak']['value'] / _MIB:,.0f}" if measured else "not measured",
            f"{memory['value']:.4f}" if measured else "",
            f"{arm['faults']['value']:,.0f}" if "faults" in arm else "",
        )
    return table


def profile_table(profile: Mapping[str, Any]) -> Table:
    """A table of the named ranges of a profiled step."""
    from rich.table import Table

    table = Table("range", title=f"one profiled step of {milliseconds(profile['seconds'])}")
    for column in ("ms", "calls", "share"):
        table.add_column(column, justify="right")
    for name, entry in profile["ranges"].items():
        table.add_row(name, f"{1e3 * entry['seconds']:,.2f}", str(entry["calls"]), f"{100 * entry['share']:.2f} %")
    table.add_section()
    table.add_row("PLOT alone", "", "", f"{100 * profile['plot_share']:.2f} %")
    table.add_row("the whole head", "", "", f"{100 * profile['head_share']:.2f} %")
    return table


def line(record: Mapping[str, Any]) -> str:
    """One line: version, device, model, micro-batch, ratios."""
    config, step = record["config"], record["results"]["step"]
    hardware = record["hardware"]
    machine = hardware["gpus"][0]["name"] if config["device"] == "cuda" else f"{hardware['cpu']} (CPU)"
    model = config["model"] + (" (random weights)" if config["random_weights"] else "")
    plot = config["plot"]
    parts = [
        f"plot-align {record['versions']['plot-align']}",
        f"torch {record['versions']['torch']}",
        machine,
        model,
        f"{config['rows']} x {config['length']} {config['dtype']} {config['method']}"
        + (" bf16" if config["bf16"] else "")
        + (" peft" if config["use_peft"] else "")
        + (" checkpointing" if config["gradient_checkpointing"] else ""),
        f"{plot['divergence']}/{plot['geometry']}/{plot['granularity']}",
        f"time on/off {ratio(step['arms']['on']['time'])}",
        f"training/TRL {ratio(step['against_trl']['training']['time'])}",
        f"peak memory on/off {step['arms']['on']['memory']['value']:.4f}",
        f"/TRL {step['against_trl']['training']['memory']['value']:.4f}",
    ]
    return " | ".join(parts)


def ratio(entry: Mapping[str, Any]) -> str:
    """``1.003 (0.999–1.007, n=15)``: median and bootstrap interval."""
    if not entry["n"]:
        return "not measured"
    return f"{entry['value']:.4f} ({_between(entry['interval'])}, n={entry['n']})"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f} ms"


def _between(ends: Any) -> str:
    return f"{ends[0]:.4f}–{ends[1]:.4f}"
