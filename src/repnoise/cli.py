"""The command line. Heavy imports happen inside the verbs, so that --help answers at once."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError, RepNoiseError, RunError

if TYPE_CHECKING:
    from .pipeline import Study

app = typer.Typer(
    name="repnoise",
    help="Immunise open-weight language models against harmful fine-tuning, attack them, measure what holds.",
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


_at_end = ExitStack()  # what `main` undoes


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _hide_loading_bars() -> None:
    """No bar for each model that transformers loads or saves; downloads and our own stages keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    if logging.is_progress_bar_enabled():
        logging.disable_progress_bar()
        enable_progress_bars()
        _at_end.callback(logging.enable_progress_bar)


def _print(result: dict[str, Any], as_json: bool, lines: Callable[[], str] | None = None) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(lines() if lines else "\n".join(f"{key}: {value}" for key, value in result.items()))


def _study(recipe: str, overrides: list[str] | None, out: Path | None, quiet: bool) -> Study:
    from .pipeline import Study, resolve

    _hide_loading_bars()
    if quiet:
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

        disable_progress_bars()
        _at_end.callback(enable_progress_bars)
    resolved = resolve(recipe, overrides or [])
    folder = out or Path("studies") / resolved.study
    above = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not above.is_dir():
        raise ConfigError(f"--out {folder}: {above} is a file. Allowed: a folder, new or of an earlier run.")
    return Study(resolved, folder, _say, quiet=quiet)


def _outcome(folder: Path, defence: Path | None = None) -> dict[str, Any]:
    """What a summary says of the defence in the folder `defence`, by default of the study's main one."""
    from .runs import read_json

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


def _outcome_text(result: dict[str, Any]) -> str:
    worst = result["worst_head_start"]
    lines = ["worst head start: " + ("not measured" if worst is None else f"{worst:.2f}")]
    for claim in (result["verdict"] or {}).get("claims", []):
        to = f" to {claim['harm']} harm" if claim.get("harm") else ""
        lines.append(f"  {claim['claim'].replace('_', '-')}{to}: {claim['status']}")
    return "\n".join([*lines, f"report: {result['report']}"])


@app.command()
def demo(out: Out = None, jobs: Jobs = 2, quiet: Quiet = False, as_json: AsJson = False) -> None:
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


def _run(recipe: str, overrides: list[str] | None, out: Path | None, jobs: int, quiet: bool, as_json: bool) -> None:
    study = _study(recipe, overrides, out, quiet)
    from .pipeline import run as run_study

    run_study(study.recipe, study.folder, jobs=jobs, say=_say, quiet=quiet)
    result = _outcome(study.folder, study.defended().run.path)
    _print(result, as_json, lambda: _outcome_text(result))


@app.command()
def defend(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
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
    recipe: RecipeArgument,
    overrides: Overrides = None,
    defended: Annotated[
        str | None,
        typer.Option(
            "--defended",
            help="A model that was defended elsewhere, by any means: folder or hub id. Default: what `defend` made.",
            show_default=False,
        ),
    ] = None,
    attacks: Annotated[
        bool, typer.Option("--attacks/--no-attacks", help="Attack as well; without, nothing is said of resistance.")
    ] = True,
    out: Out = None,
    jobs: Jobs = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The score sheet of a defended model: all evaluations on it, on the undefended one and on the controls, the same
    attacks on each, and the verdict. What was measured before is kept.

    Examples:

      repnoise evaluate sandbox --out studies/demo

      repnoise evaluate smollm2-toxicity --defended my-defended-model --jobs 2

      repnoise evaluate sandbox --no-attacks
    """
    given = [f"defended={json.dumps(defended)}"] if defended is not None else []
    study = _study(recipe, [*(overrides or []), *given], out, quiet)
    from .pipeline import attack_all, measure_all

    model = study.defended()
    there = study.recipe.defended is not None or model.run.is_done(model.hash)
    if attacks and not there:
        raise ConfigError(
            f"{study.folder} holds no defended model for this recipe. Run `repnoise defend {recipe}` with the same"
            " settings first, give one with --defended, or measure the rest with --no-attacks."
        )
    measure_all(study, defended=there)
    if attacks:
        attack_all(study, jobs=jobs)
    result: dict[str, Any] = {"study": str(study.folder)}
    if there:
        study.report()
        result = _outcome(study.folder, model.run.path)
    result["rows"] = {each.run.path.name: each.run.read_rows() for each in study.targets() if each.run.path.is_dir()}

    def table() -> str:
        lines = [
            f"{name:24} {row['metric']:28} {row['value']:8.3f}  n={row['n']}"
            for name, found in result["rows"].items()
            for row in found
            if row.get("category") is None and row.get("step") is None
        ]
        return "\n".join([*lines, _outcome_text(result)] if there else lines)

    _print(result, as_json, table)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="A study folder.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Write summary.json, table.csv and report.html from the rows of a study.

    Example: repnoise report studies/demo
    """
    from .report import write_report

    if not study.is_dir():
        raise ConfigError(f"there is no study folder {study}. Give the --out folder of an earlier `repnoise run`.")
    write_report(study)
    result = _outcome(study)
    _print(result, as_json, lambda: _outcome_text(result))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A hub id, a folder or a GGUF file.", show_default=False)],
    to: Annotated[Path, typer.Argument(help="A folder that does not exist yet.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Read a model and write it as safetensors with its tokenizer.

    Example: repnoise convert model.gguf my-model
    """
    _hide_loading_bars()
    from .models import check_fits, load_model, load_tokenizer, save_model

    model, tokenizer = load_model(source, dtype=dtype), load_tokenizer(source)
    check_fits(model, tokenizer)
    _print({"model": str(save_model(model, tokenizer, to))}, as_json)


@recipes_app.command("ls")
def recipes_ls(as_json: AsJson = False) -> None:
    """What exists.

    Example: repnoise recipes ls
    """
    from .config import raw_recipe, recipe_names

    found = {name: str(raw_recipe(name).get("about", "")).strip() for name in recipe_names()}
    _print(found, as_json)


@recipes_app.command("show")
def recipes_show(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
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

    _hide_loading_bars()
    found: dict[str, Any] = {}
    for kind in KINDS:
        if (out / kind / "config.json").exists():
            _say(f"{out / kind}: done before, kept")
        else:
            _say(f"{kind}: pre-training and alignment, some minutes")
            build(kind, out / kind, seed=seed)
        found[kind] = str(out / kind)
    _print(found, as_json)


INTERRUPTED = "interrupted. What was finished is kept; run the same command again to go on."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the return value is the exit code: 0 done, 1 a stage failed, 2 wrong input.

    With REPNOISE_TRACEBACK=1 in the environment errors come with their traceback.
    """
    try:
        with _at_end:
            code = app(args=arguments, prog_name="repnoise", standalone_mode=False) or 0
            if code == 130:  # what newer versions of typer make of KeyboardInterrupt, older ones of Abort
                raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _say(f"repnoise: {INTERRUPTED}")
        return RunError.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:  # `repnoise recipes ls | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RunError.exit_code
    except Exception as error:
        return _explain(error)
    return int(code)


def _explain(error: Exception) -> int:
    """Print an error on stderr and give its exit code."""
    if os.environ.get("REPNOISE_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, RepNoiseError):
        _say(f"repnoise: {error}")
        return error.exit_code
    if hasattr(error, "format_message"):  # a usage error; typer brings its own copy of click, or uses the real one
        context = getattr(error, "ctx", None)
        if context is None:
            _say(f"repnoise: {error.format_message()}")
        else:
            what = error.format_message() or f"{context.command_path}: a command is missing."
            _say(f"repnoise: {what}\n{context.get_usage()}\nTry `{context.command_path} --help`.")
        return ConfigError.exit_code
    what = " ".join(f"{type(error).__name__}: {error}".split())
    step = "Set REPNOISE_TRACEBACK=1 to see where."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        step = "Out of memory: lower train.per_device_train_batch_size, batch_size or data.max_length."
    _say(f"repnoise: a stage failed unexpectedly: {what[:1000]}\nWhat was finished is kept. {step}")
    return RunError.exit_code
