"""Tables as CSV, Markdown and LaTeX, from rows of texts and numbers."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

from sage.reporting.groups import Interval
from sage.util.files import write_whole


class Table(NamedTuple):
    """Rows under a header; a cell is a text, a number or an Interval."""

    name: str  # of its CSV file
    title: str
    header: list[str]
    rows: list[list[str | float | int | Interval | None]]

    @property
    def cells(self) -> list[list[str]]:
        return [[show(cell) for cell in row] for row in self.rows]


def show(cell: str | float | int | Interval | None) -> str:
    """A cell as a person reads it: four significant digits, "-" for what is not known."""
    if cell is None:
        return "-"
    if isinstance(cell, Interval):
        if not math.isfinite(cell.mean):
            return "-"
        if not math.isfinite(cell.low):
            return number(cell.mean)
        return f"{number(cell.mean)} ± {number(cell.high - cell.mean)}"
    return cell if isinstance(cell, str) else number(cell)


def number(value: float | int) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.3g}"


def markdown(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def latex(table: Table) -> str:
    """A booktabs table."""

    def escape(text: str) -> str:
        text = text.replace("\\", r"\textbackslash ").replace("±", r"$\pm$")
        return "".join("\\" + c if c in "&%#_{}" else c for c in text)

    body = [" & ".join(map(escape, line)) + r" \\" for line in table.cells]
    return "\n".join(
        [
            r"\begin{tabular}{l" + "r" * (len(table.header) - 1) + "}",
            r"\toprule",
            " & ".join(map(escape, table.header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def read_csv(file: Path) -> Table:
    """A table that a hook wrote. Its cells stay the texts that they are."""
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        header, *rows = list(csv.reader(lines)) or [[]]
    return Table(file.stem, file.stem, header, [[*row] for row in rows])


def write_csv(table: Table, folder: Path) -> Path:
    """Full precision; an interval takes four columns."""
    wide = [any(isinstance(row[i], Interval) for row in table.rows) for i in range(len(table.header))]
    header: list[str] = []
    for name, is_wide in zip(table.header, wide, strict=True):
        header += [name, f"{name} low", f"{name} high", f"{name} n"] if is_wide else [name]

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(header)
            for row in table.rows:
                line: list[object] = []
                for cell, is_wide in zip(row, wide, strict=True):
                    if isinstance(cell, Interval):
                        line += list(cell)
                    else:
                        line += [cell, *[""] * 3] if is_wide else [cell]
                writer.writerow(line)

    file = folder / f"{table.name}.csv"
    write_whole(file, write)
    return file
