"""The shape of the package: imports point one way, plug-ins stand alone, files and surface are small."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import repnoise

SOURCE = Path(repnoise.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# A room may import the rooms of earlier lines, and itself.
LAYERS = (
    ("errors", "registry", "seeds", "intervals", "bars", "losses"),
    ("store", "recipes"),
    ("models", "data", "lens"),
    ("judges", "training"),
    ("sandbox",),
    ("defences", "attacks", "evaluations"),
    ("report",),
    ("study",),
    ("campaign", "bench"),
    ("cli",),
    ("__main__", "__init__"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
REPORT_MAY = {"report", "store", "errors", "intervals", "bars"}
LOOSE = 8  # modules beside the rooms at the top, at most
PLUGINS = ("defences", "attacks", "evaluations", "judges", "data/sources")
# What plug-ins of one kind have in common.
SHARED = {"__init__", "base", "generation", "asking", "likelihood", "text", "agreement"}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names inside the package that a file imports, without the package's own name."""
    package = ["repnoise", *path.relative_to(SOURCE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{name.name}" for name in node.names}
    return {name.removeprefix("repnoise.") for name in found if name.startswith("repnoise.")}


def file_of(name: str) -> Path | None:
    """The file that a dotted name inside the package is, or is defined in."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = SOURCE.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    return None


def circles(arrows: dict[Path, set[Path]]) -> list[list[str]]:
    """Files that import each other, directly or through others; imports inside functions count too."""
    try:
        tuple(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        return [[str(path.relative_to(SOURCE)) for path in error.args[1]]]
    return []


def test_no_file_imports_itself_through_others() -> None:
    arrows = {path: {file for name in imports(path) if (file := file_of(name)) not in (None, path)} for path in FILES}
    assert circles(arrows) == []  # type: ignore[arg-type]
    one, two = FILES[:2]
    assert circles({one: {two}, two: {one}}) != []


def test_imports_point_one_way() -> None:
    wrong = []
    for path in FILES:
        part = part_of(path)
        assert part in LEVEL, f"{part} has no place in LAYERS: give it one"
        for name in imports(path):
            other = name.split(".")[0]
            if other == part:
                continue
            if LEVEL.get(other, -1) > LEVEL[part]:
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
            if part == "report" and other not in REPORT_MAY:
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}: a report reads runs only")
    assert wrong == []


def test_few_files_stand_outside_of_a_room() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= LOOSE


@pytest.mark.parametrize("folder", PLUGINS)
def test_plugin_files_never_import_each_other(folder: str) -> None:
    if not (SOURCE / folder).is_dir():
        pytest.skip("not there yet")
    files = {path.stem for path in (SOURCE / folder).glob("*.py")} - SHARED
    assert files
    package = folder.replace("/", ".")
    for path in (SOURCE / folder).glob("*.py"):
        if path.stem in files:
            others = {f"{package}.{other}" for other in files - {path.stem}}
            assert not {n for n in imports(path) for o in others if n == o or n.startswith(o + ".")}, path.name


def test_files_stay_readable() -> None:
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path
    assert not list(SOURCE.rglob("utils.py"))
    assert len(FILES) > 40


def test_every_file_says_what_it_is() -> None:
    assert [str(p) for p in FILES if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))] == []


def test_the_public_surface() -> None:
    """A name more or less is meant: change this list with it."""
    assert repnoise.__all__ == [
        "Objective",
        "ObjectiveTrainer",
        "Pair",
        "RepNoise",
        "Row",
        "__version__",
        "load_model",
        "load_pairs",
        "load_rows",
        "load_tokenizer",
        "resolve",
        "run",
        "save_model",
    ]
    for name in repnoise.__all__:
        assert getattr(repnoise, name) is not None
        assert name in dir(repnoise)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        repnoise.nonsense  # noqa: B018


def test_light_modules_need_no_torch() -> None:
    script = (
        "import sys, repnoise, repnoise.cli, repnoise.recipes.checking, repnoise.store.run, repnoise.report,"
        " repnoise.data,"
        " repnoise.judges, repnoise.sandbox.world; repnoise.__version__; repnoise.load_pairs; repnoise.Pair;"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
