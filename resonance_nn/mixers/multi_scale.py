"""``multi_scale:NAME``: a causal mixer, and coarse copies of it that read blocks of tokens as they finish."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from resonance_nn.layers import RMSNorm
from resonance_nn.mixers.base import Mixer, State, document_begin, leading_reset
from resonance_nn.ops.precision import wide_dtype

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

PREFIX = "multi_scale:"
GATE = 0.1  # of a coarse output at first: it must earn more


class MultiScaleMixer(Mixer):
    """y = inner(x) + Σ_s coarse_s(x), with a :class:`CoarseMixer` for every block length s in ``config.scales``.

    State: the inner mixer's as ``inner.NAME``, that of scale s as ``scale{s}.NAME``. Its size does not depend on the
    context if the inner mixer's does not.
    """

    def __init__(self, config: ResonanceConfig, layer_idx: int, mixer: type[Mixer]) -> None:
        super().__init__(config, layer_idx)
        self.inner = mixer(config, layer_idx)
        self.coarse = nn.ModuleDict({f"scale{s}": CoarseMixer(config, layer_idx, mixer, s) for s in config.scales})
        self.constant_state = self.inner.constant_state
        self.state_names = tuple(f"{part}.{name}" for part, m in self._parts() for name in m.state_names)

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
        outputs: list[Tensor] = []
        new_state: State = {}
        for part, mixer in self._parts():
            y, after = mixer.mix(
                x, length=length, reset=reset, state=_part(state, part), return_state=return_state, losses=losses
            )
            outputs.append(y)
            new_state |= {f"{part}.{name}": t for name, t in (after or {}).items()}
        return sum(outputs[1:], outputs[0]), new_state if return_state else None

    def _parts(self) -> list[tuple[str, Mixer]]:
        return [("inner", self.inner), *((name, m) for name, m in self.coarse.items() if isinstance(m, Mixer))]


class CoarseMixer(Mixer):
    """A mixer at one step a block of s tokens, the blocks counted from a document's first token:

        u_j = RMSNorm( Σ_{i<s} w_i ∘ x_{js+i} )        summary of block j; w (s, D) learned, the mean at first
        h   = mixer(u)                                 its initial time constants counted in blocks
        y_t = σ(W_r x_t + b_r) ∘ h_{⌊(t+1)/s⌋ − 1}     a gate a head; 0 before the first block is finished

    Block j is released to its last token, t = (j + 1)s − 1, and held until block j + 1 is finished: only finished
    blocks are seen, so it is causal. Cost: 1/s of the mixer's, pooling and gate. Decoding keeps the same schedule: a
    step in which no row finishes a block does not run the mixer.

    State: ``phase`` (B), tokens of the unfinished block; ``partial`` (B, D), its weighted sum so far, in float32 or
    wider; ``released`` (B, D), the h that is held; and the mixer's as ``mixer.NAME``.
    """

    def __init__(self, config: ResonanceConfig, layer_idx: int, mixer: type[Mixer], scale: int) -> None:
        super().__init__(config, layer_idx)
        coarse = copy.copy(config)
        coarse.initial_context = max(2, config.initial_context // scale)
        self.scale = scale
        self.pool = nn.Parameter(torch.empty(scale, config.hidden_size))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = mixer(coarse, layer_idx)
        self.release_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)
        self.release_bias = nn.Parameter(torch.empty(config.num_heads))
        self.constant_state = self.mixer.constant_state
        self.state_names = ("phase", "partial", "released", *(f"mixer.{name}" for name in self.mixer.state_names))
        self._initialise()

    def initial_values(self) -> dict[str, Tensor]:
        return {
            "pool": torch.full((self.scale, self.hidden_size), 1 / self.scale),
            "release_bias": torch.full((self.num_heads,), math.log(GATE / (1 - GATE))),
        }

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
        B, L, D = x.shape
        if L == 1 and state is not None and reset is None:
            y, state = self._step(x, length, state, losses)
            return y, state if return_state else None
        partial, released, coarse = None, x.new_zeros(B, 1, D), None
        if state is not None:
            partial, released, coarse = state["partial"], state["released"][:, None], _part(state, "mixer")
        blocks = find_blocks(x, self.scale, None if state is None else state["phase"], length, reset)
        if blocks.end.shape[1]:
            u = self._pool(x, blocks.end - (self.scale - 1), partial)  # (B, J, D)
            first, (coarse,) = leading_reset(blocks.first, [coarse])
            h, coarse = self.mixer.mix(
                self.norm(u).to(x.dtype),
                length=blocks.fewer,
                reset=first,
                state=coarse,
                return_state=return_state,
                losses=None if blocks.empty else losses,
            )
            released = torch.cat((released.to(h.dtype), h), dim=1)  # (B, 1 + J, D)
        y = self._gated(x, _rows(released, blocks.finished), blocks.silent)
        if not return_state:
            return y, None
        last = blocks.finished[:, -1:]
        new_state = {
            "released": _rows(released, last).squeeze(1).to(x.dtype),
            **{f"mixer.{name}": t for name, t in (coarse or {}).items()},
        }
        if blocks.ends_silent is not None:
            new_state = {n: t.masked_fill(_like(blocks.ends_silent, t), 0) for n, t in new_state.items()}
        unfinished = blocks.length - blocks.phase  # where the unfinished block begins
        new_state["partial"] = self._pool(x, unfinished[:, None], partial, blocks.phase).squeeze(1)
        return y, {"phase": blocks.phase, **new_state}

    def _step(
        self, x: Tensor, length: Tensor | None, state: State, losses: list[Tensor] | None
    ) -> tuple[Tensor, State]:
        """One token; rows may stand at different phases, and where ``length`` is 0 nothing happens."""
        wide, phase, coarse = wide_dtype(x), state["phase"], _part(state, "mixer")
        released, partial = state["released"].to(x.dtype), state["partial"].to(wide)
        ends, after = phase == self.scale - 1, (phase + 1) % self.scale
        token = x[:, 0].to(wide) * self.pool.to(wide)[phase]
        if length is not None:
            real = length > 0
            ends, after, token = ends & real, torch.where(real, after, phase), token * real[:, None]
        partial = partial + token
        finish = [True, False] if torch.compiler.is_compiling() else ends.tolist()
        if any(finish):
            h, coarse = self.mixer.mix(
                self.norm(partial).to(x.dtype)[:, None],
                length=None if all(finish) else ends.long(),
                state=coarse,
                return_state=True,
                losses=losses,
            )
            released = torch.where(ends[:, None], h[:, 0].to(x.dtype), released)
            partial = partial.masked_fill(ends[:, None], 0)
        new_state = {"phase": after, "partial": partial, "released": released}
        new_state |= {f"mixer.{name}": t for name, t in (coarse or {}).items()}
        return self._gated(x, released[:, None], None), new_state

    def _pool(self, x: Tensor, begin: Tensor, partial: Tensor | None, tokens: Tensor | None = None) -> Tensor:
        """Σ_i w_i ∘ x_{begin + i} over the s tokens of blocks that start at ``begin`` (B, J), or over the first
        ``tokens`` (B) of them. Of a block that started before this call, ``partial`` (B, D) is the sum up to here."""
        wide, offset = wide_dtype(x), torch.arange(self.scale, device=x.device)
        index = begin[..., None] + offset  # (B, J, s)
        block = _rows(x, index.clamp(0, x.shape[1] - 1)).to(wide)  # (B, J, s, D)
        if tokens is not None:
            block = block.masked_fill((offset >= tokens[:, None, None])[..., None], 0)
        if partial is None:
            return (block * self.pool.to(wide)).sum(2)
        here = (block.masked_fill((index < 0)[..., None], 0) * self.pool.to(wide)).sum(2)
        return here + partial.to(wide)[:, None] * (begin < 0)[..., None]

    def _gated(self, x: Tensor, h: Tensor, silent: Tensor | None) -> Tensor:
        gate = torch.sigmoid(self.release_proj(x) + self.release_bias).to(h.dtype)  # (B, L, H)
        if silent is not None:
            gate = gate.masked_fill(silent[..., None], 0)
        return (gate[..., None] * h.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)


class Blocks(NamedTuple):
    """The blocks that the rows of one call finish, J places a row, filled from the left."""

    end: Tensor  # (B, J): the token that finishes a block; L at places left empty
    empty: bool  # all places are
    finished: Tensor  # (B, L): blocks that the row has finished up to t
    fewer: Tensor | None  # (B): blocks of each row, None where all have J
    first: Tensor | None  # (B, J): the first block of a document that began in this call
    silent: Tensor | None  # (B, L): t's document began in this call and has finished no block yet
    ends_silent: Tensor | None  # (B): so it is with the row's last real token
    length: Tensor  # (B): real tokens
    phase: Tensor  # (B): tokens of the unfinished block after the last real one


def find_blocks(x: Tensor, s: int, phase: Tensor | None, length: Tensor | None, reset: Tensor | None) -> Blocks:
    """Blocks of s tokens in right-padded rows x (B, L, ·) whose first ``length`` (B) tokens are real.

    ``phase`` (B): tokens of the unfinished block before this call; None is a fresh start. Then there is a place for at
    least one block, so that the state gets its shapes. While tracing, places are as many as could be needed.
    """
    B, L = x.shape[:2]
    fresh = phase is None
    past = torch.zeros(B, dtype=torch.long, device=x.device) if phase is None else phase
    real = torch.full_like(past, L) if length is None else length
    steps, begin = document_begin(x, past, reset)  # up to whole blocks if it was before this call
    position = steps - begin  # (B, L)
    finished = (((position + 1) % s == 0) & (steps < real[:, None])).cumsum(1)
    total = finished[:, -1]
    if fresh and length is None and reset is None:  # all rows alike: known without looking
        most, alike = L // s, True
    elif torch.compiler.is_compiling():
        most, alike = (L + s - 1) // s, False
    else:
        most = int(total.max())
        alike = bool((total == most).all())
    J, alike = max(most, int(fresh)), alike and most > 0
    end = torch.searchsorted(finished, torch.arange(1, J + 1, device=x.device).repeat(B, 1))
    last = (real - 1).clamp(min=0)[:, None]
    after = torch.where(real > 0, (position.gather(1, last).squeeze(1) + 1) % s, past)
    first = silent = ends_silent = None
    if reset is not None:
        begun = reset.cumsum(1) > 0
        silent = begun & (position + 1 < s)
        ends_silent = silent.gather(1, last).squeeze(1)
        first = (begun & (position + 1 == s)).gather(1, end.clamp(max=L - 1)) & (end < L)
    fewer = None if alike else total
    return Blocks(end, most == 0, finished, fewer, first, silent, ends_silent, real, after)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x_{b, index}: (B, L, D) and (B, ...) -> (B, ..., D)."""
    B, L, D = x.shape
    start = torch.arange(0, B * L, L, device=x.device).view(B, *[1] * (index.dim() - 1))
    return x.reshape(B * L, D).index_select(0, (index + start).flatten()).view(*index.shape, D)


def _part(state: State | None, part: str) -> State | None:
    """The entries of a state named ``part.NAME``, as NAME."""
    prefix = f"{part}."
    return state and {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _like(rows: Tensor, t: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (t.dim() - 1))
