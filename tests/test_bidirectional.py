"""Contracts of every mixer in MIXERS with causal = False: what padding, packing, order and precision may not change.

Then the images of ``global_filter``.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import relative
from contract import make_mixer, small_config
from torch import Tensor

from resonance_nn import ResonanceForCausalLM
from resonance_nn.backbone import Backbone
from resonance_nn.mixers import MIXERS, Mixer, ReversedMixer
from resonance_nn.mixers.global_filter import GlobalFilterMixer

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name, mixer in MIXERS.items() if not mixer.causal),
    ("global_filter", {"filters": "channel", "filter_size": 40}),
    ("bidirectional_resolvent", {"prime_bump": True, "prime_bump_limit": 60}),
    *((f"reversed:{name}", {}) for name in ("resonance", "spectral_gate", "holographic", "resolvent")),
]
variants = pytest.mark.parametrize(("name", "overrides"), VARIANTS)
IMAGES = {"filter_size": (6, 4), "num_bands": 2}


def lively(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Mixer:
    """A mixer whose maps that begin at 0 have left it, so that what they multiply shows."""
    mixer = make_mixer(name, dtype, **overrides)
    with torch.no_grad():
        for parameter, p in mixer.named_parameters():
            if p.dim() > 1 and (not p.any() or parameter.endswith("conv.weight")):
                p.copy_(torch.where(p == 0, 0.2 * torch.randn_like(p), p))
    return mixer


def assert_equal(pairs: list[tuple[Tensor, Tensor]], inputs: list[Tensor]) -> None:
    """Outputs, and gradients of a sum over all of them, to 1e-10."""
    for y, expected in pairs:
        assert relative(y, expected) < 1e-10
    totals = [torch.stack([y.square().sum() for y in side]).sum() for side in zip(*pairs, strict=True)]
    for a, b in zip(*(torch.autograd.grad(total, inputs) for total in totals), strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("where", ["left", "right", "middle", "all"])
@variants
def test_padded_row_equals_row_alone(name: str, overrides: dict, where: str):
    mixer = lively(name, **overrides)
    L, real = 90, 61
    x = torch.randn(3, L, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, L, dtype=torch.bool)
    hidden = {"left": slice(0, L - real), "right": slice(real, L), "middle": slice(5, 5 + L - real), "all": slice(0, L)}
    mask[1, hidden[where]] = mask[2, 70:] = False
    y, state = mixer(x, mask=mask)
    assert state is None
    assert (y[~mask] == 0).all()
    rows = [row for row in range(3) if mask[row].any()]
    pairs = [(y[row : row + 1, mask[row]], mixer(x[row : row + 1, mask[row]])[0]) for row in rows]
    assert_equal(pairs, [x, *mixer.parameters()])


@variants
def test_any_length_beside_any_other(name: str, overrides: dict):
    mixer = lively(name, **overrides)
    lengths = [*range(1, 10), *(15, 16, 17, 31, 32, 33, 39, 40, 41, 63, 64, 65, 127, 128, 129, 257)]
    x = torch.randn(len(lengths), 257, 32, dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer(x, mask=torch.arange(257) < torch.tensor(lengths)[:, None])
        for row, L in enumerate(lengths):
            alone, _ = mixer(x[row : row + 1, :L])
            assert relative(y[row : row + 1, :L], alone) < 1e-10


@variants
def test_what_stands_at_padding_does_not_matter(name: str, overrides: dict):
    mixer = lively(name, **overrides)
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    mask = torch.rand(2, 50) < 0.7
    y, _ = mixer(x, mask=mask)
    assert relative(mixer(x.masked_fill(~mask[..., None], 1e6), mask=mask)[0], y) < 1e-12


@variants
def test_packed_documents_equal_separate_ones(name: str, overrides: dict):
    mixer = lively(name, **overrides)
    L = 100
    x = torch.randn(2, L, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, L, dtype=torch.bool)
    mask[1, 80:] = False
    reset = torch.zeros(2, L, dtype=torch.bool)
    starts = [[0, 30, 31, 95], [64, 90]]  # the last one at padding
    for row, begin in enumerate(starts):
        reset[row, begin] = True
    y, _ = mixer(x, mask=mask, reset=reset)
    documents = [(0, a, b) for a, b in itertools.pairwise([*starts[0], L])] + [(1, 0, 64), (1, 64, 80)]
    pairs = [(y[row : row + 1, a:b], mixer(x[row : row + 1, a:b])[0]) for row, a, b in documents]
    assert_equal(pairs, [x, *mixer.parameters()])


@variants
def test_batch_order_does_not_matter(name: str, overrides: dict):
    mixer, x = lively(name, **overrides), torch.randn(4, 70, 32, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    assert relative(mixer(x[order])[0], mixer(x)[0][order]) < 1e-12


@variants
def test_really_bidirectional(name: str, overrides: dict):
    """Changing either end changes the output at the other, and any token its own; read from the end, all before it."""
    mixer = lively(name, **overrides)
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    y, _ = mixer(x)
    for changed, seen in itertools.product((0, 15, 29), repeat=2):
        other = x.clone()
        other[0, changed] += 1
        sees = name.startswith("reversed:") <= (changed >= seen)
        difference = (mixer(other)[0] - y)[0, seen].abs().max()
        assert difference > 1e-8 if sees else difference < 1e-10, f"token {seen}, token {changed}: {difference}"


@variants
def test_float32_is_near_float64(name: str, overrides: dict):
    x = torch.randn(1, 1000, 32)
    y, _ = lively(name, torch.float32, **overrides)(x)
    exact = lively(name, torch.float32, **overrides).double()(x.double())[0]
    assert relative(y, exact) < 1e-5


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@variants
def test_bf16_autocast_is_finite_and_near_float32(name: str, overrides: dict, scale: float):
    mixer = lively(name, torch.float32, **overrides)
    x = scale * torch.randn(2, 200, 32)
    exact, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = mixer(x)
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())
    assert torch.isfinite(y).all()
    if scale <= 1:
        assert float((y.float() - exact).detach().abs().max()) <= 0.03 * float(exact.detach().abs().max())


@pytest.mark.parametrize("value", [-1e4, -30.0, 30.0, 1e4])
@variants
def test_any_finite_parameters_give_finite_outputs(name: str, overrides: dict, value: float):
    mixer = lively(name, torch.float32, **overrides)
    for name_of_one, p in mixer.named_parameters():
        kept = p.detach().clone()
        with torch.no_grad():
            p.fill_(value)
        for autocast in (False, True):
            mixer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y, _ = mixer(torch.randn(1, 150, 32))
            y.float().mean().backward()
            assert torch.isfinite(y).all(), name_of_one
            assert all(torch.isfinite(q.grad).all() for q in mixer.parameters()), name_of_one
        with torch.no_grad():
            p.copy_(kept)


@variants
def test_no_complex_tensors_and_every_parameter_trained_from_the_start(name: str, overrides: dict):
    mixer = make_mixer(name, **overrides)
    y, _ = mixer(torch.randn(2, 70, 32, dtype=torch.float64))
    y.square().sum().backward()
    assert not any(tensor.is_complex() for tensor in [y, *mixer.parameters(), *mixer.buffers()])
    for parameter_name, p in mixer.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("channels", [8, 9, 13])
@variants
def test_small_and_odd_heads(name: str, overrides: dict, channels: int):
    mixer = lively(name, hidden_size=2 * channels, num_modes=None, **overrides)
    x = torch.randn(2, 21, 2 * channels, dtype=torch.float64)
    y, _ = mixer(x, mask=torch.arange(21) < torch.tensor([[21], [13]]))
    assert relative(y[1, :13], mixer(x[1:, :13])[0][0]) < 1e-10


@variants
def test_no_state_to_carry(name: str, overrides: dict):
    mixer, x = lively(name, **overrides), torch.randn(1, 5, 32, dtype=torch.float64)
    for arguments in ({"return_state": True}, {"state": {}}):
        with pytest.raises(ValueError, match=rf"state.*{name}"):
            mixer(x, **arguments)
    assert mixer.state_bytes(100) == 0
    assert mixer.state_names == ()


@variants
def test_a_language_model_refuses_it(name: str, overrides: dict):
    for mixers in ((name,), ("spectral_gate", name)):
        with pytest.raises(ValueError, match=f"'{name}' sees the future"):
            ResonanceForCausalLM(small_config(mixers, **overrides))


@variants
def test_in_a_stack_a_padded_row_equals_the_row_alone(name: str, overrides: dict):
    torch.manual_seed(0)
    stack = Backbone(small_config((name,), **overrides)).double()
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :9] = mask[1, 40:] = False
    y, states, _ = stack(x, mask=mask)
    assert states == [None, None]
    assert relative(y[1, 9:40], stack(x[1:, 9:40])[0][0]) < 1e-10


@pytest.mark.parametrize(("name", "overrides"), [*VARIANTS, ("global_filter", IMAGES)])
def test_gradient_checkpointing_changes_nothing(name: str, overrides: dict):
    x, gradients = torch.randn(2, 24, 32), []
    for on in (False, True):
        torch.manual_seed(0)
        stack = Backbone(small_config((name,), **overrides)).train()
        for block in stack.blocks:
            block.gradient_checkpointing = on
        stack(x)[0].square().sum().backward()
        gradients.append([p.grad for p in stack.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_reversed_layers_by_turns_see_everything():
    torch.manual_seed(0)
    stack = Backbone(small_config(("spectral_gate", "reversed:spectral_gate"))).double()
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    y, _, _ = stack(x)
    for changed, seen in itertools.product((0, 15, 29), repeat=2):
        other = x.clone()
        other[0, changed] += 1
        assert (stack(other)[0] - y)[0, seen].abs().max() > 1e-8, f"token {seen} does not see token {changed}"


def test_reversed_is_the_mixer_on_the_tokens_turned_round():
    mixer, x = lively("reversed:holographic"), torch.randn(2, 20, 32, dtype=torch.float64)
    assert isinstance(mixer, ReversedMixer)
    assert relative(mixer(x)[0], mixer.inner(x.flip(1))[0].flip(1)) < 1e-12


def test_what_cannot_be_reversed():
    for name, message in (
        ("reversed:global_filter", "there is no other direction to read in; after reversed: use resonance"),
        ("reversed:reversed:resonance", "after reversed: must stand one of .*, once"),
    ):
        with pytest.raises(ValueError, match=message):
            small_config((name,))


# --- images


def images(*grids: tuple[int, int], width: int = 32) -> tuple[Tensor, Tensor]:
    """Images of the grids as rows of a right-padded batch, and its mask."""
    sizes = torch.tensor([Y * X for Y, X in grids])
    x = torch.randn(len(grids), int(sizes.max()), width, dtype=torch.float64, requires_grad=True)
    return x, torch.arange(x.shape[1]) < sizes[:, None]


@pytest.mark.parametrize("filters", ["head", "channel"])
def test_images_of_any_size_in_one_batch_equal_each_alone(filters: str):
    mixer = lively("global_filter", filters=filters, **IMAGES)
    x, mask = images((12, 8), (6, 4), (12, 8), (3, 2), (9, 6))
    y, _ = mixer(x, mask=mask)
    pairs = [(y[b : b + 1, mask[b]], mixer(x[b : b + 1, mask[b]])[0]) for b in range(len(x))]
    assert_equal(pairs, [x, *mixer.parameters()])
    assert (y[~mask] == 0).all()


def test_empty_images():
    mixer = lively("global_filter", **IMAGES)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    for hidden in ([0], [0, 1]):
        mask = torch.ones(2, 24, dtype=torch.bool)
        mask[hidden] = False
        y, _ = mixer(x, mask=mask)
        assert (y[hidden] == 0).all()
        assert 1 in hidden or relative(y[1:], mixer(x[1:])[0]) < 1e-10


def test_packed_images_equal_separate_ones():
    mixer = lively("global_filter", **IMAGES)
    x = torch.randn(2, 54, 32, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(2, 54, dtype=torch.bool)
    reset[0, 24] = reset[0, 48] = reset[1, 6] = reset[1, 30] = True
    y, _ = mixer(x, reset=reset)
    parts = [(0, 0, 24), (0, 24, 48), (0, 48, 54), (1, 0, 6), (1, 6, 30), (1, 30, 54)]
    pairs = [(y[b : b + 1, i:j], mixer(x[b : b + 1, i:j])[0]) for b, i, j in parts]
    assert_equal(pairs, [x, *mixer.parameters()])


def test_rows_and_columns_are_what_the_grid_says():
    """Transposing the image and the filter transposes the output: nothing in between takes one for the other."""
    mixer = lively("global_filter", filter_size=(5, 5), num_bands=2)
    turned = lively("global_filter", filter_size=(5, 5), num_bands=2)
    assert isinstance(mixer, GlobalFilterMixer)
    h = torch.fft.irfft2(torch.randn(2, 1, 10, 6, dtype=torch.complex128), s=(10, 10))
    with torch.no_grad():
        for m, kernel in ((mixer, h), (turned, h.mT)):
            G = torch.view_as_real(torch.fft.rfft2(kernel)[..., :5])
            m.filter.copy_(torch.cat((G[:, :, :5], G[:, :, 6:]), dim=2))
            m.gate_weight.zero_()
            m.gate_bias.zero_()
    x = torch.randn(1, 7, 3, 32, dtype=torch.float64)
    y, _ = mixer.mix(x.flatten(1, 2), grid=(7, 3))
    y_turned, _ = turned.mix(x.transpose(1, 2).flatten(1, 2), grid=(3, 7))
    assert relative(y_turned.view(1, 3, 7, 32).transpose(1, 2), y.view(1, 7, 3, 32)) < 1e-10
    assert relative(mixer.mix(x.flatten(1, 2), grid=(3, 7))[0], y) > 0.01


def test_grids_that_do_not_fit():
    mixer = make_mixer("global_filter", **IMAGES)
    assert isinstance(mixer, GlobalFilterMixer)
    assert [mixer.grid_of(n) for n in (6, 24, 54, 96, 2400)] == [(3, 2), (6, 4), (9, 6), (12, 8), (60, 40)]
    x = torch.randn(1, 25, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="25 tokens are no image of the aspect 6:4"):
        mixer(x)
    with pytest.raises(ValueError, match=r"grid = \(5, 6\): has 30 tokens, the image 25"):
        mixer.mix(x, grid=(5, 6))
    assert mixer.mix(x, grid=(5, 5))[0].shape == x.shape
    with pytest.raises(ValueError, match=r"set filter_size = \(rows, columns\)"):
        make_mixer("global_filter").mix(x, grid=(5, 5))  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [0, -3, 2.5, "7", (), (4,), (4, 0), (4, 4, 4), (4, 2.0)])
def test_filter_sizes_that_are_none(value):
    with pytest.raises(ValueError, match="filter_size"):
        small_config(("global_filter",), filter_size=value)


def test_filter_size_is_kept():
    config = small_config(("global_filter",), filter_size=[6, 4])
    assert config.filter_size == (6, 4)
    assert type(config).from_dict(config.to_dict()).filter_size == (6, 4)
    assert small_config().filter_size == 64  # initial_context
