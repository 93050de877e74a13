"""A stand-in for the package ``fla``: its kernels as token-by-token recurrences of their documented meaning, with the
arguments and the layout of fla-core 0.6."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import torch


def recurrence(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    """S ← e^g S + β k (v − e^g S^T k)^T, o = scale · S^T q; without β, S ← e^g S + k v^T."""
    assert q.dtype == k.dtype == v.dtype
    assert g.dtype == torch.float32
    assert output_final_state is True
    rows, length, heads, keys = k.shape
    assert q.shape == k.shape
    assert v.shape[:3] == g.shape == k.shape[:3]
    if cu_seqlens is None:
        spans = [(row, 0, length) for row in range(rows)]
    else:
        assert rows == 1
        assert cu_seqlens.dtype == torch.long
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == length
        assert (cu_seqlens.diff() > 0).all()
        spans = [(0, int(a), int(b)) for a, b in itertools.pairwise(cu_seqlens)]
    if initial_state is not None:
        assert initial_state.shape == (len(spans), heads, keys, v.shape[-1])
        assert initial_state.dtype == torch.float32
    scale = keys**-0.5 if scale is None else scale
    outputs, states = [], []
    for index, (row, begin, end) in enumerate(spans):
        S = v.new_zeros(heads, keys, v.shape[-1]) if initial_state is None else initial_state[index]
        S = S.double()
        for t in range(begin, end):
            key, value, query = (x[row, t].double() for x in (k, v, q))
            S = S * g[row, t].double().exp()[:, None, None]
            if beta is not None:
                value = beta[row, t].double()[:, None] * (value - torch.einsum("hk,hkp->hp", key, S))
            S = S + key[:, :, None] * value[:, None, :]
            outputs.append(scale * torch.einsum("hk,hkp->hp", query, S))
        states.append(S)
    return torch.stack(outputs).view(v.shape).to(q.dtype), torch.stack(states).float()


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None,
):  # fmt: skip
    return recurrence(q, k, v, g, None, scale, initial_state, output_final_state, cu_seqlens)


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, chunk_indices=None, cp_context=None,
):  # fmt: skip
    assert beta.shape == g.shape
    return recurrence(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)


def install(monkeypatch) -> list[str]:
    """Put it in the place of ``fla``. Returns the names of the kernels as they are called."""
    calls: list[str] = []

    def counted(kernel):
        def run(*args, **kwargs):
            calls.append(kernel.__name__)
            return kernel(*args, **kwargs)

        return run

    modules = {name: ModuleType(name) for name in ("fla", "fla.ops")}
    for name, kernel in (("simple_gla", chunk_simple_gla), ("gated_delta_rule", chunk_gated_delta_rule)):
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, kernel.__name__, counted(kernel))
        modules[module.__name__] = module
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls
