"""The studies of `minikv study`: a question each, the methods that answer it, and what to draw them over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from .config import MiniKVConfig
from .evaluate import TEXT
from .peers import parse_peer
from .tasks import FACT_TASKS

SCORES, TIMES, PERSISTENCE = "scores", "times", "persistence"
BYTES, LENGTH, BITS, STEP = "bytes", "length", "net bits", "step"
"""What a study is drawn over, if not a field of the methods: percent of dense bytes, the prompt's tokens, all bits held per
number, the tokens that have been generated."""


@dataclass(frozen=True)
class Study:
    """What `study.run_study` measures and draws."""

    question: str
    methods: tuple[str, ...]
    """As `minikv eval` takes them. One that cannot run is named in the results with the reason."""
    x: str
    """A field of the methods, or one of the words above. Methods that differ in nothing else make a line."""
    kind: str = SCORES
    """"scores": `evaluate`; "times": prefill, decoding, memory and bytes on random tokens; "persistence": `persistence`."""
    tasks: tuple[str, ...] = ("multikey", "tracking", TEXT)
    lengths: tuple[int, ...] = (4096,)
    places: tuple[str, ...] = ("inside", "after")
    shapes: tuple[str, ...] = ()
    """Times: models of these shapes with random weights (`shapes.SHAPES`), instead of the model given."""
    layers: int | None = None
    """Of those models; None for all."""
    needs_gpu: bool = False


def each(template: str, **values: Iterable) -> tuple[str, ...]:
    """`template` with every combination of the values."""
    return tuple(template.format(**dict(zip(values, chosen, strict=True))) for chosen in product(*values.values()))


def at_fixed_bytes(share: float, group: int, bits: Iterable[int]) -> tuple[str, ...]:
    """Few tokens at many bits to many at few: policies that keep as many as `share` of the dense bytes allow, metadata
    included."""
    kept = {b: share / MiniKVConfig(bits=b, group=group).share_of_dense for b in bits}
    methods = "default:group={group}:bits={bits}:policy={policy}:heavy={heavy:.3f}"
    return tuple(
        methods.format(group=group, bits=b, policy=policy, heavy=part)
        for policy in ("observation_window", "key_outlier") for b, part in kept.items() if part <= 1
    )  # fmt: skip


def peers(ratios: Iterable[float]) -> tuple[str, ...]:
    """kvpress' methods at shares of the tokens that they drop, and transformers' `QuantizedCache`s."""
    presses = each("kvpress-{name}:ratio={ratio}", name=("snapkv", "pyramidkv", "knorm", "expected_attention"), ratio=ratios)
    return presses + each("{name}:bits={bits}", name=("quanto", "hqq"), bits=(2, 4))


KIVI = (
    "default:group=32:clip=1.0:metadata_bits=16:noise_correction=False:error_feedback=False:rotation=none:sinks=0:important=0"
    ":window=128"
)
"""KIVI (arXiv 2402.02750, section 3.3): keys in groups of 32 per channel, values of 32 per token, the newest 128 tokens
unquantized (its residual), nothing dropped."""


def h2o(tokens: int) -> str:
    """H2O (arXiv 2306.14048): eviction alone, half heavy hitters, half recent tokens, `tokens` of each at 16 bits: as all of
    them fit into the important tokens and the window, none is quantized."""
    budgets = f"heavy={tokens}:recent={tokens}:important={tokens}:window={tokens}"
    return f"default:policy=heavy_hitter:importance=heavy_hitter:sinks=0:{budgets}"


H2O_LENGTHS = (410, 820)
"""A tenth of 4K and of 8K: with as many recent ones 20% of the prompt."""
OTHERS = (KIVI, *map(h2o, H2O_LENGTHS))
"""Other people's methods that run on our cache."""


def is_other(method: str) -> bool:
    """Whether a method is not of our making."""
    return method in OTHERS or parse_peer(method) is not None


BUDGETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
POLICIES = ("observation_window", "key_outlier", "heavy_hitter", "q_hitter", "key_norm", "recent", "random")
OURS = (
    "default", "small", "tiny", "hybrid", "mikv", "mikv4", "minikv", "minikv:policy=observation_window",
    "minikv:policy=observation_window:heavy=0.5:recent=0.0",
)  # fmt: skip

STUDIES: dict[str, Study] = {
    "metadata": Study(
        "What do scales and zeros cost, and what are finer groups worth?",
        each(
            "default:important=0:rotation={rotation}:group={group}:metadata_bits={bits}",
            rotation=("none", "hadamard"), bits=(8, 16), group=(16, 32, 64, 128),
        ),
        x=BITS, tasks=("keys", "tracking", TEXT), places=("after",),
    ),
    "pyramid": Study(
        "How deep should the pyramid be?",
        each(
            "minikv:policy={policy}:pyramid_depth={depth}",
            policy=("heavy_hitter", "observation_window"), depth=(1, 2, 4, 7, 14, 28),
        ),
        x="pyramid_depth", places=("inside",),
    ),
    "pyramid-times": Study(
        "What does the pyramid cost in time and memory?",
        each("minikv:pyramid_depth={depth}", depth=(1, 2, 7, 28)),
        x="pyramid_depth", kind=TIMES, lengths=(16384,), shapes=("llama-3.1-8b",), layers=16, needs_gpu=True,
    ),
    "budgets": Study(
        "What is lost at which budget, by each policy?",
        each("default:policy={policy}:heavy={heavy}", policy=POLICIES, heavy=BUDGETS), x="heavy",
    ),
    "split": Study(
        "Heavy hitters or recent tokens, at half of the tokens?",
        tuple(
            f"default:policy={policy}:heavy={0.5 - recent}:recent={recent}"
            for policy in ("heavy_hitter", "observation_window", "key_outlier") for recent in (0.0, 0.125, 0.25, 0.375, 0.5)
        ),
        x="recent",
    ),
    "persistence": Study(
        "Do a prompt's heavy hitters stay heavy while text is generated?",
        ("heavy_hitter", "observation_window", "key_outlier", "random"), x=STEP, kind=PERSISTENCE, tasks=(TEXT,),
    ),
    "context": Study(
        "How does each policy do as prompts grow?",
        each("default:policy={policy}:heavy={heavy}", policy=POLICIES, heavy=(0.05, 0.25, 0.5, 0.95)),
        x=LENGTH, tasks=("multikey", "tracking"), lengths=(1024, 2048, 4096, 8192, 16384),
    ),
    "context-times": Study(
        "What does each policy cost as prompts grow?",
        (
            "full", "default",
            *each(
                "default:policy={policy}:heavy={heavy}",
                policy=("observation_window", "key_outlier", "heavy_hitter"), heavy=(0.05, 0.5, 0.95),
            ),
        ),
        x=LENGTH, kind=TIMES, lengths=(1024, 4096, 16384, 32768, 65536, 102400), shapes=("llama-3.1-8b",), layers=8,
        needs_gpu=True,
    ),
    "compression": Study(
        "Which kinds of tasks survive which compression?",
        (
            "full", "default:bits=8", "default:bits=4", "default:bits=4:policy=key_outlier:heavy=0.7", "default",
            *each(
                "default:policy={policy}:heavy={heavy}",
                policy=("key_outlier", "observation_window"), heavy=(0.75, 0.5, 0.25, 0.1),
            ),
        ),
        x=BYTES, tasks=(*FACT_TASKS, TEXT),
    ),
    "compression-shapes": Study(
        "What is saved of models of other shapes?",
        ("full", "default:bits=8", "default:bits=4", "default", "small", "tiny", "minikv"),
        x=LENGTH, kind=TIMES, lengths=(4096, 16384), shapes=("llama-3.1-8b", "qwen3-4b", "mistral-7b"), layers=8,
        needs_gpu=True,
    ),
    "mikv": Study(
        "Which precision do important and demoted tokens need, with and without balancer?",
        each(
            "mikv:important_bits={important}:bits={bits}:balancer={balancer}",
            important=(16, 8, 4), bits=(2, 4), balancer=("mikv", "none"),
        )
        + (h2o(410), h2o(655), "default", "small"),
        x=BYTES,
    ),
    "precision": Study(
        "Few tokens at 8 bits or many at 2, at a tenth of the dense bytes?",
        at_fixed_bytes(0.10, 64, (8, 4, 2)), x="bits",
    ),
    "pareto": Study(
        "Which score do the bytes buy, from us and from others?",
        (
            "full", *OURS, "default:bits=4", "default:bits=4:policy=key_outlier:heavy=0.75",
            *each("small:heavy={heavy}", heavy=(0.9, 0.5, 0.4)), *each("tiny:heavy={heavy}", heavy=(0.15, 0.08)),
            *OTHERS, *peers((0.65, 0.75, 0.8, 0.85, 0.9, 0.94)),
        ),
        x=BYTES, tasks=("single", "multikey", "keys", "tracking", TEXT), lengths=(4096, 8192),
    ),
}  # fmt: skip
