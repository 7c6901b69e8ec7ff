"""Which machine a measurement ran on: numbers of two machines do not compare. `python -m repnoise.bench.machine`."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ..store.provenance import git_state, package_versions

FEATURES = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2", "bf16", "sve")
"""Of a processor, as the kernel names them, those that decide about the speed of matrix products."""


def machine() -> dict[str, Any]:
    """Processor, memory, software, and how busy the machine was."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "features": [name for name in FEATURES if name in (_cpuinfo("flags") or _cpuinfo("Features")).split()],
        "load": [round(each, 2) for each in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "git": git_state(),
    }


def _cpuinfo(key: str) -> str:
    """Of the first core, as Linux tells it; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def main() -> None:
    found = machine()
    where = f"{found['cpu'] or 'unknown processor'}, {found['cores']} cores, {torch.get_num_threads()} threads"
    print(f"machine: {where}; features: {', '.join(found['features']) or 'none known'}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"torch {torch.__version__}, {gpu}, load of 1, 5 and 15 minutes: {found['load']}", flush=True)


if __name__ == "__main__":
    main()
