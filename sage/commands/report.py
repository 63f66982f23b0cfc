"""`sage report RUN...`: what runs did, on the terminal, as one HTML page and as CSV."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pyarrow.csv import write_csv
from rich.table import Table as RichTable

from sage.reporting import compare, page, tables
from sage.reporting.groups import differing, group, label
from sage.reporting.rounds import RoundsRun
from sage.reporting.runs import Rounds, find
from sage.util.errors import UserError
from sage.util.files import write_text, write_whole
from sage.util.progress import console

PAGE, FOLDER = "report.html", "report_tables"
LONGEST = 20  # rows of a table on the terminal


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="sage report",
        description="Summarise training runs, sweeps, rounds and evaluations. Runs that differ only in their "
        "seed are averaged.",
        epilog="Writes report.html, which opens without network, and report_tables/*.csv.",
    )
    found.add_argument("paths", nargs="+", metavar="RUN", help="a run directory, or a folder that holds some")
    found.add_argument("--output", type=Path, metavar="DIR", help="where to write; default: the first RUN")
    found.add_argument("--metric", help="compare settings by this metric, e.g. benchmark/gsm8k/accuracy")
    found.add_argument(
        "--target",
        type=float,
        help="say when each setting reaches this value; default: the first setting's best",
    )
    found.add_argument("--watch", action="store_true", help="write the page again while a run goes on")
    found.add_argument("--every", type=float, default=10, metavar="SECONDS", help="between two writes; 10")
    return found


def report(words: list[str]) -> None:
    """The command line after `sage report`."""
    args = parser().parse_args(words)
    output = args.output or Path(args.paths[0]).expanduser()
    if args.every <= 0:
        raise UserError(f"--every {args.every}: must be above 0")
    while True:
        runs, evaluations, folders, others = find(args.paths)
        rounds = read_all(folders)
        known = {name for run in runs for name in run.metrics}
        if args.metric and args.metric not in known:
            raise UserError(
                f"--metric {args.metric}: no run logged it; there are: {', '.join(sorted(known))}"
            )
        html, found, notes = page.report(runs, evaluations, rounds, args.metric, args.target)
        write_text(output / PAGE, html)
        for table in found:
            tables.write_csv(table, output / FOLDER)
        if runs:
            points = compare.every_point(group(runs))
            write_whole(output / FOLDER / "metrics.csv", partial(write_csv, points))
        if not args.watch or not any(run.status == "running" for run in (*runs, *rounds)):
            break
        steps = ", ".join(f"{run.path.name}: step {run.steps}" for run in runs if run.status == "running")
        console.print(f"{output / PAGE}: written again ({steps})")
        time.sleep(args.every)
    for table in found:
        if len(table.rows) <= LONGEST:
            show(table)
        else:
            console.print(f"{table.title}: {len(table.rows)} rows, on the page")
    for note in notes:
        console.print(f"note: {note}")
    for name in others:
        console.print(f"note: {name} holds no training run, no rounds and no finished evaluation")
    console.print(f"page: {output / PAGE}\ntables: {output / FOLDER}")


def read_all(folders: Sequence[Rounds]) -> list[RoundsRun]:
    """What rounds did so far. Several are named by their folders below the one that holds all, and by the
    settings in which they differ."""
    if not folders:
        return []
    from sage.commands.rounds_results import read_rounds  # here, because it loads torch and transformers

    if len(folders) == 1:
        return [read_rounds(folders[0].path, folders[0].name)]
    common, keys = Path(os.path.commonpath([f.path.absolute() for f in folders])), differing(folders)
    found = []
    for f in folders:
        setting = f" ({label(f, keys, folders)})" if keys else ""
        found.append(read_rounds(f.path, f"{f.path.absolute().relative_to(common)}{setting}"))
    return found


def show(table: tables.Table) -> None:
    """Print a table; one that is too wide for the terminal is turned, so that its rows become columns."""
    lines = [table.header, *table.cells]
    if width(lines) > console.width:
        turned = [list(column) for column in zip(*lines, strict=True)]
        lines = turned if width(turned) <= console.width else lines
    shown = RichTable(*lines[0], title=table.title, title_justify="left")
    for line in lines[1:]:
        shown.add_row(*line)
    console.print(shown)


def width(lines: list[list[str]]) -> int:
    """Characters that a table takes where no cell is broken."""
    return sum(max(map(len, column)) + 3 for column in zip(*lines, strict=True)) + 1
