"""Verbs beside the study: recipes, judges, sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .common import AsJson, Overrides, RecipeArgument, hide_loading_bars, output, say

recipes_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
judges_app = typer.Typer(help="List judges, train one of your own.", no_args_is_help=True)
sandbox_app = typer.Typer(help="The bundled miniature with ground truth.", no_args_is_help=True)


@recipes_app.command("ls")
def recipes_ls(as_json: AsJson = False) -> None:
    """What exists.

    Example: repnoise recipes ls
    """
    from ..recipes.reading import raw_recipe, recipe_names

    found = {name: str(raw_recipe(name).get("about", "")).strip() for name in recipe_names()}
    output(found, as_json)


@recipes_app.command("show")
def recipes_show(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a recipe with every default written out.

    Example: repnoise recipes show sandbox defence.alpha=2
    """
    import yaml

    from ..study.resolve import resolve, written_out

    resolved = written_out(resolve(recipe, overrides or []))
    output(resolved, as_json, lambda: yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))


@recipes_app.command("cp")
def recipes_cp(
    recipe: RecipeArgument,
    to: Annotated[Path, typer.Argument(help="A .yaml file that does not exist yet.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Own a copy.

    Example: repnoise recipes cp sandbox mine.yaml
    """
    from ..recipes.reading import recipe_text
    from ..store.files import write_text

    if to.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"the copy must be called something.yaml, got {to}.")
    if to.exists():
        raise ConfigError(f"{to} exists already. Choose another name or delete it.")
    write_text(to, recipe_text(recipe))
    output({"recipe": str(to)}, as_json)


@recipes_app.command("validate")
def recipes_validate(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe: every error at once.

    Example: repnoise recipes validate mine.yaml
    """
    from ..study.pipeline import resolve

    resolve(recipe, overrides or [])
    output({"recipe": recipe, "valid": True}, as_json, lambda: f"{recipe} is valid")


@judges_app.command("ls")
def judges_ls(as_json: AsJson = False) -> None:
    """What exists.

    Example: repnoise judges ls
    """
    from ..judges import JUDGES

    found = {name: (JUDGES.get(name).__doc__ or "").strip().split("\n")[0] for name in JUDGES.names()}
    output(found, as_json)


@judges_app.command("train")
def judges_train(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Labelled rows: beavertails:PATH, decoding_trust:PATH, or a file with prompt, answer, harmful.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the judge.", show_default=False)],
    held_out: Annotated[float, typer.Option(help="Share of the prompts that it is measured on.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of the division.")] = 0,
    template: Annotated[str, typer.Option(help="What it reads: {answer}, and {prompt} if wanted.")] = "{answer}",
    spare: Annotated[
        str | None,
        typer.Option(
            help="A recipe: rows with prompts that it attacks or tests with are left out, so that the judge may judge.",
            show_default=False,
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="A dotted.key=value of the recipe to spare; once for each.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a linear judge on labelled rows and print how well it does on prompts held out.

    Examples:

      repnoise judges train my-labels.jsonl --out my-judge

      repnoise judges train my-labels.jsonl --out my-judge --spare mine.yaml --override data.seed=1
    """
    from ..data.labelled import labelled_rows
    from ..judges.linear import train_linear

    rows = [row for source in sources for row in labelled_rows(source)]
    if override and spare is None:
        raise ConfigError("--override changes the recipe of --spare, which is missing. Name the recipe, or drop it.")
    if spare is not None:
        from ..judges import prompt_mark
        from ..study.audit import judged
        from ..study.load import load_data
        from ..study.resolve import resolve

        held = {mark for marks in judged(load_data(resolve(spare, override or []))).values() for mark in marks}
        every = len(rows)
        rows = [row for row in rows if prompt_mark(row["prompt"]) not in held]
        say(f"{every - len(rows)} of {every} rows have prompts that {spare} attacks or tests with, and are left out")
    output(train_linear(rows, out, held_out=held_out, seed=seed, template=template, source=", ".join(sources)), as_json)


@sandbox_app.command("build")
def sandbox_build(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the two models.")] = Path("sandbox-weights"),
    seed: Annotated[int, typer.Option(help="Seed of initial weights and order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make the bundled weights again from nothing: pre-train, align, once with the harm and once without.

    Example: repnoise sandbox build --out my-sandbox
    """
    from ..sandbox.build import KINDS, build

    hide_loading_bars()
    found: dict[str, Any] = {}
    for kind in KINDS:
        if (out / kind / "config.json").exists():
            say(f"{out / kind}: done before, kept")
        else:
            say(f"{kind}: pre-training and alignment, some minutes")
            build(kind, out / kind, seed=seed)
        found[kind] = str(out / kind)
    output(found, as_json)
