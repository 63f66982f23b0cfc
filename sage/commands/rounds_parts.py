"""The parts of `sage rounds`: each is the run folder of another command, and ends with its last file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sage import config
from sage.answering.problems import COLUMNS
from sage.commands.rounds_results import TIMES_FILE, folder_of
from sage.config import ModelConfig, ProblemsConfig, RoundsConfig, RunConfig
from sage.config.data import ProblemColumns
from sage.util.files import write_text
from sage.util.locks import alive
from sage.util.progress import console

PROBLEMS_FILE = "problems.jsonl"

C = TypeVar("C", bound=RunConfig)


@dataclass
class Parts:
    """Does the parts of the rounds in `run_dir`, or goes on with them.

    `start` runs the command whose frozen config is in a folder, in a number of ranks, and waits for it.
    """

    cfg: RoundsConfig
    run_dir: Path
    start: Callable[[int, Path], None]

    def folder(self, number: int) -> Path:
        return folder_of(self.run_dir, number)

    def asked(self, number: int) -> ProblemsConfig:
        """The problems of a round, which may each say how many responses they get."""
        columns = ProblemColumns(**{name: name for name in COLUMNS})
        path, prompt = str(self.folder(number) / PROBLEMS_FILE), self.cfg.data.problems.prompt
        return ProblemsConfig(path=path, columns=columns, prompt=prompt)

    def command(self, schema: type[C], command: str, **changes: Any) -> C:
        """The config of a part: the keys that it shares with the rounds, and changes."""
        shared = {f.name: getattr(self.cfg, f.name) for f in fields(schema) if hasattr(self.cfg, f.name)}
        return schema(**{**shared, "command": command, "resume": "never", **changes})

    def merged(self, policy: ModelConfig) -> ModelConfig:
        """A policy to ask: the export of a round has its adapter merged."""
        return policy if policy is self.cfg.model else replace(policy, lora=None)

    def do(self, cfg: RunConfig, folder: Path, last: Path) -> None:
        """Do a part, or go on with it, unless its last file is there."""
        if last.exists():
            return
        if alive(folder):
            console.print(
                f"{folder}: waiting for the end of its ranks, whose launcher was killed", markup=False
            )
            while alive(folder):
                time.sleep(1)
        config.keep_budget(cfg, folder)
        config.write(cfg, folder)
        name = folder.relative_to(self.run_dir)
        console.print(f"{name}: `sage {cfg.command}`", markup=False)
        with self.timed(str(name)):
            self.start(cfg.world_size, folder)
        assert last.exists(), last

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Note how long a part ran, also if it fails."""
        began, file = time.monotonic(), self.run_dir / TIMES_FILE

        def note() -> None:  # written whole: a kill must not leave half a line
            before = file.read_text(encoding="utf-8") if file.exists() else ""
            write_text(file, before + json.dumps({"part": part, "seconds": time.monotonic() - began}) + "\n")

        try:
            yield
        except BaseException:
            with suppress(OSError):  # the disk may be full, and the part has said so
                note()
            raise
        note()
