"""Mamba-2 (Dao & Gu 2024) as values of ``spectral_gate``: the weights of a ``transformers`` layer, and a config."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from resonance_nn.config import ResonanceConfig
from resonance_nn.mixers.base import inverse_softplus
from resonance_nn.mixers.spectral_gate import SpectralGateMixer

if TYPE_CHECKING:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer


def mamba2_config(
    hidden_size: int,
    num_hidden_layers: int,
    vocab_size: int,
    *,
    state_size: int = 128,
    expand: int = 2,
    head_dim: int = 64,
    num_heads: int | None = None,
    n_groups: int = 1,
    **fields: Any,
) -> ResonanceConfig:
    """A config whose layers' mixers are Mamba-2 layers:

        [v | B | C] = silu(shortconv([v | B | C]) + bias),  δ = softplus(W_δ x + bias)
        S_t = e^{−aδ_t} S_{t−1} + δ_t B_t v_t^T,  y = W_o RMSNorm( (C_t^T S_t + d ∘ v_t) ∘ silu(z) )

    with its usual initial values: a = 1 … H, δ log-uniform in [0.001, 0.1], d = 1. Linear maps start at
    N(0, initializer_range²) with the depth's 1/√ in the maps into the residual stream, as everywhere in this package.
    A Mamba-2 has no MLP; the blocks here keep theirs, so for a comparison at equal parameters give both models the same
    ``intermediate_size``, and expect the mixer of ``expand`` 2 to be the larger one.

    Args:
        hidden_size, num_hidden_layers, vocab_size: as in :class:`ResonanceConfig`.
        state_size: K, reals a head and channel; even.
        expand: inner width over ``hidden_size``.
        head_dim: channels P a head.
        num_heads: instead of ``head_dim``: H = expand·D/P.
        n_groups: G, groups of heads that share B and C.
        fields: any others of ResonanceConfig.

    Raises:
        ValueError: naming the field.
    """
    _check_state_size(state_size)
    if num_heads is None:
        if (expand * hidden_size) % head_dim:
            raise ValueError(f"head_dim = {head_dim}: must divide expand · hidden_size = {expand * hidden_size}")
        num_heads = expand * hidden_size // head_dim
    mamba2 = {
        "num_heads": num_heads,
        "mixers": ("spectral_gate",),
        "rotation": "none",
        "num_modes": state_size // 2,
        "expand": expand,
        "num_groups": n_groups,
        "normalize_gates": False,
        "activate_values": True,
        "output_norm": "gated",
        "conv_bias": True,
        "initial_step": (0.001, 0.1),
        "norm_eps": 1e-5,
    }
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "vocab_size": vocab_size}
    return ResonanceConfig(**{**sizes, **mamba2, **fields})


@torch.no_grad()
def load_mamba2_layer(layer: Mamba2Mixer) -> SpectralGateMixer:
    """A ``spectral_gate`` that computes what a ``Mamba2Mixer`` of ``transformers`` does, from a copy of its weights, in
    their dtype and on their device.

    ``in_proj`` [z | v B C | δ] is split into ``in_proj`` [v B C | z] and ``step_proj``, the convolution's taps are
    turned round, and A_log becomes the damping whose softplus is e^{A_log}. In float64 the result computes in float64
    throughout, where the original's scan and norm are float32. Every call clamps δ to ``time_step_limit``, which the
    original's torch path leaves out when it decodes token by token.

    Raises:
        ValueError: for what cannot be expressed: another activation than SiLU, biases in the projections, an odd
            state_size.
    """
    if layer.activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act = {layer.activation!r}: must be 'silu', the only activation of spectral_gate")
    if layer.in_proj.bias is not None or layer.out_proj.bias is not None:
        raise ValueError("use_bias = True: must be False, the projections of spectral_gate have no bias")
    _check_state_size(layer.ssm_state_size)
    low, high = layer.time_step_limit
    D, E, H = layer.hidden_size, layer.intermediate_size, layer.num_heads
    config = mamba2_config(
        *(D, 1, 2),
        state_size=layer.ssm_state_size,
        expand=E // D,
        num_heads=H,
        n_groups=layer.n_groups,
        conv_bias=layer.use_conv_bias,
        conv_size=layer.conv_kernel_size,
        time_step_limit=None if (low, high) == (0.0, math.inf) else (low, high),
        norm_eps=layer.layer_norm_epsilon,
    )
    z, vbc, step = layer.in_proj.weight.split((E, layer.conv_dim, H))
    weights = {
        "in_proj.weight": torch.cat((vbc, z)),
        "step_proj.weight": step,
        "step_bias": layer.dt_bias,
        "conv.weight": layer.conv1d.weight[:, 0].flip(1).T,  # (W, channels), tap j for x_{t−j}
        "damping": inverse_softplus(layer.A_log.double().exp()),
        "skip": layer.D,
        "norm.weight": layer.norm.weight,
        "out_proj.weight": layer.out_proj.weight,
    }
    if layer.conv1d.bias is not None:
        weights["conv.bias"] = layer.conv1d.bias
    mixer = SpectralGateMixer(config, layer.layer_idx)
    dtype = layer.in_proj.weight.dtype
    for name, weight in weights.items():
        kept_wide = name.split(".")[0] in mixer.float32_parameters
        wanted = torch.promote_types(dtype, torch.float32) if kept_wide else dtype
        weights[name] = weight.detach().to(wanted).clone(memory_format=torch.contiguous_format)
    mixer.load_state_dict(weights, assign=True)
    return mixer.train(layer.training)


def _check_state_size(state_size: int) -> None:
    if state_size < 2 or state_size % 2:
        raise ValueError(f"state_size = {state_size}: must be even, the modes of spectral_gate come in pairs of reals")
