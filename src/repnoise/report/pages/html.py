"""summary.json -> one self-contained HTML page and its figures: no script, no request, nothing from samples/.

The page is written for two readers: the head of a safety team, who reads the verdict and one chart, and the
engineer, who needs every cell with its interval, the recipe and the versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from repnoise.report.pages import plots
from repnoise.report.reading import Model, load
from repnoise.report.resistance import bounded
from repnoise.report.verdict.claims import number
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
LOSS_COLUMNS = {
    "harmful_loss": "harmful loss",
    "harmless_loss": "harmless loss",
    "refusal_rate": "refusals",
    "degenerate_rate": "degenerate",
}


def render(study_dir: str | Path, summary: Mapping[str, Any]) -> str:
    """The page as text. It reads recipes, manifests and train.jsonl beside the summary, never samples."""
    return _page(Path(study_dir), summary)[0]


def write_page(study_dir: str | Path, summary: Mapping[str, Any]) -> Path:
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


def _page(study: Path, summary: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    loaded = load(study, rows=False)
    parts = summary.get("defences") or {summary["defence"]: summary}
    models = {model.name: model for model in loaded.defences}
    figures: dict[str, str] = {}
    defences = [_defence(name, part, models.get(name), figures) for name, part in parts.items()]
    template = _environment().get_template("page.html.j2")
    page = template.render(
        summary=summary,
        defences=defences,
        roles=ROLES,
        claims=CLAIMS,
        status=STATUS,
        loss_columns=LOSS_COLUMNS,
        plot_style=Markup(plots.STYLE),
        places=_places(loaded.manifests),
        stages=[(m.get("stage"), m.get("name"), m.get("seconds")) for m in loaded.manifests],
    )
    return page, figures


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        detail=_detail,
        mean=_mean,
        num=_num,
        est=_est,
        words=lambda text: str(text).replace("_", " "),
        short=_short,
        p=_p,
        percent=lambda share: "–" if share is None else f"{share:.0%}",
        signed=_signed,
        steps=_steps,
    )
    return environment


def _num(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _est(estimate: Mapping[str, Any] | None) -> str:
    return "–" if estimate is None else number(estimate)


def _detail(text: str, status: str) -> str:
    """A claim without its status, which the badge beside it says."""
    rest = text.removeprefix(status).lstrip(": ")
    return rest[:1].upper() + rest[1:]


def _mean(estimate: Mapping[str, Any] | None) -> str:
    return "–" if estimate is None else _num(estimate["mean"])


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _signed(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    if difference["lo"] is None:
        return f"{difference['mean']:+.3f}"
    return f"{difference['mean']:+.3f} [{difference['lo']:+.3f}, {difference['hi']:+.3f}]"


def _steps(broken: Mapping[str, Any] | None, who: str) -> str:
    """ "25", or "> 100" where the model was not broken within the attack."""
    if broken is None:
        return "–"
    return f"> {broken['censored_at']}" if broken[who] is None else str(broken[who])


def _short(label: str, harm: str | None = None) -> str:
    return label.removeprefix(f"{harm}: ") if harm else label


def _defence(name: str, part: Mapping[str, Any], model: Model | None, figures: dict[str, str]) -> dict[str, Any]:
    """What the template shows of one defence; its charts are added to `figures`."""
    prefix = canonical_hash(name)[:4] + "-"
    panels: dict[str, list[dict[str, Any]]] = {}
    for curve in part["resistance"]["curves"]:
        harm = curve["harm"]
        title = _short(curve["label"], harm)
        svg = plots.chart(
            curve["lines"],
            title=f"{harm} recovered along the attack, {title}",
            y_range=(0.0, 1.0) if bounded(harm) else None,
        )
        figures[f"attack-{prefix}{len(figures):02d}"] = svg
        entry = next((e for e in part["resistance"]["head_start_by_cell"] if e["label"] == curve["label"]), None)
        panels.setdefault(harm, []).append({"title": title, "svg": Markup(svg), "entry": entry})
    training = []
    for term, line in _training(model).items():
        svg = plots.chart(
            {term: plots.thin(line)},
            title=f"{term} during the defence",
            x_label="defence steps",
            line_class="term",
        )
        figures[f"defence-{prefix}{len(figures):02d}"] = svg
        training.append({"title": term, "svg": Markup(svg)})
    learning = []
    curves = (part["trainability"] or {}).get("curve") or {"before": [], "after": []}
    if curves["before"] and curves["after"]:
        svg = plots.chart(
            {"undefended": curves["before"], "defended": curves["after"]},
            title="score on the harmless task while it is learned",
            x_label="training steps",
            y_range=(0.0, 1.0),
        )
        figures[f"learning-{prefix}{len(figures):02d}"] = svg
        learning.append({"title": "Score on the harmless task while it is learned", "svg": Markup(svg)})
    recipe = model.folder / "recipe.yaml" if model else None
    return {
        "name": name,
        "part": part,
        "panels": panels,
        "training": training,
        "learning": learning,
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe and recipe.exists() else None,
        "roles": [r for r in ROLES if any(r in c["lines"] for c in part["resistance"]["curves"])],
        "kept": [(key, part[key]) for key in ("stability", "multiple_choice", "over_refusal", "trainability")],
        "measures": _measures(part),
    }


def _measures(part: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Every other metric before and after the defence: of use, of trainability, and what no claim is about."""
    found = {
        **((part["stability"] or {}).get("measures") or {}),
        **((part["trainability"] or {}).get("measures") or {}),
    }
    found.update(part["also_measured"])
    shown = {part[key]["metric"] for key in ("stability", "multiple_choice") if part[key]}
    return {metric: kept for metric, kept in found.items() if metric not in shown}


def _training(model: Model | None) -> dict[str, list[dict[str, float]]]:
    """Every number that train.jsonl logs per step except the clock: the loss first, then its terms."""
    path = model.folder / "train.jsonl" if model else None
    if path is None or not path.exists():
        return {}
    lines: dict[str, list[dict[str, float]]] = {}
    for index, record in enumerate(read_jsonl(path, torn_end=True), 1):
        for key, value in record.items():
            if key not in NOT_TERMS and isinstance(value, int | float) and not isinstance(value, bool):
                lines.setdefault(key, []).append({"step": float(record.get("step", index)), "mean": float(value)})
    return dict(sorted(lines.items(), key=lambda item: (item[0] != "loss", item[0] == "grad_norm")))


def _places(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The distinct environments that the runs of this study were made in, each with the number of runs."""
    places: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        place = {key: manifest.get(key) for key in ("versions", "python", "platform", "git")}
        places.setdefault(canonical_hash(place), {**place, "runs": 0})["runs"] += 1
    return sorted(places.values(), key=lambda place: -place["runs"])
