"""``global_filter``: a learned filter over the whole input, both ways, gated by the input's own spectrum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.mixers.base import Mixer, State
from resonance_nn.ops.elementwise import silu_gate
from resonance_nn.ops.spectrum import max_bands, spectral_filter
from resonance_nn.ops.spectrum_2d import spectral_filter_2d

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig


class GlobalFilterMixer(Mixer):
    """y = W_o( F⁻¹( γ(v) ∘ G ∘ F(v) ) ∘ silu(W_z x) ),  v = W_v x        (``ops.spectrum``); for encoders only

    G is a complex filter a head, or a channel (``config.filters``), and γ one gate a head and octave band, driven by
    the energies of v in those bands. With ``config.filter_size`` an integer, tokens stand in a line and the filter
    reaches as many tokens either way, at any length. With two integers they are the rows of an image, one after the
    other, and the filter belongs to the image's extent: a finer grid of the same picture gets the same filter.

    Exact, but for rounding: a row of a batch gives what it gives alone, whatever padding stands where (``mask``), since
    no grid depends on the batch; documents packed with ``reset`` give what separate ones give. Images of a batch may
    differ in size: n real tokens are the grid of n tokens with the aspect of ``filter_size``.

    The whole input is read at once, so there is no state: ``state`` and ``return_state`` are refused.
    """

    causal = False
    float32_parameters = ("filter", "gate_weight", "gate_bias")

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D, H, size = config.hidden_size, config.num_heads, config.filter_size
        assert size is not None  # the config derives it
        self.filter_size = size
        self.of_images = not isinstance(size, int)
        if isinstance(size, int):
            self.num_bands: tuple[int, ...] = (min(config.num_bands, max_bands(size)),)
            shape: tuple[int, ...] = (size,)
        else:
            self.num_bands = tuple(min(config.num_bands, max_bands(K)) for K in size)
            shape = (2 * size[0] - 1, size[1])
        J = math.prod(self.num_bands)
        self.in_proj = nn.Linear(D, 2 * D, bias=False)
        self.filter = nn.Parameter(torch.empty(H, 1 if config.filters == "head" else self.head_dim, *shape, 2))
        self.gate_weight = nn.Parameter(torch.empty(H, J, J))
        self.gate_bias = nn.Parameter(torch.empty(H, J))
        self.out_proj = nn.Linear(D, D, bias=False)
        self._initialise()

    def initial_values(self) -> dict[str, Tensor]:
        """γ = 1. Each filter is white noise under e^{−|τ|/r}, Σh² = 1, its reach r log-spaced over the filters from one
        token to ``filter_size``: near and far, before and after."""
        H, R = self.filter.shape[:2]
        sizes = (self.filter_size,) if isinstance(self.filter_size, int) else self.filter_size
        distance = torch.zeros((), dtype=torch.float64)
        for K in sizes:  # from the offset 0, on a period of 2K tokens
            offset = torch.fft.fftfreq(2 * K, 1 / (2 * K), dtype=torch.float64)
            distance = distance[..., None] + offset.square()  # (2K) or (2K_y, 2K_x)
        position = (torch.arange(H * R, dtype=torch.float64) / (H * R - 1)) if H * R > 1 else torch.tensor([0.5])
        reach = torch.exp(position * math.log(max(sizes))).view(H, R, *[1] * len(sizes))
        h = torch.randn(H, R, *distance.shape, dtype=torch.float64) * torch.exp(-distance.sqrt() / reach)
        axes = tuple(range(2, h.dim()))
        G = torch.fft.rfftn(h / h.square().sum(axes, keepdim=True).sqrt(), dim=axes)[..., : sizes[-1]]
        if len(sizes) == 2:
            G = torch.cat((G[:, :, : sizes[0]], G[:, :, sizes[0] + 1 :]), dim=2)
        zeros = {name: torch.zeros(self.get_parameter(name).shape) for name in ("gate_weight", "gate_bias")}
        return {"filter": torch.view_as_real(G), **zeros}

    def mix(
        self,
        x: Tensor,
        *,
        length: Tensor | None = None,
        reset: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        losses: list[Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, State | None]:
        """As :meth:`Mixer.mix`; ``grid``: rows and columns of every image, None to tell each from its tokens."""
        if state is not None or return_state:
            raise ValueError(
                f"{'return_state = True' if return_state else 'state'}: global_filter reads the whole input at once "
                "(causal = False) and keeps no state; call it once on whole inputs, without a cache"
            )
        B, L, D = x.shape
        v, z = self.in_proj(x).chunk(2, dim=-1)
        if reset is None:
            y = self._filter(v, length, grid)
        else:
            real = torch.full((B,), L, device=x.device) if length is None else length
            v, real, place = _separate_documents(v, reset, real)
            y = self._filter(v, real, grid)[place].view(B, L, D)
        return self.out_proj(silu_gate(y, z)), None

    def _filter(self, v: Tensor, length: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        B, L, D = v.shape
        gate = (self.gate_weight, self.gate_bias)
        if isinstance(self.filter_size, int):
            if grid is not None:
                raise ValueError(f"grid = {grid}: this filter is of sequences; set filter_size = (rows, columns)")
            v = v.view(B, L, self.num_heads, self.head_dim)
            return spectral_filter(v, self.filter, *gate, length=length).flatten(2)
        sizes = [L] * B if length is None else length.tolist()
        if len(set(sizes)) > 1:  # images of different grids, each with its like
            y = torch.zeros_like(v)
            for size in set(sizes):
                rows = torch.tensor([b for b in range(B) if sizes[b] == size], device=v.device)
                if size:
                    part = F.pad(self._filter(v[rows, :size], None, grid), (0, 0, 0, L - size))
                    y = y.index_copy(0, rows, part)
            return y
        if sizes[0] < L:
            return F.pad(self._filter(v[:, : sizes[0]], None, grid), (0, 0, 0, L - sizes[0]))
        if L == 0:
            return v
        Y, X = self.grid_of(L) if grid is None else grid
        if Y * X != L:
            raise ValueError(f"grid = {grid}: has {Y * X} tokens, the image {L}")
        v = v.view(B, Y, X, self.num_heads, self.head_dim)
        num_bands = (self.num_bands[0], self.num_bands[1])
        return spectral_filter_2d(v, self.filter, *gate, num_bands=num_bands).reshape(B, L, D)

    def grid_of(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of an image of so many tokens with the aspect of ``filter_size``. Raises ValueError."""
        assert not isinstance(self.filter_size, int)
        Ky, Kx = self.filter_size
        Y = math.isqrt(tokens * Ky // Kx)
        X = Y * Kx // Ky
        if (Y * X, Y * Kx) != (tokens, X * Ky):
            raise ValueError(
                f"{tokens} tokens are no image of the aspect {Ky}:{Kx} of filter_size; pass grid=(rows, columns), and "
                "mask nothing but what follows an image"
            )
        return Y, X

    def state_bytes(self, context: int = 1) -> int:
        """None is kept."""
        return 0


def _separate_documents(x: Tensor, reset: Tensor, length: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Packed rows (B, L, D), reset (B, L), real tokens (B) -> a document a row, right-padded, their real tokens, and
    the row and column where each of the B·L tokens went."""
    B, L, D = x.shape
    t = torch.arange(L, device=x.device)
    begins = (reset | (t == 0)).flatten()
    document = begins.cumsum(0) - 1  # (B·L)
    first = begins.nonzero().squeeze(1)  # (documents)
    position = torch.arange(B * L, device=x.device) - first[document]
    real = torch.zeros_like(first).index_add(0, document, (t < length[:, None]).flatten().to(first.dtype))
    rows = x.new_zeros(len(first), int(position.max()) + 1, D)
    return rows.index_put((document, position), x.flatten(0, 1)), real, (document, position)
