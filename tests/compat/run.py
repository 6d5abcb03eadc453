"""Builds the environments of the matrix, runs the chosen tests in each, and writes the table.

    python tests/compat/run.py build                       # what `make compat` needs of the network
    python tests/compat/run.py                             # all of them → docs/compatibility.md
    python tests/compat/run.py trl==1.8.0 transformers==5.10.0   # one more, by its requirements; no table

An environment shares torch and everything else that it does not name with the one that this script runs in, and is
built again only when either changes.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from environments import ENVIRONMENTS, METHODS, checks

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / ".compat"
PAGE = ROOT / "docs" / "compatibility.md"
_TIMEOUT = 600  # seconds after which an environment is given up
WHERE = {
    "fused": "fused head",
    "chunked": "chunked loss",
    "logits": "its logits",
    "refused": "refused",
}


@dataclass
class Result:
    """What one environment gave: of each test whether it passed, and what it recorded."""

    passed: dict[str, bool]
    recorded: dict[str, dict[str, str]]
    log: Path

    @property
    def versions(self) -> dict[str, str]:
        return self.recorded["test_versions"]


def build(name: str, requirements: list[str]) -> Path:
    """The interpreter of an environment that has ``requirements`` before what this one has."""
    if not requirements:
        return Path(sys.executable)
    folder, shared = FOLDER / name, sysconfig.get_paths()["purelib"]
    python, mark = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join([f"# above {shared}", *requirements, ""])
    if mark.exists() and mark.read_text() == wanted:
        return python
    mark.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(f"{shared}\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *requirements]
    done = subprocess.run(install, capture_output=True, text=True)  # pip warns of conflicts with what it shadows
    if done.returncode:
        sys.exit(f"{name}: pip could not install {' '.join(requirements)}\n{done.stderr}")
    mark.write_text(wanted)
    return python


def run(name: str, python: Path) -> Result:
    """The chosen tests in one environment."""
    asked = [python, "-c", "from importlib.metadata import version; print(version('trl'))"]
    trl = Version(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    report, log = FOLDER / f"{name}.xml", FOLDER / f"{name}.log"
    FOLDER.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    command = [
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "junit_family=xunit1",
        f"--junitxml={report}", f"--basetemp={FOLDER}/tmp-{name}", "--durations=10",
        HERE / "matrix.py", *(test for tests in checks(trl).values() for test in tests),
    ]  # fmt: skip
    with log.open("w") as file, contextlib.suppress(subprocess.TimeoutExpired):  # then there is no report
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=_TIMEOUT)
    result = Result({}, {}, log)
    for case in xml.parse(report).iter("testcase") if report.exists() else ():
        key = str(case.get("name"))
        if case.find("skipped") is not None:
            continue
        result.passed[key] = case.find("failure") is None and case.find("error") is None
        result.recorded[key] = {str(x.get("name")): str(x.get("value")) for x in case.iter("property")}
    return result


def ok(result: Result) -> bool:
    """Whether every test passed, and every one that was asked for ran."""
    if not all(result.passed.values()) or "test_versions" not in result.passed:
        return False
    asked = {test.partition("::")[2] for tests in checks(Version(result.versions["trl"])).values() for test in tests}
    asked |= {f"test_where_the_term_works[{method}]" for method in METHODS}
    asked |= {f"test_a_short_training[{method}]" for method in ("dpo", "sft")}
    return asked <= set(result.passed)


def page(results: list[Result]) -> str:
    """The tables of all environments."""
    trls = [Version(result.versions["trl"]) for result in results]

    def table(rows: dict[str, list[str]]) -> str:
        head = [f"| | {' | '.join(f'TRL {trl}' for trl in trls)} |", "|---" * (len(trls) + 1) + "|"]
        return "\n".join([*head, *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items())])

    def found(test: str, name: str) -> list[str]:
        return [result.recorded[test][name] for result in results]

    shown = {title: [_methods(checks(trl)[title]) for trl in trls] for title in checks(trls[0])}
    for method in ("dpo", "sft"):
        test = f"test_a_short_training[{method}]"
        losses = zip(found(test, "vanilla"), found(test, "term"), strict=True)
        shown[f"{method.upper()}: vanilla loss and term after twelve steps"] = [
            f"{float(vanilla):.4f}, {float(term):.4f}" for vanilla, term in losses
        ]
    refused: dict[str, list[str]] = {}
    for result, trl in zip(results, trls, strict=True):
        for said in dict.fromkeys(x["refused"] for x in result.recorded.values() if "refused" in x):
            refused.setdefault(said.replace(str(trl), "…"), []).append(str(trl))
    sentences = [
        f"| {said} | {'all' if len(where) == len(trls) else ', '.join(where)} |" for said, where in refused.items()
    ]
    return (
        (HERE / "compatibility.md")
        .read_text(encoding="utf-8")
        .format(
            python=".".join(map(str, sys.version_info[:2])),
            versions=table({name: found("test_versions", name) for name in results[0].versions if name != "trl"}),
            where=table(
                {
                    method.upper(): [WHERE[x] for x in found(f"test_where_the_term_works[{method}]", "found")]
                    for method in METHODS
                }
            ),
            shown=table(shown),
            refused="\n".join(["| said by `attach` | TRL |", "|---|---|", *sentences]),
        )
    )


def _methods(tests: list[str]) -> str:
    """The trainers in the names of tests; DPO where a name has none."""
    named = [method.upper() for method in METHODS if any(re.search(rf"[\[-]{method}\b", test) for test in tests)]
    return ", ".join(named) or "DPO"


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    if arguments and arguments != ["build"]:
        chosen = {"other-" + "-".join(arguments).replace("==", "-"): arguments}
    else:
        chosen = dict(ENVIRONMENTS)
    pythons = {name: build(name, requirements) for name, requirements in chosen.items()}
    if arguments == ["build"]:
        return 0
    with ThreadPoolExecutor(max_workers=min(len(chosen), os.cpu_count() or 1)) as pool:
        results = list(pool.map(run, pythons, pythons.values()))
    failed = [result for result in results if not ok(result)]
    for result in failed:
        print(f"\n{result.log}\n{result.log.read_text()}")
    if failed:
        print(f"compat: {', '.join(result.log.stem for result in failed)} failed")
        return 1
    if chosen.keys() == ENVIRONMENTS.keys():
        PAGE.write_text(page(results), encoding="utf-8")
    tests = sum(len(result.passed) for result in results)
    print(f"compat: {tests} tests in {len(results)} environments, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
