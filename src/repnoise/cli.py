"""The command line. Heavy imports happen inside the verbs, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import RepNoiseError, RunError

if TYPE_CHECKING:
    from .pipeline import Study

app = typer.Typer(
    name="repnoise",
    help="Immunise open-weight language models against harmful fine-tuning, attack them, and measure what holds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
recipes_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
sandbox_app = typer.Typer(help="The bundled miniature with ground truth.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(sandbox_app, name="sandbox")

RecipeArgument = Annotated[
    str, typer.Argument(help="A shipped recipe (see `repnoise recipes ls`) or a .yaml file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe: dotted.key=value.", show_default=False)
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Study folder. Default: studies/<study name>.", show_default=False)
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Attacks that run at a time, sharing the cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(result: dict[str, Any], as_json: bool, lines: Callable[[], str] | None = None) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(lines() if lines else "\n".join(f"{key}: {value}" for key, value in result.items()))


def _study(recipe: str, overrides: list[str] | None, out: Path | None, quiet: bool) -> Study:
    from .pipeline import Study, resolve

    resolved = resolve(recipe, overrides or [])
    return Study(resolved, out or Path("studies") / resolved.study, _say, quiet=quiet)


def _outcome(folder: Path) -> dict[str, Any]:
    from .runs import read_json

    summary = read_json(folder / "summary.json")
    resistance = summary.get("resistance") or {}
    return {
        "study": summary["study"],
        "worst_head_start": resistance.get("worst_head_start"),
        "stability": summary.get("stability"),
        "verdict": summary.get("verdict"),
        "summary": str(folder / "summary.json"),
        "report": str(folder / "report.html"),
    }


def _outcome_text(result: dict[str, Any]) -> str:
    worst = result["worst_head_start"]
    lines = ["worst head start: " + ("not measured" if worst is None else f"{worst:.2f}")]
    lines += [f"  {claim['claim']}: {claim['status']}" for claim in (result["verdict"] or {}).get("claims", [])]
    return "\n".join([*lines, f"report: {result['report']}"])


@app.command()
def demo(
    out: Out = None, jobs: Jobs = 2, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """The whole loop on the sandbox: offline, on the CPU, in minutes.

    Example: repnoise demo --out studies/demo
    """
    _run("sandbox", [], out or Path("studies/demo"), jobs, quiet, as_json)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Defend, attack, evaluate, report. What is done is skipped; what was interrupted goes on.

    Examples:

      repnoise run sandbox

      repnoise run sandbox defence.alpha=2 attacks.0.learning_rate='[1e-4, 1e-3]' --out studies/mine

      repnoise run my-recipe.yaml --jobs 2
    """
    _run(recipe, overrides, out, jobs, quiet, as_json)


def _run(
    recipe: str, overrides: list[str] | None, out: Path | None, jobs: int, quiet: bool, as_json: bool
) -> None:
    study = _study(recipe, overrides, out, quiet)
    from .pipeline import run as run_study

    run_study(study.recipe, study.folder, jobs=jobs, say=_say, quiet=quiet)
    result = _outcome(study.folder)
    _print(result, as_json, lambda: _outcome_text(result))


@app.command()
def defend(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Train the recipe's defence and measure it before any attack.

    Example: repnoise defend sandbox defence.beta=0.1 --out studies/mine
    """
    study = _study(recipe, overrides, out, quiet)
    target = study.defend()
    _print({"run": str(target.run.path), "model": str(target.source)}, as_json)


@app.command()
def attack(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack the defended model (defending it first if need be), the undefended one and the controls.

    Attacked weights are measured and let go; `keep_attacked_weights=true` keeps them.

    Example: repnoise attack sandbox attacks.0.steps=600 --jobs 2
    """
    study = _study(recipe, overrides, out, quiet)
    from .pipeline import attack_all

    study.defend()
    attack_all(study, jobs=jobs)
    _print({"study": str(study.folder), "attacks": len(study.cells()) * len(study.targets())}, as_json)


@app.command()
def evaluate(
    recipe: RecipeArgument, overrides: Overrides = None, out: Out = None, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Measure the undefended model and the controls as they are, without any attack.

    Example: repnoise evaluate sandbox model=path/to/model controls='[]' --out studies/mine
    """
    study = _study(recipe, overrides, out, quiet)
    rows: dict[str, Any] = {}
    for target, stage in [(study.base(), "base"), *((control, "control") for control in study.controls())]:
        study.evaluate(target, stage)
        rows[target.run.path.name] = target.run.read_rows()

    def table() -> str:
        return "\n".join(
            f"{name:20} {row['metric']:24} {row['value']:8.3f}  n={row['n']}"
            for name, found in rows.items()
            for row in found
            if "category" not in row
        )

    _print({"study": str(study.folder), "rows": rows}, as_json, table)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="A study folder.", show_default=False)], as_json: AsJson = False
) -> None:
    """Write summary.json, table.csv and report.html from the rows of a study.

    Example: repnoise report studies/demo
    """
    from .report import write_report

    write_report(study)
    result = _outcome(study)
    _print(result, as_json, lambda: _outcome_text(result))


@recipes_app.command("ls")
def recipes_ls(as_json: AsJson = False) -> None:
    """What exists."""
    from .config import raw_recipe, recipe_names

    found = {name: str(raw_recipe(name).get("about", "")).strip() for name in recipe_names()}
    _print(found, as_json)


@recipes_app.command("show")
def recipes_show(
    recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Print a recipe with every default written out.

    Example: repnoise recipes show sandbox defence.alpha=2
    """
    import yaml

    from .config import dump
    from .pipeline import resolve

    resolved = dump(resolve(recipe, overrides or []))
    _print(resolved, as_json, lambda: yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))


@recipes_app.command("cp")
def recipes_cp(
    recipe: RecipeArgument,
    to: Annotated[Path, typer.Argument(help="A .yaml file that does not exist yet.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Own a copy.

    Example: repnoise recipes cp sandbox mine.yaml
    """
    from .config import recipe_text
    from .errors import ConfigError
    from .runs import write_text

    if to.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"the copy must be called something.yaml, got {to}.")
    if to.exists():
        raise ConfigError(f"{to} exists already. Choose another name or delete it.")
    write_text(to, recipe_text(recipe))
    _print({"recipe": str(to)}, as_json)


@recipes_app.command("validate")
def recipes_validate(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe: every error at once.

    Example: repnoise recipes validate mine.yaml
    """
    from .pipeline import resolve

    resolve(recipe, overrides or [])
    _print({"recipe": recipe, "valid": True}, as_json, lambda: f"{recipe} is valid")


@sandbox_app.command("build")
def sandbox_build(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the two models.")] = Path("sandbox-weights"),
    seed: Annotated[int, typer.Option(help="Seed of initial weights and order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make the bundled weights again from nothing: pre-train, align, once with the harm and once without.

    Example: repnoise sandbox build --out my-sandbox
    """
    from .sandbox.build import KINDS, build

    found = {}
    for kind in KINDS:
        if (out / kind / "config.json").exists():
            _say(f"{out / kind}: done before, kept")
        else:
            _say(f"{kind}: pre-training and alignment, about ten minutes")
            build(kind, out / kind, seed=seed)
        found[kind] = str(out / kind)
    _print(found, as_json)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the return value is the exit code: 0 done, 1 a stage failed, 2 wrong input."""
    try:
        app(args=arguments, standalone_mode=False)
    except RepNoiseError as error:
        _say(f"repnoise: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("repnoise: interrupted. What was finished is kept; run the same command again to go on.")
        return RunError.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        import click

        if isinstance(error, click.ClickException):
            error.show(file=sys.stderr)
            return 2
        if isinstance(error, click.exceptions.Abort):
            return RunError.exit_code
        raise
    return 0
