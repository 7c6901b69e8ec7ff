"""A synthetic study on disk with known numbers, for the tests of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repnoise.runs import Run, append_jsonl, canonical_hash

MARKER = "SAMPLE-TEXT-THAT-NO-REPORT-MAY-SHOW"
STEPS = 100
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


GRID = (attack(1e-3), attack(3e-4), attack(1e-3, 8))


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
) -> Run:
    """One model with `before` rows and every attack x seed; `harm` gives the final value (None: no row)."""
    run = Run(folder)
    hash = canonical_hash([folder.name, stage])
    rows = list(before) or [row("stability", 1.0), row("over_refusal", 0.02)]
    with run.start(stage=stage, name=name or folder.name, hash=hash, seeds=[0], recipe=recipe):
        write_rows(run, rows)
        run.write_samples("sandbox", [{"prompt": MARKER, "answer": MARKER}])
        if stage == "defend":
            for step in range(1, 41):
                terms = {"stability": 1.0, "ascent": -step / 40, "noise": 0.1, "grad_norm": 1.0}
                append_jsonl(folder / "train.jsonl", {"step": step, "loss": 2 - step / 40, **terms})
        run.finish()
    for settings in attacks:
        for seed in seeds:
            arguments = {"attack": dict(settings), "seed": seed}
            cell = Run(folder / "attacks" / f"sft-{canonical_hash([hash, arguments])}")
            metrics = settings.get("harm") or "harmful_loss"
            value = harm(settings, seed)
            rows = extra(settings, seed)
            if value is not None:
                rows += [row(metrics, value), row("stability", 0.99)]
                rows += [row(metrics, value * step / STEPS, step=step) for step in (10, 25, 50)]
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


def write_study(path: Path, defended: Harm = lambda attack, seed: 0.14, **more: Any) -> Path:
    """Undefended 0.9 (+0.01 per seed), ignorant floor 0.05, random 0.0, defended as given."""
    write_model(path / "base", lambda attack, seed: 0.9 + seed / 100)
    write_model(path / "control-ignorant", lambda attack, seed: 0.05, stage="control")
    write_model(path / "control-random", lambda attack, seed: 0.0, stage="control")
    write_model(path / "repnoise-0123456789", defended, stage="defend", name="repnoise", **more)
    return path
