"""A policy of one's own in twenty lines: what is each prompt token worth to each KV head?

    python examples/custom_policy.py

Reads a long text with facts planted in it, keeps 60% of the tokens of each layer at 2 bits by three policies at the same
bytes, and asks for one fact: the policy below, one that ships, and random tokens.
"""

import torch
import typer
from demo import HERE

from minikv_compile import MiniKVConfig, Policy
from minikv_compile.cli import load
from minikv_compile.measure import measure
from minikv_compile.tasks import make_sample


class Unusual(Policy):
    """Keys unlike the key just before them, and values far from the head's mean: what is new at its place."""

    name = "unusual"

    def score(self, prompt, config):
        keys, values = prompt.keys.float(), prompt.values.float()  # [kv_heads, n, head_dim], one row of a batch
        change = (keys - keys.roll(1, 1)).norm(dim=-1)
        change[:, 0] = 0
        return change * (values - values.mean(1, keepdim=True)).norm(dim=-1)  # [kv_heads, n], none negative


# A policy that looks at attention sets `observes = "all"` or "last" and reads `prompt.attention`, fp32 [kv_heads, n].


def main(length: int = 4096, seed: int = 0, inner: str = "eager") -> None:
    torch.manual_seed(seed)
    model, tokenizer = load(str(HERE / "tiny_decoder" / "model"))
    sample = make_sample("multikey", length, seed, tokenizer)
    print(f"{sample.question.strip()} Planted: {sample.answer}")
    for policy in (Unusual(), "key_outlier", "random"):
        config = MiniKVConfig(policy=policy, heavy=0.6)
        run = measure(model, tokenizer, sample.prompt + sample.question, config, sample.new_tokens, inner)
        verdict = "right" if sample.score(run.answer) == 1 else "wrong"
        print(f"{config.policy:12} {run.cache.bytes / run.cache.dense_bytes:6.1%} of dense: {run.answer.strip()!r}, {verdict}")


if __name__ == "__main__":
    typer.run(main)
