"""What every mixer is: (B, L, D) -> (B, L, D), with a state that can be carried from call to call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

State = dict[str, Tensor]


class RightPadding:
    """Turns any padded batch into a right-padded one and back.

    A causal mixer cannot see what stands to the right, so right padding never touches the outputs of real tokens, and
    only states need the rows' lengths. Left padding, or padding in the middle, is moved to the right by a stable
    permutation of each row.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        self.length = self.mask.sum(1)  # (B)
        self.order = None
        if torch.compiler.is_compiling() or bool((self.mask[:, 1:] > self.mask[:, :-1]).any()):
            self.order = (~self.mask).to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first

    @classmethod
    def of(cls, mask: Tensor | None) -> RightPadding | None:
        """None where every token is real. While tracing for export or compilation a mask is always honoured."""
        if mask is None or (not torch.compiler.is_compiling() and bool(mask.all())):
            return None
        return cls(mask)

    def apply(self, x: Tensor) -> Tensor:
        """(B, L, ...) with real tokens moved to the left."""
        if self.order is None:
            return x
        return x.gather(1, self._index(self.order, x))

    def apply_reset(self, reset: Tensor | None) -> Tensor | None:
        return None if reset is None else self.apply(reset & self.mask)

    def undo(self, y: Tensor) -> Tensor:
        """The inverse permutation, with zeros at padding."""
        if self.order is not None:
            y = torch.zeros_like(y).scatter(1, self._index(self.order, y), y)
        return y.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (y.dim() - 2)), 0)

    @staticmethod
    def _index(order: Tensor, x: Tensor) -> Tensor:
        return order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x)


def leading_reset(reset: Tensor | None, states: list[State | None]) -> tuple[Tensor | None, list[State | None]]:
    """Take care of resets where they are cheap: one at position 0 clears that row's state (zeros are a fresh state),
    and without any further on the mixers need not know. While tracing, the mixers always see them."""
    if reset is None or torch.compiler.is_compiling() or bool(reset[:, 1:].any()):
        return reset, states
    begins = reset[:, 0]
    cleared = [s and {n: t.masked_fill(begins.view(-1, *[1] * (t.dim() - 1)), 0) for n, t in s.items()} for s in states]
    return None, cleared


def real_tokens(x: Tensor, length: Tensor | None) -> Tensor | None:
    """(B, L), True at the first ``length`` (B) tokens of the rows of x (B, L, ·); None where all are real."""
    return None if length is None else torch.arange(x.shape[1], device=x.device) < length[:, None]


def document_begin(x: Tensor, past: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """(L) the positions in this call, and (B, L) that of the first token of each token's document: the last reset, or
    before any −``past`` (B), as many tokens as earlier calls gave; None is none."""
    B, L = x.shape[:2]
    steps = torch.arange(L, device=x.device)
    begin = torch.zeros_like(steps).expand(B, L) if past is None else -past[:, None].expand(B, L)
    if reset is not None:
        begin = torch.where(reset, steps, begin).cummax(1).values
    return steps, begin


def decay_rates(shortest: float, longest: float, count: int) -> Tensor:
    """1/τ in nats a token (count), float64, for time constants τ log-spaced from ``shortest`` to ``longest`` tokens."""
    position = torch.linspace(0, 1, count, dtype=torch.float64) if count > 1 else torch.tensor([0.5]).double()
    shortest = min(shortest, longest)
    return torch.exp(-(math.log(shortest) + position * math.log(longest / shortest)))


def inverse_softplus(y: Tensor) -> Tensor:
    """x with log(1 + e^x) = y > 0."""
    return y + torch.log(-torch.expm1(-y))


class Mixer(nn.Module):
    """Base class. A mixer implements :meth:`mix` for right-padded batches; everything else follows."""

    causal: ClassVar[bool] = True
    state_names: tuple[str, ...] = ()  # the keys of a state
    float32_parameters: ClassVar[tuple[str, ...]] = ()  # kept in float32 when a model is loaded in half precision
    backends: ClassVar[tuple[str, ...]] = ("torch",)  # that ``config.backend`` may name
    constant_state: bool = True  # the state's size does not depend on the context
    of_images: bool = False  # tokens are the rows of images, and ``mix`` takes their ``grid``

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.hidden_size: int = config.hidden_size
        self.num_heads: int = config.num_heads
        self.head_dim: int = config.hidden_size // config.num_heads

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        """Mix tokens.

        Args:
            x: (B, L, D).
            mask: (B, L), False or 0 at padding, anywhere in a row. Outputs there are 0.
            reset: (B, L) bool, True at a document's first token: nothing before it is seen from there on.
            state: as returned by the call before; None is a fresh start.
            return_state: whether to compute the state after each row's last real token.
            losses: a list to which the mixer appends its weighted auxiliary losses, scalars; None: they are not needed.

        Returns:
            y (B, L, D), and the state, a flat dict of real tensors, batch first (None if not asked for).
        """
        padding = RightPadding.of(mask)
        if padding is not None:
            reset = padding.apply_reset(reset)
        reset, (state,) = leading_reset(reset, [state])
        if padding is None:
            return self.mix(x, reset=reset, state=state, return_state=return_state, losses=losses)
        y, state = self.mix(
            padding.apply(x),
            length=padding.length,
            reset=reset,
            state=state,
            return_state=return_state,
            losses=losses,
        )
        return padding.undo(y), state

    def mix(
        self,
        x: Tensor,
        *,
        length: Tensor | None = None,
        reset: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        """As :meth:`forward`, for rows whose first ``length`` (B) tokens are real; None means all."""
        raise NotImplementedError

    def initial_values(self) -> dict[str, Tensor]:
        """Initial values of the parameters that are this module's own, by name."""
        return {}

    def _initialise(self) -> None:
        with torch.no_grad():
            for name, value in self.initial_values().items():
                self.get_parameter(name).copy_(value)

    def state_bytes(self, context: int = 1) -> int:
        """Bytes of state a sequence needs after ``context`` tokens, in the parameters' dtype: counted from the
        tensors a forward pass on the meta device returns."""
        parameters = {n: torch.empty_like(p, device="meta") for n, p in self.named_parameters()}
        dtype = next(iter(parameters.values())).dtype
        x = torch.empty(1, context, self.hidden_size, device="meta", dtype=dtype)
        with torch.no_grad():
            _, state = torch.func.functional_call(self, parameters, (x,), {"return_state": True})
        return sum(t.numel() * t.element_size() for t in state.values())
