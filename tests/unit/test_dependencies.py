"""What is imported is declared, what is declared is imported, and both have a pin."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import repnoise

tomllib = pytest.importorskip("tomllib")  # Python 3.11

SOURCE = Path(repnoise.__file__).parent
ROOT = SOURCE.parent.parent
# Installed distributions give the names of most modules; these may be missing where the tests run.
KNOWN = {"deepspeed": "deepspeed", "bitsandbytes": "bitsandbytes", "lm_eval": "lm-eval"}
NOT_DECLARED = {
    "httpx": "huggingface-hub brings it under the name of its major version",
    "httpx2": "huggingface-hub brings it under the name of its major version",
    "pydantic-core": "a part of pydantic, pinned by it to one version",
}
NOT_IMPORTED = {
    "accelerate": "transformers.Trainer needs it",
    "gguf": "transformers reads GGUF files with it",
}


def name_of(requirement: str) -> str:
    """The distribution's name in normal form."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0]).lower()


def imported(tree: ast.AST, *, at_once: bool) -> Iterator[str]:
    """Top-level names of modules; `at_once`: only what is imported when the file itself is, types aside."""
    for node in ast.iter_child_nodes(tree):
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        inside |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant) and a.value[0] != ".")
        if not (at_once and inside):
            yield from imported(node, at_once=at_once)


def distributions(*, at_once: bool) -> dict[str, str]:
    """Distribution -> a file that imports it; a module that nobody installed stands under its own name."""
    owners = {module: owner for module, (owner, *_) in packages_distributions().items()} | KNOWN
    found: dict[str, str] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for module in imported(ast.parse(path.read_text(encoding="utf-8")), at_once=at_once):
            if module not in sys.stdlib_module_names and module != "repnoise":
                found.setdefault(name_of(owners.get(module, module)), str(path.relative_to(SOURCE)))
    return found


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("no checkout")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(project: dict[str, Any], *extras: str) -> set[str]:
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {name_of(requirement) for each in lists for requirement in each} - {"repnoise"}


def test_imports_and_declarations_are_the_same(project: dict[str, Any]) -> None:
    extras = set(project["optional-dependencies"]) - {"dev"}
    found, said = distributions(at_once=False), declared(project, *extras)
    missing = {name: path for name, path in found.items() if name not in said | set(NOT_DECLARED)}
    assert missing == {}, "imported and not declared in pyproject.toml"
    assert said - set(found) - set(NOT_IMPORTED) == set(), "declared and imported nowhere"
    assert set(NOT_IMPORTED) <= said - set(found), "an exception that is none"
    assert set(NOT_DECLARED) - said == set(NOT_DECLARED), "an exception that is none"


def test_what_an_extra_brings_is_imported_when_it_is_needed(project: dict[str, Any]) -> None:
    """Not when a file is: everything else works without the extra."""
    missing = {n: p for n, p in distributions(at_once=True).items() if n not in declared(project) | set(NOT_DECLARED)}
    assert missing == {}


def test_everything_declared_has_a_pin(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {name_of(line) for line in lines if line and not line.startswith("#")}
    assert declared(project, *project["optional-dependencies"]) - {"deepspeed"} <= pins  # not in the extra "all"


def test_both_directions_are_seen() -> None:
    text = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d.e import g\n    import_module('h.i')\n"
    assert set(imported(ast.parse(text), at_once=False)) == {"a", "c", "d", "h"}
    assert set(imported(ast.parse(text), at_once=True)) == {"a"}
    assert name_of("Foo_Bar[x]>=1 ; python_version > '3'") == "foo-bar"
