"""From the name of a model to the model and its tokenizer. Every way to fail is one line that says what to do."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from resonance_nn.bundled import bundled_models
from resonance_nn.config import ResonanceConfig
from resonance_nn.data.tokenizer import tokenizer_vocab_size
from resonance_nn.models.causal_lm import ResonanceForCausalLM

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of one kind of input, of several
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]

logger = logging.getLogger(__name__)


def resolve_model(name: str) -> str:
    """The folder that ``name`` means: an existing folder, a bundled name, or ``hub:org/name``.

    Only ``hub:`` touches the network. Raises ValueError for anything else, with the closest names there are.
    """
    if name.startswith("hub:"):
        return _download(name.removeprefix("hub:"))
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    bundled = bundled_models()
    if name in bundled:
        return str(bundled[name])
    if path.is_file():
        raise ValueError(f"model {name!r}: is a file; name the folder that holds config.json and model.safetensors")
    siblings = {str(path.parent / p.name) for p in _folders(path.parent)} if path.name else set()
    hint = ""
    if close := difflib.get_close_matches(name, [*sorted(siblings), *bundled], n=3):
        hint = f"; did you mean {' or '.join(close)}?"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        hint = f"; to download it from the Hugging Face hub, write hub:{name}"
    raise ValueError(f"model {name!r}: no such folder or bundled model (bundled: {', '.join(bundled) or 'none'}){hint}")


def load_model(
    name: str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[ResonanceForCausalLM, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer.

    Args:
        name: as :func:`resolve_model` takes it. Of an unfinished training run, the newest complete ``checkpoint-N``.
        dtype: of the weights; None keeps the one they were saved in.
        device: where to put the model; None is the CPU.

    Raises:
        ValueError: one line for whatever is missing, foreign, damaged, or does not fit.
    """
    folder = model_folder(name)
    config = _load_config(folder)
    own = (config.architectures or [ResonanceForCausalLM.__name__])[0]
    if own != ResonanceForCausalLM.__name__:
        raise ValueError(
            f"model {name!r}: is a {own}; this takes a {ResonanceForCausalLM.__name__}, `resonance predict` the others"
        )
    model = _load_weights(folder, config, dtype)
    tokenizer = load_tokenizer(folder)
    size = tokenizer_vocab_size(tokenizer)
    if size > config.vocab_size:
        raise ValueError(
            f"model {str(folder)!r}: its tokenizer has {size} tokens but vocab_size is {config.vocab_size}; "
            "put back the tokenizer it was trained with"
        )
    if device is not None:
        try:
            model.to(device)  # pyright: ignore[reportArgumentType]
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {str(device)!r}: {_first_line(error)}") from error
    return model.eval(), tokenizer


def load_any(name: str, kinds: Mapping[str, type[Any]], *, device: str = "cpu") -> tuple[Any, Path]:
    """A finished model of one of ``kinds``, by the class that its config.json names, in evaluation mode, and its
    folder. Raises ValueError."""
    folder = model_folder(name)
    config = _load_config(folder)
    own = (config.architectures or ["unknown"])[0]
    if own not in kinds:
        raise ValueError(f"model {name!r}: is a {own}; this takes {', '.join(kinds)}")
    model, info = _read_weights(folder, kinds[own], config, None)
    _refuse_misfits(folder, info)
    return model.to(device).eval(), folder


def load_config(name: str) -> ResonanceConfig:
    """That of a model. Raises ValueError."""
    return _load_config(model_folder(name))


def model_folder(name: str) -> Path:
    """The folder of a model, or of the newest checkpoint of an unfinished run. Raises ValueError."""
    return _checkpoint_folder(Path(resolve_model(name)))


def load_processor(folder: Path, kind: type[Any]) -> Any:
    """What makes a model's inputs of pictures, sounds or several modalities, as saved beside it. Raises ValueError."""
    if not any((folder / file).is_file() for file in PROCESSORS):
        raise ValueError(f"model {str(folder)!r}: has no {PROCESSORS[0]}; save its processor beside it")
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of transformers and of the tokenizers library, whatever is wrong with a file
        raise ValueError(f"model {str(folder)!r}: its processor cannot be read ({_first_line(error)})") from error


def load_weights(name: str, architecture: type[Any], config: ResonanceConfig) -> Any:
    """A model to go on training as ``architecture``, in float32: one of its own kind, or what the two have in common,
    such as the backbone of a language model under a new head. Raises ValueError where they have nothing."""
    folder = model_folder(name)
    model, info = _read_weights(folder, architecture, config, torch.float32)
    if lacking := [key for key in sorted(info["missing_keys"]) if "backbone" in key or "embed" in key]:
        raise ValueError(f"model {name!r}: has no {lacking[0]}; go on from a model of the same inputs")
    return model


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The byte-level tokenizer saved in ``folder``, without asking the network or running code of the checkpoint."""
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer {str(folder)!r}: no such folder")
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"model {str(folder)!r}: has no tokenizer.json; save its tokenizer beside it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"model {str(folder)!r}: its tokenizer cannot be read ({_first_line(error)})") from error
    try:
        tokenizer_vocab_size(tokenizer)
    except ValueError as error:
        raise ValueError(f"model {str(folder)!r}: {error}") from error
    return tokenizer


def _checkpoint_folder(folder: Path) -> Path:
    """``folder`` itself, or the newest complete ``checkpoint-N`` of an unfinished run in it."""
    if (folder / "config.json").is_file():
        return folder
    numbered = [(int(m[1]), p) for p in _folders(folder) if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    for _, path in sorted(numbered, reverse=True):
        of_inputs = any((path / file).is_file() for file in ("tokenizer.json", *PROCESSORS))
        if (path / "config.json").is_file() and of_inputs and _has_weights(path):
            logger.warning("%s is an unfinished training run: taking %s", folder, path.name)
            return path
    if numbered:
        raise ValueError(f"model {str(folder)!r}: an unfinished training run without a complete checkpoint; resume it")
    raise ValueError(f"model {str(folder)!r}: has no config.json, so it is not a model")


def _load_config(folder: Path) -> ResonanceConfig:
    file = folder / "config.json"
    try:
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"model {str(folder)!r}: config.json is not a JSON object ({_first_line(error)})") from error
    if model_type != ResonanceConfig.model_type:
        raise ValueError(
            f"model {str(folder)!r}: is a {model_type!r} checkpoint, not a {ResonanceConfig.model_type!r} one; "
            "load it with transformers' AutoModelForCausalLM"
        )
    try:
        return ResonanceConfig.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model {str(folder)!r}: config.json: {_first_line(error)}") from error


def _read_weights(
    folder: Path, architecture: type[Any], config: ResonanceConfig, dtype: torch.dtype | None
) -> tuple[Any, dict[str, Any]]:
    """The model, and what of the weights did not fit, as transformers reports it. Raises ValueError."""
    if not _has_weights(folder):
        raise ValueError(f"model {str(folder)!r}: has no model.safetensors (other formats are not read)")
    try:
        with quiet_transformers():
            return architecture.from_pretrained(
                str(folder),
                config=config,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # the callers say so in one line, or begin a new head
                output_loading_info=True,
            )
    except (SafetensorError, OSError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"model {str(folder)!r}: its weights cannot be read ({_first_line(error)})") from error


def _load_weights(folder: Path, config: ResonanceConfig, dtype: torch.dtype | None) -> ResonanceForCausalLM:
    model, info = _read_weights(folder, ResonanceForCausalLM, config, dtype)
    _refuse_misfits(folder, info)
    return model


def _refuse_misfits(folder: Path, info: dict[str, Any]) -> None:
    for what, names in (
        ("lack", info["missing_keys"]),
        ("have the wrong shape for", {name for name, *_ in info["mismatched_keys"]}),
        ("have the unknown", info["unexpected_keys"]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"model {str(folder)!r}: its weights {what} {min(names)}{more}; config.json and model.safetensors "
                "are not of one model"
            )


def _download(repository: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"model 'hub:{repository}': must be hub:org/name")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repository, allow_patterns=HUB_FILES)
    except Exception as error:  # the network has too many ways to fail to name them
        raise ValueError(f"model 'hub:{repository}': cannot be downloaded ({_first_line(error)})") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bar and its report of weights that do not fit: both are ours to tell."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _has_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in WEIGHTS)


def _folders(path: Path) -> list[Path]:
    try:
        return [p for p in path.iterdir() if p.is_dir()]
    except OSError:
        return []


def _first_line(error: BaseException) -> str:
    """The first line of a message, or the exception's name if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
