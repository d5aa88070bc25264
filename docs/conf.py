"""The documentation: `make docs`. The command line and the tables are described from the code, when it is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

_ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(_ROOT))

import picinspector  # noqa: E402
from picinspector import schema  # noqa: E402
from picinspector.errors import ErrorKind  # noqa: E402

project, author = "PicInspector", "the PicInspector founders"
version = release = picinspector.__version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_copyright = False
# Diagrams are shown as they are written; no reader fetches a script for them.
suppress_warnings = ["misc.highlighting_failure"]


def _table(columns: pa.Schema) -> str:
    lines = ["| column | type | meaning |", "|---|---|---|"]
    for field in columns:
        text = (field.metadata or {}).get(b"description", b"").decode().replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{field.type}` | {text} |")
    return "\n".join(lines)


def _tables() -> str:
    kinds = "\n".join(
        f"| `{kind.value}` | {'yes' if kind.transient else 'no'} |" for kind in sorted(ErrorKind, key=lambda k: k.value)
    )
    return f"""# Tables

Made from `picinspector/schema.py` when this page was built. Every file lies below the destination, in Hive partitions by
`run_id`.

## scores

{_table(schema.SCORES)}

## embeddings

With the widths of the builtin bundle.

{_table(schema.embeddings(768, 192))}

## groups

`groups/groups.parquet`, one file, replaced as a whole.

{_table(schema.GROUPS)}

## gone

{_table(schema.GONE)}

## manifest

{_table(schema.MANIFEST)}

## Kinds of errors

| `error_kind` | passes by itself |
|---|---|
{kinds}
"""


def _commands() -> str:
    """What Typer itself says of its commands."""
    command = [sys.executable, "-m", "typer", "picinspector.cli", "utils", "docs", "--name", "picinspector"]
    made = subprocess.run([*command, "--title", "Commands"], cwd=_ROOT, capture_output=True, text=True, check=True)
    return made.stdout


def _write_reference(_app: Any) -> None:
    for name, text in {"tables": _tables(), "cli": _commands()}.items():
        path = Path(__file__).parent / "reference" / f"{name}.md"
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def setup(app: Any) -> None:
    """Sphinx's hook."""
    app.connect("builder-inited", _write_reference)
