"""Every Python block of every page runs, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_exist(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:tests|resonance_nn|examples)/[\w/.]+\.py)`", text):
        assert (ROOT / name).exists(), name


def test_every_mixer_has_a_page():
    from resonance_nn.mixers import MIXERS

    pages = " ".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "mixers")
    assert not [name for name in MIXERS if f"`{name}`" not in pages]
