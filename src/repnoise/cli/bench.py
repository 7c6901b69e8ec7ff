"""The verb bench: what the objective costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.shapes import CASES, DEFAULT_CASES, DTYPES, SHAPES, BenchOptions
from ..errors import ConfigError
from .common import AsJson, output, say

app = typer.Typer()
_DEFAULT = BenchOptions()


@app.command()
def bench(
    shape: Annotated[
        str, typer.Argument(help=f"{', '.join(SHAPES)}, a model folder or a hub id; weights are random.")
    ] = _DEFAULT.shape,
    train: Annotated[
        list[str] | None,
        typer.Argument(help="transformers.TrainingArguments: name=value.", show_default=False),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(CASES)}. Default: {', '.join(DEFAULT_CASES)}.", show_default=False),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(DTYPES)}. Default: {', '.join(_DEFAULT.dtypes)}.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed steps, after one that is not.")] = _DEFAULT.steps,
    batch: Annotated[int, typer.Option(help="Pairs per step.")] = _DEFAULT.batch,
    length: Annotated[int, typer.Option(help="Tokens of each side.")] = _DEFAULT.length,
    answers: Annotated[float, typer.Option(help="Share of them that is the answer.")] = _DEFAULT.answers,
    lens_layers: Annotated[int, typer.Option(help="Layers per step in the case sampled.")] = _DEFAULT.lens_layers,
    layers: Annotated[int | None, typer.Option(help="Blocks, if not the shape's own number.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Train LoRA of this rank instead of the weights.")] = None,
    four_bit: Annotated[
        bool, typer.Option("--four-bit", help="Base in 4 bits under the LoRA; with --memory only.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="No training: the peak by the memory model, and which GPU it fits.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .json file for the result.")] = None,
    as_json: AsJson = False,
) -> None:
    """Step time and peak memory of the objective, as ratios to plain fine-tuning and to the naive formula.

    Each case runs in a process of its own, on the GPU if there is one. Cases: plain (both sides, no defence), naive
    (all logits kept), exact (the defence), sampled (its lens on a few layers per step), joined (exact, both sides in
    one forward pass).

    Examples:

      repnoise bench

      repnoise bench llama-2-7b --dtype bfloat16 --batch 8 --length 256 optim=adamw_8bit

      repnoise bench --case exact --dtype float32 --steps 500 --json

      repnoise bench llama-2-7b --memory --case exact --dtype bfloat16 --batch 8 --length 256 optim=adamw_8bit
    """
    if out is not None and (out.suffix != ".json" or out.exists()):
        raise ConfigError(f"--out {out}: give a .json file that does not exist yet.")
    options = BenchOptions(
        shape=shape,
        cases=tuple(case or DEFAULT_CASES),
        dtypes=tuple(dtype or _DEFAULT.dtypes),
        steps=steps,
        batch=batch,
        length=length,
        answers=answers,
        lens_layers=lens_layers,
        layers=layers,
        lora_rank=lora_rank,
        four_bit=four_bit,
        train=_arguments(train or []),
    )
    if four_bit and not memory:
        raise ConfigError("--four-bit is a model of memory, nothing trains on it here; add --memory.")
    result, as_text = _modelled(options) if memory else _measured(options)
    if out is not None:
        from ..store.files import write_json

        write_json(out, result)
    output(result, as_json, as_text)


def _measured(options: BenchOptions) -> tuple[dict[str, Any], Callable[[], str]]:
    from ..bench.table import as_text, run_bench

    result = run_bench(options, say)
    return result, lambda: as_text(result)


def _modelled(options: BenchOptions) -> tuple[dict[str, Any], Callable[[], str]]:
    from ..bench.memory import as_text, step_memory

    rows = [step_memory(case, dtype, options) for dtype in options.dtypes for case in options.cases]
    return {"options": dataclasses.asdict(options), "rows": rows}, lambda: as_text(rows, options)


def _arguments(given: list[str]) -> dict[str, Any]:
    from ..recipes.reading import parse_yaml

    values = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{text!r} is not name=value; give TrainingArguments such as optim=adafactor.")
        values[name.removeprefix("train.")] = parse_yaml(value, text)
    return values
