"""The optimizers: every parameter once, decay on maps and embeddings only, Muon's state saved and resumed exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resonance_nn import ResonanceConfig, ResonanceForCausalLM, optim
from resonance_nn.arguments import OPTIMIZERS
from resonance_nn.optim import BatchedMuon, Together, build_optimizer, orthogonalised

CONFIG = ResonanceConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_heads=2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + count):
        ids = (torch.arange(24) + torch.tensor([[step], [7 * step]])) % 50  # the next one follows from the last
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_once_and_decay_on_maps_and_embeddings(name: str):
    model = ResonanceForCausalLM(CONFIG)
    optimizer = build_optimizer(model, name, lr=0.5, weight_decay=0.25)
    groups = optimizer.param_groups
    assert sorted(map(id, model.parameters())) == sorted(id(p) for group in groups for p in group["params"])
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    maps = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert decayed == maps
    assert {group["lr"] for group in groups} == {0.5}


def test_muon_takes_the_matrices_between_hidden_layers():
    model = ResonanceForCausalLM(CONFIG)
    optimizer = build_optimizer(model, "muon")
    assert isinstance(optimizer, Together)
    matrices = {id(p) for p in optimizer.parts[0].param_groups[0]["params"]}
    block = model.model.backbone.blocks[0]
    assert id(block.mixer.in_proj.weight) in matrices
    assert id(block.mlp.up_proj.weight) in matrices
    for p in (model.get_input_embeddings().weight, block.mixer.step_proj.weight, block.mixer.damping):
        assert id(p) not in matrices
    untied = ResonanceForCausalLM(ResonanceConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": False}))
    (muon, _) = build_optimizer(untied, "muon").parts
    assert id(untied.lm_head.weight) not in {id(p) for group in muon.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learns_and_resumes_exactly(name: str):
    torch.manual_seed(0)
    model = ResonanceForCausalLM(CONFIG).train()
    optimizer = build_optimizer(model, name, lr=1e-2)
    losses = steps(model, optimizer, 12)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    state = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)
    after = steps(model, optimizer, 4, start=12)
    assert after[-1] < losses[0] - 0.5
    again = ResonanceForCausalLM(CONFIG).train()
    again.load_state_dict(weights)
    resumed = build_optimizer(again, name, lr=3.0)
    resumed.load_state_dict(state)
    assert steps(again, resumed, 4, start=12) == after
    assert {group["lr"] for group in resumed.param_groups} == {1e-2}


def test_a_changed_rate_reaches_every_part():
    model = ResonanceForCausalLM(CONFIG)
    optimizer = build_optimizer(model, "muon")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in model.parameters()]
    steps(model.train(), optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_unknown_name():
    with pytest.raises(ValueError, match="optimizer = 'sgd': must be muon or adamw"):
        build_optimizer(nn.Linear(2, 2), "sgd")


def test_orthogonalised_is_the_polynomial_of_the_singular_values():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 9, dtype=torch.float64)
    a, b, c = coefficients = (3.4445, -4.7750, 2.0315)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ v
    torch.testing.assert_close(orthogonalised(x, coefficients), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(orthogonalised(x.float(), coefficients), expected.float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(orthogonalised(torch.zeros(1, 4, 6), coefficients), torch.zeros(1, 4, 6))  # no gradient yet


@pytest.mark.parametrize(("at_once", "bf16"), [(1, False), (2**24, False), (2**24, True)])
def test_muon_steps_as_pytorchs_does(at_once: int, bf16: bool, monkeypatch: pytest.MonkeyPatch):
    """Shapes that lie, stand, are square and share a batch; PyTorch's orthogonalises in bfloat16 always."""
    monkeypatch.setattr(optim, "computes_in_bf16", lambda device: bf16)
    monkeypatch.setattr(optim, "AT_ONCE", at_once)
    torch.manual_seed(0)
    shapes = [(16, 40), (40, 16), (16, 40), (24, 24), (24, 24), (17, 33)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = BatchedMuon(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in ours]
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        ours[2].grad = theirs[2].grad = None  # a part that was not used
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        moved = (q - start).norm()
        assert (p - q).norm() <= 0.02 * moved
    assert torch.equal(ours[2], before[2])
    for mine, other in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
        assert list(mine) == list(other)
        torch.testing.assert_close(mine["momentum_buffer"], other["momentum_buffer"])
