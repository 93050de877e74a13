"""The loop of the suites that train: a stopped run goes on exactly, and every model meets the same batches."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from resonance_nn.bench import learning, tasks
from resonance_nn.bench.contestants import CONTESTANTS, Shape
from resonance_nn.bench.learning import learn
from resonance_nn.bench.runs import Plan, check_settings, described, fields_of, prepare
from resonance_nn.bench.tasks import recall_task, tracking_task
from resonance_nn.config import ResonanceConfig
from resonance_nn.progress import TrainingInterrupted

TASK = recall_task(32, (16, 32), (2, 4), (32, 4))
PLAN = Plan(lr=3e-3, steps=12, tokens_per_batch=128, warmup=4, eval_every=5, precision="fp32")
SMALL = Shape(hidden_size=64, layers=1, vocab_size=32, length=32, state_size=16)


def build(name: str = "holographic"):
    return lambda: CONTESTANTS[name].build(SMALL)


def without_clock(result: dict) -> dict:
    clocks = {"seconds": None, "training_seconds": None}
    return {**result, **clocks, "curve": [{**line, **clocks} for line in result["curve"]]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    """A run from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, learn(folder, TASK, build(), PLAN, {"name": "x"})


def same_run(folder: Path, result: dict, whole: tuple[Path, dict]) -> None:
    assert without_clock(result) == without_clock(whole[1])
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (whole[0] / weights).read_bytes()
    assert len((folder / "log.jsonl").read_text().splitlines()) == len(result["curve"])


def test_interrupted_run_goes_on_exactly(tmp_path, whole, capsys):
    steps = []

    def interrupt(spent: float, line: dict) -> None:
        steps.append(spent)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match="step 7 of 12"):
        learn(tmp_path, TASK, build(), PLAN, {"name": "x"}, report=interrupt)
    assert not (tmp_path / "result.json").exists()
    result = learn(tmp_path, TASK, build(), PLAN, {"name": "x"}, resume=True, report=lambda *now: steps.append(now[0]))
    assert steps == pytest.approx([(i + 1) / 12 for i in range(12)])
    same_run(tmp_path, result, whole)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("killed_at", [2, 8, 11])
def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path, whole, monkeypatch, killed_at):
    """Checkpoints at every fourth step at most; the log is cut back to the checkpoint, a half line in it too."""
    clock = iter(range(100_000))
    monkeypatch.setattr(learning.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(learning, "SAVE_SECONDS", 10.0)
    seen = []

    def kill(spent: float, line: dict) -> None:
        seen.append(spent)
        if len(seen) == killed_at:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        learn(tmp_path, TASK, build(), PLAN, {"name": "x"}, report=kill)
    assert (tmp_path / "checkpoint.safetensors").exists() == (killed_at > 2)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 1')
    same_run(tmp_path, learn(tmp_path, TASK, build(), PLAN, {"name": "x"}, resume=True), whole)


def test_finished_run_is_not_repeated(whole):
    folder, result = whole

    def never():
        raise AssertionError("built again")

    assert learn(folder, TASK, never, PLAN, {"name": "x"}, resume=True) == result


def test_resuming_with_other_settings_is_refused(whole):
    for plan, settings, said in [
        (replace(PLAN, lr=1e-3), {"name": "x"}, "lr was 0.003 and is 0.001"),
        (PLAN, {"name": "y"}, "name was 'x' and is 'y'"),
    ]:
        with pytest.raises(ValueError, match=said):
            learn(whole[0], TASK, build(), plan, settings, resume=True)


def test_two_processes_do_not_share_a_run(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another process"):
        learn(tmp_path, TASK, build(), PLAN, {})


def test_nothing_is_overwritten_while_one_of_the_runs_is_at_work(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text("{}")
    with FileLock(tmp_path / "b" / ".lock"), pytest.raises(ValueError, match="another process"):
        prepare(tmp_path, {"a": {}, "b": {}}, resume=False, overwrite=True)
    assert len(list(tmp_path.glob("*/result.json"))) == 2
    prepare(tmp_path, {"a": {}, "b": {}}, resume=False, overwrite=True)
    assert not list(tmp_path.glob("*/result.json"))


def test_every_model_and_rate_meets_the_same_batches(tmp_path, monkeypatch):
    seen: dict[str, list] = {}

    def record(name: str):
        def loss(model, batch):
            seen.setdefault(name, []).append(batch.input_ids)
            return learning_loss(model, batch)

        return loss

    learning_loss = tasks.answer_loss
    for name, model, plan in [
        ("a", "holographic", PLAN),
        ("b", "resonance", replace(PLAN, lr=1e-2, steps=6)),
        ("c", "holographic", replace(PLAN, seed=1, steps=6)),
    ]:
        monkeypatch.setattr(tasks, "answer_loss", record(name))
        learn(tmp_path / name, TASK, build(model), plan, {})
    assert all(torch.equal(a, b) for a, b in zip(seen["a"], seen["b"], strict=False))
    assert not all(torch.equal(a, c) for a, c in zip(seen["a"], seen["c"], strict=False))
    assert len({tuple(ids.shape) for ids in seen["a"]}) > 1  # lengths are mixed


def test_a_run_ends_when_the_target_is_reached_twice_or_the_loss_is_lost(tmp_path):
    parity = tracking_task("parity", (16,), (16,))  # half of the guesses are right
    result = learn(tmp_path / "a", parity, build(), replace(PLAN, target=0.1, eval_every=2), {})
    assert (result["stopped"], result["steps"]) == ("reached", 4)
    result = learn(tmp_path / "b", TASK, build(), replace(PLAN, lr=1e30, warmup=0), {})
    assert (result["stopped"], result["steps"], result["curve"][-1]["loss"]) == ("diverged", 5, None)
    json.dumps(result, allow_nan=False)


def test_schedule():
    plan = Plan(lr=1.0, steps=100, warmup=10)
    rates = [plan.rate(step, 0.0) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(20)])
    falling = replace(plan, cooldown=1.0)
    assert [falling.rate(step, 0.0) for step in (10, 50, 99)] == pytest.approx([0.9, 0.5, 0.01])
    by_clock = replace(plan, minutes=1.0)
    assert by_clock.spent(50, 45.0) == 0.75
    assert by_clock.rate(50, 54.0) == pytest.approx(0.5)


def test_decay_is_on_linear_maps_and_embeddings_only(tmp_path):
    model = CONTESTANTS["spectral_gate"].build(SMALL)
    run = learning._Run(tmp_path, TASK, lambda: model, PLAN)
    decayed = {id(p) for p in run.optimizer.param_groups[0]["params"]}
    assert id(model.model.backbone.blocks[0].mixer.frequency) not in decayed
    assert id(model.get_input_embeddings().weight) in decayed
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(list(model.parameters()))


def test_a_loss_of_zero_is_not_a_lost_one(tmp_path, monkeypatch):
    def perfect(model, batch):
        objective, loss = learning_loss(model, batch)
        return objective, loss * 0

    learning_loss = tasks.answer_loss
    monkeypatch.setattr(tasks, "answer_loss", perfect)
    assert learn(tmp_path, TASK, build(), PLAN, {})["stopped"] == "budget"


def test_a_run_begun_before_a_field_goes_on(tmp_path):
    """What a later version adds to the plan or the configuration had its default before."""
    config = ResonanceConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1)
    now = described({"data": ["stdlib"], "config": fields_of(config)}, PLAN)
    for field, part in (("gates", "config"), ("num_modes", "config"), ("optimizer", "plan")):
        old = json.loads(json.dumps(now))
        del old[part][field]
        (tmp_path / "run.json").write_text(json.dumps(old))
        check_settings(tmp_path, now)
        with pytest.raises(ValueError, match=f"{field} was .* and is 'other'"):
            check_settings(tmp_path, {**now, part: {**now[part], field: "other"}})
