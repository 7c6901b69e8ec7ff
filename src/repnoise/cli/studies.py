"""Verbs that work on a study: demo, run, defend, attack, evaluate, report; and convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .common import (
    AsJson,
    Jobs,
    Out,
    Overrides,
    Quiet,
    RecipeArgument,
    hide_loading_bars,
    open_study,
    outcome,
    outcome_text,
    output,
    say,
)

app = typer.Typer()


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
    study = open_study(recipe, overrides, out, quiet)
    from ..study import pipeline

    pipeline.run(study.recipe, study.folder, jobs=jobs, say=say, quiet=quiet)
    result = outcome(study.folder, study.defended().run.path)
    output(result, as_json, lambda: outcome_text(result))


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
    study = open_study(recipe, overrides, out, quiet)
    from ..study import pipeline

    target = pipeline.defend(study)
    output({"run": str(target.run.path), "model": str(target.source)}, as_json)


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
    study = open_study(recipe, overrides, out, quiet)
    from ..study import pipeline

    pipeline.defend(study)
    pipeline.attack_all(study, jobs=jobs)
    output({"study": str(study.folder), "attacks": len(study.cells()) * len(study.targets())}, as_json)


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
    study = open_study(recipe, [*(overrides or []), *given], out, quiet)
    from ..study import pipeline

    model = study.defended()
    there = study.recipe.defended is not None or model.run.is_done(model.hash)
    if attacks and not there:
        raise ConfigError(
            f"{study.folder} holds no defended model for this recipe. Run `repnoise defend {recipe}` with the same"
            " settings first, give one with --defended, or measure the rest with --no-attacks."
        )
    pipeline.measure_all(study, defended=there)
    if attacks:
        pipeline.attack_all(study, jobs=jobs)
        pipeline.settle(study, jobs=jobs)
    result: dict[str, Any] = {"study": str(study.folder)}
    if there:
        pipeline.report(study)
        result = outcome(study.folder, model.run.path)
    result["rows"] = {each.run.path.name: each.run.read_rows() for each in study.targets() if each.run.path.is_dir()}

    def table() -> str:
        lines = [
            f"{name:24} {row['metric']:28} {row['value']:8.3f}  n={row['n']}"
            for name, found in result["rows"].items()
            for row in found
            if row.get("category") is None and row.get("step") is None
        ]
        return "\n".join([*lines, outcome_text(result)] if there else lines)

    output(result, as_json, table)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="A study folder.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Write summary.json, table.csv and report.html from the rows of a study; of a sweep, the comparison too.

    Example: repnoise report studies/demo
    """
    from ..report import write_report
    from ..report.comparison import SWEEP
    from ..report.pages.comparison import write_comparison

    if not study.is_dir():
        raise ConfigError(f"there is no study folder {study}. Give the --out folder of an earlier `repnoise run`.")
    (write_comparison if (study / SWEEP).is_file() else write_report)(study)
    result = outcome(study)
    output(result, as_json, lambda: outcome_text(result))


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
    hide_loading_bars()
    from ..models import check_fits, load_model, load_tokenizer, save_model

    model, tokenizer = load_model(source, dtype=dtype), load_tokenizer(source)
    check_fits(model, tokenizer)
    output({"model": str(save_model(model, tokenizer, to))}, as_json)
