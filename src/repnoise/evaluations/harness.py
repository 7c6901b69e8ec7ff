"""Any task of lm-evaluation-harness (the optional extra `harness`), through its Python API; paper table 3."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub.utils import are_progress_bars_disabled
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..data.parties import StudyData
from ..errors import ConfigError, DataError, MissingExtraError, RunError, suggest
from ..recipes.ranges import Count, Whole
from .base import EVALUATIONS, Evaluation, Measured
from .generation import evaluating
from .likelihood import table

NEEDED = {"truthfulqa": ("question", "mc1_targets", "mc2_targets"), "crows_pairs": ("sent_more", "sent_less")}
SPLIT = "test"


@EVALUATIONS.register("harness")
@dataclass(kw_only=True)
class Harness(Evaluation):
    """Rows `<task>_<metric>` for every task (and group) and every metric of it. `value` is the harness's own; n and
    the interval come from its per-sample results (Wilson for rates, bootstrap for scores), or from its standard error
    where a metric is no mean over samples. Seeds are the harness's defaults, so that numbers equal its own.

    Most tasks download their data. A task named in `files` reads a local file instead and needs no network: its
    definition is the installed harness's own with another data set, so prompt and metric cannot differ.

    Attributes:
        tasks: names of tasks, groups or tags of the harness, or of `task_folder`.
        files: {task: file} (.json, .jsonl, .csv, .tsv, .parquet) with the columns of the task's hub data set; for
            truthfulqa_mc1 and _mc2 also `mc_task.json` of the authors, for crows_pairs_english* also their CSV.
        task_folder: further task definitions (YAML). They may name Python functions: use your own only.
        limit: the first so many rows of each task.
        num_fewshot: null = what the task says.
        chat: put prompts into the tokenizer's chat template.
    """

    attacked = False

    tasks: list[str]
    files: dict[str, str] = field(default_factory=dict)
    task_folder: str | None = None
    limit: Count | None = None
    num_fewshot: Whole | None = None
    batch_size: Count = 8
    chat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks is {self.tasks}; name at least one task of lm-evaluation-harness, each once.")
        if stray := [task for task in self.files if task not in self.tasks]:
            raise ConfigError(f"files names {', '.join(stray)}, not among tasks: {', '.join(self.tasks)}.")
        if self.files and self.num_fewshot:
            raise ConfigError(
                "num_fewshot with files: a file has one split, so the examples would be test rows."
                " Drop num_fewshot, or the task from files."
            )

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        require_harness()
        import lm_eval

        with _restored(model), tempfile.TemporaryDirectory(prefix="repnoise-harness-") as folder:
            manager = _manager(tuple(self.tasks), self.task_folder)
            tasks = [self._load(manager, name, Path(folder)) for name in self.tasks]
            wrapped = _wrap(model, tokenizer, self.batch_size)
            try:
                results = lm_eval.simple_evaluate(
                    model=wrapped,
                    tasks=[each for task in tasks for each in (task if isinstance(task, list) else [task])],
                    task_manager=manager,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    bootstrap_iters=1000,
                    log_samples=True,
                    apply_chat_template=self.chat,
                )
            except (ValueError, KeyError, TypeError, AssertionError, TemplateError) as error:
                raise RunError(
                    f"lm-evaluation-harness failed on {', '.join(self.tasks)} ({type(error).__name__}: {error})."
                    " Check that the rows have the task's columns, or run its tasks one by one."
                ) from error
        return rows_of(results, seed)

    def _load(self, manager: Any, name: str, folder: Path) -> Any:
        """The task, group or list of tasks, data included."""
        spec = name if name not in self.files else local_task(manager, name, self.files[name], folder)
        try:
            loaded = manager.load([spec])
        except Exception as error:  # the hub client, the data set builder and the task may raise anything
            first = str(error).strip().split("\n")[0]
            raise DataError(
                f"the data of task {name!r} cannot be loaded ({type(error).__name__}: {first}). It comes from the hub:"
                f" check the network, or give a local file: files: {{{name}: PATH}}."
            ) from error
        return list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())


def require_harness() -> None:
    """Raise `MissingExtraError` if lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "The evaluation harness needs lm-evaluation-harness (lm-eval), which is not installed.\n"
            "Next step: pip install 'repnoise[harness]'"
        ) from None


@functools.lru_cache(maxsize=4)
def _manager(names: tuple[str, ...], task_folder: str | None) -> Any:
    """The harness's task manager, which knows all `names`.

    It reads every task file there is (some 14,000, which takes many seconds), so tasks whose file has their name are
    looked up alone first.
    """
    from lm_eval.tasks import TaskManager

    own = [task_folder] if task_folder is not None else []
    if task_folder is not None and not Path(task_folder).is_dir():
        raise ConfigError(f"task_folder {task_folder} is no folder. Give one that holds task definitions (.yaml).")
    places = [Path(sys.modules["lm_eval.tasks"].__file__ or "").parent.rglob(f"{name}.yaml") for name in names]
    found = [path.parent for paths in places for path in sorted(paths)[:1]]  # the harness takes the first too
    small = TaskManager(include_path=[*dict.fromkeys(map(str, found)), *own], include_defaults=False)
    if all(name in small.all_subtasks for name in names):
        return small
    full = TaskManager(include_path=own)
    for name in names:
        if name not in full.task_index:
            raise ConfigError(
                f"lm-evaluation-harness has no task {name!r}.{suggest(name, full.all_tasks)}"
                " `lm-eval ls tasks` lists all; tasks of your own go into task_folder."
            )
    return full


def local_task(manager: Any, name: str, source: str, folder: Path) -> str:
    """A task file in `folder`: the harness's definition of `name`, reading the rows of `source`.

    Raises:
        ConfigError: `name` is a group, so that one file cannot serve it.
        DataError: no file, no rows, missing columns.
    """
    path = manager.task_index[name].yaml_path
    if name not in manager.all_subtasks or path is None:
        raise ConfigError(f"files: {name} is a group of tasks, and one file cannot serve it. Name its tasks.")
    kind = next((each for each in NEEDED if name.startswith(each)), "")
    rows = table(source, NEEDED.get(kind, ()))
    if kind == "truthfulqa":
        rows = [{"question": r["question"], **{k: _listed(r[k]) for k in NEEDED[kind][1:]}} for r in rows]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "include": str(path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "fewshot_split": None,
        "test_split": SPLIT,
        "dataset_kwargs": {"data_files": {SPLIT: str(data)}, "cache_dir": str(folder / "cache")},
    }
    target = folder / f"{name}.yaml"
    target.write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(target)


def _listed(choices: Any) -> Any:
    """{answer: label} as the hub's {choices, labels}, the right answer of MC1 first, where the task looks for it."""
    if not isinstance(choices, Mapping) or set(choices) == {"choices", "labels"}:
        return choices
    pairs = sorted(choices.items(), key=lambda item: -int(item[1]))
    return {"choices": [answer for answer, _ in pairs], "labels": [int(label) for _, label in pairs]}


def _wrap(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's view of a model in memory, which refuses to cut prompts (its own would drop their beginning)."""
    from lm_eval.models.huggingface import HFLM

    class Strict(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self._refuse(requests, lambda a, b: len(self.tok_encode(a + b)) - 1)
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or are_progress_bars_disabled())

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self._refuse(requests, lambda a, b: len(self.tok_encode(a)) + int(b.get("max_gen_toks", self.max_gen_toks)))
            return super().generate_until(requests, disable_tqdm=disable_tqdm or are_progress_bars_disabled())

        def _refuse(self, requests: Any, length: Any) -> None:
            lengths = [((each.task_name, each.doc_id), length(*each.args)) for each in requests]
            long = {row for row, size in lengths if size > self.max_length}
            if long:
                raise DataError(
                    f"{len(long)} of {len({row for row, _ in lengths})} rows do not fit into the model's context of"
                    f" {self.max_length} tokens (the longest needs {max(size for _, size in lengths)}; tasks:"
                    f" {', '.join(sorted({str(name) for name, _ in long}))})."
                    " Nothing is cut: lower num_fewshot or leave these rows out."
                )

    # A copy: the harness sets a pad token.
    return Strict(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


@contextlib.contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Model settings, random numbers, log level and stdout as they were: the harness seeds everything and prints."""
    logger, config = logging.getLogger("lm_eval"), copy.deepcopy(getattr(model, "generation_config", None))
    level, numbers, arrays = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    try:
        with evaluating(model), torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(numbers)
        np.random.set_state(arrays)
        if config is not None:
            model.generation_config = config


def rows_of(results: Mapping[str, Any], seed: int) -> Measured:
    """Rows from what `simple_evaluate` returned."""
    found, parts = Measured(), results.get("group_subtasks", {})
    for name, values in results["results"].items():
        leaves = _leaves(name, parts)
        samples = [each for leaf in leaves for each in sorted(results["samples"][leaf], key=lambda s: s["doc_id"])]
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            label = f"{name}_{metric}" + ("" if chosen == "none" else f"_{chosen}")
            items = [each.get(metric) for each in samples if each["filter"] == chosen]
            if not _add_items(found, label, items, float(value), seed):
                found.rows.append(
                    {
                        "metric": label,
                        "value": float(value),
                        "n": len(items),
                        **_normal(float(value), values.get(f"{metric}_stderr,{chosen}")),
                        "seed": seed,
                        "split": "test",
                    }
                )
    if not found.rows:
        raise RunError("lm-evaluation-harness returned no number for these tasks; run them with `lm-eval` to see why.")
    return found


def _leaves(name: str, parts: Mapping[str, Sequence[str]]) -> list[str]:
    return [leaf for part in parts[name] for leaf in _leaves(part, parts)] if parts.get(name) else [name]


def _add_items(found: Measured, label: str, items: Sequence[Any], value: float, seed: int) -> bool:
    """A row with items, if `value` is their mean."""
    if not items or not all(isinstance(item, bool | int | float | np.number) for item in items):
        return False
    numbers = [float(item) for item in items]
    if not np.isclose(np.mean(numbers), value, rtol=1e-9, atol=1e-9):
        return False
    if set(numbers) <= {0.0, 1.0}:  # the harness does not say which of its metrics are rates
        found.add_rate(label, [bool(number) for number in numbers], seed=seed)
    else:
        found.add_score(label, numbers, seed=seed, bounds=None)
    return True


def _normal(value: float, error: Any) -> dict[str, float | None]:
    if not isinstance(error, float | int) or not math.isfinite(error):
        return {"lo": None, "hi": None}
    return {"lo": value - 1.96 * error, "hi": value + 1.96 * error}
