"""A folder is one training's, and a training goes on as long as each try gets further than the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
import ray.train

from picinspector.errors import PicInspectorError, UsageError
from training.checkpoints import known_workers
from training.claims import carry_out, check_folder, claim, known_settings
from training.folders import Folder


def test_a_folder_is_one_training_s_and_one_process_s(tmp_path: Path) -> None:
    out, said = Folder(tmp_path / "out"), {"epochs": "3", "workers": "2"}
    assert known_settings(out) == {}
    with claim(out, said), pytest.raises(UsageError, match="another run is at work there"), claim(out, said):
        pass
    assert known_settings(out) == said
    with claim(out, said):
        pass
    with (
        pytest.raises(UsageError, match=r"holds a training with another epochs \(3, now 4\)"),
        claim(out, said | {"epochs": "4"}),
    ):
        pass
    (out.here / "settings.json").write_text("{")
    with pytest.raises(UsageError, match=r"settings\.json cannot be read; delete it"):
        check_folder(out, said)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    with pytest.raises(UsageError, match="is not empty and holds no training"):
        known_settings(Folder(tmp_path / "other"))


def test_who_goes_on_takes_as_many_workers_as_began() -> None:
    assert known_workers({"workers": "4"}, None) == 4
    assert known_workers({"workers": "4"}, 2) == 2  # which is refused, as another training
    assert known_workers({}, None) is None


class Trainer:
    """Makes so many checkpoints, each in a try of its own, and then fails for good."""

    def __init__(self, run: Path, checkpoints: int, failure: ray.train.TrainingFailedError) -> None:
        self._run, self._left, self._failure, self.tries = run, checkpoints, failure, 0

    def fit(self) -> str:
        self.tries += 1
        if self._left == 0:
            raise self._failure
        self._left -= 1
        (self._run / f"checkpoint_{self.tries}").mkdir(parents=True)
        raise ray.train.WorkerGroupError("a node went", {0: ray.exceptions.RayActorError()})


def test_a_training_that_gets_on_is_tried_again_and_one_that_does_not_is_told(tmp_path: Path) -> None:
    causes = {0: ray.exceptions.RayActorError(), 1: ValueError("no model of this name\nand more")}
    trainer = Trainer(tmp_path / "run", 3, ray.train.WorkerGroupError("long\nstory", causes))
    with pytest.raises(PicInspectorError) as caught:
        carry_out(lambda: trainer, Folder(tmp_path / "run"))
    assert trainer.tries == 4
    assert str(caught.value).startswith("the training failed: ValueError: no model of this name and more; mend it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("cause", "tries"), [(ray.exceptions.RayActorError(), 6), (OSError("no such bucket"), 4)])
def test_a_worker_that_is_lost_while_others_start_is_forgiven_twice(
    tmp_path: Path, cause: Exception, tries: int
) -> None:
    trainer = Trainer(tmp_path / "run", 3, ray.train.ControllerError(cause))
    with pytest.raises(PicInspectorError, match=f"the training failed: {type(cause).__name__}: "):
        carry_out(lambda: trainer, Folder(tmp_path / "run"))
    assert trainer.tries == tries


def test_what_it_comes_to(tmp_path: Path) -> None:
    class Fine:
        def fit(self) -> Any:
            return "result"

    assert carry_out(Fine, Folder(tmp_path / "run")) == "result"
