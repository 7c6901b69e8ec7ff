"""Rows -> summary.json, table.csv, figures and one HTML page. Needs no torch, no model and no samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repnoise.report.pages.html import render, write_page
from repnoise.report.summary import build_summary, table_csv
from repnoise.store.files import write_json, write_text

__all__ = ["build_summary", "render", "summarise", "write_report"]


def summarise(study_dir: str | Path) -> dict[str, Any]:
    """What summary.json holds for a study folder, as plain data; `build_summary` gives it as records."""
    return build_summary(study_dir).as_json()


def write_report(study_dir: str | Path) -> Path:
    """Write summary.json, table.csv, figures/ and report.html, each atomically; give the path of the page."""
    study = Path(study_dir)
    summary = build_summary(study)
    write_json(study / "summary.json", summary.as_json())
    write_text(study / "table.csv", table_csv(summary))
    return write_page(study, summary)
