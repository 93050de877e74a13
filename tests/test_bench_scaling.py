"""The scaling suite: fitted exponents are right and their intervals hold what they promise."""

from __future__ import annotations

import json
import math
import random

import pytest

from resonance_nn.bench import scaling
from resonance_nn.bench.fit import fit_exponent, student_t95
from resonance_nn.bench.scaling import ScalingOptions, run
from resonance_nn.cli import main

SMALL = ScalingOptions(
    lengths=(16, 32, 64), hidden_size=64, layers=1, vocab_size=300, chunk=24, peer_max_length=32, repeats=2
)


def test_students_t():
    table = {1: 12.7062, 2: 4.3027, 5: 2.5706, 10: 2.2281, 18: 2.1009, 30: 2.0423, 100: 1.9840}
    for degrees, value in table.items():
        assert student_t95(degrees) == pytest.approx(value, abs=1e-3)
    with pytest.raises(ValueError, match="degrees = 0"):
        student_t95(0)


@pytest.mark.parametrize("exponent", [-1, 0.5, 1, 2])
def test_an_exact_power_law_is_found(exponent):
    x = [1024.0 * 4**i for i in range(6)]
    fit = fit_exponent(x, [3e-6 * v**exponent for v in x])
    assert fit.exponent == pytest.approx(exponent)
    assert fit.coefficient == pytest.approx(3e-6)
    assert fit.low is not None
    assert fit.high is not None
    assert fit.high - fit.low < 1e-9
    assert fit.at(2.0**20) == pytest.approx(3e-6 * 2.0 ** (20 * exponent))


def test_the_interval_holds_the_exponent_95_times_of_100():
    noise = random.Random(0)
    x = [1024.0 * 4**i for i in range(4) for _ in range(3)]
    hits, trials = 0, 1000
    for _ in range(trials):
        fit = fit_exponent(x, [1e-6 * v**1.03 * math.exp(noise.gauss(0, 0.1)) for v in x])
        assert fit.low is not None
        assert fit.high is not None
        assert fit.low < fit.exponent < fit.high
        hits += fit.low <= 1.03 <= fit.high
    assert 0.93 <= hits / trials <= 0.97


def test_curvature_widens_the_interval():
    x = [2.0**i for i in range(8)]
    straight = fit_exponent(x, x)
    bent = fit_exponent(x, [v + 0.05 * v * v for v in x])
    assert straight.high is not None
    assert straight.high < 1.001
    assert bent.high is not None
    assert bent.low is not None
    assert bent.high - bent.low > 0.2


def test_two_points_have_no_interval_and_nonsense_is_refused():
    fit = fit_exponent([1.0, 2.0], [1.0, 4.0])
    assert (fit.low, fit.high, fit.points) == (None, None, 2)
    assert fit.exponent == pytest.approx(2)
    for x, y in (([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [0.0, 1.0])):
        with pytest.raises(ValueError, match=r"must be|values > 0"):
            fit_exponent(x, y)


def test_run_times_all_lengths_in_turns(monkeypatch):
    read, steps = [], []
    original = scaling.prefill
    monkeypatch.setattr(
        scaling,
        "prefill",
        lambda m, ids, chunk_size: read.append((ids.shape[1], chunk_size)) or original(m, ids, chunk_size=chunk_size),
    )
    payload = run(SMALL, lambda done, total: steps.append((done, total)))
    assert read == [(17, 24), (33, 24), (65, 24)] * 3
    total = 3 * (16 + 32 + 64 + 16 + 32)
    assert steps[-1] == (total, total)
    assert [row["peer"] is None for row in payload["rows"]] == [False, False, True]
    assert payload["fits"]["ours"]["points"] == 6
    assert payload["fits"]["peer"]["points"] == 4
    assert "local_exponent" not in payload["rows"][0]
    json.dumps(payload, allow_nan=False)


def test_fits_are_of_the_times(monkeypatch):
    def interleaved(calls, repeats):
        power = {"ours": 1, "peer": 2}
        return {name: [int(name.split()[1]) ** power[name.split()[0]] * 1e-6] * repeats for name in calls}

    monkeypatch.setattr(scaling, "interleaved", interleaved)
    payload = run(SMALL)
    assert payload["fits"]["ours"]["exponent"] == pytest.approx(1)
    assert payload["fits"]["peer"]["exponent"] == pytest.approx(2)
    assert [row["local_exponent"] for row in payload["rows"][1:]] == pytest.approx([1, 1])
    assert payload["rows"][1]["ratio"] == pytest.approx(32)


def test_one_call_reads_as_many_tokens_as_chunks(monkeypatch):
    monkeypatch.setattr(scaling, "prefill", None)  # not called
    payload = run(ScalingOptions(**{**vars(SMALL), "whole": True, "peer_max_length": 0, "repeats": 1}))
    assert all(row["peer"] is None for row in payload["rows"])
    assert payload["fits"]["peer"] is None


def test_command_writes_table_json_and_plot(tmp_path, capsys):
    arguments = ["--lengths", "16,32,64", "--hidden-size", "64", "--layers", "1", "--vocab-size", "300", "--seed", "1"]
    arguments += ["--mixers", "spectral_gate", "--chunk", "32", "--whole", "--peer-max-length", "32", "--repeats", "1"]
    arguments += ["--set", "chunk_size=16"]
    files = ["--json", str(tmp_path / "scaling.json"), "--plot", str(tmp_path / "scaling.png")]
    assert main(["bench", "scaling", *arguments, "--dtype", "fp32", "--device", "cpu", *files]) == 0
    out, err = capsys.readouterr()
    assert "ours: time ~ length^" in out
    assert "in one call" in out
    assert err == ""
    assert json.loads((tmp_path / "scaling.json").read_text())["suite"] == "scaling"
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_full_goes_to_a_million(monkeypatch):
    asked = []
    monkeypatch.setattr(scaling, "run", lambda options, progress: asked.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["bench", "scaling", "--full"])
    assert asked[0].lengths == (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lengths", "x"],
        ["--lengths", "16"],
        ["--lengths", "64,16"],
        ["--full", "--lengths", "16,32"],
        ["--chunk", "0"],
        ["--set", "chunk_size"],
        ["--repeats", "0"],
        ["--peer-max-length", "-1"],
        ["--mixers", "bogus"],
        ["--dtype", "int8"],
        ["--json", "/no/such/folder/scaling.json"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["bench", "scaling", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
