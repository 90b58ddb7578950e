"""Commands about a whole model that decodes: `plan`, `bench`, `long`, `capacity`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from . import bench as benchmark
from . import capacity as capacities
from . import compat
from .bench import DENSE, DYNAMIC, QUANTO, STATIC, TRANSFORMERS, check_method, check_model, parse_cases
from .cli_options import (
    METHODS,
    MODELS,
    Device,
    Dtype,
    Json,
    app,
    check_methods,
    console,
    in_a_folder,
    parsed,
    split_methods,
    usable_device,
)
from .config import PRESETS, ConfigError
from .long import check_grows, long_table, run_long
from .measure import FULL
from .plan import Planner, parse_bytes, parse_tokens, plan_table
from .provenance import provenance
from .shapes import SHAPES, load_config, load_model, random_model, title, weight_bytes

DECODERS = (
    f'Comma-separated: "{DENSE}" (the fastest in plain PyTorch), "{TRANSFORMERS}" (as it is), "{STATIC}" (its StaticCache '
    f'under torch.compile), "{QUANTO}" (its QuantizedCache, 2 bits), "kvpress-snapkv:ratio=0.8" or "kvpress-pyramidkv", or '
    f"a preset ({', '.join(PRESETS)}), changed or not, on a MiniKVCache, or with {DYNAMIC} at its end on a DynamicCache."
)


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
    memory = parsed(parse_bytes, gpu_memory, option="--gpu-memory")
    left = parsed(parse_bytes, reserve, option="--reserve")
    tokens = parsed(parse_tokens, prompt, option="--prompt")
    config = parsed(load_config, model, option="--model")
    if memory <= left:
        raise typer.BadParameter(f"{gpu_memory} less {reserve} leaves nothing (80GB has a unit)", param_hint="--gpu-memory")
    lm = random_model(config, "meta", None if dtype == "auto" else getattr(torch, dtype))
    fits = []
    with console.status("") as status:
        for method in chosen:
            status.update(f"{method}: making caches, reading a prompt, without data")
            fits.append(parsed(Planner(lm, method, new_tokens).fit, memory - left, tokens, option="--model"))
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


def _decoding_model(
    model: str, methods: list[str], layers: int | None, device: str
) -> tuple[Any, dict[str, Any]]:
    """A model in bf16 for methods of `bench`, which are checked first, and what results say of where they come from."""
    for method in methods:
        try:
            check_method(method)
        except (ConfigError, ImportError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--methods") from None
    place = parsed(usable_device, device, option="--device")
    lm = parsed(load_model, model, layers, place, torch.bfloat16, option="--model")
    parsed(check_model, lm, methods, option="--methods")
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
    plot: Annotated[Path | None, typer.Option(help="Draw the figures here (needs matplotlib).", callback=in_a_folder)] = None,
) -> None:
    """Time prefill and decode of a whole model in bf16, and its memory, with each method."""
    chosen, tried = split_methods(methods), parsed(parse_cases, cases, option="--cases")
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
    chosen, length = split_methods(methods), parsed(parse_tokens, prompt, option="--prompt")
    parsed(check_grows, chosen, option="--methods")
    lm, about = _decoding_model(model, chosen, layers, device)
    settings = benchmark.Settings(inner, parsed(parse_tokens, tokens, option="--tokens"))
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
    limit, tokens = parsed(parse_bytes, memory, option="--memory"), parsed(parse_tokens, prompt, option="--prompt")
    chosen = split_methods(methods)
    place = torch.device("cuda")
    total = torch.cuda.get_device_properties(place).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))
    lm = parsed(load_model, model, layers, place, torch.bfloat16, option="--model")
    meta = random_model(lm.config, "meta", torch.bfloat16)
    settings, limit = benchmark.Settings(steps=steps), min(limit, total)
    about = {**provenance(place), "shape": model, "layers": layers, "weight_bytes": weight_bytes(lm), "chunk": chunk}
    about["allocator"] = allocator
    with capacities.chunked(lm, chunk), capacities.chunked(meta, chunk), torch.no_grad():
        questions = ("batch", "prompt") if what == "both" else (what,)
        results = (
            capacities.measure_capacity(method, lm, meta, question, tokens, limit, settings, probes)
            for question in questions for method in chosen
        )  # fmt: skip
        found = _collected(results, about, json_file)
    console.print(capacities.capacity_table(found, f"{title(model)}, {memory}"))
