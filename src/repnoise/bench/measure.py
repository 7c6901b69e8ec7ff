"""Measure one case in a process of its own: python -m repnoise.bench.measure reads options, prints one JSON line."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, TrainerCallback

from ..data import StreamCollator
from ..errors import ModelError, RepNoiseError
from ..losses import IGNORE_INDEX
from ..models import add_lora
from ..training import ObjectiveTrainer
from ..training.arguments import training_arguments
from .cases import objective
from .flops import step_flops
from .shapes import SHAPES, WARMUP, BenchOptions


def measure(case: str, dtype: str, options: BenchOptions) -> dict[str, Any]:
    """Times in seconds, memory in bytes. Call it in a fresh process: the peak is the process's own.

    Memory is what came on top of the imports: of the process (VmHWM; Linux only, else None), or of the GPU's
    allocator. `memory_growth` and `time_growth` compare the last fifth of the steps with the first.
    """
    cuda = torch.cuda.is_available()
    before = _status("VmRSS")
    model = build_model(options, dtype, "cuda" if cuda else "cpu")
    watch = _Watch(cuda)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(model, case, options, folder, callbacks=[watch])
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
    flops = {} if options.lora_rank else step_flops(model, case, options)  # the formulas train all weights
    parameters = sum(p.numel() for p in model.parameters())
    del trainer, model
    gc.collect()
    return {
        "case": case,
        "dtype": dtype,
        "batch": options.batch,
        "seconds": median(watch.seconds),
        "all_seconds": [round(s, 4) for s in watch.seconds],
        "peak_bytes": peak if cuda or peak is None else peak - (before or 0),
        "time_growth": _growth(watch.seconds),
        "memory_growth": _growth(watch.held),
        "flops": flops,
        "parameters": parameters,
        "matmul_flops_per_second": matmul_rate(dtype, "cuda" if cuda else "cpu"),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
    }


def build_model(options: BenchOptions, dtype: str, device: str) -> Any:
    if options.shape in SHAPES:
        config: Any = LlamaConfig(**SHAPES[options.shape])
    else:
        try:
            config = AutoConfig.from_pretrained(options.shape, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no shape or model {options.shape!r}. Allowed: {', '.join(SHAPES)}, a model folder, a hub id."
            ) from error
    if options.layers is not None:
        config.get_text_config().num_hidden_layers = options.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: options.layers]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
        return model if options.lora_rank is None else add_lora(model, options.lora_rank)


def build_trainer(model: Any, case: str, options: BenchOptions, folder: str, **more: Any) -> ObjectiveTrainer:
    """The product's trainer on random pairs; `more` are further arguments of it."""
    values = {
        "max_steps": WARMUP + options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        **options.train,
    }
    return ObjectiveTrainer(
        model=model,
        objective=objective(case, options.lens_layers),
        args=training_arguments(values, Path(folder), "train"),
        train_dataset=_Pairs(options, model.config.get_text_config().vocab_size),
        data_collator=StreamCollator(0),
        **more,
    )


def matmul_rate(dtype: str, device: str) -> float:
    """Operations per second of one large square product in this dtype: what the machine can do, by measurement."""
    size = 8192 if device == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    rates = []
    for _ in range(6):
        _synchronize(device == "cuda")
        start = time.perf_counter()
        a @ a
        _synchronize(device == "cuda")
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates)


class _Pairs(Dataset):
    """Random ids of equal length: {stream: {input_ids, labels}}, the question's labels -100."""

    def __init__(self, options: BenchOptions, vocabulary: int) -> None:
        self.options, self.vocabulary = options, vocabulary

    def __len__(self) -> int:
        return self.options.batch * (WARMUP + self.options.steps)

    def __getitem__(self, index: int) -> dict[str, dict[str, list[int]]]:
        draw = torch.Generator().manual_seed(index)
        item = {}
        for stream in ("harmful", "harmless"):
            ids = torch.randint(self.vocabulary, (self.options.length,), generator=draw).tolist()
            question = self.options.length - self.options.answer_tokens
            item[stream] = {"input_ids": ids, "labels": [IGNORE_INDEX] * question + ids[question:]}
        return item


class _Watch(TrainerCallback):
    """Seconds of each timed step, and the memory held after it."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.seconds: list[float] = []
        self.held: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _synchronize(self.cuda)
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _synchronize(self.cuda)
        if state.global_step > WARMUP:
            self.seconds.append(time.perf_counter() - self._start)
            self.held.append(torch.cuda.memory_allocated() if self.cuda else _status("VmRSS") or 0)


def _growth(values: list[float]) -> float | None:
    """Median of the last fifth over that of the first, minus 1; None for fewer than ten steps."""
    fifth = len(values) // 5
    return median(values[-fifth:]) / median(values[:fifth]) - 1 if fifth >= 2 and median(values[:fifth]) else None


def _status(key: str) -> int | None:
    """Bytes by /proc/self/status. Not ru_maxrss: a child inherits the peak of the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _attempt(case: str, dtype: str, options: BenchOptions) -> dict[str, Any] | None:
    """A result, {"wrong": message}, or None where the GPU's memory is too small."""
    try:
        return measure(case, dtype, options)
    except torch.OutOfMemoryError:
        return None
    except RepNoiseError as error:
        return {"wrong": str(error)}


def main() -> None:
    """Options on stdin; a result or {"error": ...} on stdout. Out of GPU memory: half the batch, down to 2."""
    given = json.load(sys.stdin)
    logging.disable(logging.WARNING)
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given["options"].items()}
    options = BenchOptions(**fields)
    while (result := _attempt(given["case"], given["dtype"], options)) is None and options.batch >= 4:
        options = dataclasses.replace(options, batch=options.batch // 2)
        gc.collect()  # only now: inside `except` the traceback still holds the model
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if result is None:
        result = {"error": f"does not fit: out of GPU memory with {options.batch} pairs"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
