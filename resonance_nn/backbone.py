"""The only stack in the package: (B, L, D) -> (B, L, D).

[ x + mixer(norm(x));  x + mlp(norm(x)) ] × layers  ->  norm
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resonance_nn.allocator import release_freed_memory
from resonance_nn.layers import MLPS, ResidualRMSNorm, RMSNorm
from resonance_nn.mixers import build_mixer
from resonance_nn.mixers.base import RightPadding, State, leading_reset
from resonance_nn.ops.dropout import dropout

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

SEGMENT = 8192  # tokens that a block takes at once where no more need be kept in memory


class Block(nn.Module):
    """Pre-norm residual block with an injected mixer."""

    def __init__(self, config: ResonanceConfig, layer_idx: int) -> None:
        super().__init__()
        self.mixer_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = build_mixer(config.layer_mixers[layer_idx], config, layer_idx)
        self.mlp_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLPS[config.mlp](config.hidden_size, config.intermediate_size)
        self.dropout = config.dropout
        # transformers' activation_checkpointing_enable() sets both, in every n-th block
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)

    def forward(
        self,
        x: Tensor,
        length: Tensor | None,
        reset: Tensor | None,
        state: State | None,
        return_state: bool,
        return_losses: bool,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, State | None, list[Tensor] | None]:
        losses: list[Tensor] | None = [] if return_losses else None
        x, y, state = self.mix(x, length, reset, state, return_state, losses, grid)
        x, normed = self.mlp_norm(x, self._drop(y))
        return x + self._drop(self.mlp(normed)).to(x.dtype), state, losses

    def mix(
        self,
        x: Tensor,
        length: Tensor | None,
        reset: Tensor | None,
        state: State | None,
        return_state: bool,
        losses: list[Tensor] | None,
        grid: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor, State | None]:
        """What stands before the MLP: the residual stream, the branch y that is to be added to it, and the state."""
        x, normed = self.mixer_norm(x)
        of_image: dict[str, Any] = {"grid": grid} if grid is not None and self.mixer.of_images else {}
        y, state = self.mixer.mix(
            normed, length=length, reset=reset, state=state, return_state=return_state, losses=losses, **of_image
        )
        return x, y, state

    def _drop(self, y: Tensor) -> Tensor:
        return _dropped(y, self.dropout, self.training)

    def run(
        self,
        x: Tensor,
        length: Tensor | None,
        reset: Tensor | None,
        state: State | None,
        return_state: bool,
        return_losses: bool,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, State | None, list[Tensor] | None]:
        """As :meth:`forward`, with gradient checkpointing where it is on.

        Without a gradient or with checkpointing, a causal mixer of constant state takes a long sequence in segments of
        ``SEGMENT`` tokens and carries its state: what is computed is the same, and what a block holds in memory, but
        for its inputs and outputs, does not grow with the length. Auxiliary losses are then means over the segments,
        weighed by their tokens.
        """
        checkpointed = self.gradient_checkpointing and self.training
        call: Callable[..., Any] = self
        if checkpointed:
            call = partial(self._gradient_checkpointing_func, self.__call__)
        L = x.shape[1]
        whole = L <= SEGMENT or torch.compiler.is_compiling() or not (self.mixer.causal and self.mixer.constant_state)
        if whole or not (checkpointed or not torch.is_grad_enabled()):
            return call(x, length, reset, state, return_state, return_losses, grid)
        outputs: list[Tensor] = []
        losses: list[Tensor] | None = [] if return_losses else None
        for i, part in enumerate(x.split(SEGMENT, dim=1)):
            start, stop = i * SEGMENT, i * SEGMENT + part.shape[1]
            real = None if length is None else (length - start).clamp(0, SEGMENT)
            begins = None if reset is None else reset[:, start:stop]
            begins, (state,) = leading_reset(begins, [state])
            y, state, of_part = call(part, real, begins, state, return_state or stop < L, return_losses)
            outputs.append(y)
            if losses is not None and of_part is not None:
                losses += [loss * (y.shape[1] / L) for loss in of_part]
        y = torch.cat(outputs, dim=1)
        outputs.clear()
        if y.device.type == "cpu":
            release_freed_memory()  # holes below the segments' outputs: 13 KB a token beside 8 of tensors, at width 256
        return y, state if return_state else None, losses


def _dropped(y: Tensor, share: float, training: bool) -> Tensor:
    return dropout(y, share) if share > 0 and training else y


class Backbone(nn.Module):
    """Blocks and the final norm."""

    def __init__(self, config: ResonanceConfig, block: type[Block] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        states: Sequence[State | None] | None = None,
        return_states: bool = False,
        return_hidden: bool = False,
        losses: list[Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, list[State | None], list[Tensor]]:
        """Run the stack.

        Args:
            x: (B, L, D).
            mask: (B, L), False or 0 at padding, anywhere in a row; None means no padding.
            reset: (B, L) bool, True at a document's first token.
            states: one a block, as returned by the call before; None is a fresh start.
            return_states: whether to compute the states after each row's last real token.
            return_hidden: whether to keep the residual stream before every block.
            losses: a list to which the mixers' weighted auxiliary losses are appended; None: they are not computed.
            grid: rows and columns of the images that the tokens are, for mixers of images; None: they tell it from the
                number of tokens.

        Returns:
            The normed hidden states (B, L, D), the states, and the residual streams asked for.
        """
        padding, length = RightPadding.of(mask), None
        if padding is not None:
            x, reset, length = padding.apply(x), padding.apply_reset(reset), padding.length
        reset, states = leading_reset(reset, [None] * len(self.blocks) if states is None else list(states))
        x = _dropped(x, self.dropout, self.training)
        new_states: list[State | None] = []
        hidden: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if return_hidden:
                hidden.append(x)
            state = states[i]
            assert isinstance(block, Block)
            x, state, of_block = block.run(x, length, reset, state, return_states, losses is not None, grid)
            new_states.append(state)
            if losses is not None and of_block is not None:
                losses += of_block
        x = self.norm(x)
        if padding is not None:
            x = padding.undo(x)
            hidden = [padding.undo(h) for h in hidden]
        return x, new_states, hidden
