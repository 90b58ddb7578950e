"""Whether a prompt's heavy hitters stay heavy: the attention that chosen prompt tokens get from what follows the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .config import MiniKVConfig
from .haystack import held_out_ids
from .kernels.prefill import causal_attention_lse
from .kernels.scores import column_scores
from .policy import POLICIES, Prompt, score

WATCHED = "minikv_watched"
"""SDPA under a name of its own, which keeps what it is given."""
SHARE = 0.1
"""Of the prompt's tokens, chosen per KV head."""
STEPS = (16, 32, 64, 128, 256, 512, 1024)
"""Tokens after the prompt; each stands for those since the one before it."""


def persistence(
    model: Any, tokenizer: Any, policies: Sequence[str], length: int, prompts: int, seed: int
) -> Iterator[tuple[str, int, float]]:
    """Held-out texts are read: a prompt of `length` tokens and what follows it.

    Yields:
        (policy, step, share): of the attention that the tokens up to `step` after the prompt pay to it, the share that goes
        to the tenth of its tokens that the policy chose; mean over texts, layers and KV heads. "best" is the tenth that
        gets most of it.
    """
    shares = torch.zeros(len(policies) + 1, len(STEPS), dtype=torch.float64)
    for i in range(prompts):
        ids = torch.tensor([held_out_ids(tokenizer, length + STEPS[-1], seed + i)], device=model.device)
        with watched(model) as seen, torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
        for layer, tensors in enumerate(seen):
            shares += of_layer(*tensors, layer, policies, length).cpu() / (prompts * len(seen))
    for name, row in zip((*policies, "best"), shares.tolist(), strict=True):
        yield from ((name, step, share) for step, share in zip(STEPS, row, strict=True))


def of_layer(q: Tensor, k: Tensor, v: Tensor, layer: int, policies: Sequence[str], length: int) -> Tensor:
    """fp64 [policies + 1, steps].

    Args:
        q: [1, heads, length + steps, head_dim]; k, v: [1, kv_heads, length + steps, head_dim].
    """
    scale = q.shape[-1] ** -0.5
    ends = [length + step for step in STEPS]

    def attention(end: int, last: int | None) -> Tensor:
        """What the newest `last` of the first `end` tokens pay to the prompt: fp32 [kv_heads, length]."""
        q_, k_, v_ = (x[:, :, :end] for x in (q, k, v))
        return column_scores(q_, k_, causal_attention_lse(q_, k_, v_, scale)[1], scale, None, last)[0, :, :length]

    paid = [attention(end, end - begin) for begin, end in zip([length, *ends], ends, strict=False)]
    count, rows = round(SHARE * length), []
    for name in policies:
        config = MiniKVConfig(policy=name)
        last = {"all": None, "last": config.observed}.get(POLICIES[name].observes, 1)
        prompt = Prompt(length, layer, attention(length, last), k[0, :, :length], v[0, :, :length], None)
        chosen = score(name, prompt, config).topk(count, dim=-1).indices
        rows.append([(x.gather(1, chosen).sum(-1) / x.sum(-1)).mean() for x in paid])
    rows.append([(x.topk(count, dim=-1).values.sum(-1) / x.sum(-1)).mean() for x in paid])
    return torch.tensor(rows, dtype=torch.float64)


@contextmanager
def watched(model: Any) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """A model whose attention calls leave their queries, keys and values in a list."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(module, query, key, value, *args, **kwargs):
        seen.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(WATCHED, attend)
    AttentionMaskInterface.register(WATCHED, sdpa_mask)
    usual = model.config._attn_implementation
    model.set_attn_implementation(WATCHED)
    try:
        yield seen
    finally:
        model.set_attn_implementation(usual)
