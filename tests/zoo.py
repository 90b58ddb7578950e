"""Tiny causal language models of many families of transformers, and what the pass is expected to do with each."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, PAD = 128, 0

COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "ffn_dim": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False, "initializer_range": 0.2,
    "init_std": 0.2, "logit_scale": 1.0, "rotary_dim": 8, "window_size": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_chunk_size": 16, "query_pre_attn_scalar": 16, "use_cache": True,
}  # fmt: skip
"""Settings of every family whose configuration has them; weights larger than usual, so that every token matters."""

LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
SLIDING_FULL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR_FULL = {"layer_types": ["linear_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    changes: dict[str, Any] = field(default_factory=dict)
    """To `COMMON`."""
    taken: int = 2
    """Sites that are rewritten, in the prefill and in a decode step."""
    left: int = 0
    """Sites that are left alone."""
    why: str = ""
    """Part of the reason given for those."""
    attention: str = "sdpa"
    """`attn_implementation`: "eager" for families without SDPA."""
    unrolls: bool = False
    """Whether its recurrence is unrolled in the graph: long prompts take long to trace."""


def left(why, sites=2, taken=0, attention="sdpa", **changes):
    return Family(changes, taken, sites, why, attention)


FAMILIES = {
    "llama": Family(), "smollm3": Family(), "granite": Family(), "nemotron": Family(), "helium": Family(),
    "mistral": left("sliding window", sliding_window=8), "mistral (full)": Family({"sliding_window": None}),
    "ministral": left("sliding window", sliding_window=8), "mixtral": Family(),
    "qwen2": Family(), "qwen3": Family(), "qwen3_moe": Family(), "qwen3_next": Family(LINEAR_FULL, 1),
    "gemma": Family(), "gemma2": left("soft-capped", attention="eager", sliding_window=8),
    "gemma3_text": left(
        "sliding window", 2, 1, num_hidden_layers=3, sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma4_text": left("sliding window", 1, 1, **SLIDING_FULL),
    "gemma4_text (shared)": left(  # the last layers attend to keys and values of earlier ones
        "", 4, num_hidden_layers=4, num_kv_shared_layers=2, sliding_window=8,
        layer_types=SLIDING_FULL["layer_types"] * 2,
    ),
    "phi": Family(), "phi3": Family({"sliding_window": None}),
    "gpt2": Family(),
    "gpt_neo": left("its logits go through", attention="eager", attention_types=[[["global", "local"], 1]]),
    "gpt_neox": Family(), "gptj": Family(attention="eager"), "codegen": Family(attention="eager"),
    "gpt_bigcode": Family(), "gpt_oss": left("attention sinks", attention="eager", sliding_window=8),
    "opt": Family({"word_embed_proj_dim": 64}), "xglm": left("reshaped", attention="eager"), "biogpt": Family(),
    "bloom": left("reshaped", attention="eager"), "mpt": left("mask is not understood", attention="eager"),
    "falcon": Family(), "falcon (ALiBi)": left("ALiBi", alibi=True),
    "stablelm": Family(), "persimmon": Family(), "starcoder2": Family(),
    "olmo2": Family(),
    "cohere": Family(), "cohere2": left("sliding window", 1, 1, **SLIDING_FULL),
    "glm": Family(), "glm4": Family(),
    "exaone4": left("sliding window", 1, 1, **SLIDING_FULL),
    "modernbert-decoder": left("sliding window", 1, 1, local_attention=8, global_attn_every_n_layers=2),
    "llama4_text": left(
        "not what the model keeps", 1, 1, attention_chunk_size=8, intermediate_size_mlp=64,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "deepseek_v3": left("head_dim of keys and values differ", **LATENT),
    "diffllama": left("not what the model keeps", 4),
    "jamba": Family({"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False}, 1, unrolls=True),
    "bamba": Family({"attn_layer_indices": [1]}, 1), "falcon_h1": Family({"mamba_d_ssm": 64, "mamba_n_heads": 4}),
    "lfm2": Family({"layer_types": ["conv", "full_attention"]}, 1),
    "mamba": Family(taken=0, attention="eager", unrolls=True),
    "rwkv": Family(taken=0, attention="eager", unrolls=True),
}  # fmt: skip
"""By the model type, and a remark where one type stands for several kinds of attention."""


def known(name):
    """Whether the installed transformers has it."""
    return name.split()[0] in CONFIG_MAPPING


def build(name, attention=None):
    family = FAMILIES[name]
    kind = CONFIG_MAPPING[name.split()[0]]
    fields = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    common = {key: value for key, value in COMMON.items() if key in fields}
    config = kind(**{**common, **family.changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention or family.attention)
    model.generation_config.eos_token_id = None
    return model.float().eval()


def padded_prompts(*lengths):
    """Random tokens padded on the left, and their mask."""
    torch.manual_seed(1)
    ids = torch.randint(2, VOCAB, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids.where(mask, PAD), mask.long()
