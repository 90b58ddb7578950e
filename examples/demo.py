"""The main job on the shipped model: read a long text, answer questions about facts planted in it, with the full cache
and with two presets; print answers, measured bytes and time, and draw which tokens each layer kept.

    python examples/demo.py [--length 8192] [--out demo_output]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from minikv_compile.cli import compare, load
from minikv_compile.measure import FULL, answers_table, draw_kept, figures_table, layers_table
from minikv_compile.tasks import make_sample

HERE = Path(__file__).parent
METHODS = [FULL, "default", "minikv"]


def main(
    length: Annotated[int, typer.Option(help="Tokens of the prompt, question included.")] = 8192,
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks of `minikv eval`.")] = "single,tracking",
    seed: int = 0,
    new_tokens: int = 24,
    inner: str = "auto",
    out: Annotated[Path, typer.Option(help="Folder for demo.json and the picture.")] = Path("demo_output"),
) -> None:
    console = Console()
    model, tokenizer = load(str(HERE / "tiny_decoder" / "model"))
    results = []
    for task in tasks.split(","):
        sample = make_sample(task, length, seed, tokenizer)
        console.rule(f"{task}: a text of {len(sample.prompt):,} characters")
        console.print(f"[bold]Question:[/bold] {sample.question.strip()}   [bold]Planted:[/bold] {sample.answer}")
        runs = compare(model, tokenizer, sample.prompt + sample.question, METHODS, new_tokens, inner)
        console.print(answers_table(runs))
        verdicts = (f"{run.method}: {'right' if sample.score(run.answer) == 1 else 'wrong'}." for run in runs)
        console.print(" ".join(verdicts))
        console.print(figures_table(runs))
        results.append({"task": task, "planted": sample.answer, "runs": [run.figures() for run in runs]})
    console.print(layers_table(runs))
    out.mkdir(parents=True, exist_ok=True)
    draw_kept(runs, out / "kept_tokens.png")
    (out / "demo.json").write_text(json.dumps(results, indent=1))
    console.print(f"Figures: {out / 'demo.json'}   Picture: {out / 'kept_tokens.png'}")


if __name__ == "__main__":
    typer.run(main)
