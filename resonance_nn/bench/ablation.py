"""What each option is worth: language models of equal size that differ in one setting, on the same batches of text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from resonance_nn.bench.common import Row, result
from resonance_nn.bench.fit import confidence95
from resonance_nn.bench.learning import learn
from resonance_nn.bench.models import sized
from resonance_nn.bench.runs import Plan, described, fields_of, prepare
from resonance_nn.bench.text import HELD_OUT, text_task
from resonance_nn.config import ResonanceConfig
from resonance_nn.data import find_documents
from resonance_nn.evaluation import resolve_device
from resonance_nn.models import ResonanceForCausalLM

PLAIN = {"mlp": "swiglu", "activate_values": True, "output_norm": "head"}
COMPLEX = {**PLAIN, "mixers": ("spectral_gate",), "rotation": "step", "num_groups": None}
REAL = {**PLAIN, "mixers": ("spectral_gate",), "rotation": "none", "num_groups": 1}
RESOLVENT = {**PLAIN, "mixers": ("resolvent",)}
HOLOGRAPHIC = {**PLAIN, "mixers": ("holographic",)}


@dataclass(frozen=True)
class Ablation:
    """One question: the setting compared with, and the settings that differ from it."""

    base: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    seeds: int = 3


ABLATIONS: dict[str, Ablation] = {
    "spectral_gate": Ablation(
        COMPLEX,
        {
            "frequency_mixing": {"frequency_mixing": True},
            "mode_fraction 0.5": {"mode_fraction": 0.5},
            "mode_fraction 0.15": {"mode_fraction": 0.15},
            "entropy_weight 0.01": {"entropy_weight": 0.01},
            "real modes": {"rotation": "none"},
            "token angles": {"rotation": "token"},
            "trapezoidal": {"trapezoidal": True},
        },
    ),
    "sharing": Ablation(
        COMPLEX,
        {
            "two groups": {"num_groups": 2},
            "one group": {"num_groups": 1},
            "real, two groups": {"num_groups": 2, "rotation": "none"},
            "real, one group": {"num_groups": 1, "rotation": "none"},
            "real, one group, 64 modes": {"num_groups": 1, "rotation": "none", "num_modes": 64},
        },
    ),
    "slim": Ablation(
        REAL,
        {
            "linear values": {"activate_values": False},
            "relu2": {"mlp": "relu2"},
            "no output norm": {"output_norm": "none"},
            "all three": {"activate_values": False, "mlp": "relu2", "output_norm": "none"},
        },
    ),
    "prime_bump": Ablation(RESOLVENT, {"prime_bump": {"prime_bump": True}}, seeds=5),
    "holographic": Ablation(
        HOLOGRAPHIC,
        {
            "keys of each head": {"key_groups": None},
            "channel decays": {"decay": "channel"},
            "erase and write gates": {"decay": "channel", "erase": "gated"},
            "turning state": {"rotation": "token"},
            "reflections": {"max_beta": 2.0},
            "Hebbian": {"erase": "none"},
        },
    ),
}


@dataclass(frozen=True)
class AblationOptions:
    """What to run. ``seeds`` None means each question's own number."""

    names: tuple[str, ...] = tuple(ABLATIONS)
    output_dir: Path = Path("runs/bench-ablation")
    data: tuple[str, ...] = ("stdlib",)
    tokens: int = 1_000_000
    seeds: int | None = None
    hidden_size: int = 128
    layers: int = 4
    vocab_size: int = 2048
    seq_len: int = 512
    lr: float = 3e-3
    tokens_per_batch: int = 4096
    precision: str = "bf16"
    device: str = "cpu"

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        unknown = [name for name in self.names if name not in ABLATIONS]
        if unknown or not self.names:
            raise ValueError(f"ablations = {self.names}: must be one or more of {', '.join(ABLATIONS)}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"ablations = {self.names}: each once, as a question asked twice counts its seeds twice")
        for name in ("tokens", "hidden_size", "layers", "vocab_size", "seq_len", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be ≥ 1")
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds = {self.seeds}: must be ≥ 1")


@dataclass(frozen=True)
class Case:
    """One model to train: a setting of a question, by one seed."""

    name: str
    label: str
    config: ResonanceConfig
    plan: Plan

    @property
    def folder(self) -> str:
        return f"{self.name}/{self.label.replace(' ', '-')}/seed-{self.plan.seed}"


def run(
    options: AblationOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> dict[str, Any]:
    """Train what is missing in ``output_dir`` and compare, each variant with its base, seed by seed.

    ``progress`` is told the share done and what is being trained.

    Raises:
        ValueError: as :meth:`AblationOptions.check`; a folder with runs and neither flag, or with other ones.
    """
    options.check()
    cases = list(_cases(options))
    for case in cases:
        case.plan.check()
    documents = find_documents(list(options.data), leave_out=options.output_dir)
    settings = {
        case.folder: {"data": list(options.data), "seq_len": options.seq_len, "config": fields_of(case.config)}
        for case in cases
    }
    runs = {case.folder: described(settings[case.folder], case.plan) for case in cases}
    prepare(options.output_dir, runs, resume=resume, overwrite=overwrite)
    task = text_task(documents, options.output_dir / "data", options.seq_len, options.vocab_size)
    losses: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for i, case in enumerate(cases):
        outcome = learn(
            options.output_dir / case.folder,
            replace(task, order=case.plan.seed),
            lambda case=case: ResonanceForCausalLM(case.config),
            case.plan,
            settings[case.folder],
            resume=True,
            report=lambda share, line, i=i, case=case: progress(
                (i + share) / len(cases), f"{case.name}: {case.label}, seed {case.plan.seed}"
            ),
        )
        losses.setdefault((case.name, case.label), []).append(outcome)
    return result("ablation", _rows(losses), options.device, options=_described(options))


def _cases(options: AblationOptions) -> Iterator[Case]:
    """Every setting of a question with one seed, then with the next."""
    steps = max(1, options.tokens // options.tokens_per_batch)
    for name in options.names:
        base = {**ABLATIONS[name].base}
        for seed in range(options.seeds or ABLATIONS[name].seeds):
            for label, fields in {"base": {}, **ABLATIONS[name].variants}.items():
                plan = Plan(
                    lr=options.lr,
                    seed=seed,
                    steps=steps,
                    tokens_per_batch=options.tokens_per_batch,
                    eval_every=max(1, steps // 4),
                    precision=options.precision,
                    device=resolve_device(options.device),
                )
                yield Case(name, label, sized(_common(options), {**base, **fields}, reference=base), plan)


def _common(options: AblationOptions) -> dict[str, Any]:
    """What all models of a question share."""
    return {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_heads": max(1, options.hidden_size // 32),
        "initial_context": options.seq_len,
    }


def _rows(losses: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> list[Row]:
    """A row a setting. A seed whose loss was lost (None) leaves its setting without a mean."""
    rows: list[Row] = []
    for (name, label), outcomes in losses.items():
        ours = [outcome["cells"][HELD_OUT]["loss"] for outcome in outcomes]
        base = [outcome["cells"][HELD_OUT]["loss"] for outcome in losses[name, "base"]]
        ours_mean, base_mean = _mean(ours), _mean(base)
        ratio, difference = None, []
        if ours_mean is not None and base_mean is not None:
            ratio, difference = ours_mean / base_mean, [a - b for a, b in zip(ours, base, strict=True)]
        rows.append(
            {
                "case": f"{name}: {label}",
                "metric": "held-out loss, nats a token",
                "ours": ours_mean,
                "peer": base_mean,
                "peer_name": f"{name}: base",
                "ratio": ratio,
                "difference": _mean(difference),
                "interval": confidence95(difference),
                "losses": ours,
                "parameters": outcomes[0]["parameters"],
                "seconds": statistics.median(outcome["seconds"] for outcome in outcomes),
            }
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def _described(options: AblationOptions) -> dict[str, Any]:
    return {**asdict(options), "output_dir": str(options.output_dir)}
