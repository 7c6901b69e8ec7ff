"""What a result depends on, as plain data. Its hash is the result's, and two of them tell what has changed.

Of a plug-in every option counts, defaults among them, for a changed default makes another model. Where an option names
a file or a folder, its contents count and not its place. A plug-in that reads files of which its options say nothing,
or that has an option with a path whose contents do not matter (a cache), says so in `reads()`: the paths that count.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from ..errors import ModelError
from ..judges import JUDGES, Judge
from ..models import load_model, model_fingerprint
from ..store.provenance import contents

Depends = dict[str, Any]
_NAMED = re.compile(r"(?P<kind>[A-Za-z]\w+:)(?P<path>.+)", re.DOTALL)  # as in data/pairs.py: a source and its file
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "tekken.json", "*.jinja")
_ASKING = ("generation_config.json",)


def plain(value: Any) -> Any:
    """`value` as data for JSON: dataclasses and models as their fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    return to_jsonable_python(value, fallback=repr)


def options_of(plugin: Any) -> dict[str, Any]:
    """Every option of a built plug-in with its value, those of its judges too; a recipe takes them as they are."""
    options: dict[str, Any] = plain(plugin) if dataclasses.is_dataclass(plugin) else {}
    judges = judges_of(plugin)
    if judges and "judges" in options:
        options["judges"] = [{"name": _name(j), "label": label, **options_of(j)} for label, j in judges.items()]
    return options


def depends_on(name: str, plugin: Any) -> Depends:
    """What a plug-in makes of a result."""
    options: dict[str, Any] = plain(plugin) if dataclasses.is_dataclass(plugin) else {}
    reads = getattr(plugin, "reads", None)
    if callable(reads):
        options["reads"] = [contents(Path(path)) for path in reads()]
    else:
        options = _by_contents(options)
    judges = judges_of(plugin)
    if judges:
        options["judges"] = {label: depends_on(_name(judge), judge) for label, judge in judges.items()}
    return {"name": name, **options}


def judges_of(plugin: Any) -> dict[str, Judge]:
    """Label -> judge, of a plug-in that keeps judges in an attribute."""
    found: dict[str, Judge] = {}
    for value in getattr(plugin, "__dict__", {}).values():
        if isinstance(value, Judge):
            found[_name(value)] = value
        elif isinstance(value, Mapping):
            found |= {str(label): each for label, each in value.items() if isinstance(each, Judge)}
    return found


def _name(judge: Judge) -> str:
    return next((name for name in JUDGES.names() if JUDGES.get(name) is type(judge)), type(judge).__qualname__)


def _by_contents(value: Any) -> Any:
    """The value with the contents of files and folders in place of their paths."""
    if isinstance(value, dict):
        return {key: _by_contents(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_by_contents(each) for each in value]
    if not isinstance(value, str) or value.startswith("hub:"):
        return value
    named = _NAMED.fullmatch(value)
    for kind, path in (("", value), *([(named["kind"], named["path"])] if named else [])):
        if _exists(path):
            return kind + contents(Path(path))
    return value


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such user
        return False


# ---- models -----------------------------------------------------------------------------------------------


def model(source: str | Path, revision: str | None = None) -> Depends:
    """Of a folder or file its weights and what turns text into tokens; of a hub id the commit, where it is known."""
    path = Path(source).expanduser()
    if not path.exists():
        commit = hub_commit(str(source), revision)
        return {"hub": str(source), **({"commit": commit} if commit else {"revision": revision or "main"})}
    try:
        weights = model_fingerprint(path)
    except ModelError:
        load_model(path)  # says more about what is wrong with the folder
        raise
    if path.is_file():
        return {"weights": weights}
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))
        return {"weights": weights, "base": model(base["base_model_name_or_path"], base.get("revision"))}
    beside = {file for pattern in (*_TOKENIZER, *_ASKING) for file in path.glob(pattern) if file.is_file()}
    return {"weights": weights, "beside": {file.name: contents(file) for file in sorted(beside)}}


def commit(source: str | None) -> str | None:
    """Of a hub id; None for a folder, whose contents count, and where it is unknown."""
    return None if source is None or _exists(source) else hub_commit(source)


def hub_commit(source: str, revision: str | None = None) -> str | None:
    """The commit that a hub id's revision leads to now, from the hub or, offline, from the cache; None: unknown."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    for name in ("config.json", "adapter_config.json"):
        try:
            found = cached_file(source, name, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
        except OSError:  # no network and nothing in the cache, or no such model: loading it will say so
            return None
        if found is not None:
            return extract_commit_hash(str(found), None)
    return None
