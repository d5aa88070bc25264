"""A folder is one training's, and a training goes on as long as each try gets further than the last."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.exceptions
import ray.train
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup

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
    """Each try fails; those of `+` make a checkpoint before, those of `.` none, and there are no others."""

    def __init__(self, run: Path, tries: str, failure: ray.train.TrainingFailedError) -> None:
        self._run, self._left, self._failure = run, iter(tries), failure

    def fit(self) -> str:
        if next(self._left) == "+":
            (self._run / f"checkpoint_{time.monotonic_ns()}").mkdir(parents=True)
        raise self._failure

    @property
    def left(self) -> int:
        return len(list(self._left))


def test_a_training_that_gets_on_is_tried_again_and_one_that_does_not_is_told(local_ray: None, tmp_path: Path) -> None:
    causes = {0: ray.exceptions.RayActorError(), 1: ValueError("no model of this name\nand more")}
    trainer = Trainer(tmp_path / "run", "+++.!", ray.train.WorkerGroupError("long\nstory", causes))
    with pytest.raises(PicInspectorError) as caught:
        carry_out(lambda: trainer, Folder(tmp_path / "run"))
    assert trainer.left == 1
    assert str(caught.value).startswith("the training failed: ValueError: no model of this name and more; mend it")
    assert "\n" not in str(caught.value)


OTHERS_CALL = ray.exceptions.RayTaskError("train", "a long story", ModuleNotFoundError("No module named 'mine'"))


@pytest.mark.parametrize(
    ("cause", "tries", "told"),
    [
        (ray.exceptions.RayActorError(), "+..+...!", "RayActorError: "),
        (OSError("no such bucket"), "+.!", "OSError: no such bucket;"),
        (OTHERS_CALL, "+.!", "ModuleNotFoundError: No module named 'mine';"),
    ],
)
def test_an_actor_that_is_lost_while_workers_start_is_forgiven_twice(
    local_ray: None, tmp_path: Path, cause: Exception, tries: str, told: str
) -> None:
    trainer = Trainer(tmp_path / "run", tries, ray.train.ControllerError(cause))
    with pytest.raises(PicInspectorError, match=f"the training failed: {told}"):
        carry_out(lambda: trainer, Folder(tmp_path / "run"))
    assert trainer.left == 1


@ray.remote(num_cpus=0)
class Controller:
    """Has more than half of the CPUs, and leaves them as they are."""

    def start(self) -> None:
        group = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"] // 2 + 1}])
        assert group.wait(60)


def test_what_a_failed_try_held_is_free_for_the_next(local_ray: None, tmp_path: Path) -> None:
    class Twice:
        tries = 0

        def fit(self) -> str:
            self.tries += 1
            controller = Controller.remote()
            ray.get(controller.start.remote())
            ray.kill(controller)
            if self.tries == 1:
                raise ray.train.ControllerError(ray.exceptions.RayActorError())
            return "result"

    trainer, theirs = Twice(), ray.util.placement_group([{"CPU": 1}])
    assert carry_out(lambda: trainer, Folder(tmp_path / "run")) == "result"
    states = {number: group["state"] for number, group in ray.util.placement_group_table().items()}
    assert states.pop(theirs.id.hex()) == "CREATED"
    ray.util.remove_placement_group(theirs)
    for number in states:
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(number)))


def test_what_it_comes_to(local_ray: None, tmp_path: Path) -> None:
    class Fine:
        def fit(self) -> Any:
            return "result"

    assert carry_out(Fine, Folder(tmp_path / "run")) == "result"
