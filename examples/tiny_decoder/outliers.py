"""The shipped decoder with outlier channels in its keys: the same function, and keys that are hard to quantize.

    python examples/tiny_decoder/outliers.py outliers_model --factor 8 --pairs 4

Some pairs of channels that rotary embedding turns together are made larger in the keys' projection, and smaller in the
queries', by the same factor: every attention logit stays as it was. Larger models have such channels by themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MODEL = Path(__file__).resolve().parent / "model"


@torch.no_grad()
def plant_outliers(model: PreTrainedModel, factor: float, pairs: int, seed: int = 0) -> PreTrainedModel:
    """Scale `pairs` pairs of channels of every KV head by `factor` in its keys, and by 1 / `factor` in its queries.

    Args:
        model: of the Llama kind, without normalisation of queries and keys; changed in place.
        seed: of which pairs; others in each head.

    Returns:
        the model.
    """
    config = model.config
    heads, ratio = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention = layer.self_attn
        half = attention.head_dim // 2
        scale = torch.ones(heads, 2 * half)
        for head in scale:
            chosen = torch.randperm(half, generator=generator)[:pairs]
            head[chosen] = head[chosen + half] = factor
        scale = scale.to(attention.k_proj.weight)
        for projection, factors in ((attention.k_proj, scale), (attention.q_proj, 1 / scale.repeat_interleave(ratio, 0))):
            projection.weight *= factors.flatten()[:, None]
            if projection.bias is not None:
                projection.bias *= factors.flatten()
    return model


def main(
    out: Path,
    model: Annotated[str, typer.Option(help="A model of the Llama kind.")] = str(MODEL),
    factor: float = 8.0,
    pairs: int = 4,
    seed: int = 0,
) -> None:
    """Write a model with planted outliers to OUT."""
    plant_outliers(AutoModelForCausalLM.from_pretrained(model), factor, pairs, seed).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
