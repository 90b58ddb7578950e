"""Text for long prompts that needs no download: the source code of the running Python's standard library.

The packages in `HELD_OUT_PACKAGES` are the split "eval", which the shipped decoder was not trained on; all others are
the split "train". Models from elsewhere have read both.
"""

import functools
import random
import re
import sysconfig
from pathlib import Path

HELD_OUT_PACKAGES = (
    "asyncio", "concurrent", "email", "http", "json", "logging", "sqlite3", "tomllib", "unittest", "wsgiref", "xml",
    "zoneinfo",
)  # fmt: skip

# Not source that anybody reads: tests, tables, generated files and other people's packages.
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__",
    "__phello__", "lib-dynload",
}  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def source_files(split: str) -> list[Path]:
    """The standard library's sources in a fixed order: held-out packages for "eval", all others for "train"."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path for path in python_files(root)
        if (path.relative_to(root).parts[0] in HELD_OUT_PACKAGES) == (split == "eval")
    ]  # fmt: skip


def python_files(root: Path) -> list[Path]:
    """All Python sources below a folder, without tests, tables and generated files."""

    def skipped(part: str) -> bool:
        return part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES)

    return [path for path in sorted(root.rglob("*.py")) if not any(map(skipped, path.relative_to(root).parts))]


def read_source(path: Path) -> str:
    """The file's text with a newline at its end; empty where it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8").strip("\n")
    except (UnicodeDecodeError, OSError):
        return ""
    return text + "\n" if text else ""


@functools.cache
def source_text(split: str) -> str:
    """All sources of a split, one after the other."""
    return "".join(map(read_source, source_files(split)))


@functools.cache
def source_words() -> tuple[str, ...]:
    """The words of 4 to 10 small letters that occur in the standard library, sorted."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,10}\b", source_text("train") + source_text("eval")))))


def held_out_text(n_chars: int, seed: int = 0) -> str:
    """`n_chars` characters of the split "eval", from a random line on."""
    return _cut(source_text("eval"), n_chars, random.Random(f"held-out-{seed}").random())


def held_out_ids(tokenizer, n_tokens: int, seed: int = 0) -> list[int]:
    """The first `n_tokens` tokens of a held-out text, the special tokens that `tokenizer` puts before it included."""
    n_chars = 4 * n_tokens
    while len(ids := tokenizer.encode(held_out_text(n_chars, seed))) < n_tokens:
        n_chars *= 2
    return ids[:n_tokens]


def haystack(tokenizer, n_tokens: int, split: str, start: float) -> list[str]:
    """Lines of source code with about `n_tokens` tokens, from the relative position `start` in [0, 1) on."""
    source, n_chars = source_text(split), 4 * n_tokens
    while len(ids := tokenizer.encode(_cut(source, n_chars, start), add_special_tokens=False)) < n_tokens:
        n_chars *= 2
    text = tokenizer.decode(ids[: n_tokens - 1], clean_up_tokenization_spaces=False)
    return [line + "\n" for line in text.rstrip("\n").split("\n")]


def _cut(text: str, n_chars: int, start: float) -> str:
    """`n_chars` characters from a line near the relative position `start` on, around the end if need be."""
    begin = text.find("\n", int(start * (len(text) - 1))) + 1
    while len(text) - begin < n_chars:
        text += text
    return text[begin : begin + n_chars]
