"""What the README shows runs, and what it says of it is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code: str):
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert torch.isfinite(names["loss"])
    assert names["text"].shape == (1, names["ids"].shape[1] + 8)
    cache = names["model"](names["ids"]).past_key_values
    assert f"{cache.num_bytes() // 1024} KB" in code


def test_the_tree_names_what_is_there():
    tree = README.split("## The package")[1].split("```")[1]
    for name in re.findall(r"(?<![\w.])(\w+(?:\.py|/))", tree):
        path = ROOT / "resonance_nn" / name if name != "resonance_nn/" else ROOT / name
        assert path.exists(), name


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b(?!`)|TODO|…", README)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
