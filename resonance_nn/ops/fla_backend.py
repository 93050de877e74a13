"""The kernels of ``fla-core`` (flash-linear-attention: Triton, NVIDIA GPUs) behind ``backend="fla"``.

``fla`` is imported here, inside of a call that asked for it, and nowhere else. With scale = 1 its kernels compute

    chunk_simple_gla          S_t = e^{g_t} S_{t−1} + k_t v_t^T                                     o_t = q_t^T S_t
    chunk_gated_delta_rule    S_t = e^{g_t} S_{t−1} + β_t k_t (v_t − e^{g_t} S_{t−1}^T k_t)^T       o_t = q_t^T S_t

on q, k (B, L, H, K), v (B, L, H, P), log-decays g and β (B, L, H), states (B, H, K, P): the layouts of this package.
Several documents go in as one row with ``cu_seqlens``, the positions where they begin, and a state each.

Products run in v's dtype with sums in float32; g, β and states are float32. The delta rule's triangular inverse is
rounded to v's dtype, where ``delta_rule_chunked`` keeps it in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BACKENDS = ("torch", "fla")
DEVICES = ("cuda",)  # where the kernels run
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that they compute in
MOST_KEYS = 256  # K of the delta rule's kernel


def available() -> bool:
    """Whether ``backend="fla"`` can run here. Imports nothing."""
    return torch.cuda.is_available() and importlib.util.find_spec("fla") is not None


def check_backend(backend: str, device: str) -> None:
    """Refuse a backend that cannot run on a device type. Imports ``fla`` if that is the backend.

    Raises:
        ValueError: an unknown name; or no such device, or no package, and how to install it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be {' or '.join(map(repr, BACKENDS))}")
    if backend == "torch":
        return
    reason = f"the device is {device!r}" if device not in DEVICES else ""
    if not reason:
        try:
            importlib.import_module("fla.ops")  # needs Triton too
        except ImportError as error:
            reason = " ".join(str(error).split())
    if reason:
        raise ValueError(
            f"backend = 'fla': {reason}; it needs an NVIDIA GPU and pip install 'resonance-nn[cuda]'; "
            "backend = 'torch' runs everywhere"
        )


def chosen(backend: str, v: Tensor) -> bool:
    """Whether an op on the values v (B, L, H, P) is to run on fla's kernels; on the meta device, which asks for shapes
    only, never. Raises ValueError as :func:`check_backend`, and for dtypes that the kernels do not have."""
    if backend == "torch" or (backend in BACKENDS and v.device.type == "meta"):
        return False
    check_backend(backend, v.device.type)
    if v.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"backend = 'fla': v is {v.dtype}, the kernels take {names}; use backend = 'torch'")
    return True


def linear_attention(
    v: Tensor, k: Tensor, q: Tensor, log_decay: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """v (B, L, H, P), k and q (B, L, H, K), log_decay (B, L, H), state (B, H, K, P) or None, reset (B, L) or None ->
    y (B, L, H, P) in v's dtype and the last state (B, H, K, P) in float32."""
    return _run("simple_gla", "chunk_simple_gla", {"q": q, "k": k, "v": v}, {"g": log_decay}, state, reset)


def gated_delta_rule(
    v: Tensor, k: Tensor, q: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`linear_attention`, with β (B, L, H) of what k recalls erased first, and of v written."""
    if k.shape[-1] > MOST_KEYS:
        raise ValueError(
            f"backend = 'fla': keys of K = {k.shape[-1]} reals, the kernel takes up to {MOST_KEYS}; use fewer modes a "
            "head, or backend = 'torch'"
        )
    gates = {"g": log_decay, "beta": beta}
    return _run("gated_delta_rule", "chunk_gated_delta_rule", {"q": q, "k": k, "v": v}, gates, state, reset)


def _run(
    module: str,
    name: str,
    vectors: dict[str, Tensor],
    gates: dict[str, Tensor],
    state: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kernel: Callable[..., Any] = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    v, K = vectors["v"], vectors["k"].shape[-1]
    B, L, H, P = v.shape
    if v.element_size() == 2 and (K % 2 or P % 2):
        raise ValueError(
            f"backend = 'fla': K = {K} reals a key and P = {P} channels a head, and in {v.dtype} the kernels take even "
            "numbers; change num_modes or num_heads, or use backend = 'torch'"
        )
    given = {n: x.to(v.dtype) for n, x in vectors.items()} | {n: x.to(torch.float32) for n, x in gates.items()}
    state = None if state is None else state.to(torch.float32)
    if reset is None:
        y, S = kernel(**given, scale=1.0, initial_state=state, output_final_state=True)
        return y, S
    begins = reset.clone()
    begins[:, 0] = True
    starts = begins.flatten().nonzero().squeeze(1)  # of the documents, and of the rows, in all rows end to end
    last = begins.sum(1).cumsum(0) - 1  # (B), each row's last document
    initial = None
    if state is not None:
        first = F.pad(last[:-1] + 1, (1, 0))  # (B), each row's first: it goes on from the state
        carried = state.masked_fill(reset[:, 0, None, None, None], 0)
        initial = state.new_zeros(len(starts), H, K, P).index_copy(0, first, carried)
    y, S = kernel(
        **{n: x.flatten(0, 1)[None] for n, x in given.items()},
        scale=1.0,
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=F.pad(starts, (0, 1), value=B * L),
    )
    return y.view(B, L, H, P), S[last]
