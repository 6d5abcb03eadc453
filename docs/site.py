"""What `make docs` does beside rendering: the README as home page, links out of docs/, roles in docstrings."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s]+)(\))")
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """README.md becomes the home page; it lies above docs/, where mkdocs does not look."""
    text = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_LINK.sub(_from_the_root, text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links that leave docs/ lead to the repository."""
    here = posixpath.dirname(page.file.src_uri)

    def out(found: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(here, found[2]))
        leaves = path.startswith("../")
        return f"{found[1]}{config.repo_url}/blob/main/{path[3:]}{found[3]}" if leaves else found[0]

    return _LINK.sub(out, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """In a table's code GitHub reads ``\\|`` as a bar, Python-Markdown as it stands."""
    return re.sub(r"<code>[^<]*</code>", lambda found: found[0].replace("\\|", "|"), html)


def _from_the_root(found: re.Match) -> str:
    path = found[2].removeprefix("docs/") if found[2].startswith("docs/") else f"../{found[2]}"
    return f"{found[1]}{path}{found[3]}"


class Docstrings(griffe.Extension):
    """Sphinx's roles, as ``:class:`Name` ``, are read as code; of an option only its default is shown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "_option":  # config.py's own
            attr.value = value.arguments[0]
