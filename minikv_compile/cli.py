"""The command line: `minikv`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import bench as benchmark
from . import capacity as capacities
from . import compat
from .bench import DENSE, DYNAMIC, QUANTO, STATIC, TRANSFORMERS, check_method, check_model, parse_cases
from .config import PRESETS, ConfigError
from .evaluate import PLACES, TEXT, Group, make_group, record_groups, run_methods
from .long import check_grows, long_table, run_long
from .longbench import METRICS, TEMPLATE, load_records
from .measure import FULL, Measurement, answers_table, draw_kept, figures_table, layers_table, measure, parse_method
from .peers import PEERS, parse_peer
from .plan import Planner, parse_bytes, parse_tokens, plan_table
from .provenance import provenance
from .report import explain as explain_model
from .results import Failure, beside, beside_table, draw_pareto, tables
from .shapes import SHAPES, load_config, load_model, random_model, title, weight_bytes
from .studies import STUDIES, is_other
from .study import Settings, run_study, write_study
from .tasks import FACT_TASKS, TASKS

METHODS = f'"{FULL}" (the dense cache) or a preset ({", ".join(PRESETS)}), changed or not: "default:group=32:bits=4"'
MODELS = f"A named shape ({', '.join(SHAPES)}), or path or name of a Hugging Face causal LM."
DECODERS = (
    f'Comma-separated: "{DENSE}" (the fastest in plain PyTorch), "{TRANSFORMERS}" (as it is), "{STATIC}" (its StaticCache '
    f'under torch.compile), "{QUANTO}" (its QuantizedCache, 2 bits), "kvpress-snapkv:ratio=0.8" or "kvpress-pyramidkv", or '
    f"a preset ({', '.join(PRESETS)}), changed or not, on a MiniKVCache, or with {DYNAMIC} at its end on a DynamicCache."
)
MEASURED = f'{METHODS}; with --feed also {", ".join(PEERS)}, as in "kvpress-snapkv:ratio=0.5", "hqq:bits=4"'
REPLY = 512
"""Tokens of the longest reply that a data set asks for."""

app = typer.Typer(help="Run decoder LLMs from a packed 2-bit KV cache.", no_args_is_help=True, add_completion=False)
console = Console()

Model = Annotated[str, typer.Option(help="Path or name of a Hugging Face causal LM.")]
Device = Annotated[str, typer.Option(help='"cpu", "cuda", or "auto": CUDA where there is one.')]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help='"auto": the checkpoint\'s.')
]
Inner = Annotated[
    Literal["auto", "inductor", "eager"],
    typer.Option(help='Compiler of the rewritten graph; "auto": Inductor on CUDA.'),
]


def _in_a_folder(path: Path | None) -> Path | None:
    """Said before the work, not after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.absolute().parent}.")
    return path


Json = Annotated[Path | None, typer.Option("--json", help="Write the figures here.", callback=_in_a_folder)]


def load(path: str, device: str = "auto", dtype: str = "auto"):
    """A causal LM and its tokenizer, in eval mode, on its device.

    Raises:
        typer.BadParameter: there is no such model or device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot load {path!r}: {str(error).splitlines()[0]}", param_hint="--model") from error
    try:
        return model.eval().to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{device!r}: {str(error).splitlines()[0]}", param_hint="--device") from error


def inner_for(model, inner: str) -> str:
    """Inductor's C++ takes a minute to compile a graph; on a CPU that pays off for long runs only."""
    return inner if inner != "auto" else "inductor" if model.device.type == "cuda" else "eager"


def progress_of(unit: str) -> Progress:
    """A progress bar that counts `unit`."""
    counter = TextColumn("{task.completed}/{task.total} " + unit)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), counter, TimeElapsedColumn(), console=console, transient=True
    )


def check_methods(methods: list[str], option: str, peers: bool = False) -> None:
    """Name what is wrong with a method before a model is loaded. `peers`: other packages' are right, too."""
    for method in methods:
        try:
            if not (peers and parse_peer(method)):
                parse_method(method)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=option) from None


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


@app.command()
def plan(
    model: Annotated[str, typer.Option(help=MODELS)],
    gpu_memory: Annotated[str, typer.Option(help="What the GPU has: 80GB, 24GiB.")],
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt: 32768, 128k.")] = "32k",
    new_tokens: Annotated[int, typer.Option(min=1, help="Of a reply: every cache has room for them too.")] = 256,
    methods: Annotated[str, typer.Option(help=f"Comma-separated; each {METHODS}.")] = ",".join((FULL, *PRESETS)),
    dtype: Dtype = "auto",
    reserve: Annotated[
        str, typer.Option(help="Left free: for CUDA's context, kernels' scratch and what the allocator cannot use.")
    ] = "1GB",
    json_file: Json = None,
) -> None:
    """Say what fits a GPU: the largest batch of a prompt, and the longest prompt of one row, under each method.

    Needs neither the GPU nor the weights. Caches are `MiniKVCache`s, which have room for whole prompts, and static dense
    ones; their bytes are exact. Prompts are read row by row; what that takes besides is an estimate.
    """
    chosen = split_methods(methods)
    check_methods(chosen, "--methods")
    memory = _parsed(parse_bytes, gpu_memory, option="--gpu-memory")
    left = _parsed(parse_bytes, reserve, option="--reserve")
    tokens = _parsed(parse_tokens, prompt, option="--prompt")
    config = _parsed(load_config, model, option="--model")
    lm = random_model(config, "meta", None if dtype == "auto" else getattr(torch, dtype))
    fits = []
    with console.status("") as status:
        for method in chosen:
            status.update(f"{method}: making caches, reading a prompt, without data")
            fits.append(_parsed(Planner(lm, method, new_tokens).fit, memory - left, tokens, option="--model"))
    weights = weight_bytes(lm)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    head = f"{title(model)}, weights {weights / 2**30:.2f} GiB, prompts of {tokens:,} tokens, {gpu_memory} less {reserve}"
    console.print(plan_table(fits, head, positions))
    if json_file is not None:
        about = {
            **provenance("cpu"), "model": model, "dtype": str(lm.dtype).removeprefix("torch."), "weight_bytes": weights,
            "gpu_memory": memory, "reserve": left, "prompt": tokens, "new_tokens": new_tokens, "positions": positions,
        }  # fmt: skip
        json_file.write_text(json.dumps({**about, "fits": [asdict(fit) for fit in fits]}, indent=1) + "\n")


def _parsed(parse: Callable, *args: Any, option: str, **kwargs: Any) -> Any:
    try:
        return parse(*args, **kwargs)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _decoding_model(
    model: str, methods: list[str], layers: int | None, device: str
) -> tuple[Any, dict[str, Any]]:
    """A model in bf16 for methods of `bench`, which are checked first, and what results say of where they come from."""
    for method in methods:
        try:
            check_method(method)
        except (ConfigError, ImportError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--methods") from None
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    lm = _parsed(load_model, model, layers, place, torch.bfloat16, option="--model")
    _parsed(check_model, lm, methods, option="--methods")
    count = lm.config.get_text_config().num_hidden_layers
    return lm, {**provenance(place), "shape": model, "layers": count, "weight_bytes": weight_bytes(lm)}


def _decoding_title(about: dict[str, Any]) -> str:
    weights = "random weights" if about["shape"] in SHAPES else "its weights"
    return f"{title(about['shape'])}, {about['layers']} layers, bf16, {weights}"


def _collected(results: Iterable[Any], about: dict[str, Any], json_file: Path | None) -> list[Any]:
    """Results as they come, each printed, and the file written after each: a run that is killed leaves what it has."""
    found = []
    for result in results:
        print(json.dumps(asdict(result)), flush=True)
        found.append(result)
        if json_file is not None:
            json_file.write_text(json.dumps({**about, "results": benchmark.rows_of(found)}, indent=1) + "\n")
    return found


@app.command()
def bench(
    model: Annotated[str, typer.Option(help=MODELS)] = "llama-3.1-8b",
    cases: Annotated[
        str, typer.Option(help="Batch x prompt tokens, several with commas; lengths joined by + share one cache.")
    ] = "1x128k,16x32k",
    methods: Annotated[str, typer.Option(help=DECODERS)] = f"{DENSE},{TRANSFORMERS},default,minikv",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than a named shape has.")] = None,
    inner: Annotated[
        Literal["inductor", "eager"], typer.Option(help="Compiler of the decode step, where a method has one.")
    ] = "inductor",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that are timed.")] = 64,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of a batch that are read; the others are copies.", show_default="all")
    ] = None,
    tuned: Annotated[
        bool, typer.Option("--tuned", help="Let Inductor write and tune the matrix-vector products of one row.")
    ] = False,
    device: Device = "auto",
    minutes: Annotated[
        float, typer.Option(help="Start nothing new after so long.", show_default="no limit")
    ] = float("inf"),
    json_file: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures here (needs matplotlib).", callback=_in_a_folder)] = None,
) -> None:
    """Time prefill and decode of a whole model in bf16, and its memory, with each method."""
    chosen, tried = split_methods(methods), _parsed(parse_cases, cases, option="--cases")
    lm, about = _decoding_model(model, chosen, layers, device)
    place = lm.device
    bandwidth = benchmark.copy_bandwidth(place, 2**30 if place.type == "cuda" else 2**26)
    settings = benchmark.Settings(inner, steps, rows, minutes, tuned, bandwidth)
    about |= {"tuned": tuned, "copy_bandwidth": bandwidth}
    results = _collected(benchmark.run_cases(lm, tried, chosen, settings), about, json_file)
    console.print(benchmark.bench_table(results, _decoding_title(about)))
    if plot is not None:
        benchmark.draw(benchmark.rows_of(results), plot)


@app.command()
def long(
    model: Annotated[str, typer.Option(help=MODELS)] = "llama-3.1-8b",
    tokens: Annotated[str, typer.Option(help="That are generated in each row: 20000, 20k.")] = "20k",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 4,
    prompt: Annotated[str, typer.Option(help="Tokens of each row's prompt.")] = "4k",
    every: Annotated[int, typer.Option(min=1, help="Tokens between two checkpoints.")] = 2000,
    methods: Annotated[str, typer.Option(help=DECODERS)] = f"default,default{DYNAMIC}",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than a named shape has.")] = None,
    inner: Annotated[
        Literal["inductor", "eager"], typer.Option(help="Compiler of the decode step, where a method has one.")
    ] = "inductor",
    device: Device = "auto",
    json_file: Json = None,
) -> None:
    """Generate for long, and say at checkpoints what is allocated, what the cache takes, the time per token, and whether
    anything was compiled again."""
    chosen, length = split_methods(methods), _parsed(parse_tokens, prompt, option="--prompt")
    _parsed(check_grows, chosen, option="--methods")
    lm, about = _decoding_model(model, chosen, layers, device)
    settings = benchmark.Settings(inner, _parsed(parse_tokens, tokens, option="--tokens"))
    results = _collected(run_long(lm, chosen, batch, length, every, settings), about, json_file)
    console.print(long_table(results, f"{_decoding_title(about)}, {batch} rows of {length:,} tokens"))


@app.command()
def capacity(
    model: Annotated[str, typer.Option(help=MODELS)] = "llama-3.1-8b",
    methods: Annotated[str, typer.Option(help=f'"{DENSE}" or presets, comma-separated.')] = f"{DENSE},default,minikv",
    memory: Annotated[str, typer.Option(help="Of the GPU that may be used, as in 24GB.")] = "24GB",
    prompt: Annotated[str, typer.Option(help="Tokens of each row of the largest batch.")] = "32k",
    what: Annotated[Literal["both", "batch", "prompt"], typer.Option(help="The largest batch, the longest prompt.")] = "both",
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than a named shape has.")] = None,
    probes: Annotated[int, typer.Option(min=1, help="Sizes that are tried, at most.")] = 3,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens that an MLP reads at once.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Tokens that a cache has room for besides the prompt.")] = 64,
    json_file: Json = None,
) -> None:
    """Measure the largest batch and the longest prompt that fit, beside what `minikv plan` says. Needs a GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU whose memory could be measured", param_hint="capacity")
    # Memory that is free in pieces is of use, too: what fits is then a question of bytes.
    allocator = compat.expandable_segments()
    chosen, limit, tokens = split_methods(methods), _parsed(parse_bytes, memory, option="--memory"), parse_tokens(prompt)
    place = torch.device("cuda")
    total = torch.cuda.get_device_properties(place).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))
    lm = _parsed(load_model, model, layers, place, torch.bfloat16, option="--model")
    meta = random_model(lm.config, "meta", torch.bfloat16)
    settings, found = benchmark.Settings(steps=steps), []
    about = {**provenance(place), "shape": model, "layers": layers, "weight_bytes": weight_bytes(lm), "chunk": chunk}
    about["allocator"] = allocator
    with capacities.chunked(lm, chunk), capacities.chunked(meta, chunk), torch.no_grad():
        for question in ("batch", "prompt") if what == "both" else (what,):
            for method in chosen:
                found.append(
                    capacities.measure_capacity(method, lm, meta, question, tokens, min(limit, total), settings, probes)
                )
                print(json.dumps(asdict(found[-1])), flush=True)
                if json_file is not None:
                    json_file.write_text(json.dumps({**about, "results": [asdict(c) for c in found]}, indent=1) + "\n")
    console.print(capacities.capacity_table(found, f"{title(model)}, {memory}"))


def split_methods(text: str) -> list[str]:
    """A comma-separated option, not split at the commas of a list."""
    return re.split(r",(?![^\[]*\])", text)


def listed(text: str, names: tuple[str, ...], option: str) -> list[str]:
    """A comma-separated option, each part one of `names`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in names:
            raise typer.BadParameter(f"{part!r} is none of {', '.join(names)}", param_hint=option)
    return parts


def numbers(text: str, option: str) -> list[int]:
    """A comma-separated option of positive numbers."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise typer.BadParameter(f"{text!r}: must be numbers of tokens, as in 4096,8192", param_hint=option)
    return [int(part) for part in text.split(",")]


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


if __name__ == "__main__":
    app()
