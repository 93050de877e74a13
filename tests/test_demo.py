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

import pytest

ROOT = Path(__file__).parent.parent


def test_a_machine_that_is_slow_trains_a_smaller_model(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples/demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "LARGE", {"hidden_size": 16, "num_hidden_layers": 1})
    assert demo.fitting_shape(4096) == demo.LARGE
    monkeypatch.setattr(demo, "TOO_LONG", 0.0)
    assert demo.fitting_shape(4096) == demo.SMALL


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
