"""`bench longtext` and `bench passkey`: the same tokens after more text, and one sentence through a long one."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import relative
from torch.nn import functional as F

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.bench import long_text, passkey
from resonance_nn.cli import main
from resonance_nn.data import decode_bytes, encode_bytes, find_documents
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
    ids = torch.randint(400, (2, 70))
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
    n = len(ids) // 100
    options = long_text.LongTextOptions(contexts=(1, 16, 200), reference=16, score=20, windows=n, batch_size=7)
    payload = long_text.run(model, tokenizer, documents, options)
    for i in range(n):
        windows = [seen[i + n * j] for j in range(3)]
        assert [len(window) for window in windows] == [21, 36, 220]
        assert all((window[-20:] == windows[0][-20:]).all() for window in windows)
    starts = [next(s for s in range(len(ids)) if (ids[s : s + 220] == window).all()) for window in seen[2 * n :]]
    assert all(b - a >= 20 for a, b in itertools.pairwise(starts))  # nothing is scored twice
    figures = {(row["metric"].split(",")[0], row["context"]): row["ours"] for row in payload["rows"]}
    long_text.plot(payload, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with torch.no_grad():
        batch = torch.from_numpy(np.stack(seen[2 * n :]))
        whole = F.cross_entropy(model(batch[:, :-1]).logits.transpose(1, 2), batch[:, 1:], reduction="none")
    assert figures[long_text.LOSS, 200] == pytest.approx(whole[:, -20:].mean().item(), abs=1e-5)
    change = figures[long_text.LOSS, 200] - figures[long_text.LOSS, 16]
    assert figures[long_text.CHANGE, 200] == pytest.approx(change, abs=1e-6)
    apart = [0]
    for i, start in enumerate(starts):
        if start - starts[apart[-1]] >= 219:
            apart.append(i)
    assert 1 < len(apart) < n
    assert figures[long_text.BY_POSITION, 64] == pytest.approx(whole[apart, :64].mean().item(), abs=1e-5)
    assert figures[long_text.BY_POSITION, 219] == pytest.approx(whole[apart, 128:].mean().item(), abs=1e-5)


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
def test_passkeys_say_what_they_ask_for(tokenizer, needles):
    filler, length = np.array(encode_bytes(tokenizer, passkey.SENTENCES.encode())), 400
    task = passkey.Passkeys(tokenizer, filler, length, needles)
    batch = task.draw(np.random.default_rng(0), 6)
    assert batch.input_ids.shape == batch.targets.shape == (6, length)
    for ids, targets in zip(batch.input_ids, batch.targets, strict=True):
        read = decode_bytes(tokenizer, ids.tolist()).decode()
        answer = decode_bytes(tokenizer, targets[targets != IGNORE].tolist()).decode()
        assert len(answer) == 5
        asked = read.rsplit("What is the pass key", 1)[1].split("?")[0]
        assert f"The pass key{asked} is {answer}. Remember it." in read
        assert read.count("Remember it.") == needles
        assert read.endswith(answer[:-1])
        assert (targets != IGNORE).nonzero().flatten().tolist() == list(range(length - 5, length))
        for piece in read.split("\n"):  # what is no needle and no question is filler, read on
            if "pass key" not in piece and piece:
                assert piece in passkey.SENTENCES * 100
    first, last = (task.draw(np.random.default_rng(1), 1, depth).input_ids[0] for depth in (0.0, 1.0))
    begin = decode_bytes(tokenizer, first.tolist()).decode()
    assert begin.startswith("\nThe pass key")
    end = decode_bytes(tokenizer, last.tolist()).decode()
    assert end.split("Remember it.\n")[-1].startswith("\nWhat is the pass key")
    with pytest.raises(ValueError, match="20 is too short"):
        passkey.Passkeys(tokenizer, filler, 20)
    with pytest.raises(ValueError, match="needles = 27"):
        passkey.Passkeys(tokenizer, filler, length, 27)


class Oracle(torch.nn.Module):
    """Reads the key where it stands, but in the first ``wrong`` sequences the last digit."""

    def __init__(self, task: passkey.Passkeys, wrong: int):
        super().__init__()
        self.task, self.wrong, self.device, self.lm_head = task, wrong, torch.device("cpu"), torch.nn.Identity()

    def base_model(self, input_ids, use_cache):
        (zeros, _), (ones, _) = (self.task.parts("Z", [digit] * 5) for digit in (0, 1))
        first = next(i for i, (a, b) in enumerate(zip(zeros, ones, strict=True)) if a != b)
        hidden = torch.zeros(*input_ids.shape, 400)
        for row, ids in enumerate(input_ids.tolist()):
            at = next(i for i in range(len(ids)) if ids[i : i + first] == zeros[:first])
            key = ids[at + first : at + first + 5]
            if self.wrong > 0:
                key[-1] = self.task.digits[0] if key[-1] != self.task.digits[0] else self.task.digits[1]
                self.wrong -= 1
            hidden[row, torch.arange(-5, 0), torch.tensor(key)] = 1.0
        return SimpleNamespace(last_hidden_state=hidden)


def test_a_key_counts_if_all_its_digits_are_right(tokenizer):
    one = passkey.Passkeys(tokenizer, np.array(encode_bytes(tokenizer, b" some filler")), 100)
    found = passkey.which_are_found(Oracle(one, wrong=2), one, 8, np.random.default_rng(0))
    assert found == [False, False, *[True] * 6]
    task = passkey.PasskeyTask((one,), one, 400, 8, 10)
    assert task.measure(Oracle(one, wrong=2), "100", np.random.default_rng(0), 0) == {"accuracy": 6 / 8}
    low, high = passkey.wilson(6, 8)
    assert low < 0.75 < high
    assert passkey.wilson(40, 40)[0] == pytest.approx(0.912, abs=1e-3)


def test_short_sequences_come_first_and_long_ones_last(tokenizer):
    filler = np.array(encode_bytes(tokenizer, b" some filler"))
    train = tuple(passkey.Passkeys(tokenizer, filler, length) for length in (100, 200, 400))
    task, rng = passkey.PasskeyTask(train, train[-1], 400, 8, 10), np.random.default_rng(0)
    shares = {
        step: [lengths.count(n) / 300 for n in (100, 200, 400)]
        for step in (0, 5, 10)
        if (lengths := [task.training_batch(rng, 400, step).input_ids.shape[1] for _ in range(300)])
    }
    assert shares[0] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.1)
    assert shares[5] == pytest.approx([1 / 3] * 3, abs=0.1)
    assert shares[10] == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.1)


def test_fillers_of_a_suite(tokenizer, text, tmp_path):
    documents = find_documents([str(text)])

    def fillers(name):
        options = passkey.PasskeyOptions(filler=name, output_dir=tmp_path / "runs", vocab_size=400)
        options.check()
        return passkey._fillers(options, documents, tokenizer)

    train, held_out, source = fillers("text")
    assert len(train) > len(held_out) > 0
    assert "line" in decode_bytes(tokenizer, held_out.tolist()).decode()
    same, again, other = fillers("sentences")
    assert decode_bytes(tokenizer, same.tolist()).decode() == passkey.SENTENCES
    assert same is again
    assert other != source
    with pytest.raises(ValueError, match="filler = 'x': must be sentences or text"):
        fillers("x")


@pytest.mark.parametrize("filler", passkey.FILLERS)
def test_passkey_command(text, tmp_path, capsys, filler):
    arguments = ["bench", "passkey", "--data", str(text), "--models", "default,llama", "--train-lengths", "96,128"]
    arguments += ["--filler", filler]
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
    further = [*arguments[: arguments.index("--lengths")], "--lengths", "128,256,300"]
    further += arguments[arguments.index("--lengths") + 2 :]
    weights = tmp_path / "runs" / "default" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert main([*further, "--resume"]) == 0  # nothing is trained again
    assert [row["length"] for row in json.loads((tmp_path / "p.json").read_text())["rows"]] == [128, 256, 300, 128]
    assert weights.stat().st_mtime_ns == before
    assert main([*arguments, "--resume", "--needles", "2"]) == 2
    assert "too short" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--sequences", "4"]) == 2
    assert "sequences was 3 and is 4" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--steps", "0"]) == 2
    assert weights.is_file()  # refused before anything is deleted
    assert main([*arguments, "--overwrite", "--lengths", "256,128"]) == 2
    assert "lengths = [256, 128]: must be ascending" in capsys.readouterr().err
