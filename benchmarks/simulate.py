"""What an answer costs when the prompt's cache is stored this way or that: many formats on the same prompts.

    python benchmarks/simulate.py --prompts 300 --json benchmarks/results/simulate.json

The shipped decoder reads a prompt with a dense cache. Its keys and values are compressed and read back, by the ops of
the backend, once for each variant; then the answer is fed at once: it counts if each of its tokens was the likeliest one.
So small differences show, on the same prompts, at a tenth of the time of `minikv eval`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from minikv_compile.balancer import query_range
from minikv_compile.cli import load
from minikv_compile.config import MiniKVConfig
from minikv_compile.haystack import held_out_ids
from minikv_compile.kernels.important import distance_from_mean, stored_order
from minikv_compile.kernels.packing import BLOCK
from minikv_compile.kernels.prefill import causal_attention_lse
from minikv_compile.kernels.scores import column_scores
from minikv_compile.kernels.select import highest
from minikv_compile.measure import parse_method
from minikv_compile.ops import ROLES, compress_prompt, dequantize, fields, tier_names
from minikv_compile.provenance import provenance
from minikv_compile.rotation import rotation_matrix
from minikv_compile.tasks import make_sample

FEEDBACK = "+feedback"
ROOT = Path(__file__).resolve().parent.parent
SEED = 2_000_000
"""First seed of the prompts: not those of accuracy.py."""
VARIANTS = (
    "full", "default", "default:important=0", "default:important=32", "default:important=128",
    "default:importance=random", "default:group=64", "default:group=64:important=0", "default:group=32:important=0",
    "default:clip=0.9", "default:bits=4", "default" + FEEDBACK,
)  # fmt: skip


@dataclass
class Prompt:
    """What the model keeps of a prompt, and what follows it."""

    keys: Tensor
    """[layers, kv_heads, n, head_dim]"""
    values: Tensor
    queries: Tensor
    """[layers, heads, n, head_dim]"""
    tokens: Tensor
    """The prompt's last token and the continuation, int64 [1, n]."""


def read(model, ids: Tensor, continuation: Tensor) -> Prompt:
    """A prompt, without its last token, through the model."""
    seen, rotary = [], modeling_llama.apply_rotary_pos_emb

    def watched(*args, **kwargs):
        q, k = rotary(*args, **kwargs)
        seen.append(q)
        return q, k

    modeling_llama.apply_rotary_pos_emb = watched
    try:
        layers = model.model(ids[:, :-1], use_cache=True).past_key_values.layers
    finally:
        modeling_llama.apply_rotary_pos_emb = rotary
    keys, values = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
    return Prompt(keys, values, torch.cat(seen), torch.cat([ids[:, -1:], continuation], 1))


def moments(prompt: Prompt) -> Tensor:
    """Second moments of the queries of each KV head: fp32 [layers, kv_heads, head_dim, head_dim]."""
    queries = prompt.queries.float().unflatten(1, (prompt.keys.shape[1], -1)).flatten(2, 3)
    return queries.mT @ queries / queries.shape[2]


def scores(prompt: Prompt, observed: int | None) -> Tensor | None:
    """What the policies see of the prompt's attention: fp32 [layers, kv_heads, n]."""
    if observed is None:
        return None
    q, k = prompt.queries, prompt.keys
    scale = q.shape[3] ** -0.5
    layers = [
        column_scores(q, k, causal_attention_lse(q, k, k, scale)[1], scale, None, observed or None)
        for q, k in zip(q.split(1), k.split(1), strict=True)
    ]
    return torch.cat(layers)


def stored(prompt: Prompt, config: MiniKVConfig) -> list[Tensor]:
    """Keys and values, compressed and read back."""
    k, v = prompt.keys, prompt.values
    observed, q_range = scores(prompt, config.observed_queries), query_range(prompt.queries, k, None, None)
    made = iter(compress_prompt(k, v, observed, None, None, 0, 1, config.to_json(), q_range))
    back = []
    for role in ROLES:
        held = {name: next(made) for name in fields(config, role, False)}
        tier = [held[name] for name in tier_names(config, role)]
        order = ("dense", "state", "important", "kept")
        back.append(dequantize(tier, *(held.get(name) for name in order), k.shape[2], role, config.to_json()))
    return back


def with_feedback(prompt: Prompt, config: MiniKVConfig, plain: Tensor) -> Tensor:
    """Keys as `plain`, but with codes chosen channel by channel, each making up for the errors of those before it in what
    the prompt's queries see (GPTQ, arXiv 2210.17323, with the queries' second moments for its Hessian). Same bytes."""
    layers, heads, n, dim = plain.shape
    count = config.important_tokens(n)
    pinned = config.pinned(count)
    packed = max(0, n - pinned - config.window) // BLOCK * BLOCK
    rotation = rotation_matrix(config.rotation, dim, plain.device)
    score = distance_from_mean(prompt.keys.flatten(0, 1))[:, config.sinks : pinned + packed]
    apart = highest(score, count).unflatten(0, (layers, heads)) + config.sinks
    counts = torch.full((layers,), count, dtype=torch.int32, device=plain.device)
    places = stored_order(apart, counts, n, config.sinks)[..., pinned : pinned + packed]
    places = places[..., None].expand(-1, -1, -1, dim)
    x = (prompt.keys.gather(2, places).float() @ rotation).unflatten(2, (-1, config.group))
    low, high = x.amin(3, keepdim=True), x.amax(3, keepdim=True)
    zero, step = low.bfloat16().float(), ((high - low) / (2**config.bits - 1)).bfloat16().float()
    seen = rotation.T @ moments(prompt) @ rotation
    seen.diagonal(dim1=-2, dim2=-1).add_(seen.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True), alpha=0.01)
    lower = torch.linalg.cholesky(seen)
    weights = lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    error = torch.zeros_like(x)
    for i in reversed(range(dim)):
        owed = torch.einsum("lhbtj,lhj->lhbt", error[..., i + 1 :], weights[:, :, i + 1 :, i])
        code = ((x[..., i] - owed - zero[..., i]) / step[..., i]).round().clamp(0, 2**config.bits - 1)
        error[..., i] = code * step[..., i] + zero[..., i] - x[..., i]
    return plain.scatter(2, places, ((x + error).flatten(2, 3) @ rotation.T).to(plain.dtype))


def variant_cache(prompt: Prompt, name: str) -> list[Tensor]:
    config = parse_method(name.removesuffix(FEEDBACK))
    if config is None:
        return [prompt.keys, prompt.values]
    keys, values = stored(prompt, config)
    return [with_feedback(prompt, config, keys) if name.endswith(FEEDBACK) else keys, values]


def continued(model, prompt: Prompt, caches: list[list[Tensor]]) -> Tensor:
    """Logits of the continuation, fp32 [variants, tokens, vocabulary]."""
    cache = DynamicCache()
    keys, values = (torch.stack(parts, 1) for parts in zip(*caches, strict=True))
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        cache.update(k, v, layer)
    tokens = prompt.tokens[:, :-1].expand(len(caches), -1)
    return model(tokens, past_key_values=cache).logits.float()


def main(
    model: str = str(ROOT / "examples" / "tiny_decoder" / "model"),
    task: str = "tracking",
    lengths: str = "4096,8192",
    prompts: int = 300,
    methods: str = ",".join(VARIANTS),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, tokenizer = load(model, device, "bfloat16" if device == "cuda" else "float32")
    names = methods.split(",")
    rows = {name: {"kl": 0.0} for name in names}
    with torch.no_grad():
        for length in map(int, lengths.split(",")):
            right = torch.zeros(len(names), dtype=torch.int64)
            kl = torch.zeros(len(names))
            for i in track(range(prompts), f"{length} tokens"):
                sample = make_sample(task, length, SEED + i, tokenizer)
                ids = tokenizer(sample.prompt + sample.question, return_tensors="pt").input_ids.to(device)
                answer = tokenizer(sample.completion, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
                prompt = read(lm, ids, answer)
                logits = continued(lm, prompt, [variant_cache(prompt, name) for name in names])
                right += (logits[:, 1:].argmax(-1) == prompt.tokens[:, 2:]).all(-1).cpu()
                if i % 10 == 0:
                    kl += text_kl(lm, tokenizer, length, SEED + i, names).cpu() / -(-prompts // 10)
            for name, count, divergence in zip(names, right.tolist(), kl.tolist(), strict=True):
                rows[name] |= {f"{task}_{length}": count / prompts, f"kl_{length}": divergence}
                rows[name].pop("kl", None)
    columns = list(rows[names[0]])
    table = Table("stored", *columns, title=f"exact match of {prompts} prompts; KL(full || variant) on text, nats")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:.4f}" if c.startswith("kl") else f"{row[c]:.1%}" for c in columns))
    Console(width=120).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({**provenance(device), "prompts": prompts, "rows": rows}, indent=1) + "\n")


def text_kl(lm, tokenizer, length: int, seed: int, names: list[str], continuation: int = 128) -> Tensor:
    """KL(full || variant) of the next tokens of held-out source code, mean, in nats: fp32 [variants]."""
    ids = torch.tensor([held_out_ids(tokenizer, length + continuation, seed)], device=lm.device)
    prompt = read(lm, ids[:, :length], ids[:, length:])
    chances = continued(lm, prompt, [variant_cache(prompt, name) for name in ["full", *names]]).log_softmax(-1)
    return (chances[:1].exp() * (chances[:1] - chances[1:])).sum(-1).mean(-1)


if __name__ == "__main__":
    typer.run(main)
