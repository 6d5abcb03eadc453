"""The script behind ``make compat``: what counts as passed, and the page that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.version import Version

from environments import METHODS, checks, expected
from run import Result, build, ok, page


def result(trl: str) -> Result:
    """An environment in which all is as expected."""
    names = [test.partition("::")[2] for tests in checks(Version(trl)).values() for test in tests]
    recorded = {
        "test_versions": {"trl": trl, "torch": "2.13.0"},
        "test_a_short_training[dpo]": {"vanilla": "0.25", "term": "0.03125"},
        "test_a_short_training[sft]": {"vanilla": "5.0", "term": "0.5"},
    }
    for method in METHODS:
        found = expected(method, Version(trl))
        recorded[f"test_where_the_term_works[{method}]"] = {"found": found}
        if found == "refused":
            recorded[f"test_where_the_term_works[{method}]"]["refused"] = f"trl {trl} has no {method}"
    return Result(dict.fromkeys([*names, *recorded], True), recorded, Path("log"))


@pytest.mark.parametrize("trl", ["1.16.0", "1.14.1", "0.29.1", "0.24.0"])
def test_all_must_have_run_and_passed(trl):
    assert ok(result(trl))
    for name in result(trl).passed:
        missing, failed = result(trl), result(trl)
        del missing.passed[name]
        failed.passed[name] = False
        assert not ok(failed), name
        assert not ok(missing), name
    assert not ok(Result({}, {}, Path("log")))


def test_the_page():
    made = page([result("1.16.0"), result("0.24.0")])
    for line in (
        "| | TRL 1.16.0 | TRL 0.24.0 |",
        "| torch | 2.13.0 | 2.13.0 |",
        "| DPO | fused head | its logits |",
        "| KTO | fused head | refused |",
        "| α = 0 is TRL to the bit | DPO, SFT | DPO, SFT |",
        "| SIGKILL and resume, to the bit | DPO | DPO |",
        "| SFT: vanilla loss and term after twelve steps | 5.0000, 0.5000 | 5.0000, 0.5000 |",
        "| trl … has no kto | 0.24.0 |",
    ):
        assert line in made, line
    assert "{" not in made


def test_what_shares_everything_needs_no_environment(tmp_path):
    import sys

    assert build("trl-1.16", []) == Path(sys.executable)
