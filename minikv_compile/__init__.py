"""Run any decoder LLM from a packed 2-bit KV cache: a torch.compile backend."""

from .backend import MiniKVBackend, compile, is_active, minikv_backend
from .cache import MiniKVCache
from .config import ConfigError, MiniKVConfig
from .packed import PackedInt
from .policy import Policy
from .report import cache_report, explain
from .tensor import KVTensor

__all__ = [
    "ConfigError", "KVTensor", "MiniKVBackend", "MiniKVCache", "MiniKVConfig", "PackedInt", "Policy", "cache_report",
    "compile", "explain", "is_active", "minikv_backend",
]  # fmt: skip
