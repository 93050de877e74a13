"""`resonance models`: what the sizes are, counted from the models themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from resonance_nn.cli.common import JsonOption, check_output, console_for, write_json

if TYPE_CHECKING:
    from resonance_nn.mixers import Mixer

CONTEXTS = {"1k": 1024, "1m": 1 << 20}


def models(
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Tokens of the vocabulary.")] = 32_768,
    recipe: Annotated[str, typer.Option("--recipe", help="default, spectral, hybrid or memory.")] = "default",
    mixers: Annotated[
        str | None, typer.Option("--mixers", help="Mixers, separated by commas, tiled over the layers.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """List the sizes: parameters, weights in bf16, state of one sequence after 1K and 1M tokens."""
    check_output(json_path, "--json")
    from rich.table import Table

    from resonance_nn.config import SIZES
    from resonance_nn.machine import machine_info, versions

    overrides: dict[str, Any] = {"vocab_size": vocab_size, "recipe": recipe}
    if mixers is not None:
        overrides["mixers"] = tuple(name.strip() for name in mixers.split(","))
    rows = [describe_size(name, overrides) for name in SIZES]
    table = Table("size", title=f"mixers: {', '.join(rows[0]['mixers'])}; vocabulary: {vocab_size:,}")
    for heading in ("width", "depth", "heads", "params", "no embed.", "bf16", "state 1K", "state 1M"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["size"],
            *(str(row[key]) for key in ("hidden_size", "num_hidden_layers", "num_heads")),
            *(human(row[key]) for key in ("parameters", "parameters_without_embedding")),
            *(human(row[key]) + "B" for key in ("weight_bytes_bf16", *(f"state_bytes_{c}" for c in CONTEXTS))),
        )
    console_for(json_path).print(table)
    if json_path is not None:
        write_json(json_path, {"suite": "models", "machine": machine_info(), "versions": versions(), "rows": rows})


def describe_size(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """One size, built on the meta device: no memory is taken, and the counts are those of the real model."""
    import torch

    from resonance_nn.config import ResonanceConfig
    from resonance_nn.models import ResonanceForCausalLM

    config = ResonanceConfig.from_size(name, **overrides)
    with torch.device("meta"):
        model = ResonanceForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    maps = ("embed.weight", "lm_head.weight")  # one and the same if tied
    embedding = sum(p.numel() for name, p in model.named_parameters() if name.endswith(maps))
    mixers: list[Mixer] = [block.mixer for block in cast("Any", model.model.backbone).blocks]
    kinds = dict(zip(config.layer_mixers, mixers, strict=True))  # layers of a name have equal states
    state = {  # where the size is constant, counting it at one token spares 2²⁰ of them
        key: sum(
            config.layer_mixers.count(name) * mixer.state_bytes(1 if mixer.constant_state else context)
            for name, mixer in kinds.items()
        )
        for key, context in CONTEXTS.items()
    }
    return {
        "size": name,
        "mixers": list(config.mixers),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_heads": config.num_heads,
        "parameters": parameters,
        "parameters_without_embedding": parameters - embedding,
        "weight_bytes_bf16": 2 * parameters,
        **{f"state_bytes_{key}": value for key, value in state.items()},
    }


def human(number: float) -> str:
    """Three digits and a decimal prefix: 13.6M."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}T"
