"""The house has floors: imports point down, and Ray is met on the third floor only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "picinspector"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"__init__", "schema", "errors", "text"}),
    frozenset(
        {
            *("storage", "manifest", "photo", "measure", "clip", "dinov2", "captioner", "scorer", "zeroshot"),
            *("fold", "towers", "forest", "resize"),
            *("logs", "redaction"),
            *(
                "attributes",
                "feedback",
                "wording",
                "critic",
                "chat",
                "plot",
                "web",
                "bundle",
                "device",
                "machine",
                "preprocess",
                "tables",
                "curate",
                "report",
                "xmp",
                "degrade",
                "duplicates",
                "metrics",
                "conformal",
                "recipe",
                "ratings",
                "taste",
                "drift",
                "verify",
                "contract",
                "plan",
                "prune",
                "ledger",
                "lease",
                "rank",
                "vectors",
                "neighbours",
                "groups",
                "selection",
                "search",
                "atomic",
                *("actions", "export", "sidecar"),
            ),
        }
    ),
    frozenset({"stages"}),
    frozenset({"pipeline", "nightly", "chains", "progress", "runs", "serve"}),
    frozenset({"cli", "__main__"}),
)
FLOOR = {module: floor for floor, modules in enumerate(LAYERS) for module in modules}
#: Modules of the same floor that may know each other. Floor 0 is names; floor 2 has one module.
SIDEWAYS = {1, 3, 4}


@dataclass(frozen=True)
class Import:
    """One import: of a whole module name, and whether it runs when the importing module is imported."""

    target: str
    line: int
    at_import: bool


def imports(source: str) -> Iterator[Import]:
    """Every import of a file. `from picinspector import photo` counts as `picinspector.photo`.

    What only type checkers see (`if TYPE_CHECKING:`) counts too: a name is knowledge.
    """

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write picinspector.{node.module or ''}"
            if node.module == "picinspector":
                yield from (Import(f"picinspector.{alias.name}", node.lineno, at_import) for alias in node.names)
            else:
                yield Import(node.module or "", node.lineno, at_import)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_import and not inside)

    return walk(ast.parse(source), True)


def problems(module: str, source: str) -> list[str]:
    """What is wrong with the imports of `module`, a line each."""
    if module not in FLOOR:
        return [f"{module} is in no layer"]
    floor, found = FLOOR[module], []
    for item in imports(source):
        where = f"{module}, line {item.line} (layer {floor})"
        root, _, rest = item.target.partition(".")
        if root == "ray":
            if floor < 3 or (floor > 3 and item.at_import):
                found.append(f"{where} imports {item.target}: only {', '.join(sorted(LAYERS[3]))} import Ray")
        elif root == "picinspector" and rest:
            target = rest.split(".")[0]
            if target not in FLOOR:
                # `from picinspector import __version__`: a name of the package, not a module of it.
                if (PACKAGE / f"{target}.py").exists() or (PACKAGE / target).is_dir():
                    found.append(f"{where} imports {target}, which is in no layer")
            elif FLOOR[target] > floor:
                found.append(f"{where} imports {target} (layer {FLOOR[target]}): imports point down")
            elif FLOOR[target] == floor and target != module and floor not in SIDEWAYS:
                found.append(f"{where} imports {target} of the same layer")
        elif root in {"tests", "training", "benchmarks", "jobs"}:
            found.append(f"{where} imports {item.target}: the package knows nothing of what uses it")
    return found


def module_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The module, or the folder of modules, that a file belongs to: `stages` for `stages/embed.py`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    """What a file is imported as."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_every_module_has_a_layer() -> None:
    homeless = {room(path) for path in module_files()} - FLOOR.keys()
    assert not homeless, f"place these in LAYERS: {sorted(homeless)}"


@pytest.mark.parametrize("path", module_files(), ids=dotted)
def test_imports_point_down(path: Path) -> None:
    found = problems(room(path), path.read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("errors", "from picinspector import photo", "imports point down"),
        ("errors", "import picinspector.schema", "of the same layer"),
        ("photo", "from picinspector.stages import Decode", "imports point down"),
        ("photo", "def f():\n    import ray.data", "import Ray"),
        ("stages", "from ray.data import Dataset", "import Ray"),
        ("stages", "if TYPE_CHECKING:\n    import ray", "import Ray"),
        ("pipeline", "from picinspector.cli import main", "imports point down"),
        ("cli", "import ray", "import Ray"),
        ("somewhere", "import os", "in no layer"),
        ("photo", "from tests.awkward import png", "knows nothing"),
    ],
)
def test_a_wrong_import_is_seen(module: str, line: str, complaint: str) -> None:
    (found,) = problems(module, line)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("photo", "from picinspector.errors import PhotoError\nfrom picinspector import schema, __version__"),
        ("bundle", "from picinspector import clip, dinov2"),
        ("pipeline", "import ray\nfrom ray.data import Dataset\nfrom picinspector import runs, stages"),
        ("cli", "def score():\n    import ray\n    from picinspector import pipeline"),
    ],
)
def test_a_right_import_is_let_through(module: str, line: str) -> None:
    assert problems(module, line) == []


def test_what_is_below_the_third_floor_loads_without_ray() -> None:
    """Not even through another module; `cli` too, so that `--help` does not wait for Ray."""
    names = [dotted(path) for path in module_files() if FLOOR.get(room(path)) in {0, 1, 2} or room(path) == "cli"]
    code = "import sys\n" + "\n".join(
        f"import {name}; assert 'ray' not in sys.modules, '{name} imports ray'" for name in names
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stderr


def test_a_driver_does_not_load_torch() -> None:
    """Nor do workers that only score: both name stages and photos, and torch takes them seconds."""
    code = (
        "import sys, picinspector.pipeline, picinspector.stages.encode, picinspector.stages.read\n"
        "assert not {'torch', 'transformers', 'open_clip'} & sys.modules.keys()"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stderr
