"""``HolographicMemory``: pairs of keys and values in a state of fixed size, written, read and cleared explicitly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn import capacity
from resonance_nn.ops.delta_rule import delta_rule_chunked
from resonance_nn.ops.holographic import bind, hrr_chunked, key_spectrum, random_unitary, unbind, unitary
from resonance_nn.ops.precision import phase_dtype, wide_dtype, without_autocast

Solve = Literal["hebbian", "delta", "lstsq"]
SOLVES: tuple[Solve, ...] = ("hebbian", "delta", "lstsq")
GROUP_ELEMENTS = 1 << 22  # of keys or scores that a capacity report holds at once


class HolographicMemory(nn.Module):
    """An associative memory without a sequence and without parameters: ``read(key, write(key, value)) ≈ value``.

    ``binding="outer"``: S = Σ k vᵀ, N×P reals, read by Sᵀq. ``binding="hrr"``: R traces Σ F⁻¹(κ ∘ F(v)) of P reals,
    read by correlation (``ops.holographic``). Keys need not be normalised: writes and reads do it, to norm 1, or in
    HRR to norm 1 over the traces at every frequency. Any leading dimensions are batch. How a write solves:

        hebbian    adds what is bound; order does not matter; states of several memories may be added
        delta      one pair after the other, erasing first what its key recalls: exact for orthonormal keys (N of them,
                   or R at every frequency); more passes are Kaczmarz's iteration towards lstsq
        lstsq      S + K⁺(V − KS) in float64, the smallest change that recalls all pairs: exact for N independent keys

    The state is a plain tensor that goes in and comes out; the module holds nothing. It is float32 or wider, and
    float64 after ``lstsq``, because the state of nearly dependent keys is large. All of it is differentiable.

    Args:
        dimension: channels P of a value.
        binding: "outer" or "hrr".
        key_size: N, reals of a key of "outer"; None means P. In "hrr" it is R·P.
        num_traces: R of "hrr".

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        dimension: int,
        *,
        binding: Literal["outer", "hrr"] = "outer",
        key_size: int | None = None,
        num_traces: int = 1,
    ) -> None:
        super().__init__()
        if binding not in ("outer", "hrr"):
            raise ValueError(f"binding = {binding!r}: must be 'outer' or 'hrr'")
        for name, value in (("dimension", dimension), ("num_traces", num_traces), ("key_size", key_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be ≥ 1")
        if binding == "outer" and num_traces != 1:
            raise ValueError(f"num_traces = {num_traces}: traces belong to binding='hrr'; use key_size here")
        if binding == "hrr" and key_size not in (None, num_traces * dimension):
            raise ValueError(
                f"key_size = {key_size}: a key of 'hrr' is num_traces · dimension = {num_traces * dimension} reals; "
                "leave it out"
            )
        self.dimension, self.binding, self.num_traces = dimension, binding, num_traces
        self.key_size = num_traces * dimension if binding == "hrr" else key_size or dimension
        self.state_shape = (num_traces if binding == "hrr" else self.key_size, dimension)

    def extra_repr(self) -> str:
        return f"{self.dimension}, binding={self.binding!r}, key_size={self.key_size}, num_traces={self.num_traces}"

    def clear(
        self,
        state: Tensor | Sequence[int] = (),
        where: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """An empty memory: like ``state``, or with the given leading dimensions. ``where`` (bool, the leading
        dimensions of ``state``) clears only some."""
        if not isinstance(state, Tensor):
            return torch.zeros(*state, *self.state_shape, dtype=dtype, device=device)
        if where is None:
            return torch.zeros_like(state)
        return state.masked_fill(where[..., None, None], 0)

    def write(
        self,
        keys: Tensor,
        values: Tensor,
        state: Tensor | None = None,
        *,
        solve: Solve | None = None,
        passes: int = 1,
    ) -> Tensor:
        """Store M pairs and return the new state.

        Args:
            keys: (..., M, key_size).
            values: (..., M, P).
            state: (..., N, P), in "hrr" (..., R, P); None is empty. It is left as it was.
            solve: "hebbian", "delta" or "lstsq"; None means "delta", and "hebbian" where "delta" cannot be: in "hrr"
                with one trace, where any write would erase all others.
            passes: times that "delta" goes through the pairs.

        Returns:
            The state, with the leading dimensions of all arguments broadcast.
        """
        single = self.binding == "hrr" and self.num_traces == 1
        solve = solve or ("hebbian" if single else "delta")
        if solve not in SOLVES:
            raise ValueError(f"solve = {solve!r}: must be one of {', '.join(SOLVES)}")
        if solve == "delta" and single:
            raise ValueError(
                "solve = 'delta': with one trace any two keys are parallel at each frequency, so each write would "
                "erase all others; use num_traces ≥ 2 or solve='hebbian'"
            )
        if passes < 1 or (passes > 1 and solve != "delta"):
            raise ValueError(f"passes = {passes}: must be ≥ 1, and 1 unless solve = 'delta'")
        self._check("keys", keys, self.key_size)
        self._check("values", values, self.dimension)
        batch = torch.broadcast_shapes(keys.shape[:-2], values.shape[:-2], () if state is None else state.shape[:-2])
        M = keys.shape[-2]
        dtype = torch.promote_types(wide_dtype(keys), wide_dtype(values))
        dtype = dtype if state is None else torch.promote_types(dtype, state.dtype)
        if solve == "lstsq":
            dtype = torch.promote_types(dtype, phase_dtype(keys))
        S = self.clear(batch, dtype=dtype, device=keys.device)
        S = S if state is None else state.to(dtype).expand_as(S)
        if M == 0 or S.numel() == 0:
            return S.clone()
        k = self._normalise(keys.to(dtype)).expand(*batch, M, self.key_size).reshape(-1, M, self.key_size)
        v = values.to(dtype).expand(*batch, M, self.dimension).reshape(-1, M, self.dimension)
        S = S.reshape(-1, *self.state_shape)
        if self.binding == "outer":
            S = _write_outer(k, v, S, solve, passes)
        else:
            S = _write_hrr(self._traces(k), v, S, solve, passes)
        return S.view(*batch, *self.state_shape)

    def read(self, queries: Tensor, state: Tensor) -> Tensor:
        """Recall: queries (..., M, key_size) -> values (..., M, P), in the queries' dtype."""
        self._check("queries", queries, self.key_size)
        dtype = torch.promote_types(wide_dtype(queries), state.dtype)
        q, S = self._normalise(queries.to(dtype)), state.to(dtype)
        y = _product(q, S) if self.binding == "outer" else unbind(self._traces(q), S[..., None, :, :]).sum(-2)
        return y.to(queries.dtype)

    forward = read

    def random_keys(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Keys (*shape, key_size), independent and uniform among normalised ones."""
        if self.binding == "hrr" and self.num_traces == 1:
            return random_unitary((*shape, self.dimension), generator)
        return self._normalise(torch.randn(*shape, self.key_size, generator=generator))

    def capacity_report(
        self,
        pairs: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
        *,
        codebook_size: int = 1024,
        trials: int = 4096,
        solve: Solve | None = None,
        passes: int = 1,
        generator: torch.Generator | None = None,
        progress: Callable[[int], None] = lambda pairs: None,
    ) -> list[dict[str, Any]]:
        """Fill memories with random pairs, recall all of them, and set the figures beside the theory of ``capacity``.

        Keys are random, values independent uniform choices from a codebook of C random vectors of norm 1, a recall is
        right if the nearest entry of the codebook is the value that was written.

        Args:
            pairs: numbers K of pairs to store.
            codebook_size: C.
            trials: recalls a figure rests on, at least, in ⌈trials/K⌉ fresh memories.
            solve, passes: as in :meth:`write`.
            generator: makes it repeatable; None uses torch's.
            progress: is told each K when done.

        Returns:
            For each K a dict: ``pairs``, ``trials``, ``accuracy`` and its binomial ``standard_error``, ``error`` =
            mean |y − v|²/|v|², ``snr`` = mean/std of v·y (None for one pair), ``bits`` = ``capacity.stored_bits`` of
            the measured accuracy; and ``accuracy_theory``, ``error_theory``, ``snr_theory``, None where there is none.
        """
        solve = solve or ("hebbian" if self.binding == "hrr" and self.num_traces == 1 else "delta")
        codebook = F.normalize(torch.randn(codebook_size, self.dimension, generator=generator), dim=-1)
        rows = []
        for K in pairs:
            memories = -(-trials // K)
            most = max(1, GROUP_ELEMENTS // (K * max(self.key_size, codebook_size)))
            parts = []
            for group in torch.arange(memories).split(most):
                index = torch.randint(codebook_size, (len(group), K), generator=generator)
                keys, values = self.random_keys(len(group), K, generator=generator), codebook[index]
                recalled = self.read(keys, self.write(keys, values, solve=solve, passes=passes))
                right = cleanup(codebook, recalled)[1] == index
                error = (recalled - values).square().sum(-1)
                parts.append(torch.stack((right, error, (recalled * values).sum(-1)), dim=-1).flatten(0, 1))
            right, error, scores = torch.cat(parts).double().unbind(-1)
            accuracy = right.mean().item()
            rows.append(
                {
                    "pairs": K,
                    "trials": memories * K,
                    "accuracy": accuracy,
                    "standard_error": math.sqrt(accuracy * (1 - accuracy) / (memories * K)),
                    "error": error.mean().item(),
                    "snr": (scores.mean() / scores.std()).item() if K > 1 else None,
                    "bits": capacity.stored_bits(accuracy, K, codebook_size),
                    **self._theory(K, codebook_size, solve, passes),
                }
            )
            progress(K)
        return rows

    def _theory(self, K: int, C: int, solve: Solve, passes: int) -> dict[str, float | None]:
        theory: dict[str, float | None] = {"accuracy_theory": None, "error_theory": None, "snr_theory": None}
        if self.binding == "hrr" and solve == "hebbian":
            noise = capacity.hrr_error(K, self.num_traces)
            theory["accuracy_theory"] = capacity.recall_accuracy(self.dimension, noise, C)
            theory["error_theory"] = noise
            theory["snr_theory"] = math.sqrt(self.dimension / noise) if noise else None
        elif self.binding == "outer" and passes == 1:
            errors = {
                "hebbian": capacity.hebbian_error,
                "delta": capacity.delta_error,
                "lstsq": capacity.lstsq_error,
            }
            theory["error_theory"] = errors[solve](K, self.key_size)
        return theory

    def _normalise(self, keys: Tensor) -> Tensor:
        if self.binding == "outer":
            return F.normalize(keys, dim=-1, eps=torch.finfo(keys.dtype).tiny)
        return unitary(self._traces(keys), -2).flatten(-2)

    def _traces(self, keys: Tensor) -> Tensor:  # (..., R·P) -> (..., R, P)
        return keys.unflatten(-1, (self.num_traces, self.dimension))

    @staticmethod
    def _check(name: str, x: Tensor, size: int) -> None:
        if x.dim() < 2 or x.shape[-1] != size:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be (..., pairs, {size})")


@without_autocast
def cleanup(codebook: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The entry of ``codebook`` (C, P) that has the largest cosine with x (..., P): entries (..., P) and their indices
    (...). The scale of x does not matter."""
    wide = torch.promote_types(wide_dtype(x), codebook.dtype)
    index = (x.to(wide) @ F.normalize(codebook.to(wide), dim=-1).mT).argmax(-1)
    return codebook[index], index


@without_autocast
def _product(q: Tensor, S: Tensor) -> Tensor:
    return q @ S


@without_autocast
def _write_outer(k: Tensor, v: Tensor, S: Tensor, solve: Solve, passes: int) -> Tensor:
    """k (B, M, N), v (B, M, P), S (B, N, P) -> S."""
    if solve == "hebbian":
        return S + k.mT @ v
    if solve == "lstsq":
        return S + torch.linalg.pinv(k) @ (v - k @ S)
    k, v, S = k[:, :, None], v[:, :, None], S[:, None]  # one head
    log_decay = k.new_zeros(k.shape[:3])
    for _ in range(passes):
        _, S = delta_rule_chunked(v, k, torch.zeros_like(k), k, log_decay, state=S)
    return S[:, 0]


@without_autocast
def _write_hrr(k: Tensor, v: Tensor, S: Tensor, solve: Solve, passes: int) -> Tensor:
    """k (B, M, R, P), v (B, M, P), S (B, R, P) -> S."""
    if solve == "hebbian":
        return S + bind(k, v[:, :, None]).sum(1)
    if solve == "lstsq":
        missing = v - unbind(k, S[:, None]).sum(-2)
        A = torch.fft.rfft(k).conj().permute(0, 3, 1, 2)  # (B, F, M, R): a recall is A times the traces' spectrum
        M = torch.linalg.pinv(A) @ torch.fft.rfft(missing).mT[..., None]  # (B, F, R, 1)
        return S + torch.fft.irfft(M.squeeze(-1).mT, n=v.shape[-1])
    k, v, S = key_spectrum(k)[:, :, None], v[:, :, None], S[:, None]  # one head
    zeros = k.new_zeros(k.shape[:3])
    for _ in range(passes):
        _, S = hrr_chunked(v, k, k, zeros, zeros + 1, erase=True, state=S)
    return S[:, 0]
