"""Where our methods stand beside others' at the same bytes: the table and the plot, from what `minikv eval --json` or
`minikv study pareto` wrote.

    python benchmarks/pareto.py benchmarks/results/accuracy.json [--plot pareto.png]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from minikv_compile.results import beside, beside_table, draw_pareto, read_cells
from minikv_compile.studies import is_other


def main(
    figures: Path,
    plot: Path | None = None,
    low: Annotated[float, typer.Option(help="The smallest share of the dense bytes.")] = 0.06,
    high: Annotated[float, typer.Option(help="The largest.")] = 0.35,
) -> None:
    cells = read_cells(json.loads(figures.read_text()))
    rows = list(beside(cells, is_other, low, high))
    console = Console()
    console.print(beside_table(rows))
    behind = [row for row in rows if row[-1].startswith("-")]
    smaller = sum(not row[-1] for row in rows)
    console.print(f"Of {len(rows)} rows, ours is behind in {len(behind)}, and has nothing so small in {smaller}.")
    if plot is not None:
        draw_pareto(cells, plot)


if __name__ == "__main__":
    typer.run(main)
