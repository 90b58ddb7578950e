"""`MiniKVConfig`: what is kept, at which precision."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .budget import LAYER_BUDGETS
from .kernels.packing import BLOCK, metadata_dtype, value_group
from .policy import KEEP_ALL, POLICIES, Policy, check_policy
from .rotation import ROTATIONS

PLAIN = dict(clip=1.0, metadata_bits=16, noise_correction=False, error_feedback=False, rotation="none", sinks=0)
"""Without what papers before us do not have."""
MIKV = dict(
    PLAIN, group=0.5, key_axis="channel", balancer="mikv", important=0.2, importance="heavy_outlier", rotation="hadamard",
    error_feedback=True, clip=0.9,
)  # fmt: skip
PRESETS: dict[str, dict] = {
    "default": {},
    "minikv": dict(
        PLAIN, group=16, important=0, window=0, policy="heavy_hitter", heavy=0.25, recent=0.25, layer_budget="pyramid",
    ),
    "mikv": MIKV,
    "mikv4": {**MIKV, "important": 0.25, "important_bits": 4, "metadata_bits": 8},
    "hybrid": dict(policy="key_outlier", heavy=0.5, recent=0.25, important=128),
    "small": dict(policy="key_outlier", heavy=0.5, recent=0.25, window=32),
    "tiny": dict(policy="key_outlier", heavy=0.45, recent=0.05, window=32),
    "lossless": dict(bits=16, rotation="none", sinks=0, important=0, window=0),
}  # fmt: skip


BALANCERS = ("none", "mikv")

MAX_DENSE = 65536
"""Most sinks, important tokens, and tokens of a window."""


class ConfigError(ValueError):
    """A field of `MiniKVConfig` is out of range; the message names it."""


@dataclass(frozen=True, eq=False)
class MiniKVConfig:
    """How a backend compresses the KV cache. Immutable, hashable, validated.

    The defaults are the preset `default`: 2 bits, nothing dropped. See `MiniKVConfig.preset`.
    """

    bits: int = 2
    """Bits of a code: 2, 4 or 8; 16 keeps every token in the model's dtype (rewriting on, compression off)."""
    group: int | float = 128
    """Values that share one scale and one zero: 16, 32, 64 or 128. Keys: see `key_axis`. Values: channels of one token; a
    head dimension that `group` does not divide takes the largest power of two that does. (MiniKV section 3.3: 16; KIVI,
    arXiv 2402.02750: 32.) A float is a share of the head dimension (MiKV section 4: 0.5); keys then need the axis
    "channel"."""
    key_axis: str = "token"
    """What a group of keys lies along: "token", so that its values are of one channel (KIVI), or "channel", so that they are
    of one token (MiKV)."""
    clip: float | None = None
    """The share of a group's min-max range that its codes span, in (0, 1]; None for 0.85 at 2 bits and 1 at more. Less than 1
    lowers the error of most values for that of the largest: few codes fit a bell curve better so (docs/design.md)."""
    metadata_bits: int = 8
    """Bits of each scale, and of each zero: 8 or 16 (`kernels.packing`). Those of 8-bit codes always have 16. With 8, 2-bit codes
    of channels whose mean is further from zero than about 20 standard deviations, after rotation, lose precision."""
    noise_correction: bool = True
    """Lower the logits of packed tokens by half the variance of their rounding errors, as that of a sum of errors that are
    uniform within a step: `(logit scale)^2 / 24` times the sum of `(query * step)^2` over channels, half of that with
    `error_feedback`. Noise in a logit makes its
    exponential larger on the mean, so that packed tokens would draw attention from the others. At most 2 nats; nothing is
    stored for it. Only where `key_axis` is "token", in attention: what `.dequantize()` gives, and a model that goes on without
    the backend, have none of it."""
    error_feedback: bool = True
    """Round each key of the prompt so that its errors cancel in what the prompt's queries see of them (`minikv_compile.feedback`;
    GPTQ, arXiv 2210.17323). Costs no bytes, and 1 to 2% of a prefill of 32K tokens. What generation adds is rounded to nearest; so
    are heads of more than 256 channels, and the prompt of a `MiniKVCache` whose prefill ran eagerly."""
    rotation: str = "hadamard"
    """Orthogonal rotation of the head dimension before quantizing: "none" or "hadamard" (QuaRot, arXiv 2404.00456)."""
    balancer: str = "none"
    """What is done about key channels that are larger than others: "none", or "mikv": before they are quantized and rotated,
    keys are multiplied by sqrt(max |q| / max |k|) of each channel, over the first prompt, and queries divided by it
    (MiKV, arXiv 2402.18096, section 3.3). Unquantized tokens are not touched."""
    sinks: int = 4
    """First tokens of each row, held unquantized (StreamingLLM, arXiv 2309.17453), in tokens."""
    important: int | float = 64
    """Prompt tokens of each KV head, the most important ones, that are not demoted to `bits` (MiKV, arXiv 2402.18096, section
    3.2: its important tier). An int is tokens, beside the sinks. A float is a share of the prompt, in which sinks, window
    and buffer, MiKV's recent tokens, count: that share of a prompt's slots is not of `bits`."""
    important_bits: int = 16
    """Bits of the important tokens: 16 holds them unquantized beside the sinks; 8 or 4 make them a tier of their own, in
    whole blocks of 128 tokens."""
    importance: str = "key_outlier"
    """Which ones: those with the highest scores of a `Policy` (policy.py), a name or an object as in `policy`, of the tokens
    that would be packed otherwise. A prompt in parts is asked for its first part only, and what is generated never."""
    window: int = 64
    """Newest tokens, never quantized, in tokens: a rollback of up to `window` tokens is exact."""
    buffer: int = BLOCK
    """Room for tokens between the window and the next flush, in tokens: a multiple of 128. A flush quantizes whole
    blocks of 128 tokens. (MiniKV's residual length, 128.)"""
    policy: str = "keep_all"
    """Which prompt tokens are kept: "keep_all", or the name of a `Policy` (policy.py): "heavy_hitter" (MiniKV, H2O),
    "q_hitter", "observation_window" (SnapKV), "recent" (StreamingLLM), "key_norm", "key_outlier", "heavy_outlier", "random";
    or a `Policy` object of your own."""
    observed: int = 64
    """Newest prompt queries whose attention "observation_window" looks at, in tokens (SnapKV section 4)."""
    pool: int = 7
    """Neighbours whose highest score counts in "observation_window", in tokens: odd (SnapKV section 4.3)."""
    heavy: float | int = 0.5
    """Heavy-hitter budget, the mean over layers, per KV head: a float is a share of the prompt, an int is tokens. Like all budgets
    below it counts only with a `policy` that drops."""
    recent: float | int = 0.0
    """Recent budget, the same in every layer: newest prompt tokens that the policy keeps and packs like the heavy
    hitters. A float is a share of the prompt, an int is tokens."""
    layer_budget: str | tuple[float, ...] = "uniform"
    """How the heavy budget is spread over layers: "uniform", "pyramid" (MiniKV section 3.2), "pyramidkv" (arXiv
    2406.02069), each layer's share, relative to the others'; or "coverage", measured from the prompt: each layer keeps the
    fewest tokens that hold the share `coverage` of its scores in each KV head, at most `heavy`."""
    pyramid_depth: float | None = None
    """Pyramids: the last layer's heavy budget is the mean divided by this; the first layer's makes the mean come out
    (1 is uniform). None is the paper's: 7 for "pyramid" (MiniKV's delta), 20 for "pyramidkv" (its beta)."""
    coverage: float = 0.95
    """What the layer budget "coverage" covers: the share of the sum of a layer's scores that its heavy hitters hold, in
    (0, 1]. Sinks and recent tokens, which are kept in any case, do not count."""
    skip_layers: tuple[int, ...] = ()
    """Layers whose cache stays the model's own, uncompressed: indices of attention sites in execution order;
    negative ones count from the last."""
    min_prompt: int = 0
    """Prompts of fewer tokens stay whole and unquantized until generation fills `buffer`, in tokens."""
    strict: bool = False
    """Raise where a site cannot be rewritten, or where K or V hold NaN or inf, instead of reporting it."""

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, must: str) -> None:
            if not ok:
                raise ConfigError(f"MiniKVConfig.{field} = {getattr(self, field)!r}: must be {must}.")

        def count(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0

        def share(value: object) -> bool:
            return count(value) or (isinstance(value, float) and 0.0 <= value <= 1.0)

        check(isinstance(self.skip_layers, (tuple, list)), "skip_layers", "a tuple of layer indices")
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))
        check(count(self.bits) and self.bits in (2, 4, 8, 16), "bits", "2, 4, 8 or 16")
        check(
            count(self.group) and self.group in (16, 32, 64, 128) or isinstance(self.group, float) and 0 < self.group <= 1,
            "group", "16, 32, 64 or 128 values, or a share of the head dimension in (0.0, 1.0]",
        )  # fmt: skip
        check(self.key_axis in ("token", "channel"), "key_axis", '"token" or "channel"')
        check(
            isinstance(self.group, int) or self.key_axis == "channel",
            "key_axis", '"channel" where `group` is a share of the head dimension',
        )  # fmt: skip
        check(self.balancer in BALANCERS, "balancer", f"one of {', '.join(BALANCERS)}")
        check(count(self.important_bits) and self.important_bits in (4, 8, 16), "important_bits", "4, 8 or 16")
        check(
            self.clip is None or type(self.clip) in (int, float) and 0 < self.clip <= 1,
            "clip", "a share of the range in (0, 1], or None",
        )  # fmt: skip
        check(count(self.metadata_bits) and self.metadata_bits in (8, 16), "metadata_bits", "8 or 16")
        check(isinstance(self.noise_correction, bool), "noise_correction", "True or False")
        check(isinstance(self.error_feedback, bool), "error_feedback", "True or False")
        check(self.rotation in list(ROTATIONS), "rotation", f"one of {', '.join(ROTATIONS)}")
        for name in ("sinks", "window"):  # every row of every layer has room for them from the start
            ok = count(getattr(self, name)) and getattr(self, name) <= MAX_DENSE
            check(ok, name, f"a number of tokens from 0 to {MAX_DENSE}")
        check(
            share(self.important) and self.important <= MAX_DENSE,
            "important", f"a share of the prompt in [0.0, 1.0] or a number of tokens from 0 to {MAX_DENSE}",
        )  # fmt: skip
        check(
            count(self.buffer) and self.buffer >= BLOCK and self.buffer % BLOCK == 0,
            "buffer", f"a positive multiple of {BLOCK} tokens",
        )  # fmt: skip
        custom: dict[str, Policy] = {}
        for field in ("policy", "importance"):
            given = getattr(self, field)
            check(not isinstance(given, type), field, f"an object: {getattr(given, '__name__', '')}()")
            if isinstance(given, Policy):
                try:
                    check_policy(given)
                except ValueError as error:
                    raise ConfigError(f"MiniKVConfig.{field}: {error}") from None
                check(custom.setdefault(given.name, given) is given, field, "another name: two policies have this one")
                object.__setattr__(self, field, given.name)
        policies = {**POLICIES, **custom}
        check(self.policy in list(policies), "policy", f"one of {', '.join(POLICIES)}, or a Policy")
        scoring = [name for name in policies if name != KEEP_ALL]
        check(self.importance in scoring, "importance", f"one of {', '.join(scoring)}, or a Policy")
        check(count(self.observed) and self.observed > 0, "observed", "a positive number of tokens")
        check(count(self.pool) and self.pool % 2 == 1, "pool", "an odd number of tokens")
        check(share(self.heavy), "heavy", "a share of the prompt in [0.0, 1.0] or a number of tokens")
        check(share(self.recent), "recent", "a share of the prompt in [0.0, 1.0] or a number of tokens")
        if isinstance(self.layer_budget, list):
            object.__setattr__(self, "layer_budget", tuple(self.layer_budget))
        shares = self.layer_budget if isinstance(self.layer_budget, tuple) else ()
        check(
            all(type(share) in (int, float) and 0 <= share < math.inf for share in shares) and sum(shares) > 0
            if shares else self.layer_budget in list(LAYER_BUDGETS),
            "layer_budget", f"one of {', '.join(LAYER_BUDGETS)}, or each layer's share",
        )  # fmt: skip
        depth = self.pyramid_depth
        check(
            depth is None or type(depth) in (int, float) and 1 <= depth < math.inf,
            "pyramid_depth", "a finite number, at least 1, or None",
        )  # fmt: skip
        check(type(self.coverage) in (int, float) and 0 < self.coverage <= 1, "coverage", "a share in (0, 1]")
        check(
            all(isinstance(layer, int) and not isinstance(layer, bool) for layer in self.skip_layers),
            "skip_layers", "a tuple of layer indices",
        )  # fmt: skip
        check(count(self.min_prompt), "min_prompt", "a number of tokens, 0 or more")
        check(
            self.min_prompt == 0 or isinstance(self.important, int),
            "min_prompt", "0 where `important` is a share of the prompt",
        )  # fmt: skip
        check(isinstance(self.strict, bool), "strict", "True or False")
        check(
            not (self.bits == 16 and self.policy != KEEP_ALL),
            "policy", '"keep_all" when bits is 16',
        )  # fmt: skip
        observes = {policies[name].observes for name in self._scored} - {"nothing"}
        check(len(observes) < 2, "importance", f"a policy that observes the same queries as {self.policy!r}, or none")
        POLICIES.update(custom)  # known by their names once all else is right

    @classmethod
    def preset(cls, name: str, **changes: object) -> MiniKVConfig:
        """A named configuration, with `changes` to single fields.

        - `default`: 2 bits, group 128, 8-bit metadata, Hadamard, clipped, corrected for noise; 4 sinks, 64 outliers and a window
          of 64 unquantized; nothing dropped. About 16% of dense at 8K.
        - `minikv`: the paper's arithmetic and budgets (MiniKV section 4): 2 bits, group 16, 25% heavy hitters + 25%
          recent, pyramid of depth 7. About 14% at 8K. Drops half of the prompt: facts can be lost.
        - `mikv`: MiKV's (section 4): 20% of the prompt, heavy hitters and the newest, at 16 bits, the rest at 2, in groups of
          half a head along channels, balanced; nothing dropped. 33% of dense at 8K (head_dim 128), 36% (64). Before heavy hitters
          come the 3% furthest keys, and how codes are rounded is ours: rotated, clipped to 90%, with error feedback. The paper's
          is `mikv:importance=heavy_hitter:rotation=none:error_feedback=False:clip=1.0`.
        - `mikv4`: the same with a quarter at 4 bits, metadata of 8. 19% of dense at 8K (head_dim 128), 21% (64).
        - `hybrid`: drops a quarter of the prompt, packs most of the rest at 2 bits, and holds the 128 furthest outliers of
          each KV head unquantized. About 14% at 8K.
        - `small`: `default` without a quarter of the prompt, and with a smaller window. About 13% at 8K.
        - `tiny`: half of the prompt. About 10% at 8K. Facts stay, text suffers (docs/evaluation.md).
        - `lossless`: everything in the model's dtype: the rewriting without the compression.

        Raises:
            ConfigError: unknown name, or a change out of range.
        """
        if name not in PRESETS:
            raise ConfigError(f"MiniKVConfig.preset({name!r}): must be one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})  # type: ignore[arg-type]

    @classmethod
    def of(cls, given: MiniKVConfig | str | None) -> MiniKVConfig:
        """What callers pass: a configuration, the name of a preset, or None for `default`.

        Raises:
            ConfigError: unknown name. TypeError: anything else.
        """
        if given is None or isinstance(given, str):
            return cls.preset("default" if given is None else given)
        if not isinstance(given, MiniKVConfig):
            raise TypeError(f"config must be a MiniKVConfig or the name of a preset, not {type(given).__name__}.")
        return given

    @property
    def share_of_dense(self) -> float:
        """Bytes of a long prompt's cache, in the long run, as a share of a dense 16-bit one with heads of 128: codes and
        metadata of what is kept, without window and counters. Budgets in tokens count as everything, important ones as
        nothing."""
        if self.bits == 16:
            return 1.0
        kept = [part if isinstance(part, float) else 1.0 for part in (self.heavy, self.recent)]
        important = self.important if isinstance(self.important, float) else 0.0
        bits = important * self._stored_bits(self.important_bits) + (1 - important) * self._stored_bits(self.bits)
        return bits / 16 * (min(sum(kept), 1.0) if self.drops else 1.0)

    def clip_of(self, bits: int) -> float:
        """The share of a group's range that codes of `bits` bits span."""
        if self.clip is not None:
            return self.clip
        return 0.85 if bits == 2 else 1.0

    def _stored_bits(self, bits: int) -> float:
        """Of a number with codes of `bits` bits, metadata included, where heads have 128 channels."""
        if bits == 16:
            return 16
        return bits + 2 * 8 * metadata_dtype(bits, self.metadata_bits).itemsize / self.value_group(128)

    @property
    def room(self) -> int:
        """Tokens of the dense region behind the pinned ones: window and buffer."""
        return self.window + self.buffer

    def important_tokens(self, prompt: int = 0, kept: int | None = None) -> int:
        """Important tokens of each KV head of a row.

        Args:
            prompt: its tokens; 0 where nothing of it will be packed. kept: how many of them are kept; None for all.
        """
        if not self.pins:
            return 0
        kept = prompt if kept is None else kept
        count = self.important
        if isinstance(self.important, float):
            around = self.sinks + self.room
            count = max(0, min(round(self.important * prompt), kept) - around)
        if self.important_bits == 16:
            return count
        return min((count + BLOCK // 2) // BLOCK, max(0, kept - self.sinks - self.window) // BLOCK) * BLOCK

    def pinned(self, important: int) -> int:
        """Tokens at the front of the dense region that no flush moves, where so many are important."""
        return self.sinks + (important if self.important_bits == 16 else 0)

    @property
    def pins(self) -> bool:
        """Whether important tokens are held apart."""
        return self.important > 0 and self.bits < 16

    @property
    def two_tiers(self) -> bool:
        """Whether important tokens are a tier of their own."""
        return self.pins and self.important_bits < 16

    @property
    def counts_vary(self) -> bool:
        """Whether rows can differ in how many tokens are important."""
        return self.pins and (isinstance(self.important, float) or self.two_tiers)

    @property
    def balances(self) -> bool:
        """Whether keys are balanced."""
        return self.balancer != "none" and self.bits < 16

    @property
    def feeds_back(self) -> bool:
        """Whether keys of prompts are rounded with error feedback: more bits have no error worth it."""
        return self.error_feedback and self.bits < 8

    @property
    def noise(self) -> float:
        """What the sum of squares of a packed token's steps, as its logit has them, is multiplied by and subtracted. Error feedback
        leaves about half of the noise."""
        if not self.noise_correction or self.key_axis != "token" or self.bits >= 8:
            return 0.0
        return 1 / 48 if self.feeds_back else 1 / 24

    @property
    def drops(self) -> bool:
        """Whether prompt tokens can be dropped."""
        return self.policy != KEEP_ALL

    @property
    def by_layer(self) -> bool:
        """Whether it matters which layer of its model an attention is."""
        return bool(self.skip_layers) or self.drops and self.layer_budget not in ("uniform", "coverage")

    @property
    def observed_queries(self) -> int | None:
        """How many of the newest queries the policies observe: 0 for all, None if they observe nothing."""
        observes = {POLICIES[name].observes for name in self._scored}
        return 0 if "all" in observes else self.observed if "last" in observes else None

    @property
    def _scored(self) -> list[str]:
        """Policies whose scores are needed."""
        return ([self.policy] if self.drops else []) + ([self.importance] if self.pins else [])

    def value_group(self, head_dim: int) -> int:
        """Channels that share a scale and a zero."""
        if isinstance(self.group, int):
            return value_group(self.group, head_dim)
        return value_group(min(max(16, 1 << int(self.group * head_dim).bit_length() - 1), 128), head_dim)

    def __repr__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return f"MiniKVConfig({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def to_json(self) -> str:
        """One line that `from_json` turns back into an equal configuration: what ops and saved caches carry."""
        return self._json

    @cached_property
    def _json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    # As text, because 1 token and a share of 1.0 are equal numbers.
    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, MiniKVConfig) and self._json == other._json)

    def __hash__(self) -> int:
        return hash(self._json)

    def __deepcopy__(self, memo: dict) -> MiniKVConfig:
        return self

    @staticmethod
    @lru_cache
    def from_json(text: str) -> MiniKVConfig:
        return MiniKVConfig(**json.loads(text))

    def differences(self, other: MiniKVConfig) -> str:
        """The fields in which two configurations differ, as "field: mine / other's"."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return ", ".join(f"{k}: {mine[k]!r} / {theirs[k]!r}" for k in mine if mine[k] != theirs[k])
