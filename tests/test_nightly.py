"""The job that nobody watches, on a real Ray: what it does each night, what it warns of, what it hands to the hook."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from picinspector import nightly, pipeline, prune, verify
from picinspector.bundle import Bundle
from picinspector.cli import main
from picinspector.tables import Destination
from tests.bundles import tiny_bundle

pytestmark = pytest.mark.usefixtures("local_ray")


def photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 80, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The encoders of `tiny` with another scorer, and with encoders' weights that nobody could load."""
    bundle = tiny_bundle(tmp_path_factory.mktemp("bundles") / "other", scorer_seed=1)
    for weights in (*bundle.folder.glob("clip/*.safetensors"), *bundle.folder.glob("dinov2/*.safetensors")):
        weights.write_bytes(b"not weights")
    return bundle


def test_rescoring_reads_no_photo_and_loads_no_encoder(tmp_path: Path, tiny: Path, other: Bundle) -> None:
    for number in range(6):
        photo(tmp_path / "library" / f"{number}.png", number)
    dest, options = tmp_path / "dest", pipeline.Options(bundle=str(tiny), show_progress=False)
    pipeline.score(str(tmp_path / "library"), str(dest), options)
    shutil.rmtree(tmp_path / "library")
    before = Destination(dest).latest("scores", ["uri", "quality_score"]).sort_by("uri")
    rescored = pipeline.rescore(str(dest), pipeline.Options(bundle=str(other.folder), show_progress=False))
    assert rescored["counts"]["scored"] == 6 and set(rescored["stages"]) == {"score"}
    after = Destination(dest).latest("scores", ["uri", "quality_score"]).sort_by("uri")
    assert before.column("uri") == after.column("uri")
    assert before.column("quality_score") != after.column("quality_score")


@pytest.mark.usefixtures("light_encoder")
def test_three_nights(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, dest, report = tmp_path / "library", Destination(tmp_path / "dest"), tmp_path / "report.json"
    for number in range(12):
        photo(library / f"{number:02}.png", number)
    hook = f"{sys.executable} -c \"import sys; open({str(report)!r}, 'w').write(sys.stdin.read())\""
    command = ["nightly", str(library), "--out", dest.root, "--bundle", str(tiny), "--hook", hook, "--json", "-q"]

    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["score"]["counts"]["new"], first["rescore"], first["drift"], first["warnings"]) == (
        12,
        None,
        None,
        [],
    )
    assert first["hook_exit_code"] == 0
    assert json.loads(report.read_text())["score"] == first["score"]
    assert json.loads(Path(dest.root, "nights", f"{first['run_id']}.json").read_text()) == first

    (library / "00.png").unlink()
    photo(library / "01.png", 100)
    photo(library / "new.png", 101)
    assert main(command) == 0
    second = json.loads(capsys.readouterr().out)
    counts = second["score"]["counts"]
    assert {name: counts[name] for name in ("new", "changed", "unmodified", "gone", "to_do")} == {
        "new": 1, "changed": 1, "unmodified": 10, "gone": 1, "to_do": 2,
    }  # fmt: skip
    assert second["drift"]["counts"]["only_a"] == second["drift"]["counts"]["only_b"] == 1

    scorer = tiny_bundle(tmp_path / "other", scorer_seed=1).folder
    command[command.index(str(tiny))] = str(scorer)
    monkeypatch.setattr(prune, "_FEW_FILES", 1)
    assert main([*command, "--keep-days", "0", "--drift-threshold", "0.000001"]) == 0
    third = json.loads(capsys.readouterr().out)
    assert (third["rescore"]["counts"]["to_do"], third["score"]["counts"]["to_do"]) == (12, 0)
    assert third["drift"]["counts"]["other_scorer"] == 12
    assert (third["prune"]["runs_folded"], third["prune"]["runs_removed"]) == (
        3,
        4,
    )  # and this night's own, in which there was nothing to do
    assert not verify.verify(dest).problems
    latest = {Path(row["uri"]).name for row in dest.latest("scores", ["uri"]).to_pylist()}
    assert latest == {path.name for path in library.iterdir()}


@pytest.mark.usefixtures("light_encoder")
def test_a_hook_that_fails_is_told_and_loses_nothing(tmp_path: Path, tiny: Path) -> None:
    photo(tmp_path / "library" / "a.png", 1)
    dest, options = tmp_path / "dest", pipeline.Options(bundle=str(tiny), show_progress=False)
    for command, code in ((f"{sys.executable} -c 'exit(7)'", 7), ("no-such-command --token SEKRET", 127)):
        record: dict[str, Any] = nightly.run(str(tmp_path / "library"), str(dest), options, hook=command)
        assert record["hook_exit_code"] == code
        assert "SEKRET" not in json.dumps(record)
    assert len(list((dest / "nights").iterdir())) == 2
    assert main(["nightly", str(tmp_path / "library"), "--out", str(dest), "--hook", " "]) == 2
