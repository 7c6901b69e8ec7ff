"""Measure a model: every evaluation's rows into its run folder, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import RunError
from ..store.run import Run
from .changes import differences, since_last, summed_up
from .study import Study
from .target import Target


def evaluate(study: Study, target: Target, stage: str) -> None:
    """Measure a model before any attack; what was measured with the same settings is kept."""
    run, seed = target.run, study.recipe.seed
    if run.is_done(target.hash) and not study.lacking(run):
        return
    with run.held():
        lacking = study.lacking(run)
        if run.is_done(target.hash):
            if lacking:  # else another process was faster
                study.say(f"evaluating {run.path.name}: {', '.join(_why(study, run, label) for label in lacking)}")
                measure(study, run, study.load(target), lacking, seed=seed)
            return
        changed = since_last(run, target.depends)
        if changed:
            study.say(f"{run.path.name}: {summed_up(changed)}; what was there is not reused")
        with run.start(
            stage=stage,
            name=run.path.name,
            hash=target.hash,
            parent=study.base().hash if stage == "defend" else None,
            seeds=[seed],
            arguments={"given": str(target.source)} if stage == "defend" else None,
            data=study.data.record,
            recipe=study.written_out,
            depends=target.depends,
            changed=changed,
        ):
            study.say(f"evaluating {run.path.name}")
            # rows of this hash, kept from a run that was cut off, are not made again
            measure(study, run, study.load(target), study.lacking(run), seed=seed)
            run.finish()


def _why(study: Study, run: Run, label: str) -> str:
    """The label, with what has changed where there are rows of it already."""
    before = run.settings_of(label)
    changed = differences(before, study.measured(label)) if isinstance(before, dict) else []
    return f"{label} again ({summed_up(changed)})" if changed else label


def measure(
    study: Study,
    run: Run,
    model: Any,
    labels: Sequence[str],
    *,
    seed: int,
    harm: str | None = None,
    along: dict[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Write the rows of these evaluations; `along`: rows of theirs that were made on the way.

    Raises:
        RunError: the weights hold NaN or infinity.
    """
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise RunError(
            f"the weights in {run.path.name} hold NaN or infinity: nothing to measure. If they were"
            " trained here, lower the learning rate or set max_grad_norm; else get the model again."
        )
    for label in labels:
        found = study.evaluations[label].measure(model, study.tokenizer, study.data, seed=seed, harm=harm)
        if found.samples:
            run.write_samples(label, found.samples)
        run.write_rows(label, [*(along or {}).get(label, []), *found.rows], settings=study.measured(label))
