"""Holes in texts: filled by models that learned to look at both sides, counted in evaluation, refused by others."""

from __future__ import annotations

import io
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import resonance_nn
from resonance_nn import ResonanceConfig, ResonanceForCausalLM, infill
from resonance_nn.cli import main
from resonance_nn.data import decode_bytes, encode_bytes, find_documents, split_documents, train_tokenizer
from resonance_nn.data.fim import Sentinels
from resonance_nn.generation import Sampling, complete
from resonance_nn.infilling import evaluate_infilling, hide_lines, infill_prompt
from resonance_nn.loading import load_model
from resonance_nn.training import TrainArguments, train

GREEDY = Sampling(max_new_tokens=8, greedy=True)
NUMBERS = {"red": "1", "blue": "2"}  # the first line follows from the second, and from nothing before it
MARKED = b"def area(a, b):\n    \xff <|fill|>  # caf\xc3\xa9\r\n"


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("colours") / "colours.jsonl"
    words = [rng.choice(list(NUMBERS)) for _ in range(2000)]
    path.write_text("".join(json.dumps({"text": f"{word}\n{NUMBERS[word]}\n"}) + "\n" for word in words))
    return path


@pytest.fixture(scope="module")
def run(colours, tmp_path_factory) -> TrainArguments:
    """A finished run of --fim 0.8."""
    arguments = TrainArguments(
        data=[str(colours)], output_dir=tmp_path_factory.mktemp("runs") / "run", fim=0.8, seq_len=256, vocab_size=300,
        config={"hidden_size": 64, "num_hidden_layers": 1}, lr=1e-2, batch_size=4, steps=120, save_every=110,
        eval_every=120, precision="fp32", progress=False,
    )  # fmt: skip
    train(arguments)
    return arguments


@pytest.fixture(scope="module")
def trained(run):
    return load_model(str(run.output_dir))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> str:
    """Large random weights: its text varies, and it writes sentinels where it may."""
    torch.manual_seed(0)
    config = ResonanceConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_heads=2, initializer_range=0.3, fim_rate=0.5
    )
    folder = tmp_path_factory.mktemp("random") / "model"
    ResonanceForCausalLM(config).save_pretrained(folder)
    train_tokenizer([MARKED * 20, b"import os, sys\nclass Shape:\n" * 9], 300, progress=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain_model(random_model, tmp_path_factory) -> str:
    """One that has learned no holes."""
    folder = tmp_path_factory.mktemp("plain")
    model, tokenizer = load_model(random_model)
    model.config.fim_rate = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command(capsysbinary, monkeypatch):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def _command(*argv: object, stdin: bytes = b"") -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main([str(a) for a in argv])
        captured = capsysbinary.readouterr()
        return code, captured.out, captured.err.decode(errors="replace")

    return _command


def test_what_follows_decides_the_middle_and_the_left_cannot_know(trained, colours):
    model, tokenizer = trained
    assert model.config.fim_rate == 0.8
    for order in ("spm", "psm"):
        for word, number in NUMBERS.items():
            (completion,) = infill(model, tokenizer, "", f"\n{number}\n", GREEDY, order=order)
            assert (completion.text, completion.finish_reason) == (word, "end")
    held_out = split_documents(find_documents([str(colours)]))[1]
    holes = evaluate_infilling(model, tokenizer, held_out, lines=40)["holes"]
    first = [hole for hole in holes if hole["line"] == 1]
    assert {hole["hidden"] for hole in first} == set(NUMBERS)
    assert all(hole["exact"] for hole in first)
    assert len({hole["left_filled"] for hole in first}) == 1  # all look alike from the left
    assert sum(hole["left_bits"] for hole in first) > 0.9 * len(first)  # one bit each
    second = [hole for hole in holes if hole["line"] == 2]
    assert all(hole["left_exact"] for hole in second)  # it is a language model too


def test_resumed_equal_and_only_with_the_same_rate(run, tmp_path):
    folder = Path(run.output_dir)
    whole = load_file(folder / "model.safetensors")
    for file in (*folder.iterdir(), *(folder / "checkpoint-120").iterdir()):
        if file.is_file() and file.suffix != ".json":
            file.unlink()
    (folder / "train.json").unlink()
    (folder / "checkpoint-120").rename(tmp_path / "later")
    with pytest.raises(ValueError, match=r"resume: fim was 0\.8 and is 0\.7: give the arguments"):
        train(replace(run, fim=0.7, resume=True))
    with pytest.raises(ValueError, match=r"resume: fim was 0\.8 and is 0\.0"):
        train(replace(run, fim=0.0, resume=True))
    train(replace(run, resume=True))
    again = load_file(folder / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_runs_begun_before_there_was_a_rate_go_on(run, tmp_path):
    plain = replace(run, output_dir=tmp_path / "run", fim=0.0, steps=2, save_every=1)
    train(plain)
    settings = json.loads((tmp_path / "run/data/run.json").read_text())
    assert settings["settings"].pop("fim") == 0
    (tmp_path / "run/data/run.json").write_text(json.dumps(settings))
    (tmp_path / "run/train.json").unlink()
    train(replace(plain, resume=True))
    assert load_model(str(tmp_path / "run"))[0].config.fim_rate == 0


def test_going_on_with_a_model_keeps_what_it_can(run, trained, tmp_path):
    further = replace(
        run, init=str(run.output_dir), output_dir=tmp_path / "run", fim=0.0, config={}, vocab_size=None, steps=1
    )
    train(further)
    assert load_model(str(tmp_path / "run"))[0].config.fim_rate == 0.8


def test_a_hole_may_repeat_what_is_around_it(random_model):
    """A model's own repetition penalty is for texts that go on, not for the names around a hole."""
    model, tokenizer = load_model(random_model)

    def fill(**settings) -> list[int]:
        (completion,) = infill(model, tokenizer, "def", "x", Sampling(max_new_tokens=20, seed=0, **settings))
        return completion.ids

    plain = fill()
    model.generation_config.repetition_penalty = 3.0
    assert fill() == plain
    assert fill(repetition_penalty=3.0) != plain


def test_no_sentinel_is_ever_written(random_model):
    """Neither in a middle nor in a text: they are in training sequences, but in no text."""
    model, tokenizer = load_model(random_model)
    sentinels = Sentinels.of(tokenizer)
    sampling = Sampling(max_new_tokens=200, num_return_sequences=8, temperature=5.0, seed=0)
    completions = infill(model, tokenizer, "def", "x", sampling) + complete(model, tokenizer, [[0]], sampling)[0]
    ids = {i for completion in completions for i in completion.ids}
    assert len(ids) > 100
    assert not ids & {sentinels.prefix, sentinels.suffix, sentinels.middle}
    model.config.fim_rate = 0.0  # as before there were models that know holes
    (plain,) = complete(model, tokenizer, [[0]], sampling)
    assert {i for completion in plain for i in completion.ids} & {sentinels.prefix, sentinels.suffix, sentinels.middle}


def test_the_whole_file_is_printed_byte_for_byte(command, random_model, tmp_path):
    path = tmp_path / "marked.py"
    path.write_bytes(MARKED)
    prefix, suffix = MARKED.split(b"<|fill|>")
    model, tokenizer = load_model(random_model)
    for order in ("spm", "psm"):
        (expected,) = infill(model, tokenizer, prefix, suffix, GREEDY, order=order)
        prompt = infill_prompt(model, tokenizer, prefix, suffix, order)
        assert decode_bytes(tokenizer, prompt) == (suffix + prefix if order == "spm" else prefix + suffix)
        flags = ("--greedy", "--max-new-tokens", 8, "--infill-order", order)
        for stream in ("--stream", "--no-stream"):
            code, out, err = command("generate", random_model, "--infill", path, *flags, stream)
            assert (code, out) == (0, prefix + expected.text.encode() + suffix)
            assert err == ("cut off after 8 tokens: see --max-new-tokens\n" if len(expected.ids) == 8 else "")
        _, out, _ = command("generate", random_model, "--infill", path, *flags, "--middle-only")
        assert out == expected.text.encode() + b"\n"
        _, out, _ = command("generate", random_model, "--infill", "-", *flags, "--json", "-", stdin=MARKED)
        (row,) = json.loads(out)["rows"]
        assert row["completion"] == expected.text
        assert row["prompt_tokens"] == len(prompt)
    other = MARKED.replace(b"<|fill|>", b"HERE")
    code, out, _ = command(
        "generate", random_model, "--infill", "-", "--marker", "HERE", "--num-return-sequences", 2, "--seed", 3,
        "--max-new-tokens", 4, stdin=other,
    )  # fmt: skip
    assert code == 0
    assert out.count(prefix) == out.count(suffix) == 2
    assert out.startswith(b"[completion 1 of 2]\n")


def test_long_prompts_are_read_in_chunks(random_model, monkeypatch):
    model, tokenizer = load_model(random_model)
    prefix = b"import os, sys\nclass Shape:\n" * 4000
    lengths: list[int] = []
    forward = model.model.forward

    def counting(input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", counting)
    infill(model, tokenizer, prefix, prefix, replace(GREEDY, max_new_tokens=2))
    assert max(lengths) == 8192
    assert sum(lengths) > 2 * len(encode_bytes(tokenizer, prefix))


def test_context_is_what_is_next_to_the_hole(random_model, tmp_path):
    model, tokenizer = load_model(random_model)
    prefix, suffix = b"import os, sys\n" * 50, b"class Shape:\n" * 50
    before, after = encode_bytes(tokenizer, prefix), encode_bytes(tokenizer, suffix)
    sentinels = Sentinels.of(tokenizer)
    for order in ("spm", "psm"):
        cut = infill_prompt(model, tokenizer, prefix, suffix, order, 7)
        assert cut == sentinels.prompt(before[-7:], after[:7], order)
        assert infill_prompt(model, tokenizer, prefix, suffix, order, 10**6) == sentinels.prompt(before, after, order)
    (tmp_path / "a.py").write_bytes(prefix + suffix)
    documents = find_documents([str(tmp_path / "a.py")])
    near, all_of_it = (evaluate_infilling(model, tokenizer, documents, lines=2, context=n) for n in (7, None))
    assert near["bits_per_byte"] != all_of_it["bits_per_byte"]
    assert near["left_bits_per_byte"] == all_of_it["left_bits_per_byte"]


def test_hidden_lines(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\n  \t\n    first = 1  \r\n\n\tsecond\n")
    (tmp_path / "b.py").write_bytes(b"only")
    (tmp_path / "c.py").write_bytes(b"\n \n\n")
    found = find_documents([str(tmp_path)])
    holes = hide_lines(found, 10)
    texts = {(Path(h.document.path).name, h.line): h.document.read()[h.start : h.stop] for h in holes}
    assert texts == {("a.py", 3): b"first = 1  ", ("a.py", 5): b"second", ("b.py", 1): b"only"}
    assert [Path(h.document.path).name for h in hide_lines(found, 2)] != ["a.py", "a.py"]  # one of each first
    assert hide_lines(found, 2, seed=1) == hide_lines(found, 2, seed=1)
    assert len({tuple(hide_lines(found, 1, seed=seed)) for seed in range(30)}) == 3
    with pytest.raises(ValueError, match="no line to hide: every document is blank"):
        hide_lines(find_documents([str(tmp_path / "c.py")]), 1)


def test_evaluation_is_what_a_full_pass_says(random_model, tmp_path):
    """Bits from one uncached pass over prompt and line; the same again; nothing depends on how many lines there are."""
    (tmp_path / "a.py").write_bytes(MARKED.replace(b"<|fill|>", b"return a * b") * 3)
    model, tokenizer = load_model(random_model)
    documents = find_documents([str(tmp_path / "a.py")])
    result = evaluate_infilling(model, tokenizer, documents, lines=4, order="psm")
    holes = hide_lines(documents, 4)
    assert [hole["line"] for hole in result["holes"]] == [hole.line for hole in holes]
    text, bits, left_bits = documents[0].read(), 0.0, 0.0
    for hole in holes:
        prefix, middle, suffix = text[: hole.start], text[hole.start : hole.stop], text[hole.stop :]
        middle_ids = encode_bytes(tokenizer, middle)
        for side, prompt in (
            ("both", infill_prompt(model, tokenizer, prefix, suffix, "psm")),
            ("left", [tokenizer.bos_token_id, *encode_bytes(tokenizer, prefix)]),
        ):
            ids = torch.tensor([[*prompt, *middle_ids]])
            with torch.no_grad():
                log_p = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            own = -float(log_p.gather(1, ids[0, len(prompt) :, None]).sum()) / 0.6931471805599453
            bits, left_bits = (bits + own, left_bits) if side == "both" else (bits, left_bits + own)
    size = sum(hole.stop - hole.start for hole in holes)
    assert result["bytes"] == size
    assert result["bits_per_byte"] == pytest.approx(bits / size, rel=1e-4)
    assert result["left_bits_per_byte"] == pytest.approx(left_bits / size, rel=1e-4)
    again = evaluate_infilling(model, tokenizer, documents, lines=4, order="psm")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


def test_eval_command(command, trained, run, colours, tmp_path):
    report = tmp_path / "report.json"
    words = ("eval", run.output_dir, "--data", colours, "--held-out", "--precision", "fp32", "--infill", 12)
    code, out, err = command(*words, "--json", report)
    assert (code, err) == (0, "")
    assert b"of 12 hidden lines filled in exactly" in out
    assert b"bits per byte" in out
    result = json.loads(report.read_text())
    names = {(row["case"], row["metric"]) for row in result["rows"]}
    assert names >= {
        ("infill", "exact_match"),
        ("infill", "bits_per_byte"),
        ("infill, 1 to 10 characters", "exact_match"),
    }
    figures = result["summary"]["infill"]
    assert figures["lines"] == figures["documents"] == len(figures["holes"]) == 12
    assert figures["exact_match_interval"][0] <= figures["exact_match"] <= figures["exact_match_interval"][1]
    other = json.loads(command(*words, "--seed", 1, "--infill-order", "psm", "--json", "-")[1])["summary"]["infill"]
    assert (other["seed"], other["order"]) == (1, "psm")
    assert [h["document"] for h in other["holes"]] != [h["document"] for h in figures["holes"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate MODEL --infill missing.py", "--infill 'missing.py': No such file"),
        ("generate MODEL --infill FILE --marker @@", "marker '@@' must stand in it once, where the hole is"),
        ("generate MODEL --infill FILE --marker a", "it is there 4 times"),
        ("generate MODEL --infill FILE --marker=", "--marker '': must not be empty"),
        ("generate MODEL --infill FILE --prompt x", "--prompt and --infill exclude each other"),
        ("generate MODEL --infill FILE --load-state x", "--load-state and --infill exclude each other"),
        ("generate MODEL --infill FILE --infill-order sp", "order = 'sp': must be spm or psm"),
        ("generate MODEL --infill FILE --infill-context 0", "context = 0: must be ≥ 1"),
        ("generate MODEL --prompt x --infill-context 9", "go with --infill FILE"),
        ("generate MODEL --prompt x --middle-only", "go with --infill FILE"),
        ("generate PLAIN --infill FILE", "has not learned to fill in the middle (fim_rate = 0); train one with"),
        ("eval PLAIN --data FILE --infill 3", "has not learned to fill in the middle"),
        ("eval MODEL --data FILE --infill 0", "--infill 0: must be ≥ 1"),
        ("eval MODEL --pairs FILE --infill 1", "--infill hides lines of --data"),
        ("eval MODEL --data FILE --seed 1", "--seed, --infill-order and --infill-context go with --infill N"),
        ("eval MODEL --data FILE --infill 1 --infill-order sp", "order = 'sp'"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(command, random_model, plain_model, tmp_path, words, message):
    (tmp_path / "file.py").write_bytes(MARKED)
    places = {"MODEL": random_model, "FILE": tmp_path / "file.py", "PLAIN": plain_model}
    code, out, err = command(*(places.get(word, word) for word in words.split()))
    assert (code, out) == (2, b"")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_tokenizer_without_sentinels_is_refused_before_anything_is_written(run, trained, tmp_path, monkeypatch):
    trained[1].save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr("resonance_nn.data.fim.special_token_id", lambda tokenizer, token: None)
    lacking = replace(run, output_dir=tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"), vocab_size=None)
    with pytest.raises(ValueError, match=r"tokenizer has no <\|fim_prefix\|>, <\|fim_suffix\|>, <\|fim_middle\|>"):
        train(lacking)
    assert not (tmp_path / "run").exists()
    assert resonance_nn.infill is infill
