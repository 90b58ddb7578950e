"""What the share of a group's range that four codes span does to the attention output (docs/design.md).

    python benchmarks/clipping.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from minikv_compile.cli import load
from minikv_compile.kernels.packing import BLOCK, dequantize, quantize
from minikv_compile.rotation import hadamard
from minikv_compile.tasks import make_sample

ROOT = Path(__file__).resolve().parent.parent
GROUP, QUERIES, SHARES = 64, 128, (1.0, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


def captured(model, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """q, k and v of every layer's attention, fp32."""
    calls, sdpa = [], F.scaled_dot_product_attention

    def recording(q, k, v, **settings):
        calls.append((q[0], k[0], v[0]))
        return sdpa(q, k, v, **settings)

    F.scaled_dot_product_attention = recording
    try:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)
    finally:
        F.scaled_dot_product_attention = sdpa
    return calls


def stored(x: torch.Tensor, axis: str, clip: float, search: tuple[float, ...] = ()) -> torch.Tensor:
    """`x` [heads, tokens, head_dim] after rotation, 2-bit quantization and back; with `search`, each group's best."""
    rotation = hadamard(x.shape[-1])
    blocks = (x @ rotation).unflatten(1, (-1, BLOCK))
    best, least = None, None
    for share in search or (clip,):
        back = dequantize(*quantize(blocks, 2, GROUP, axis, share), GROUP, axis)
        grouped = (back - blocks).square()
        error = (grouped.unflatten(-2, (-1, GROUP)).mean(-2, keepdim=True).expand(-1, -1, -1, GROUP, -1).flatten(-3, -2)
                 if axis == "token" else
                 grouped.unflatten(-1, (-1, GROUP)).mean(-1, keepdim=True).expand(-1, -1, -1, -1, GROUP).flatten(-2))  # fmt: skip
        best = back if best is None else torch.where(error < least, back, best)
        least = error if least is None else torch.minimum(error, least)
    return best.flatten(1, 2) @ rotation.T


def output_error(q, k, v, clip: float, search: tuple[float, ...] = ()) -> float:
    tokens = k.shape[1] // BLOCK * BLOCK
    k, v = k[:, :tokens], v[:, :tokens]
    query = q[:, -QUERIES:].reshape(k.shape[0], -1, k.shape[2])

    def attend(k, v):
        return (query @ k.transpose(-1, -2) * k.shape[2] ** -0.5).softmax(-1) @ v

    exact = attend(k, v)
    got = attend(stored(k, "token", clip, search), stored(v, "channel", clip, search))
    return ((got - exact).norm() / exact.norm()).item()


def main() -> None:
    model, tokenizer = load(str(ROOT / "examples" / "tiny_decoder" / "model"), "cpu", "float32")
    sample = make_sample("tracking", 4096, 77, tokenizer)
    layers = captured(model, tokenizer(sample.prompt + sample.question, return_tensors="pt")["input_ids"])
    for share in SHARES:
        print(f"{share:5.2f}  {sum(output_error(*layer, share) for layer in layers) / len(layers):.3f}")
    search = (1.0, 0.9, 0.8, 0.7, 0.6)
    print(f" best  {sum(output_error(*layer, 1.0, search) for layer in layers) / len(layers):.3f}")


if __name__ == "__main__":
    main()
