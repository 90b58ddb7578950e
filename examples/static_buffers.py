"""A decoder in the style of gpt-fast: static K/V buffers that the model owns, a causal mask buffer, `input_pos`.

    python examples/static_buffers.py

runs it with its own buffers, then compiled with the minikv backend: the same tokens in `lossless`, and the bytes that the
cache takes under `default`. Weights are random, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikv_compile import MiniKVBackend, MiniKVConfig, cache_report, explain


class KVCache(nn.Module):
    """Keys and values of one layer, `[batch, kv_heads, max_length, head_dim]`."""

    def __init__(self, batch: int, max_length: int, heads: int, head_dim: int, dtype: torch.dtype):
        super().__init__()
        shape = (batch, heads, max_length, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens at their positions; returns the whole buffers."""
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k
        v_out[:, :, input_pos] = v
        return k_out, v_out


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.wqkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        batch, n, width = x.shape
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.wqkv(x).view(batch, n, -1, self.head_dim).transpose(1, 2).split(sizes, 1)
        k, v = self.kv_cache.update(input_pos, k, v)
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).reshape(batch, n, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.attention = Attention(width, heads, kv_heads)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), mask, input_pos)
        return x + self.down(F.silu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Tokens `[batch, n]` at positions `input_pos`, int64 [n] -> logits `[batch, n, vocabulary]`."""

    def __init__(self, vocabulary=256, layers=2, width=128, heads=4, kv_heads=2, max_length=2048):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(max_length, width)
        self.layers = nn.ModuleList(Block(width, heads, kv_heads) for _ in range(layers))
        self.norm, self.output = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.max_length = max_length

    def setup_caches(self, batch: int, max_length: int) -> None:
        """Make buffers for so many rows and tokens, and forget what the old ones held."""
        for block in self.layers:
            attention, dtype = block.attention, block.attention.wo.weight.dtype
            attention.kv_cache = KVCache(batch, max_length, attention.kv_heads, attention.head_dim, dtype)
        mask = torch.tril(torch.ones(max_length, max_length, dtype=torch.bool))
        self.register_buffer("causal_mask", mask, persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos]
        x = self.tokens(tokens) + self.positions(input_pos)
        for block in self.layers:
            x = block(x, mask, input_pos)
        return self.output(self.norm(x))


@torch.no_grad()
def generate(model: nn.Module, prompt: Tensor, new: int) -> Tensor:
    """Greedy tokens `[batch, new]` after `prompt`, `[batch, seq]`."""
    seq = prompt.shape[1]
    token = model(prompt, torch.arange(seq))[:, -1:].argmax(-1)
    tokens = [token]
    for position in range(seq, seq + new - 1):
        token = model(token, torch.tensor([position]))[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--inner", default="eager", help='what compiles the rewritten graph; "inductor" in earnest')
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Transformer().eval()
    prompt = torch.randint(0, 256, (1, arguments.prompt))
    model.setup_caches(1, 2048)
    expected = generate(model, prompt, arguments.new)
    print(f"its own buffers: {sum(b.untyped_storage().nbytes() for b in buffers(model)):,} bytes")
    for preset in ("lossless", "default"):
        torch.compiler.reset()
        model.setup_caches(1, 2048)
        compiled = torch.compile(model, backend=MiniKVBackend(MiniKVConfig.preset(preset), arguments.inner))
        tokens = generate(compiled, prompt, arguments.new)
        print(f"\n{preset}: {(tokens == expected).float().mean():.0%} of the tokens are those of the model's own buffers")
        print(cache_report(model))
    try:
        buffers(model)[0].sum()
    except RuntimeError as error:
        print(f"\nreading a buffer: {error}")
    model.setup_caches(1, 2048)
    print(explain(model, prompt, torch.arange(arguments.prompt)))


def buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("k_cache", "v_cache"))]


if __name__ == "__main__":
    main()
