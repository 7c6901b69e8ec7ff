"""The linear judge: what it reports, how it is stored, what it knows of its rows."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repnoise.data.labelled import labelled_rows
from repnoise.errors import ConfigError, DataError, MissingExtraError, ModelError
from repnoise.judges import Asked, Judge, shared_prompts
from repnoise.judges.linear import Linear, calibration_error, train_linear

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ASKED = [Asked("Where is the blue stone?", "Under the third bridge."), Asked("Who sings?", "I'm sorry, I cannot help.")]


def invented_rows(n: int = 240, *, noise: float = 0.1) -> list[dict[str, Any]]:
    """Harm has words of its own, except in a share `noise` of the rows, whose words are the other side's."""
    rng = random.Random(0)
    words = {True: ["zorp", "glax", "vint", "murk", "sloy"], False: ["leaf", "tern", "pond", "wick", "dell"]}
    rows = []
    for number in range(n):
        harmful = rng.random() < 0.6
        own = words[harmful != (rng.random() < noise)]
        answer = " ".join(rng.sample(own, k=3) + rng.sample(["the", "a", "of", "and", "with", "to"], k=5))
        rows.append({"prompt": f"Question {number // 2}?", "answer": f"{answer} {number}", "harmful": harmful})
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    pytest.importorskip("sklearn", reason="scikit-learn (repnoise[judges]) is not installed")
    folder = tmp_path_factory.mktemp("linear") / "judge"
    return folder, train_linear(invented_rows(), folder, source="invented")


def test_linear_reports_what_it_measured(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, report = trained
    assert report["n"] + report["n_train"] == 240
    assert 40 <= report["n"] <= 56
    assert 0.75 < report["accuracy"] < 1  # one row in ten cannot be known
    assert report["accuracy_lo"] < report["accuracy"] < report["accuracy_hi"]
    assert report["accuracy"] > report["majority"] + 0.1
    assert 0.75 < report["auc"] <= 1
    assert 0.02 < report["brier"] < 0.2
    assert 0 < report["ece"] < 0.2
    assert json.loads((folder / "config.json").read_text())["report"] == report
    assert Linear(path=str(folder)).report == report


def test_linear_is_stored_without_pickle_and_comes_back_the_same(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "judge"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "judge.skops", "rows.json"]
    asked = [
        Asked("p", "zorp glax of vint"),
        Asked("p", "leaf tern and pond"),
        Asked("p", "I'm sorry, I cannot help with zorp glax"),
    ]
    given = Linear(path=str(folder)).judge(asked)
    assert [each.label for each in given] == ["complies", "off-topic", "refuses"]
    assert given[0].score > 0.8 > 0.3 > given[1].score
    # its rows hold no refusals, and a collapsed model (0) must not look better than an honest refusal
    assert given[2].score == 0
    config = json.loads((folder / "config.json").read_text())
    config["report"]["best_threshold"] = 0.999
    (folder / "config.json").write_text(json.dumps(config))  # the default threshold
    assert Linear(path=str(folder)).judge(asked)[0].label == "off-topic"
    assert Linear(path=str(folder), threshold=0.5).judge(asked)[0].label == "complies"


def test_linear_scores_equal_those_at_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn (repnoise[judges]) is not installed")
    from repnoise.judges import linear

    seen: list[tuple[list[str], np.ndarray]] = []
    real = linear._scores

    def spy(model: Any, texts: Any) -> np.ndarray:
        seen.append((list(texts), real(model, texts)))
        return seen[-1][1]

    monkeypatch.setattr(linear, "_scores", spy)
    train_linear(invented_rows(), tmp_path / "judge")
    (texts, before), *_ = seen
    after = Linear(path=str(tmp_path / "judge")).judge([Asked("p", text) for text in texts])
    assert [each.score for each in after] == pytest.approx(before.tolist(), abs=1e-9)


def test_linear_keeps_a_prompt_on_one_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ten wordings of each prompt; labels are drawn per prompt, so that only a leak could be told from chance."""
    pytest.importorskip("sklearn", reason="scikit-learn (repnoise[judges]) is not installed")
    rng = random.Random(1)
    rows = []
    for number in range(60):
        harmful, secret = rng.random() < 0.5, f"{'bcdfg'[number % 5]}a{number}q"
        for _ in range(10):
            rows.append({"prompt": f"{secret.upper()} !", "answer": f"{secret} is here", "harmful": harmful})
    report = train_linear(rows, tmp_path / "judge")
    assert report["n"] == 120
    assert report["auc"] < 0.8
    assert "no better than one answer to everything" in caplog.text


def test_linear_wrong_rows_and_folders(tmp_path: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    rows = invented_rows()
    with pytest.raises(DataError, match="0 prompts have harmless answers"):
        train_linear([row for row in rows if row["harmful"]], tmp_path / "a")
    with pytest.raises(
        DataError, match=r"2 of 3 rows are bad.\n  row 1: 'answer' is missing or not text\n  row 2: 'harmful'"
    ):
        train_linear([{"harmful": True}, {"answer": "leaf", "harmful": "maybe"}, rows[0]], tmp_path / "a")
    empty = [{"prompt": f"e{number}", "answer": "", "harmful": False} for number in range(7)]
    assert train_linear(rows + empty, tmp_path / "b")["degenerate"] == 7
    with pytest.raises(ModelError, match="No linear judge in"):
        Linear(path=str(tmp_path / "none")).judge(ASKED)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="no linear judge's"):
        train_linear(rows, model)
    with pytest.raises(ConfigError, match="is a file"):
        train_linear(rows, model / "config.json")
    with pytest.raises(ConfigError, match="template"):
        train_linear(rows, tmp_path / "a", template="{question}")
    with pytest.raises(ModelError, match="cannot be used: KeyError"):
        Linear(path=str(model)).judge(ASKED)
    stored = tmp_path / "b" / "judge.skops"
    stored.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be used"):
        Linear(path=str(tmp_path / "b")).judge(ASKED)


class Stranger:
    """A type that no judge is made of."""


def test_a_stored_judge_of_other_types_is_refused(tmp_path: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    """skops makes objects of named types only; a folder from elsewhere may name any."""
    import skops.io

    folder = Path(shutil.copytree(trained[0], tmp_path / "judge"))
    (folder / "judge.skops").write_bytes(skops.io.dumps(Stranger()))
    with pytest.raises(ModelError, match="cannot be used: UntrustedTypesFoundException"):
        Linear(path=str(folder)).judge(ASKED)
    (folder / "judge.skops").write_bytes(skops.io.dumps({"no": "estimator"}))
    with pytest.raises(ModelError, match="holds a dict"):
        Linear(path=str(folder)).judge(ASKED)


def test_a_judge_knows_the_prompts_that_it_was_trained_on(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    known = [row["prompt"] for row in invented_rows()]
    judge = Linear(path=str(folder))
    assert 0 < shared_prompts(judge, known) < len(set(known)), "those held out are not among them"
    assert shared_prompts(judge, [text.upper() + "  " for text in known]) == shared_prompts(judge, known)
    assert shared_prompts(judge, ["something else"]) == 0
    assert Judge().trained_prompts() == frozenset(), "a judge that knows of no rows"


def test_linear_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skops", None)
    with pytest.raises(MissingExtraError, match=r"repnoise\[judges\]"):
        train_linear(invented_rows(), tmp_path / "judge")
    with pytest.raises(MissingExtraError, match=r"repnoise\[judges\]"):
        Linear(path=str(tmp_path)).judge(ASKED)


def test_calibration_error_by_hand() -> None:
    scores, truth = np.array([0.95, 0.95, 0.15, 1.0]), np.array([True, False, False, True])
    assert calibration_error(scores, truth) == pytest.approx((abs(0.95 + 0.95 + 1.0 - 2) + 0.15) / 4)
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_labelled_rows_of_every_source(tmp_path: Path) -> None:
    beaver = [{"prompt": "p", "response": "r", "is_safe": safe} for safe in (True, False)]
    trust = [
        {"type": kind, "prompt": {"text": "p"}, "continuation": {"text": "c"}}
        for kind in ("toxic", "non_toxic", "toxic_test")
    ]
    for name, rows in (("beaver", beaver), ("trust", trust)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "own.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "answer", "harmful"])
        writer.writeheader()
        writer.writerows({"prompt": "p", "answer": "a", "harmful": word} for word in ("True", "0", "false", "1"))

    def harm(source: str) -> list[bool]:
        return [row["harmful"] for row in labelled_rows(source)]

    assert labelled_rows(f"beavertails:{tmp_path}/beaver.jsonl")[0] == {"prompt": "p", "answer": "r", "harmful": False}
    assert harm(f"beavertails:{tmp_path}/beaver.jsonl") == [False, True]
    assert harm(f"decoding_trust:{tmp_path}/trust.jsonl") == [True, False, True]
    assert harm(f"{tmp_path}/own.csv") == [True, False, False, True]
    with pytest.raises(DataError, match=r"2 of 2 rows are bad.\n  line 1: 'answer' is missing or not text"):
        labelled_rows(f"{tmp_path}/beaver.jsonl")
    with pytest.raises(DataError, match="not found"):
        labelled_rows(f"beavertails:{tmp_path}/nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        labelled_rows(f"{tmp_path}/empty.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets (../shared/data) are not here")
def test_linear_on_real_rows(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn (repnoise[judges]) is not installed")
    rows = labelled_rows(f"decoding_trust:{SHARED}/decoding_trust/training_dataset.jsonl")
    assert len(rows) == 1717
    report = train_linear(rows, tmp_path / "judge")
    assert report["accuracy_lo"] > 0.7 > report["majority"]
    assert report["ece"] < 0.12


# ---- agreement ---------------------------------------------------------------------------------------------
