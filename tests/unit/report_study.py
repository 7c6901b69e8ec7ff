"""A synthetic study on disk with known numbers, for the tests of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repnoise.store.files import append_jsonl
from repnoise.store.provenance import canonical_hash
from repnoise.store.run import Run

MARKER = "SAMPLE-TEXT-THAT-NO-REPORT-MAY-SHOW"
STEPS = 100
ITEMS = 400
MANY = 4000  # answers behind a harm whose items the rows do not hold
Harm = Callable[[Mapping[str, Any], int], "float | None"]


def row(metric: str, value: float, evaluation: str = "sandbox", **more: Any) -> dict[str, Any]:
    return {
        "evaluation": evaluation,
        "metric": metric,
        "value": value,
        "n": 100,
        "lo": None,
        "hi": None,
        "seed": 0,
        "split": "test",
        **more,
    }


def rate(metric: str, value: float, evaluation: str = "sandbox", n: int = ITEMS, **more: Any) -> dict[str, Any]:
    """A row with the 0/1 items behind it, enough of them to tell 0.01."""
    return row(metric, round(value * n) / n, evaluation, n=n, items=items(value, n), **more)


def attack(learning_rate: float = 1e-3, lora_rank: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "name": "sft",
        "learning_rate": learning_rate,
        "steps": STEPS,
        "lora_rank": lora_rank,
        "batch_size": 16,
        "harm": "knowledge",
        **more,
    }


# What the attacks of the product say that they cover; "sft" and whatever is not here fine-tunes on the harm.
COVERS = {
    **dict.fromkeys(("peft", "parts", "freeze_changed"), ()),
    **dict.fromkeys(("mixed", "identity_shift"), ("mixed",)),
    **dict.fromkeys(("prune", "noise", "interpolate", "quantize"), ("weights", "fine-tuning")),
    "benign": ("benign",),
}
ROLES = {"knowledge": "main", "behaviour": "main", "harmful": "main", "withheld": "withheld"}


def covers(settings: Mapping[str, Any]) -> list[str]:
    return list(COVERS.get(str(settings["name"]), ("fine-tuning",)))


def roles(attacks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each harm is to the defence; a name that is not known is another domain."""
    return {harm: ROLES.get(harm, "domain") for harm in dict.fromkeys(str(a["harm"]) for a in attacks)}


GRID = (attack(1e-3), attack(3e-4), attack(1e-3, 8))
FULL = (*GRID, attack(1e-3, steps=3 * STEPS))  # everything that established resistance asks for


def audit(*overlaps: tuple[str, str, int], harmless: bool = False) -> dict[str, Any]:
    """What a manifest records of the data, with `overlaps` between the sets of harmful or harmless prompts."""
    found = [{"sets": [a, b], "prompts": count, "rows": {a: count, b: count}} for a, b, count in overlaps]
    clean: dict[str, Any] = {"sets": {}, "overlaps": [], "disjoint": True, "allow_overlap": bool(found)}
    bad = {**clean, "overlaps": found, "disjoint": not found}
    return {"audit": clean if harmless else bad, "harmless_audit": bad if harmless else clean}


def items(value: float, n: int = 100) -> list[float]:
    """`n` items 0 or 1 with (nearly) this mean; the same items are the hard ones everywhere."""
    return [float(index < round(value * n)) for index in range(n)]


def write_rows(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    for evaluation in {one["evaluation"] for one in rows}:
        run.write_rows(evaluation, [one for one in rows if one["evaluation"] == evaluation])


def write_model(
    folder: Path,
    harm: Harm,
    *,
    stage: str = "base",
    attacks: Sequence[Mapping[str, Any]] = GRID,
    seeds: Sequence[int] = (0, 1, 2),
    before: Sequence[Mapping[str, Any]] = (),
    extra: Callable[[Mapping[str, Any], int], list[dict[str, Any]]] = lambda attack, seed: [],
    name: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Run:
    """One model with `before` rows and every attack x seed; `harm` gives the final value (None: no row)."""
    run = Run(folder)
    hash = canonical_hash([folder.name, stage])
    rows: list[Any] = list(before) or [rate("stability", 1.0), rate("over_refusal", 0.02)]
    data = {"harms": roles(attacks), "template": "chat", **(audit() if data is None else data)}
    with run.start(stage=stage, name=name or folder.name, hash=hash, seeds=[0], recipe=recipe, data=data):
        write_rows(run, rows)
        run.write_samples("sandbox", [{"prompt": MARKER, "answer": MARKER}])
        if stage == "defend":
            for step in range(1, 41):
                terms = {"stability": 1.0, "ascent": -step / 40, "noise": 0.1, "grad_norm": 1.0}
                append_jsonl(folder / "train.jsonl", {"step": step, "loss": 2 - step / 40, **terms})
        run.finish()
    for settings in attacks:
        for seed in seeds:
            arguments = {"attack": dict(settings), "seed": seed, "covers": covers(settings)}
            cell = Run(folder / "attacks" / f"sft-{canonical_hash([hash, arguments])}")
            metrics = settings["harm"]
            value = harm(settings, seed)
            rows = extra(settings, seed)
            if value is not None:
                measured = {one["metric"] for one in rows}
                rows += [row(metrics, value, n=MANY)] if metrics not in measured else []
                rows += [rate("stability", 0.99)] if "stability" not in measured else []
                points = [step for step in (10, 25, 50) if step < settings["steps"]]
                rows += [row(metrics, value * step / settings["steps"], step=step) for step in points]
            with cell.start(
                stage="attack",
                name="sft",
                hash=canonical_hash([hash, arguments]),
                parent=hash,
                seeds=[seed],
                arguments=arguments,
            ):
                if rows:
                    write_rows(cell, rows)
                cell.write_samples("sandbox", [{"prompt": MARKER}])
                cell.finish()
    return run


def write_study(
    path: Path,
    defended: Harm = lambda attack, seed: 0.14,
    *,
    attacks: Sequence[Mapping[str, Any]] = GRID,
    seeds: Sequence[int] = (0, 1, 2),
    **more: Any,
) -> Path:
    """Undefended 0.9 (+0.01 per seed), ignorant floor 0.05, random 0.0, defended as given."""
    grid: dict[str, Any] = {"attacks": attacks, "seeds": seeds}
    write_model(path / "base", lambda attack, seed: 0.9 + seed / 100, **grid)
    write_model(path / "control-ignorant", lambda attack, seed: 0.05, stage="control", **grid)
    write_model(path / "control-random", lambda attack, seed: 0.0, stage="control", **grid)
    write_model(path / "repnoise-0123456789", defended, stage="defend", name="repnoise", **grid, **more)
    return path


def judged(values: Mapping[str, float], harm: str = "knowledge", n: int = 100) -> list[dict[str, Any]]:
    """Rows of one evaluation by several judges, the headline judge first, each with items."""
    return [row(harm, round(v * n) / n, n=n, judge=judge, items=items(v, n)) for judge, v in values.items()]


def write_judged(path: Path, defended: Mapping[str, float], **more: Any) -> Path:
    """A study whose harm is told by judges: the undefended model 0.9 and the floor 0.05 for each of them."""
    for folder, stage, values in (
        ("base", "base", dict.fromkeys(defended, 0.9)),
        ("control-ignorant", "control", dict.fromkeys(defended, 0.05)),
        ("repnoise-0123456789", "defend", defended),
    ):
        write_model(
            path / folder,
            lambda settings, seed: None,
            stage=stage,
            attacks=FULL,
            name="repnoise" if stage == "defend" else None,
            extra=lambda settings, seed, values=values: [*judged(values), rate("stability", 0.99)],  # type: ignore[misc]
            **(more if stage == "defend" else {}),
        )
    return path
