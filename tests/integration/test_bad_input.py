"""Every bad input: one clear message, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from repnoise.evaluations.loss import Loss

from .conftest import PAIRS, ROWS, write_lines

QUICK = ("defence.train.max_steps=2", "attacks.0.seeds=0", "controls=[]", "--quiet")


def refused(answer: Any, *fragments: str, code: int = 2) -> None:
    """One message on stderr that holds all fragments."""
    assert answer.code == code, answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert sum(line.startswith("repnoise: ") for line in answer.err.splitlines()) == 1
    for fragment in fragments:
        assert fragment in answer.err, answer.err


def run(cli: Callable[..., Any], study: Any, *changes: str) -> Any:
    return cli("run", study.recipe, *QUICK, *changes, "--out", study.out)


# ---- data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "fragments"),
    [
        ({"prompt": "p"}, ["line 3", "'harmful' is missing", "'harmless' is missing"]),
        ({"prompt": "p", "harmful": "h"}, ["line 3", "the row is unpaired"]),
        ({"prompt": "p", "harmful": " ", "harmless": "s"}, ["line 3", "'harmful' is empty"]),
        ({"prompt": "p", "harmful": 3, "harmless": "s"}, ["line 3", "'harmful' is a int, not a string"]),
        ({"prompt": "p", "harmful": "secret", "harmless": "secret"}, ["line 3", "are the same text"]),
    ],
)
def test_bad_rows(bad: Any, fragments: list[str], make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study()
    write_lines(study.folder / "pairs.jsonl", [*PAIRS[:2], bad, *PAIRS[2:], {}])
    answer = run(cli, study)
    refused(answer, "pairs.jsonl", "2 of 18 rows are bad", *fragments)
    assert "secret" not in answer.err  # rows may be harmful: never quoted
    assert not study.out.exists()


def test_data_that_is_not_there_or_not_data(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study()
    refused(run(cli, study, "data.pairs=nowhere.jsonl"), "data file not found: nowhere.jsonl")
    (study.folder / "broken.jsonl").write_text('{"prompt": \n')
    refused(run(cli, study, f"data.retain={study.folder}/broken.jsonl"), "line 1", "not valid JSON")
    (study.folder / "empty.jsonl").write_text("")
    refused(run(cli, study, f"data.retain={study.folder}/empty.jsonl"), "none found", "empty set")
    refused(run(cli, study, "data.pairs=decoding_trsut:x"), "Did you mean 'decoding_trust'?")
    options = "data.options={refusal: none}"
    pairs = f"data.pairs=decoding_trust:{study.folder}/pairs.jsonl"
    refused(run(cli, study, pairs, options), "has no option 'refusal'", "allowed: refusals")
    refused(run(cli, study, "data.sizes={defence: 99, attack: 1, test: 1}"), "ask for 101 of 16 items")
    refused(run(cli, study, "data.template=chta"), "unknown template 'chta'", "allowed: auto, chat")
    assert not study.out.exists()


def test_overlap_is_refused_unless_asked_for(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study()
    same = f"data.attack={study.folder}/pairs.jsonl"
    refused(run(cli, study, same), "defence and attack share", "allow_overlap: true")
    answer = run(cli, study, same, "data.allow_overlap=true")
    assert answer.code == 0, answer.err
    assert study.manifest("base")["data"]["audit"]["allow_overlap"] is True


def test_long_prompts_are_found_before_any_work(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study()
    long = {**PAIRS[0], "prompt": "word " * 30}
    write_lines(study.folder / "attack.jsonl", [long, {**PAIRS[0], "prompt": "short"}])
    answer = run(cli, study, f"data.attack={study.folder}/attack.jsonl")
    refused(answer, "attack pairs", "row 0", "max_length is 64", "Raise max_length")
    assert not study.out.exists()
    refused(run(cli, study, "data.max_length=1000"), "context of", "128", "Set data.max_length=128")


def test_registered_sources_and_their_options(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    """DecodingTrust's format for both sides, BeaverTails beside a file, sizes as numbers."""
    study = make_study()

    def record(kind: str, prompt: str) -> dict[str, Any]:
        return {"type": kind, "prompt": {"text": prompt}, "continuation": {"text": " goes on", "insult": 0.4}}

    toxic = [record("toxic", f"bad number {n}") for n in range(8)]
    good = [record("non_toxic", f"good number {n}") for n in range(6)]
    write_lines(study.folder / "dt.jsonl", [*toxic, *good])
    write_lines(study.folder / "with_refusals.json", [])
    source = f"decoding_trust:{study.folder}/dt.jsonl"
    answer = run(
        cli,
        study,
        f"data.pairs={source}",
        f"data.retain={source}",
        "data.options={refusals: none}",
        "data.sizes={defence: 4, attack: 2, test: 2}",
        "data.harmless_sizes={retain: 3, test: 2}",
        "data.template=continuation",
        "data.max_length=128",
    )
    assert answer.code == 0, answer.err
    sets = study.manifest("base")["data"]["audit"]["sets"]
    assert {name: found["rows"] for name, found in sets.items()} == {"defence": 4, "attack": 2, "test": 2}

    answers = [
        {"prompt": f"ask {n}", "response": f"answer {n}", "is_safe": False, "category": {"theft": True}}
        for n in range(8)
    ]
    write_lines(study.folder / "bt.jsonl", answers)
    source = f"'beavertails:{study.folder}/bt.jsonl'"
    own = f"data.pairs={{source: {source}, options: {{categories: group}}, limit: 6}}"
    answer = run(cli, study, own, "data.max_length=100")
    assert answer.code == 0, answer.err
    sets = study.manifest("base")["data"]["audit"]["sets"]
    assert sum(found["rows"] for found in sets.values()) == 6


# ---- models ----------------------------------------------------------------------------------------------


def test_a_vocabulary_that_does_not_fit(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study(settings={"vocab_size": 100})
    answer = run(cli, study)
    refused(answer, "tokenizer does not fit the model", "260 tokens", "embeds 100")


def test_an_unknown_family(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study()
    config = transformers.BloomConfig(vocab_size=264, hidden_size=16, n_layer=2, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(study.folder / "model")
    answer = run(cli, study, "--json")
    refused(answer, "bloom", "register_family", "layers", "head")
    assert not list(study.out.glob("repnoise-*"))


def test_a_model_that_is_not_there(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study()
    refused(run(cli, study, "model=no/such/folder"), "No such file or folder: no/such/folder")
    refused(run(cli, study, "model=someone/some-model"), "taken for a hub id", "HF_HUB_OFFLINE")
    for weights in (study.folder / "model").glob("*.safetensors"):
        weights.rename(weights.with_name("pytorch_model.bin"))
    refused(run(cli, study), "only as pickles", "unpickling can run code")
    assert not study.out.exists()


def test_a_model_of_nan(make_study: Callable[..., Any], cli: Callable[..., Any], make_model: Any) -> None:
    study = make_study()
    model = make_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    model.save_pretrained(study.folder / "model")
    refused(run(cli, study), "the weights in base hold NaN or infinity", code=1)


# ---- stages that fail ------------------------------------------------------------------------------------


def test_a_loss_that_becomes_nan(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study()
    wild = ["defence.train.learning_rate=1e30", "defence.train.max_grad_norm=0"]
    answer = run(cli, study, *wild, "defence.train.max_steps=5")
    refused(answer, "the loss is not finite at step", "Lower the learning rate", code=1)
    assert study.manifest("base")["status"] == "done"
    manifest = study.manifest("repnoise-*")
    assert manifest["status"] == "failed"
    assert "not finite" in manifest["error"]


def test_one_attack_that_fails_stops_no_other(finished: Any, cli: Callable[..., Any], tmp_path: Path) -> None:
    study, _ = finished
    rates = "attacks.0.learning_rate=[1e30, 1e-3]"
    changes = [
        rates,
        "attacks.0.steps=5",
        "attacks.0.seeds=0",
        "attacks.0.train.max_grad_norm=0",
        "controls=[]",
    ]
    out = tmp_path / "out"
    for part in ("base", next(study.out.glob("repnoise-*")).name):
        subprocess.run(["cp", "-r", study.out / part, tmp_path], check=True)
        (tmp_path / part / "attacks").rename(tmp_path / f"{part}-attacks")
        out.mkdir(exist_ok=True)
        (tmp_path / part).rename(out / part)
    answer = cli("run", study.recipe, *changes, "--quiet", "--out", out)
    refused(
        answer,
        "2 of 4 attacks failed",
        "learning_rate 1e+30",
        "sft on base",
        "the loss is not finite",
        code=1,
    )
    statuses = [json.loads(p.read_text())["status"] for p in out.glob("*/attacks/*/manifest.json")]
    assert sorted(statuses) == ["done", "done", "failed", "failed"]
    assert not list(out.rglob("checkpoints"))


def test_a_disk_that_is_full(
    make_study: Callable[..., Any], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first row, at the model, at a checkpoint; then the same command goes through."""
    study = make_study()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: full() if "rows" in str(b) else real(a, b))
        refused(run(cli, study), "The disk is full", "rows/loss.jsonl", "run the same command again", code=1)
    assert study.manifest("base")["status"] == "failed"
    with monkeypatch.context() as patch:
        patch.setattr("repnoise.models.saving._swap", full)
        refused(run(cli, study), "The disk is full", "model", code=1)
    assert study.manifest("base")["status"] == "done"
    assert not list(study.out.glob("repnoise-*/*model*"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        answer = run(cli, study, "defence.train.save_steps=1", "defence.beta=0")
        refused(answer, "The disk is full", code=1)
    assert run(cli, study).code == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_disk_that_is_really_full(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study()
    study.out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(study.out)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        refused(run(cli, study), "The disk is full", "Free some space", "run the same command again", code=1)
        subprocess.run(["mount", "-o", "remount,size=20m", str(study.out)], check=True)
        assert run(cli, study).code == 0
    finally:
        subprocess.run(["umount", str(study.out)], check=True)


def test_what_nobody_foresaw(
    make_study: Callable[..., Any], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()

    def broken(*arguments: Any, **options: Any) -> None:
        raise IndexError("of our own making")

    monkeypatch.setattr(Loss, "measure", broken)
    refused(run(cli, study), "IndexError: of our own making", "REPNOISE_TRACEBACK=1", code=1)
    assert study.manifest("base")["error"] == "IndexError: of our own making"
    monkeypatch.setenv("REPNOISE_TRACEBACK", "1")
    assert "Traceback" in run(cli, study).err


# ---- recipes and the command line ------------------------------------------------------------------------


def test_all_errors_of_a_recipe_at_once(make_study: Callable[..., Any], cli: Callable[..., Any]) -> None:
    study = make_study()
    answer = cli(
        "run",
        study.recipe,
        "defence.alhpa=2",
        "defence.noise=tok",
        "defence.train.learning_rat=1",
        "defence.train.max_steps=many",
        "attacks.0.stepz=3",
        "attacks.0.learning_rate=-1",
        "evaluations=[los]",
        "data.max_lenght=3",
        "studdy=x",
    )
    refused(
        answer,
        "has 9 errors",
        "defence.alhpa: unknown key. Did you mean 'alpha'?",
        "defence.noise: Input should be 'sequence' or 'token' (got 'tok')",
        "defence.train.learning_rat: not a field of transformers.TrainingArguments.",
        "Did you mean 'learning_rate'?",
        "defence.train.max_steps: Input should be a valid integer (got 'many')",
        "attacks.0.stepz: unknown key. Did you mean 'steps'?",
        "attacks.0.learning_rate.0: Input should be greater than 0 (got -1)",
        "evaluations.0: unknown evaluation 'los'. Did you mean 'loss'?",
        "data.max_lenght: unknown key. Did you mean 'max_length'?",
        "studdy: unknown key. Did you mean 'study'?",
    )


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["run"], ["Missing", "recipe", "Usage: repnoise run", "Try `repnoise run --help`"]),
        (["rnu", "sandbox"], ["No such command 'rnu'", "Try `repnoise --help`"]),
        (["run", "sandbox", "--bogus"], ["No such option", "--bogus"]),
        (["run", "sandbox", "--jobs", "0"], ["--jobs", "greater than or equal to 1|>=1"]),
        (["run", "sandbx"], ["there is no recipe 'sandbx'", "Did you mean 'sandbox'?", ".yaml"]),
        (["run", "nowhere.yaml"], ["there is no recipe file nowhere.yaml", "sandbox"]),
        (["run", "sandbox", "alpha"], ["'alpha' is not an override", "dotted.key=value"]),
        (["run", "sandbox", "attacks.7.steps=3"], ["attacks is a list", "from 0 to 1"]),
        (["run", "sandbox", "study.x.y=3"], ["study is a plain value"]),
        (["run", "sandbox", "curve=[1"], ["is not YAML"]),
        (
            ["run", "sandbox", "attacks.0.harm=rudeness", "--out", "{tmp}/new"],
            ["attacks.0.harm", "knowledge"],
        ),
        (["run", "sandbox", "--out", "{tmp}/file"], ["is a file", "Allowed: a folder"]),
        (["run", "sandbox", "--out", "{tmp}/file/below"], ["is a file", "Allowed: a folder"]),
        (["run", "{tmp}/broken.yaml"], ["is not YAML"]),
        (["run", "{tmp}/twice.yaml"], ["is not YAML", "study given twice"]),
        (["run", "{tmp}/list.yaml"], ["must be a mapping"]),
        (["report", "{tmp}/nowhere"], ["there is no study folder"]),
        (["recipes", "cp", "sandbox", "{tmp}/file"], ["something.yaml"]),
        (["recipes", "cp", "sandbox", "{tmp}/list.yaml"], ["exists already"]),
        (["recipes", "validate", "sandbox", "x=1"], ["x: unknown key"]),
        (["recipes", "show", "sandbox", "model=m"], ["ignorant control exists for model: sandbox:"]),
    ],
)
def test_the_command_line(arguments: list[str], fragments: list[str], cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "twice.yaml").write_text("study: a\nstudy: b\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    answer = cli(*(argument.format(tmp=tmp_path) for argument in arguments))
    refused(answer)
    for fragment in fragments:
        assert any(choice in answer.err for choice in fragment.split("|")), answer.err
    assert not (tmp_path / "new").exists()


def test_rows_of_the_test_data_are_what_the_tests_say() -> None:
    assert len(PAIRS) == 16
    assert len(ROWS) == 10
