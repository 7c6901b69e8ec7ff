"""The whole loop through the command line, and what it leaves on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_bitsandbytes_available
from transformers.utils import logging as transformers_logging

from repnoise.models import quantised
from repnoise.recipes.checking import check_recipe
from repnoise.recipes.reading import parse_yaml

pytestmark = pytest.mark.filterwarnings("error")


def test_one_json_object_on_stdout_and_the_rest_on_stderr(finished: Any) -> None:
    _, answer = finished
    assert answer.out.count("\n") == 1
    result = json.loads(answer.out)
    assert {"study", "worst_head_start", "stability", "verdict", "summary", "report"} <= result.keys()
    assert "defence repnoise: training" in answer.err
    assert "Loading weights" not in answer.err  # the bars of transformers
    assert "Writing model shards" not in answer.err
    assert transformers_logging.is_progress_bar_enabled()  # and they are back for library users


def test_the_files_of_a_run(finished: Any) -> None:
    study, _ = finished
    out = study.out
    for name in ("summary.json", "table.csv", "report.html"):
        assert (out / name).stat().st_size > 0, name
    targets = sorted(path.name for path in out.iterdir() if (path / "manifest.json").exists())
    assert targets[:2] == ["base", "control-random"]
    assert targets[2].startswith("repnoise-")
    assert len(targets) == 3
    for target in targets:
        assert (out / target / "rows" / "loss.jsonl").exists()
        attacks = list((out / target / "attacks").iterdir())
        assert len(attacks) == 2
        for attack in attacks:
            assert sorted(path.name for path in attack.iterdir()) == [
                "manifest.json",
                "recipe.yaml",
                "rows",
                "samples",
                "train.jsonl",
            ]
    defended = out / targets[2]
    assert sorted(p.name for p in defended.iterdir()) == [
        "attacks",
        "manifest.json",
        "model",
        "recipe.yaml",
        "rows",
        "samples",
        "train.jsonl",
    ]
    AutoModelForCausalLM.from_pretrained(defended / "model")
    assert len((defended / "train.jsonl").read_text().splitlines()) == 80
    recipe, errors = check_recipe(parse_yaml((defended / "recipe.yaml").read_text(), "recipe.yaml"))
    assert errors == []
    assert recipe is not None
    assert recipe.data.sizes == {"defence": 0.5, "attack": 0.25, "test": 0.25}


def test_the_report_shows_no_harmful_text(finished: Any) -> None:
    study, _ = finished
    for name in ("summary.json", "table.csv", "report.html"):
        assert "grumpy" not in (study.out / name).read_text(), name


def test_a_rerun_repeats_nothing(finished: Any, cli: Callable[..., Any]) -> None:
    study, _ = finished
    before = {path: path.stat().st_mtime_ns for path in study.out.rglob("manifest.json")}
    answer = cli("run", study.recipe, "--out", study.out)
    assert answer.code == 0
    assert "attacks: all done before, kept" in answer.err
    assert {path: path.stat().st_mtime_ns for path in study.out.rglob("manifest.json")} == before


def test_another_defence_in_the_same_folder_is_the_one_reported(
    finished: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """The undefended model and the controls are not attacked again."""
    study, _ = finished
    out = tmp_path / "out"
    shutil.copytree(study.out, out)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    changes = ["defence.train.max_steps=1", "defence.beta=0"]
    answer = cli("run", study.recipe, *changes, "--out", out, "--json")
    assert answer.code == 0, answer.err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    result = json.loads(answer.out)
    (new,) = {path.parent.name for path in out.glob("repnoise-*/manifest.json")} - {
        path.parent.name for path in study.out.glob("repnoise-*/manifest.json")
    }
    summary = json.loads((out / "summary.json").read_text())
    assert result["stability"] == summary["defences"][new]["stability"]


def test_attacked_weights_are_kept_on_request(finished: Any, cli: Callable[..., Any], tmp_path: Path) -> None:
    """Also when the same attacks were done before without keeping them; a half-written model is replaced."""
    study, _ = finished
    out = tmp_path / "out"
    shutil.copytree(study.out, out)
    arguments = ("attacks.0.seeds=0", "keep_attacked_weights=true", "--out", out)
    for attack in out.glob("base/attacks/*"):
        (attack / ".model.writing-x").mkdir()
        (attack / "checkpoints").mkdir()
    assert cli("attack", study.recipe, *arguments).code == 0
    models = list(out.glob("*/attacks/*/model"))
    assert len(models) == 3
    for model in models:
        AutoModelForCausalLM.from_pretrained(model)
        assert not list(model.parent.glob(".model*"))
        assert not (model.parent / "checkpoints").exists()
    before = [model.stat().st_mtime_ns for model in models]
    assert cli("attack", study.recipe, *arguments).code == 0
    assert [model.stat().st_mtime_ns for model in models] == before


def test_stages_one_by_one(finished: Any, cli: Callable[..., Any], tmp_path: Path) -> None:
    """evaluate and report on their own; --json on each."""
    study, _ = finished
    answer = cli("evaluate", study.recipe, "--out", tmp_path / "out", "--json")
    assert answer.code == 2
    assert "holds no defended model" in answer.err
    answer = cli("evaluate", study.recipe, "--no-attacks", "--out", tmp_path / "out", "--json")
    assert answer.code == 0
    rows = json.loads(answer.out)["rows"]
    assert {"base", "control-random"} == rows.keys()
    answer = cli("report", tmp_path / "out", "--json")
    assert answer.code == 1
    assert "has no finished defence" in answer.err
    answer = cli("report", study.out, "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["report"].endswith("report.html")
    answer = cli("defend", study.recipe, "--out", study.out, "--json")
    assert "done before, kept" in answer.err
    assert Path(json.loads(answer.out)["model"]).is_dir()


def test_a_model_that_was_defended_elsewhere_gets_the_same_score_sheet(
    finished: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """The untouched model itself, given as defended: nothing is trained, and it resists nothing."""
    study, _ = finished
    out = tmp_path / "out"
    shutil.copytree(study.out / "base", out / "base")
    arguments = ("evaluate", study.recipe, "--defended", study.folder / "model", "controls=[]", "--out", out, "--json")
    answer = cli(*arguments)
    assert answer.code == 0, answer.err
    (given,) = out.glob("given-*")
    assert not (given / "model").exists()
    rows = json.loads(answer.out)["rows"]
    before = {name: [row["value"] for row in found if row["metric"] == "harmful_loss"] for name, found in rows.items()}
    assert before["base"] == before[given.name]
    attacked = {path.name for path in (out / "base" / "attacks").iterdir()}
    stamps = [path.stat().st_mtime_ns for path in sorted(out.rglob("manifest.json"))]
    assert len(list(given.glob("attacks/*"))) == len(attacked)
    assert cli(*arguments).code == 0
    assert [path.stat().st_mtime_ns for path in sorted(out.rglob("manifest.json"))] == stamps


def test_a_defended_model_that_is_not_there_is_refused_before_anything_is_measured(
    finished: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    study, _ = finished
    answer = cli("evaluate", study.recipe, "--defended", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "No such file or folder" in answer.err
    assert not list(tmp_path.rglob("rows"))


def test_a_new_evaluation_is_measured_without_training_again(
    finished: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    study, _ = finished
    out, prompts = tmp_path / "out", tmp_path / "prompts.jsonl"
    shutil.copytree(study.out, out)
    prompts.write_text(json.dumps({"prompt": "count to three"}) + "\n")
    (log,) = out.glob("repnoise-*/train.jsonl")
    trained = log.stat().st_mtime_ns
    rows = {path: path.stat().st_mtime_ns for path in out.rglob("rows/loss.jsonl")}
    more = f"evaluations=[loss, {{name: over-refusal, prompts: {prompts}}}]"
    answer = cli("run", study.recipe, more, "--out", out, "--json")
    assert answer.code == 0, answer.err
    assert log.stat().st_mtime_ns == trained
    assert {path: path.stat().st_mtime_ns for path in rows} == rows
    assert len(list(out.glob("*/rows/over-refusal.jsonl"))) == 3
    assert not list(out.glob("*/attacks/*/rows/over-refusal.jsonl"))
    (recipe,) = out.glob("repnoise-*/recipe.yaml")
    assert "over-refusal" in recipe.read_text()


def test_a_tighter_bar_of_the_recipe_reaches_the_summary(
    finished: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    study, _ = finished
    shutil.copytree(study.out, tmp_path / "out")
    for bar in (0.25, 0.5):
        assert cli("run", study.recipe, f"bars.utility_loss={bar}", "--out", tmp_path / "out").code == 0
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["bars"]["utility_loss"] == bar
    answer = cli("run", study.recipe, "bars.head_start=0.5", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "bars.head_start" in answer.err


def test_a_tokenizer_without_pad_token_works_with_a_notice(
    make_study: Callable[..., Any], cli: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    study = make_study(pad=False)
    answer = cli(
        "run",
        study.recipe,
        "--out",
        study.out,
        "defence.train.max_steps=1",
        "attacks.0.seeds=0",
        "controls=[]",
    )
    assert answer.code == 0, answer.err
    assert "has no pad token" in caplog.text


in_4_bits = pytest.param(
    ("defence.load_in_4bit=true", "defence.dtype=bfloat16"),
    marks=pytest.mark.skipif(not is_bitsandbytes_available(), reason="pip install 'repnoise[quantized]'"),
    id="in 4 bits",
)


@pytest.mark.parametrize("more", [pytest.param((), id="dense"), in_4_bits])
def test_a_defence_trained_as_lora_is_merged_at_the_end(
    more: tuple[str, ...], finished: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    study, _ = finished
    out = tmp_path / "lora"
    answer = cli("defend", study.recipe, "defence.lora_rank=4", *more, "--out", out)
    assert answer.code == 0, answer.err
    (path,) = out.glob("repnoise-*/model")
    assert not (path / "adapter_config.json").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (study.folder / "model", path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("mlp" in name for name in changed)
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in changed)
    for name in changed:  # what LoRA can do and full training would not: a change of rank 4 at most
        assert torch.linalg.matrix_rank(after[name].double() - before[name].double(), rtol=1e-3) <= 4, name


def test_4_bits_are_refused_before_anything_is_measured(
    make_study: Callable[..., Any], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    answer = cli("run", study.recipe, "defence.load_in_4bit=true", "--out", study.out)
    assert answer.code == 2
    assert "defence: load_in_4bit needs lora_rank, for example 16" in answer.err
    monkeypatch.setattr(quantised, "is_bitsandbytes_available", lambda: False)
    answer = cli("run", study.recipe, "defence.load_in_4bit=true", "defence.lora_rank=4", "--out", study.out)
    assert answer.code == 2
    assert "pip install 'repnoise[quantized]'" in answer.err
    assert not (study.out / "base").exists()
