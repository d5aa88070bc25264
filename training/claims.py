"""A training and the folder it fills: nobody else fills it meanwhile, and it goes on as long as it gets on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import ray
import ray.train
from ray._raylet import PlacementGroupID
from ray.util import placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from picinspector import lease, logs
from picinspector.errors import PicInspectorError, UsageError
from picinspector.storage import redact
from training.folders import Folder

#: Says which training a folder holds.
_SETTINGS = "settings.json"
#: Workers that die are started anew so often, on what nodes there are, and go on from the newest checkpoint. Nodes that
#: a cloud takes back with a warning do not count.
FAILURES = ray.train.FailureConfig(max_failures=2)


def known_settings(out: Folder) -> dict[str, str]:
    """What made the training that a folder holds; {} where it holds none yet.

    Raises:
        UsageError: it holds other things.
    """
    if out.has(_SETTINGS):
        try:
            return dict(json.loads((out.pull(_SETTINGS) / _SETTINGS).read_text("utf-8")))
        except (ValueError, TypeError):
            raise UsageError(f"{out}/{_SETTINGS} cannot be read; delete it, or give another --out") from None
    if not out.is_empty(besides=("lease", ".lock")):
        raise UsageError(f"{out} is not empty and holds no training; give a new or an empty --out")
    return {}


def check_folder(out: Folder, said: Mapping[str, str]) -> None:
    """Refuse a folder that holds another training, or other things.

    Args:
        out: the folder.
        said: what makes a training the same one.
    """
    known = known_settings(out)
    other = next((name for name in said if known and said[name] != known.get(name)), None)
    if other is not None:
        raise UsageError(
            f"{out} holds a training with another {other} ({known.get(other)}, now {said[other]}): "
            "repeat its command to go on with it, or give another --out"
        )


@contextlib.contextmanager
def claim(out: Folder, said: Mapping[str, str] | None = None) -> Iterator[lease.Lease]:
    """Have a folder for oneself, and, where `said` is given, for this training only.

    Raises:
        UsageError: another run is at work there, or it holds another training.
        StorageError: it cannot be written.
    """
    out.here.mkdir(parents=True, exist_ok=True)
    with lease.hold(out.filesystem, out.path("").rstrip("/"), str(out), out.local, lock=".lock") as held:
        if said is not None:
            check_folder(out, said)
            if not out.has(_SETTINGS):
                part = out.here / f"{_SETTINGS}.part"
                part.write_text(json.dumps(said, indent=2) + "\n", "utf-8")
                os.replace(part, out.here / _SETTINGS)  # noqa: PTH105
                out.push(_SETTINGS)
        yield held


def carry_out(make: Callable[[], Any], run: Folder) -> Any:
    """What a trainer of Ray Train comes to; tried again from its newest checkpoint as long as each try made new ones.

    Two tries without any are forgiven where an actor was lost: Ray itself does not try again when that happens while
    workers start.

    Args:
        make: the trainer.
        run: the folder of its run.

    Raises:
        PicInspectorError: it fails, and would fail again.
    """
    forgiven = 0
    while True:
        before, groups = run.names(), set(placement_group_table())
        try:
            return make().fit()
        except ray.train.TrainingFailedError as error:
            if run.names() - before:
                forgiven = 0
            elif _lost_while_starting(error) and forgiven < FAILURES.max_failures:
                forgiven += 1
            else:
                raise PicInspectorError(
                    f"the training failed: {_reason(error)}; mend it and submit the same command again, which goes on "
                    "from the newest checkpoint"
                ) from error
            logs.event("training_goes_on", reason=_reason(error))
        _free_placement_groups(groups)


def _free_placement_groups(others: Collection[str]) -> None:
    """Hand back what a try held that failed while its workers started: Ray does so when this job ends, not before.

    Args:
        others: ids of those that the try did not make.
    """
    job = ray.get_runtime_context().get_job_id()
    for number in set(placement_group_table()).difference(others):
        if number.endswith(job):  # and is no other job's
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(number)))


def _lost_while_starting(error: ray.train.TrainingFailedError) -> bool:
    lost = (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError)
    return isinstance(_cause(getattr(error, "controller_failure", None)), lost)


def _cause(failure: Any) -> Any:
    """What was raised in the first place, by whatever it was wrapped on its way here."""
    return getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure


def _reason(error: ray.train.TrainingFailedError) -> str:
    """In one line what a worker raised; what others raised because that one died says nothing."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    causes = [_cause(failure) for failure in failures.values()]
    causes = causes or [_cause(getattr(error, "controller_failure", error))]
    own = [cause for cause in causes if not isinstance(cause, ray.exceptions.RayError)] or causes
    return redact(f"{type(own[0]).__name__}: {' '.join(str(own[0]).split()) or 'no message'}")[:400]
