"""Claims by the losses alone: the harm that is named is the one that broke."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_study import attack, row, write_model

from repnoise.report import build_summary


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("repnoise.store.files.os.fsync", lambda descriptor: None)


def study(path: Path, defended: dict[str, float]) -> Path:
    attacks = [attack(harm=harm) for harm in defended]
    for folder, stage, losses in (("base", "base", dict.fromkeys(defended, 1.0)), ("d", "defend", defended)):
        write_model(
            path / folder,
            lambda settings, seed: None,
            stage=stage,
            attacks=attacks,
            data={"harms": dict.fromkeys(defended, "main")},
            extra=lambda settings, seed, losses=losses: [  # type: ignore[misc]
                row(f"{settings['harm']}_loss", losses[settings["harm"]] + seed / 1000)
            ],
        )
    return path


@pytest.mark.parametrize("broken", ["alpha", "beta"])
def test_the_harm_that_broke_is_named(tmp_path: Path, broken: str):
    losses = {"alpha": 3.0, "beta": 3.0, broken: 1.0}
    found = build_summary(study(tmp_path, losses)).as_json(several=True)
    claim = found["defences"]["d"]["verdict"]["claims"][0]
    assert (claim["claim"], claim["status"], claim["harm"]) == ("resistance", "broken", broken)
    assert claim["cell"].startswith(f"{broken}: ")


def test_a_loss_establishes_nothing(tmp_path: Path):
    found = build_summary(study(tmp_path, {"alpha": 9.0, "beta": 9.0})).as_json(several=True)
    assert found["defences"]["d"]["verdict"]["claims"][0]["status"] == "not established"
