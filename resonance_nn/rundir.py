"""The folder of a training run: what is in it, what may be written to it, and how it stays whole.

`data/` appears by one rename with the run's settings in it, so a folder either holds a run or does not; checkpoints
appear the same way; `train.json` comes last. Whatever is half-written lives in `.partial/`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from resonance_nn.arguments import TrainArguments
from resonance_nn.files import atomic_path

PARTIAL = ".partial"
OWN = re.compile(
    r"data|runs|checkpoint-\d+|train\.json|log\.jsonl|loss\.png|(generation_)?config\.json|model.*\.safetensors.*"
    r"|(tokenizer|special_tokens_map|added_tokens|vocab|merges).*|chat_template\.jinja"
)


@contextmanager
def write_errors(folder: Path, advice: str = "free some space") -> Iterator[None]:
    """What torch, safetensors and tokenizers raise on a full disk, as a ValueError of one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception:
            raise ValueError(f"cannot write to {folder} ({str(error).splitlines()[0]}); {advice}") from error
        raise


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """For people, what differs between the settings that a run was begun with and others; empty if nothing does. The
    old ones must have the defaults of what the run was begun before."""
    old, new = (json.loads(json.dumps(dict(settings))) for settings in (old, new))
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in changed)


class RunFolder:
    """See the module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"
        self.partial = path / PARTIAL

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [p for p in self.path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))

    def last_checkpoint(self) -> Path | None:
        return next(reversed(self.checkpoints()), None)

    def is_finished(self) -> bool:
        return (self.path / "train.json").is_file()

    def result(self) -> dict[str, Any]:
        """What a finished run wrote."""
        return json.loads((self.path / "train.json").read_text(encoding="utf-8"))

    def check(self, resume: bool, overwrite: bool, run: dict[str, Any]) -> None:
        """Refuse, by ValueError, a folder that cannot be used as asked, or a resumption with other settings."""
        for path in (self.path, *self.path.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"output_dir = {str(self.path)!r}: {str(path)!r} is a file; name a folder")
        if (self.data / "run.json").is_file():
            if resume:
                self._check_settings(run)
            elif not overwrite:
                state = "finished" if self.is_finished() else "unfinished"
                raise ValueError(
                    f"output_dir = {str(self.path)!r}: already holds {'a' if state == 'finished' else 'an'} {state} "
                    "run; --resume goes on with it, --overwrite deletes it"
                )
        elif resume:
            raise ValueError(f"output_dir = {str(self.path)!r}: holds no run to resume; leave out --resume to start")
        elif taken := [p.name for p in self._own_files()]:
            raise ValueError(
                f"output_dir = {str(self.path)!r}: has a {min(taken)!r} that is not of a training run; choose another"
            )

    def _check_settings(self, run: dict[str, Any]) -> None:
        defaults, new = vars(TrainArguments(data=(), output_dir="")), run["settings"]
        old = {**{name: value for name, value in defaults.items() if name in new}, **self.run()["settings"]}
        if changed := changed_settings(old, new):
            raise ValueError(f"resume: {changed}: give the arguments the run began with, or --overwrite to start anew")

    def run(self) -> dict[str, Any]:
        """What the run was begun with."""
        try:
            return json.loads((self.data / "run.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.data / 'run.json'}: damaged ({error}); --overwrite to start anew") from error

    @contextmanager
    def preparing(self) -> Iterator[Path]:
        """An empty folder to prepare in. If anything fails, all that was made is removed."""
        made = next((p for p in reversed([self.path, *self.path.parents]) if not p.exists()), None)
        shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True)
            yield self.partial
        except BaseException:
            shutil.rmtree(made or self.partial, ignore_errors=True)
            raise

    def begin(self, run: dict[str, Any]) -> None:
        """Turn what was prepared into a run; an old one goes."""
        (self.partial / "data" / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        for old in self._own_files():
            os.rename(old, self.partial / f"old-{old.name}")
        os.rename(self.partial / "data", self.data)
        shutil.rmtree(self.partial)

    @contextmanager
    def finishing(self, result: dict[str, Any]) -> Iterator[Path]:
        """A folder for the last files; they move to the run's folder when all are there, then train.json is written."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        try:
            yield self.partial
            for file in sorted(self.partial.iterdir(), key=lambda p: p.name == "config.json"):  # it makes it a model
                os.replace(file, self.path / file.name)
            with atomic_path(self.path / "train.json") as temporary:
                temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _own_files(self) -> list[Path]:
        """train.json first, data last: an interrupted deletion leaves an unfinished run or none."""
        if not self.path.is_dir():
            return []
        own = [p for p in self.path.iterdir() if OWN.fullmatch(p.name)]
        return sorted(own, key=lambda p: (p.name == "data") - (p.name == "train.json"))
