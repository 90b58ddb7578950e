"""Tiny models with random weights, and what most tests do with them."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from minikv_compile import KVTensor, MiniKVBackend, MiniKVConfig

VOCAB = 97
PAD = 0  # never drawn as a token

on_cpu = pytest.mark.parametrize("each_device", ["cpu"], indirect=True)
"""Of tests whose error a GPU raises as an assertion of the device, after which its process can do nothing more."""

ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": None}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {"sliding_window": None}),
}


def tiny(architecture="llama", layers=2, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, mlp=64, **changes):
    """A decoder whose `generate` never stops early. Its weights are larger than usual: logits depend on every token."""
    config, model, fixed = ARCHITECTURES[architecture]
    model = model(
        config(
            vocab_size=VOCAB, hidden_size=heads * head_dim, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=16384,
            pad_token_id=PAD, bos_token_id=None, eos_token_id=None, initializer_range=0.2, **{**fixed, **changes},
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def prompt(length, batch=1):
    return torch.randint(1, VOCAB, (batch, length))


def greedy(model, ids, new=16, **inputs):
    """What `generate` returns: `.sequences`, `.logits` and `.past_key_values`."""
    return model.generate(
        ids, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True, **inputs
    )


def logits_of(generated):
    """[batch, new, vocabulary]."""
    return torch.stack(generated.logits, 1)


def make_backend(preset="lossless", inner="eager", **changes):
    return MiniKVBackend(MiniKVConfig.preset(preset, **changes), inner)


def compiled(model, backend):
    model.compile(backend=backend)
    return model


def kinds(backend):
    """For each graph, what its sites became."""
    return [[site.kind or site.reason for site in graph] for graph in backend.graphs]


def captured():
    """Graphs that Dynamo made, and breaks."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def all_compressed(cache):
    return all(isinstance(t, KVTensor) for layer in cache.layers for t in (layer.keys, layer.values))


def causal(q, k, v, past):
    """`scaled_dot_product_attention` as most decoders call it, for a prompt or for one token."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=not past, enable_gqa=q.shape[1] != k.shape[1])


class PlainDecoder(nn.Module):
    """A hand-written decoder: learned positions, K/V tuples, and any `attend(q, k, v, past, **inputs)`."""

    def __init__(self, attend=causal, layers=2, heads=4, kv_heads=2, head_dim=16):
        super().__init__()
        self.attend, self.heads, self.kv_heads, self.head_dim = attend, heads, kv_heads, head_dim
        width = heads * head_dim
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(2048, width)
        self.qkv = nn.ModuleList(nn.Linear(width, (heads + 2 * kv_heads) * head_dim) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, VOCAB)
        self.eval()

    def forward(self, ids, past=None, keep=True, **inputs):
        """ids [batch, n] -> logits [batch, n, vocabulary], ((keys, values), ...) of all tokens so far."""
        batch, n = ids.shape
        start = past[0][0].shape[2] if past is not None else 0
        x = self.tokens(ids) + self.positions(torch.arange(start, start + n, device=ids.device))
        kept = []
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            heads = qkv(x).view(batch, n, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
            if past is not None:
                k, v = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
            kept.append((k, v))
            x = x + out(self.attend(q, k, v, past is not None, **inputs).transpose(1, 2).flatten(2))
        return self.head(x), tuple(kept) if keep else None


@torch.no_grad()
def run_plain(model, ids, prompt_length, past=None, **inputs):
    """Logits of a prompt, then of the other tokens one by one: [batch, seq, vocabulary]; and the cache."""
    first, past = model(ids[:, :prompt_length], past, **inputs)
    logits = [first]
    for t in range(prompt_length, ids.shape[1]):
        step, past = model(ids[:, t : t + 1], past, **inputs)
        logits.append(step)
    return torch.cat(logits, 1), past
