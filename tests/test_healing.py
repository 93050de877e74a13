"""White space at a prompt's end: the model spells it anew, and the text is that of the bytes, whatever the tokens."""

from __future__ import annotations

import pytest
import torch

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.data import decode_bytes, encode_bytes, train_tokenizer
from resonance_nn.generation import Sampling, complete, encode_prompt, prefill
from resonance_nn.healing import BeginWith, cut_space
from resonance_nn.loading import load_model

CORPUS = b"def area(width):\n    if width:\n        return 1\n\n\nclass Shape:\n    name = 'x'\n\tpass\r\n" * 9
GREEDY = Sampling(max_new_tokens=12, greedy=True)


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    tokenizer = train_tokenizer([CORPUS], 320, progress=False)
    config = ResonanceConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_heads=2, initializer_range=0.3)
    return ResonanceForCausalLM(config).eval(), tokenizer


@pytest.mark.parametrize("text", [b"def f():", b"def f():\n", b"a \n\n   ", b"a\t\r\n", b"\n \n", b""])
def test_the_cut_is_the_white_space_at_the_end(loaded, text):
    tokenizer = loaded[1]
    ids, space = cut_space(tokenizer, encode_prompt(tokenizer, text))
    assert decode_bytes(tokenizer, ids) == text.rstrip()
    assert space == text[len(text.rstrip()) :]
    assert ids[0] == encode_prompt(tokenizer, b"")[0], "the token that begins a document is none"


def test_tokens_that_were_read_are_kept(loaded):
    tokenizer = loaded[1]
    ids = encode_prompt(tokenizer, b"a\t\r\n \t\n")
    for keep in range(1, len(ids) + 1):
        kept, space = cut_space(tokenizer, ids, keep)
        assert kept[:keep] == ids[:keep]
        assert decode_bytes(tokenizer, kept) + space == b"a\t\r\n \t\n"


@pytest.mark.parametrize("text", [b"class Shape:\n", b"if width:\n    ", b"\n\n"])
def test_it_is_greedy_decoding_among_the_tokens_that_fit(loaded, text):
    model, tokenizer = loaded
    ids, space = cut_space(tokenizer, encode_prompt(tokenizer, text))
    known, begin = list(ids), len(ids)
    for _ in range(GREEDY.max_new_tokens):
        scores = model(torch.tensor([known])).logits[0, -1, : len(tokenizer)].tolist()
        so_far = decode_bytes(tokenizer, known[begin:])
        fitting = []
        for i in range(len(tokenizer)):
            spelt = so_far + decode_bytes(tokenizer, [i])
            if len(so_far) >= len(space) or (
                len(spelt) > len(so_far) and (spelt.startswith(space) or space.startswith(spelt))
            ):
                fitting.append(i)
        known.append(max(fitting, key=scores.__getitem__))
    ((completion,),) = complete(model, tokenizer, [encode_prompt(tokenizer, text)], GREEDY, heal=True)
    reached = known[begin : begin + len(completion.ids)]
    assert completion.ids == reached
    assert (text.rstrip() + decode_bytes(tokenizer, completion.ids)).decode(errors="replace") == (
        text.decode() + completion.text
    )


def test_a_prompt_without_such_an_end_is_continued_as_ever(loaded):
    model, tokenizer = loaded
    prompt = [encode_prompt(tokenizer, b"class Shape")]
    assert complete(model, tokenizer, prompt, GREEDY, heal=True) == complete(model, tokenizer, prompt, GREEDY)


def test_prompts_of_a_batch_have_white_space_of_their_own(loaded):
    model, tokenizer = loaded
    prompts = [encode_prompt(tokenizer, text) for text in (b"class Shape:\n    ", b"def area", b"if width:\n")]
    for how in (GREEDY, Sampling(max_new_tokens=12, num_beams=3, num_return_sequences=2)):
        together = complete(model, tokenizer, prompts, how, heal=True)
        alone = [complete(model, tokenizer, [prompt], how, heal=True)[0] for prompt in prompts]
        assert [[c.text for c in row] for row in together] == [[c.text for c in row] for row in alone]


def test_the_prompts_own_line_break_does_not_stop_it(loaded):
    model, tokenizer = loaded
    prompt = encode_prompt(tokenizer, b"class Shape:\n\n")
    ((free,),) = complete(model, tokenizer, [prompt], Sampling(max_new_tokens=40, greedy=True), heal=True)
    stop = free.text[4:6]
    for how in (stop, "\n", "\n\n"):
        sampling = Sampling(max_new_tokens=40, greedy=True, stop=(how,))
        ((completion,),) = complete(model, tokenizer, [prompt], sampling, heal=True)
        assert completion.text == free.text.split(how)[0]
    assert stop in free.text


def test_what_streams_is_the_text(loaded):
    model, tokenizer = loaded
    prompt, pieces = encode_prompt(tokenizer, b"class Shape:\n    "), []
    ((completion,),) = complete(model, tokenizer, [prompt], GREEDY, write=pieces.append, heal=True)
    assert "".join(pieces) == completion.text


def test_a_state_that_has_read_the_white_space_goes_on_after_it(loaded):
    model, tokenizer = loaded
    prompt = encode_prompt(tokenizer, b"class Shape:\n    ")
    cache = prefill(model, torch.tensor([prompt]))
    ((completion,),) = complete(model, tokenizer, [prompt], GREEDY, cache=cache, heal=True)
    assert [[completion]] == complete(model, tokenizer, [prompt], GREEDY)


def test_rows_that_have_spelt_it_are_free(loaded):
    tokenizer = loaded[1]
    space = encode_bytes(tokenizer, b" ")
    ids, scores = torch.tensor([[5, *space], [5, *space]]), torch.zeros(2, 320)
    first, second = BeginWith(tokenizer, [b" ", b"  "], 1)(ids, scores).isfinite()
    assert first.all()
    assert 0 < second.sum() < 320
    assert all(decode_bytes(tokenizer, [int(i)]).startswith(b" ") for i in second.nonzero())


def test_the_bundled_model_indents_after_a_colon():
    """Without it, the line break alone is the end of the document to a model of source code."""
    model, tokenizer = load_model("resonance-tiny")
    for text in (b"def area(width, height):\n", b"for i in range(3):\n    if i:\n"):
        ((completion,),) = complete(model, tokenizer, [encode_prompt(tokenizer, text)], GREEDY, heal=True)
        assert completion.text.startswith("    ")
        assert completion.text.strip()
