"""Checkpoints that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT_MODEL = "resonance-tiny"  # of `resonance generate` and `resonance chat`


def bundled_models() -> dict[str, Path]:
    """The folder of each."""
    if not CHECKPOINTS.is_dir():
        return {}
    return {path.name: path for path in sorted(CHECKPOINTS.iterdir()) if (path / "config.json").is_file()}
