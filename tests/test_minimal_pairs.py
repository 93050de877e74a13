"""Minimal pairs: equal to scoring sentence by sentence, and to lm-evaluation-harness."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.cli import main
from resonance_nn.data import DataError
from resonance_nn.minimal_pairs import read_pairs, score_pairs

PAIRS = {
    "agreement": [("The cats sleep.", "The cats sleeps."), ("A dog runs.", "A dog run."), ("They are.", "They is.")],
    "order": [("Nobody ever left the old house.", "Ever nobody left the old house."), ("I see.", "See I, I see.")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for name, pairs in PAIRS.items():
        lines = [json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": name}) for good, bad in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tokenizer) -> ResonanceForCausalLM:
    torch.manual_seed(0)
    return ResonanceForCausalLM(
        ResonanceConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


def log_probability(model, tokenizer, sentence: str) -> float:
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(" " + sentence, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.double()
    return -F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()


@pytest.mark.parametrize("at_once", [1, 40, 8192])
def test_equals_sentence_by_sentence(folder, model, tokenizer, at_once, monkeypatch):
    monkeypatch.setattr("resonance_nn.minimal_pairs.TOKENS_AT_ONCE", at_once)
    read = read_pairs([str(folder)])
    assert read == PAIRS
    result = score_pairs(model, tokenizer, read)
    for name, pairs in PAIRS.items():
        right = [log_probability(model, tokenizer, a) > log_probability(model, tokenizer, b) for a, b in pairs]
        assert result["phenomena"][name] == pytest.approx(sum(right) / len(right))
    assert result["pairs"] == 5
    assert result["accuracy"] == pytest.approx(sum(result["phenomena"].values()) / 2)  # of phenomena, not of pairs
    swapped = {name: [(bad, good) for good, bad in pairs] for name, pairs in PAIRS.items()}
    assert score_pairs(model, tokenizer, swapped)["accuracy"] == pytest.approx(1 - result["accuracy"])


# lm-eval and the libraries below it open files they do not close and use calls that others deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_equals_lm_evaluation_harness(folder, model, tokenizer, tmp_path, monkeypatch):
    """The harness's own BLiMP template on local files: the same accuracies."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    template = (Path(lm_eval.__file__).parent / "tasks/blimp/_template_yaml").read_text()
    assert "dataset_path: nyu-mll/blimp\n" in template
    for name in PAIRS:
        local = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    train: {folder / name}.jsonl\n"
        text = template.replace("dataset_path: nyu-mll/blimp\n", local)
        (tmp_path / f"{name}.yaml").write_text(f"task: local_{name}\n{text}")
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=512, batch_size=2, device="cpu"),
        tasks=[f"local_{name}" for name in PAIRS],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results is not None
    ours = score_pairs(model, tokenizer, PAIRS)
    for name, pairs in PAIRS.items():
        assert results["results"][f"local_{name}"]["acc,none"] == pytest.approx(ours["phenomena"][name])
        for sample, pair in zip(results["samples"][f"local_{name}"], pairs, strict=True):
            theirs = [response[0] for response in sample["filtered_resps"]]
            assert theirs == pytest.approx([log_probability(model, tokenizer, text) for text in pair], abs=1e-3)


def test_eval_command(folder, model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["eval", str(tmp_path / "model"), "--pairs", str(folder), "--json", str(tmp_path / "out.json")]
    assert main([*arguments, "--precision", "fp32"]) == 0
    payload = json.loads((tmp_path / "out.json").read_text())
    assert payload["summary"]["minimal_pairs"] == score_pairs(model, tokenizer, PAIRS)
    assert {row["case"] for row in payload["rows"]} == {*PAIRS, "mean of 2"}
    assert "agreement" in capsys.readouterr().out


def test_ties_count_and_what_is_not_finite_is_no_answer(model, tokenizer, tmp_path):
    assert score_pairs(model, tokenizer, {"same": [("A dog.", "A dog.")]})["accuracy"] == 1
    lost = copy.deepcopy(model)
    with torch.no_grad():
        next(lost.parameters()).fill_(math.nan)
    assert math.isnan(score_pairs(lost, tokenizer, PAIRS)["accuracy"])
    (tmp_path / "lines.jsonl").write_text('{"sentence_good": "a\u2028b", "sentence_bad": "c"}\n', encoding="utf-8")
    assert read_pairs([str(tmp_path / "lines.jsonl")]) == {"lines": [("a\u2028b", "c")]}


def test_what_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "foreign.jsonl").write_text('{"sentence_good": "a", "sentence_bad": "b"}\n{"sentence_good": "a"}\n')
    for name, message in (
        ("missing.jsonl", "no such file"),
        ("empty", "no such file, or a folder without"),
        ("none.jsonl", "is empty"),
        ("foreign.jsonl", "foreign.jsonl:2: must be JSON with texts"),
    ):
        with pytest.raises(DataError, match=message):
            read_pairs([str(tmp_path / name)])
    assert main(["eval", "no-model"]) == 2
    assert capsys.readouterr().err.strip() == "error: give --data, --pairs, or both"
