"""Time of the host in a decode step on a `DynamicCache`, beside the same with Dynamo's guards on the tensors inside `KVTensor`s:
    python benchmarks/host.py [--layers 32]

Tiny layers on a CPU, and a captured step whose replay does nothing: Dynamo, the boundary and the model's own Python are left.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from minikv_compile import MiniKVBackend, compat, stepgraph
from minikv_compile.passes import step

PROMPT, WARM_UP, STEPS = 600, 12, 30
"""Tokens; all steps end before the first flush."""


def steps(layers: int) -> list[float]:
    """Milliseconds of each step."""
    torch.compiler.reset()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32,
        )
    ).bfloat16().eval()  # fmt: skip
    forward = torch.compile(LlamaForCausalLM.forward.__get__(model), backend=MiniKVBackend(inner="eager"))
    ids, cache, times = torch.randint(0, 64, (1, PROMPT)), DynamicCache(), []
    with torch.inference_mode():
        forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for place in range(PROMPT, PROMPT + WARM_UP + STEPS):
            places = torch.full((1, 1), place)
            begun = time.perf_counter()
            forward(ids[:, :1], past_key_values=cache, position_ids=places, use_cache=True)
            times.append(1e3 * (time.perf_counter() - begun))
    return times[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest step counts, on a shared machine")
    args = parser.parse_args()
    step.DEVICES.add("cpu")
    stepgraph.capture = lambda run, device, old: (SimpleNamespace(replay=lambda: None), run())
    leave_unguarded, best = compat.leave_unguarded, {}
    for _ in range(args.rounds):
        for name, leave in (("guarded", lambda nodes: None), ("unguarded", leave_unguarded)):
            compat.leave_unguarded = leave
            best[name] = min(best.get(name, float("inf")), *steps(args.layers))
    print(f"torch {torch.__version__}, {args.layers} layers, fastest step: guarded {best['guarded']:.2f} ms, "
          f"unguarded {best['unguarded']:.2f} ms, {best['unguarded'] / best['guarded']:.2f} of it")  # fmt: skip


if __name__ == "__main__":
    main()
