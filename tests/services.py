"""What the tests needed from outside, and what they got: printed at the end of every run.

A real service where its programs are installed, else a named stand-in. With `PICINSPECTOR_REQUIRE_SERVICES=1` (CI sets
it) a stand-in is a failure where the real one could be installed: a mock that quietly took a server's place proves
nothing.
"""

from __future__ import annotations

import os

#: One line a service, in the order they were started.
USED: list[str] = []


def record_real(service: str, using: str) -> None:
    """Note that `service` is the real thing, e.g. `record_real("S3", "Ceph radosgw 16.2.15")`."""
    _note(f"services: {service} = {using}")


def record_stand_in(service: str, using: str, remedy: str) -> None:
    """Note that the run goes without the real `service`.

    Raises:
        RuntimeError: PICINSPECTOR_REQUIRE_SERVICES=1 forbids stand-ins.
    """
    if os.environ.get("PICINSPECTOR_REQUIRE_SERVICES") == "1":
        raise RuntimeError(f"PICINSPECTOR_REQUIRE_SERVICES=1 and there is no real {service}: {remedy}")
    _note(f"services: {service} = {using}: {remedy}")


def record_refused(service: str, using: str, reason: str) -> None:
    """Note that this machine does not let the run have the real `service`, which nobody could install."""
    _note(f"services: {service} = {using}: this machine refuses the real one ({reason})")


def _note(line: str) -> None:
    if line not in USED:  # a service that is started anew for each test
        USED.append(line)
