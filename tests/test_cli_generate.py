"""Generation: streaming, saved states, chat, batches; each against the plain way to get the same text."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from resonance_nn import ResonanceCache, ResonanceConfig, ResonanceForCausalLM, generation
from resonance_nn.cli import main
from resonance_nn.data import decode_bytes, encode_bytes, train_tokenizer
from resonance_nn.generation import Chat, Sampling, complete, encode_prompt, prefill
from resonance_nn.loading import load_model
from resonance_nn.streaming import StopText

PROMPT = "def area(width, height):\n    return café"
CORPUS = (
    PROMPT + "\nimport os, sys\nclass Shape:\n    def __init__(self, name='naïve'): self.name = name\n"
).encode() * 9
GREEDY = Sampling(max_new_tokens=24, greedy=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model whose large random weights make its text vary, and whose vocabulary is larger than its tokenizer's."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([CORPUS], 400, progress=False)
    config = ResonanceConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=3,
        num_heads=2,
        mixers=("spectral_gate", "attention", "resonance"),
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("generate") / "model"
    ResonanceForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def _run(*argv: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _run


@pytest.fixture
def fed(loaded, monkeypatch):
    """Counts the tokens of every forward pass."""
    counts: list[int] = []
    forward = loaded[0].model.forward

    def counting(input_ids, **kwargs):
        counts.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(loaded[0].model, "forward", counting)
    return counts


def greedy_reference(loaded, ids: list[int], steps: int) -> list[int]:
    """The likeliest token of a full forward pass, again and again: no cache, no generate."""
    model, known = loaded[0], len(loaded[1])
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        for _ in range(steps):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits[:known].argmax()))
    return ids[start:]


def test_greedy_is_the_likeliest_token_of_a_full_forward_pass(loaded):
    model, tokenizer = loaded
    ids = encode_prompt(tokenizer, PROMPT.encode())
    ((completion,),) = complete(model, tokenizer, [ids], GREEDY)
    assert completion.ids == greedy_reference(loaded, ids, 24)
    assert completion.finish_reason == "length"
    assert len(set(completion.ids)) > 8  # a model that repeats itself would hide mistakes


@pytest.mark.parametrize(
    "flags", [["--greedy"], ["--seed", "3"], ["--seed", "5", "--top-k", "9", "--top-p", "0.9", "--temperature", "2"]]
)
def test_streamed_equals_not_streamed(run, folder, flags):
    arguments = ["generate", folder, "--prompt", PROMPT, "--max-new-tokens", 40, *flags]
    code, streamed, errors = run(*arguments, "--stream")
    assert (code, errors) == (0, "")
    assert run(*arguments, "--no-stream")[1] == streamed
    code, printed, on_stderr = run(*arguments, "--json", "-")
    row = json.loads(printed)["rows"][0]
    assert row["prompt"] + row["completion"] + "\n" == streamed == on_stderr
    assert row["new_tokens"] > 10


def test_prompt_file_and_standard_input_are_taken_byte_for_byte(run, folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(generation, "encode_bytes", lambda tokenizer, data: seen.append(data) or [5])
    data = b"\xff\x00 caf\xc3\xa9\r\n\n"
    (tmp_path / "prompt").write_bytes(data)
    run("generate", folder, "--prompt-file", tmp_path / "prompt", "--max-new-tokens", 1)
    run("generate", folder, "--prompt-file", "-", "--max-new-tokens", 1, stdin=data)
    run("generate", folder, "--max-new-tokens", 1, stdin=data)
    assert seen == [data] * 3


def test_characters_and_stop_strings_are_held_back(loaded):
    _, tokenizer = loaded
    ids = encode_bytes(tokenizer, "x = 'é😀'; stop here".encode())
    for stop, expected in (((), "x = 'é😀'; stop here"), (("stop",), "x = 'é😀'; "), (("😀'", "zzz"), "x = 'é")):
        reader = StopText(tokenizer, stop)
        pieces = [reader.push([i]) for i in ids] + [reader.push([], final=True)]
        assert "".join(pieces) == expected
        assert not any("�" in piece for piece in pieces)
        assert reader.stopped == bool(stop)
    reader = StopText(tokenizer, ("stopped",))
    assert reader.push(ids) + reader.push([], final=True) == "x = 'é😀'; stop here"  # what only began as one is given


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_stop_string_ends_the_text(run, folder, stream):
    arguments = ["generate", folder, "--prompt", PROMPT, "--greedy", "--max-new-tokens", 40]
    whole = json.loads(run(*arguments, "--json", "-")[1])["rows"][0]["completion"]
    stop = next(whole[i : i + 3] for i in range(9, 99) if "�" not in whole[i : i + 3])
    code, out, err = run(*arguments, stream, "--stop", stop, "--stop", "never there", "--json", "-")
    row = json.loads(out)["rows"][0]
    assert code == 0
    assert row["completion"] == whole[: whole.index(stop)]
    assert row["finish_reason"] == "stop"
    assert row["new_tokens"] < 40
    assert err == PROMPT + row["completion"] + "\n"


@pytest.mark.parametrize("chunk_size", [1, 5, 16])
def test_prefill_in_chunks(loaded, chunk_size, fed):
    model, tokenizer = loaded
    ids = [encode_prompt(tokenizer, PROMPT.encode() * n) for n in (3, 1)]
    expected = complete(model, tokenizer, ids, GREEDY)
    fed.clear()
    assert complete(model, tokenizer, ids, GREEDY, chunk_size=chunk_size) == expected
    assert max(fed) == chunk_size
    assert sum(fed) == max(map(len, ids)) + 23  # each token once; the last one generated is not fed


def test_batch_of_unequal_prompts_equals_one_at_a_time(run, folder, tmp_path):
    prompts = ["def f(x):", "import os", "x", PROMPT * 2, '"']
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    arguments = ["--greedy", "--max-new-tokens", 16, "--json", "-"]
    for size in (2, 5):
        code, out, _ = run("generate", folder, "--prompt-file", lines, "--batch", size, *arguments)
        rows = json.loads(out)["rows"]
        assert code == 0
        assert [row["prompt"] for row in rows] == prompts
        for row in rows:
            alone = json.loads(run("generate", folder, "--prompt", row["prompt"], *arguments)[1])["rows"]
            assert alone == [row]
    text = tmp_path / "prompts.txt"
    text.write_text("def f(x):\n\nimport os\r\n")
    _, out, _ = run("generate", folder, "--prompt-file", text, "--batch", 4, *arguments)
    assert [row["prompt"] for row in json.loads(out)["rows"]] == prompts[:2]


def test_beams_equal_uncached_beams(loaded):
    model, tokenizer = loaded
    ids = encode_prompt(tokenizer, PROMPT.encode())
    sampling = Sampling(max_new_tokens=12, num_beams=4, num_return_sequences=2)
    ((best, second),) = complete(model, tokenizer, [ids], sampling, chunk_size=4)
    config = sampling.generation_config(model, tokenizer)
    config.use_cache = False
    plain = model.generate(torch.tensor([ids]), generation_config=config)
    assert [best.ids, second.ids] == plain[:, len(ids) :].tolist()
    assert best.ids != second.ids
    cache = prefill(model, torch.tensor([ids]))
    before = [{name: t.clone() for name, t in (state or {}).items()} for state in cache.states]
    assert complete(model, tokenizer, [ids], sampling, cache=cache) == [[best, second]]
    for kept, state in zip(before, cache.states, strict=True):  # a caller's cache is branched, not spread over beams
        torch.testing.assert_close(state, kept, rtol=0, atol=0)


def test_several_samples_of_a_prompt_differ_and_repeat(run, folder):
    arguments = ["generate", folder, "--prompt", PROMPT, "--num-return-sequences", 3, "--seed", 1, "--json", "-"]
    texts = [[row["completion"] for row in json.loads(run(*arguments)[1])["rows"]] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_a_seed_is_for_the_whole_command(run, folder, tmp_path):
    (tmp_path / "prompts").write_text("same\nsame\n")
    arguments = ["generate", folder, "--prompt-file", tmp_path / "prompts", "--batch", 1, "--seed", 1, "--json", "-"]
    first, second = (json.loads(run(*arguments)[1])["rows"] for _ in range(2))
    assert first == second
    assert first[0]["completion"] != first[1]["completion"]


def test_no_token_outside_the_tokenizer(loaded):
    model, tokenizer = loaded
    hot = Sampling(max_new_tokens=200, temperature=100.0, seed=0)
    ((completion,),) = complete(model, tokenizer, [[0]], hot)
    decode_bytes(tokenizer, completion.ids)
    assert max(completion.ids) < len(tokenizer) < model.config.vocab_size


def test_a_model_brings_its_own_sampling(loaded, monkeypatch):
    model, tokenizer = loaded
    own = GenerationConfig(temperature=1.5, top_p=0.9, repetition_penalty=1.3)

    def text(**settings: Any) -> str:
        return complete(model, tokenizer, [[0, 70]], Sampling(max_new_tokens=40, **settings))[0][0].text

    said = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3}
    plain, expected, greedy = text(seed=3), text(seed=3, **said), text(greedy=True)
    colder = text(seed=3, **{**said, "temperature": 0.5})
    monkeypatch.setattr(model, "generation_config", own)
    assert text(seed=3) == expected != plain
    assert text(seed=3, temperature=0.5) == colder != expected
    assert text(seed=3, temperature=0.8, top_p=1.0, repetition_penalty=1.0) == plain
    assert text(greedy=True) == greedy


def test_saved_state_continues_as_if_never_saved(run, folder, loaded, tmp_path, fed, monkeypatch):
    state = tmp_path / "prompt.state"
    end = ["--greedy", "--max-new-tokens", 20, "--json", "-"]
    direct = json.loads(run("generate", folder, "--prompt", PROMPT, *end)[1])["rows"][0]
    code, out, err = run("generate", folder, "--prompt", PROMPT, "--save-state", state, "--max-new-tokens", 0)
    assert (code, out) == (0, "")
    assert err.startswith("saved the state after ")
    assert err.count("\n") == 1
    saving = json.loads(run("generate", folder, "--prompt", PROMPT, "--save-state", state, *end)[1])["rows"][0]
    monkeypatch.setattr("resonance_nn.loading.load_model", lambda *a, **k: loaded)
    fed.clear()
    restored = json.loads(run("generate", folder, "--load-state", state, *end)[1])["rows"][0]
    assert sum(fed) == 20  # the prompt is not read again
    assert direct["completion"] == saving["completion"] == restored["completion"]
    assert direct["prompt_tokens"] == restored["prompt_tokens"]

    # appended text, by a state extended once more, with several sequences
    both = [*encode_prompt(loaded[1], PROMPT.encode()), *encode_bytes(loaded[1], b" + 1")]
    ((expected,),) = complete(*loaded, [both], GREEDY)
    longer = tmp_path / "longer.state"
    appended = ["generate", folder, "--load-state", state, "--prompt", " + 1", "--save-state", longer]
    assert run(*appended, "--max-new-tokens", 0)[0] == 0
    _, out, _ = run("generate", folder, "--load-state", longer, "--num-beams", 2, "--json", "-")
    assert json.loads(out)["rows"][0]["prompt_tokens"] == len(both)
    _, out, _ = run("generate", folder, "--load-state", longer, "--greedy", "--max-new-tokens", 24, "--json", "-")
    assert json.loads(out)["rows"][0]["completion"] == expected.text


def test_state_of_another_model_is_refused(run, folder, loaded, tmp_path):
    model, tokenizer = loaded
    state = tmp_path / "state"
    ids = encode_prompt(tokenizer, PROMPT.encode())
    cache = prefill(model, torch.tensor([ids]))
    generation.save_state(state, model, cache, ids)
    other = ResonanceForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    assert generation.load_state(state, other.bfloat16())[1] == ids  # the same model in another precision
    with torch.no_grad():
        other.get_parameter("model.backbone.blocks.1.mlp.down_proj.weight").mul_(1.1)
    with pytest.raises(ValueError, match="was saved by another model"):
        generation.load_state(state, other)
    cache.save(state, other=torch.zeros(1))
    for path, message in ((state, "holds no prompt"), (tmp_path / "none", "no such file"), (folder, "no such file")):
        code, out, err = run("generate", folder, "--load-state", path)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    with pytest.raises(ValueError, match="nothing to save"):
        generation.save_state(state, model, ResonanceCache(3), [0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0: must be > 0.0001"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 1.5}, r"top_p = 1.5: must be in \(0, 1\]"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_k": 0}, "top_k = 0: must be ≥ 1"),
        ({"min_p": 1.0}, "min_p = 1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"num_beams": 0}, "num_beams = 0"),
        ({"num_return_sequences": 0}, "num_return_sequences = 0"),
        ({"stop": ("",)}, "stop = "),
        ({"greedy": True, "top_k": 3}, "no effect on greedy decoding"),
        ({"greedy": True, "seed": 3}, "no effect on greedy decoding"),
        ({"num_beams": 2, "temperature": 0.5}, "no effect on beam search"),
        ({"greedy": True, "num_beams": 2}, "exclude each other"),
        ({"greedy": True, "num_return_sequences": 2}, "gives at most 1"),
    ],
)
def test_settings_out_of_range_or_without_effect(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings).check()


def test_chat_feeds_new_tokens_only(loaded, fed):
    chat = Chat(*loaded, system="Be short.")
    for text in ("hello", "who are <|end|> you?", "bye"):
        seen = chat.cache.get_seq_length()
        fed.clear()
        pieces: list[str] = []
        completion = chat.reply(text, GREEDY, write=pieces.append)
        assert "".join(pieces) == completion.text
        # the state has all tokens but the last of the reply and <|end|>, and no token was fed twice
        assert chat.cache.get_seq_length() == len(chat.ids) - (1 if completion.finish_reason == "end" else 2)
        assert sum(fed) == chat.cache.get_seq_length() - seen
        ids = chat.ids[: len(chat.ids) - len(completion.ids) - 1]
        assert completion.ids == greedy_reference(loaded, ids, len(completion.ids))


def test_chat_writes_the_template(loaded):
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, system="Be short.")
    completion = chat.reply("hello", Sampling(max_new_tokens=3, greedy=True))
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert chat.ids == [*expected, *completion.ids, chat.ids[-1]]
    assert decode_bytes(tokenizer, chat.ids[-1:], skip_special_tokens=False) == b"<|end|>"


def test_chat_session_from_standard_input(run, folder, tmp_path):
    state = tmp_path / "chat.state"
    flags = ["--greedy", "--max-new-tokens", 6]
    script = f"hello\n\nagain\n/save {state}\nmore\n/reset\nhello\n/load {state}\nmore\n/bogus\n/load\n/quit\nunread\n"
    code, out, err = run("chat", folder, *flags, stdin=script.encode())
    assert code == 0
    hello = run("chat", folder, *flags, stdin=b"hello\n")[1]
    first = run("chat", folder, *flags, stdin=b"hello\nagain\nmore\n")[1]
    more = first[len(run("chat", folder, *flags, stdin=b"hello\nagain\n")[1]) :]
    assert out == first + hello + more
    assert err.count("the commands are /reset") == 2
    _, again, _ = run("generate", folder, "--load-state", state, "--max-new-tokens", 2)  # the same kind of file
    assert again


def test_ctrl_c_stops_a_reply_and_leaves_the_chat_usable(loaded, fed):
    chat = Chat(*loaded)
    stopped = chat.reply("hello", Sampling(max_new_tokens=500, greedy=True), interrupted=lambda: len(fed) > 5)
    assert stopped.finish_reason == "interrupted"
    assert 0 < len(stopped.ids) < 10
    after = chat.reply("go on", GREEDY)
    ids = chat.ids[: len(chat.ids) - len(after.ids) - 1]
    assert after.ids == greedy_reference(loaded, ids, len(after.ids))


def test_sigint_is_caught_during_a_reply_only(run, folder, monkeypatch):
    def reply(self, text, sampling, *, write, interrupted):
        os.kill(os.getpid(), signal.SIGINT)
        write("stopped" if interrupted() else "not stopped")

    monkeypatch.setattr(Chat, "reply", reply)
    before = signal.getsignal(signal.SIGINT)
    assert run("chat", folder, stdin=b"hello\nhello\n")[:2] == (0, "stopped\nstopped\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_needs_role_tokens(loaded, monkeypatch):
    monkeypatch.setattr(generation, "special_token_id", lambda tokenizer, token: None)
    with pytest.raises(ValueError, match=r"no <\|system\|>.*cannot chat"):
        Chat(*loaded)


def test_on_a_terminal_the_text_cannot_act_on_it(monkeypatch):
    from rich.console import Console

    from resonance_nn.cli.common import COMPLETION, write_text

    buffer = io.StringIO()
    write_text(Console(file=buffer, force_terminal=True, color_system="standard"), "a\x1b[2J\tb\n", COMPLETION)
    assert buffer.getvalue() == "\x1b[1;36ma·[2J\tb\n\x1b[0m"
