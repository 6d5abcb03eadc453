"""What lm-eval's task files say, read without loading data, running a task's code, or using the network.

lm-eval notices a missing package, or that a task runs programs, only when it loads the task, which downloads its data.
Here the configurations are merged as lm-eval does it, and a task's Python is parsed, not run.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot_align.errors import InputError, did_you_mean, first_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Config = Mapping[str, Any]


@lru_cache(maxsize=4)
def manager(include_path: str | None) -> TaskManager:
    """lm-eval's index of its tasks and of those in ``include_path``: some 14,000 files, which take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def configs_of(name: str, include_path: str | None) -> list[dict[str, Any]]:
    """The configuration of a task, or those of all tasks of a group or tag.

    Raises:
        InputError: lm-eval has no task of this name; the nearest one is named.
    """
    index = manager(include_path).task_index
    if name not in index:
        if include_path:
            _check_readable(Path(include_path))
        advice = did_you_mean(name, index, "'lm_eval ls tasks' lists them")
        raise InputError(f"task is {name!r}, which lm-eval {metadata.version('lm_eval')} does not have; {advice}")
    return _configs(index, name, {})


def _check_readable(folder: Path) -> None:
    """Raise for a file in include_path that cannot be read. lm-eval skips it, so it is the likely reason for a missing
    task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of the file system, of YAML, of what it includes
            raise InputError(f"{path} in include_path cannot be read ({first_line(error)}); correct it") from None


def _configs(index: Mapping[str, Any], name: str, overrides: Config) -> list[dict[str, Any]]:
    entry = index[name]
    match entry.kind.name:
        case "TAG":
            return [config for task in sorted(entry.tags) for config in _configs(index, task, overrides)]
        case "GROUP":
            return _members(index, entry.cfg, overrides)
        case _:
            return [{**entry.cfg, **overrides, "task": name}]


def _members(index: Mapping[str, Any], group: Config, overrides: Config) -> list[dict[str, Any]]:
    """Members are names, names with overrides, groups within the group, and whole tasks."""
    from lm_eval.config.group import GroupConfig

    structure = {field.name for field in fields(GroupConfig)}
    shared = {**{key: value for key, value in group.items() if key not in structure}, **overrides}
    found: list[dict[str, Any]] = []
    for member in group.get("task") or []:
        own = {"task": member} if isinstance(member, str) else dict(member)
        name: Any = own.get("group", own.get("task"))
        if name in index:
            found += _configs(index, name, {**shared, **{key: own[key] for key in own.keys() - {"task", "group"}}})
        elif "group" in own:
            found += _members(index, own, shared)
        else:
            found.append({**shared, **own})
    return found


def output_type(config: Config) -> str:
    """E.g. ``"generate_until"``, which is lm-eval's default."""
    return config.get("output_type") or "generate_until"


def metric_keys(config: Config) -> list[str] | None:
    """``metric,filter`` of all metrics that a task will report; None if only its own code knows."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    named = config.get("metric_list")
    names = [entry["metric"] for entry in named] if named else DEFAULT_METRIC_REGISTRY[output_type(config)]
    if "class" in config or "process_results" in config or any(map(_file_of, names)):
        return None
    filters = [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]]
    return [f"{name},{end}" for end in filters for name in names]


def modules_of(configs: Sequence[Config]) -> list[ast.Module]:
    """The parsed Python files whose functions the tasks name, and the modules of lm-eval's tasks that these import."""
    waiting = {path for config in configs for value in _leaves(config) if (path := _file_of(value))}
    parsed: dict[Path, ast.Module] = {}
    while waiting:
        path = waiting.pop()
        parsed[path] = ast.parse(path.read_text(encoding="utf-8"), str(path))
        waiting |= set(_task_imports(parsed[path])) - parsed.keys()
    return list(parsed.values())


def runs_code(configs: Sequence[Config], modules: Sequence[ast.Module]) -> bool:
    """Whether a task runs code that the model writes: it is marked so, or its Python calls ``exec``.

    Some such tasks are not marked (cruxeval).
    """
    return any(config.get("unsafe_code") for config in configs) or any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "exec"
        for module in modules
        for node in ast.walk(module)
    )


def missing_packages(modules: Sequence[ast.Module]) -> list[str]:
    """Packages that the tasks' Python imports and that are not installed, by their names for pip."""
    names = {name.partition(".")[0] for module in modules for name in _imports(module.body)}
    return sorted({_requirement(name) for name in names if importlib.util.find_spec(name) is None})


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _file_of(value: Any) -> Path | None:
    """The file of a function: lm-eval's index has ``!function utils.f`` as ``/folder of the YAML/utils.f``."""
    if not isinstance(value, str) or not os.path.isabs(value):
        return None
    folder, name = os.path.split(value)
    file = os.path.join(folder, *name.split(".")[:-1]) + ".py"
    return Path(file) if os.path.isfile(file) else None  # a prompt may begin with a slash without being a path


def _imports(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Modules that a module needs to be imported; those within ``try`` are left out."""
    for statement in body:
        match statement:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield module
            case ast.Try(body=tried, handlers=handlers) if any(
                isinstance(node, ast.Raise) for handler in handlers for node in ast.walk(handler)
            ):
                yield from _imports(tried)


def _task_imports(module: ast.Module) -> Iterator[Path]:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    for statement in ast.walk(module):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("lm_eval.tasks."):
            base = root.joinpath(*str(statement.module).split(".")[2:])
            candidates = [base, *(base / alias.name for alias in statement.names)]
            yield from (file for path in candidates if (file := path.with_suffix(".py")).is_file())


def _requirement(module: str) -> str:
    """The requirement for a module: from lm-eval's extras, else the module's name.

    A package's name may continue the module's (antlr4-python3-runtime), unless one has exactly that name.
    """
    wanted = module.replace("_", "-").lower()
    required = {
        re.split(r"[\s;\[<>=!~]", line)[0].replace("_", "-").lower(): line.partition(";")[0].strip()
        for line in metadata.requires("lm_eval") or []
    }
    longer = (required[name] for name in required if name.startswith(f"{wanted}-"))
    return required.get(wanted) or next(longer, module)
