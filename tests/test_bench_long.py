"""`bench longtext` and `bench passkey`: the same tokens after more text, and one sentence through a long one."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import relative
from torch.nn import functional as F

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.bench import long_text, passkey
from resonance_nn.cli import main
from resonance_nn.data import TokenStore, decode_bytes, find_documents
from resonance_nn.data.synthetic import IGNORE


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(8):
        lines = [f"line {j} of file {i}, each a little different from {i * j}\n" for j in range(60)]
        (tmp_path / "text" / f"{i}.txt").write_text("".join(lines))
    return tmp_path / "text"


@pytest.fixture
def model(tokenizer):
    config = ResonanceConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        mixers=("spectral_gate", "holographic"),
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return ResonanceForCausalLM(config).eval()


def test_losses_of_tokens_do_not_depend_on_chunks(model):
    ids = torch.randint(len(range(400)), (2, 70))
    with torch.no_grad():
        logits = model(ids[:, :-1], use_cache=False).logits
    exact = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    for chunk in (7, 64, 1000):
        found = long_text.token_losses(model, ids, long_text.LongTextOptions(chunk=chunk))
        assert relative(found, exact) < 1e-5


def test_the_same_tokens_are_scored_after_every_context(model, tokenizer, text, tmp_path, monkeypatch):
    documents = find_documents([str(text)])
    ids = long_text.joined(tokenizer, documents)
    assert decode_bytes(tokenizer, ids) == b"".join(document.read() for document in documents)
    assert (ids == 0).sum() == len(documents)
    seen: list[np.ndarray] = []
    losses = long_text.token_losses

    def spy(model, batch, options):
        seen.extend(batch.numpy())
        return losses(model, batch, options)

    monkeypatch.setattr(long_text, "token_losses", spy)
    options = long_text.LongTextOptions(contexts=(0, 16, 200), reference=16, score=20, windows=5, batch_size=2)
    payload = long_text.run(model, tokenizer, documents, options)
    for i in range(5):
        windows = [seen[i + 5 * j] for j in range(3)]
        assert [len(window) for window in windows] == [21, 37, 221]
        assert all((window[-20:] == windows[0][-20:]).all() for window in windows)
    starts = [next(s for s in range(len(ids)) if (ids[s : s + 221] == window).all()) for window in seen[10:]]
    assert all(b - a >= 20 for a, b in itertools.pairwise(starts))  # nothing is scored twice
    figures = {(row["metric"].split(",")[0], row["context"]): row["ours"] for row in payload["rows"]}
    long_text.plot(payload, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with torch.no_grad():
        batch = torch.from_numpy(np.stack(seen[10:]))
        whole = F.cross_entropy(model(batch[:, :-1]).logits.transpose(1, 2), batch[:, 1:], reduction="none")
    assert figures[long_text.LOSS, 200] == pytest.approx(whole[:, -20:].mean().item(), abs=1e-5)
    change = figures[long_text.LOSS, 200] - figures[long_text.LOSS, 16]
    assert figures[long_text.CHANGE, 200] == pytest.approx(change, abs=1e-6)
    assert figures[long_text.BY_POSITION, 64] == pytest.approx(whole[:, :64].mean().item(), abs=1e-5)
    assert figures[long_text.BY_POSITION, 220] == pytest.approx(whole[:, 128:].mean().item(), abs=1e-5)


def test_longtext_command(model, tokenizer, text, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["bench", "longtext", str(tmp_path / "model"), "--data", str(text), "--score", "20", "--windows", "3"]
    arguments += ["--contexts", "16,64", "--reference", "16"]
    assert main([*arguments, "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]) == 0
    assert "16 to 64 tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["suite"] == "longtext"
    for more, said in (
        (["--reference", "17"], "reference = 17: must be one of"),
        (["--windows", "1000"], "room for"),
        (["--contexts", "64,16"], "ascending"),
        (["--windows", "1"], "windows = 1: must be ≥ 2"),
    ):
        assert main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("needles", [1, 3])
def test_passkeys_say_what_they_ask_for(tokenizer, text, tmp_path, needles):
    store = TokenStore.build(find_documents([str(text)]), tokenizer, tmp_path / "store", progress=False)
    length = 400
    task = passkey.Passkeys(tokenizer, store, length, needles)
    batch = task.draw(np.random.default_rng(0), 6)
    assert batch.input_ids.shape == batch.targets.shape == (6, length)
    for ids, targets in zip(batch.input_ids, batch.targets, strict=True):
        read = decode_bytes(tokenizer, ids.tolist()).decode()
        answer = decode_bytes(tokenizer, targets[targets != IGNORE].tolist()).decode()
        assert len(answer) == 5
        asked = read.rsplit("What is the pass key", 1)[1].split("?")[0]
        assert f"The pass key{asked} is{answer}. Remember it." in read
        assert read.count("Remember it.") == needles
        assert read.endswith(answer[:-1])
        assert (targets != IGNORE).nonzero().flatten().tolist() == list(range(length - 5, length))
    first, last = (task.draw(np.random.default_rng(1), 1, depth).input_ids[0] for depth in (0.0, 1.0))
    begin = decode_bytes(tokenizer, first.tolist()).decode()
    assert begin.startswith("\nThe pass key")
    end = decode_bytes(tokenizer, last.tolist()).decode()
    assert end.split("Remember it.\n")[-1].startswith("\nWhat is the pass key")
    with pytest.raises(ValueError, match="length = 20: must be ≥"):
        passkey.Passkeys(tokenizer, store, 20)
    with pytest.raises(ValueError, match="needles = 27"):
        passkey.Passkeys(tokenizer, store, length, 27)


class Oracle(torch.nn.Module):
    """Reads the key where it stands."""

    def __init__(self, task: passkey.Passkeys, wrong: int):
        super().__init__()
        self.task, self.wrong, self.calls = task, wrong, 0
        self.device = torch.device("cpu")
        self.lm_head = torch.nn.Identity()

    @property
    def base_model(self):
        return self._answer

    def _answer(self, input_ids, use_cache):
        start, _ = self.task._parts("Z", [0] * 5)
        prefix = torch.tensor(start[: start.index(self.task._parts("Z", [0] * 5)[0][-1]) or None][:3])
        hidden = torch.zeros(*input_ids.shape, 400)
        for row, ids in enumerate(input_ids):
            at = next(i for i in range(len(ids)) if (ids[i : i + 3] == prefix).all())
            key = ids[at + len(self.task._parts("Z", [0] * 5)[0]) - len(self.tail) - 5 :][:5]
            for j, digit in enumerate(key):
                hidden[row, -5 + j, digit] = 1.0
            if self.calls < self.wrong:
                hidden[row, -1] = 0
                hidden[row, -1, 0] = 1.0
            self.calls += 1
        return type("Out", (), {"last_hidden_state": hidden})()


def test_a_key_counts_if_all_its_digits_are_right(tokenizer, text, tmp_path):
    store = TokenStore.build(find_documents([str(text)]), tokenizer, tmp_path / "store", progress=False)
    one = passkey.Passkeys(tokenizer, store, 100)
    oracle = Oracle(one, wrong=2)
    needle, _ = one._parts("Z", [0] * 5)
    digit = one._parts("Z", [1] * 5)[0]
    changed = [i for i, (a, b) in enumerate(zip(needle, digit, strict=True)) if a != b]
    oracle.tail = needle[changed[-1] + 1 :]
    task = passkey.PasskeyTask((one,), {"100": one}, 400, 8, ("100",))
    figures = task.measure(oracle, "100", np.random.default_rng(0), 0)
    assert figures["found"] == [False, False, *[True] * 6]
    assert figures["accuracy"] == 6 / 8
    low, high = passkey.wilson(6, 8)
    assert low < 0.75 < high
    assert passkey.wilson(40, 40)[0] == pytest.approx(0.912, abs=1e-3)


def test_passkey_command(text, tmp_path, capsys):
    arguments = ["bench", "passkey", "--data", str(text), "--models", "default,llama", "--train-lengths", "96,128"]
    arguments += ["--lengths", "128,256", "--peer-max-length", "128", "--steps", "4", "--eval-every", "2"]
    arguments += ["--sequences", "3", "--hidden-size", "64", "--layers", "1", "--vocab-size", "300"]
    arguments += [
        "--tokens-per-batch",
        "256",
        "--output-dir",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "p.json"),
    ]
    assert main([*arguments, "--plot", str(tmp_path / "p.png")]) == 0
    payload = json.loads((tmp_path / "p.json").read_text())
    cells = [(row["model"], row["length"]) for row in payload["rows"]]
    assert cells == [("default", 128), ("default", 256), ("llama", 128)]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "p.json").read_text())["rows"] == payload["rows"]
    assert main([*arguments, "--resume", "--needles", "2"]) == 2
    assert "needles was 1 and is 2" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--lengths", "256,128"]) == 2
    assert "lengths = [256, 128]: must be ascending" in capsys.readouterr().err
