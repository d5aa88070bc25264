"""The documentation builds without a warning, so that no link within it is broken; and its tutorial works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.s3_server import S3Server
from tests.test_pipeline import make_library

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees")]
    built = subprocess.run(
        [*command, "-b", "html", str(DOCS), str(tmp_path / "html")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    commands = (tmp_path / "html" / "reference" / "cli.html").read_text("utf-8")
    for name in ("score", "select", "bundle fetch", "train scorer"):
        assert f"picinspector {name}" in re.sub(r"<[^>]+>", "", commands)
    tables = (tmp_path / "html" / "reference" / "tables.html").read_text("utf-8")
    assert "perceived quality, 1 (bad) to 10 (excellent)" in tables and "unknown_format" in tables


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"^[\w/-]+$", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE))
    there = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")} - {"index"}
    assert there | {"reference/cli", "reference/tables"} == listed


def test_links_of_the_readmes_lead_somewhere() -> None:
    for page in (REPOSITORY / "README.md", *REPOSITORY.glob("*/README.md"), *DOCS.glob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists() or target.startswith("reference/"), (page.name, target)


@pytest.mark.timeout(600)
def test_the_tutorial_works_on_a_bucket(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    make_library(tmp_path / "library", 12)
    for path in (tmp_path / "library").rglob("*.*"):
        s3_server.client().upload_file(str(path), s3_bucket, f"photos/{path.relative_to(tmp_path / 'library')}")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", (DOCS / "tutorial.md").read_text("utf-8"), re.DOTALL)
             for line in block.splitlines() if line.startswith("picinspector ")]  # fmt: skip
    assert len(lines) >= 8
    environment = os.environ | s3_server.environment
    environment.pop("RAY_ADDRESS", None)
    for line in lines:
        words = [word.replace("s3://my-bucket", f"s3://{s3_bucket}") for word in shlex.split(line)[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "picinspector", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr[-2000:])
    assert (tmp_path / "report.html").is_file()
    listed = s3_server.client().list_objects_v2(Bucket=s3_bucket, Prefix="best/")
    assert listed["KeyCount"] >= 1
