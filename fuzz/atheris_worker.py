"""One target under atheris; started by :func:`fuzz.engines.by_coverage`. `pip install atheris` brings the engine."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    name, cases, seed, output = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    try:
        import atheris
    except ImportError:
        raise SystemExit("atheris is not installed; pip install atheris") from None
    with atheris.instrument_imports(include=["plot_align"]):
        from fuzz.targets import make

        target = make(name)

    from fuzz.engines import check_seeds, entry, memory
    from fuzz.guard import Tally

    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory()))
    check_seeds(target, folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / f"{number:02}").write_bytes(data)
    tally = Tally()

    def one(data: bytes) -> None:
        tally.add(target, data, folder)
        if tally.cases >= cases:
            output.write_text(json.dumps(entry(target, tally, folder)))
            os._exit(0)

    options = [
        f"-seed={int(seed) + 1}",
        "-max_len=20000",
        "-rss_limit_mb=0",
        "-timeout=60",
        "-verbosity=0",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
