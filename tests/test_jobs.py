"""Jobs submitted to a real Ray head over the job API, as a user submits them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tests.bundles import tiny_bundle
from tests.ray_head import Head
from tests.test_pipeline import make_library, rows_of


def test_score_rescore_and_curate_as_submitted_jobs(head: Head, tiny: Path, tmp_path: Path) -> None:
    library, dest = tmp_path / "library", tmp_path / "dest"
    make_library(library, 12)
    (library / "broken.jpg").write_bytes(b"")
    done = head.submit("python", "jobs/score.py", str(library), "--out", str(dest), "--bundle", str(tiny))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "12 photos scored, 1 failed" in done.stdout
    rows = rows_of(dest, "scores", "uri, error_kind")
    assert len(rows) == 13
    record = json.loads(next((dest / "runs").glob("*/run.json")).read_text())
    assert record["environment"]["cluster"]["cpus"] == 2  # the head's, not a Ray of the job's own

    other = tiny_bundle(tmp_path / "other", scorer_seed=1).folder
    again = head.submit("python", "jobs/rescore.py", str(dest), "--bundle", str(other))
    assert again.returncode == 0, again.stdout[-3000:]
    assert len(rows_of(dest, "scores", "uri")) == 26

    page = tmp_path / "report.html"
    curated = head.submit("python", "jobs/curate.py", str(dest), "--best", "3", "-o", str(page))
    assert curated.returncode == 0, curated.stdout[-3000:]
    assert "3 photos selected" in curated.stdout and "12 of 12 photos shown" in curated.stdout
    assert page.read_bytes().lower().startswith(b"<!doctype html>")
    assert (dest / "groups" / "selection.parquet").is_file()

    wrong = head.submit(
        *shlex.split(f"python jobs/score.py {tmp_path}/nowhere --out {tmp_path}/else"), "--bundle", str(tiny)
    )
    assert wrong.returncode != 0
    assert "cannot list" in wrong.stdout
