"""The ops suite: a wrong op is not measured, and floors are counted right."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from resonance_nn.bench import ops
from resonance_nn.bench.op_cases import CASES, Cost, Shape
from resonance_nn.bench.ops import OpsOptions, Rates, check_op, run
from resonance_nn.cli import main

BY_NAME = {case.name: case for case in CASES}
WHOLE = Shape(batch=2, length=256, width=64, heads=2, vocab_size=300)
SMALL = OpsOptions(tokens=64, length=32, hidden_size=32, heads=2, vocab_size=50, repeats=2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_op_passes_its_gate(case, dtype):
    check_op(case, dtype, "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_value_is_not_measured(case):
    def broken(**inputs):
        value = case.function(**inputs)
        return (value[0] * 1.01, *value[1:]) if isinstance(value, tuple) else value * 1.01

    with pytest.raises(RuntimeError, match="nothing is measured"):
        check_op(replace(case, function=broken), torch.float32, "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_gradient_is_not_measured(case):
    def broken(**inputs):
        def bend(x):
            return x.detach() + 1.01 * (x - x.detach()) if x.requires_grad else x

        return case.function(**{name: bend(x) for name, x in inputs.items()})

    with pytest.raises(RuntimeError, match="the gradient of"):
        check_op(replace(case, function=broken), torch.float32, "cpu")


def test_nothing_is_timed_after_a_failed_gate(monkeypatch):
    broken = replace(BY_NAME["unit"], function=lambda x: x)
    monkeypatch.setattr(ops, "CASES", (BY_NAME["silu_gate"], broken))
    monkeypatch.setattr(ops, "measured_rates", None)
    with pytest.raises(RuntimeError, match="unit in float32"):
        run(SMALL)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_are_those_of_inputs_outputs_and_gradients(case):
    shape = Shape(batch=2, length=512, width=128, heads=4, vocab_size=1024)
    inputs = ops._inputs(case, shape, torch.bfloat16, "cpu")
    outputs = ops._outputs(case.function(**inputs))
    kept = outputs if case.name == "semiseparable_step" else outputs[:1]
    floating = sum(x.nbytes for x in inputs.values() if x.is_floating_point())
    out = sum(y.nbytes for y in kept)
    forward, backward = case.cost(shape, 2)
    assert forward.bytes == pytest.approx(floating + out, rel=0.05)
    if backward is not None:
        assert backward.bytes == pytest.approx(2 * floating + out, rel=0.05)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("semiseparable_chunked, real", 1e-9),
        ("semiseparable_chunked, complex", 1e-9),
        ("linear_cross_entropy", 1e-9),
        ("delta_rule_chunked", 0.15),  # torch counts no triangular inverse
    ],
)
def test_operations_are_those_of_the_matmuls(name, tolerance):
    case = BY_NAME[name]
    inputs = ops._inputs(case, WHOLE, torch.float32, "cpu")
    forward, backward = case.cost(WHOLE, 4)
    assert backward is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.function(**inputs)
    assert counter.get_total_flops() == pytest.approx(forward.operations, rel=tolerance)
    with FlopCounterMode(display=False) as counter:
        ops._call(case, inputs, backward=True)()
    twice = forward.operations  # `_call` runs the op once to learn its output's shape
    if name == "linear_cross_entropy":  # its gradients are formed in the forward pass
        twice += backward.operations
    assert counter.get_total_flops() == pytest.approx(twice + forward.operations + backward.operations, rel=tolerance)


def test_floor_is_the_longer_of_moving_and_computing():
    rates = Rates(bandwidth=10.0, matmul=100.0, matmul_float32=5.0)
    assert rates.floor(Cost(20, 100)) == (2.0, "bytes")
    assert rates.floor(Cost(20, 400)) == (4.0, "operations")
    assert rates.floor(Cost(20, 100), fft=True) == (20.0, "operations")
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_rates_are_of_this_machine():
    rates = ops.measured_rates(torch.float32, "cpu", repeats=1)
    assert 1e8 < rates.bandwidth < 1e13
    assert 1e9 < rates.matmul < 1e15


def test_run_times_what_it_says(monkeypatch):
    monkeypatch.setattr(ops, "measured_rates", lambda dtype, device: Rates(1e9, 1e9, 1e9))
    monkeypatch.setattr(ops, "CALL_SECONDS", 1e-4)
    steps = []
    payload = run(SMALL, lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] == len(steps)
    rows = {(row["case"], row["metric"]): row for row in payload["rows"]}
    assert len(rows) == 2 * len(CASES) - 1
    assert ("semiseparable_step", "forward + backward ms") not in rows
    row = rows["silu_gate", "forward ms"]
    assert row["peer"] == pytest.approx(1e3 * 3 * 64 * 32 * 2 / 1e9)
    assert row["ratio"] == pytest.approx(sum(row["seconds"]) / 2 / (row["peer"] / 1e3))
    assert row["ns_per_element"] == pytest.approx(1e9 * sum(row["seconds"]) / 2 / (64 * 32))
    json.dumps(payload, allow_nan=False)


def test_a_call_with_gradients_takes_them(monkeypatch):
    seen = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: seen.append(len(a[1])) or original(*a))
    case = BY_NAME["silu_gate"]
    inputs = ops._inputs(case, WHOLE, torch.bfloat16, "cpu")
    ops._call(case, inputs, backward=False)()
    assert seen == []
    ops._call(case, inputs, backward=True)()
    assert seen == [2]


def test_command_writes_table_json_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ops, "COPY_BYTES", 1 << 20)
    arguments = ["--ops", "silu_gate,semiseparable", "--tokens", "64", "--length", "32", "--hidden-size", "32"]
    arguments += ["--heads", "2", "--vocab-size", "50", "--repeats", "1", "--dtype", "fp32", "--seed", "1"]
    files = ["--json", str(tmp_path / "ops.json"), "--plot", str(tmp_path / "ops.png")]
    assert main(["bench", "ops", *arguments, "--device", "cpu", *files]) == 0
    out, err = capsys.readouterr()
    assert "GB/s" in out
    assert err == ""
    payload = json.loads((tmp_path / "ops.json").read_text())
    assert payload["suite"] == "ops"
    assert payload["options"]["ops"] == [n for n in BY_NAME if n.startswith(("silu_gate", "semiseparable"))]
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ops", "bogus"],
        ["--ops", ""],
        ["--tokens", "100", "--length", "64"],
        ["--hidden-size", "30"],
        ["--heads", "0"],
        ["--repeats", "0"],
        ["--vocab-size", "0"],
        ["--dtype", "auto"],
        ["--json", "/no/such/folder/ops.json"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["bench", "ops", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
