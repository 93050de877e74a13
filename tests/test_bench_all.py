"""All suites in one command: what they are asked for, what is written as they finish, and what a failure leaves."""

from __future__ import annotations

import json

import pytest

from resonance_nn.bench import capacity, context, decode, memory, mixers, ops, peak, scaling, speed, summary, throughput
from resonance_nn.cli import bench_all, main
from resonance_nn.cli.bench_all import PRESETS, Preset

WIDTH = "--hidden-size 64 --layers 1 --vocab-size 300 --device cpu"
TINY = {
    "speed": f"--lengths 16,32 --tokens-per-batch 32 --repeats 1 {WIDTH}",
    "memory": f"--lengths 32 --tokens-per-batch 32 {WIDTH}",
    "decode": f"--contexts 8,16 --batch-sizes 1,2 --tokens 2 --repeats 1 {WIDTH}",
    "context": f"--prefill 64 --train 32 {WIDTH}",
    "ops": "--ops silu_gate --tokens 32 --length 32 --hidden-size 32 --heads 2 --repeats 1 --device cpu",
    "scaling": f"--lengths 16,32,64 --repeats 1 {WIDTH}",
    "throughput": f"--batches 1,2 --length 16 --repeats 1 {WIDTH}",
    "mixers": "--length 16 --tokens-per-batch 16 --hidden-size 128 --layers 1 --repeats 1 --device cpu",
    "capacity": "--dims 64 --pairs 1,2 --trials 64",
}
SUITES = {
    "speed": (speed, speed.SpeedOptions()),
    "memory": (memory, memory.MemoryOptions()),
    "decode": (decode, decode.DecodeOptions()),
    "context": (context, context.ContextOptions()),
    "ops": (ops, ops.OpsOptions()),
    "scaling": (scaling, scaling.ScalingOptions()),
    "throughput": (throughput, throughput.ThroughputOptions()),
    "mixers": (mixers, mixers.MixerSpeedOptions()),
    "capacity": (capacity, capacity.CapacityOptions()),
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Small suites, in this process; the commands that ran."""
    ran: list[str] = []

    def call(function, *arguments, progress=None, keep=None):
        if function is bench_all.run_command:
            ran.append(arguments[0][1])
        return function(*arguments, **({} if progress is None else {"progress": progress}))

    monkeypatch.setattr(bench_all, "PRESETS", {name: Preset(text, text) for name, text in TINY.items()})
    for module in (peak, memory, context):
        monkeypatch.setattr(module, "in_own_process", call)
    monkeypatch.setattr(ops, "COPY_BYTES", 1 << 20)
    monkeypatch.chdir(tmp_path)
    return ran


def options_of(arguments: list[str], suite, monkeypatch):
    given = []

    def fake(options, progress):
        given.append(options)
        raise ValueError("seen")

    monkeypatch.setattr(suite, "run", fake)
    assert main(arguments) == 2
    return given[0]


@pytest.mark.parametrize("name", SUITES)
def test_a_command_without_arguments_is_the_options_without_arguments(name, monkeypatch):
    """So that no default has two values, on a machine that computes in bfloat16."""
    suite, default = SUITES[name]
    monkeypatch.setattr("resonance_nn.evaluation.resolve_device", lambda device: "cpu")
    monkeypatch.setattr("resonance_nn.evaluation.computes_in_bf16", lambda device: True)
    assert options_of(["bench", name], suite, monkeypatch) == default


def test_presets_are_of_the_suites(monkeypatch):
    assert list(PRESETS) == list(SUITES) == list(TINY)
    monkeypatch.setattr("resonance_nn.evaluation.resolve_device", lambda device: "cpu")

    def asked(name, which):
        return options_of(["bench", name, *getattr(PRESETS[name], which).split()], SUITES[name][0], monkeypatch)

    assert asked("speed", "short").lengths == (512, 2048, 8192)
    assert asked("speed", "full").lengths[-1] == 65_536
    assert asked("speed", "full").peers == ("llama", "mamba2")
    assert asked("decode", "full").contexts[-1] == asked("scaling", "full").lengths[-1] == 1 << 20
    short, full = asked("context", "short"), asked("context", "full")
    assert (short.prefill, short.train) == ((65_536,), (32_768,))
    assert (full.prefill, full.train) == ((262_144, 1_048_576), (262_144,))
    assert asked("capacity", "full") == capacity.CapacityOptions.full()


def test_every_suite_is_run_and_written_and_kept(tiny, tmp_path, capsys):
    assert main(["bench", "all", "--json", "all.json"]) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "runs" / "bench-all"
    assert tiny == list(TINY)
    assert "1 of 9: resonance bench speed --lengths 16,32" in err
    written = {name: json.loads((folder / f"{name}.json").read_text()) for name in TINY}
    for name, payload in written.items():
        assert payload["suite"] == name
        assert payload["command"] == f"resonance bench {name} {TINY[name]}"
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {
        "summary.md",
        *(f"{name}.{kind}" for name in TINY for kind in ("json", "png")),
    }
    whole = json.loads((tmp_path / "all.json").read_text())
    assert [each["suite"] for each in whole["suites"]] == list(TINY)
    assert all(each["error"] is None and each["seconds"] > 0 for each in whole["suites"])
    assert {row["suite"] for row in whole["rows"]} == set(TINY)
    lines = (folder / "summary.md").read_text().splitlines()
    assert sum(line.startswith("| `resonance bench") for line in lines) == len(whole["rows"])
    assert all(line.count("|") == 6 for line in lines if line.startswith("|"))
    for text in ("exponent", "× its own matmuls", "peak bytes above weights", "bytes of state"):
        assert any(text in line for line in lines)
        assert text in out

    (folder / "ops.json").unlink()
    written["scaling"]["command"] = "resonance bench scaling --full"
    (folder / "scaling.json").write_text(json.dumps(written["scaling"]))
    (folder / "mixers.json").write_text('{"suite"')
    tiny.clear()
    assert main(["bench", "all", "--resume"]) == 0
    out, err = capsys.readouterr()
    assert tiny == ["ops", "scaling", "mixers"]
    assert "resonance bench decode --contexts 8,16" in err
    assert ", done before" in err
    assert (folder / "summary.md").read_text().count("| `resonance bench speed") == 4


def test_a_suite_that_fails_is_one_line_and_the_others_run(tiny, tmp_path, capsys, monkeypatch):
    def broken(options, progress):
        raise RuntimeError("the model is not causal\nat position 1")

    monkeypatch.setattr(speed, "run", broken)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "speed.json").write_text("{}")  # of a run before
    assert main(["bench", "all", "--only", "speed,ops", "--output-dir", "out", "--full", "--json", "-"]) == 1
    out, err = capsys.readouterr()
    assert "speed failed: the model is not causal at position 1\n" in err
    assert tiny == ["speed", "ops"]
    payload = json.loads(out)
    assert [each["error"] for each in payload["suites"]] == ["the model is not causal at position 1", None]
    assert {row["suite"] for row in payload["rows"]} == {"ops"}
    assert not (tmp_path / "out" / "speed.json").exists()
    assert (tmp_path / "out" / "ops.json").exists()
    assert "failed: the model is not causal at position 1" in (tmp_path / "out" / "summary.md").read_text()


def test_a_suite_has_a_process_of_its_own(tmp_path, capfd, monkeypatch):
    """Really. Its table goes to standard error when standard output is JSON."""
    monkeypatch.setattr(bench_all, "PRESETS", {"capacity": Preset(TINY["capacity"])})
    assert main(["bench", "all", "--output-dir", str(tmp_path), "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["suites"][0]["error"] is None
    assert "HRR: at most" in err


def test_what_was_not_measured_is_told():
    rows = [{"case": "L=8", "metric": "peak bytes", "ours": None, "peer": 5, "peer_name": "Llama", "ratio": None}]
    (figure,) = summary.figures({"suite": "memory", "rows": rows})
    assert summary.cells("c", figure) == ("c", "L=8", "not measured: peak bytes", "Llama", "")


@pytest.mark.parametrize(
    "arguments",
    [["--only", "bogus"], ["--only", ""], ["--json", "/no/such/folder/all.json"], ["--output-dir", "/dev/null"]],
)
def test_wrong_arguments(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "all", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
