"""What the verbs have in common: arguments, printing, opening a study. Heavy imports happen inside."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..study.pipeline import Study

RecipeArgument = Annotated[
    str,
    typer.Argument(help="A shipped recipe (see `repnoise recipes ls`) or a .yaml file.", show_default=False),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe: dotted.key=value.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Study folder. Default: studies/<study name>.", show_default=False),
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Attacks that run at a time, sharing the cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


at_end = ExitStack()  # what `main` undoes


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def hide_loading_bars() -> None:
    """No bar for each model that transformers loads or saves; downloads and our own stages keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    if logging.is_progress_bar_enabled():
        logging.disable_progress_bar()
        enable_progress_bars()
        at_end.callback(logging.enable_progress_bar)


def output(result: dict[str, Any], as_json: bool, lines: Callable[[], str] | None = None) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(lines() if lines else "\n".join(f"{key}: {value}" for key, value in result.items()))


def open_study(recipe: str, overrides: list[str] | None, out: Path | None, quiet: bool) -> Study:
    from ..study.pipeline import Study, resolve

    hide_loading_bars()
    if quiet:
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

        disable_progress_bars()
        at_end.callback(enable_progress_bars)
    resolved = resolve(recipe, overrides or [])
    folder = out or Path("studies") / resolved.study
    above = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not above.is_dir():
        raise ConfigError(f"--out {folder}: {above} is a file. Allowed: a folder, new or of an earlier run.")
    return Study(resolved, folder, say, quiet=quiet)


def outcome(folder: Path, defence: Path | None = None) -> dict[str, Any]:
    """What a summary says of the defence in the folder `defence`, by default of the study's main one."""
    from ..store.files import read_json

    summary = read_json(folder / "summary.json")
    several = summary.get("defences", {})
    about = several.get(defence.name, summary) if defence else summary
    return {
        "study": summary["study"],
        "worst_head_start": (about.get("resistance") or {}).get("worst_head_start"),
        "stability": about.get("stability"),
        "verdict": about.get("verdict"),
        "summary": str(folder / "summary.json"),
        "report": str(folder / "report.html"),
    }


def outcome_text(result: dict[str, Any]) -> str:
    worst = result["worst_head_start"]
    lines = ["worst head start: " + ("not measured" if worst is None else f"{worst:.2f}")]
    for claim in (result["verdict"] or {}).get("claims", []):
        to = f" to {claim['harm']} harm" if claim.get("harm") else ""
        lines.append(f"  {claim['claim'].replace('_', '-')}{to}: {claim['status']}")
    return "\n".join([*lines, f"report: {result['report']}"])
