"""What the manifests say of the data: overlaps between defence, attack, test and judges, and rows that were cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repnoise.report.reading import Model, Study
from repnoise.report.records import Cut, DataAudit


def audit(study: Study, model: Model) -> DataAudit:
    known = [model.manifest, *([study.base.manifest] if study.base else [])]
    known += [control.manifest for control in study.controls.values()]
    records = [m["data"] for m in known if isinstance(m.get("data"), Mapping)]
    audits = [r["audit"] for r in records if isinstance(r.get("audit"), Mapping)]
    harmless = [r["harmless_audit"] for r in records if isinstance(r.get("harmless_audit"), Mapping)]
    overlaps = _overlaps(audits)
    cut = {name: counts for r in records for name, counts in (r.get("truncated") or {}).items()}
    return DataAudit(
        disjoint=None if not audits else not overlaps,
        overlaps=overlaps,
        harmless_overlaps=_overlaps(harmless),
        given=bool((model.manifest.get("arguments") or {}).get("given")),
        template=next((str(r["template"]) for r in records if r.get("template")), None),
        cut=[
            Cut(name, int(found["rows"]), int(found["answers_cut"]), int(found["prompts_cut"]))
            for name, found in cut.items()
        ],
    )


def _overlaps(audits: Sequence[Mapping[str, Any]]) -> list[str]:
    words = [
        f"{' and '.join(map(str, each['sets']))} share {each['prompts']} prompts"
        for audit in audits
        for each in audit.get("overlaps") or []
    ]
    return list(dict.fromkeys(words))
