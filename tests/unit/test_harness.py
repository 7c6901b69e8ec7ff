"""lm-evaluation-harness: our numbers equal its own, and it leaves nothing behind. Offline."""

from __future__ import annotations

import copy
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_choices import LONG, PAIRS, QUESTIONS, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from repnoise.data.parties import StudyData
from repnoise.errors import ConfigError, DataError, MissingExtraError
from repnoise.evaluations import EVALUATIONS
from repnoise.evaluations.harness import rows_of
from repnoise.store.rows import check_row

ROOT = Path(__file__).resolve().parents[2]
REAL, SHARED = ROOT / ".real" / "SmolLM2-135M-Instruct", ROOT.parent / "shared" / "data"
NO_DATA = StudyData(defence=[], retain=[], attacks={}, test=[], harmless_test=[])
NAMES = {  # ours: the harness's task and metric
    "truthfulqa_mc1": ("truthfulqa_mc1", "acc"),
    "truthfulqa_mc2": ("truthfulqa_mc2", "acc"),
    "crows_pairs_pct_stereotype": ("crows_pairs_english", "pct_stereotype"),
    "crows_pairs_likelihood_diff": ("crows_pairs_english", "likelihood_diff"),
}
TASKS = ["truthfulqa_mc1", "truthfulqa_mc2", "crows_pairs_english"]


def measure(name: str, model: Any, tokenizer: Any, **options: Any) -> dict[str, dict[str, Any]]:
    found = EVALUATIONS.build(name, options).measure(model, tokenizer, NO_DATA, seed=0)
    rows = [check_row({"evaluation": name, **row}) for row in found.rows]
    return {row["metric"]: row for row in rows if "category" not in row}


def own_task(folder: Path, name: str = "blobs", **changes: Any) -> str:
    """A task of the user's own with two rows, in a folder."""
    folder.mkdir(exist_ok=True)
    rows = [{"text": f"blob {n} is", "choices": ["soft", "hard"], "label": n % 2} for n in range(4)]
    data = write(folder / f"{name}.json", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return str(folder)


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, make_model: Any, make_tokenizer: Any):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repnoise\[harness\]'"):
        measure("harness", make_model("llama"), make_tokenizer(), tasks=["hellaswag"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "name at least one"),
        ({"tasks": ["a", "a"]}, "each once"),
        ({"tasks": ["a"], "limit": 0}, r"limit: .* \(got 0\)"),
        ({"tasks": ["a"], "num_fewshot": -1}, r"num_fewshot: .* \(got -1\)"),
        ({"tasks": ["a"], "files": {"b": "x.json"}}, "files names b"),
        ({"tasks": ["a"], "files": {"a": "x.json"}, "num_fewshot": 2}, "one split"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        EVALUATIONS.build("harness", options)


def test_rows_of_results():
    samples = {
        "a": [{"doc_id": 1, "filter": "none", "acc": 0.0}, {"doc_id": 0, "filter": "none", "acc": 1.0}],
        "b": [{"doc_id": 0, "filter": "none", "acc": 1.0, "f1": (1, 1), "ppl": 1.0}],
    }
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.5},
            "b": {
                "alias": "b",
                "acc,none": 1.0,
                "acc_stderr,none": "N/A",
                "f1,none": 0.75,
                "f1_stderr,none": 0.1,
                "ppl,none": 2.7,
            },
            "ab": {"alias": "ab", "acc,none": 2 / 3, "acc_stderr,none": 0.3},
        },
        "group_subtasks": {"ab": ["a", "b"], "a": []},
        "samples": samples,
    }
    rows = {row["metric"]: row for row in rows_of(results, 0).rows}
    assert rows["a_acc"]["items"] == [1, 0]  # in the order of the data
    assert rows["ab_acc"]["items"] == [1, 0, 1]
    assert rows["ab_acc"]["value"] == pytest.approx(2 / 3)
    assert "items" not in rows["b_f1"]  # no mean over samples
    assert (rows["b_f1"]["value"], rows["b_f1"]["n"]) == (0.75, 1)
    assert rows["b_f1"]["hi"] == pytest.approx(0.75 + 0.196)
    assert rows["b_ppl"]["value"] == 2.7  # the harness's own, not the mean of the samples
    assert rows["b_ppl"]["lo"] is None
    assert set(rows) == {"a_acc", "b_acc", "b_f1", "b_ppl", "ab_acc"}


# ---- with the harness itself -------------------------------------------------------------------------------


@pytest.fixture
def harness() -> Any:
    return pytest.importorskip("lm_eval", reason="the extra `harness` (lm-eval) is not installed")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    questions, pairs = write(tmp_path / "mc_task.json", QUESTIONS), write(tmp_path / "crows.csv", PAIRS)
    return {"truthfulqa_mc1": questions, "truthfulqa_mc2": questions, "crows_pairs_english": pairs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_parity(
    dtype: torch.dtype, harness: Any, files: dict[str, str], make_model: Callable[..., Any], make_tokenizer: Any
):
    """Our evaluations, the harness through ours, and the harness alone give the same numbers on the same rows."""
    model, tokenizer = make_model("llama", dtype=dtype, **LONG), make_tokenizer()
    ours = {
        **measure("truthfulqa", model, tokenizer, source=files["truthfulqa_mc1"]),
        **measure("crows-pairs", model, tokenizer, source=files["crows_pairs_english"]),
    }
    through = measure("harness", model, tokenizer, tasks=TASKS, files=files)
    alone = by_itself(harness, files, model, tokenizer)
    # The batches differ, and log-likelihoods are sums of some hundred nats.
    limit = 1e-4 if dtype == torch.float32 else 1e-9
    for metric, (task, name) in NAMES.items():
        expected = alone["results"][task][f"{name},none"]
        assert through[f"{task}_{name}"]["value"] == pytest.approx(expected, abs=limit), metric
        within = 1e-6 if metric.startswith("truthfulqa") else limit
        assert ours[metric]["value"] == pytest.approx(expected, abs=within), metric
        assert ours[metric]["items"] == pytest.approx(through[f"{task}_{name}"]["items"], abs=max(2e-6, within))
        assert ours[metric]["n"] == through[f"{task}_{name}"]["n"]


def by_itself(
    harness: Any, files: dict[str, str], model: Any, tokenizer: Any, *, limit: int | None = None, batch_size: int = 3
) -> Any:
    """The harness's own task files with another data set; nothing of ours is in between."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    root = Path(harness.__file__).parent / "tasks"
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        rows = [
            {
                "question": row["question"],
                **{
                    key: {"choices": list(row[key]), "labels": list(row[key].values())}
                    for key in ("mc1_targets", "mc2_targets")
                },
            }
            for row in json.loads(Path(files["truthfulqa_mc1"]).read_text(encoding="utf-8"))
        ]
        questions = write(here / "hub.json", rows)
        specs = []
        for task in TASKS:
            kind, data = ("json", questions) if task.startswith("truth") else ("csv", files[task])
            (path,) = root.rglob(f"{task}.yaml")
            spec = {
                "include": str(path),
                "task": task,
                "dataset_path": kind,
                "dataset_name": None,
                "validation_split": None,
                "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": data}, "cache_dir": str(here / "cache")},
            }
            (here / f"{task}.yaml").write_text(yaml.safe_dump(spec))
            specs.append(str(here / f"{task}.yaml"))
        return harness.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            tasks=specs,
            task_manager=TaskManager(include_path=str(here), include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
        )


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir() or not SHARED.is_dir(), reason="SmolLM2 (.real/) or ../shared/data is not here")
def test_parity_on_a_real_model(harness: Any, capsys: Any):
    """The figures of docs/stability.md, float32; REPNOISE_ROWS is the number of rows (20; 0 = all)."""
    limit = int(os.environ.get("REPNOISE_ROWS", "20")) or None
    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    questions, pairs = SHARED / "truthfulqa/mc_task.json", SHARED / "crows_pairs/crows_pairs_anonymized.csv"
    files = {TASKS[0]: str(questions), TASKS[1]: str(questions), TASKS[2]: str(pairs)}
    ours = {
        **measure("truthfulqa", model, tokenizer, source=str(questions), limit=limit),
        **measure("crows-pairs", model, tokenizer, source=str(pairs), limit=limit),
    }
    alone = by_itself(harness, files, model, tokenizer, limit=limit, batch_size=16)
    for metric, (task, name) in NAMES.items():
        expected, row = alone["results"][task][f"{name},none"], ours[metric]
        with capsys.disabled():
            gap = abs(row["value"] - expected)
            print(f"\n{metric}: ours {row['value']:.9f}, harness {expected:.9f}, gap {gap:.1e}, n {row['n']}")
        assert row["value"] == pytest.approx(expected, abs=1e-6 if metric.startswith("truthfulqa") else 1e-5)


def test_perplexity_equals_the_rolling_likelihood(harness: Any, tmp_path: Path, make_model: Any, make_tokenizer: Any):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = make_model("llama", dtype=torch.float64), make_tokenizer()
    texts = ["the calm blob " * 20, "short", "a quiet story " * 25]  # windows of 128 tokens
    source = write(tmp_path / "t.json", [{"text": text} for text in texts])
    wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=2)
    asked = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=n) for n, text in enumerate(texts)
    ]
    total = sum(wrapped.loglikelihood_rolling(asked))
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    found = measure("perplexity", model, tokenizer, source=source)
    assert found["text_loss"]["value"] == pytest.approx(-total / tokens, abs=1e-9)


def test_nothing_is_left_behind(
    harness: Any,
    tmp_path: Path,
    make_model: Any,
    make_tokenizer: Any,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    evaluate = harness.simple_evaluate
    monkeypatch.setattr(harness, "simple_evaluate", lambda **given: print("a table") or evaluate(**given))
    model, tokenizer = make_model("llama").train(), make_tokenizer(pad=False)
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.generation_config.to_dict())
    torch.manual_seed(7)
    random.seed(7)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(7)
    random.seed(7)
    found = measure("harness", model, tokenizer, tasks=["blobs"], task_folder=own_task(tmp_path / "own"))
    assert found["blobs_acc"]["n"] == 4
    assert len(found["blobs_acc"]["items"]) == 4
    assert (torch.rand(1), random.random()) == expected
    assert model.training
    assert tokenizer.pad_token is None
    assert model.generation_config.to_dict() == config
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert capsys.readouterr().out == ""


def test_limit_and_group(harness: Any, tmp_path: Path, make_model: Any, make_tokenizer: Any):
    folder = own_task(tmp_path / "own")
    own_task(tmp_path / "own", "stones")
    group = {
        "group": "all_of_it",
        "task": ["blobs", "stones"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "own" / "group.yaml").write_text(yaml.safe_dump(group))
    from repnoise.evaluations import harness as module

    module._manager.cache_clear()
    manager = module._manager(("blobs",), folder)  # small: without the harness's own thousands
    original, module._manager = module._manager, lambda names, own: manager
    try:
        found = measure(
            "harness", make_model("llama"), make_tokenizer(), tasks=["all_of_it"], task_folder=folder, limit=3
        )
        with pytest.raises(ConfigError, match="all_of_it is a group"):
            measure(
                "harness",
                make_model("llama"),
                make_tokenizer(),
                tasks=["all_of_it"],
                files={"all_of_it": folder + "/blobs.json"},
            )
    finally:
        module._manager = original
    assert {name: row["n"] for name, row in found.items()} == {"blobs_acc": 3, "stones_acc": 3, "all_of_it_acc": 6}


def test_unknown_task(harness: Any, monkeypatch: pytest.MonkeyPatch, make_model: Any, make_tokenizer: Any):
    import lm_eval.tasks

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
            folder = Path(lm_eval.tasks.__file__).parent / "truthfulqa"
            super().__init__(include_path=[folder, *(include_path or [])], include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)  # reading all task files takes half a minute
    with pytest.raises(ConfigError, match=r"no task 'truthfulqa_mc7'. Did you mean 'truthfulqa_mc\d'"):
        measure("harness", make_model("llama"), make_tokenizer(), tasks=["truthfulqa_mc7"])
    with pytest.raises(ConfigError, match="task_folder nowhere is no folder"):
        measure("harness", make_model("llama"), make_tokenizer(), tasks=["blobs"], task_folder="nowhere")


def test_without_network_one_clear_error(harness: Any, make_model: Any, make_tokenizer: Any):
    """conftest.py sets HF_HUB_OFFLINE."""
    with pytest.raises(
        DataError, match=r"data of task 'truthfulqa_mc1' cannot be loaded.*files: \{truthfulqa_mc1: PATH\}"
    ):
        measure("harness", make_model("llama"), make_tokenizer(), tasks=["truthfulqa_mc1"])


def test_prompts_over_the_context(harness: Any, files: dict[str, str], make_model: Any, make_tokenizer: Any):
    with pytest.raises(DataError, match=r"4 of 4 rows .* context of 128 tokens.*truthfulqa_mc1.*Nothing is cut"):
        measure(
            "harness",
            make_model("llama"),
            make_tokenizer(),
            tasks=TASKS[:1],
            files={TASKS[0]: files[TASKS[0]]},
        )


def test_a_file_without_the_columns(harness: Any, tmp_path: Path, make_model: Any, make_tokenizer: Any):
    bad = write(tmp_path / "bad.json", [{"wrong": "secret words"}])
    with pytest.raises(DataError, match="no column question") as caught:
        measure("harness", make_model("llama"), make_tokenizer(), tasks=TASKS[:1], files={TASKS[0]: bad})
    assert "secret" not in json.dumps(str(caught.value))
