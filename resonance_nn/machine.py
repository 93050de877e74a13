"""What a measurement was made on: the head of every JSON file the package writes."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from resonance_nn.allocator import is_freed_memory_kept


def machine_info(device: str | None = None) -> dict[str, Any]:
    """Processor, cores, threads, memory in bytes, operating system, and the accelerator if ``device`` names one."""
    import torch

    info: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
        "device": device or "cpu",
        "freed_memory_kept": is_freed_memory_kept(),
    }
    if device is not None and device.startswith("cuda"):
        info["accelerator"] = torch.cuda.get_device_name(device)
    return info


def versions() -> dict[str, str]:
    """Versions of Python, this package, and the libraries it stands on."""
    result = {"python": platform.python_version()}
    for name in ("resonance-nn", "torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return None
