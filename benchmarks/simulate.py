"""What an answer costs when the prompt's cache is stored this way or that: many formats on the same prompts.

    python benchmarks/simulate.py --prompts 300 --json benchmarks/results/simulate.json

The shipped decoder reads a prompt with a dense cache. Its tokens are chosen, and its keys and values compressed and read
back, by the ops of the backend, once for each variant; then the answer is fed at once: it counts if each of its tokens was
the likeliest one. So small differences show, on the same prompts, at a tenth of the time of `minikv eval`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

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
from minikv_compile.cli_options import listed, numbers, split_methods
from minikv_compile.config import MiniKVConfig
from minikv_compile.evaluate import PLACES
from minikv_compile.feedback import query_moments
from minikv_compile.haystack import held_out_ids
from minikv_compile.kernels.prefill import causal_attention_lse
from minikv_compile.kernels.scores import column_scores
from minikv_compile.measure import parse_method
from minikv_compile.ops import ROLES, compress_prompt, dequantize, fields, kept_mask, tier_names
from minikv_compile.peers import own_masks
from minikv_compile.provenance import provenance
from minikv_compile.tasks import FACT_TASKS, make_sample

ROOT = Path(__file__).resolve().parent.parent
SEED = 2_000_000
"""First seed of the prompts: not those of accuracy.py."""
VARIANTS = (
    "full", "default", "default:important=0", "default:important=32", "default:important=128",
    "default:importance=random", "default:group=64", "default:group=64:important=0", "default:group=32:important=0",
    "default:clip=0.9", "default:bits=4", "default:error_feedback=False",
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
    _scores: dict[int, list[Tensor]] = field(default_factory=dict)

    def until(self, n: int) -> Prompt:
        """The prompt cut after `n` tokens: no key of a causal model knows what follows it. The rest is fed with the
        continuation by the caller."""
        return Prompt(self.keys[:, :, :n], self.values[:, :, :n], self.queries[:, :, :n], self.tokens)

    def scores(self, observed: int | None) -> list[Tensor | None]:
        """Of each layer, the column scores of the newest `observed` queries, all for 0: fp32 [1, kv_heads, n]; None for
        policies that look at none."""
        if observed is None:
            return [None] * len(self.keys)
        if observed not in self._scores:
            layers = zip(self.queries, self.keys, self.values, strict=True)
            self._scores[observed] = [self._columns(*(x[None] for x in layer), observed) for layer in layers]
        return self._scores[observed]

    @staticmethod
    def _columns(q: Tensor, k: Tensor, v: Tensor, observed: int) -> Tensor:
        scale = q.shape[-1] ** -0.5
        return column_scores(q, k, causal_attention_lse(q, k, v, scale)[1], scale, None, observed or None)


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


@dataclass
class Stored:
    """A compressed cache, read back."""

    keys: list[Tensor]
    """Of each layer, [1, kv_heads, kept, head_dim], in the model's dtype."""
    values: list[Tensor]
    share: float
    """Bytes held, of those of a dense cache, both with 16-bit numbers."""


def stored(prompt: Prompt, config: MiniKVConfig | None) -> Stored:
    """Keys and values, compressed layer by layer and read back."""
    keys, values, held, layers = [], [], 0, len(prompt.keys)
    if config is None:
        return Stored(*([x[None] for x in part] for part in (prompt.keys, prompt.values)), 1.0)
    text, n = config.to_json(), prompt.keys.shape[2]
    looks = (config.balances, query_range), (config.feeds_back, query_moments)
    seen = [look(prompt.queries, prompt.keys, None, None)[:, None] if wanted else [None] * layers for wanted, look in looks]
    for layer, scores in enumerate(prompt.scores(config.observed_queries)):
        k, v = (x[layer, None].bfloat16() for x in (prompt.keys, prompt.values))
        made = compress_prompt(k, v, scores, None, None, layer, layers, text, *(x[layer] for x in seen))
        held += sum(t.nbytes for t in made)
        rest = iter(made)
        for role, back in zip(ROLES, (keys, values), strict=True):
            parts = {name: next(rest) for name in fields(config, role, False)}
            tier = [parts[name] for name in tier_names(config, role)]
            order = ("dense", "state", "important", "kept")
            x = dequantize(tier, *(parts.get(name) for name in order), n, role, text).to(prompt.keys.dtype)
            if "kept" in parts:
                x = x[kept_mask(parts["kept"], parts["state"], n)].view(1, x.shape[1], -1, x.shape[3])
            back.append(x)
    return Stored(keys, values, held / (2 * prompt.keys.numel() * 2))


def continued(model, cache: Stored, past: int, tokens: Tensor) -> Tensor:
    """Logits of tokens, int64 [1, n], that follow `past` others: fp32 [n, vocabulary]."""
    held = DynamicCache()
    for layer, (k, v) in enumerate(zip(cache.keys, cache.values, strict=True)):
        held.update(k, v, layer)
    positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    with own_masks(model):
        return model(tokens, past_key_values=held, position_ids=positions).logits[0].float()


def text_kl(
    lm, tokenizer, length: int, seed: int, caches: Callable[[Prompt], dict[Any, Stored]], continuation: int = 128
) -> dict[Any, float]:  # fmt: skip
    """KL(full || cache) of the next tokens of held-out source code, mean, in nats, of each of a prompt's `caches`."""
    ids = torch.tensor([held_out_ids(tokenizer, length + continuation, seed)], device=lm.device)
    prompt = read(lm, ids[:, :length], ids[:, length:])

    def chances(cache: Stored) -> Tensor:
        return continued(lm, cache, length - 1, prompt.tokens[:, :-1]).log_softmax(-1)

    full = chances(stored(prompt, None))
    others = {name: chances(cache) for name, cache in caches(prompt).items()}
    return {name: (full.exp() * (full - other)).sum(-1).mean().item() for name, other in others.items()}


def main(
    model: str = str(ROOT / "examples" / "tiny_decoder" / "model"),
    tasks: str = "tracking",
    lengths: str = "4096,8192",
    places: str = "inside",
    prompts: int = 300,
    seed: int = SEED,
    methods: str = ",".join(VARIANTS),
    texts: Annotated[int, typer.Option(help="Texts for the KL divergence.", show_default="a tenth of --prompts")] = -1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, tokenizer = load(model, device, "bfloat16" if device == "cuda" else "float32")
    names, where = split_methods(methods), listed(places, PLACES, "--places")
    texts = -(-prompts // 10) if texts < 0 else texts
    rows: dict[str, dict[str, float]] = {name: {} for name in names}

    def caches(prompt: Prompt) -> dict[str, Stored]:
        return {name: stored(prompt, parse_method(name)) for name in names}

    with torch.no_grad():
        for length in numbers(lengths, "--lengths"):
            for task in listed(tasks, FACT_TASKS, "--tasks"):
                for i in track(range(prompts), f"{task}, {length} tokens"):
                    for (name, place), (right, share) in answers(lm, tokenizer, task, length, seed + i, names, where).items():
                        for column, value in ((f"{task}_{length}_{place}", right), (f"bytes_{length}", share / len(where))):
                            count = prompts * (len(tasks.split(",")) if column.startswith("bytes") else 1)
                            rows[name][column] = rows[name].get(column, 0.0) + value / count
                print(task, length, {name: row for name, row in rows.items()}, flush=True)
            for i in range(texts):
                for name, kl in text_kl(lm, tokenizer, length, seed + i, caches).items():
                    rows[name][f"kl_{length}"] = rows[name].get(f"kl_{length}", 0.0) + kl / texts
    columns = list(rows[names[0]])
    table = Table("stored", *columns, title=f"exact match of {prompts} prompts; KL(full || variant) on text, nats")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:.4f}" if c.startswith("kl") else f"{row[c]:.1%}" for c in columns))
    Console(width=160).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({**provenance(device), "prompts": prompts, "rows": rows}, indent=1) + "\n")


def answers(
    lm, tokenizer, task: str, length: int, seed: int, names: list[str], places: list[str]
) -> dict[tuple[str, str], tuple[bool, float]]:
    """Of each variant and place, whether the answer to one prompt is right, and the share of the dense bytes."""
    sample = make_sample(task, length, seed, tokenizer)

    def tokens(text: str, **settings) -> Tensor:
        return tokenizer(text, return_tensors="pt", **settings).input_ids.to(lm.device)

    context, question = tokens(sample.prompt), tokens(sample.question, add_special_tokens=False)
    answer = tokens(sample.completion, add_special_tokens=False)
    ids = torch.cat([context, question, answer], 1)
    whole = read(lm, ids[:, : -answer.shape[1]], answer)
    found = {}
    for place in places:
        n = context.shape[1] if place == "after" else whole.keys.shape[2]
        prompt = whole.until(n)
        for name in names:
            cache = stored(prompt, parse_method(name))
            logits = continued(lm, cache, n, ids[:, n:-1])
            # The first token of an answer is the prefill's own where the question is inside.
            told = answer.shape[1] - (place == "inside")
            right = (logits[-told:].argmax(-1) == answer[0, -told:]).all()
            found[name, place] = bool(right), cache.share
    return found


if __name__ == "__main__":
    typer.run(main)
