"""Rows -> summary.json, table.csv, figures and one HTML page. Needs no torch, no model and no samples."""

from __future__ import annotations

from pathlib import Path

from repnoise.report.pages.html import render, write_page
from repnoise.report.summary import summarise, table_csv
from repnoise.store.files import write_json, write_text

__all__ = ["render", "summarise", "write_report"]


def write_report(study_dir: str | Path) -> Path:
    """Write summary.json, table.csv, figures/ and report.html, each atomically; give the path of the page."""
    study = Path(study_dir)
    summary = summarise(study)
    write_json(study / "summary.json", summary)
    write_text(study / "table.csv", table_csv(summary))
    return write_page(study, summary)
