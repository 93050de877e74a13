"""What the suites that measure inference share: weights in half precision, time on a device, memory left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from resonance_nn.loading import quiet_transformers

Model = TypeVar("Model", bound=PreTrainedModel)
MEMINFO = Path("/proc/meminfo")


def converted(model: Model, dtype: torch.dtype) -> Model:
    """The model with weights in ``dtype``, for inference, as ``from_pretrained(dtype=…)`` gives it to a user: what must
    be float32 stays so, which ``model.to(dtype)`` would not heed (our step sizes and frequencies, Llama's rotary
    frequencies)."""
    with quiet_transformers(), torch.device("cpu"):
        loaded: Any = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=dtype)
    return loaded.to(model.device).eval()


def weight_bytes(model: PreTrainedModel) -> int:
    """Of all parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def synchronize(device: str) -> None:
    """Wait for what was started on an accelerator; a CPU is never ahead."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def available_memory(device: str) -> int | None:
    """Bytes that tensors on the device may still take; None where nothing tells."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")
