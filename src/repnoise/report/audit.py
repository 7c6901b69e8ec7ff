"""What the manifests say of the data: overlaps between defence, attack, test and judges, and rows that were cut."""

from __future__ import annotations

from repnoise.report.reading import Model, Study
from repnoise.report.records import DataAudit


def audit(study: Study, model: Model) -> DataAudit:
    known = [one.manifest.data for one in (model, study.base, *study.controls.values()) if one is not None]
    audited = [data.overlaps for data in known if data.overlaps is not None]
    overlaps = list(dict.fromkeys(words for each in audited for words in each))
    return DataAudit(
        disjoint=None if not audited else not overlaps,
        overlaps=overlaps,
        harmless_overlaps=list(dict.fromkeys(words for data in known for words in data.harmless_overlaps or ())),
        given=model.manifest.given,
        template=next((data.template for data in known if data.template), None),
        cut=list(dict.fromkeys(cut for data in known for cut in data.cut)),
    )
