"""General ability: any task of EleutherAI's lm-evaluation-harness, through its Python API on the live model.

The number is lm-eval's own: prompts, few-shot examples, answers and scores come from ``lm_eval.simple_evaluate``, with
its own default seeds for prompts, so that results stay comparable with ``lm_eval`` itself and published ones. This
module adds one value per document, so that models are compared document by document.

Source: L. Gao et al., "A framework for few-shot language model evaluation" (2024), doi:10.5281/zenodo.12608602.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import re
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from io import StringIO
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plot_align import parallel
from plot_align.errors import InputError, RunError, did_you_mean, first_line
from plot_align.evaluation.harness_tasks import (
    configs_of,
    manager,
    metric_keys,
    missing_packages,
    modules_of,
    output_type,
    runs_code,
)
from plot_align.evaluation.subject import Found, OnItem, Subject
from plot_align.inference.chat import evaluating
from plot_align.io import parse_json
from plot_align.parallel import OutOfStep, everywhere, on_main
from plot_align.results import Better, Quantity, of_items, of_whole

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

# Metrics whose values are between 0 and 1. By name, since lm-eval does not say and two models must agree on it.
_RATE = re.compile(r"(acc|exact_match|math_verify|pass@|pass_at_|mc[12]$|em$)|.*_(acc|match|em)$")
_RESAMPLES = 999
_SLOW = {"bleu": 99, "chrf": 99, "chrf++": 99, "ter": 99}  # of a whole corpus: lm-eval, too, resamples them less


@dataclass
class LMEval:
    """One task, group or tag of lm-eval.

    The score is ``metric``, by default the first of the task's ``metric_list`` under its first filter, or a group's
    first one. All others are further quantities, named as in lm-eval (``"acc_norm,none"``). A group weights its
    documents as lm-eval does. If lm-eval aggregates nothing (a tag, some groups), every document counts equally.

    Greedy answers and log-probabilities are cached in ``subject.folder/lm_eval`` and reused after an interruption;
    sampled answers are not. An interruption between batches changes nothing; one within a batch shifts the later ones,
    which can change a log-probability by rounding and, rarely, an answer.

    Args:
        task: name of a task, a group or a tag.
        metric: the score: ``"exact_match"`` or, with its filter, ``"exact_match,flexible-extract"``.
        num_fewshot: examples before each question; None: the task's own.
        limit: how many documents of each task, or which fraction of them (below 1); None for all.
        apply_chat_template: use the chat template, with few-shot examples as turns of the conversation.
        include_path: folder with tasks of your own (YAML), which override lm-eval's.
        gen_kwargs: override those of the task, e.g. ``{"max_gen_toks": 512}``.
        allow_code_execution: allow tasks that run what the model writes.
        title: for tables; None for the task's name and the metric.
    """

    task: str
    metric: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = True
    include_path: str | None = None
    gen_kwargs: dict[str, Any] | None = None
    allow_code_execution: bool = False
    title: str | None = None

    def check(self) -> None:
        """Check that lm-eval and the task's packages are installed, and that the options fit the task. Uses no
        network.

        Raises:
            InputError: they do not.
        """
        self._check_options()
        if (lacking := self.lacks()) is not None:
            raise InputError(lacking)
        configs = configs_of(self.task, self.include_path)
        known = [metric_keys(config) for config in configs]
        if self.metric and None not in known:
            _chosen(self.metric, [key for keys in known for key in keys or ()], self.task)
        if self.num_fewshot and all(config.get("num_fewshot") == 0 for config in configs):
            raise InputError(
                f"num_fewshot is {self.num_fewshot}, but {self.task} takes no examples; leave num_fewshot out"
            )
        if self.gen_kwargs and all(output_type(config) != "generate_until" for config in configs):
            raise InputError(f"gen_kwargs came for {self.task}, which generates nothing; leave gen_kwargs out")

    def lacks(self) -> str | None:
        """What the task still needs to run here, and how to provide it; None if nothing.

        Raises:
            InputError: there is no such task.
        """
        if importlib.util.find_spec("lm_eval") is None:
            return f'the task {self.task!r} needs lm-eval, which is not installed; pip install "plot-align[eval]"'
        if self.executes_code and not self.allow_code_execution:
            return (
                f"{self.task} runs programs that the model writes, on this machine and with your rights: they can "
                "delete or send away what you can; run it in a container without network and secrets, and give "
                "--allow_code_execution"
            )
        if missing := missing_packages(modules_of(configs_of(self.task, self.include_path))):
            needed = " ".join(f'"{package}"' for package in missing)
            return f"{self.task} needs packages that are not installed; pip install {needed}"
        return None

    @property
    def executes_code(self) -> bool:
        """Whether the task runs programs that the model writes."""
        configs = configs_of(self.task, self.include_path)
        return runs_code(configs, modules_of(configs))

    def _check_options(self) -> None:
        shots, limit = self.num_fewshot, self.limit
        if shots is not None and shots < 0:
            raise InputError(f"num_fewshot is {shots}, expected 0 or more")
        if limit is not None and not (0 < limit < 1 or (isinstance(limit, int) and limit >= 1)):
            raise InputError(f"limit is {limit!r}, expected how many documents, or a fraction of them between 0 and 1")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"include_path is {self.include_path}, which is no folder; name the one of your tasks")

    def run(self, subject: Subject) -> Found:
        """See :class:`plot_align.evaluation.subject.Measure`.

        Raises:
            InputError: as :meth:`check`, and for a metric that the task turns out not to have.
            RunError: the task's data cannot be loaded, or lm-eval stops.
        """
        self.check()
        with _own_randomness(), evaluating(subject.model), _code_allowed(self.allow_code_execution):
            notes = _Notes()
            with _quiet(notes):
                loaded = everywhere(self._load)
            alone = parallel.size() == 1 or self._for_one(loaded["tasks"].values())
            found = partial(self._found, subject, loaded, notes, alone)
            if alone:
                return on_main(found)
            # lm-eval's processes meet on their own, so an error of one cannot be told to the others.
            try:
                own = found()
            except Exception as error:
                raise OutOfStep(f"{self.task} failed in process {parallel.rank()} ({first_line(error)})") from error
            return on_main(lambda: own)

    def _for_one(self, tasks: Iterable[Any]) -> bool:
        """Whether one process must answer alone: sampling depends on earlier draws, and lm-eval cannot leave a process
        without documents."""
        if any(
            {**(task.config.generation_kwargs or {}), **(self.gen_kwargs or {})}.get("do_sample") for task in tasks
        ):
            return True
        return any(_documents(task, self.limit) < parallel.size() for task in tasks)

    def _found(self, subject: Subject, loaded: Mapping[str, Any], notes: _Notes, alone: bool) -> Found:
        """The quantities, in the main process only."""
        cache = _cache(subject)
        with ExitStack() as stack:
            model = _language_model(subject, alone, partial(subject.bar, self.task))
            stack.enter_context(_quiet(notes))
            stack.callback(_close_cache, model)
            results = self._evaluate(model, loaded, cache, subject.seed)
        if results is None:
            return Found({})
        for samples in results["samples"].values():  # by process, if there are several
            filters = list(dict.fromkeys(sample["filter"] for sample in samples))
            samples.sort(key=lambda sample, filters=filters: (filters.index(sample["filter"]), sample["doc_id"]))
        outcome = _Outcome(loaded["tasks"], loaded["groups"].get(self.task), results, self.task)
        keys = outcome.keys()
        score = _chosen(self.metric, keys, self.task) if self.metric else outcome.primary(keys)
        order = [score, *(key for key in keys if key != score)]
        return Found(
            {key: outcome.quantity(key, self._title(key, score), subject.seed) for key in order},
            {"lm_eval": metadata.version("lm_eval"), "tasks": outcome.tasks(), "warnings": notes.lines()},
        )

    def _title(self, key: str, score: str) -> str:
        if self.title and key == score:
            return self.title
        name, end = key.rsplit(",", 1)
        return f"{self.title or self.task}, {name}" + (f" ({end})" if end != "none" else "")

    def _load(self) -> dict[str, Any]:
        """lm-eval's tasks and groups, with their data."""
        try:
            return manager(self.include_path).load([self.task])
        except Exception as error:  # a task's own code and its data can raise anything
            raise RunError(
                f"{self.task} cannot be loaded ({type(error).__name__}: {first_line(error)}); check that its data can "
                "be downloaded or are in the cache"
            ) from error

    def _evaluate(self, model: Any, loaded: Mapping[str, Any], cache: str, seed: int) -> Any:
        from lm_eval import simple_evaluate

        groups = loaded["groups"]
        try:
            with _cache_without_pickles():
                return simple_evaluate(
                    model,
                    tasks=[groups[self.task]] if self.task in groups else list(loaded["tasks"].values()),
                    task_manager=manager(self.include_path),
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    apply_chat_template=self.apply_chat_template,
                    fewshot_as_multiturn=self.apply_chat_template,
                    gen_kwargs=self.gen_kwargs,
                    use_cache=cache,
                    torch_random_seed=seed,
                    bootstrap_iters=0,  # the intervals are ours
                    confirm_run_unsafe_code=self.allow_code_execution,
                )
        except RuntimeError:
            raise  # out of memory and the like: not the task's fault
        except Exception as error:
            raise RunError(
                f"lm-eval stopped at {self.task} ({type(error).__name__}: {first_line(error)}); change its options, "
                "or leave it out"
            ) from error


@dataclass
class _Outcome:
    """What lm-eval returned.

    Args:
        loaded: lm-eval's tasks by name. group: the chosen group; None for a task or a tag.
        results: of ``lm_eval.simple_evaluate``. name: of the task, group or tag.
    """

    loaded: Mapping[str, Task]
    group: Group | None
    results: Mapping[str, Any]
    name: str

    def _table(self, name: str) -> dict[str, float]:
        """``metric,filter`` → number."""
        found = self.results["results"].get(name, {})
        return {
            key: float(value)
            for key, value in found.items()
            if "," in key and not _metric(key).endswith("_stderr") and _is_number(value)
        }

    def keys(self) -> list[str]:
        """Keys of all quantities, in lm-eval's order. If it aggregates nothing: the means that all tasks have."""
        if table := self._table(self.name):
            return list(table)
        tables = [self._table(task) for task in self.loaded]
        keys = [key for key in tables[0] if all(key in table for table in tables) and self._items(key)]
        if not keys:
            raise InputError(f"lm-eval has no number for {self.name} as a whole; name one of its tasks instead")
        return keys

    def primary(self, keys: Sequence[str]) -> str:
        """The first metric of the YAML under its first filter, or the group's first."""
        named = [] if self.group else next(iter(self.loaded.values())).aggregation()
        return next((key for name in named for key in keys if _metric(key) == name), keys[0])

    def quantity(self, key: str, title: str, seed: int) -> Quantity:
        """A mean over documents if lm-eval's number is one, otherwise the number alone."""
        better, own, items = self._better(key), self._table(self.name), self._items(key)
        if not items:
            n = sum(len(values) for values in self._values(key).values())
            return of_whole(title, own[key], n, better=better, interval=self._interval(key, seed))
        entry = of_items(
            title, items, better=better, bounds=_bounds(key, items), weights=self._weights(key), seed=seed
        )
        return {**entry, "value": own.get(key, entry["value"])}  # exactly lm-eval's number

    def tasks(self) -> dict[str, dict[str, Any]]:
        """How each task was run, and its numbers."""
        results = self.results
        return {
            name: {
                "version": results["versions"][name],
                "num_fewshot": results["n-shot"][name],
                "documents": results["n-samples"][name]["effective"],
                "of": results["n-samples"][name]["original"],
                "data": _digest([sample["doc_hash"] for sample in results["samples"][name]]),
                "config": _digest(_portable(results["configs"][name])),
                "metrics": self._table(name),
            }
            for name in self.loaded
        }

    def _values(self, key: str) -> dict[str, dict[str, Any]]:
        """Task → document → what lm-eval aggregates."""
        metric, end = key.rsplit(",", 1)
        return {
            task: {
                str(s["doc_id"]): s[metric]
                for s in self.results["samples"][task]
                if s["filter"] == end and metric in s
            }
            for task in self.loaded
            if key in self._table(task)
        }

    def _means(self, key: str) -> dict[str, dict[str, float]] | None:
        """Task → document → value; None if the number of a task is not the mean over its documents.

        Found by computing the mean, since tasks may bring their own aggregations. NaN marks a document that a metric
        skips.
        """
        found: dict[str, dict[str, float]] = {}
        for task, values in self._values(key).items():
            if not all(_is_number(value) for value in values.values()):
                return None
            numbers = {doc: float(value) for doc, value in values.items() if not math.isnan(value)}
            mean = math.fsum(numbers.values()) / len(numbers) if numbers else math.nan
            if not math.isclose(mean, self._table(task)[key], rel_tol=1e-9, abs_tol=1e-12):
                return None
            found[task] = numbers
        return found

    def _items(self, key: str) -> dict[str, float] | None:
        means = self._means(key)
        if means is None:
            return None
        if self.name in means:
            return means[self.name]
        return {f"{task}/{doc}": value for task, values in means.items() for doc, value in values.items()}

    def _weights(self, key: str) -> dict[str, float] | None:
        """Weights of a group's documents: equal, or, if the group says so, such that its tasks count equally."""
        if self.group is None:
            return None
        found = {}
        for task, values in (self._means(key) or {}).items():
            size = self.results["results"][task]["sample_len"] if self._by_size(key) else 1
            found.update({f"{task}/{doc}": size / len(values) for doc in values})
        return found if len(set(found.values())) > 1 else None

    def _by_size(self, key: str) -> bool:
        metric, end = key.rsplit(",", 1)
        listed = (self.group.aggregate_metric_list if self.group else None) or []
        return next(
            (
                entry.weight_by_size
                for entry in listed
                if entry.metric == metric and end in (entry.filter_list or [end])
            ),
            True,
        )

    def _better(self, key: str) -> Better:
        table = self.results["higher_is_better"]
        ways = {table[task].get(_metric(key)) for task in self._values(key)}
        return {True: "higher", False: "lower", None: None}[ways.pop()] if len(ways) == 1 else None

    def _interval(self, key: str, seed: int) -> tuple[float, float] | None:
        """95 % percentile bootstrap over the documents, with the task's own aggregation; None for a group."""
        if self.name not in self.loaded:
            return None
        aggregate = self.loaded[self.name].aggregation().get(_metric(key))
        values = list(self._values(key)[self.name].values())
        if aggregate is None or len(values) < 2:
            return None
        rng, found = np.random.default_rng(seed), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resample may lack a class
            for _ in range(_SLOW.get(_metric(key), _RESAMPLES)):
                try:
                    found.append(float(aggregate([values[i] for i in rng.integers(len(values), size=len(values))])))
                except (ArithmeticError, LookupError, ValueError):
                    return None
        low, high = np.nanquantile(found, [0.025, 0.975])
        return float(low), float(high)


def _metric(key: str) -> str:
    return key.rsplit(",", 1)[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, np.bool_)) and not math.isinf(value)


def _bounds(key: str, items: Mapping[str, float]) -> tuple[float, float] | None:
    rate = _RATE.match(_metric(key)) and all(0 <= value <= 1 for value in items.values())
    return (0.0, 1.0) if rate else None


def _chosen(metric: str, keys: Sequence[str], task: str) -> str:
    """The first of ``keys`` (``metric,filter``) that equals ``metric`` or has it before the comma.

    Raises:
        InputError: there is none.
    """
    for key in keys:
        if metric in (key, _metric(key)):
            return key
    advice = did_you_mean(metric, keys, f"known are {', '.join(dict.fromkeys(keys))}")
    raise InputError(f"metric is {metric!r}, which {task} does not have; {advice}")


def _documents(task: Any, limit: float | None) -> int:
    """How many documents of a task lm-eval uses."""
    count = len(task.eval_docs)
    return count if limit is None else min(count, math.ceil(count * limit) if limit < 1 else int(limit))


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A task's configuration without the path of its file."""
    about = {key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"}
    return {**config, "metadata": about}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _cache(subject: Subject) -> str:
    """The file of cached answers, without ``_rank0.db``, which lm-eval appends: each process has its own.

    lm-eval identifies answers by the request's text and options; the file's name adds model, template and versions.

    Raises:
        InputError: the file is damaged.
    """
    model = subject.model
    settings = [model.config.to_json_string(), model.generation_config.to_json_string()]
    packages = {name: metadata.version(name) for name in ("lm_eval", "transformers", "torch")}
    path = str(subject.folder / "lm_eval" / _digest([subject.identity, settings, packages, "JSON"]))
    file = Path(f"{path}_rank{parallel.rank()}.db")
    if file.is_file():
        try:
            with closing(sqlite3.connect(file)) as connection:
                connection.execute("PRAGMA schema_version")
        except sqlite3.Error as error:
            raise InputError(f"{file} cannot be read ({error}); delete it, and its answers are made again") from None
    return path


@contextmanager
def _cache_without_pickles() -> Iterator[None]:
    """lm-eval's cache holds JSON in place of pickles, which would run code where the folder came from a stranger."""
    import sqlitedict

    pickling: Any = sqlitedict.SqliteDict

    class Plain(sqlitedict.SqliteDict):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "encode": json.dumps, "decode": _decoded})

    sqlitedict.SqliteDict = Plain
    try:
        yield
    finally:
        sqlitedict.SqliteDict = pickling


def _decoded(text: str) -> Any:
    value = parse_json(text)
    return tuple(value) if isinstance(value, list) else value  # a log-probability, and whether it is the greedy answer


def _close_cache(model: Any) -> None:
    """Flush the cache to disk, even after an interruption."""
    if model.cache_hook.dbdict is not None:
        model.cache_hook.dbdict.close()


def _language_model(subject: Subject, alone: bool, bar: Callable[[int], OnItem]) -> Any:
    """lm-eval's wrapper of a model; tokenizer and model stay unchanged."""
    with _quiet(_Notes()):
        # lm-eval sets a tokenizer's padding token and padding side.
        model = _hflm()(subject.model, tokenizer=copy.deepcopy(subject.tokenizer), batch_size=subject.batch_size)
    model.bar = bar
    if not alone:
        from accelerate import Accelerator

        model.accelerator = Accelerator(cpu=subject.model.device.type == "cpu")
        model._rank, model._world_size = parallel.rank(), parallel.size()
    return model


@cache
def _hflm() -> Any:
    """lm-eval's ``HFLM`` with our progress bar."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """``bar`` is called with the number of requests and returns a function that advances it."""

        bar: Callable[[int], OnItem]
        cache_hook: Any
        _world_size: int

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self._under_a_bar(super().loglikelihood, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self._under_a_bar(super().generate_until, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            answer, size = super().loglikelihood_rolling, self.batch_size

            def by_parts(requests: list[Any], disable_tqdm: bool) -> list[Any]:
                """Cache texts as they are done; lm-eval would cache the first only after the last."""
                parts = (requests[i : i + size] for i in range(0, len(requests), size))
                return [total for part in parts for total in answer(part, disable_tqdm)]

            # lm-eval would wait here for other processes, which may have all their answers in the cache.
            ranks, self._world_size = self._world_size, 1
            try:
                return self._under_a_bar(by_parts, requests)
            finally:
                self._world_size = ranks

        def _under_a_bar(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
            hook = self.cache_hook
            self.cache_hook = _Counting(hook, self.bar(len(requests)))
            try:
                return answer(requests, disable_tqdm=True)
            finally:
                self.cache_hook = hook

    return Model


class _Counting:
    """Advances a bar by one for each answer that lm-eval caches."""

    def __init__(self, hook: Any, on_item: OnItem) -> None:
        self._hook, self._on_item = hook, on_item

    def add_partial(self, *answered: Any) -> None:
        self._hook.add_partial(*answered)
        self._on_item(1)


class _Notes(logging.Handler):
    """lm-eval's warnings, once for each place in its code."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._first: dict[tuple[str, int], str] = {}
        self._count: dict[tuple[str, int], int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        place = (record.pathname, record.lineno)
        self._first.setdefault(place, record.getMessage())
        self._count[place] = self._count.get(place, 0) + 1

    def lines(self) -> list[str]:
        return [
            text + (f" ({self._count[place]} times)" if self._count[place] > 1 else "")
            for place, text in self._first.items()
        ]


@contextmanager
def _quiet(notes: _Notes) -> Iterator[None]:
    """lm-eval's warnings go to ``notes`` instead of the terminal, and its bars nowhere."""
    logger = logging.getLogger("lm_eval")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(notes)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.removeHandler(notes)
        logger.propagate = propagate


@contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Set the variable that Hugging Face's code_eval checks when it is loaded and when it runs."""
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        if allowed and before is None:
            del os.environ["HF_ALLOW_CODE_EVAL"]
        elif allowed and before is not None:
            os.environ["HF_ALLOW_CODE_EVAL"] = before


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch, which lm-eval seeds."""
    import torch

    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
