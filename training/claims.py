"""A training and the folder it fills: nobody else fills it meanwhile, and it goes on as long as it gets on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray.train

from picinspector import lease, logs
from picinspector.errors import PicInspectorError, UsageError
from picinspector.storage import redact
from training.folders import Folder

#: Says which training a folder holds.
_SETTINGS = "settings.json"
#: Workers that die are started anew so often, on what nodes there are, and go on from the newest checkpoint. Nodes that
#: a cloud takes back with a warning do not count.
FAILURES = ray.train.FailureConfig(max_failures=2)
#: How often Ray Train asks its workers how they are. It takes one checkpoint from them each time: with its own two
#: seconds a head whose epochs take a tenth of that waits for most of its training.
_POLL_S = 0.2


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

    Two tries without any are forgiven where it was none of the workers: Ray itself does not try again when a node is
    lost while they start.

    Args:
        make: the trainer.
        run: the folder of its run.

    Raises:
        PicInspectorError: it fails, and would fail again.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_POLL_S))
    forgiven = 0
    while True:
        before = run.names()
        try:
            return make().fit()
        except ray.train.TrainingFailedError as error:
            if run.names() - before:
                forgiven = 0
            elif _is_rays(error) and forgiven < FAILURES.max_failures:
                forgiven += 1
            else:
                raise PicInspectorError(
                    f"the training failed: {_reason(error)}; mend it and submit the same command again, which goes on "
                    "from the newest checkpoint"
                ) from error
            logs.event("training_goes_on", reason=_reason(error))


def _is_rays(error: ray.train.TrainingFailedError) -> bool:
    """Whether it was between Ray and the workers, and not in one of them."""
    return isinstance(getattr(error, "controller_failure", None), ray.exceptions.RayError)


def _reason(error: ray.train.TrainingFailedError) -> str:
    """In one line what a worker raised; what others raised because that one died says nothing."""
    failures: dict[int, Any] = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "_base_exc", None) or failure for failure in failures.values()]
    causes = causes or [getattr(error, "controller_failure", error)]
    own = [cause for cause in causes if not isinstance(cause, ray.exceptions.RayError)] or causes
    return redact(f"{type(own[0]).__name__}: {' '.join(str(own[0]).split()) or 'no message'}")[:400]
