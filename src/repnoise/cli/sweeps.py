"""Verbs over many settings: sweep and search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .common import AsJson, Jobs, Out, Overrides, Quiet, RecipeArgument, hide_loading_bars, output, say

app = typer.Typer()

Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="REPNOISE_STORAGE",
        show_envvar=True,
        help="URL of a database that several workers share: sqlite:///FILE, postgresql://..., mysql+pymysql://...",
        show_default=False,
    ),
]


@app.command()
def sweep(
    sweep: Annotated[
        str, typer.Argument(help="A shipped sweep (sandbox-comparison) or a .yaml file.", show_default=False)
    ],
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare defences: each is trained, all are attacked in the same way, one table says what held.

    What is done is skipped; what was interrupted goes on. Several machines that see one --out folder share the work:
    start the same command on each.

    Examples:

      repnoise sweep sandbox-comparison --jobs 2

      repnoise sweep mine.yaml defences.0.train.max_steps=100 --out studies/mine

      repnoise sweep mine.yaml --out /shared/mine
    """
    hide_loading_bars()
    from ..campaign.sweep import read_sweep, run_sweep
    from ..store.files import read_json

    read = read_sweep(sweep, overrides or [])
    folder = _folder(out, read.name)
    page = run_sweep(read, folder, jobs=jobs, say=say, quiet=quiet)
    summary = read_json(folder / "summary.json")
    result: dict[str, Any] = {
        "sweep": read.name,
        "defences": {
            row["label"]: {
                **{key: row[key] for key in ("worst", "worst_cell", "usable_worst", "resistance", "cost", "over")},
                "stability": row["stability"] and {k: row["stability"][k] for k in ("before", "after")},
            }
            for row in summary["comparison"]["rows"]
        },
        "table": str(folder / "table.csv"),
        "comparison": str(page),
    }

    def lines() -> str:
        found = [
            f"{label:24} worst head start " + ("not measured" if each["worst"] is None else f"{each['worst']:.2f}")
            for label, each in result["defences"].items()
        ]
        return "\n".join([*found, f"table: {result['table']}", f"comparison: {result['comparison']}"])

    output(result, as_json, lines)


def _folder(out: Path | None, name: str) -> Path:
    folder = out or Path("studies") / name
    above = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not above.is_dir():
        raise ConfigError(f"--out {folder}: {above} is a file. Allowed: a folder, new or of an earlier run.")
    return folder


@app.command()
def search(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="The attacker's budget.")] = 20,
    space: Annotated[
        Path | None,
        typer.Option(help="YAML with what may vary. Default: around the recipe's own attacks.", show_default=False),
    ] = None,
    fresh_seeds: Annotated[int, typer.Option(min=1, help="Seeds that measure the worst cell again.")] = 3,
    out: Out = None,
    jobs: Jobs = 1,
    storage: Storage = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search for the attack that brings most harm back, as an attacker with so many trials would.

    Every trial attacks the defended model, the undefended one and the floor control in the same way. The worst cell is
    then measured again with fresh seeds on test items that the search did not see. A stopped search goes on.

    Examples:

      repnoise search sandbox --trials 30 --out studies/demo

      repnoise search sandbox --trials 30 --space space.yaml --jobs 2

    A space: {attack: [sft], harm: knowledge, learning_rate: [1e-5, 1e-2], steps: [25, 100], batch_size: [16],
    lora_rank: [null, 8], seeds: [0]}
    """
    hide_loading_bars()
    from ..campaign.search import read_space, run_search

    resolved, read = read_space(recipe, overrides or [], space)
    folder = _folder(out, resolved.study)
    found = run_search(
        resolved,
        read,
        folder,
        trials_wanted=trials,
        fresh_seeds=fresh_seeds,
        jobs=jobs,
        storage=storage,
        say=say,
        quiet=quiet,
    )
    result = {key: value for key, value in found.items() if key not in ("trials", "space")}
    result |= {"trials": len(found["trials"]), "search": str(folder / "search" / "search.json")}

    def lines() -> str:
        new, worst = found["measured_again"], found["worst"]
        start = new["head_start"]
        interval = "" if not start or start["lo"] is None else f" [{start['lo']:.2f}, {start['hi']:.2f}]"
        settings = ", ".join(f"{k} {v}" for k, v in worst["config"].items() if v is not None and k != "seeds")
        return "\n".join(
            [
                f"worst of {result['trials']} trials: head start {worst['head_start']:.2f} ({settings})",
                f"measured again, fresh seeds: {'void' if not start else format(start['mean'], '.2f')}{interval}"
                f" on {new['items']}",
                f"search: {result['search']}",
            ]
        )

    output(result, as_json, lines)
