"""summary.json -> one self-contained HTML page and its figures: no script, no request, nothing from samples/.

The page is written for two readers: the head of a safety team, who reads the verdict and one chart, and the
engineer, who needs every cell with its interval, the recipe and the versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from repnoise.report.manifests import Manifest
from repnoise.report.pages import plots
from repnoise.report.reading import BASE, DEFENDED, Model, load
from repnoise.report.records import Estimate, Kept, Point, Section, StepsToBreak, Summary
from repnoise.report.summary import build_summary
from repnoise.store.files import read_jsonl, write_text
from repnoise.store.provenance import canonical_hash

ROLES = {
    "undefended": "undefended",
    "defended": "defended",
    "ignorant": "ignorant control",
    "random": "random control",
}
NOT_TERMS = {"step", "epoch", "learning_rate", "tokens", "seconds", "time"}
STATUS = {  # status: its CSS class, its sign, its words
    "established": ("good", "✓", "established"),
    "broken": ("bad", "✗", "broken"),
    "not established": ("open", "?", "not established"),
}
CLAIMS = {
    "resistance": "Resistance",
    "generalisation": "Generalisation to unseen harm",
    "stability": "Stability",
    "over_refusal": "Over-refusal",
    "trainability": "Trainability",
}
SAYS = {"broken": "broken", "holds": "holds", "open": "cannot tell", None: "no head start"}
LOSS_COLUMNS = {
    "harmful_loss": "harmful loss",
    "harmless_loss": "harmless loss",
    "refusal_rate": "refusals",
    "degenerate_rate": "degenerate",
}


def render(study_dir: str | Path, summary: Summary | None = None) -> str:
    """The page as text. It reads recipes, manifests and train.jsonl beside the summary, never samples."""
    study = Path(study_dir)
    return _page(study, summary or build_summary(study))[0]


def write_page(study_dir: str | Path, summary: Summary) -> Path:
    """Write figures/*.svg and report.html, each atomically; figures that no longer belong are removed."""
    study = Path(study_dir)
    page, figures = _page(study, summary)
    folder = study / "figures"
    for name, svg in figures.items():
        write_text(folder / f"{name}.svg", plots.standalone(svg))
    for old in folder.glob("*.svg") if folder.is_dir() else ():
        if old.stem not in figures:
            old.unlink()
    return write_text(study / "report.html", page)


def _page(study: Path, summary: Summary) -> tuple[str, dict[str, str]]:
    loaded = load(study, rows=False)
    models = {model.name: model for model in loaded.defences}
    figures: dict[str, str] = {}
    defences = [_defence(name, part, models.get(name), figures) for name, part in summary.defences.items()]
    template = environment().get_template("page.html.j2")
    page = template.render(
        summary=summary,
        defences=defences,
        roles=ROLES,
        claims=CLAIMS,
        status=STATUS,
        loss_columns=LOSS_COLUMNS,
        says=SAYS,
        plot_style=Markup(plots.STYLE),
        places=_places(loaded.manifests),
        stages=[(m.stage, m.name, m.seconds) for m in loaded.manifests],
    )
    return page, figures


def environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        detail=_detail,
        mean=_mean,
        num=_num,
        est=_est,
        words=lambda text: str(text).replace("_", " "),
        p=_p,
        percent=lambda share: "–" if share is None else f"{share:.0%}",
        signed=_signed,
        steps=_steps,
    )
    return found


def _num(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _est(estimate: Estimate | None) -> str:
    return "–" if estimate is None else str(estimate)


def _detail(text: str) -> str:
    """A sentence's first letter in capitals."""
    return text[:1].upper() + text[1:]


def _mean(estimate: Estimate | None) -> str:
    return "–" if estimate is None else _num(estimate.mean)


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _signed(difference: Estimate | None) -> str:
    if difference is None:
        return "–"
    if difference.lo is None or difference.hi is None:
        return f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f} [{difference.lo:+.3f}, {difference.hi:+.3f}]"


def _steps(broken: StepsToBreak | None, who: str) -> str:
    """ "25", or "> 100" where the model was not broken within the attack."""
    if broken is None:
        return "–"
    step = getattr(broken, who)
    return f"> {broken.censored_at}" if step is None else str(step)


def _defence(name: str, part: Section, model: Model | None, figures: dict[str, str]) -> dict[str, Any]:
    """What the template shows of one defence; its charts are added to `figures`."""
    prefix = canonical_hash(name)[:4] + "-"
    cells = {cell.id: cell for cell in part.resistance.head_start_by_cell}

    def drawn(kind: str, svg: str) -> Markup:
        figures[f"{kind}-{prefix}{len(figures):02d}"] = svg
        return Markup(svg)

    panels: dict[str, list[dict[str, Any]]] = {}
    for curve in part.resistance.curves:
        title = f"{curve.harm} recovered along the attack, {curve.label}"
        svg = plots.chart(curve.lines, title=title, y_range=(0.0, 1.0) if curve.bounded else None)
        panel = {"title": curve.label, "svg": drawn("attack", svg), "entry": cells.get(curve.id)}
        panels.setdefault(curve.harm, []).append(panel)
    training = []
    for term, line in _training(model).items():
        title = f"{term} during the defence"
        svg = plots.chart({term: plots.thin(line)}, title=title, x_label="defence steps", line_class="term")
        training.append({"title": term, "svg": drawn("defence", svg)})
    learning = []
    if part.trainability and part.trainability.curve.before and part.trainability.curve.after:
        curves = part.trainability.curve
        title = "score on the harmless task while it is learned"
        lines = {BASE: curves.before, DEFENDED: curves.after}
        svg = plots.chart(lines, title=title, x_label="training steps", y_range=(0.0, 1.0))
        learning.append({"title": _detail(title), "svg": drawn("learning", svg)})
    recipe = model.folder / "recipe.yaml" if model else None
    return {
        "name": name,
        "part": part,
        "panels": panels,
        "training": training,
        "learning": learning,
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe and recipe.exists() else None,
        "roles": [r for r in ROLES if any(r in c.lines for c in part.resistance.curves)],
        "kept": _kept(part),
        "measures": _measures(part),
    }


def _kept(part: Section) -> list[tuple[str, Kept | None]]:
    """The measures that claims are about."""
    return [(key, getattr(part, key)) for key in ("stability", "over_refusal", "trainability")]


def _measures(part: Section) -> dict[str, Kept]:
    """Every other metric before and after the defence: of use, of trainability, and what no claim is about."""
    found = {**(part.stability.measures if part.stability else {})}
    found |= part.trainability.measures if part.trainability else {}
    found |= part.also_measured
    shown = {kept.metric for _, kept in _kept(part) if kept is not None}
    return {metric: kept for metric, kept in found.items() if metric not in shown}


def _training(model: Model | None) -> dict[str, list[Point]]:
    """Every number that train.jsonl logs per step except the clock: the loss first, then its terms."""
    path = model.folder / "train.jsonl" if model else None
    if path is None or not path.exists():
        return {}
    lines: dict[str, list[Point]] = {}
    for index, record in enumerate(read_jsonl(path, torn_end=True), 1):
        for key, value in record.items():
            if key not in NOT_TERMS and isinstance(value, int | float) and not isinstance(value, bool):
                lines.setdefault(key, []).append(Point(float(record.get("step", index)), float(value)))
    return dict(sorted(lines.items(), key=lambda item: (item[0] != "loss", item[0] == "grad_norm")))


def _places(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """The distinct environments that the runs of this study were made in, each with the number of runs."""
    places: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        place = {key: getattr(manifest, key) for key in ("versions", "python", "platform", "git")}
        places.setdefault(canonical_hash(place), {**place, "runs": 0})["runs"] += 1
    return sorted(places.values(), key=lambda place: -place["runs"])
