"""`resonance train` and `resonance eval` as a user runs them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command

from resonance_nn.cli import app, main
from resonance_nn.rundir import RunFolder
from resonance_nn.training import TrainArguments

SOURCE = Path(__file__).parent.parent / "resonance_nn"
SMALL = "--set hidden_size=32 --set num_hidden_layers=2 --vocab-size 300 --seq-len 64 --batch-size 2 --precision fp32"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("config.py", "layers.py"):
        (folder / name).write_bytes((SOURCE / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A model, and what the command said and wrote."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    report = folder.parent / "report.json"
    fields = "--set initial_context=64"  # as long as the windows: 30 steps are too few to learn what else to forget
    line = f"train --data {text} --output-dir {folder} --steps 30 --lr 1e-2 --json {report} {SMALL} {fields}"
    assert main(line.split()) == 0
    return folder, json.loads(report.read_text())


def start(*words, **kwargs):
    code = "import sys; from resonance_nn.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_train_then_eval(text, trained, tmp_path, capsys):
    folder, result = trained
    assert result == json.loads((folder / "train.json").read_text())
    capsys.readouterr()
    assert main(f"eval {folder} --data {text} --held-out --precision fp32 --json {tmp_path / 'e.json'}".split()) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "lzma wins" in out
    evaluated = json.loads((tmp_path / "e.json").read_text())
    assert evaluated["rows"][0]["metric"] == "bits_per_byte"
    assert evaluated["rows"][0]["peer_name"] == "lzma (xz -9e)"
    # the whole text with its state carried is easier than windows of 64 tokens from a fresh state
    assert evaluated["summary"]["loss"] < result["summary"]["eval_loss"] + 0.05
    assert main(f"eval {folder} --data {text} --no-lzma --window 50 --batch-size 1 --json -".split()) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["summary"]["lzma_bits_per_byte"] is None
    assert "bits per byte" in captured.err


def test_every_flag_is_documented_and_read(text, tmp_path, monkeypatch, capsys):
    """Each option is given a value of its own and must arrive in TrainArguments."""
    options = {p.name: p for p in get_command(app).commands["train"].params if p.name not in ("help", "json_file")}
    assert all(p.help for p in options.values())
    types = {f.name: f.type for f in fields(TrainArguments)}
    values = {"config": {"conv_size": 2, "filters": "channel"}, "mixers": ("a", "b"), "augment": ("flip", "crop")}
    words = ["--set", "conv_size=2", "--set", "filters=channel", "--mixers", "a,b", "--augment", "flip, crop"]
    for i, name in enumerate(sorted(options.keys() - values.keys())):
        kind, flag, word = types[name].split(" ")[0], options[name].opts[0], f"{name}-{i}"
        values[name] = {"bool": True, "int": 100 + i, "float": 0.5 + i, "Sequence[str]": [word]}.get(kind, word)
        words += [flag] if kind == "bool" else [flag, word if kind == "Sequence[str]" else str(values[name])]
    seen = {}

    def train(arguments):
        seen.update(vars(arguments))
        raise ValueError("stop here")

    monkeypatch.setattr("resonance_nn.training.train", train)
    assert main(["train", *words]) == 2
    assert capsys.readouterr().err.strip() == "error: stop here"
    assert {name: seen[name] for name in values} == values
    assert set(seen) - set(values) == {"progress"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data missing.py", "missing.py does not exist"),
        ("--data {text} --mixers nonsense", "'nonsense' is unknown"),
        ("--data {text} --set hidden_size=99 --set num_heads=10", "must divide hidden_size = 99"),
        ("--data {text} --set hidden_size=wide", "hidden_size"),
        ("--data {text} --set nonsense", "must be FIELD=VALUE"),
        ("--data {text} --seq-len 100000", "fewer than one window"),
        ("--data {empty}", "is empty"),
        ("--data {binary}", "--binary"),
        ("--data {nothing}", "there is no text"),
        ("--data {text} --init mistyped", "no such folder"),
        ("--data {text} --steps 1 --epochs 1", "only one of"),
        ("--data {text} --steps many", "--steps"),
        ("--data {text} --resume", "no run to resume"),
        ("--data {text} --json /nowhere/x.json", "--json"),
        ("", "--data"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(text, tmp_path, capsys, words, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2" * 100)
    (tmp_path / "nothing").mkdir()
    places = {name: tmp_path / name for name in ("empty.txt", "binary.txt", "nothing")}
    line = words.format(text=text, **{name.split(".")[0]: path for name, path in places.items()})
    assert main(["train", "--output-dir", str(tmp_path / "run"), *line.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_eval_refuses_in_one_line(text, trained, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    empty = tmp_path / "empty.txt"
    for line in (f"nowhere --data {text}", f"{trained[0]} --data {empty}", f"{trained[0]} --data {text} --window 0"):
        assert main(["eval", *line.split()]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert "\n" not in error


def test_ctrl_c_then_kill_then_resume(text, tmp_path):
    """SIGINT saves and says how to go on; kill -9 leaves only whole checkpoints; the end is that of one run."""
    line = f"train --data {text} --steps 400 --save-every 5 --eval-every 100 --set dropout=0.1 {SMALL}".split()
    run = RunFolder(tmp_path / "run")
    process = start(*line, "--output-dir", run.path)
    wait_for(lambda: len(run.checkpoints()) > 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Go on with: resonance train" in err
    assert err.rstrip().endswith("--resume")
    stopped = run.last_checkpoint()
    process = start(*line, "--output-dir", run.path, "--resume")
    wait_for(lambda: run.last_checkpoint() not in (None, stopped), process)
    time.sleep(random.random() / 20)
    process.kill()
    process.communicate()
    assert_whole(run)
    assert main([*line, "--output-dir", str(run.path), "--resume"]) == 0
    assert main([*line, "--output-dir", str(tmp_path / "whole")]) == 0
    assert same_weights(run.path, tmp_path / "whole")


def assert_whole(run):
    for checkpoint in run.checkpoints():
        names = {p.name for p in checkpoint.iterdir()}
        expected = {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
        assert names >= expected | {"trainer_state.json", "tokenizer.json"}
        load_file(checkpoint / "model.safetensors")
        json.loads((checkpoint / "trainer_state.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kill_at_random_moments(text, tmp_path, seed):
    """kill -9 during start-up, data, training, saving and the last writing, until the run is through."""
    rng = random.Random(seed)
    line = f"train --data {text} --steps 600 --save-every 2 --eval-every 50 --set dropout=0.1 {SMALL}".split()
    run, kills = RunFolder(tmp_path / "run"), 0
    for _ in range(8):
        process = start(*line, "--output-dir", run.path, *(["--resume"] if (run.data / "run.json").exists() else []))
        try:
            process.communicate(timeout=rng.uniform(2, 9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        assert_whole(run)
        if run.is_finished():
            break
    assert kills >= 3
    if not run.is_finished():
        extra = ["--resume"] if (run.data / "run.json").exists() else []
        assert main([*line, "--output-dir", str(run.path), *extra]) == 0
    assert main([*line, "--output-dir", str(tmp_path / "whole")]) == 0
    assert same_weights(run.path, tmp_path / "whole")


def test_second_ctrl_c_aborts_at_once(text, tmp_path):
    run = RunFolder(tmp_path / "run")
    line = f"train --data {text} --seq-len 16 --vocab-size 300 --batch-size 1 --accumulate 4000 --epochs 9"
    process = start(*line.split(), "--output-dir", run.path)
    assert "parameters" in process.stderr.readline()
    time.sleep(1)  # into the first, long step
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert run.checkpoints() == []
    assert os.path.exists(run.data)


def test_a_real_full_disk(text, tmp_path):
    """A limit on file size stands for it: the data fits, the model does not."""
    code = (
        "import sys, resource; from resonance_nn.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); sys.exit(main())"
    )
    line = f"train --data {text} --steps 1 --set hidden_size=128 {SMALL.removeprefix('--set hidden_size=32')}"
    process = subprocess.run(
        [sys.executable, "-c", code, *line.split(), "--output-dir", tmp_path / "run"], capture_output=True, text=True
    )
    assert process.returncode == 2, process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot write to")
    assert "Traceback" not in process.stderr
    assert RunFolder(tmp_path / "run").checkpoints() == []
    assert not (tmp_path / "run" / ".partial").exists()
