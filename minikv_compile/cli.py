"""The command line: `minikv`. Here: one prompt, and what is scored."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from .cli_options import (
    METHODS,
    Device,
    Dtype,
    Inner,
    Json,
    Model,
    app,
    check_methods,
    console,
    listed,
    numbers,
    parsed,
    progress_of,
    split_methods,
    usable_device,
)
from .evaluate import PLACES, TEXT, Group, make_group, record_groups, run_methods
from .longbench import METRICS, TEMPLATE, load_records
from .measure import FULL, Measurement, answers_table, draw_kept, figures_table, layers_table, measure
from .peers import PEERS
from .provenance import provenance
from .report import explain as explain_model
from .results import Failure, beside, beside_table, draw_pareto, tables
from .shapes import title
from .studies import STUDIES, is_other
from .study import Settings, run_study, write_study
from .tasks import FACT_TASKS, TASKS

MEASURED = f'{METHODS}; with --feed also {", ".join(PEERS)}, as in "kvpress-snapkv:ratio=0.5", "hqq:bits=4"'
REPLY = 512
"""Tokens of the longest reply that a data set asks for."""


def load(path: str, device: str = "auto", dtype: str = "auto"):
    """A causal LM and its tokenizer, in eval mode, on its device.

    Raises:
        typer.BadParameter: there is no such model or device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = parsed(usable_device, device, option="--device")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot load {path!r}: {str(error).splitlines()[0]}", param_hint="--model") from error
    try:
        return model.eval().to(place), tokenizer
    except torch.OutOfMemoryError as error:
        raise typer.BadParameter(f"{device!r}: {str(error).splitlines()[0]}", param_hint="--device") from error


def inner_for(model, inner: str) -> str:
    """Inductor's C++ takes a minute to compile a graph; on a CPU that pays off for long runs only."""
    return inner if inner != "auto" else "inductor" if model.device.type == "cuda" else "eager"


def compare(model, tokenizer, prompt: str, methods: list[str], max_new_tokens: int, inner: str) -> list[Measurement]:
    """Answer one prompt with each method, with a progress bar."""
    runs = []
    with progress_of("tokens") as progress:
        for method in methods:
            task = progress.add_task(f"{method}: prefill and decode", total=max_new_tokens)
            advance = partial(progress.advance, task)
            run = measure(model, tokenizer, prompt, method, max_new_tokens, inner_for(model, inner), advance)
            progress.update(task, completed=max_new_tokens)
            runs.append(run)
    return runs


@app.command()
def generate(
    model: Model,
    prompt_file: Annotated[Path, typer.Option(help="Text file with the prompt, question included.", exists=True)],
    method: Annotated[
        list[str], typer.Option(help=METHODS + ". Repeat to compare.")
    ] = [FULL, "default", "minikv"],  # noqa: B006
    max_new_tokens: int = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
    inner: Inner = "auto",
    json_file: Json = None,
    picture: Annotated[Path | None, typer.Option(help="Write a picture of which tokens each layer kept (PNG).")] = None,
) -> None:
    """Answer a prompt with each method; print the answers, the measured bytes and the time."""
    check_methods(method, "--method")
    lm, tokenizer = load(model, device, dtype)
    runs = compare(lm, tokenizer, prompt_file.read_text(), method, max_new_tokens, inner)
    for table in (answers_table(runs, "Answers"), figures_table(runs), layers_table(runs)):
        console.print(table)
    if picture is not None:
        draw_kept(runs, picture)
    if json_file is not None:
        json_file.write_text(json.dumps([run.figures() for run in runs], indent=1))


@app.command()
def explain(
    model: Model,
    tokens: Annotated[int, typer.Option(help="Length of the prompt to trace with.")] = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Say which attention sites of a model are rewritten, and why the others are not."""
    lm, tokenizer = load(model, device, dtype)
    ids = torch.randint(0, lm.config.vocab_size, (1, tokens), device=lm.device)
    console.print(str(explain_model(lm, input_ids=ids)))


def generated(names: list[str], lengths: list[int], **settings) -> list[Group]:
    """The prompts of the generated tasks (`make_group`)."""
    try:
        return [make_group(task, length, **settings) for length in lengths for task in names]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def recorded(path: Path, model, tokenizer, max_length: int | None, chat: bool, **settings) -> list[Group]:
    """The prompts of a file (`load_records`)."""
    max_length = max_length or model.config.get_text_config().max_position_embeddings - REPLY
    try:
        return record_groups(load_records(path, tokenizer, max_length, **settings), max_length, tokenizer, chat)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--jsonl") from None


@app.command("eval")
def evaluate(
    model: Model,
    tasks: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated, of {', '.join((*TASKS, TEXT))}.", show_default=",".join(FACT_TASKS)),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Of prompt and question, or of the text's prefix, in tokens.")] = "4096",
    methods: Annotated[str, typer.Option(help=f"Comma-separated; each {MEASURED}.")] = f"{FULL},default,minikv",
    places: Annotated[
        str, typer.Option(help="Where the question is: inside the compressed prompt, after it, or both.")
    ] = ",".join(PLACES),
    prompts: Annotated[int, typer.Option(min=1, help="Per task and length; of a file, per data set.")] = 50,
    batch: Annotated[
        int, typer.Option(min=1, help="Prompts at once, where the question is inside, or with --feed.")
    ] = 1,
    feed: Annotated[
        bool, typer.Option("--feed", help="Feed the right answers instead of generating replies: exact matches, faster.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the first prompt. The default was not tuned on.")] = 1_000_000,
    continuation: Annotated[int, typer.Option(min=1, help=f"{TEXT}: tokens to predict after the prefix.")] = 256,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the tokenizer's chat template.")] = False,
    jsonl: Annotated[
        Path | None, typer.Option(help="A file in LongBench's format, asked instead of or beside --tasks.", exists=True)
    ] = None,
    prompt_template: Annotated[
        str, typer.Option(help="For --jsonl: a text with {context} and {input}, or a JSON file with one per data set.")
    ] = TEMPLATE,
    metric: Annotated[
        str | None, typer.Option(help=f"For --jsonl, if not the data set's own: {', '.join(METRICS)}.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="For --jsonl: longer prompts lose the middle.", show_default=f"the model's - {REPLY}"),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Start no new cell after so long.", show_default="no limit")
    ] = float("inf"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    inner: Inner = "auto",
    json_file: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy over bytes here (PNG).")] = None,
) -> None:
    """Score methods on long-context tasks, with the bytes that they took."""
    started = time.monotonic()
    names = listed(tasks or ("" if jsonl else ",".join(FACT_TASKS)), (*TASKS, TEXT), "--tasks")
    tokens, where = numbers(lengths, "--lengths"), listed(places, PLACES, "--places")
    listed(metric or "", tuple(METRICS), "--metric")
    chosen = split_methods(methods)
    check_methods(chosen, "--methods", peers=feed)
    if feed and (chat or jsonl or set(names) - {*FACT_TASKS, TEXT}):
        raise typer.BadParameter(f"feeds exact answers only: to {', '.join((*FACT_TASKS, TEXT))}", param_hint="--feed")
    torch.manual_seed(seed)
    lm, tokenizer = load(model, device, dtype)
    settings = dict(prompts=prompts, seed=seed, batch=batch, chat=chat, continuation=continuation)
    groups = generated(names, tokens, tokenizer=tokenizer, **settings)
    if jsonl is not None:
        settings = dict(template=prompt_template, metric=metric, limit=prompts)
        groups += recorded(jsonl, lm, tokenizer, max_length, chat, **settings)
    about = {**provenance(lm.device), "model": model, "dtype": str(lm.dtype).removeprefix("torch."), "seed": seed}
    about |= {"fed": feed}
    cells, failures = [], []
    with progress_of("prompts") as progress:
        bar = progress.add_task("", total=len(chosen) * sum(len(group) * len(group.asked(where)) for group in groups))

        def advance(method: str, n: int) -> None:
            progress.update(bar, description=method, advance=n)

        for cell in run_methods(lm, tokenizer, chosen, groups, where, inner_for(lm, inner), advance, feed):
            (failures if isinstance(cell, Failure) else cells).append(cell)
            if not console.is_terminal:  # no progress bar: a line in the log
                print(json.dumps(cell.figures()), flush=True)
            if json_file is not None:  # after each cell: a run that is killed leaves what it has
                found = {"cells": [c.figures() for c in cells], "failed": [f.figures() for f in failures]}
                json_file.write_text(json.dumps({**about, **found}, indent=1) + "\n")
            if time.monotonic() - started > 60 * minutes:
                break
    for table in tables(cells):
        console.print(table)
    if rows := list(beside(cells, is_other)):
        console.print(beside_table(rows))
    for failure in failures:
        console.print(f"{failure.method} could not run: {failure.reason}", markup=False)
    if plot is not None:
        draw_pareto(cells, plot)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help=f"Comma-separated, of {', '.join(STUDIES)}; or all.")],
    model: Model,
    prompts: Annotated[int, typer.Option(min=1, help="Per task and length.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first prompt. The default was not tuned on.")] = 1_000_000,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.", show_default="the study's")] = "",
    minutes: Annotated[
        float, typer.Option(help="Start nothing new after so long; studies share what is left.", show_default="no limit")
    ] = float("inf"),
    out: Annotated[Path, typer.Option(help="Folder for a page, a plot and the figures of each study.")] = Path("docs/studies"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    inner: Annotated[Literal["inductor", "eager"], typer.Option(help="Compiler of the rewritten graphs.")] = "eager",
) -> None:
    """Answer a question about methods with a table, a plot and JSON."""
    started, chosen = time.monotonic(), list(STUDIES) if name == "all" else listed(name, tuple(STUDIES), "NAME")
    tokens = tuple(numbers(lengths, "--lengths")) if lengths else ()
    lm, tokenizer = load(model, device, dtype)
    torch.manual_seed(seed)
    dtype_name = str(lm.dtype).removeprefix("torch.")
    about = {**provenance(lm.device), "model": title(model), "dtype": dtype_name, "prompts": prompts, "seed": seed}
    for i, chosen_name in enumerate(chosen):
        question = STUDIES[chosen_name]
        if question.needs_gpu and lm.device.type != "cuda":
            console.print(f"{chosen_name}: needs a GPU")
            continue
        now, end = time.monotonic(), started + 60 * minutes
        settings = Settings(prompts, batch, seed, inner, now + (end - now) / (len(chosen) - i), tokens)
        console.rule(f"{chosen_name}: {question.question}")
        found = run_study(question, lm, tokenizer, settings, partial(print, flush=True))
        write_study(chosen_name, question, *found, about, out)
        console.print(f"{out / chosen_name}.md, .png, .json")


from . import cli_bench  # noqa: E402, F401 (its commands, listed behind these)

if __name__ == "__main__":
    app()
