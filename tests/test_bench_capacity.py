"""The capacity suite: its rows hold what is claimed of them, and a memory that is worse is seen to be."""

from __future__ import annotations

import json

import pytest
import torch

from resonance_nn.bench.capacity import CapacityOptions, run
from resonance_nn.cli import main
from resonance_nn.memory import HolographicMemory

SMALL = CapacityOptions(dims=(64, 128), pairs=(1, 4, 16), key_sizes=(16,), codebook_size=64, trials=1000)


@pytest.fixture(scope="module")
def payload():
    steps = []
    payload = run(SMALL, lambda done, total: steps.append((done, total)))
    assert steps == [(i, len(steps)) for i in range(1, len(steps) + 1)]
    return payload


def test_rows_have_theory_beside_the_measured(payload):
    assert payload["suite"] == "capacity"
    for row in payload["rows"]:
        assert {"case", "metric", "ours", "peer", "peer_name", "ratio", "curve"} <= set(row)
        assert row["ratio"] == row["ours"] / row["peer"]
    hrr = [row for row in payload["rows"] if row["curve"] == "hrr"]
    assert [(row["dimension"], row["pairs"]) for row in hrr] == [(P, K) for P in (64, 128) for K in (1, 4, 16)]
    for row in hrr:
        assert row["difference_points"] == pytest.approx(100 * (row["ours"] - row["peer"]))
        assert row["within_5_points"] is True
    assert payload["within_5_points"] is True
    assert payload["largest_difference_points"] == max(abs(row["difference_points"]) for row in hrr)
    json.dumps(payload, allow_nan=False)


def test_exact_recalls_and_squared_errors(payload):
    exact = [row for row in payload["rows"] if row["curve"] == "exact"]
    assert {row["case"].split(",")[0] for row in exact} == {"delta", "lstsq", "hrr"}
    assert max(row["pairs"] for row in exact if row["key_size"] == 16) == 16  # up to N
    assert all(row["ours"] < 1e-4 for row in exact)
    assert payload["exact"] is True
    for row in payload["rows"]:
        if (
            row["curve"] == "outer" and row["error_theory"] and row["pairs"] >= 8
        ):  # few keys of 16 reals: N is not large
            assert row["ratio"] == pytest.approx(1, abs=0.15)
    passes = [row["ours"] for row in payload["rows"] if row["curve"] == "passes"]
    assert passes == sorted(passes, reverse=True)


def test_bits_are_below_the_codebook_and_the_hologram(payload):
    bits = [row for row in payload["rows"] if row["curve"] == "bits"]
    assert len(bits) == 2 + 3
    for row in bits:
        assert 0 < row["ours"] <= row["pairs"] * 6  # log₂ 64
        assert row["ours"] < row["peer"]
        assert row["peer"] == pytest.approx(row["reals"] / 2 * 6.658, rel=1e-3)  # log₂ 101 a cell


def test_a_worse_memory_is_seen(monkeypatch: pytest.MonkeyPatch):
    """One that loses half of its state."""
    read = HolographicMemory.read
    monkeypatch.setattr(
        HolographicMemory, "read", lambda self, q, S: read(self, q, S * (torch.arange(S.shape[-1]) % 2))
    )
    payload = run(SMALL)
    assert payload["within_5_points"] is False
    assert payload["exact"] is False


def test_a_seed_repeats(payload):
    again = run(SMALL)
    assert [row["ours"] for row in again["rows"]] == [row["ours"] for row in payload["rows"]]


def test_full_options_reach_further():
    full = CapacityOptions.full(seed=3)
    assert (full.dims[-1], full.pairs[0], full.pairs[-1], full.seed) == (4096, 1, 1024, 3)
    assert CapacityOptions.full(dims=(64,)).dims == (64,)


def test_command_writes_tables_json_and_plot(tmp_path, capsys):
    files = ["--json", str(tmp_path / "capacity.json"), "--plot", str(tmp_path / "capacity.png")]
    assert main(["bench", "capacity", "--dims", "32,64", "--pairs", "1,8", "--trials", "200", *files]) == 0
    out, err = capsys.readouterr()
    for text in ("within 5", "hrr P=64 K=8", "squared error", "a hologram", "points from theory"):
        assert text in out
    assert err == ""
    written = json.loads((tmp_path / "capacity.json").read_text())
    assert written["options"]["dims"] == [32, 64]
    assert written["options"]["trials"] == 200
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dims", "x"],
        ["--dims", "1"],
        ["--pairs", "0"],
        ["--pairs", ""],
        ["--trials", "0"],
        ["--plot", "/no/such/f.png"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["bench", "capacity", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
