"""A call that kills its process costs a child; a photo that does is a row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from picinspector.errors import ErrorKind, PhotoError
from picinspector.manifest import stat_uris
from picinspector.photo import CropSpec
from picinspector.stages import read
from picinspector.stages.guard import Guard
from tests.poison import HAZARDS, poison

CROPS = {"clip_crop": CropSpec(32, 32)}


def double(number: int) -> int:
    return 2 * number


def pid() -> int:
    return os.getpid()


def end(how: str) -> None:
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.Signals[how])


def wait(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def die_once(marker: str) -> str:
    """Dies where the marker is not there yet."""
    if Path(marker).exists():
        return "alive"
    Path(marker).touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return "dead"


def fail(text: str) -> None:
    raise PhotoError(ErrorKind.CORRUPT, text)


def fill(size_bytes: int) -> int:
    return len(bytearray(size_bytes))


def call(function: Callable[..., object], *arguments: object) -> object:
    return function(*arguments)


def test_answers_and_errors_come_back_and_the_child_lives_on() -> None:
    with Guard(call) as guard:
        first = guard(pid)
        assert first != os.getpid()
        assert guard(double, 21) == 42
        with pytest.raises(PhotoError, match="as it says") as caught:
            guard(fail, "as it says")
        assert caught.value.kind == ErrorKind.CORRUPT
        assert guard(pid) == first
        child = first
    assert isinstance(child, int)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize(
    ("how", "said"), [("SIGSEGV", "SIGSEGV"), ("SIGKILL", "SIGKILL"), ("exit", "exit code 7"), ("SIGABRT", "SIGABRT")]
)
def test_what_kills_its_process_is_crashed_and_the_next_call_works(how: str, said: str) -> None:
    with Guard(call) as guard:
        with pytest.raises(PhotoError, match=said) as caught:
            guard(end, how)
        assert caught.value.kind == ErrorKind.CRASHED
        assert guard(double, 4) == 8


def test_a_child_that_somebody_killed_is_no_fault_of_the_call(tmp_path: Path) -> None:
    with Guard(die_once) as guard:
        assert guard(str(tmp_path / "marker")) == "alive"
    with Guard(call) as guard:  # killed between two calls
        child = guard(pid)
        assert isinstance(child, int)
        os.kill(child, signal.SIGKILL)
        assert guard(double, 1) == 2


def hang(how: str, seconds: float, log: str) -> None:
    """Leaves a line for each time that it was called."""
    with Path(log).open("a") as file:
        file.write(f"{seconds}\n")
    {"wait": wait, "spin": spin}[how](seconds)


@pytest.mark.parametrize("how", ["wait", "spin"])
def test_a_call_that_hangs_is_ended_and_not_made_again(how: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Guard(hang, timeout_s=0.2) as guard:
        guard(how, 0.01, str(log))
        with pytest.raises(PhotoError, match=r"longer than 0\.2 s") as caught:
            guard(how, 60.0, str(log))
        assert caught.value.kind == ErrorKind.CRASHED
        guard(how, 0.01, str(log))
    assert log.read_text().split() == ["0.01", "60.0", "0.01"]


def test_a_call_that_waits_gets_as_long_as_its_guard_has_patience() -> None:
    with Guard(wait, timeout_s=60.0, patience=0.01) as guard, pytest.raises(PhotoError, match="longer than 60 s"):
        guard(600.0)


def test_the_child_has_a_bound_on_its_memory() -> None:
    with Guard(fill, memory_bytes=2 * 1024**3) as guard:
        assert guard(1024**2) == 1024**2
        with pytest.raises(MemoryError):
            guard(4 * 1024**3)


def test_no_photo_is_blamed_where_no_child_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        """Of this process only: the child cannot import it."""

    missing.__qualname__ = "missing"
    monkeypatch.setattr(sys.modules[__name__], "missing", missing, raising=False)
    with Guard(missing) as guard, pytest.raises(OSError, match="could be started: exit code 1"):
        guard()


def test_the_child_ends_with_a_parent_that_is_killed() -> None:
    code = (
        "import os, signal, sys\n"
        "from picinspector.stages.guard import Guard\n"
        "from tests.test_guard import pid\n"
        "if __name__ == '__main__':\n"
        "    print(Guard(pid)(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    child = Path(f"/proc/{int(parent.stdout)}/stat")
    for _ in range(100):
        # Who adopts orphans in a container may never fetch their exit code: a zombie has ended.
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent by 10 s")


def library(folder: Path, *acts: str) -> pa.Table:
    for index, act in enumerate(acts):
        (folder / f"{index}.png").write_bytes(poison(act) if act else b"no photo")
    return stat_uris([str(folder / f"{index}.png") for index in range(len(acts))])


def test_each_photo_that_kills_becomes_its_row(tmp_path: Path) -> None:
    manifest = library(tmp_path, "sleep 0", "segfault", "sleep 0", "abort", "kill", "")
    rows = read.read_photos(manifest, CROPS, HAZARDS, is_retry=lambda: True)
    assert rows.column("error_kind").to_pylist() == [None, "crashed", None, "crashed", "crashed", "unknown_format"]
    messages = rows.column("error_message").to_pylist()
    assert "SIGSEGV" in messages[1] and "SIGABRT" in messages[3] and "SIGKILL" in messages[4]
    assert rows.column("image_id").equals(manifest.column("image_id"))
    plain = read.read_photos(manifest.take([0, 2, 5]), CROPS, HAZARDS)
    assert rows.take([0, 2, 5]).equals(plain), "guarded or not, the same values"


def test_a_first_attempt_has_no_child_and_ends_where_it_hangs(tmp_path: Path) -> None:
    manifest = library(tmp_path, "sleep 0", "hang")
    assert read.read_photos(manifest.slice(0, 1), CROPS, HAZARDS, is_retry=lambda: False).num_rows == 1
    code = (
        "import sys\n"
        "from picinspector.manifest import stat_uris\n"
        "from picinspector.stages import read\n"
        "from tests.poison import HAZARDS\n"
        "read.TIMEOUT_S = 0.1\n"
        "read.read_photos(stat_uris(sys.argv[1:]), {}, HAZARDS, is_retry=lambda: False)\n"
    )
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path / "1.png")], capture_output=True, timeout=60)
    assert child.returncode == -signal.SIGALRM, child.stderr
