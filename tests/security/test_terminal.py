"""Nothing that data, a model, a server or a name says reaches the terminal as anything but text."""

from __future__ import annotations

import ast
import io
import logging
import warnings
from pathlib import Path

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from plot_align.cli import main as command
from plot_align.cli.output import readable
from plot_align.text import markdown, printable, terminal

ROOT = Path(__file__).resolve().parents[2]
SPEECH = [
    "\x1b]0;title\x07",  # retitles the window
    "\x1b]52;c;cm0gLXJmIH4=\x07",  # writes to the clipboard
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[H",  # clears the screen
    "\x1b[1A\x1b[2Kall is well",  # writes over the line above
    "\x9b31mred",  # CSI in one character
    "12 %\r99 %",
    "a\bb\x00\x7f",
    "\u202egnp.exe",  # right to left from here on
    "\u2066\u2069\u200e\u200f",
    "line\u2028line",
    "half \ud83d",
]


def is_plain(text: str) -> bool:
    return text.replace("\n", "").replace("\t", "").isprintable()


@pytest.mark.parametrize("speech", SPEECH)
def test_control_characters_are_escaped(speech: str) -> None:
    assert not is_plain(speech)
    assert is_plain(printable(speech))
    printable(speech).encode()  # half an emoji could not be


def test_plain_text_stays() -> None:
    text = "Grüße, 世界 🙂\n\tα\u00a0=\u00a00.1, [red]"
    assert printable(text) == text


@pytest.mark.parametrize("speech", [*SPEECH, "[red]x[/blue]", "[/]", ":skull:"])
def test_a_console_shows_it_as_text(speech: str) -> None:
    """In a line, a cell, a title and a bar's description; on a terminal, where rich itself sends escapes."""
    shown = io.StringIO()
    console = terminal(shown)
    console._force_terminal = True
    table = Table("", speech, title=speech)
    table.add_row(speech, speech)
    console.print(speech)
    console.print(table)
    with Progress(TextColumn("{task.description}", markup=False), console=console, auto_refresh=False) as progress:
        progress.add_task(speech, total=1)
    text = shown.getvalue()
    for own in ("\x1b[?25l", "\x1b[?25h", "\x1b[3m", "\x1b[1m", "\x1b[0m", "\x1b[2K", "\r"):  # rich's: cursor, styles
        text = text.replace(own, "")
    assert is_plain(text), text
    for markup in ("[red]", "[/]", ":skull:"):
        assert (markup in speech) <= (text.count(markup) >= 4)


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_that_quotes_it(capsys: pytest.CaptureFixture[str], debug: bool) -> None:
    assert command.main([*(["--debug"] if debug else []), "report", "".join(SPEECH[:10])]) == 2
    told = capsys.readouterr().err
    assert "]0;title" in told
    assert is_plain(told)


def test_an_unknown_command_that_is_an_escape(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["\x1b]0;x\x07"]) == 2
    told = capsys.readouterr().err
    assert "]0;x" in told
    assert is_plain(told)


def test_what_libraries_log_and_warn(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(shown := io.StringIO())
    logger = logging.getLogger("transformers.of_a_test")
    logger.addHandler(handler)
    with readable():
        logger.warning("model type %s", "\x1b]0;x\x07")
        warnings.simplefilter("always")
        warnings.warn("\x1b]0;y\x07", UserWarning, stacklevel=1)
        warned = warnings.formatwarning("\x1b]0;y\x07", UserWarning, "file.py", 1)
    logger.removeHandler(handler)
    assert "]0;x" in shown.getvalue()
    assert is_plain(shown.getvalue())
    assert is_plain(warned)
    assert logging.getLogRecordFactory() is logging.LogRecord


@pytest.mark.parametrize(
    "text",
    ["![x](http://evil.example/x.png)", "<img src=x>", "a | b", "[x](javascript:alert(1))", "&lt;script>", "`x`"],
)
def test_markdown_has_no_markup_of_its_own(text: str) -> None:
    found = markdown(text)
    assert "<" not in found
    for mark in "!|[]()`":
        assert found.count(mark) == found.count("\\" + mark)


def test_every_print_is_one_of_ours() -> None:
    """Consoles are made by ``terminal()``, and a bare ``print`` shows ``printable()``, JSON or a constant."""
    safe = {"printable", "dumps", "help_text"}
    for path in sorted((ROOT / "src" / "plot_align").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert name != "Console" or path.name == "text.py", place
            if isinstance(node.func, ast.Name) and name == "print":
                calls = {
                    getattr(inner.func, "id", getattr(inner.func, "attr", ""))
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Call)
                }
                names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
                foreign = names - {"print", "sys", "_HELP", "__version__", "packed", "done", "why"}
                assert not foreign or calls & safe, place
