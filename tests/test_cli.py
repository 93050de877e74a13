"""The command line as a whole: its flags, its speed to answer, and one line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import socket
import stat
import subprocess
import sys

import pytest
import torch
import typer

from resonance_nn import MIXERS, SIZES, ResonanceConfig, ResonanceForCausalLM, cli
from resonance_nn.cli import app, main
from resonance_nn.cli.common import check_output, console_for, stderr_console, write_json
from resonance_nn.data import train_tokenizer

COMMON_SAMPLING = "--temperature --top-k --top-p --min-p --repetition-penalty --greedy --seed"
COMMON_LEARNING = (
    "--models --state-sizes --lrs --seeds --steps --minutes --hidden-size --layers --heads --init-std "
    "--shortest-context --cooldown --weight-decay --tokens-per-batch --eval-every --target --dtype --threads --device "
    "--output-dir --resume --overwrite --json --plot"
)
COMMON_MODELS = "--size --hidden-size --layers --vocab-size --mixers --set --dtype --seed --device --json --plot"
COMMON_TIMING = "--repeats --floor --no-floor --compile --allocator --max-seconds"
FLAGS = {
    "": "--version",
    "train": "--data --output-dir --task --eval-data --hold-out --text-field --binary --size --recipe --mixers "
    "--vocab-size --tokenizer --init --set --dropout --label-smoothing --z-loss --fim --steps --epochs --tokens "
    "--seq-len --batch-size --accumulate --lr --warmup --optimizer --weight-decay --clip --r-drop --augment "
    "--precision --gradient-checkpointing --compile --seed --device --save-every --keep --eval-every --log-to --resume "
    "--overwrite --json",
    "eval": "--data --pairs --window --batch-size --precision --device --text-field --binary --held-out --lzma "
    "--no-lzma --infill --infill-order --infill-context --seed --json",
    "generate": f"--prompt --prompt-file --batch --infill --marker --middle-only --infill-order --infill-context "
    f"--max-new-tokens --stop {COMMON_SAMPLING} --num-beams "
    "--num-return-sequences --save-state --load-state --stream --no-stream --precision --device --json",
    "chat": f"--system --max-new-tokens {COMMON_SAMPLING} --precision --device",
    "predict": "--text --top --batch-size --precision --device --json --picture",
    "models": "--vocab-size --recipe --mixers --json",
    "bench": "",
    "bench ablation": "--ablations --data --tokens --seeds --hidden-size --layers --vocab-size --seq-len --lr "
    "--dtype --threads --device --output-dir --resume --overwrite --json",
    "bench all": "--output-dir --full --only --resume --json",
    "bench capacity": "--dims --pairs --trials --seed --full --json --plot",
    "bench context": f"--prefill --train --chunk --no-gradient-checkpointing {COMMON_MODELS}",
    "bench decode": "--contexts --full --batch-sizes --tokens --peer-max-context --read-tokens --generate --packed "
    f"--no-packed --repeats {COMMON_MODELS}",
    "bench mixers": "--length --hidden-size --layers --repeats --tokens-per-batch --dtype --device --json --plot",
    "bench ops": "--ops --tokens --length --hidden-size --heads --vocab-size --repeats --dtype --seed --device --json "
    "--plot",
    "bench longtext": "--data --held-out --contexts --reference --score --windows --chunk --batch-size --precision "
    "--device --json --plot",
    "bench passkey": "--models --data --filler --train-lengths --lengths --peer-max-length --needles --sequences "
    "--hidden-size --layers --vocab-size --steps --lr --optimizer --seed --cooldown --weight-decay --tokens-per-batch "
    "--eval-every --target --set --dtype --threads --device --output-dir --resume --overwrite --json --plot",
    "bench quality": "--models --budget --data --text --pairs --lengths --tokens --seeds --lrs --rate --optimizer "
    "--cooldown --weight-decay --tokens-per-batch --set --dtype --threads --device --output-dir --resume --overwrite "
    "--json --plot",
    "bench scaling": f"--lengths --full --chunk --whole --peer-max-length --repeats {COMMON_MODELS}",
    "bench recall": f"--full --vocab-size --lengths --test-lengths --pairs --watch --fillers {COMMON_LEARNING}",
    "bench spectrum": "--data --tokens --window --device --json --plot",
    "bench tracking": f"--tasks --train-lengths --lengths --vocab-size --pairs --watch --fillers {COMMON_LEARNING}",
    "bench task": "--data --task --models --variant --eval-data --hold-out --epochs --steps --batch-size --vocab-size "
    "--set --mixers --dropout --label-smoothing --r-drop --augment --lrs --seeds --optimizer --weight-decay "
    "--precision --threads --device --output-dir --resume --overwrite --json",
    "bench speed": f"--lengths --full --tokens-per-batch --forward-only --peers {COMMON_MODELS} {COMMON_TIMING}",
    "bench throughput": f"--batches --length --peers {COMMON_MODELS} {COMMON_TIMING}",
    "bench memory": f"--lengths --tokens-per-batch --gradient-checkpointing --peers {COMMON_MODELS}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "model"
    ResonanceForCausalLM(ResonanceConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1)).save_pretrained(folder)
    train_tokenizer([b"some text\n" * 9], 300, progress=False).save_pretrained(folder)
    return str(folder)


def error_line(capsys, *argv: str) -> str:
    """The one line that a wrong input gets, with exit code 2 and nothing on standard output."""
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def commands() -> dict[str, object]:
    root = typer.main.get_command(app)
    found = {"": root}
    for name, command in root.commands.items():
        found[name] = command
        found |= {f"{name} {sub}": c for sub, c in getattr(command, "commands", {}).items()}
    return found


@pytest.mark.parametrize("name", commands())
def test_flags_cannot_grow_unseen(name, capsys):
    options = [p for p in commands()[name].params if p.param_type_name == "option"]
    flags = [flag for option in options for flag in (*option.opts, *option.secondary_opts)]
    assert sorted(flags) == sorted(FLAGS[name].split())
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in flags)
    assert all(option.help for option in options)


def test_help_loads_no_heavy_library():
    """In a package whose __init__ is left out, since that imports torch on purpose."""
    script = (
        "import sys, types, importlib.util as u\n"
        "package = types.ModuleType('resonance_nn')\n"
        "package.__path__ = u.find_spec('resonance_nn').submodule_search_locations\n"
        "sys.modules['resonance_nn'] = package\n"
        "from resonance_nn.cli import main\n"
        "assert main(['--help']) == main(['generate', '--help']) == main(['train', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_version_and_bare_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2
    for argv in ([], ["bench"]):
        assert main(argv) == 0
        assert "Usage: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "No such command 'nonsense' (see resonance --help)"),
        (["--nonsense"], "No such option: --nonsense"),
        (["bench", "nonsense"], "No such command 'nonsense'"),
        (["bench", "spectrum"], "Missing argument 'MODEL'"),
        (["generate", "MODEL", "--promt", "x"], "No such option: --promt"),
        (["generate", "MODEL", "--top-k", "many"], "'--top-k'"),
        (["generate", "MODEL", "--prompt"], "requires an argument"),
        (["generate", "MODEL", "--prompt", "x", "--temperature", "0"], "temperature = 0.0: must be > 0.0001"),
        (["generate", "MODEL", "--prompt", "x", "--greedy", "--top-k", "5"], "top_k = 5: has no effect on greedy"),
        (["generate", "MODEL", "--prompt", "x", "--stream", "--num-beams", "2"], "--stream is for one sequence"),
        (["generate", "MODEL", "--prompt", "x", "--prompt-file", "y"], "exclude each other"),
        (["generate", "MODEL", "--prompt", "x", "--batch", "2"], "--batch needs --prompt-file"),
        (["generate", "MODEL", "--prompt-file", "x", "--batch", "0"], "--batch 0: must be ≥ 1"),
        (["generate", "MODEL", "--prompt-file", "x", "--batch", "2", "--load-state", "y"], "for a single prompt"),
        (["generate", "MODEL", "--prompt-file", "/no/such/file"], "No such file"),
        (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "0"], "must be ≥ 1, or go with --save-state"),
        (["generate", "MODEL", "--prompt", "", "--save-state", "STATE"], "there is nothing to save"),
        (["generate", "MODEL", "--prompt", "x", "--save-state", "/no/folder/state"], "'/no/folder' does not exist"),
        (["generate", "MODEL", "--prompt", "x", "--json", "/no/folder/x.json"], "'/no/folder' does not exist"),
        (["generate", "MODEL", "--prompt", "x", "--json", "MODEL"], "is a folder"),
        (["generate", "MODEL", "--prompt", "x", "--load-state", "/no/state"], "no such file"),
        (["generate", "MODEL", "--prompt", "x", "--load-state", "MODEL/config.json"], "cannot be read"),
        (["generate", "MODEL", "--prompt", "x", "--precision", "fp17"], "precision = 'fp17'"),
        (["generate", "MODEL", "--prompt", "x", "--device", "abacus"], "device = 'abacus'"),
        (["generate", "MODELL", "--prompt", "x"], "did you mean"),
        (["generate", "org/name", "--prompt", "x"], "write hub:org/name"),
        (["chat", "MODELL"], "did you mean"),
        (["chat", "MODEL", "--max-new-tokens", "0"], "must be ≥ 1"),
        (["chat", "MODEL", "--greedy", "--seed", "1"], "seed = 1: has no effect"),
        (["eval", "MODELL", "--data", "MODEL/config.json"], "did you mean"),
        (["models", "--mixers", "bogus"], "'bogus' is unknown"),
        (["models", "--vocab-size", "1"], "vocab_size = 1"),
    ],
)
def test_wrong_input_is_one_line(argv, message, capsys, monkeypatch, model, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    argv = [
        a.replace("MODEL", model) if a.startswith("MODEL") else a.replace("STATE", str(tmp_path / "s")) for a in argv
    ]
    assert message in error_line(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\n\n", b"plain text\n", b'{"text": "x"}\n', b"[1]\n", b'{"prompt": 3}\n'])
def test_wrong_prompt_files(content, capsys, model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert "prompts.jsonl" in error_line(capsys, "generate", model, "--prompt-file", str(path), "--batch", "2")


def test_full_disk(capsys, model, tmp_path):
    arguments = ["generate", model, "--prompt", "some text", "--max-new-tokens", "1", "--no-stream"]
    assert main([*arguments, "--json", "/dev/full"]) == 2
    assert capsys.readouterr().err == "error: /dev/full: No space left on device\n"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a file ends here, as on a full disk
    try:
        for flag in ("--json", "--save-state"):
            assert main([*arguments, flag, str(tmp_path / "file")]) == 2
            assert re.fullmatch(r"error: .*\n", capsys.readouterr().err)
            assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), 2, "error: two lines\n"),
        (PermissionError(13, "Permission denied", "file"), 2, "error: file: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_exit_codes(error, code, line, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr("resonance_nn.cli.models.check_output", fail)
    stdout, stderr = io.TextIOWrapper(open(os.devnull, "wb")), io.StringIO()  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    try:
        result = main(["models"])
    except SystemExit as exit_:
        result = exit_.code
    assert (result, stderr.getvalue()) == (code, line)


def test_our_own_mistakes_show_a_traceback(monkeypatch):
    def fail(*args):
        raise KeyError("a bug")

    monkeypatch.setattr("resonance_nn.cli.models.check_output", fail)
    with pytest.raises(KeyError, match="a bug"):
        main(["models"])


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("RESONANCE_DEBUG", "1")
    with pytest.raises(ValueError, match="no such folder"):
        main(["generate", "nowhere", "--prompt", "x"])


def test_models_counts_what_the_models_have(capsys):
    assert main(["models", "--json", "-", "--mixers", "spectral_gate,attention", "--vocab-size", "500"]) == 0
    out, err = capsys.readouterr()
    rows = {row["size"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == list(SIZES)
    assert all(name in err for name in SIZES)
    config = ResonanceConfig.from_size("tiny", vocab_size=500, mixers=("spectral_gate", "attention"))
    tiny = ResonanceForCausalLM(config).eval()
    parameters = sum(p.numel() for p in tiny.parameters())
    assert rows["tiny"]["parameters"] == parameters
    assert rows["tiny"]["parameters_without_embedding"] == parameters - 500 * 256
    with torch.no_grad():
        cache = tiny(torch.zeros(1, 1024, dtype=torch.long), logits_to_keep=1).past_key_values
    assert rows["tiny"]["state_bytes_1k"] == cache.num_bytes()
    assert rows["tiny"]["state_bytes_1m"] > 500 * rows["tiny"]["state_bytes_1k"]


def test_models_default_state_is_constant(capsys):
    assert main(["models", "--json", "-"]) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        constant = all(MIXERS[name].constant_state for name in row["mixers"])
        assert (row["state_bytes_1k"] == row["state_bytes_1m"]) == constant


def test_write_json(tmp_path, capsys):
    path = tmp_path / "x.json"
    write_json(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    write_json("-", [1])
    assert json.loads(capsys.readouterr().out) == [1]
    assert console_for("-") is stderr_console


def test_devices_are_written_not_replaced():
    write_json("/dev/null", {})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    check_output("/dev/null", "--json")


def test_console_script_is_main():
    from importlib import metadata

    (script,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "resonance"]
    assert script.load() is cli.main
