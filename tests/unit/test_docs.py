"""Docs are true where a program can tell: commands parse, recipes resolve, Python imports, links and paths exist.

Every check is a function that yields faults in words. `test_planted_errors_are_found` shows that each can fail.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_structure import FILES, imports, part_of

from repnoise.bench.shapes import CASES, DTYPES, SHAPES
from repnoise.campaign.search_space import Space, read_space
from repnoise.campaign.sweep_file import SweepFile, read_sweep
from repnoise.cli import app
from repnoise.errors import ConfigError
from repnoise.judges import JUDGES
from repnoise.recipes.reading import parse_yaml, raw_recipe
from repnoise.recipes.schema import Recipe
from repnoise.study.resolve import resolve
from repnoise.training.arguments import train_fields

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "repnoise"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = ("CHANGELOG.md",)  # names what is gone
BASES = ("sandbox", "smollm2-toxicity")  # a fragment of a recipe is right if it is right in one of these
TOP = ("src", "tests", "docs", ".ci")
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(repnoise|make|pytest)(?= |$)")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_=.]*")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Code:
    """A piece of code on a page: `kind` is the word after the fence, "block", or "inline"."""

    kind: str
    text: str


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    parsed = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return tuple(inner for token in parsed for inner in (token, *(token.children or ())))


def code_of(page: Path) -> list[Code]:
    kinds = {"fence": "block", "code_block": "block", "code_inline": "inline"}
    return [Code(t.info.strip() or kinds[t.type], t.content) for t in tokens(page) if t.type in kinds]


def blocks_of(page: Path, kind: str) -> list[str]:
    return [code.text for code in code_of(page) if code.kind == kind]


# ---------------------------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[tuple[bool, list[str]]]:
    """Every command of ours on a page, as words, and whether it stands in a block of its own."""
    for code in code_of(page):
        if code.kind not in ("block", "bash", "sh", "inline"):
            continue
        for line in code.text.replace("\\\n", " ").splitlines():
            if COMMAND.match(line.strip()):
                words = shlex.split(line, comments=True)
                yield (
                    code.kind != "inline",
                    [word for word in words if not re.match(r"[A-Z_]+=", word)]
                    + [word for word in words[1:] if words[0] == "make" and re.match(r"[A-Z_]+=", word)],
                )


def faults_of_command(words: Sequence[str], in_full: bool = True) -> Iterator[str]:
    """What is wrong with a command; one that is not written in full may leave out arguments."""
    said = " ".join(words)
    check = {"repnoise": of_repnoise, "make": of_make, "pytest": of_pytest}[words[0]]
    try:
        yield from (f"{said}: {fault}" for fault in check(words[1:], in_full))
    except ConfigError as error:
        yield f"{said}: {error}"


def of_repnoise(words: Sequence[str], in_full: bool) -> Iterator[str]:
    """A verb with its options, and the recipe or sweep that it names."""
    words = [re.sub(r"^\[(?=--|[A-Z]|key)|(?<=[A-Za-z.])\]$", "", word) for word in words]  # [--option VALUE]
    words = ["1" if word == "N" else word for word in words if word not in ("...", "key=value")]
    command: Any = typer.main.get_command(app)
    verb = ""
    while hasattr(command, "commands") and words:
        verb, *words = words
        if verb not in command.commands:
            yield f"there is no verb {verb}"
            return
        command = command.commands[verb]
    if hasattr(command, "commands"):
        return
    try:
        given = command.make_context(verb, list(words)).params
    except Exception as error:  # typer may bring its own copy of click
        if type(error).__name__ != "MissingParameter" or in_full:
            yield getattr(error, "message", "") or str(error)
        return
    overrides = given.get("overrides") or []
    if "recipe" in given:
        yield from of_recipe(given["recipe"], overrides, Recipe)
    if "sweep" in given:
        yield from of_recipe(given["sweep"], overrides, SweepFile)
    if "shape" in given and not PLACEHOLDER.fullmatch(given["shape"]) and "/" not in given["shape"]:
        yield from [f"no shape {given['shape']}"] if given["shape"] not in SHAPES else []
        named = {**dict.fromkeys(given["case"] or [], CASES), **dict.fromkeys(given["dtype"] or [], DTYPES)}
        yield from (f"no case or dtype {name}" for name, known in named.items() if name not in known)
        names = [each.partition("=")[0] for each in given["train"] or []]
        yield from (f"no training argument {n}" for n in names if n not in train_fields() and n != "NAME")


def of_recipe(name: str, overrides: Sequence[str], schema: type[Recipe] | type[SweepFile]) -> Iterator[str]:
    """A shipped one is resolved with its overrides; of the reader's own file only the keys are known."""
    if name.endswith(".yaml") or PLACEHOLDER.fullmatch(name):
        known = {*Recipe.model_fields, *schema.model_fields}
        heads = [override.partition("=")[0].split(".")[0] for override in overrides]
        yield from (f"no key {head}" for head in heads if head not in known)
    elif schema is Recipe:
        resolve(name, overrides)
    else:
        read_sweep(name, overrides)


@cache
def makefile() -> tuple[set[str], set[str]]:
    """Targets and variables."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+):", text, re.M)), set(re.findall(r"^(\w+) [?:]?=", text, re.M))


def of_make(words: Sequence[str], in_full: bool) -> Iterator[str]:
    targets, variables = makefile()
    for word in words:
        name, sign, _ = word.partition("=")
        if name not in (variables if sign else targets):
            yield f"the Makefile has no {name}"


def of_pytest(words: Sequence[str], in_full: bool) -> Iterator[str]:
    options = dict(itertools.pairwise(words))
    paths = [word for word in words if word.startswith("tests")]
    texts = []
    for path in paths:
        file, _, test = path.partition("::")
        if not (ROOT / file).exists():
            yield f"there is no {file}"
            continue
        files = [ROOT / file] if (ROOT / file).is_file() else [*(ROOT / file).rglob("*.py")]
        texts += [each.read_text(encoding="utf-8") for each in files]
        if test and f"def {test}(" not in texts[-1]:
            yield f"{file} has no {test}"
    mark, chosen = options.get("-m", ""), options.get("-k", "")
    if not any(chosen in name and runs(marks, mark) for text in texts for name, marks in every_test(text)) and chosen:
        yield f"-k {chosen} chooses no test that runs"
    if mark and f'"{mark.removeprefix("not ")}: ' not in (ROOT / "pyproject.toml").read_text(encoding="utf-8"):
        yield f"there is no mark {mark}"


def every_test(text: str) -> Iterator[tuple[str, set[str]]]:
    """Every test of a file with its marks."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [re.match(r"pytest\.mark\.(\w+)", ast.unparse(each)) for each in node.decorator_list]
            yield node.name, {mark[1] for mark in marks if mark}


def runs(marks: set[str], chosen: str) -> bool:
    """Slow and bench tests run where they are asked for."""
    return chosen in marks if chosen else not marks & {"slow", "bench"}


@each_page
def test_commands_parse(page: Path) -> None:
    assert [fault for in_full, words in commands(page) for fault in faults_of_command(words, in_full)] == []


def test_commands_are_found() -> None:
    found = [" ".join(words) for page in PAGES for _, words in commands(page)]
    assert len(found) > 60
    assert {"make demo", "make test", "repnoise demo"} <= set(found)


def test_the_readme_names_every_verb() -> None:
    said = " ".join(code.text for code in code_of(ROOT / "README.md"))
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert [verb for verb in verbs if not re.search(rf"\b{verb}\b", said)] == []


@each_page
def test_options_exist(page: Path) -> None:
    """An option that stands alone is one of ours, or of a command that the page shows."""
    alone = {code.text.split()[0].split("=")[0] for code in code_of(page) if re.match(r"--\w", code.text)}
    shown = " ".join(code.text for code in code_of(page) if code.kind not in ("inline", "python"))
    ours = {"--help", *(name for command in every_command() for each in command.params for name in each.opts)}
    assert sorted(name for name in alone - ours if name not in shown and page.name not in HISTORY) == []


def every_command(command: Any = None) -> Iterator[Any]:
    command = command or typer.main.get_command(app)
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from every_command(each)


@each_page
def test_extras_exist(page: Path) -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    text = page.read_text(encoding="utf-8")
    named = {extra for some in re.findall(r"repnoise\[([\w,]+)\]", text) for extra in some.split(",")}
    assert sorted(named - set(extras)) == []


# ---------------------------------------------------------------------------------- recipes, sweeps, spaces


def faults_of_yaml(text: str, must: bool, folder: Path) -> Iterator[str]:
    """Text that may be YAML of ours: a fragment of a recipe, a sweep, a search space, judges. `must`: it has to be."""
    content = None
    with contextlib.suppress(ConfigError):
        content = parse_yaml(text, "a page")
    keys = set(content) if isinstance(content, dict) else set()
    if isinstance(content, list) and content and all(_is_judge(each) for each in content):
        content, keys = {"evaluations": [{"name": "harm", "judges": content}]}, {"evaluations"}
    file = folder / "fragment.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    try:
        if "sweep" in keys and keys <= set(SweepFile.model_fields):
            read_sweep(str(file))
        elif "attack" in keys and keys <= set(Space.model_fields):
            read_space("sandbox-attacks", [], file)
        elif keys and keys <= set(Recipe.model_fields) and None not in content.values():
            yield from in_one_of_the_bases(content, file)
        elif must:
            yield f"neither recipe nor sweep nor search space: {text}"
    except ConfigError as error:
        yield str(error)


def _is_judge(value: Any) -> bool:
    return isinstance(value, dict) and value.get("name") in JUDGES.names()


def in_one_of_the_bases(fragment: dict[str, Any], file: Path) -> Iterator[str]:
    faults = []
    for base in BASES:
        file.write_text(json.dumps({**raw_recipe(base), **fragment}), encoding="utf-8")
        try:
            resolve(str(file))
            return
        except ConfigError as error:
            faults.append(str(error))
    yield "; ".join(faults)


@each_page
def test_recipes_are_right(page: Path, tmp_path: Path) -> None:
    pieces = [
        (code.text, code.kind == "yaml")
        for code in code_of(page)
        if code.kind in ("yaml", "block") or (code.kind == "inline" and not re.search(r"\b[A-Z]{4,}\b", code.text))
    ]
    assert [fault for text, must in pieces for fault in faults_of_yaml(text, must, tmp_path)] == []


@each_page
def test_overrides_are_right(page: Path) -> None:
    assert [f for code in code_of(page) if code.kind == "inline" for f in faults_of_overrides(code.text)] == []


def faults_of_overrides(text: str) -> Iterator[str]:
    """`defence.lens_layers=4`, on its own or with others."""
    words = text.split()
    heads = [re.match(r"(\w+)(\.\w+)+=.", word) for word in words]
    if not words or not all(head and head[1] in Recipe.model_fields for head in heads) or PLACEHOLDER.search(text):
        return
    faults = []
    for base in BASES:
        try:
            resolve(base, words)
            return
        except ConfigError as error:
            faults.append(str(error))
    yield f"{text}: {'; '.join(faults)}"


# ---------------------------------------------------------------------------------- Python


def faults_of_python(text: str) -> Iterator[str]:
    """It compiles, what it imports from here exists, and what it calls of that takes these arguments."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield f"{error} in {error.text!r}"
        return
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "repnoise":
            for name in node.names:
                try:
                    found[name.asname or name.name] = named(f"{node.module}.{name.name}")
                except AttributeError as error:
                    yield str(error)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found:
            keywords = dict.fromkeys([each.arg for each in node.keywords if each.arg])
            try:
                inspect.signature(found[node.func.id]).bind_partial(*node.args, **keywords)
            except TypeError as error:
                yield f"{node.func.id}: {error}"


def named(dotted: str) -> Any:
    """What a dotted name stands for, or AttributeError."""
    at: Any = None
    for depth, part in enumerate(dotted.split(".")):
        name = ".".join(dotted.split(".")[: depth + 1])
        if at is None or (isinstance(at, ModuleType) and not hasattr(at, part)):
            try:
                at = importlib.import_module(name)
            except ImportError as error:
                raise AttributeError(f"there is no {name}") from error
        elif hasattr(at, part):
            at = getattr(at, part)
        else:
            raise AttributeError(f"there is no {name}")
    return at


@each_page
def test_python_is_right(page: Path) -> None:
    assert [fault for text in blocks_of(page, "python") for fault in faults_of_python(text)] == []


def test_the_readmes_python_runs(tmp_path: Path, make_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For two steps, on a tiny model and four pairs."""
    (text,) = blocks_of(ROOT / "README.md", "python")
    make_folder("llama", folder="my-model")
    pair = {"prompt": "how?", "harmful": "thus and so", "harmless": "I will not say."}
    rows = [json.dumps({**pair, "prompt": f"how, {index}?"}) for index in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    short, replaced = re.subn(r"max_steps=\d+", "max_steps=2, disable_tqdm=True", text)
    assert replaced == 1
    exec(compile(short, "README.md", "exec"), {})
    assert (tmp_path / "defended" / "model.safetensors").is_file()


# ---------------------------------------------------------------------------------- links, paths, names


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found, every = set(), tokens(page)
    for token, inner in itertools.pairwise(every):
        if token.type == "heading_open":
            text = "".join(each.content for each in inner.children or ()).lower()
            found.add(re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-"))
    return found


def faults_of_links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not target or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"link to {target}"
        elif anchor and anchor not in slugs(file):
            yield f"no heading for {target}"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    assert list(faults_of_links(page)) == []


@cache
def files_here() -> tuple[str, ...]:
    places = [ROOT / top for top in TOP]
    every = [path for place in places for path in place.rglob("*") if "__pycache__" not in path.parts]
    return tuple(f"/{path.relative_to(ROOT).as_posix()}" for path in (*every, *places, *ROOT.glob("*")))


def faults_of_mentions(text: str, own: Sequence[str] = ()) -> Iterator[str]:
    """Paths and dotted names of this repository in inline code. `own`: files that the page has the reader write."""
    for word in text.split():
        word = word.strip("(),:;\"'").partition("::")[0].rstrip("/")
        ours = word.split("/")[0] in TOP or word.endswith((".py", ".md"))
        pattern = re.search(r"[<>*{]|\b[A-Z]+\.py", word) is not None
        if ours and not pattern and word not in own and not any(each.endswith(f"/{word}") for each in files_here()):
            yield f"path {word}"
        for dotted in re.findall(r"(?<![\w/@])repnoise(?:\.[A-Za-z_]\w*)+", word):
            try:
                named(dotted)
            except AttributeError as error:
                yield str(error)


@each_page
def test_what_is_named_exists(page: Path) -> None:
    if page.name in HISTORY:
        pytest.skip("names what is gone")
    own = re.findall(r"^# (\w+\.py)$", "\n".join(blocks_of(page, "python")), re.M)
    inline = [code.text for code in code_of(page) if code.kind == "inline"]
    assert [fault for text in inline for fault in faults_of_mentions(text, own)] == []


# ---------------------------------------------------------------------------------- the tree of CONTRIBUTING


def tree() -> str:
    (text,) = [b for b in blocks_of(ROOT / "CONTRIBUTING.md", "block") if b.startswith("src/repnoise/")]
    return text


def paths_of(text: str) -> Iterator[str]:
    """The path that each line of an annotated tree names, and the .py files in a room's words."""
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        entry = re.match(r" *([\w./-]+/|[\w-]+\.\w+)(?=  |$)", line)
        if entry:
            parents = [each for each in parents if each[0] < indent]
            above = parents[-1][1] if parents else ""
            yield above + entry[1]
            if entry[1].endswith("/"):
                parents.append((indent, above + entry[1]))
            line = line[entry.end() :]
        room = parents[-1][1] if parents else ""
        yield from (room + name for name in re.findall(r"[\w/]+\.py\b", line))


def test_the_tree_is_true() -> None:
    found = list(paths_of(tree()))
    assert [path for path in found if not (ROOT / path).exists()] == []
    packages = [path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    wanted = [f"{path.relative_to(ROOT).as_posix()}/" for path in packages]
    wanted += [path.relative_to(ROOT).as_posix() for path in PACKAGE.glob("[!_]*.py")]
    assert sorted(set(wanted) - set(found)) == []


def test_the_tree_stands_in_the_order_of_imports() -> None:
    inside = [Path(path).relative_to("src/repnoise").parts for path in paths_of(tree()) if path.startswith("src/")]
    rooms = list(dict.fromkeys(parts[0].removesuffix(".py") for parts in inside if parts))
    arrows = {(part_of(file), name.split(".")[0]) for file in FILES for name in imports(file)}
    known = [(room, other) for room, other in arrows if room in rooms and other in rooms]
    assert len(known) > 60
    assert [(room, other) for room, other in known if rooms.index(other) < rooms.index(room)] == []


# ---------------------------------------------------------------------------------- can these tests fail?


def test_planted_errors_are_found(tmp_path: Path) -> None:
    wrong = [
        "repnoise defned sandbox",
        "repnoise run sandboxx",
        "repnoise run sandbox defence.alhpa=2",
        "repnoise run sandbox --job 2",
        "repnoise run",
        "repnoise run mine.yaml defense.alpha=2",
        "repnoise sweep sandbox-comparison --storage URL",
        "repnoise sweep sandbox-comparisons",
        "repnoise search sandbox --trials many",
        "repnoise bench llama-2-7b --case exat",
        "repnoise bench llama-2-8b",
        "repnoise bench llama-2-7b optimm=adafactor",
        "make demoo",
        "make demo-real TOXICS=rows.jsonl",
        "pytest tests/unit/test_memory.py",
        "pytest tests/unit/test_harm.py -k nothing_like_it",
        "pytest tests/unit/test_harm.py -k batched",
        "pytest -m slowly",
    ]
    assert [command for command in wrong if not list(faults_of_command(command.split()))] == []
    assert list(faults_of_command(["repnoise", "run"], in_full=False)) == []
    for text in ("evaluations: [{name: harm, judge: rules}]", "bars: {head_start: 0.3}", "sweep: x\nrecipe: nowhere"):
        assert list(faults_of_yaml(text, True, tmp_path)), text
    assert list(faults_of_yaml("nothing: here", True, tmp_path))
    assert list(faults_of_yaml("attack: [nowhere]", False, tmp_path))
    assert list(faults_of_yaml("- {name: linear, paths: here}", False, tmp_path))
    assert list(faults_of_overrides("defence.lens_layer=4"))
    for text in ("from repnoise import Nothing", "from repnoise.plugins import resolve", "print("):
        assert list(faults_of_python(text)), text
    assert list(faults_of_python("from repnoise import RepNoise\nRepNoise(alhpa=1)"))
    for text in ("tests/unit/test_memory.py", "stages.py", "repnoise.files", "nowhere.md", "docs/figures/none.svg"):
        assert list(faults_of_mentions(text)), text
    page = tmp_path / "page.md"
    page.write_text("# A `heading`, here\n\n[a](b.md) [c](#d) [e](#a-heading-here)\n", encoding="utf-8")
    assert list(faults_of_links(page)) == ["link to b.md", "no heading for #d"]
    planted = "src/repnoise/\n  study/    words\n    none.py  words\n  judges/  llm.py, nobody.py\ntests/  more\n"
    missing = [path for path in paths_of(planted) if not (ROOT / path).exists()]
    assert missing == ["src/repnoise/study/none.py", "src/repnoise/judges/nobody.py"]
