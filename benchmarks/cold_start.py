"""How long one waits for the first answer: `python -m benchmarks.cold_start`.

Seconds of whole commands, each in a new process, on an idle machine whose files are in the page cache: one photo to a
committed table, the best photos of that table, the help, and what importing costs. Ratios are to the targets, so that
1.00 and less is well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import libraries, ratios

#: Seconds, each at most.
SCORE_S, IMPORT_S = 20.0, 0.3
_CLI = ["-c", "from picinspector.cli import entry_point; entry_point()"]


def seconds(arguments: Sequence[str]) -> float:
    """From start to end of Python with these arguments.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    taken = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return taken


def score(photo: Path, scratch: Path) -> tuple[float, dict[str, float]]:
    """One photo to a new destination: seconds, and those that its record names."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        taken = seconds([*_CLI, "score", str(photo), "--out", folder])
        [record] = Path(folder).glob("runs/*/run.json")
        return taken, json.loads(record.read_text("utf-8"))["seconds"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photo", type=Path, help="default: one of 12 megapixels, made up")
    arguments = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        photo = arguments.photo or libraries.make(scratch / "photos", 1, "12mp") / "000000.jpg"
        parts: list[dict[str, float]] = []

        def first_photo() -> float:
            taken, named = score(photo, scratch)
            parts.append(named)
            return taken

        scored = scratch / "scored"
        seconds([*_CLI, "score", str(photo), "--out", str(scored)])  # brings the files into the page cache
        nothing = seconds(["-c", ""])
        measured = ratios.take_turns(
            {
                "score": first_photo,
                "top": lambda: seconds([*_CLI, "top", str(scored)]),
                "help": lambda: seconds([*_CLI, "--help"]),
                "import picinspector": lambda: seconds(["-c", "import picinspector"]) - nothing,
                "import picinspector.cli": lambda: seconds(["-c", "import picinspector.cli"]) - nothing,
                "import picinspector.pipeline": lambda: seconds(["-c", "import picinspector.pipeline"]) - nothing,
            },
            arguments.rounds,
        )
    targets = {"score": SCORE_S, "import picinspector": IMPORT_S}
    last = ", ".join(f"{step} {taken:.1f} s" for step, taken in parts[-1].items())
    rows = []
    for name, values in measured.items():
        figures = f"{statistics.median(values):.2f} s" + (f"; the last: {last}" if name == "score" else "")
        if name in targets:
            to_target = [value / targets[name] for value in values]
            rows.append(ratios.Row(f"{name}, to {targets[name]:g} s", to_target, 1.0, True, figures))
        else:
            rows.append(ratios.Row(f"{name}, to nothing but Python ({nothing:.2f} s)", [v / nothing for v in values],
                                   figures=figures))  # fmt: skip
    ratios.show("cold start, builtin bundle", rows)


if __name__ == "__main__":
    main()
