"""constraints.txt is what `make` installs: complete, in step with pyproject.toml, and good for any registry."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "constraints.txt").read_text().splitlines()


def pinned(name: str, python: str) -> list[str]:
    """The versions of a package for a Python on Linux, e.g. `pinned("numpy", "3.11")`."""
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    requirements = (Requirement(line) for line in LINES)
    return [
        next(iter(requirement.specifier)).version
        for requirement in requirements
        if canonicalize_name(requirement.name) == canonicalize_name(name)
        and (requirement.marker is None or requirement.marker.evaluate(environment))
    ]


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in project["dependencies"] + extras]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_dependency_is_pinned_to_a_version_it_allows(python: str) -> None:
    for requirement in declared():
        versions = pinned(requirement.name, python)
        assert len(versions) == 1, f"{requirement.name}: {versions}; make constraints.txt again, see CONTRIBUTING.md"
        assert requirement.specifier.contains(versions[0]), f"{requirement} is pinned to {versions[0]}"


def test_it_names_no_registry() -> None:
    strange = [line for line in LINES if not re.fullmatch(r"[a-z0-9._-]+==[\w.!+-]+( ; [\w.*' =!<>()]+)?", line)]
    assert not strange


def test_torch_is_not_the_build_without_cuda() -> None:
    """torch 2.13.0 resolves to one that no torchvision matches."""
    assert not {"2.13.0"} & {*pinned("torch", "3.11"), *pinned("torch", "3.12")}
