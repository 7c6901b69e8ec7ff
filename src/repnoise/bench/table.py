"""Run all cases, each in a fresh process, and set them in relation."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError, RunError
from .machine import machine
from .shapes import BenchOptions

FAILED_LINES = 3


def run_bench(options: BenchOptions, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure every case in every dtype; ratios are of the time per token and of the peak memory.

    Returns:
        {"options", "environment", "rows"}. A row is what `measure.measure` returns, with `tokens_per_second`
        (both sides, padding included), `mfu` (model FLOPs utilisation: operations of the formula per second, by
        the rate of one large matrix product in the same dtype here; not for LoRA) and the ratios
        `time_vs_plain` (same dtype), `time_vs_naive`, `memory_vs_plain`, `memory_vs_naive` (naive: of the first
        dtype given). A case that failed has `error` instead.

    Raises:
        ConfigError: the shape or a training argument is wrong. RunError: no case could be measured.
    """
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for case in options.cases:
            say(f"bench: {case} {dtype}")
            rows.append(in_fresh_process(case, dtype, options))
    good = [row for row in rows if "error" not in row]
    if not good:
        raise RunError(f"nothing could be measured; {rows[0]['case']}: {rows[0]['error']}")
    best = {d: max(r["matmul_flops_per_second"] for r in good if r["dtype"] == d) for d in {r["dtype"] for r in good}}
    for row in good:
        row["tokens_per_second"] = 2 * row["batch"] * options.length / row["seconds"]
        if row["flops"]:
            row["mfu"] = sum(row["flops"].values()) / row["seconds"] / best[row["dtype"]]
    for row in good:
        for name, dtype in (("plain", row["dtype"]), ("naive", options.dtypes[0])):
            other = next((r for r in good if r["case"] == name and r["dtype"] == dtype), None)
            if other is None:
                continue
            row[f"time_vs_{name}"] = other["tokens_per_second"] / row["tokens_per_second"]
            if other["peak_bytes"] and row["peak_bytes"] and other["batch"] == row["batch"]:
                row[f"memory_vs_{name}"] = row["peak_bytes"] / other["peak_bytes"]
    return {
        "options": dataclasses.asdict(options),
        "environment": {"device": good[0]["device"], "threads": good[0]["threads"], **machine()},
        "rows": rows,
    }


def as_text(result: dict[str, Any]) -> str:
    """The table for a terminal."""
    from rich.console import Console
    from rich.table import Table

    options, where = result["options"], result["environment"]
    naive = f"naive {options['dtypes'][0]}"
    table = Table(
        title=f"{options['shape']}, {options['length']} tokens a side, {options['answers']:.0%} of them answer,"
        f" {where['threads']} threads" + (f", {where['device']}" if where["device"] != "cpu" else ""),
        caption=f"time: per token, median of {options['steps']} steps; memory: peak beyond the imports",
    )
    heads = ("case", "dtype", "pairs", "s/step", "tokens/s", "peak GiB", "MFU")
    for head in (*heads, "time/plain", f"time/{naive}", "memory/plain", f"memory/{naive}"):
        table.add_column(head, justify="left" if head in ("case", "dtype") else "right")
    for row in result["rows"]:
        if "error" in row:
            table.add_row(row["case"], row["dtype"], "failed")
            continue
        peak = row["peak_bytes"]
        table.add_row(
            row["case"],
            row["dtype"],
            str(row["batch"]),
            f"{row['seconds']:.3g}",
            f"{row['tokens_per_second']:.0f}",
            "" if peak is None else f"{peak / 2**30:.2f}",
            f"{row['mfu']:.0%}" if "mfu" in row else "",
            *(
                f"{row[key]:.2f}" if key in row else ""
                for key in ("time_vs_plain", "time_vs_naive", "memory_vs_plain", "memory_vs_naive")
            ),
        )
    console = Console(width=140, color_system=None)
    with console.capture() as text:
        console.print(table)
    failures = [f"{row['case']} {row['dtype']}: {row['error']}" for row in result["rows"] if "error" in row]
    return "\n".join([text.get().rstrip(), *failures])


def in_fresh_process(case: str, dtype: str, options: BenchOptions) -> dict[str, Any]:
    """The peak of a process never falls, and what one case leaves in caches would help the next."""
    given = json.dumps({"case": case, "dtype": dtype, "options": dataclasses.asdict(options)})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "repnoise.bench.measure"], input=given, capture_output=True, text=True
    )
    name = {"case": case, "dtype": dtype}
    if done.returncode == 0:
        result = json.loads(done.stdout.splitlines()[-1])
        if "wrong" in result:
            raise ConfigError(result["wrong"])
        return {**name, **result}
    if done.returncode < 0:
        return {**name, "error": f"killed by signal {-done.returncode} (9: out of memory, as a rule)"}
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {**name, "error": " ".join(lines[-FAILED_LINES:]) or f"exit code {done.returncode}"}
