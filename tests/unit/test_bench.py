"""What a step costs: the cases compute the same objective, the operations are counted right, the memory is bounded."""

from __future__ import annotations

import ast
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from repnoise.bench import table
from repnoise.bench.cases import broadcast_mmd, objective
from repnoise.bench.flops import step_flops
from repnoise.bench.measure import build_model
from repnoise.bench.shapes import CASES, BenchOptions
from repnoise.cli import main
from repnoise.errors import ConfigError, RunError
from repnoise.losses import gaussian_kernel_mmd


def batch(options: BenchOptions, vocabulary: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    streams = {}
    for name in ("harmful", "harmless"):
        ids = torch.randint(vocabulary, (options.batch, options.length), generator=draw)
        labels = ids.clone()
        labels[:, : options.length - options.answer_tokens] = -100
        streams[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return streams


class Counter(TorchDispatchMode):
    """torch.utils.flop_counter without its hooks on modules, which fail at autograd.grad within a forward pass."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture
def tiny() -> tuple[Any, BenchOptions]:
    options = BenchOptions("tiny", batch=3, length=16)
    model = build_model(options, "float32", "cpu")
    model.set_attn_implementation("eager")
    return model, options


def test_naive_and_exact_are_one_objective(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = tiny
    given = batch(options, 8000)
    found: dict[str, Any] = {}
    draws = torch.zeros(options.batch, options.length, 64)
    start = options.length - options.answer_tokens
    draws[:, start:] = torch.randn(options.batch, options.answer_tokens, 64, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "randn_like", lambda h: draws)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: draws[:, start:])
    for case in ("naive", "exact"):
        model.zero_grad()
        terms = objective(case, 4).terms(model, given)
        sum(terms.values()).backward()
        found[case] = (terms, {n: p.grad.clone() for n, p in model.named_parameters()})
    naive, exact = found["naive"], found["exact"]
    assert set(naive[0]) == set(exact[0]) == {"ascent", "noise", "stability"}
    for name in naive[0]:
        torch.testing.assert_close(naive[0][name], exact[0][name], rtol=1e-5, atol=1e-7)
    for name, gradient in naive[1].items():
        torch.testing.assert_close(gradient, exact[1][name], rtol=1e-4, atol=1e-6)


def test_broadcast_mmd_is_the_gram_form() -> None:
    x, y = torch.randn(5, 7, dtype=torch.float32), torch.randn(5, 7) + 1
    torch.testing.assert_close(broadcast_mmd(x, y), gaussian_kernel_mmd(x, y), rtol=1e-5, atol=1e-6)


def test_joined_is_exact_in_one_pass(tiny: Any) -> None:
    model, options = tiny
    given = batch(options, 8000)
    short = {name: tensor[:, :-5] for name, tensor in given["harmless"].items()}
    found: dict[str, Any] = {}
    for case in ("joined", "exact"):
        model.zero_grad()
        passes: list[int] = []
        hook = model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        terms = objective(case, 4).terms(model, {**given, "harmless": short})
        hook.remove()
        sum(terms.values()).backward()
        found[case] = (terms, {n: p.grad.clone() for n, p in model.named_parameters()}, len(passes))
    joined, exact = found["joined"], found["exact"]
    assert (joined[2], exact[2]) == (1, 2)
    for name in exact[0]:
        torch.testing.assert_close(joined[0][name], exact[0][name], rtol=1e-5, atol=1e-7)
    for name, gradient in exact[1].items():
        torch.testing.assert_close(joined[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lens_layers", [2, 5])
def test_operations_are_those_that_torch_counts(case: str, lens_layers: int, tiny: Any) -> None:
    model, options = tiny
    options = dataclasses.replace(options, lens_layers=lens_layers)
    given = batch(options, 8000)
    with Counter() as counter:
        sum(objective(case, options.lens_layers).terms(model, given).values()).backward()
    # the counter sees the noise of sums over a few rows as well; the lens and the blocks must fit to a thousandth
    assert sum(step_flops(model, case, options).values()) == pytest.approx(counter.total, rel=2e-3)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    options = BenchOptions("tiny", steps=3, batch=8, dtypes=("float32",), layers=10, lens_layers=1)
    result = table.run_bench(options)
    few = {
        case: table.in_fresh_process(case, "float32", dataclasses.replace(options, layers=4))
        for case in ("plain", "exact")
    }
    return {**result, "rows": {row["case"]: row for row in result["rows"]}, "few": few}


@pytest.mark.bench
def test_memory_of_the_exact_objective(measured: dict[str, Any]) -> None:
    """The lens keeps no list of logits: little above plain fine-tuning, and no more per added layer than that."""
    layer = 8 * 128 * 24_000 * 4  # float32 logits of one layer at all positions
    many = {case: row["peak_bytes"] for case, row in measured["rows"].items()}
    few = {case: row["peak_bytes"] for case, row in measured["few"].items()}
    for peak in (many, few):
        assert peak["exact"] <= 1.1 * peak["plain"] + layer, measured
    growth = {case: many[case] - few[case] for case in few}  # by six layers; plain pays for their weights too
    assert growth["exact"] - growth["plain"] < layer, (many, few)
    # the formula with the logits of all layers kept must break the bounds: else this test could not fail
    assert many["naive"] > 1.1 * many["plain"] + 10 * layer


@pytest.mark.bench
def test_ratios_with_wide_margins(measured: dict[str, Any]) -> None:
    """Where the lens is most of the work; on the real shape see docs/speed.md."""
    rows = measured["rows"]
    assert rows["exact"]["time_vs_naive"] < 1.1
    assert rows["exact"]["memory_vs_naive"] < 0.5
    assert rows["sampled"]["time_vs_naive"] < 0.7
    assert rows["plain"]["time_vs_plain"] == 1.0
    assert 0.01 < rows["plain"]["mfu"] < 1.2


def test_a_case_is_measured_in_a_process_of_its_own() -> None:
    """How much is for `make bench-check`; here: that there are numbers, and where they were taken."""
    result = table.run_bench(BenchOptions("tiny", steps=1, layers=1, cases=("exact",), dtypes=("float32",), length=8))
    (row,) = result["rows"]
    assert "error" not in row, row
    assert min(row["seconds"], row["tokens_per_second"], row["mfu"], row["matmul_flops_per_second"]) > 0
    where = result["environment"]
    assert where["threads"] >= 1
    assert {"cpu", "cores", "features", "load", "device", "versions"} <= set(where)
    assert "exact" in table.as_text(result)


def test_only_bench_tests_look_at_the_clock() -> None:
    """`make test` is green on every machine, however slow and busy: waiting has limits, nothing else has."""
    tests = Path(__file__).parent.parent
    wrong = []
    for path in tests.rglob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "perf_" + "counter" in ast.unparse(node):
                marked = any("mark.bench" in ast.unparse(each) for each in node.decorator_list)
                wrong += [] if marked else [f"{path.name}::{node.name}"]
    assert wrong == []


def test_a_case_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"case": "plain", "dtype": "float32", "batch": 4, "seconds": 2.0, "peak_bytes": 10, "flops": {"a": 8}}
    good |= {"matmul_flops_per_second": 8.0, "device": "cpu", "threads": 1}
    answers = {"plain": good, "naive": {"case": "naive", "dtype": "float32", "error": "killed by signal 9"}}
    monkeypatch.setattr(table, "in_fresh_process", lambda case, dtype, options: dict(answers[case]))
    result = table.run_bench(BenchOptions(cases=("plain", "naive"), dtypes=("float32",)))
    assert result["rows"][0]["mfu"] == 0.5
    assert "time_vs_naive" not in result["rows"][0]
    assert "killed by signal 9" in table.as_text(result)
    monkeypatch.setattr(table, "in_fresh_process", lambda *a: dict(answers["naive"]))
    with pytest.raises(RunError, match="nothing could be measured"):
        table.run_bench(BenchOptions(cases=("naive",)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cases": ("fast",)}, "case fast: allowed are plain"),
        ({"dtypes": ("int8",)}, "dtype int8"),
        ({"steps": 0}, "steps must be 1"),
        ({"answers": 0.0}, "answers is a share"),
        ({"layers": 0}, "layers must be 1"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchOptions(**wrong)


def test_wrong_shape_and_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "no-such-shape", "--case", "plain", "--dtype", "float32"]) == 2
    assert "no shape or model 'no-such-shape'" in capsys.readouterr().err
    assert main(["bench", "tiny", "optim"]) == 2
    assert "optim=adafactor" in capsys.readouterr().err
