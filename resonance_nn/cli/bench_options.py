"""Options that the suites of speed and memory share: our model, its peers, and how to measure."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from resonance_nn.cli.common import config_fields, dtype_of, names

MODELS, TIMING = "Models", "Timing"


def _models(*flags: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    return typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=MODELS, **more)


def _timing(*flags: str, help: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=TIMING)


SizeOption = Annotated[
    str | None, _models("--size", help="Width and depth of ours by name: tiny, small, base, medium, large or xlarge.")
]
HiddenSizeOption = Annotated[int | None, _models("--hidden-size", help="Width of all models.", show_default="512")]
LayersOption = Annotated[int | None, _models("--layers", help="Depth of ours.", show_default="4")]
VocabSizeOption = Annotated[int, _models("--vocab-size", help="Vocabulary of all models.")]
MixersOption = Annotated[
    str | None, _models("--mixers", help="Mixers of ours, separated by commas; default: the package's.")
]
SetOption = Annotated[
    list[str] | None, _models("--set", metavar="FIELD=VALUE", help="Any field of our configuration; repeatable.")
]
PeersOption = Annotated[
    str, _models("--peers", help="Beside ours, by commas: llama, mamba2, mamba, rwkv, gated_delta; or none.")
]
DtypeOption = Annotated[str, _models("--dtype", help="Of the matmuls (autocast): fp32, bf16 or fp16.")]
RepeatsOption = Annotated[int, _timing("--repeats", help="Timed rounds, after one to warm up.")]
FloorOption = Annotated[bool, _timing("--floor/--no-floor", help="Time each model's matmuls alone as well.")]
CompileOption = Annotated[bool, _timing("--compile", help="All models under torch.compile; needs a C++ compiler.")]
AllocatorOption = Annotated[
    str, _timing("--allocator", help="keep: freed memory stays in the process, as in training; default: as it comes.")
]
MaxSecondsOption = Annotated[
    float, _timing("--max-seconds", help="A peer with a slower first step is not timed, nor in larger cases.")
]


def model_options(
    size: str | None,
    hidden_size: int | None,
    layers: int | None,
    vocab_size: int,
    mixers: str | None,
    config: list[str] | None,
    peers: str,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Fields of ``ModelOptions``. Imports torch."""
    from resonance_nn.config import SIZES
    from resonance_nn.evaluation import resolve_device

    given: dict[str, Any] = {"hidden_size": hidden_size, "layers": layers}
    given = {name: value for name, value in given.items() if value is not None}
    if size is not None:
        if given:
            raise ValueError(f"size and {next(iter(given))}: a size is both width and depth; give one")
        if size not in SIZES:
            raise ValueError(f"size = {size!r}: must be one of {', '.join(SIZES)}")
        given = {"hidden_size": SIZES[size]["hidden_size"], "layers": SIZES[size]["num_hidden_layers"]}
    chosen = dtype_of(dtype)
    if chosen is None:
        raise ValueError("dtype = 'auto': must be one of fp32, bf16, fp16")
    return {
        **given,
        "vocab_size": vocab_size,
        "mixers": None if mixers is None else names(mixers),
        "overrides": config_fields(config),
        "peers": names(peers),
        "dtype": chosen,
        "device": resolve_device(device),
    }
