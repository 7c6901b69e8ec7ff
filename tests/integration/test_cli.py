"""Help, recipes and the small verbs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from repnoise.recipes.checking import check_recipe
from repnoise.recipes.reading import RECIPES, recipe_names

HEAVY = ("torch", "transformers", "datasets", "numpy", "scipy")
VERBS = (
    *("", "demo", "run", "defend", "attack", "evaluate", "report", "convert", "sweep", "search", "bench"),
    *("recipes", "judges", "sandbox"),
    *("recipes ls", "recipes show", "recipes cp", "recipes validate", "judges ls", "judges train", "sandbox build"),
)
NO_EXAMPLE = ("", "recipes", "judges", "sandbox")


def test_help_of_every_verb_without_torch() -> None:
    script = f"""
import contextlib, io, json, sys, time
from repnoise.cli import main
texts = {{}}
for verb in {VERBS!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*verb.split(), "--help"]) == 0, verb
    texts[verb] = out.getvalue()
heavy = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps({{"texts": texts, "heavy": heavy}}))
"""
    found = json.loads(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
    assert found["heavy"] == []
    for verb, text in found["texts"].items():
        assert verb in NO_EXAMPLE or f"repnoise {verb}" in text.replace("Usage: repnoise", ""), verb
    for verb in VERBS[1:14]:
        assert verb in found["texts"][""]


def test_help_takes_less_than_a_second_of_cpu() -> None:
    before = os.times()
    subprocess.run([sys.executable, "-m", "repnoise", "--help"], check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.0


def test_shown_recipes_are_recipes(cli: Callable[..., Any], tmp_path: Path) -> None:
    seen = 0
    for name in recipe_names():
        shown = cli("recipes", "show", name)
        assert shown.code == 0, shown.err
        recipe, errors = check_recipe(yaml.safe_load(shown.out))
        assert errors == [], name
        assert recipe is not None
        file = tmp_path / f"{name}.yaml"
        file.write_text(shown.out)
        again = cli("recipes", "show", file, "--json")
        assert json.loads(again.out) == yaml.safe_load(shown.out)
        seen += 1
    assert seen == 8  # a recipe more or less is meant: change this number with it


def test_ls_cp_validate(cli: Callable[..., Any], tmp_path: Path) -> None:
    assert sorted(json.loads(cli("recipes", "ls", "--json").out)) == recipe_names()
    mine = tmp_path / "mine.yaml"
    assert json.loads(cli("recipes", "cp", "sandbox", mine, "--json").out) == {"recipe": str(mine)}
    assert cli("recipes", "validate", mine).out == f"{mine} is valid\n"
    assert json.loads(cli("recipes", "validate", mine, "--json").out)["valid"] is True


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -c 'from repnoise.cli import main; import sys; sys.exit(main())' recipes ls | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_convert_writes_a_folder_that_transformers_reads(
    cli: Callable[..., Any], make_folder: Callable[..., Any], tmp_path: Path
) -> None:
    folder, model, _ = make_folder("llama")
    answer = cli("convert", folder, tmp_path / "plain", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == {"model": str(tmp_path / "plain")}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", use_safetensors=True)
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    twice = cli("convert", folder, tmp_path / "plain")
    assert twice.code == 2
    assert "exists already" in twice.err


def test_a_name_outside_of_the_terminals_encoding_does_not_turn_success_into_failure(tmp_path: Path) -> None:
    """Windows with redirected output, or a C locale: the recipe's `about` has letters that cp1252 lacks."""
    recipe = tmp_path / "模型.yaml"
    text = (RECIPES / "sandbox.yaml").read_text(encoding="utf-8").replace("about: ", "about: 模型, ")
    recipe.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "repnoise", "recipes", "show", str(recipe)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u6a21" in done.stdout
