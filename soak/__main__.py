"""Inject faults into the commands and write down what came of it.

    python -m soak                                   # all that is still to be done, about an hour on two cores
    python -m soak --faults kill,term --commands evaluate --number 5
    python -m soak --report                          # docs/reliability.md and docs/reliability.json from the record

Every injection is written to the record before the next begins, so that the same call goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from soak import inputs, report  # noqa: E402 (the libraries read the variables above)
from soak.commands import COMMANDS, Command  # noqa: E402
from soak.compare import differences, snapshot  # noqa: E402
from soak.faults import FAULTS, OF_RANKS, Case, Missed  # noqa: E402
from soak.processes import Running, adopt_orphans, end_children, import_like  # noqa: E402

ATTEMPTS = 8  # until a fault hits a command before its end
NUMBERS = {"none": 2, "kill": 20, "term": 20, "truncated": 20, "altered": 20, "rank-killed": 20}
OTHERS = 6  # injections of the other faults
LONG = {"demo": 3}  # injections of other faults than the signals into a command ten times as long as the others


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a command does when it is left alone."""

    seconds: float
    work: float
    size: int
    memory: int
    files: dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Inject what is still to be injected; 1 if something ended otherwise than it should."""
    options = make_parser().parse_args(arguments)
    record = Record(options.folder / "record.json")
    if options.report:
        report.write(record.entries, inputs.ROOT / "docs")
        return 0
    return soak(options, record)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=_names(FAULTS), default=list(FAULTS), metavar="A,B")
    parser.add_argument("--commands", type=_names(COMMANDS), default=list(COMMANDS), metavar="A,B")
    parser.add_argument("--number", type=int, metavar="N", help="injections of each (default: 2 to 20, by the fault)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="(%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of injections that ended otherwise")
    parser.add_argument("--report", action="store_true", help="write the page from the record, and inject nothing")
    return parser


def _number(fault: str, command: str) -> int:
    number = NUMBERS.get(fault, OTHERS)
    return number if fault in ("kill", "term") else min(number, LONG.get(command, number))


def _names(known: dict[str, Any]) -> Any:
    def names(text: str) -> list[str]:
        found = [part.strip() for part in text.replace(", 2 ranks", "+2").split(",") if part.strip()]
        found = [name.replace("+2", ", 2 ranks") for name in found]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown name {name!r}, expected some of {', '.join(known)}")
        return found

    return names


class Record:
    """All injections, in one file that is complete after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def add(self, entry: dict[str, Any]) -> None:
        from plot_align.io import write_json

        self.entries.append(entry)
        write_json(self.path, self.entries)

    def has(self, command: str, fault: str, number: int) -> bool:
        return any((e["command"], e["fault"], e["number"]) == (command, fault, number) for e in self.entries)


def soak(options: argparse.Namespace, record: Record) -> int:
    folder = options.folder.absolute()
    todo = [
        (command, fault, number)
        for number in range(options.number or max(NUMBERS.values()))
        for fault in options.faults
        for command in options.commands
        if number < (options.number or _number(fault, command))
        and ((COMMANDS[command].ranks > 1) == (fault in OF_RANKS) or fault == "none")
        and not record.has(command, fault, number)
    ]
    if not todo:
        print("all of it is in the record")
        return 0
    import torch

    torch.set_num_threads(1)
    adopt_orphans()
    inputs.make(folder / "inputs")
    names = list(dict.fromkeys(command for command, _, _ in todo))
    if "report" in names:  # reads what the evaluation writes
        names.insert(0, "evaluate")
    undisturbed = _references(names, folder)
    work = [(c, f, n, undisturbed[c], folder, options.keep) for c, f, n in todo]
    started, odd = time.monotonic(), 0
    context = multiprocessing.get_context("fork")
    with context.Pool(options.workers, adopt_orphans) as pool:
        for done, entry in enumerate(pool.imap_unordered(_inject, work), 1):
            record.add(entry)
            odd += entry["result"] == "other"
            left = (time.monotonic() - started) / done * (len(work) - done)
            what = f"{entry['command']}: {entry['fault']} {entry['number']}: {entry['result']}"
            print(
                f"{done}/{len(work)} {what} ({left / 60:.0f} min left)", *entry["problems"], sep="\n    ", flush=True
            )
    return 1 if odd else 0


def _references(names: list[str], folder: Path) -> dict[str, Undisturbed]:
    """What each command does undisturbed, from an earlier call where the code is the same."""
    from plot_align.io import json_or_none, write_json
    from plot_align.sweep.training import source_digest

    found = {}
    for name in names:
        path = folder / "references" / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        known = json_or_none(path)
        if known is None or known["source"] != source_digest():
            _undisturbed(COMMANDS[name], folder, path)  # once for what it imports, once for how long it takes
            _undisturbed(COMMANDS[name], folder, path)
            known = json_or_none(path) | {"source": source_digest()}
            write_json(path, known)
        import_like(known["modules"])
        found[name] = Undisturbed(known["seconds"], known["work"], known["size"], known["memory"], known["files"])
    return found


def _undisturbed(command: Command, folder: Path, path: Path) -> None:
    """Run a command undisturbed, and write into ``path`` what it did."""
    from plot_align.io import write_json

    base = path.with_suffix("")
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    (base / "inputs").symlink_to(folder / "inputs")
    running = Running(
        command.arguments, base, environment=command.environment, ranks=command.ranks, modules=base / "modules",
        before=lambda rank: command.prepare(),
    )  # fmt: skip
    if not running.wait(900) or any(running.codes.values()):
        raise SystemExit(f"{command.name} fails undisturbed: {running.said()}")
    memory, *modules = (base / "modules").read_text(encoding="utf-8").splitlines()
    out = base / "out"
    content = {
        "source": "",
        "seconds": time.monotonic() - running.started,
        "work": running.worked,
        "size": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "memory": int(memory),
        "files": snapshot(out, command.steps_aside),
        "modules": modules,
    }
    write_json(path, content)
    import_like(modules)
    seconds, files = content["seconds"], len(snapshot(out, command.steps_aside))
    print(f"{command.name}: {running.worked:.1f} s of the processor in {seconds:.1f}, {files} files")
    sys.stdout.flush()
    if command.name == "evaluate":  # what `report` reads
        for model in ("base", "tuned"):
            shutil.copytree(out / model, folder / "inputs" / "records" / model, dirs_exist_ok=True)


def _inject(work: tuple[str, str, int, Undisturbed, Path, bool]) -> dict[str, Any]:
    """One injection, in a folder of its own."""
    name, fault, number, undisturbed, folder, keep = work
    seed = zlib.crc32(f"{name}/{fault}/{number}".encode())
    entry: dict[str, Any] = {"command": name, "fault": fault, "number": number, "seed": seed}
    for attempt in range(ATTEMPTS):
        generator = random.Random(seed + attempt)
        when = generator.random() * 0.97**attempt
        base = Path(tempfile.mkdtemp(prefix="case-", dir=folder))
        base.chmod(0o755)
        alone = undisturbed
        case = Case(COMMANDS[name], base, generator, when, alone.seconds, alone.work, alone.size, alone.memory)
        (base / "inputs").symlink_to(folder / "inputs")
        try:
            FAULTS[fault](case)
            entry |= _judged(case, fault, undisturbed)
            entry |= {"moment": round(when, 4), "note": case.note}
            return entry
        except Missed:
            continue
        except Exception:
            entry |= {"result": "other", "problems": [traceback.format_exc()], "note": case.note}
            return entry
        finally:
            end_children()
            if os.path.ismount(case.out):
                subprocess.run(["umount", "-l", str(case.out)], check=False)
            if not (keep and entry.get("result") == "other"):
                shutil.rmtree(base, ignore_errors=True)
            else:
                entry["folder"] = str(base)
    return entry | {"result": "missed", "problems": [], "note": "it ended before the fault in every attempt"}


def _judged(case: Case, fault: str, undisturbed: Undisturbed) -> dict[str, Any]:
    """How the disturbed call ended, and what the next one makes of it."""
    said = []
    for running in case.first:
        for rank in range(case.command.ranks):
            said.append(_last(running.said(rank)))
            case.problems += _badly_said(running, rank)
    command: Command = case.command
    ends = [running.code() for running in case.first]
    arguments = command.again or command.arguments
    second = case.call(arguments)
    case.finish(second)
    result, sentence = "same", None
    if second.code() != 0:
        failures = [line for line in second.printed().splitlines() if "failed: " in line]  # of a part of the command
        result, sentence = "sentence", (failures or [_last(second.said())])[0]
        case.problems += _badly_said(second, 0)
        if not failures and not sentence.startswith("plot-align: "):
            case.problems.append(f"the next call ended with {second.code()} and said {sentence!r}")
        elif case.broken is None:
            case.problems.append(f"the next call said {sentence!r}")
        elif case.broken.name not in sentence and case.broken.parent.name not in sentence:
            case.problems.append(f"{sentence!r} does not name {case.broken}")
        else:
            _obey(sentence, case)
            second = case.call(arguments)
            case.finish(second)
            if second.code() != 0:
                case.problems.append(f"without {case.broken} it ended with {second.code()}: {_last(second.said())!r}")
    if second.code() == 0:
        case.problems += differences(undisturbed.files, snapshot(case.out, command.steps_aside))
    if case.problems:
        result = "other"
    return {"result": result, "codes": ends, "said": said, "sentence": sentence, "problems": case.problems}


def _obey(sentence: str, case: Case) -> None:
    """Delete what an error says to delete or move; the damaged file, if it does not say."""
    told = re.search(r"(?:delete|whole of) (\S*?/\S*?)[,;]", sentence)
    path = case.folder / (told[1] if told else case.broken or "")
    if not path.resolve().is_relative_to(case.folder.resolve()):
        raise ValueError(f"{sentence!r} says to delete {path}")
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    seal = path.parent / ".digests" / f"{path.name}.json"
    if "delete both" in sentence:
        seal.unlink(missing_ok=True)


def _badly_said(running: Running, rank: int) -> list[str]:
    """What is wrong with how a process ended: a traceback, more than a sentence, or none."""
    code, text = running.code(rank), running.said(rank)
    found = ["traceback: " + text[text.rindex("Traceback") :][-1500:]] if "Traceback" in text else []
    sentences = [line for line in text.splitlines() if line.startswith("plot-align: ")]
    if code is not None and code > 0 and len(sentences) != 1 and "failed: " not in running.printed(rank):
        found.append(f"it ended with {code} and said {text[-300:]!r}")
    return found


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("plot-align: ")), lines[-1] if lines else "")[
        :500
    ]


if __name__ == "__main__":
    sys.exit(main())
