"""Shapes of models that can be asked for by name, without their weights: for `minikv plan` and `minikv bench`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

SHAPES = {
    "llama-3.1-8b": partial(
        LlamaConfig,
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    "qwen3-4b": partial(
        Qwen3Config,
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=262144, tie_word_embeddings=True,
    ),
    "mistral-7b": partial(
        MistralConfig,
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32768, max_position_embeddings=262144, sliding_window=None,
    ),
    "tiny": partial(
        LlamaConfig,
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=512, max_position_embeddings=8192,
    ),
}  # fmt: skip
"""What makes the configuration of each. Positions reach further than the models', for long prompts."""


def load_config(model: str, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a named shape, with `layers` layers if given, or of a path or name of Hugging Face's.

    Raises:
        ValueError: neither a shape nor a model that can be found, or `layers` for a model that is no shape.
    """
    if model in SHAPES:
        return SHAPES[model](**({} if layers is None else {"num_hidden_layers": layers}))
    if layers is not None:
        raise ValueError(f"{model!r} has the layers that it has: a number of layers is for {', '.join(SHAPES)}")
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        kinds = f"a shape ({', '.join(SHAPES)}), a folder with a model, or a name of Hugging Face's"
        raise ValueError(f"{model!r} is not {kinds}: {error}") from None


def random_model(config: PretrainedConfig, device: torch.device | str, dtype: Any = None) -> PreTrainedModel:
    """A causal LM with random weights, for inference, made on `device`; on "meta", without data. `dtype`: the
    configuration's if None, bfloat16 where it says nothing."""
    dtype = dtype or config.dtype or torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def load_model(model: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A named shape with random weights, or the model of a path.

    Raises:
        ValueError: as `load_config`.
    """
    config = load_config(model, layers)
    if model in SHAPES:
        return random_model(config, device, dtype)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().requires_grad_(False).to(device)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers; what is shared counts once."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def title(model: str) -> str:
    """A model's name to print: of a folder, its last part."""
    return Path(model).name if Path(model).is_dir() else model
