"""The ops that `resonance bench ops` times, each with what it cannot do without: bytes to move and operations.

Letters: B batch, L length, D width, H heads, P = D/H channels a head, K = P reals of a mode vector, T chunk length, V
vocabulary, e bytes of an element in the measured dtype. Of each case

    bytes        inputs read once and outputs written once; backwards, inputs and the outputs' gradients read and the
                 inputs' gradients written. What a pass writes and reads again in between is not necessary, so not here.
    operations   of matmuls, two a multiply-add, and of FFTs, 5/2 m log₂ m a real one of m points. Elementwise ones are
                 not counted: moving their bytes takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops import (
    Resonators,
    causal_conv_reference,
    fft_conv,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    resonator_fft,
    resonator_reference,
    rms_norm,
    rms_norm_reference,
    semiseparable_chunked,
    semiseparable_reference,
    semiseparable_step,
    short_conv,
    short_conv_reference,
    sigmoid_gate,
    silu_gate,
    squared_relu,
    swiglu,
    unit,
)
from resonance_nn.ops.delta_rule import delta_rule_chunked, delta_rule_reference
from resonance_nn.ops.fft_conv import fft_length

CHUNK, CONV, EPS = 64, 4, 1e-6
STEP_BATCH = 16  # sequences decoded at once


@dataclass(frozen=True)
class Shape:
    """Sizes of a case."""

    batch: int
    length: int
    width: int
    heads: int
    vocab_size: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def inner(self) -> int:
        """Of SwiGLU: 8/3·D, up to a multiple of 64."""
        return -(-8 * self.width // 192) * 64


@dataclass(frozen=True)
class Cost:
    """Bytes that must move and operations that must be done."""

    bytes: float
    operations: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Case:
    """One op.

    Args:
        inputs: its arguments by name, in float32; every floating one gets a gradient.
        function: the fast form, of the arguments by name; a tensor, or a tuple whose first is the output.
        reference: the definition, likewise.
        cost: of the forward and of the backward pass, given e; no backward pass is timed where that is None.
        wide: arguments that stay float32 in half precision.
        fft: whether the operations run at the rate of float32.
    """

    name: str
    inputs: Callable[[Shape], dict[str, Tensor]]
    function: Callable[..., Any]
    reference: Callable[..., Any]
    cost: Callable[[Shape, int], tuple[Cost, Cost | None]]
    wide: tuple[str, ...] = ()
    fft: bool = False


def elementwise(forward: float, backward: float, width: Callable[[Shape], int]) -> Callable[..., tuple[Cost, Cost]]:
    """So many passes over tensors (B, L, width)."""

    def cost(s: Shape, e: int) -> tuple[Cost, Cost]:
        size = s.tokens * width(s) * e
        return Cost(forward * size), Cost(backward * size)

    return cost


def conv_channels(s: Shape) -> int:
    """v, b and c of ``spectral_gate``."""
    return 3 * s.width


def semiseparable_cost(numbers: int) -> Callable[..., tuple[Cost, Cost]]:
    """v, b, c -> y and ``numbers`` float32 a head. A chunk: c b^T and A V of T×T, reads c̄ S and writes b̄^T V; each
    product has two in the backward pass."""

    def cost(s: Shape, e: int) -> tuple[Cost, Cost]:
        P = K = s.head_dim
        rows, operations = s.tokens * s.heads, 2 * (CHUNK * (K + P) + 2 * K * P)
        forward = Cost(rows * (e * (2 * P + 2 * K) + 4 * numbers), rows * operations)
        return forward, Cost(rows * (e * (3 * P + 4 * K) + 8 * numbers), 2 * rows * operations)

    return cost


def delta_cost(s: Shape, e: int) -> tuple[Cost, Cost]:
    """v, k, q, erase -> y. A chunk: A and M, T×T each over K; the triangular inverse, T³/3; U = X V, Z = X E, M Z, M U;
    K̂^T Z, K̂^T U; reads; and K×K by K×P between chunks. Counted in full at the rate of v's dtype, though A, M and the
    inverse are float32."""
    P = K = s.head_dim
    rows = s.tokens * s.heads
    operations = 2 * (4 * CHUNK * K + 2 * CHUNK * P + K * K + 2 * K * P + K * K * P / CHUNK) + CHUNK * CHUNK / 3
    forward = Cost(rows * (e * (2 * P + 3 * K) + 4), rows * operations)
    return forward, Cost(rows * (e * (3 * P + 6 * K) + 8), 2 * rows * operations)


def fft_cost(s: Shape, e: int) -> tuple[Cost, Cost]:
    """A transform of every channel there and back, in the backward pass too, and of H filters."""
    m = fft_length(2 * s.length - 1)
    transform, size = 2.5 * m * math.log2(m), s.tokens * s.width * e
    channels = s.batch * s.width
    return Cost(2 * size, (2 * channels + s.heads) * transform), Cost(3 * size, (2 * channels + s.heads) * transform)


def cross_entropy_cost(s: Shape, e: int) -> tuple[Cost, Cost]:
    """hidden (M, D) and the head (V, D): logits, and two products for their gradients."""
    size, operations = (s.tokens + s.vocab_size) * s.width * e, 2 * s.tokens * s.width * s.vocab_size
    return Cost(size, operations), Cost(2 * size, 2 * operations)


def step_cost(s: Shape, e: int) -> tuple[Cost, None]:
    """The float32 state of every head, read and written."""
    P = K = s.head_dim
    return Cost(STEP_BATCH * s.heads * (8 * K * P + e * (2 * P + 2 * K) + 4 * (1 + K // 2))), None


def hidden(s: Shape) -> Tensor:
    return torch.randn(s.batch, s.length, s.width)


def head_vectors(s: Shape) -> Tensor:
    return torch.randn(s.batch, s.length, s.heads, s.head_dim)


def unit_vectors(s: Shape) -> Tensor:
    return F.normalize(head_vectors(s), dim=-1)


def decays(s: Shape) -> Tensor:
    return -0.2 * torch.rand(s.batch, s.length, s.heads)


def operator_inputs(s: Shape) -> dict[str, Tensor]:
    return {"v": head_vectors(s), "b": unit_vectors(s), "c": unit_vectors(s), "log_decay": decays(s)}


def turning_inputs(s: Shape) -> dict[str, Tensor]:
    more = {"angle": torch.rand(s.batch, s.length, s.heads), "frequency": torch.rand(s.heads, s.head_dim // 2)}
    return {**operator_inputs(s), **more}


def delta_inputs(s: Shape) -> dict[str, Tensor]:
    k = unit_vectors(s)
    return {"v": head_vectors(s), "k": k, "q": unit_vectors(s), "erase": 0.5 * k, "log_decay": decays(s)}


def filter_inputs(s: Shape) -> dict[str, Tensor]:
    u = hidden(s).view(s.batch, s.length, s.heads, -1).permute(0, 2, 3, 1).contiguous()
    return {"u": u, "h": torch.randn(s.heads, 1, s.length) * torch.exp(-8 * torch.arange(s.length) / s.length)}


def resonator_inputs(s: Shape) -> dict[str, Tensor]:
    size = (s.heads, s.head_dim // 2)
    modes = {"damping": 0.01 + torch.rand(size), "frequency": 3 * torch.rand(size)}
    return {"v": head_vectors(s), **modes, "gain": torch.rand(size), "phase": 3 * torch.rand(size)}


def resonators(function: Callable[..., Any], **more: Any) -> Callable[..., Tensor]:
    def call(v: Tensor, **modes: Tensor) -> Tensor:
        return function(v, Resonators(**modes), **more)[0]

    return call


def entropy_inputs(s: Shape) -> dict[str, Tensor]:
    targets = torch.randint(s.vocab_size, (s.tokens,))
    x, weight = torch.randn(s.tokens, s.width), s.width**-0.5 * torch.randn(s.vocab_size, s.width)
    return {"hidden": x, "weight": weight, "targets": targets}


def step_inputs(s: Shape) -> dict[str, Tensor]:
    one = Shape(STEP_BATCH, 1, s.width, s.heads, s.vocab_size)
    inputs = {name: x[:, 0] for name, x in operator_inputs(one).items()}
    N = s.head_dim // 2
    more = {"angle": torch.rand(STEP_BATCH, s.heads, N), "state": torch.randn(STEP_BATCH, s.heads, 2 * N, 2 * N)}
    return {**inputs, **more}


def step_reference(state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    one: dict[str, Any] = {name: x[:, None] for name, x in inputs.items()}
    y, S = semiseparable_reference(**one, state=state)
    return y[:, 0], S


def squared_relu_reference(x: Tensor) -> Tensor:
    return F.relu(x).square()


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


DECAYS, ANGLES = ("log_decay",), ("log_decay", "angle", "frequency")
CASES = (
    Case(
        "rms_norm",
        lambda s: {"x": hidden(s), "weight": torch.rand(s.width)},
        lambda x, weight: rms_norm(x, weight, EPS),
        lambda x, weight: rms_norm_reference(x, weight, EPS),
        elementwise(2, 3, lambda s: s.width),
    ),
    Case(
        "unit",
        lambda s: {"x": head_vectors(s)},
        unit,
        lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-12).sqrt(),
        elementwise(2, 3, lambda s: s.width),
    ),
    Case(
        "sigmoid_gate",
        lambda s: {"x": hidden(s), "gate": hidden(s)},
        sigmoid_gate,
        lambda x, gate: 2 * x * gate.sigmoid(),
        elementwise(3, 5, lambda s: s.width),
    ),
    Case(
        "silu_gate",
        lambda s: {"x": hidden(s), "gate": hidden(s)},
        silu_gate,
        lambda x, gate: x * F.silu(gate),
        elementwise(3, 5, lambda s: s.width),
    ),
    Case(
        "squared_relu",
        lambda s: {"x": torch.randn(s.batch, s.length, 4 * s.width)},
        squared_relu,
        squared_relu_reference,
        elementwise(2, 3, lambda s: 4 * s.width),
    ),
    Case(
        "swiglu",
        lambda s: {"gate_up": torch.randn(s.batch, s.length, 2 * s.inner)},
        swiglu,
        swiglu_reference,
        elementwise(3, 5, lambda s: s.inner),
    ),
    Case(
        "short_conv",
        lambda s: {"x": torch.randn(s.batch, s.length, conv_channels(s)), "weight": torch.rand(CONV, conv_channels(s))},
        short_conv,
        short_conv_reference,
        elementwise(2, 3, conv_channels),
    ),
    Case(
        "semiseparable_chunked, real",
        operator_inputs,
        lambda **inputs: semiseparable_chunked(**inputs, chunk_size=CHUNK),
        semiseparable_reference,
        semiseparable_cost(1),
        DECAYS,
    ),
    Case(
        "semiseparable_chunked, complex",
        turning_inputs,
        lambda **inputs: semiseparable_chunked(**inputs, chunk_size=CHUNK),
        semiseparable_reference,
        semiseparable_cost(2),
        ANGLES,
    ),
    Case(
        "delta_rule_chunked",
        delta_inputs,
        lambda **inputs: delta_rule_chunked(**inputs, chunk_size=CHUNK),
        delta_rule_reference,
        delta_cost,
        DECAYS,
    ),
    Case("fft_conv", filter_inputs, fft_conv, causal_conv_reference, fft_cost, ("h",), fft=True),
    Case(
        "resonator_fft",
        resonator_inputs,
        resonators(resonator_fft, return_state=False),
        resonators(resonator_reference),
        fft_cost,
        Resonators._fields,
        fft=True,
    ),
    Case(
        "linear_cross_entropy",
        entropy_inputs,
        linear_cross_entropy,
        linear_cross_entropy_reference,
        cross_entropy_cost,
    ),
    Case("semiseparable_step", step_inputs, semiseparable_step, step_reference, step_cost, (*ANGLES, "state")),
)
