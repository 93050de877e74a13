"""The gated delta rule: chunked = reference = step, equal to transformers' own, exact recall."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import relative
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from resonance_nn.ops.delta_rule import delta_rule_chunked, delta_rule_reference, delta_rule_step

FORMS = {
    "proper": {"beta": True},
    "proper_shared": {"beta": True, "groups": 1},
    "proper_groups": {"beta": True, "groups": 2, "heads": 4},
    "groups": {"groups": 2, "heads": 4},
    "shared": {"groups": 1},
    "shared_turning": {"groups": 1, "turning": True},
    "head": {},
    "channel": {"channel": True},
    "channel_promised": {"channel": True, "min_log_decay": -5.0},
    "turning": {"turning": True},
    "turning_channel": {"turning": True, "channel": True, "min_log_decay": -5.0},
    "hermitian": {"turning": True, "hermitian": True},
    "hermitian_channel": {"turning": True, "hermitian": True, "channel": True},
    "hermitian_channel_still": {"hermitian": True, "channel": True},
    "nothing_erased": {"nothing_erased": True},
    "nothing_erased_turning_channel": {"nothing_erased": True, "turning": True, "channel": True, "min_log_decay": -5.0},
    "nothing_erased_hermitian": {"nothing_erased": True, "turning": True, "hermitian": True, "channel": True},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def inputs(L, form, dtype=torch.float64, B=2, H=3, P=5, N=4, strength=1.0):
    H, K = form.get("heads", H), 2 * N
    channel, turning = form.get("channel", False), form.get("turning", False)
    v = torch.randn(B, L, H, P, dtype=dtype)
    G = form.get("groups", H)
    k, q = (F.normalize(torch.randn(B, L, G, K, dtype=dtype), dim=-1) for _ in range(2))
    gate = torch.rand((B, L, H) if form.get("beta") else (B, L, H, K), dtype=dtype)
    erase = (
        None
        if form.get("nothing_erased")
        else strength * gate * (1 if form.get("beta") else k.repeat_interleave(H // G, dim=2))
    )
    shape = (B, L, H, N if turning or form.get("hermitian") else K) if channel else (B, L, H)
    log_decay = -4.9 * torch.rand(shape, dtype=dtype) ** 4
    angle = 4 * torch.randn(B, L, H, N, dtype=dtype) if turning else None
    tensors = [t for t in (v, k, q, erase, log_decay, angle) if t is not None]
    for t in tensors:
        t.requires_grad_()
    keywords = {n: form[n] for n in ("hermitian",) if n in form}
    return (v, k, q, erase, log_decay, angle), tensors, keywords


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("name", FORMS)
def test_chunked_equals_reference(name, L, dtype, poisoned_memory):
    form = FORMS[name]
    arguments, tensors, keywords = inputs(L, form, dtype)
    B, H, K, P = 2, arguments[0].shape[2], arguments[1].shape[-1], arguments[0].shape[-1]
    state = torch.randn(B, H, K, P, dtype=dtype, requires_grad=True)
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, L // 3] = L > 1
    reset[1, L - 1] = L > 2
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1, L // 2 : L // 2 + L // 5] = False
    common = {**keywords, "state": state, "reset": reset, "mask": mask}
    y, S = delta_rule_chunked(*arguments, **common, min_log_decay=form.get("min_log_decay"))
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wide = iter(exact)
    double = [None if t is None else next(wide) for t in arguments]
    state64 = state.detach().double().requires_grad_()
    y_ref, S_ref = delta_rule_reference(*double, **{**common, "state": state64})
    y = y.masked_fill(~mask[..., None, None], 0)
    y_ref = y_ref.masked_fill(~mask[..., None, None], 0)
    assert relative(y, y_ref) < TOLERANCE[dtype]
    assert relative(S, S_ref) < TOLERANCE[dtype]
    weight_y, weight_S = torch.randn_like(y_ref), torch.randn_like(S_ref)
    fast = torch.autograd.grad((y * weight_y.to(dtype)).sum() + (S * weight_S.to(dtype)).sum(), [*tensors, state])
    slow = torch.autograd.grad((y_ref * weight_y).sum() + (S_ref * weight_S).sum(), [*exact, state64])
    for a, b in zip(fast, slow, strict=True):
        assert relative(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", FORMS)
def test_gradcheck(name):
    form = FORMS[name]
    arguments, tensors, keywords = inputs(5, form, B=1, H=1, P=2, N=2)

    def run(*given):
        given = iter(given)
        return delta_rule_chunked(*(None if t is None else next(given) for t in arguments), **keywords, chunk_size=3)

    assert torch.autograd.gradcheck(run, tensors)


def qwen_inputs(L, dtype=torch.float32, B=2, H=3, K=8, P=6):
    q, k = torch.randn(2, B, L, H, K, dtype=dtype).unbind(0)
    v = torch.randn(B, L, H, P, dtype=dtype)
    g = -F.softplus(torch.randn(B, L, H, dtype=dtype))
    beta = torch.rand(B, L, H, dtype=dtype)
    return [t.requires_grad_() for t in (q, k, v, g, beta)]


def ours(q, k, v, g, beta, **keywords):
    """The same function by our operator."""
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    return delta_rule_chunked(beta[..., None] * v, k, q, beta[..., None] * k, g, **keywords)


@pytest.mark.parametrize("peer", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("L", [1, 63, 64, 257])
def test_equals_transformers_gated_delta_rule(L, peer):
    """Value, gradient and state, from a state too; transformers computes in float32."""
    tensors = qwen_inputs(L)
    start = torch.randn(2, 3, 8, 6, requires_grad=True)
    q, k, v, g, beta = tensors
    y, S = ours(*tensors, state=start)
    theirs, last = peer(
        q, k, v, g=g, beta=beta, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    assert relative(y, theirs) < 1e-5
    assert relative(S, last) < 1e-5
    weight = torch.randn_like(y)
    fast = torch.autograd.grad((y * weight).sum() + S.sum(), [*tensors, start])
    slow = torch.autograd.grad((theirs * weight).sum() + last.sum(), [*tensors, start])
    for a, b in zip(fast, slow, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("turning", [False, True])
def test_exact_recall_of_orthonormal_keys(turning):
    """Real pairs hold K = 2N keys exactly, turning or not; a second write under a key replaces the first."""
    K, P = 16, 6
    keys = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64)).Q
    values = torch.randn(2, K, P, dtype=torch.float64)
    angle = torch.randn(2 * K, K // 2, dtype=torch.float64) if turning else None
    k = keys.repeat(2, 1)
    if angle is not None:  # keys that are orthonormal when they meet: each turned as much as the state has turned
        theta = angle.cumsum(0)
        re, im = k.chunk(2, -1)
        k = torch.cat((re * theta.cos() - im * theta.sin(), re * theta.sin() + im * theta.cos()), -1)
        angle = angle[None, :, None]
    v = values.flatten(0, 1)
    zero = torch.zeros(1, 2 * K, 1, dtype=torch.float64)
    k4, v4 = k[None, :, None], v[None, :, None]
    _, S = delta_rule_chunked(v4, k4, k4, k4, zero, angle)
    at_end = keys
    if angle is not None:
        theta = angle[0, :, 0].sum(0)
        re, im = keys.chunk(2, -1)
        at_end = torch.cat((re * theta.cos() - im * theta.sin(), re * theta.sin() + im * theta.cos()), -1)
    assert relative(at_end @ S[0, 0], values[1]) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_outputs_keep_the_values_dtype(name):
    (v, *rest), _, keywords = inputs(70, FORMS[name])
    v, *rest = (None if t is None else t.detach().bfloat16() for t in (v, *rest))
    y, S = delta_rule_chunked(v, *rest, **keywords)
    assert (y.dtype, S.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_errs_by_rounding(groups):
    """Keys that resemble each other, so that errors of A would grow: beside float64 on the same rounded inputs the
    state errs by less than 1%, gradients by less than 3%."""
    form = {"beta": True, "groups": groups, "heads": 2}
    (v, k, q, beta, log_decay, _), _, _ = inputs(512, form, P=64, N=32)
    k, q = (F.normalize(F.silu(torch.randn_like(x) + 2), dim=-1) for x in (k, q))
    given = [t.detach().bfloat16() for t in (v, k, q)] + [t.detach().float() for t in (beta, 0.1 * log_decay)]
    half, double = (
        [t.to(d).requires_grad_() for t, d in zip(given, dtypes, strict=True)]
        for dtypes in ([torch.bfloat16] * 3 + [torch.float32] * 2, [torch.float64] * 5)
    )
    results = []
    for tensors in (half, double):
        y, S = delta_rule_chunked(*tensors)
        weight = torch.linspace(-1, 1, y.shape[1]).view(1, -1, 1, 1).to(y.dtype)
        results.append((S, *torch.autograd.grad((y * weight).sum() + S.sum(), tensors)))
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]
    assert errors[0] < 0.01
    assert max(errors[1:]) < 0.03


def test_hermitian_form_is_the_complex_recurrence():
    """Against complex arithmetic written out; its real part is what the real form does not compute."""
    form = FORMS["hermitian"]
    (v, k, q, erase, log_decay, angle), _, _ = inputs(20, form, B=1, H=1)
    y, _ = delta_rule_chunked(v, k, q, erase, log_decay, angle, hermitian=True)

    def to_complex(x):
        return torch.complex(*x[0, :, 0].detach().chunk(2, -1))

    kc, qc, ec = to_complex(k), to_complex(q), to_complex(erase)
    transition = torch.exp(torch.complex(log_decay[0, :, :1, None].expand_as(angle[0]), angle[0]))[:, 0].detach()
    S = torch.zeros(4, 5, dtype=torch.complex128)
    for t in range(20):
        S = transition[t][:, None] * S
        S = S + kc[t][:, None] * (v[0, t, 0].detach() - ec[t].conj() @ S)
        assert relative(y[0, t, 0], (qc[t].conj() @ S).real) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_step_and_uneven_pieces(name):
    form = FORMS[name]
    arguments, _, keywords = inputs(100, form)
    arguments = [None if t is None else t.detach() for t in arguments]
    y, S = delta_rule_chunked(*arguments, **keywords)
    state, outputs = torch.zeros_like(S), []
    for begin, end in itertools.pairwise((0, 1, 3, 67, 99, 100)):
        part = [None if t is None else t[:, begin:end] for t in arguments]
        if end - begin == 1:
            one, state = delta_rule_step(
                *(None if t is None else t[:, 0] for t in part), state, keywords.get("hermitian", False)
            )
            one = one[:, None]
        else:
            one, state = delta_rule_chunked(*part, **keywords, state=state)
        outputs.append(one)
    assert relative(torch.cat(outputs, 1), y) < 1e-10
    assert relative(state, S) < 1e-10


def test_long_sequence_stays_exact():
    """Float32 with angles at positions around 20,000, against float64."""
    arguments, _, _ = inputs(64, FORMS["turning"], torch.float32, B=1, H=1)
    arguments = [t.detach() for t in arguments]
    S32 = S64 = None
    double = [t.double() for t in arguments]
    double[4] = arguments[4].double() * 1e-3
    single = [*arguments]
    single[4] = arguments[4] * 1e-3
    for _ in range(312):
        y32, S32 = delta_rule_chunked(*single, state=S32)
        y64, S64 = delta_rule_chunked(*double, state=S64)
    assert relative(y32, y64) < 1e-4


def test_chunk_size_is_checked():
    arguments, _, _ = inputs(4, FORMS["head"])
    with pytest.raises(ValueError, match="chunk_size = 128"):
        delta_rule_chunked(*arguments, chunk_size=128)
