"""Mixers' states as a ``transformers`` cache. The only file that knows that API."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from resonance_nn.files import atomic_path
from resonance_nn.mixers.base import State

FORMAT = "resonance-state-1"


class StateLayer(CacheLayerMixin):
    """One block's state: a flat dict of tensors, batch first."""

    supports_early_init = False
    is_croppable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.num_tokens = 0

    def set(self, state: State, num_new_tokens: int) -> None:
        self.state = state
        self.num_tokens += num_new_tokens
        self.is_initialized = True

    def __deepcopy__(self, memo: Any) -> StateLayer:
        """A branch with its own tensors; those still attached to a graph are copied too."""
        branch = StateLayer()
        if self.state is not None:
            branch.set({name: t.clone() for name, t in self.state.items()}, self.num_tokens)
        return branch

    def _map(self, function: Any) -> None:
        if self.state is not None:
            self.state = {name: function(t) for name, t in self.state.items()}

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def reset(self) -> None:
        self.state, self.num_tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])

    def offload(self) -> None:
        if self.state:
            self.device = next(iter(self.state.values())).device
            self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.state and hasattr(self, "device"):
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a state is set whole, by StateLayer.set")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a state is set whole, by StateLayer.set")


class ResonanceCache(Cache):
    """The states of all blocks. ``copy.deepcopy`` branches it; :meth:`save` and :meth:`load` keep it in a file."""

    layers: list[StateLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[StateLayer() for _ in range(num_layers)])

    @property
    def states(self) -> list[State | None]:
        return [layer.state for layer in self.layers]

    def set(self, states: list[State | None], num_new_tokens: int) -> None:
        """Replace every block's state by the one after ``num_new_tokens`` more tokens."""
        for layer, state in zip(self.layers, states, strict=True):
            assert state is not None
            layer.set(state, num_new_tokens)

    def check(self, state_names: list[tuple[str, ...]]) -> None:
        """Refuse, by ValueError, to go on with another model's states. ``state_names``: of each block's mixer."""
        if len(self.layers) != len(state_names):
            raise ValueError(
                f"past_key_values holds {len(self.layers)} states, this model has {len(state_names)} blocks: "
                "use the cache with the model that made it"
            )
        for i, (state, names) in enumerate(zip(self.states, state_names, strict=True)):
            if state is not None and set(state) != set(names):
                raise ValueError(
                    f"past_key_values: the state of block {i} has {', '.join(sorted(state))}, its mixer needs "
                    f"{', '.join(sorted(names))}: use the cache with the model that made it"
                )

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for s in self.states if s is not None for t in s.values())

    def save(self, path: str | os.PathLike[str], **extra: Tensor) -> None:
        """Write the states, the token count and any ``extra`` tensors to a safetensors file."""
        tensors = {
            f"layers.{i}.{name}": t.contiguous().cpu()
            for i, s in enumerate(self.states)
            for name, t in (s or {}).items()
        }
        tensors |= {f"extra.{name}": t.contiguous().cpu() for name, t in extra.items()}
        metadata = {"format": FORMAT, "num_layers": str(len(self.layers)), "num_tokens": str(self.get_seq_length())}
        try:
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk, a missing folder
            raise OSError(f"cannot write the state file {str(path)!r} ({error})") from error

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> tuple[ResonanceCache, dict[str, Tensor]]:
        """Read what :meth:`save` wrote: the cache and the extra tensors.

        Raises:
            ValueError: the file is missing, damaged, or not a saved state.
        """
        if not Path(path).is_file():
            raise ValueError(f"state file {str(path)!r}: no such file")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"state file {str(path)!r}: cannot be read as safetensors ({error})") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"state file {str(path)!r}: not a saved prompt state (format {metadata.get('format')!r})")
        cache = cls(int(metadata.get("num_layers", 0)))
        for i, layer in enumerate(cache.layers):
            prefix = f"layers.{i}."
            state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if state:
                layer.set(state, int(metadata["num_tokens"]))
        return cache, {n.removeprefix("extra."): t for n, t in tensors.items() if n.startswith("extra.")}
