"""Write the tables of docs/speed.md, and README's summary of them, from the committed results, between their two markers:
python benchmarks/readme.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, SPEED = ROOT / "README.md", ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- by benchmarks/readme.py: -->\n", "<!-- end -->\n"
FILES = (
    *("one_row.json", "end_to_end.json", "prompts.json", "prompts_window.json", "short.json", "dynamic.json"),
    *("peers.json", "peers_8k.json", "peers_small_8k.json"),
)
OURS = ("default", "minikv")
SUMMARY = (
    ("short.json", (1, 1024), OURS),
    ("peers_8k.json", (1, 8192), (*OURS, "default@dynamic", "quanto", "kvpress-snapkv:ratio=0.85", "transformers")),
    ("peers_small_8k.json", (1, 8192), ("small", "static")),
    ("peers.json", (1, 32768), (*OURS, "quanto", "kvpress-snapkv:ratio=0.85", "kvpress-pyramidkv:ratio=0.85")),
    ("one_row.json", (1, 131072), OURS), ("end_to_end.json", (16, 32768), OURS),
)  # fmt: skip
"""File, batch and prompt, and methods of README's summary."""
CAPACITIES = ("capacity.json", "capacity_prompt.json", "capacity_minikv.json")
DENSE = "dense"


def tokens(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def note(found: dict[str, Any]) -> list[str]:
    """What a file says of its run."""
    return ["", f"({found['note']})"] if "note" in found else []


def table(file: str, found: dict[str, Any]) -> str:
    """A row per case and method of one file of `minikv bench`, against the dense decoder of the same case."""
    lines = [
        f"{found['shape']}, {found['layers']} layers, {found['device']}, torch {found['versions']['torch']}, "
        f"{found['date']} (`benchmarks/results/{file}`;\n`{found['command']}`):",
        *note(found), "",
        "| case | method | ms per token | of its roofline | host, ms | times faster | first token, times dense | memory in decode, "
        "of dense | cache, of dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = found["results"]
    for row in rows:
        case = f"{row['batch']}×{tokens(row['prompt'])}"
        if "failed" in row:
            lines.append(f"| {case} | `{row['method']}` | {row['failed']} | | | | | | |")
            continue
        same = (r for r in rows if r["method"] == DENSE and "failed" not in r)
        dense = next((r for r in same if (r["batch"], r["prompt"]) == (row["batch"], row["prompt"])), None)
        # Of a cache with room for longer prompts it is an estimate, and older files count all of its bytes.
        roofline = row["roofline"] if row["prompt"] == row["capacity"] else None
        cells = [f"{row['per_token']:.2f}", *(f"{x:.2f}" if x else "" for x in (roofline, row["host"]))]
        if dense:
            faster = dense["per_token"] / row["per_token"]
            cells += [f"{faster:.2f}" if faster > 0.01 else f"{faster:.3f}", f"{row['first_token'] / dense['first_token']:.2f}"]
            cells += [f"{row[name] / dense[name]:.1%}" if dense[name] else "" for name in ("decode_peak", "cache_bytes")]
        lines.append(f"| {case} | `{row['method']}` | {' | '.join(cells + [''] * (7 - len(cells)))} |")
    return "\n".join(lines) + "\n"


def capacity_table(file: str, found: dict[str, Any]) -> str:
    """What fitted, of a file of `minikv capacity`."""
    lines = [
        f"What fitted (`benchmarks/results/{file}`;\n`{found['command']}`):", "",
        "| | method | planned | fitted | did not fit | most memory, of the plan |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found["results"]:
        what = f"rows of {tokens(row['prompt'])}" if row["what"] == "batch" else "tokens, one row"
        share = f"{row['peak_bytes'] / row['planned_bytes']:.1%}" if row["planned_bytes"] else row["failed"]
        lines.append(
            f"| {what} | `{row['method']}` | {row['planned']:,} | {row['fits']:,} | {row['too_many']:,} | {share} |"
            if row["too_many"] else
            f"| {what} | `{row['method']}` | {row['planned']:,} | {row['fits']:,} | | {share} |"
        )  # fmt: skip
    return "\n".join(lines + note(found)) + "\n"


def long_table(file: str, found: dict[str, Any]) -> str:
    """A row per method, over its checkpoints, of a file of `minikv long`."""
    lines = [
        f"Long runs, {found['layers'] or 'all'} layers (`benchmarks/results/{file}`;\n`{found['command']}`):", "",
        "| method | rows | tokens of each | ms per token | most allocated beyond the cache's growth | graphs compiled since |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in found["results"]):
        rows = [row for row in found["results"] if row["method"] == method]
        last, times = rows[-1], [row["per_token"] for row in rows if row["tokens"]] or [0.0]
        lines.append(
            f"| `{method}` | {last['batch']} | {last['tokens']:,} | {min(times):.2f} to {max(times):.2f} "
            f"| {max(row['beyond_cache'] for row in rows) / 2**20:.1f} MiB of {last['allocated'] / 2**20:,.0f} "
            f"| {last['graphs']} |"
        )
    return "\n".join(lines + note(found)) + "\n"


def cpu_table(found: dict[str, Any]) -> str:
    """One layer's attention on a CPU, of the file of `benchmarks/cpu.py`."""
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    lines = [
        f"On a CPU: attention of one token of one row over {tokens(found['results'][0]['tokens'])} tokens, of one of "
        f"{found['layers']} layers in a step, head dimension {found['head_dim']},\n"
        f"{threads} of a shared machine with {found['vectors']}, torch "
        f"{found['versions']['torch']}, {found['date']}, all compiled by Inductor\n(`benchmarks/results/cpu.json`; "
        f"`{found['command']}`).\n`sdpa-grouped` makes the queries of a KV head one matrix:", "",
        "| query / KV heads | dtype | method | ms | of the faster SDPA's time | cache, of dense |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    dense = {(row["kv_heads"], row["dtype"]): row["cache_bytes"] for row in found["results"] if row["method"] == "sdpa"}
    for row in found["results"]:
        share = row["cache_bytes"] / dense[row["kv_heads"], row["dtype"]]
        lines.append(
            f"| {row['heads']} / {row['kv_heads']} | {row['dtype']} | `{row['method']}` | {row['per_token']:.2f} "
            f"| {row['of_dense']:.2f} | {share:.1%} |"
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def read(file: str, results: Path) -> dict[str, Any] | None:
    return json.loads((results / file).read_text()) if (results / file).exists() else None


def summary(results: Path = RESULTS) -> str:
    """What stands between README's markers: the rows of SUMMARY, what fitted, and the commands."""
    lines = [
        "| case | method | ms per token | of dense's speed | first token, times dense | cache, of dense | file |",
        "|---|---|---|---|---|---|---|",
    ]
    commands = {}
    for file, case, methods in SUMMARY:
        found = read(file, results)
        if found is None:
            continue
        commands[file] = found["command"]
        rows = {row["method"]: row for row in found["results"] if (row["batch"], row["prompt"]) == case}
        dense = rows[DENSE]
        lines += [
            f"| {case[0]}×{tokens(case[1])} | `{method}` | {row['per_token']:.2f} | {dense['per_token'] / row['per_token']:.2f} "
            f"| {row['first_token'] / dense['first_token']:.2f} | {row['cache_bytes'] / dense['cache_bytes']:.1%} | {file[:-5]} |"
            for method, row in ((method, rows[method]) for method in methods)
        ]  # fmt: skip
    fitted: dict[str, list[str]] = {}
    for file, found in ((file, read(file, results)) for file in CAPACITIES):
        for row in found["results"] if found else ():
            if row["fits"]:
                what = f"rows of {tokens(row['prompt'])}" if row["what"] == "batch" else "tokens of one row"
                fitted.setdefault(what, []).append(f"`{row['method']}` {row['fits']:,}")
                commands[file] = found["command"]
    lines += ["", *(f"In 24 GB of the GPU fitted, {what}: {', '.join(rows)}." for what, rows in fitted.items())]
    shown = [command if file in command else f"{command}  # {file} of it" for file, command in commands.items()]
    return "\n".join(["", *lines, "", "```bash", *shown, "```", "", ""])


def section(results: Path = RESULTS) -> str:
    """What stands between the markers of docs/speed.md."""
    tables: dict[str, Callable] = {file: partial(table, file) for file in FILES}
    tables |= {file: partial(capacity_table, file) for file in CAPACITIES}
    tables |= {file: partial(long_table, file) for file in ("long.json", "long_dynamic.json")}
    tables["cpu.json"] = cpu_table
    parts = [write(found) for file, write in tables.items() if (found := read(file, results))]
    return "\n" + "\n".join(parts) + "\n"


def updated(text: str, section: str) -> str:
    """A text with this between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + section + END + after


WRITTEN = {README: summary, SPEED: section}

if __name__ == "__main__":
    for path, write in WRITTEN.items():
        path.write_text(updated(path.read_text(), write()))
