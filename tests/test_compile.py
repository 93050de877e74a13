"""torch.compile: a compiled training step is the eager one. First without a C++ compiler: what the compiler traces and
differentiates, run by PyTorch; then, where there is one, compiled."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import relative

from resonance_nn import ResonanceConfig, ResonanceForCausalLM, ResonanceForImageClassification


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
@pytest.mark.parametrize(
    ("mixer", "length", "autocast"),
    [
        ("spectral_gate", 128, True),  # whole chunks
        ("spectral_gate", 150, False),
        ("holographic", 150, True),
        ("resonance", 150, True),
    ],
)
def test_training_step(mixer: str, length: int, autocast: bool):
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = ResonanceConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_heads=2, mixers=(mixer,))
    config.initial_recall = 0.0  # from random maps all gradients are above bfloat16's rounding
    model, ids = ResonanceForCausalLM(config).train(), torch.randint(61, (2, length))
    traced = torch.compile(model, backend="aot_eager")

    def step(f: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = f(ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    for ours, eager in zip(step(traced), step(model), strict=True):
        assert relative(ours, eager) < (5e-2 if autocast else 1e-4)


def image_model() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A small one, and inputs that it can be trained on."""
    fields = {"image_size": 16, "num_channels": 1, "num_labels": 2, "mixers": ("global_filter",)}
    config = ResonanceConfig(hidden_size=32, num_hidden_layers=1, num_heads=2, **fields)
    inputs = {"pixel_values": torch.rand(4, 1, 16, 16), "labels": torch.tensor([0, 1, 1, 0])}
    return ResonanceForImageClassification(config).train(), inputs


@pytest.mark.filterwarnings("ignore")
def test_training_step_of_images():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, inputs = image_model()
    gradients = []
    for f in (torch.compile(model, backend="aot_eager"), model):
        model.zero_grad()
        f(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, eager in zip(*gradients, strict=True):
        assert relative(ours, eager) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mixer", "fields"),
    [
        *((name, {}) for name in ("spectral_gate", "holographic", "resonance", "hrr", "resolvent", "global_filter")),
        ("hrr", {"num_traces": 2}),
    ],
)
def test_compiled_for_this_machine(mixer: str, fields: dict[str, int]):
    """The C++ that is made of it has its own faults: at complex numbers that pass from one graph to the next."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = ResonanceConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_heads=2, mixers=(mixer,), **fields)
    model: torch.nn.Module
    if mixer == "global_filter":
        model, inputs = image_model()
    else:
        model, ids = ResonanceForCausalLM(config), torch.randint(61, (2, 100))
        inputs = {"input_ids": ids, "labels": ids}

    def step(f: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        loss = f(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    model.train()
    for ours, eager in zip(step(torch.compile(model)), step(model), strict=True):
        assert relative(ours, eager) < 1e-4
