"""`make demo`, shortened: it runs, goes on after Ctrl-C, and says what it measured."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from resonance_nn.training import TrainArguments, TrainingInterrupted

ROOT = Path(__file__).parent.parent


def loaded() -> Any:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples/demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo


def test_a_machine_that_is_slow_trains_a_smaller_model(monkeypatch: pytest.MonkeyPatch):
    demo = loaded()
    monkeypatch.setattr(demo, "LARGE", {"hidden_size": 16, "num_hidden_layers": 1})
    said: list[str] = []
    assert demo.fitting_shape(4096, said.append) == demo.LARGE
    assert not said
    assert demo.fitting_shape(10**12, said.append) == demo.SMALL
    assert "minutes here: one of 1.3M, then" in said[0]


@pytest.mark.parametrize("settings", [{"size": "tiny", "config": {}}, {"size": None, "config": {"hidden_size": 128}}])
def test_an_unfinished_run_goes_on_with_its_own_shape(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One begun by an earlier version too, which named a size."""
    demo, given = loaded(), []

    def train(arguments: TrainArguments) -> None:
        given.append(arguments)
        raise TrainingInterrupted(1, 2)

    monkeypatch.setattr("resonance_nn.training.train", train)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output-dir", str(tmp_path)])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "run.json").write_text(json.dumps({"settings": settings}))
    assert demo.main() == 130
    assert given[0].resume
    assert {"size": given[0].size, "config": given[0].config} == settings


@pytest.mark.slow
def test_demo(tmp_path: Path):
    command = [sys.executable, str(ROOT / "examples/demo.py"), "--output-dir", str(tmp_path / "demo")]
    command += ["--tokens", "81920"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside other tests two threads wait for each other
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    while not (tmp_path / "demo" / "data" / "run.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    if process.returncode == 130:
        assert "`make demo` goes on from there" in output
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert finished.returncode == 0, finished.stderr
    assert "resuming after step" in finished.stderr
    figures = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert f"{figures['eval']['bits_per_byte']:.3f} bits per byte" in finished.stdout
    assert f"{figures['eval']['lzma_bits_per_byte']:.3f}" in finished.stdout
    assert figures["completion"].strip() in finished.stdout
    assert (tmp_path / "demo" / "loss.png").stat().st_size > 10_000
