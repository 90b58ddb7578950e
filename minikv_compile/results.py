"""What an evaluation found: cells, their confidence intervals, tables and the plot of accuracy over bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Cell:
    """One method on one task at one length, with the question in one place."""

    method: str
    place: str
    """Where the question is: "inside" the compressed prompt, or "after" it."""
    task: str
    length: int
    """Of prompt and question, in tokens."""
    prompts: int
    metric: str
    score: float
    """Mean over the prompts, in [0, 1]."""
    cache_bytes: float
    """Held by the cache at the end, per prompt, counted from its storages."""
    share_of_dense_bytes: float
    seconds: float
    """For all prompts, compilation included."""
    bits_per_byte: float | None = None
    kl: float | None = None
    """KL(full || method) of the next token, in nats."""

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.score, self.prompts)

    def figures(self) -> dict[str, Any]:
        """What `--json` writes."""
        figures = {name: value for name, value in asdict(self).items() if value is not None}
        return figures | {"interval_95": list(self.interval)}


@dataclass(frozen=True)
class Failure:
    """A method that could not run."""

    method: str
    reason: str

    def figures(self) -> dict[str, Any]:
        """What `--json` writes."""
        return asdict(self)


def wilson(mean: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) for a mean of n values in [0, 1].

    Exact matches are binomial. Other scores in [0, 1] have at most the binomial's variance, so that their interval is
    rather too wide.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, spread = mean + z * z / (2 * n), z * (mean * (1 - mean) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))  # rounding may leave the mean outside


def tables(cells: list[Cell]) -> list[Table]:
    """A table for each length with a column for each method: the score with its 95% interval (of text: the KL
    divergence and the bits per byte), and the cache's bytes per prompt."""
    lengths = sorted({cell.length for cell in cells})
    return [_table(length, [cell for cell in cells if cell.length == length]) for length in lengths]


def _table(length: int, cells: list[Cell]) -> Table:
    table = Table(title=f"Up to {length:,} tokens, {_counts(cells)} prompts per task", show_lines=True)
    methods = list(dict.fromkeys(cell.method for cell in cells))
    for name in ("task", "question"):
        table.add_column(name)
    for name in methods:
        table.add_column(name, justify="right", overflow="fold")
    by_key = {(cell.task, cell.place, cell.method): cell for cell in cells}
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    rows = dict.fromkeys((cell.task, cell.place) for cell in cells)
    for task, place in sorted(rows, key=lambda row: tasks.index(row[0])):
        row = (by_key.get((task, place, method)) for method in methods)
        metric = next(cell.metric for cell in cells if cell.task == task)
        table.add_row(f"{task}\n({metric})", place, *(_described(cell) if cell else "" for cell in row))
    return table


def _described(cell: Cell) -> str:
    held = f"{cell.cache_bytes / 1e6:.2f} MB, {cell.share_of_dense_bytes:.1%}"
    if cell.bits_per_byte is not None:
        return f"{cell.score:.1%}\nKL {cell.kl:.4f}\nbpb {cell.bits_per_byte:.4f}\n{held}"
    low, high = cell.interval
    return f"{cell.score:.1%} ({100 * low:.0f}-{100 * high:.0f})\n{held}"


def _counts(cells: list[Cell]) -> str:
    return " or ".join(map(str, sorted({cell.prompts for cell in cells})))


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bytes, score) that no other one beats in both, by bytes."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def read_cells(figures: dict[str, Any]) -> list[Cell]:
    """The cells of what `--json` wrote."""
    names = {field.name for field in fields(Cell)}
    return [Cell(**{name: value for name, value in cell.items() if name in names}) for cell in figures["cells"]]


def beside(
    cells: list[Cell], is_other: Callable[[str], bool], low: float = 0.06, high: float = 0.35
) -> Iterator[tuple[str, ...]]:
    """Each method of others that takes between `low` and `high` of the dense bytes, beside the best of ours that takes no
    more bytes than it.

    Yields:
        tokens, place of the question ("text" for bits per byte), the other's method, its bytes in percent, its mean over
        the tasks (percent of scores, or bits per byte), ours with the same three, and how far ours is ahead (negative:
        behind). Only tasks that both were asked count.
    """
    panels = sorted({(c.length, c.place, c.bits_per_byte is None) for c in cells})
    for length, place, scored in panels:
        mine = [c for c in cells if (c.length, c.place, c.bits_per_byte is None) == (length, place, scored)]
        for row in _beside(mine, scored, is_other, low, high):
            yield (f"{length:,}", place if scored else "text", *row)


def _beside(
    cells: list[Cell], scored: bool, is_other: Callable[[str], bool], low: float, high: float
) -> Iterator[tuple[str, ...]]:
    """`beside` for one length and place, without these."""
    tasks: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        tasks.setdefault(cell.method, {})[cell.task] = cell
    share = {method: fmean(c.share_of_dense_bytes for c in by_task.values()) for method, by_task in tasks.items()}

    def worth(method: str, among: Iterable[str]) -> float:
        """More is better."""
        return fmean(100 * c.score if scored else -c.bits_per_byte for c in (tasks[method][task] for task in among))

    def shown(value: float, sign: str = "") -> str:
        return f"{value:{sign}.{1 if scored else 3}f}"

    for other in sorted((m for m in tasks if is_other(m) and low <= share[m] <= high), key=share.__getitem__):
        asked = tasks[other].keys()
        theirs = worth(other, asked)
        row = other, f"{share[other]:.1%}", shown(abs(theirs))
        ours = {
            m: worth(m, asked) for m in tasks if not is_other(m) and share[m] <= share[other] and tasks[m].keys() >= asked
        }
        if ours:
            best = max(ours, key=ours.__getitem__)
            yield (*row, best, f"{share[best]:.1%}", shown(abs(ours[best])), shown(ours[best] - theirs, "+"))
        else:
            yield (*row, "none so small", "", "", "")


BESIDE = ("tokens", "question", "other", "bytes", "score", "ours", "bytes", "score", "ours ahead by")
"""What `beside` yields."""


def beside_table(rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title="Others, and the best of ours at no more bytes (text: bits per byte)", show_lines=False)
    for name in BESIDE:
        table.add_column(name, justify="left" if name in ("question", "other", "ours") else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def draw_pareto(cells: list[Cell], path: Path) -> None:
    """Score over bytes: a panel for each length, a colour for each method, a mark for each place, and the frontier of
    each place. Scores are means over the tasks; a second row shows bits per byte, where measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows = [[c for c in cells if (c.bits_per_byte is None) == scored] for scored in (True, False)]
    rows = [row for row in rows if row]
    lengths = sorted({cell.length for cell in cells})
    methods = list(dict.fromkeys(cell.method for cell in cells))
    size = 4 + 5.5 * len(lengths), max(4.2 * len(rows), 1 + 0.19 * len(methods))
    figure, axes = plt.subplots(
        len(rows), len(lengths), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for panels, row in zip(axes, rows, strict=True):
        for panel, length in zip(panels, lengths, strict=True):
            _draw_panel(panel, [cell for cell in row if cell.length == length], methods)
            panel.set_title(f"{length:,} tokens", loc="left", fontsize=10)
    about = [Line2D([], [], ls="", marker="s", color=_colour(i), label=method) for i, method in enumerate(methods)]
    about += [Line2D([], [], ls=ls, marker=mark, color="grey", label=f"question {place}") for place, mark, ls in PLACES]
    figure.legend(handles=about, loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


PLACES = ("inside", "o", "-"), ("after", "^", "--")
"""Of the question, with its mark and the line of its frontier."""


def _colour(number: int) -> tuple[float, ...]:
    """Neighbours differ in hue: the strong half of the twenty first."""
    import matplotlib

    return matplotlib.colormaps["tab20"](2 * number % 20 + number // 10 % 2)


def _draw_panel(panel: Any, cells: list[Cell], methods: list[str]) -> None:
    if not cells:
        panel.set_axis_off()
        return
    for place, mark, line in PLACES:
        points = []
        for number, method in enumerate(methods):
            mine = [cell for cell in cells if (cell.method, cell.place) == (method, place)]
            if not mine:
                continue
            x, y, below, above = _mean(mine)
            points.append((x, y))
            panel.errorbar(x, y, [[below], [above]], fmt=mark, color=_colour(number), capsize=3)
        sign = 1 if _is_score(cells) else -1  # fewer bits are better
        front = pareto((x, sign * y) for x, y in points)
        xs, ys = [x for x, _ in front], [sign * y for _, y in front]
        panel.plot(xs, ys, line, color="grey", lw=1, drawstyle="steps-post")
    panel.set_ylabel("score, mean over tasks, %" if _is_score(cells) else "bits per byte")
    panel.set_xlabel("bytes, % of the dense cache")
    panel.set_xscale("log")
    panel.set_xticks(ticks := [5, 10, 20, 35, 50, 100], [str(tick) for tick in ticks], minor=False)
    panel.set_xticks([], minor=True)
    panel.grid(alpha=0.3)


def _is_score(cells: list[Cell]) -> bool:
    return all(cell.bits_per_byte is None for cell in cells)


def _mean(cells: list[Cell]) -> tuple[float, float, float, float]:
    """Percent of dense bytes, the score in percent or the bits, and how far the score's interval goes down and up."""
    x = 100 * fmean(cell.share_of_dense_bytes for cell in cells)
    if not _is_score(cells):
        return x, fmean(cell.bits_per_byte for cell in cells), 0, 0
    y = fmean(cell.score for cell in cells)
    low, high = wilson(y, sum(cell.prompts for cell in cells))
    return x, 100 * y, 100 * (y - low), 100 * (high - y)
