"""The memory model against measured peaks, and what it says about shapes that no CPU could measure."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from types import CodeType
from typing import Any

import pytest
import torch

from repnoise.bench import memory, table
from repnoise.bench.memory import step_memory
from repnoise.bench.shapes import SHAPES, BenchOptions
from repnoise.bench.tracker import tracked
from repnoise.cli import main
from repnoise.errors import ConfigError

SMALL = BenchOptions("smollm2-135m", layers=1, batch=2, length=32, steps=1)
TINY = BenchOptions("tiny", layers=2, batch=2, length=16)


def peak(case: str, options: BenchOptions, dtype: str = "float32") -> int:
    found: int = step_memory(case, dtype, options)["peak_bytes"]
    return found


def of(row: dict[str, Any], *names: str) -> int:
    return sum(size for name, size in row["terms"].items() if name.startswith(names))


def test_the_tracker_follows_storages_to_their_end() -> None:
    with tracked(lambda tensor: f"{tensor.dim()}d") as tracker:
        x = torch.empty(1000, requires_grad=True)
        ids = torch.tensor([True, False, True]).nonzero()
        view = x[2:]
        y = (x * 2).view(10, 100)
        assert len(view) == 998
        assert tracker.now == {"1d": 8000}
        y.sum().backward()
        del y, view
        assert len(ids) == 2, "integers are real"
        assert x.mean().item() == 1
    assert {name: size for name, size in tracker.now.items() if size} == {"1d": 8000}, "x and its gradient"
    assert sum(tracker.peak.values()) == 12_008, "for a moment y, with a sum and its gradient of one number each"


@pytest.mark.bench
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_model_meets_measured_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what the exact objective takes on top of plain fine-tuning here is the lens' gradient of the head.

    What the process takes besides tensors cancels out in the difference of two cases.
    """
    monkeypatch.setitem(os.environ, "MALLOC_MMAP_THRESHOLD_", "65536")  # glibc gives large blocks back at once
    for dtype in ("float32", "bfloat16"):
        real = {case: table.in_fresh_process(case, dtype, SMALL)["peak_bytes"] for case in ("plain", "exact")}
        model = {case: step_memory(case, dtype, SMALL, cpu=True) for case in ("plain", "exact")}
        for case, row in model.items():
            assert row["peak_bytes"] < real[case] < 1.1 * row["peak_bytes"] + 40 * 2**20
        difference = real["exact"] - real["plain"]
        assert model["exact"]["peak_bytes"] - model["plain"]["peak_bytes"] == pytest.approx(difference, rel=0.25)
        without = model["exact"]["peak_bytes"] - of(model["exact"], "lens")
        assert without - model["plain"]["peak_bytes"] != pytest.approx(difference, rel=0.25), "the test could not fail"


def test_terms_that_are_known_to_the_byte() -> None:
    row = step_memory("exact", "bfloat16", TINY)
    weights = row["parameters"] * 2
    assert of(row, "weights") == pytest.approx(weights, rel=1e-3)  # rotary frequencies are buffers
    assert of(row, "optimiser states") == pytest.approx(2 * weights, rel=1e-3)
    assert sum(row["terms"].values()) == row["peak_bytes"]
    assert row["needed_bytes"] == round(1.1 * row["peak_bytes"]) + 2**30
    eight = step_memory("exact", "bfloat16", dataclasses.replace(TINY, train={"optim": "adamw_8bit"}))
    embedding = 24_000 * 64
    rest = row["parameters"] - embedding
    assert of(eight, "optimiser states") == pytest.approx(8 * embedding + rest * (2 + 8 / 256), rel=0.02)
    lora = dataclasses.replace(TINY, lora_rank=4)
    four = dataclasses.replace(lora, four_bit=True)
    kept = [of(step_memory("exact", "bfloat16", options), "weights") for options in (lora, four)]
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert kept[0] - kept[1] == linear * 2 - linear // 2 - 4 * linear // 64


def test_more_layers_cost_the_exact_objective_less_than_the_logits_of_one() -> None:
    """Beyond what they cost plain fine-tuning; the naive formula pays for the logits of each."""
    options = BenchOptions("smollm2-135m", batch=4, length=64)
    few, many = (dataclasses.replace(options, layers=layers) for layers in (3, 9))
    logits = 4 * 64 * 49_152 * 4
    growth = {case: peak(case, many) - peak(case, few) for case in ("plain", "exact", "sampled", "naive")}
    assert growth["exact"] - growth["plain"] < logits, growth
    assert growth["sampled"] - growth["plain"] < logits, growth
    assert growth["naive"] - growth["plain"] > 6 * logits, growth


def test_every_place_of_the_table_is_found_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that nothing reaches any more, after a rename or a new torch, would be counted as "other" silently."""
    seen: set[str] = set()
    place = memory._Purpose._place

    def watched(self: memory._Purpose, code: CodeType) -> str | None:
        found = place(self, code)
        seen.add(str(found))
        return found

    monkeypatch.setattr(memory._Purpose, "_place", watched)
    step_memory("exact", "bfloat16", dataclasses.replace(TINY, train={"gradient_checkpointing": True}))
    assert set(memory._ORDER) <= seen
    seen.clear()
    step_memory("naive", "bfloat16", dataclasses.replace(TINY, train={"optim": "adamw_8bit"}))
    assert set(memory._ORDER) - {"lens", memory.AGAIN} <= seen


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-2-13b", 13_015_864_320),
    ],
)
def test_shapes_are_the_published_ones(shape: str, parameters: int) -> None:
    """Numbers of parameters as the model cards give them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape])).num_parameters() == parameters


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["bench", "tiny", "--memory", "--case", "plain", "--dtype", "float32", "--batch", "2", "--length", "8"]
    assert main([*options, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["fits"] == {"24": True, "48": True, "80": True}
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert "optimiser states" in shown
    assert "fits in 24 GiB" in shown
    assert main(["bench", "tiny", "--four-bit", "--lora-rank", "4"]) == 2
    assert "add --memory" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the model knows adamw_8bit"):
        step_memory("plain", "float32", dataclasses.replace(TINY, train={"optim": "lion_8bit"}))
    with pytest.raises(ConfigError, match="set lora_rank"):
        BenchOptions(four_bit=True)
