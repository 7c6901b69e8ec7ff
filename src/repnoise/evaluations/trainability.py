"""Trainability: can a fresh copy of the model still learn a harmless task? (paper: fourth condition, table 4)"""

from __future__ import annotations

import copy
import importlib
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ..data import Row, Template, get_template, load_rows, normalise
from ..data.collate import RowDataset
from ..data.parties import StudyData
from ..errors import ConfigError, DataError, MissingExtraError, RunError
from ..models import add_lora, context_size
from ..recipes.ranges import Count, Positive
from ..recipes.schema import SourceConfig
from ..sandbox.world import FACT_SLOTS, MAKE, TEST_PHRASING, Item, world
from ..training import ObjectiveTrainer, PlainFineTuning
from ..training.arguments import TRAIN_DEFAULTS, training_arguments
from .base import EVALUATIONS, Evaluation, Measured
from .generation import Decoding, generate

SANDBOX = "sandbox:"
REPORT_SLOTS = (1, 3, 7)  # time, agent and place in "by TIME the AGENT was at the PLACE"
BATCH = 64
"""Test prompts answered at a time."""
EXACT = "_exact"
"""Suffix of the metric that is a rate: the whole answer is right."""
SET_HERE = {  # TrainingArguments that have an option of their own, or must be so
    "output_dir": "nothing is kept",
    "save_strategy": "nothing is kept",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size",
    "seed": "seeds",
    "data_seed": "seeds",
}


@dataclass
class Task:
    """What is learned, and how answers are scored: (row, answer) -> metric suffix -> value."""

    train: list[Row]
    test: list[Row]
    template: Template
    max_length: int
    score: Callable[[Row, str], dict[str, float | bool]]


@EVALUATIONS.register("trainability")
@dataclass(kw_only=True)
class Trainability(Evaluation):
    """`trainability`: score on held-out rows of a harmless task after training a fresh copy of the model on it, with a
    row per seed; with `curve` also along the training (rows with `step`). The score is ROUGE-1 F1 of the generated
    answer, as in the paper; `trainability_rougeL` and `trainability_exact` (whole answer equal) stand beside it.
    In the sandbox the score is the share of the answer's content words at their places, without ROUGE.

    Where we differ from the paper: the loss counts the answer only (theirs the prompt and the pads too), the answer
    ends with an end mark, decoding is greedy, and test prompts that were trained on are refused.

    Attributes:
        train: source of rows, for example `e2e:PATH` or {source, split, options}; `sandbox:facts` (new facts, asked in
            a new phrasing) or `sandbox:report` (slots to a sentence). null: `sandbox:facts`, in the sandbox only.
        test: source of held-out rows; the sandbox brings its own.
        limit_train, limit_test: this many rows, drawn at random, the same for every model and seed.
        overlap: test prompts that the training rows or the defender hold: "refuse", or "drop" them.
        steps, learning_rate, batch_size: cosine schedule with 10 % warm-up, no weight decay, AdamW.
        curve: steps at which the test rows are asked on the way, 0 = before any training.
        template: null: the sandbox's own, else the source's prompt as it is.
        max_length: tokens; null: that of the study's data.
        train_arguments: further `transformers.TrainingArguments`.
    """

    attacked = False

    train: str | SourceConfig | None = None
    test: str | SourceConfig | None = None
    limit_train: Count | None = None
    limit_test: Count | None = 200
    overlap: Literal["refuse", "drop"] = "refuse"
    steps: Count = 100
    learning_rate: Positive = 3e-4
    batch_size: Count = 16
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    curve: list[int] = field(default_factory=list)
    max_new_tokens: Count = 25
    lora_rank: Count | None = None
    template: str | None = None
    max_length: Count | None = None
    train_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {self.seeds}; allowed: at least one whole number, none twice.")
        if any(not 0 <= step <= self.steps for step in self.curve):
            raise ConfigError(f"curve is {self.curve}; allowed: steps from 0 to steps ({self.steps}).")
        if self.template is not None:
            get_template(self.template)
        self._check_sources()
        self._check_arguments()

    def _check_sources(self) -> None:
        name = _name(self.train)
        if name.startswith(SANDBOX) and name not in SANDBOX_TASKS:
            raise ConfigError(f"train is {name}; the sandbox has {', '.join(SANDBOX_TASKS)}.")
        own = self.train is None or name in SANDBOX_TASKS
        if own and self.test is not None:
            raise ConfigError(f"test is {_name(self.test)}, but the sandbox brings its own test rows; drop it.")
        if not own and self.test is None:
            raise ConfigError(f"train is {name}, but test is missing; give a source of held-out rows.")

    def _check_arguments(self) -> None:
        for key in sorted(set(self.train_arguments) & set(SET_HERE)):
            raise ConfigError(f"train_arguments.{key} cannot be set here: {SET_HERE[key]}. Drop it.")
        self._arguments("unused", 0, cpu=True)

    def _arguments(self, folder: str, seed: int, *, cpu: bool) -> TrainingArguments:
        values = {
            **TRAIN_DEFAULTS,
            "use_cpu": cpu,
            "dataloader_pin_memory": not cpu,
            "logging_strategy": "no",
            "disable_tqdm": True,
            **self.train_arguments,
            "save_strategy": "no",
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.batch_size,
            "seed": seed,
        }
        return training_arguments(values, Path(folder), "train_arguments")

    # -- measuring

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        """`seed` is not used: the recipe's own `seeds` are, so that every model is trained in the same ways."""
        task = self._task(model, tokenizer, data)
        decoding = Decoding(max_new_tokens=self.max_new_tokens, batch_size=BATCH)
        found = Measured()
        for own in self.seeds:
            with _own_random_numbers():
                answers = self._answers(model, tokenizer, task, decoding, own)
            for step, texts in answers.items():
                keys: dict[str, Any] = {
                    "seed": own,
                    "decoding": str(decoding),
                    **({} if step is None else {"step": step}),
                }
                scores = [task.score(row, text) for row, text in zip(task.test, texts, strict=True)]
                for suffix in scores[0]:
                    add: Any = found.add_rate if suffix == EXACT else found.add_score
                    add(f"trainability{suffix}", [each[suffix] for each in scores], **keys)
            for row, text in zip(task.test, answers[None], strict=True):
                said = {"prompt": row.prompt, "answer": text, "reference": row.answer}
                found.samples.append({"seed": own, **said, **task.score(row, text)})
        return found

    def _answers(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, decoding: Decoding, seed: int
    ) -> dict[int | None, list[str]]:
        """Answers to the test rows at each step of the curve, and under None at the end of the training of a copy."""
        answers: dict[int | None, list[str]] = {}
        prompts = [row.prompt for row in task.test]

        def ask(now: Any, step: int | None) -> None:
            answers[step] = generate(now, tokenizer, prompts, task.template, decoding)

        learner = copy.deepcopy(model)
        for parameter in learner.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)  # whoever has the weights can train them
        if 0 in self.curve:
            ask(learner, 0)
        torch.manual_seed(seed)
        if self.lora_rank is not None:
            learner = add_lora(learner, self.lora_rank)
        cpu = next(model.parameters()).device.type == "cpu"
        with tempfile.TemporaryDirectory(prefix="repnoise-trainability-") as folder:
            trainer = ObjectiveTrainer(
                model=learner,
                objective=PlainFineTuning(),
                args=self._arguments(folder, seed, cpu=cpu),
                train_dataset=RowDataset(
                    task.train, tokenizer, "rows", template=task.template, max_length=task.max_length
                ),
                processing_class=tokenizer,
                callbacks=[_Points([step for step in self.curve if 0 < step < self.steps], ask)],
            )
            try:
                trainer.train()
            except RunError as error:
                raise RunError(f"trainability, seed {seed}: {error}") from error
        if self.steps in self.curve:
            ask(trainer.model, self.steps)
        ask(trainer.model, None)
        return answers

    # -- data

    def _task(self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData) -> Task:
        task = self._sandbox_task(tokenizer, data) if self._in_sandbox() else self._source_task(data)
        context = context_size(model)
        if task.max_length > context:
            raise ConfigError(
                f"trainability: max_length is {task.max_length}, but the model's context has {context} tokens."
                f" Set max_length: {context} or less."
            )
        task.train = _draw(task.train, self.limit_train)
        task.test = _draw(self._held_out(task, data), self.limit_test)
        return task

    def _in_sandbox(self) -> bool:
        return self.train is None or _name(self.train) in SANDBOX_TASKS

    def _sandbox_task(self, tokenizer: PreTrainedTokenizerBase, data: StudyData) -> Task:
        name = _name(self.train) or f"{SANDBOX}facts"
        unknown = len(set(world().vocabulary) - set(tokenizer.get_vocab()))
        if unknown:
            raise ConfigError(
                f"trainability: train is {_name(self.train) or 'null'}, a task in the sandbox's own words, and this"
                f" model's tokenizer lacks {unknown} of them. Give train and test sources, for example e2e:PATH."
            )
        train, test, slots = SANDBOX_TASKS[name]()

        def score(row: Row, answer: str) -> dict[str, float | bool]:
            item = Item("new", row.prompt, row.answer, slots)
            return {"": item.score(answer), EXACT: answer.split() == row.answer.split()}

        return Task(train, test, get_template(self.template or data.template), self._length(data), score)

    def _source_task(self, data: StudyData) -> Task:
        assert self.train is not None  # __post_init__ has checked both
        assert self.test is not None
        score = _rouge()  # first: reading may take long
        template = get_template(self.template or "{prompt}")
        return Task(_rows(self.train), _rows(self.test), template, self._length(data), score)

    def _length(self, data: StudyData) -> int:
        return self.max_length or data.max_length

    def _held_out(self, task: Task, data: StudyData) -> list[Row]:
        """Test rows whose prompt nobody trained on. Raises `DataError` as `overlap` says."""
        known: set[str] = {normalise(row.prompt) for row in task.train}
        known |= {normalise(row.prompt) for row in data.retain} | {normalise(pair.prompt) for pair in data.defence}
        clean = [row for row in task.test if normalise(row.prompt) not in known]
        shared = len(task.test) - len(clean)
        if shared and (self.overlap == "refuse" or not clean):
            raise DataError(
                f"trainability: the prompts of {shared} of {len(task.test)} test rows are also in the training rows or"
                " in the defender's data (case, punctuation and spacing ignored). That would measure memory. Give"
                " other test rows, or set overlap: drop to leave these out."
            )
        return clean


def _name(source: str | SourceConfig | None) -> str:
    return source.source if isinstance(source, SourceConfig) else source or ""


def _rows(source: str | SourceConfig) -> list[Row]:
    config = source if isinstance(source, SourceConfig) else SourceConfig(source=source)
    return load_rows(
        config.source, split=config.split, limit=config.limit, fields=config.fields, options=config.options
    )


def _draw(rows: list[Row], limit: int | None) -> list[Row]:
    """`limit` rows at random in the rows' order; such files are sorted, so the first rows would be all alike."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(0).sample(range(len(rows)), limit))]


def _report() -> tuple[list[Row], list[Row], tuple[int, ...]]:
    return world().new_task("train"), world().new_task("test"), REPORT_SLOTS


def _facts() -> tuple[list[Row], list[Row], tuple[int, ...]]:
    """Facts cannot be guessed, so the test asks for the learned ones, in a phrasing that their training had not."""
    rows = [[Row(ask.format(name=fact.name), fact.answer, "new") for ask in MAKE] for fact in world().new_facts]
    test = [each[TEST_PHRASING] for each in rows]
    return [row for each in rows for row in each if row not in test], test, FACT_SLOTS


SANDBOX_TASKS = {f"{SANDBOX}report": _report, f"{SANDBOX}facts": _facts}


# ---- training and scoring -----------------------------------------------------------------------------------


class _Points(TrainerCallback):
    """Asks on the way. Greedy answers draw no random numbers, so the training goes on as without."""

    def __init__(self, steps: Sequence[int], ask: Callable[[Any, int | None], None]) -> None:
        self.steps, self.ask = frozenset(steps), ask

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.ask(model, state.global_step)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """The trainer seeds every global generator; the caller's come back as they were."""
    python, array = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)


def _rouge() -> Callable[[Row, str], dict[str, float | bool]]:
    """F1 of ROUGE-1 and ROUGE-L by the rouge-score package, without stemming: words of letters and digits, folded."""
    try:
        scorer: Any = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"])
    except ImportError:
        raise MissingExtraError(
            "trainability scores answers with ROUGE and needs the rouge-score package, which is not installed.\n"
            "Next step: pip install 'repnoise[rouge]'"
        ) from None

    def score(row: Row, answer: str) -> dict[str, float | bool]:
        found = scorer.score(row.answer, answer)
        exact = answer.split() == row.answer.split()
        return {"": found["rouge1"].fmeasure, "_rougeL": found["rougeL"].fmeasure, EXACT: exact}

    return score
