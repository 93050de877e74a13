"""``reversed:NAME``: a causal mixer that reads from the end to the beginning; for encoders only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resonance_nn.mixers.base import Mixer, State

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

PREFIX = "reversed:"


class ReversedMixer(Mixer):
    """y = R inner(R x), R the order of each document's tokens turned round: a token sees itself and what follows.

    In layers by turns with the mixer itself, as ``mixers = ("spectral_gate", "reversed:spectral_gate")``, every token
    sees all others from the second layer on, at the price of one direction. Padding stays where it is. The end of the
    input is needed at the start, so there is no state: ``state`` and ``return_state`` are refused.
    """

    causal = False

    def __init__(self, config: ResonanceConfig, layer_idx: int, mixer: type[Mixer]) -> None:
        super().__init__(config, layer_idx)
        self.inner = mixer(config, layer_idx)
        self.name = config.layer_mixers[layer_idx]

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
        if state is not None or return_state:
            raise ValueError(
                f"{'return_state = True' if return_state else 'state'}: {self.name} reads from the end (causal = "
                "False) and keeps no state; call it once on whole inputs, without a cache"
            )
        L = x.shape[1]
        if length is None:
            begins = None if reset is None else _turned_resets(reset.flip(1))
            y, _ = self.inner.mix(x.flip(1), reset=begins, losses=losses)
            return y.flip(1), None
        t = torch.arange(L, device=x.device)
        real = t < length[:, None]
        index = torch.where(real, length[:, None] - 1 - t, t)  # its own inverse
        begins = None if reset is None else _turned_resets(reset.gather(1, index))
        x = _gathered(x, index).masked_fill(~real[..., None], 0)  # or an FFT rounds by what stands there
        y, _ = self.inner.mix(x, length=length, reset=begins, losses=losses)
        return _gathered(y, index), None

    def state_bytes(self, context: int = 1) -> int:
        """None is kept."""
        return 0


def _turned_resets(reset: Tensor) -> Tensor:
    """From where documents begin to where their ends do, in the order turned round: after each beginning."""
    return torch.cat((torch.zeros_like(reset[:, :1]), reset[:, :-1]), dim=1)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand_as(x))
