"""PicInspector, as `picinspector score LIBRARY OUT` runs it."""

from __future__ import annotations

from pathlib import Path

import picinspector.stages.encode  # noqa: F401  the others' imports of torch are not on the clock either
from benchmarks.contenders import run
from picinspector import pipeline


def work(library: Path, out: Path) -> int:
    """Embed and score a library into a committed run."""
    record = pipeline.score(str(library), str(out), pipeline.Options(show_progress=False))
    return int(record["counts"]["scored"])


if __name__ == "__main__":
    run(work)
