"""docs/inspecting.ipynb runs as committed, and is committed without outputs; docs/models.md agrees with the models."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from PIL import Image
from transformers import Dinov2Config

from picinspector import towers
from picinspector.bundle import open_bundle
from picinspector.plot import SIZE_PX
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.wording import parse

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS / "inspecting.ipynb"
DIAGRAMS = (DOCS / "models.md").read_text("utf-8")


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        assert set(cell.metadata) == set(), cell.metadata
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.source
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata["language_info"]) == {"name"}  # no version of whoever ran it last


def test_it_runs_and_shows_words_scores_and_radar_charts(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs: list[Any] = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    caption, text = printed[0], "".join(printed)
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    for picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).size == SIZE_PX
    assert parse(caption), caption  # it speaks of the photo's quality in terms of the grammar
    assert "quality" in text and "scene" in text
    assert all(name in text for name in ATTRIBUTES)
    assert "underexposed" in text  # what was done to the second photo is said, and suggested against


def test_the_diagrams_have_the_sizes_of_the_builtin_bundle() -> None:
    bundle = open_bundle()
    head = json.loads((bundle.folder / "attributes" / "head.json").read_text("utf-8"))
    scorer = json.loads((bundle.folder / "scorer" / "scorer.json").read_text("utf-8"))
    clip = json.loads((bundle.folder / "clip" / "open_clip_config.json").read_text("utf-8"))["model_cfg"]
    dinov2 = Dinov2Config.from_pretrained(bundle.folder / "dinov2")
    assert f"{head['input_dim']} → {head['hidden_dim']}" in DIAGRAMS
    assert f"{head['hidden_dim']} → {len(ATTRIBUTES)}" in DIAGRAMS
    assert f"{head['hidden_dim']} → {len(SCENES)}" in DIAGRAMS
    assert f"{scorer['num_features']} features" in DIAGRAMS
    assert f"{towers.STATISTICS} statistics" in DIAGRAMS
    assert f"{towers.QUALITY_DIM} + {towers.CONTENT_DIM} + 1" in DIAGRAMS
    assert f"crop {clip['vision_cfg']['image_size']} × {clip['vision_cfg']['image_size']}" in DIAGRAMS
    assert f"{dinov2.num_hidden_layers} layers, {dinov2.hidden_size} wide, {dinov2.patch_size} px patches" in DIAGRAMS


@pytest.mark.parametrize("name", [*ATTRIBUTES, *SCENES])
def test_the_diagrams_name_every_output(name: str) -> None:
    assert name.replace("_", " ") in DIAGRAMS
