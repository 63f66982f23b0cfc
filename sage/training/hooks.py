"""Extra metrics: what a run measures besides its own loss."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sage.util import ranks
from sage.util.files import write_text

if TYPE_CHECKING:
    from sage.training.run import Run
    from sage.training.selection import Choice


@dataclass
class Hook:
    """Measures something in a run. Subclass it and override what you need. Its fields are its options.

    Name the class by `hooks.NAME._target_` in the config. Every rank calls every method, in the same order,
    so a method may use collectives. It must return the same numbers on every rank. It must not disturb
    training: no gradients left behind, and no draws from torch's global generator. Files belong in
    `run.run_dir`, and only rank 0 (`sage.util.ranks`) writes them. A checkpoint does not hold a hook's own
    fields: what must survive a resume belongs in a file.
    """

    def before_step(self, run: Run, choice: Choice) -> dict[str, float]:
        """Metrics of the pairs that the step is about to train on, logged under this step's number."""
        return {}

    def evaluate(self, run: Run) -> dict[str, float]:
        """Metrics of the policy: before the first step, every `eval_every` steps, and at the end."""
        return {}

    def write_table(
        self, run: Run, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]
    ) -> None:
        """Write RUN_DIR/report/NAME.csv, which `sage report` shows. It replaces the last one of this name."""
        if ranks.rank() == 0:
            text = io.StringIO()
            csv.writer(text).writerows([header, *rows])
            write_text(run.run_dir / "report" / f"{name}.csv", text.getvalue())
