"""torch.compile: a compiled training step is the eager one. Without a C++ compiler: what the compiler traces and
differentiates, run by PyTorch."""

from __future__ import annotations

import pytest
import torch
from conftest import relative

from resonance_nn import ResonanceConfig, ResonanceForCausalLM


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
