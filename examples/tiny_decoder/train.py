"""Trains the tiny decoder: a Llama with grouped-query attention that reads source code and finds facts in it.

    python train.py tokenizer --out model            # minutes on one core
    python train.py train --tokenizer model --out model    # minutes on one H200
    python train.py readme --results model/results.json    # writes the measured results into README.md

Training needs no data but the Python sources of the machine that it runs on, and no package beyond torch, transformers
and numpy. It stops by the clock: `--minutes` covers everything from data preparation to the final evaluation.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import _path  # noqa: E402, F401  the package without what it depends on

from minikv_compile import haystack, tasks  # noqa: E402

START = time.monotonic()

VOCABULARY = 4096
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
# A newline is never merged with what follows it, so lines can be spliced as token ids.
WORDS = Regex(r"\n+| ?_*\p{L}+|[0-9]{1,3}| ?[^\s\p{L}0-9]+|[^\S\n]+(?!\S)|[^\S\n]+")

EXTRA_PACKAGES = ("torch", "transformers", "numpy", "scipy", "sympy", "sklearn", "pandas", "networkx", "matplotlib",
                  "jax", "skimage", "statsmodels")
MAX_PACKAGE_BYTES = 12_000_000

# What a token is, and how much its loss weighs. Facts and questions are mostly random: their loss is noise.
TEXT, FACT, ANSWER = 0, 1, 2


# Tokenizer


def train_tokenizer(out: Path) -> None:
    """Byte-level BPE in which every group of one to three digits is one token."""
    digit_groups = [f"{n:0{width}}" for width in (2, 3) for n in range(10**width)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(digit_groups), special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(_tokenizer_texts(), trainer)

    # The trainer saw no digits, so groups cannot collide with learned merges; `ignore_merges` makes a group that is in
    # the vocabulary one token without merges that would lead there.
    learned = json.loads(bpe.to_str())["model"]
    vocabulary = learned["vocab"] | {group: len(learned["vocab"]) + i for i, group in enumerate(digit_groups)}
    bpe = Tokenizer(models.BPE(vocabulary, [tuple(merge) for merge in learned["merges"]], ignore_merges=True))
    bpe.pre_tokenizer = _pre_tokenizer()
    bpe.decoder = decoders.ByteLevel()
    bos = SPECIAL_TOKENS[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=SPECIAL_TOKENS[1], pad_token=SPECIAL_TOKENS[2],
        model_max_length=16384, clean_up_tokenization_spaces=False)
    tokenizer.save_pretrained(out)
    print(f"{len(tokenizer)} tokens in {out}")


def _pre_tokenizer():
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _tokenizer_texts():
    for path in haystack.source_files("train"):
        yield re.sub("[0-9]", "", haystack.read_source(path))
    # Often enough that every word of the tasks becomes one token: facts are then short and equally long.
    words = "".join(tasks.task_words())
    for _ in range(5000):
        yield words


# Data


@dataclass
class Corpus:
    """All training text in one array, and where its lines begin."""

    ids: np.ndarray
    line_starts: np.ndarray


def collect_corpus(tokenizer, extra_packages: list[str]) -> Corpus:
    files = haystack.source_files("train")
    for name in extra_packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            continue
        found = haystack.python_files(Path(spec.submodule_search_locations[0]))
        random.Random(name).shuffle(found)
        total = 0
        for path in found:
            total += path.stat().st_size
            if total > MAX_PACKAGE_BYTES:
                break
            files.append(path)
    random.Random("corpus").shuffle(files)

    eos = tokenizer.eos_token_id
    arrays = []
    for i in range(0, len(files), 256):
        texts = [text for path in files[i:i + 256] if (text := haystack.read_source(path))]
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            arrays.append(np.array([*encoding.ids, eos], np.int16))
    ids = np.concatenate(arrays)
    # A long run of newlines is several tokens; only behind the last of them may something be spliced in.
    is_newline = np.array([set(tokenizer.decode([i])) == {"\n"} for i in range(len(tokenizer))])[ids]
    return Corpus(ids, np.flatnonzero(is_newline[:-1] & ~is_newline[1:]) + 1)


class SequenceMaker:
    """Splices facts, questions and answers as token ids into source code."""

    def __init__(self, corpus: Corpus, tokenizer):
        self.corpus = corpus
        self.bos = np.array([tokenizer.bos_token_id], np.int16)
        self._encode = lambda fragment: tokenizer.encode(fragment, add_special_tokens=False)
        self._ids: dict[str, list[int]] = {}

    def make(self, length: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        """`length` token ids and what each is: TEXT, FACT or ANSWER."""
        draw = rng.random()
        if draw < 0.1:
            events = []
        elif draw < 0.35:
            events = self._events(rng, length, only=("keys",), fact_share=rng.uniform(0.3, 0.95), ask_share=1.0)
        else:
            # From one fact in a long text, as the evaluation has it, to many, from which most is learned.
            share = math.exp(rng.uniform(math.log(0.004), math.log(0.5)))
            events = self._events(rng, length, only=None, fact_share=share, ask_share=0.35)
        return self._splice(events, length, rng)

    def _events(self, rng: random.Random, length: int, only, fact_share: float, ask_share: float) -> list:
        """(depth, ids, kinds) of each fact and question; depths from 1 on are for the questions at the end."""
        maker = tasks.ItemMaker(rng, "train")
        kinds = only or rng.choice((("single", "tracking", "multivalue"), ("single",), ("tracking",), ("multivalue",)))
        items, events, used, room = [], [], 0, length - 1
        while used < fact_share * length:
            item = maker.make(rng.choice(kinds))
            lines = [(depth, self.encode(line)) for depth, line in tasks.spread(item.lines, rng)]
            n_tokens = sum(len(ids) for _, ids in lines)
            if used + n_tokens > room:
                break
            used += n_tokens
            events += [(depth, ids, FACT, 0) for depth, ids in lines]
            items.append((item, lines[-1][0]))

        rng.shuffle(items)
        room = min(room - used, ask_share * length)
        sprinkle = rng.choice((0.0, 0.3)) if only is None else 0.0
        for item, depth in items:
            question = self.encode(item.question(rng, "train"))
            answer = self.encode((*item.answer, "\n"))
            room -= len(question) + len(answer)
            if room < 0:
                break
            # Rounding puts facts and questions at the same line; this keeps a question behind its last fact.
            asked_at = rng.uniform(depth, 1) if rng.random() < sprinkle else 1 + rng.random()
            events.append((asked_at, question + answer, FACT, len(answer)))
        events.sort(key=lambda event: event[0])
        return events

    def _splice(self, events: list, length: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        corpus = self.corpus
        n_source = length - 1 - sum(len(ids) for _, ids, _, _ in events)
        first = rng.randrange(np.searchsorted(corpus.line_starts, len(corpus.ids) - length))
        start = corpus.line_starts[first]
        source = corpus.ids[start:start + n_source]
        last = np.searchsorted(corpus.line_starts, start + n_source, side="right")
        lines = corpus.line_starts[first:last] - start

        pieces, kinds, done = [self.bos], [np.zeros(1, np.uint8)], 0
        at_line = [int(min(depth, 1) * (len(lines) - 1)) for depth, *_ in events]
        for line, (_, ids, kind, n_answer) in zip(at_line, events, strict=True):
            cut = lines[line]
            if cut > done:
                pieces.append(source[done:cut])
                kinds.append(np.zeros(cut - done, np.uint8))
                done = cut
            pieces.append(np.array(ids, np.int16))
            marks = np.full(len(ids), kind, np.uint8)
            marks[len(ids) - n_answer:] = ANSWER
            kinds.append(marks)
        # What is left after the last whole line follows the questions.
        pieces.append(source[done:])
        kinds.append(np.zeros(n_source - done, np.uint8))
        return np.concatenate(pieces), np.concatenate(kinds)

    def encode(self, fragments: tasks.Fragments) -> list[int]:
        known, ids = self._ids, []
        for fragment in fragments:
            if fragment not in known:
                known[fragment] = self._encode(fragment)
            ids += known[fragment]
        return ids


# Sequence lengths, as fractions of the longest, with their shares of the steps: most is learned on short sequences,
# where tokens are cheap, the rest is stretching to the full length.
CURRICULUM = (
    (0.25, {1 / 8: 0.7, 1 / 4: 0.3}),
    (0.50, {1 / 8: 0.3, 1 / 4: 0.4, 1 / 2: 0.3}),
    (0.65, {1 / 4: 0.3, 1 / 2: 0.4, 1: 0.3}),
    (1.00, {1 / 8: 0.1, 1 / 4: 0.1, 1 / 2: 0.2, 1: 0.6}),
)


class Batches(torch.utils.data.IterableDataset):
    """Endless [batch, length + 1] arrays of ids and kinds, of constant size in tokens; the length follows progress."""

    def __init__(self, maker: SequenceMaker, tokens: int, max_length: int, seed: int):
        self.maker, self.tokens, self.max_length, self.seed = maker, tokens, max_length, seed
        self.progress = multiprocessing.get_context("fork").Value("d", 0.0)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}-{worker.id if worker else 0}")
        while True:
            shares = next(shares for end, shares in CURRICULUM if self.progress.value <= end)
            length = int(self.max_length * rng.choices(list(shares), list(shares.values()))[0])
            rows = [self.maker.make(length + 1, rng) for _ in range(self.tokens // length)]
            yield tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))


# Model


class Runner:
    """Runs a `LlamaForCausalLM`'s own parameters, quicker for training than its forward.

    Between attention calls everything is per token, so it is compiled once on a flat list of tokens, whatever the
    sequence length is.
    """

    def __init__(self, model: LlamaForCausalLM, dtype: torch.dtype, compiled: bool):
        self.model, self.config, self.dtype = model, model.config, dtype
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.before_attention, self.after_attention = wrap(before_attention), wrap(after_attention)
        self.token_loss = wrap(token_loss)
        self.rotation: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, length] ids -> [batch * length, width], before the final norm."""
        (batch, length), config = ids.shape, self.config
        decoder = self.model.model
        if length not in self.rotation:
            self.rotation[length] = tuple(
                t[0].to(self.dtype) for t in decoder.rotary_emb(
                    torch.zeros(1, device=ids.device), torch.arange(length, device=ids.device)[None]))
        cos, sin = (t.repeat(batch, 1) for t in self.rotation[length])
        x = F.embedding(ids, decoder.embed_tokens.weight).to(self.dtype).flatten(0, 1)
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = self.before_attention(
                x, cos, sin, layer.input_layernorm.weight, attention.q_proj.weight, attention.k_proj.weight,
                attention.v_proj.weight, config.head_dim, config.rms_norm_eps)
            q, k, v = (t.unflatten(0, (batch, length)).transpose(1, 2) for t in qkv)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self.after_attention(
                x, attended.transpose(1, 2).reshape(batch * length, -1), layer.post_attention_layernorm.weight,
                attention.o_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
                config.rms_norm_eps)
        return x

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, length + 1] ids -> [batch * length] losses of the next tokens."""
        return self.token_loss(self.hidden(ids[:, :-1]), self.model.model.norm.weight,
                               self.model.model.embed_tokens.weight, ids[:, 1:].flatten(), self.config.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits(hidden, self.model.model.norm.weight, self.model.model.embed_tokens.weight,
                      self.config.rms_norm_eps)


def linear(x, weight):
    return F.linear(x, weight.to(x.dtype))


def norm(x, weight, eps):
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


def before_attention(x, cos, sin, norm_weight, q, k, v, head_dim: int, eps: float):
    x = norm(x, norm_weight, eps)
    q, k, v = (linear(x, weight).unflatten(-1, (-1, head_dim)) for weight in (q, k, v))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(x, attended, norm_weight, out, gate, up, down, eps: float):
    x = x + linear(attended, out)
    y = norm(x, norm_weight, eps)
    return x + linear(F.silu(linear(y, gate)) * linear(y, up), down)


def logits(x, norm_weight, embedding, eps: float):
    return linear(norm(x, norm_weight, eps), embedding).float()


def token_loss(x, norm_weight, embedding, targets, eps: float):
    return F.cross_entropy(logits(x, norm_weight, embedding, eps), targets, reduction="none")


def build_model(args, tokenizer) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=args.width, intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 192), head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=16384, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    for layer in model.model.layers:
        # Branches start at nothing: deep layers then learn from the first step on.
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def choose_attention(model_config, tokens: int, length: int) -> None:
    """Enables the faster of the fused attention kernels; which one it is depends on the GPU and the release."""
    heads = (model_config.num_attention_heads, *2 * [model_config.num_key_value_heads])
    inputs = [torch.randn(tokens // length, length, n, 64, device="cuda", dtype=torch.bfloat16) for n in heads]
    times, gradients = {}, {}
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)  # At this size it would take all of the memory.
    for name in ("flash", "cudnn"):
        torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
        torch.backends.cuda.enable_flash_sdp(name == "flash")
        try:
            for _ in range(3):
                leaves = [t.clone().requires_grad_() for t in inputs]
                torch.cuda.synchronize()
                begin = time.monotonic()
                out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), is_causal=True,
                                                     enable_gqa=True)
                out.transpose(1, 2).reshape(tokens, -1).square().sum().backward()
                torch.cuda.synchronize()
                times[name] = time.monotonic() - begin
            gradients[name] = torch.cat([t.grad.flatten().float() for t in leaves])
        except RuntimeError as error:
            times.pop(name, None)
            log(f"{name} attention does not run here: {str(error).splitlines()[0]}")
    # A quick kernel with wrong gradients would only show as a model that learns badly.
    if len(gradients) == 2 and (gradients["cudnn"] - gradients["flash"]).norm() > 0.05 * gradients["flash"].norm():
        log("cudnn attention's gradients are not flash attention's")
        del times["cudnn"]
    best = min(times, key=times.get)
    torch.backends.cuda.enable_cudnn_sdp(best == "cudnn")
    torch.backends.cuda.enable_flash_sdp(best == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    log(f"attention: {best} of " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in times.items()))


# Evaluation


@dataclass
class Example:
    """A sample as token ids; the last `n_answer` are the answer's."""

    task: str
    ids: list[int]
    n_answer: int


_tokenizer = None  # The evaluation's worker processes inherit it.


def make_example(task: str, length: int, seed: int) -> Example:
    sample = tasks.make_sample(task, length, seed, _tokenizer)
    answer = _tokenizer.encode(sample.completion, add_special_tokens=False)
    return Example(task, _tokenizer.encode(sample.prompt + sample.question) + answer, len(answer))


def make_examples(lengths: list[int], n: int, workers: int) -> dict[int, list[Example]]:
    haystack.source_text("eval")  # Read once, here, and inherited.
    jobs = [(task, length, seed) for length in lengths for task in tasks.FACT_TASKS for seed in range(n)]
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        examples = list(pool.map(make_example, *zip(*jobs, strict=True), chunksize=8))
    return {length: [e for e, job in zip(examples, jobs, strict=True) if job[1] == length] for length in lengths}


@torch.inference_mode()
def exact_match(runner: Runner, examples: list[Example], device, n_tokens: int = 65536) -> dict[str, float]:
    """The share of each task's answers of which every token, the final newline too, is the likeliest one."""
    longest = max(len(e.ids) for e in examples)
    batch_size = max(1, n_tokens // longest)
    right = {e.task: [] for e in examples}
    for i in range(0, len(examples), batch_size):
        batch = examples[i:i + batch_size]
        ids = torch.tensor([e.ids + [0] * (longest - len(e.ids)) for e in batch], device=device)
        hidden = runner.hidden(ids).unflatten(0, ids.shape)
        for e, row, states in zip(batch, ids, hidden, strict=True):
            answer = slice(len(e.ids) - e.n_answer, len(e.ids))
            predicted = runner.logits(states[answer.start - 1:answer.stop - 1]).argmax(-1)
            right[e.task].append((predicted == row[answer]).all())
    return {task: torch.stack(oks).float().mean().item() for task, oks in right.items()}


@torch.inference_mode()
def bits_per_byte(runner: Runner, tokenizer, length: int, device, n_chars: int) -> float:
    """Of held-out source code, in pieces of `length` tokens."""
    ids = tokenizer.encode(haystack.held_out_text(n_chars), add_special_tokens=False)
    bits = n_bytes = 0
    for i in range(0, len(ids) - length + 1, length):
        piece = ids[i:i + length]
        bits += runner.loss(torch.tensor([[tokenizer.bos_token_id, *piece]], device=device)).sum().item() / math.log(2)
        n_bytes += len(tokenizer.decode(piece).encode())
    return bits / n_bytes


# Training


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with `match_rms_adamw`, quicker: it updates all matrices of one shape together."""

    def __init__(self, matrices: list[torch.Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        by_shape: dict[torch.Size, list[torch.Tensor]] = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": same} for same in by_shape.values()], defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradients = torch.stack([p.grad for p in matrices])
            state = self.state[matrices[0]]
            if not state:
                state["average"] = torch.zeros_like(gradients)
            average = state["average"].lerp_(gradients, 1 - momentum)
            update = orthogonal(gradients.lerp(average, momentum)).float()
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, update.unbind(), alpha=-lr * 0.2 * max(matrices[0].shape) ** 0.5)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrix to each of a stack of matrices: five Newton-Schulz iterations in bf16."""
    is_tall = x.size(1) > x.size(2)
    x = x.bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


def make_optimizers(model: LlamaForCausalLM, lr: float, fused: bool) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest."""
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
    in_layers = set(map(id, layers))
    rest = [p for p in model.parameters() if id(p) not in in_layers]
    return [
        Muon(layers, lr=lr, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
    ]


def lr_scale(progress: float) -> float:
    return min(1.0, progress / 0.02, (1 - progress) / 0.45)


def save(model: LlamaForCausalLM, out: Path) -> None:
    """In bf16, in shards that fit where large files do not."""
    weights = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.save_pretrained(out, max_shard_size="15MB")


def train(args) -> None:
    global _tokenizer
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    end_of_training = START + 60 * args.minutes - args.reserve
    tokenizer = _tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer)
    lengths = sorted(args.eval_lengths)

    corpus = collect_corpus(tokenizer, args.extra_packages)
    log(f"corpus: {len(corpus.ids) / 1e6:.1f}M tokens")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Processes fork from here on.
    examples = make_examples(lengths, args.eval_samples, max(1, args.workers))
    quick = {length: [e for i, e in enumerate(examples[length]) if i % args.eval_samples < 16]
             for length in (lengths[0], lengths[-1])}
    log("evaluation samples made")

    batches = Batches(SequenceMaker(corpus, tokenizer), args.batch_tokens, args.max_length, args.seed)
    on_gpu = torch.cuda.is_available()
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=args.workers, pin_memory=on_gpu,
        prefetch_factor=2 if args.workers else None, multiprocessing_context="fork" if args.workers else None))
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = build_model(args, tokenizer).to(device)
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    if on_gpu:
        choose_attention(model.config, args.batch_tokens, args.max_length)
    runner, plain = Runner(model, dtype, compiled=on_gpu), Runner(model, dtype, compiled=False)
    optimizers = make_optimizers(model, args.lr, fused=on_gpu)
    kind_weights = torch.tensor([1.0, 0.1, args.answer_weight], device=device)

    step = seen = last_seen = 0
    begin = last_time = None
    next_check, saved = 0.1, False
    for ids, kinds in loader:
        ids, kinds = (t.to(device, non_blocking=True).long() for t in (ids, kinds))
        kinds = kinds[:, 1:].flatten()
        losses = runner.loss(ids)
        weights = kind_weights[kinds]
        ((losses * weights).sum() / weights.sum()).backward()
        if step == 0:  # Everything is compiled now: the schedule's clock starts.
            log(f"first step, loss {losses.detach().mean().item():.2f}")
            begin = last_time = time.monotonic()
        progress = min(1.0, (time.monotonic() - begin) / (end_of_training - begin))
        batches.progress.value = progress
        if progress >= 1:
            break
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_scale(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += kinds.numel()

        if step % args.log_every == 0:
            text, answers = (losses.detach()[kinds == kind].mean().item() for kind in (TEXT, ANSWER))
            now = time.monotonic()
            log(f"step {step} {progress:.0%} length {ids.shape[1] - 1} text {text:.3f} answers {answers:.3f} "
                f"{seen / 1e6:.0f}M tokens, {(seen - last_seen) / (now - last_time) / 1e3:.0f}K/s")
            last_seen, last_time = seen, now
        if progress >= next_check:
            next_check += 0.1
            for length, chosen in quick.items():
                log(f"  exact match at {length}: " + format_scores(exact_match(plain, chosen, device)))
            last_seen, last_time = seen, time.monotonic()
        if progress >= 0.93 and not saved:  # Something to keep if the time limit strikes.
            save(model, args.out)
            saved = True

    del loader
    save(model, args.out)
    log(f"{step} steps, {seen / 1e6:.0f}M tokens; model saved")
    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": seen,
        "corpus_tokens": len(corpus.ids),
        "minutes": round((time.monotonic() - START) / 60, 2),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "samples_per_cell": args.eval_samples,
        "exact_match": {},
    }
    # As it is shipped: with the weights rounded to bf16.
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    for length in lengths:
        results["exact_match"][str(length)] = scores = exact_match(plain, examples[length], device)
        log(f"exact match at {length}: " + format_scores(scores))
    results["bits_per_byte"] = bits_per_byte(plain, tokenizer, args.max_length, device, n_chars=128 * args.max_length)
    log(f"held-out source: {results['bits_per_byte']:.3f} bits per byte")
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(results_table(results))
    if on_gpu:
        log(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def format_scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{task} {score:.2f}" for task, score in scores.items())


def log(message: str) -> None:
    print(f"{time.monotonic() - START:6.1f} s  {message}", flush=True)


# README


def results_table(results: dict) -> str:
    """The measured results in Markdown."""
    lengths = results["exact_match"]
    rows = ["| task | " + " | ".join(f"{length} tokens" for length in lengths) + " |",
            "| --- |" + " ---: |" * len(lengths)]
    rows += [f"| {task} | " + " | ".join(f"{lengths[n][task]:.1%}" for n in lengths) + " |" for task in tasks.FACT_TASKS]
    return (f"Exact match on {results['samples_per_cell']} evaluation samples per cell, and "
            f"{results['bits_per_byte']:.3f} bits per byte of held-out source code, with the weights in bf16, as shipped. "
            f"Trained on {results['training_tokens'] / 1e6:.0f}M tokens in {results['minutes']:.1f} minutes on one "
            f"{results['device']}.\n\n" + "\n".join(rows))


def write_readme(args) -> None:
    readme = Path(__file__).parent / "README.md"
    table = results_table(json.loads(args.results.read_text()))
    begin, end = "<!-- results -->\n", "<!-- end of results -->"
    before, _, rest = readme.read_text().partition(begin)
    readme.write_text(before + begin + table + "\n" + end + rest.partition(end)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    here = Path(__file__).parent

    command = commands.add_parser("tokenizer", help="train the tokenizer")
    command.add_argument("--out", type=Path, default=here / "model")
    command.set_defaults(run=lambda args: train_tokenizer(args.out))

    command = commands.add_parser("train", help="train and evaluate the model",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--tokenizer", type=Path, default=here / "model", help="folder of the trained tokenizer")
    command.add_argument("--out", type=Path, default=here / "model", help="folder for weights and results.json")
    command.add_argument("--minutes", type=float, default=9.0, help="time for everything after the imports")
    command.add_argument("--reserve", type=float, default=35.0, help="seconds of it for saving and evaluation")
    command.add_argument("--layers", type=int, default=8)
    command.add_argument("--width", type=int, default=384)
    command.add_argument("--max-length", type=int, default=8192)
    command.add_argument("--batch-tokens", type=int, default=131072)
    command.add_argument("--lr", type=float, default=3e-3)
    command.add_argument("--answer-weight", type=float, default=10.0, help="loss weight; source code weighs 1")
    command.add_argument("--eval-samples", type=int, default=200, help="per task and length")
    command.add_argument("--eval-lengths", type=int, nargs="+", default=(1024, 4096, 8192))
    command.add_argument("--extra-packages", nargs="*", default=EXTRA_PACKAGES, help="installed packages to read")
    command.add_argument("--workers", type=int, default=min(14, os.cpu_count() - 1))
    command.add_argument("--log-every", type=int, default=50)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=train)

    command = commands.add_parser("readme", help="write the results into README.md")
    command.add_argument("--results", type=Path, default=here / "model" / "results.json")
    command.set_defaults(run=write_readme)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
