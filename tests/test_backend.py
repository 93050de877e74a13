"""``backend="fla"``. Its kernels run on NVIDIA GPUs only: here ``fla_stand_in`` stands in for them, and what is tested
is our translation. Where there is a GPU and fla-core, the same cases run with the kernels themselves too."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from conftest import relative
from fla_stand_in import install
from torch.nn import functional as F

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.cli import main
from resonance_nn.mixers import MIXERS, build_mixer
from resonance_nn.ops import fla_backend
from resonance_nn.ops.delta_rule import delta_rule_chunked, delta_rule_reference, delta_rule_step
from resonance_nn.ops.semiseparable import semiseparable_chunked, semiseparable_reference

B, H, P, N = 2, 4, 6, 4


@pytest.fixture
def fla(monkeypatch):
    """The stand-in, on the CPU. Returns the names of the kernels as they are called."""
    monkeypatch.setattr(fla_backend, "DEVICES", ("cpu",))
    return install(monkeypatch)


def gate(*shape):
    return -2 * torch.rand(shape) ** 3


SEMISEPARABLE = {  # name -> what is given
    "real": [],
    "angles": ["angle"],
    "frequency": ["frequency"],
    "scales": ["angle", "log_write", "log_read"],
    "skip_a_head": ["frequency", "skip"],
    "skip_a_token": ["frequency", "skip_token", "log_write"],
    "groups": ["groups", "frequency", "log_read"],
    "state": ["angle", "state"],
    "mask": ["angle", "state", "mask"],
    "documents": ["angle", "state", "reset"],
    "documents_without_state": ["frequency", "reset"],
    "document_at_the_first_token": ["angle", "state", "reset", "reset_first"],
    "read_first": ["angle", "read_first", "log_read"],
    "read_first_with_all": ["frequency", "read_first", "skip_token", "log_write", "state", "reset", "mask"],
    "read_first_at_the_first_token": ["read_first", "state", "reset", "reset_first"],
}
DELTA_RULE = {
    "delta": ["beta"],
    "delta_state": ["beta", "state"],
    "groups": ["beta", "groups", "state"],
    "turning": ["beta", "angle", "state"],
    "mask": ["beta", "angle", "state", "mask"],
    "documents": ["beta", "state", "reset"],
    "turning_documents": ["beta", "angle", "state", "reset", "reset_first"],
    "hebbian": ["angle"],
    "hebbian_documents": ["state", "reset"],
}


def common(given, L, P, N):
    """The arguments that both ops have."""
    out = {"log_decay": gate(B, L, H), "v": torch.randn(B, L, H, P)}
    if "angle" in given:
        out["angle"] = 3 * torch.randn(B, L, H, N)
    if "state" in given:
        out["state"] = torch.randn(B, H, 2 * N, P)
    if "reset" in given:
        out["reset"] = torch.zeros(B, L, dtype=torch.bool)
        out["reset"][0, [L // 3, L // 3 + 1]] = True
        out["reset"][1, L - 1] = True
        out["reset"][0, 0] = "reset_first" in given
    if "mask" in given:
        out["mask"] = torch.ones(B, L, dtype=torch.bool)
        out["mask"][1, L // 2 :] = False
    return out


def semiseparable_inputs(given, L, P=P, N=N):
    out = common(given, L, P, N)
    G = 2 if "groups" in given else H
    out |= {"b": torch.randn(B, L, G, 2 * N) / N, "c": torch.randn(B, L, G, 2 * N)}
    out |= {name: gate(B, L, H) for name in ("log_write", "log_read") if name in given}
    if "frequency" in given:
        out |= {"angle": 3 * torch.rand(B, L, H), "frequency": torch.randn(H, N)}
    if "skip" in given or "skip_token" in given:
        out["skip"] = torch.randn(H) if "skip" in given else torch.randn(B, L, H)
    return out | ({"read_first": True} if "read_first" in given else {})


def delta_rule_inputs(given, L, P=P, N=N):
    out = common(given, L, P, N)
    G = 2 if "groups" in given else H
    out["k"], out["q"] = (F.normalize(torch.randn(B, L, G, 2 * N), dim=-1) for _ in range(2))
    return out | {"erase": 1.5 * torch.rand(B, L, H) if "beta" in given else None}


def errors(op, reference, inputs, dtype, device="cpu", **keywords) -> dict[str, float]:
    """Relative errors of values, states and all gradients of ``op`` in a dtype beside the reference in float64."""
    half = {"v", "b", "c", "k", "q"}  # that models compute in bfloat16

    def prepare(tensors, wide):
        out = {}
        for name, x in tensors.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x = x.to(dtype if name in half else torch.float32)  # both see the same rounded inputs
                x = x.to(device, torch.float64 if wide else None).requires_grad_()
            out[name] = x.to(device) if isinstance(x, torch.Tensor) else x
        return out

    ours, theirs = prepare(inputs, False), prepare(inputs, True)
    y, S = op(**ours, **keywords)
    y_ref, S_ref = reference(**theirs)
    assert y.dtype == dtype
    assert S.dtype == torch.float32
    if inputs.get("mask") is not None:
        y, y_ref = (x.masked_fill(~ours["mask"][..., None, None], 0) for x in (y, y_ref))
    out = {"y": relative(y, y_ref), "S": relative(S, S_ref)}
    weight_y, weight_S = torch.randn_like(y_ref), torch.randn_like(S_ref)
    loss = (y.double() * weight_y).sum() + (S.double() * weight_S).sum()
    wanted = [n for n, x in ours.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    fast = torch.autograd.grad(loss, [ours[n] for n in wanted])
    slow = torch.autograd.grad((y_ref * weight_y).sum() + (S_ref * weight_S).sum(), [theirs[n] for n in wanted])
    return out | {name: relative(a, b) for name, a, b in zip(wanted, fast, slow, strict=True)}


OPS = {
    "semiseparable": (semiseparable_chunked, semiseparable_reference, semiseparable_inputs, SEMISEPARABLE),
    "delta_rule": (delta_rule_chunked, delta_rule_reference, delta_rule_inputs, DELTA_RULE),
}
CASES = [(op, case) for op, (*_, cases) in OPS.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_translation(name, case, fla):
    """Values, gradients, states; the phases of a length that is no multiple of the chunk."""
    op, reference, inputs, cases = OPS[name]
    given = inputs(cases[case], L=21)
    found = errors(op, reference, given, torch.float32, backend="fla", chunk_size=8)
    assert max(found.values()) < 2e-5, found
    kernel = "chunk_simple_gla" if given.get("erase") is None else "chunk_gated_delta_rule"
    assert fla == [kernel]


@pytest.mark.parametrize("name", OPS)
def test_translation_of_bfloat16_and_of_one_token(name, fla):
    op, reference, inputs, cases = OPS[name]
    case = cases["read_first_with_all" if name == "semiseparable" else "turning_documents"]
    found = errors(op, reference, inputs(case, 21), torch.bfloat16, backend="fla")
    assert max(found.values()) < 5e-2, found
    found = errors(op, reference, inputs(["angle", "beta", "state"], 1), torch.float32, backend="fla")
    assert max(found.values()) < 2e-5, found


if fla_backend.available():  # the kernels themselves; collected where they can run, so that nothing is ever skipped
    TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # float32 products may be TF32

    @pytest.mark.filterwarnings("default")  # of that package
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(("L", "P", "N"), [(63, 64, 32), (64, 64, 32), (200, 48, 20)])
    @pytest.mark.parametrize(("name", "case"), CASES)
    def test_kernels(name, case, L, P, N, dtype):
        """Not far from what PyTorch's form makes of the same inputs in the same dtype, beside the reference."""
        op, reference, inputs, cases = OPS[name]
        given = inputs(cases[case], L, P, N)
        theirs = errors(op, reference, given, dtype, "cuda", backend="fla")
        ours = errors(op, reference, given, dtype, "cuda", backend="torch")
        far = {n: (e, ours[n]) for n, e in theirs.items() if e > TOLERANCE[dtype] + 2 * ours[n]}
        assert not far, far


def test_beta_is_the_erase_vector_beta_k():
    """β (B, L, H) gives what e = βk and βv give, in all three forms."""
    given = delta_rule_inputs(["beta", "angle", "state"], 21)
    beta = given.pop("erase")
    vectors = {**given, "v": beta[..., None] * given["v"], "erase": beta[..., None] * given["k"]}
    for op in (delta_rule_chunked, delta_rule_reference):
        for a, b in zip(op(**given, erase=beta), op(**vectors), strict=True):
            assert torch.equal(a, b)

    def step(x):
        return delta_rule_step(*(x[n][:, 0] for n in ("v", "k", "q", "erase", "log_decay", "angle")), x["state"])

    for a, b in zip(step({**given, "erase": beta}), step(vectors), strict=True):
        assert torch.equal(a, b)


MODELS = {
    "spectral_gate": {},
    "spectral_gate, real": {"rotation": "none"},
    "spectral_gate, token angles": {"rotation": "token"},
    "spectral_gate, groups": {"num_groups": 1, "output_norm": "gated", "frequency_mixing": True},
    "spectral_gate, trapezoidal": {"trapezoidal": True},
    "holographic": {},
    "holographic, turning": {"rotation": "step"},
    "holographic, hebbian": {"erase": "none", "decay": "none"},
    "multi_scale:spectral_gate": {"scales": (4,)},
}


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name, fla):
    """Padded, packed, carried on from a state: outputs, states and gradients of a mixer on both backends."""
    mixer, x = name.split(",")[0], torch.randn(2, 40, 16)
    config = ResonanceConfig(hidden_size=16, num_heads=2, mixers=(mixer,), chunk_size=16, **MODELS[name])
    torch.manual_seed(0)
    layer = build_mixer(mixer, config)
    config.backend = "fla"
    other = build_mixer(mixer, config)
    other.load_state_dict(layer.state_dict())
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :9] = False
    reset = torch.zeros_like(mask)
    reset[0, 13] = True

    def run(layer):
        y0, state = layer(x[:, :23], mask=mask[:, :23], reset=reset[:, :23], return_state=True)
        y1, state = layer(x[:, 23:39], state=state, return_state=True)
        y2, state = layer(x[:, 39:], state=state, return_state=True)  # one token: a step
        y = torch.cat((y0, y1, y2), dim=1)
        return y, state, torch.autograd.grad(y.square().sum(), list(layer.parameters()))

    y, state, gradients = run(layer)
    assert fla == []
    y_fla, state_fla, gradients_fla = run(other)
    assert fla
    assert relative(y_fla, y) < 1e-4
    for n in state:
        assert relative(state_fla[n], state[n]) < 1e-4, n
    for (n, _), a, b in zip(layer.named_parameters(), gradients_fla, gradients, strict=True):
        assert relative(a, b) < 1e-3, n


def test_state_bytes_need_no_gpu():
    config = ResonanceConfig(hidden_size=16, num_heads=2, backend="fla")
    assert build_mixer("spectral_gate", config).state_bytes() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "triton"}, "backend = 'triton': must be 'torch' or 'fla'"),
        (
            {"mixers": ("spectral_gate", "attention")},
            "only spectral_gate and holographic run on it, attention",
        ),
        ({"mixers": ("multi_scale:hrr",)}, "multi_scale:hrr does not"),
        ({"mixers": ("holographic",), "erase": "gated"}, "erase = 'gated' has no kernel"),
        ({"mixers": ("holographic",), "erase": "hermitian"}, "erase = 'hermitian' has no kernel"),
        ({"mixers": ("holographic",), "decay": "channel"}, "decay = 'channel' has no kernel"),
        ({"mixers": ("holographic",), "rotation": "token", "num_heads": 2}, "rotation = 'token' has no kernel"),
    ],
)
def test_a_model_without_a_kernel_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ResonanceForCausalLM(ResonanceConfig(**{"vocab_size": 9, "hidden_size": 16, "backend": "fla", **change}))


def test_only_mixers_with_a_kernel_say_so(fla):
    """``backends`` of every mixer is what it does."""
    for name, mixer in MIXERS.items():
        if "fla" in mixer.backends:
            config = ResonanceConfig(hidden_size=16, num_heads=2, mixers=(name,), backend="fla")
            fla.clear()
            build_mixer(name, config)(torch.randn(1, 5, 16))
            assert fla, name
        else:
            with pytest.raises(ValueError, match=f"{name} does not"):
                ResonanceConfig(hidden_size=16, num_heads=2, mixers=(name,), backend="fla")


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (delta_rule_chunked, {"hermitian": True}, "no hermitian = True"),
        (delta_rule_chunked, {"log_decay": gate(B, 5, H, 2 * N)}, "no log_decay .B, L, H, K., only .B, L, H."),
        (delta_rule_chunked, {"erase": torch.randn(B, 5, H, 2 * N)}, "no erase .B, L, H, K., only β"),
        (delta_rule_chunked, {"v": torch.randn(B, 5, H, P).double()}, "v is torch.float64, the kernels take bfloat16"),
        (delta_rule_chunked, {"k": torch.randn(B, 5, H, 258)}, "K = 258 reals, the kernel takes up to 256"),
        (delta_rule_chunked, {"v": torch.randn(B, 5, H, 7).bfloat16()}, "P = 7 channels a head"),
        (semiseparable_chunked, {"v": torch.randn(B, 5, H, P).double()}, "v is torch.float64"),
        (semiseparable_chunked, {"v": torch.randn(B, 5, H, 7).half()}, "P = 7 channels a head"),
        (semiseparable_chunked, {"backend": "cuda"}, "backend = 'cuda': must be 'torch' or 'fla'"),
        (delta_rule_chunked, {"backend": "cuda"}, "backend = 'cuda': must be 'torch' or 'fla'"),
    ],
)
def test_what_the_kernels_lack(op, change, message, fla):
    inputs = semiseparable_inputs if op is semiseparable_chunked else delta_rule_inputs
    given = {**inputs(["beta"], 5), "backend": "fla", **change}
    with pytest.raises(ValueError, match=message) as error:
        op(**given)
    assert "\n" not in str(error.value)
    assert "torch" in str(error.value)


def test_without_a_gpu_or_the_package(monkeypatch):
    """One line that says what to install; nothing runs by another backend instead."""
    given = semiseparable_inputs([], 5)
    with pytest.raises(ValueError, match=r"the device is 'cpu'; it needs an NVIDIA GPU and pip install .*\[cuda\]"):
        semiseparable_chunked(**given, backend="fla")
    monkeypatch.setattr(fla_backend, "DEVICES", ("cpu",))
    for package in (None, ModuleType("fla")):  # nothing installed, or fla-core without what it needs
        monkeypatch.setitem(sys.modules, "fla", package)
        monkeypatch.setitem(sys.modules, "fla.ops", None)
        with pytest.raises(ValueError, match=r"pip install 'resonance-nn\[cuda\]'") as error:
            semiseparable_chunked(**given, backend="fla")
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=r"pip install 'resonance-nn\[cuda\]'"):
            delta_rule_chunked(**delta_rule_inputs(["beta"], 5), backend="fla")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "backend=fla"], "pip install 'resonance-nn[cuda]'"),
        (["--set", "backend=cuda"], "backend = 'cuda': must be 'torch' or 'fla'"),
        (["--set", "backend=fla", "--mixers", "hrr"], "hrr does not"),
        (["--set", "backend=fla", "--mixers", "holographic", "--set", "erase=gated"], "erase = 'gated' has no kernel"),
    ],
)
def test_command_line(arguments, message, tmp_path, capsys):
    """Refused before data is read or anything is written, in one line, with exit code 2."""
    run = ["train", "--data", "stdlib", "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*run, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_backend_is_of_the_machine_not_of_the_model(tmp_path):
    """It is not saved: what was trained on a GPU loads anywhere, and the choice is made where it is loaded."""
    config = ResonanceConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, backend="fla")
    assert "backend" not in ResonanceConfig.architecture()
    ResonanceForCausalLM(config).save_pretrained(tmp_path)
    assert "backend" not in (tmp_path / "config.json").read_text()
    assert torch.isfinite(ResonanceForCausalLM.from_pretrained(tmp_path)(torch.tensor([[1, 2]])).logits).all()
    model = ResonanceForCausalLM.from_pretrained(tmp_path, backend="fla")
    assert model.config.backend == "fla"
    assert model.model.backbone.blocks[0].mixer.backend == "fla"


def test_fla_is_not_imported_unless_asked_for(tmp_path):
    """Not by importing the package, nor by computing with backend = "torch", with an ``fla`` there to be imported."""
    (tmp_path / "fla.py").write_text("raise SystemExit('imported')")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, resonance_nn.cli
from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.ops import fla_backend
config = ResonanceConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, mixers=("spectral_gate", "holographic"))
ids = torch.arange(8)[None]
ResonanceForCausalLM(config)(ids, labels=ids).loss.backward()
fla_backend.available()
assert not [name for name in sys.modules if name.split(".")[0] in ("fla", "triton")], sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=True)
