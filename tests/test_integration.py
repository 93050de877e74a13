"""The libraries a user already has, each on a checkpoint that ``resonance train`` made: transformers' Auto classes and
pipeline, a Trainer of the user's own, PEFT, lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from resonance_nn import ResonanceForCausalLM
from resonance_nn.training import TrainArguments, train

TEXT = Path(sysconfig.get_paths()["stdlib"]) / "json"  # Python's own json package: about 40 KB of source


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    arguments = TrainArguments(
        data=[str(TEXT)],
        output_dir=folder,
        vocab_size=512,
        config={"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2},
        mixers=["spectral_gate", "resonance"],
        steps=60,
        seq_len=128,
        batch_size=4,
        precision="fp32",
        progress=False,
    )
    summary = train(arguments)["summary"]
    assert summary["loss"] < math.log(512) - 1, "the checkpoint has learned something"
    return folder


def test_auto_classes_and_generate(checkpoint: Path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert isinstance(model, ResonanceForCausalLM)
    batch = tokenizer(["def ", "import json\n\nclass"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0, "left padding"
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    alone = model.generate(**tokenizer(["def "], return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert torch.equal(out[0, -12:], alone[0, -12:])


def test_pipeline(checkpoint: Path):
    generate = pipeline("text-generation", model=str(checkpoint))
    texts = generate(["def ", "class JSON"], max_new_tokens=8, do_sample=False, batch_size=2)
    assert [t[0]["generated_text"][:4] for t in texts] == ["def ", "clas"]
    assert all(len(t[0]["generated_text"]) > 8 for t in texts)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own use of an old name
def test_lora_with_peft(checkpoint: Path, tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer((TEXT / "scanner.py").read_text()[:1500], return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=16, target_modules=["in_proj", "out_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in base.parameters()) / 5
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    before = model(input_ids=ids, labels=ids).loss.item()
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    tuned = model(input_ids=ids, labels=ids).loss.item()
    assert tuned < before - 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter").eval()
    assert abs(again(input_ids=ids, labels=ids).loss.item() - tuned) < 1e-5
    merged = again.merge_and_unload()
    assert abs(merged(input_ids=ids, labels=ids).loss.item() - tuned) < 1e-4
    prompt = ids[:, :5]
    cached = merged.generate(prompt, max_new_tokens=10, do_sample=False)
    assert torch.equal(cached, merged.generate(prompt, max_new_tokens=10, do_sample=False, use_cache=False))


# lm-eval and the libraries below it open files they do not close and use calls that others deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_lm_evaluation_harness(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A local multiple-choice task: the harness scores as our own logits do."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = [
        {"prompt": "import", "choices": [" json", " qqqq"], "answer": 0},
        {"prompt": "    return", "choices": [" zzxx", " self"], "answer": 1},
        {"prompt": "def __init__(", "choices": ["self", "%%%%"], "answer": 0},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "task.yaml").write_text(
        "task: local_choices\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'test.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=512, batch_size=2, device="cpu"),
        tasks=["local_choices"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results is not None
    expected = sum(
        int(max((0, 1), key=lambda i: log_likelihood(model, tokenizer, q["prompt"], q["choices"][i])) == q["answer"])
        for q in questions
    )
    assert results["results"]["local_choices"]["acc,none"] == pytest.approx(expected / 3)
    for sample, question in zip(results["samples"]["local_choices"], questions, strict=True):
        for i, response in enumerate(sample["filtered_resps"]):
            ours = log_likelihood(model, tokenizer, question["prompt"], question["choices"][i])
            assert response[0] == pytest.approx(ours, abs=1e-3)


def log_likelihood(model: ResonanceForCausalLM, tokenizer, prompt: str, choice: str) -> float:
    """log p(choice | prompt) after the document token, which the tokenizer adds and the harness keeps."""
    context, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + choice)["input_ids"]
    with torch.no_grad():
        log_p = F.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return sum(log_p[t - 1, ids[t]].item() for t in range(len(context), len(ids)))


def test_the_users_own_trainer(checkpoint: Path, tmp_path: Path):
    """transformers' Trainer with bf16, accumulation and checkpointing, and the fused loss counted as it counts."""
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    rows = [{"input_ids": torch.randint(10, 500, (32,))} for _ in range(16)]
    for r in rows:
        r["labels"] = r["input_ids"].clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    logits = [model(r["input_ids"][None]).logits[0, :-1] for r in rows]
    before = {
        smoothing: sum(
            F.cross_entropy(x, r["labels"][1:], label_smoothing=smoothing).item()
            for x, r in zip(logits, rows, strict=True)
        )
        / len(rows)
        for smoothing in (0.0, 0.3)
    }
    for smoothing, expected in before.items():
        arguments.label_smoothing_factor = smoothing
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoint),
            args=arguments,
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
        )
        trainer.train()
        first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert first == pytest.approx(expected, abs=0.02)
