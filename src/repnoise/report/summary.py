"""Rows of a study -> summary.json: head starts, what was kept, and a verdict.

What was not measured is None with its reason in `missing`, never 0.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import yaml
from pydantic import ValidationError

from repnoise.bars import DEFAULT, Bars
from repnoise.errors import RunError
from repnoise.report import kept
from repnoise.report.audit import audit
from repnoise.report.cells import Cells
from repnoise.report.generalisation import generalisation
from repnoise.report.judged import judged
from repnoise.report.losses import losses
from repnoise.report.reading import Model, Study, load
from repnoise.report.records import Evidence, Section, Summary
from repnoise.report.resistance import resistance
from repnoise.report.use import utility_of
from repnoise.report.verdict.verdict import verdict
from repnoise.store.run import SCHEMA

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with these a spreadsheet begins a formula


def build_summary(study_dir: str | Path) -> Summary:
    """The whole of summary.json for a study folder.

    Raises:
        RunError: there is no defence, or nothing was measured.
    """
    study = load(Path(study_dir))
    if not study.defences or not any(m.rows or any(a.rows for a in m.attacks) for m in study.models):
        found = "; ".join(study.problems) or ", ".join(m.folder.name for m in study.models) or "no run at all"
        what = "has no finished defence" if not study.defences else "holds no rows"
        raise RunError(
            f"{study.path} {what} ({found}). A report needs a defence and rows of an evaluation: "
            "run `repnoise run` or `repnoise defend` and `repnoise evaluate` first."
        )
    seconds: dict[str, float] = {}
    for manifest in study.manifests:
        seconds[manifest.stage] = round(seconds.get(manifest.stage, 0.0) + manifest.seconds, 3)
    return Summary(
        schema=SCHEMA,
        study=study.path.resolve().name,
        defence=study.defences[0].name,
        seconds=seconds,
        problems=study.problems,
        defences={model.name: section_of(study, model) for model in study.defences},
    )


def section_of(study: Study, model: Model) -> Section:
    """Everything about one defence."""
    missing: dict[str, str] = {}
    bars = bars_of(model)
    utility = utility_of(study, model, bars)
    roles = study.roles(model)
    before = kept.before_attack(study, model, utility, roles, bars)
    cells = Cells(study, model, bars, utility, roles, before.collapsed)
    evidence = Evidence(
        resistance=resistance(cells, missing),
        stability=kept.stability(study.base, model, bars, missing),
        trainability=kept.trainability(study.base, model, bars, missing),
        over_refusal=kept.over_refusal(study.base, model, bars, missing),
        generalisation=generalisation(cells, missing),
        losses=losses(cells, missing),
        before=before,
        also_measured=kept.also_measured(study.base, model, list(roles), bars),
        data=audit(study, model),
        judges=judged(cells),
        harms=roles,
        attacked=list(dict.fromkeys(a.metric for a in model.attacks)),
        missing=missing,
        bars=bars.model_dump(),
    )
    return Section(**vars(evidence), verdict=verdict(evidence, model.attacks, bars))


def bars_of(model: Model) -> Bars:
    """The bars of the defence's recipe, which may be tighter than the default ones.

    Raises:
        RunError: recipe.yaml cannot be read, or holds a bar that is looser or unknown.
    """
    recipe = model.folder / "recipe.yaml"
    if not recipe.exists():
        return DEFAULT
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        return Bars.model_validate((content.get("bars") if isinstance(content, dict) else None) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"Cannot read {recipe}: {' '.join(str(error).split())}. Run the defence again.") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(
            f"bars.{'.'.join(map(str, first['loc']))} in {recipe}: {first['msg']} (got {first['input']!r})."
            " A bar may be tightened, never loosened; docs/verdict.md lists them."
        ) from error


def table_csv(summary: Summary) -> str:
    """table.csv: one row per attack, seed and defence."""
    cells = [(name, cell) for name, part in summary.defences.items() for cell in part.resistance.cells]
    settings = sorted({key for _, cell in cells for key in cell.attack} - {"harm"})
    numbers = ("undefended", "defended", "floor", "floor_control", "head_start", "void", "degenerate", "judge", "n")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(inert(["defence", "harm", "seed", *(f"attack.{key}" for key in settings), *numbers]))
    for name, cell in cells:
        values = [*(cell.attack.get(key) for key in settings), *(getattr(cell, key) for key in numbers)]
        writer.writerow(inert([name, cell.harm, cell.seed, *values]))
    return file.getvalue()


def inert(values: Iterable[object]) -> list[object]:
    """Cells of which no spreadsheet takes a text for a formula: those texts get an apostrophe. Numbers stay."""

    def plain(value: object) -> object:
        text = value if value is None or isinstance(value, int | float) else str(value)
        return f"'{text}" if isinstance(text, str) and text.startswith(FORMULA) else text

    return [plain(value) for value in values]
