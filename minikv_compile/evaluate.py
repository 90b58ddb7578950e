"""Accuracy per byte: methods on tasks, with the full cache beside them. `minikv eval` runs this."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import log
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from .haystack import held_out_ids
from .longbench import CONTINUED
from .measure import compiled_forward, parse_method
from .peers import parse_peer, peer_report
from .report import CacheReport, cache_report
from .results import Cell, Failure
from .tasks import make_sample

PLACES = ("inside", "after")
"""The question at the end of the compressed prompt, where the selection of tokens sees it; or as a second turn after
it, as a cache meets it that is used again."""
TEXT = "text"
"""The task without a question: held-out source code, gone on with after a compressed prefix."""


class Question(Protocol):
    """What can be asked: `tasks.Sample`, `longbench.Record`, or your own."""

    prompt: str
    question: str
    new_tokens: int
    metric: str

    def score(self, completion: str) -> float: ...


class Fed(Question, Protocol):
    """A question whose right reply is known to the letter, so that it can be fed."""

    completion: str


@dataclass(frozen=True)
class Group:
    """The prompts of one cell."""

    task: str
    length: int
    questions: Sequence[Question] = ()
    texts: Sequence[Sequence[int]] = ()
    """Token ids: a prefix of `length` and its continuation. Instead of questions."""
    batch: int = 1
    """Prompts answered at once, where the question is inside: equally long ones, as padding counts as dense bytes."""

    def asked(self, places: Sequence[str]) -> list[str]:
        """In which of the places. Texts have no question, and what is predicted comes after the prompt."""
        return [place for place in PLACES if place in (places if self.questions else ("after",))]

    def __len__(self) -> int:
        return len(self.questions) + len(self.texts)


def make_group(
    task: str, length: int, prompts: int, seed: int, tokenizer: Any, batch: int = 1, chat: bool = False,
    continuation: int = 256,
) -> Group:  # fmt: skip
    """The prompts of a generated task, from the seeds `seed`, `seed + 1`, ...

    Args:
        task: of `tasks.TASKS`, or "text".
        chat: put the prompts into the tokenizer's chat template, and look for the answer anywhere in the reply.
        continuation: tokens of text to predict after the prefix.
    """
    seeds = range(seed, seed + prompts)
    if task == TEXT:
        return Group(task, length, texts=[held_out_ids(tokenizer, length + continuation + 1, s) for s in seeds])
    samples = [make_sample(task, length, s, tokenizer) for s in seeds]
    if chat:
        samples = [in_chat(replace(s, metric="found" if s.metric == "exact" else s.metric), tokenizer) for s in samples]
    return Group(task, length, samples, batch=batch)


def in_chat(sample: Any, tokenizer: Any) -> Any:
    """A sample (a dataclass with `prompt` and `question`) as a user's message in the tokenizer's chat template."""
    message = [{"role": "user", "content": sample.prompt + sample.question}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token
    if bos and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(bos)  # the tokenizer will add it
    end = text.index(sample.prompt.lstrip()) + len(sample.prompt.lstrip())
    return replace(sample, prompt=text[:end], question=text[end:])


def record_groups(records: Sequence[Any], length: int, tokenizer: Any, chat: bool = False) -> list[Group]:
    """The records of a file (`longbench.load_records`), a group for each data set."""
    if chat:
        records = [record if record.task in CONTINUED else in_chat(record, tokenizer) for record in records]
    names = dict.fromkeys(record.task for record in records)
    return [Group(name, length, [record for record in records if record.task == name]) for name in names]


@dataclass(frozen=True)
class Runner:
    """A method on a model."""

    plain: Callable[..., Any]
    """The model's forward with the full cache."""
    forward: Callable[..., Any]
    """The one with the method's."""
    report: Callable[[Any, int, int], CacheReport]
    """Of a cache, its rows, and the tokens that went into each of them."""


@contextmanager
def running(model: Any, method: str, inner: str) -> Iterator[Runner]:
    """
    Raises:
        ConfigError, PeerError: there is no such method, or it cannot run.
    """
    if (peer := parse_peer(method)) is not None:
        yield Runner(model.forward, peer.forward(model), partial(peer_report, model))
        return
    with compiled_forward(model, parse_method(method), inner) as plain:
        yield Runner(plain, model.forward, lambda cache, rows, tokens: cache_report(cache))


def run_methods(
    model: Any, tokenizer: Any, methods: Sequence[str], groups: list[Group], places: Sequence[str] = PLACES,
    inner: str = "inductor", on_prompts: Callable[[str, int], None] = lambda method, n: None, fed: bool = False,
) -> Iterator[Cell | Failure]:  # fmt: skip
    """Run methods over all groups, cell by cell.

    Args:
        methods: "full", presets with or without changes (`measure.parse_method`), or peers (`peers.parse_peer`).
        places: of `PLACES`; texts have no question and always run.
        inner: compiler of the rewritten graphs.
        on_prompts: called with the method and the number of prompts done, after each batch.
        fed: answers are fed (`feed`), not generated. Peers need it.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for method in methods:
        yield from _run_method(model, tokenizer, method, groups, places, inner, partial(on_prompts, method), fed)


def _run_method(model, tokenizer, method: str, groups, places, inner: str, on_prompts, fed: bool) -> Iterator[Cell | Failure]:
    try:
        with running(model, method, inner) as runner, torch.no_grad():
            for place in PLACES:
                for group in groups:
                    if place in group.asked(places):
                        yield _run_cell(model, runner, tokenizer, method, place, group, on_prompts, fed)
    except Exception as error:  # other people's code: the others go on, and the results say why it did not
        if parse_peer(method) is None:
            raise
        yield Failure(method, f"{type(error).__name__}: {error}")


def _run_cell(model, runner: Runner, tokenizer, method: str, place: str, group: Group, on_prompts, fed: bool) -> Cell:
    begun, scores, reports, texts = time.perf_counter(), [], [], []
    for ids in group.texts:
        text, report = continue_text(runner, torch.tensor([ids], device=model.device), group.length, tokenizer)
        texts.append(text)
        reports.append(report)
        on_prompts(1)
    size = group.batch if place == "inside" or fed else 1
    for i in range(0, len(group.questions), size):
        batch = group.questions[i : i + size]
        if fed:
            replies, report = feed(model, runner, tokenizer, batch, place)
        else:
            replies, report = (ask_inside if place == "inside" else ask_after)(model, tokenizer, batch)
        scores += [question.score(reply) for question, reply in zip(batch, replies, strict=True)]
        reports.append(report)
        on_prompts(len(batch))
    held, dense = (sum(getattr(report, name) for report in reports) for name in ("bytes", "dense_bytes"))
    return Cell(
        method, place, group.task, group.length, len(group),
        metric=group.questions[0].metric if group.questions else "agreement",
        score=fmean(scores or [text.agreement for text in texts]),
        cache_bytes=held / len(group), share_of_dense_bytes=held / dense, seconds=time.perf_counter() - begun,
        bits_per_byte=sum(t.bits for t in texts) / sum(t.bytes for t in texts) if texts else None,
        kl=fmean(text.kl for text in texts) if texts else None,
    )  # fmt: skip


def feed(
    model: Any, runner: Runner, tokenizer: Any, batch: Sequence[Fed], place: str
) -> tuple[list[str], CacheReport]:
    """Replies to equally long prompts: the right ones are fed at once after the compressed prompts, and the likeliest token
    at each place is the reply's. So a reply is right where a greedy one is, which is found in two calls instead of one a
    token; a wrong one goes on as if it had been right so far. The report is the compressed prompts'.

    Shorter prompts begin with empty lines, so that there is no padding, which not every method knows, and that the length
    is a multiple of 8, which HQQ needs.
    """

    def ids(text: str, **settings) -> list[int]:
        return tokenizer(text, **settings).input_ids

    prompts = [ids(q.prompt + q.question if place == "inside" else q.prompt) for q in batch]
    asked = [[] if place == "inside" else ids(q.question, add_special_tokens=False) for q in batch]
    told = [ids(q.completion, add_special_tokens=False) for q in batch]
    special, empty = len(ids("")), ids("\n", add_special_tokens=False)[-1:]
    longest = -(-max(map(len, prompts)) // 8) * 8
    prompts = [p[:special] + empty * (longest - len(p)) + p[special:] for p in prompts]
    rest = [a + t for a, t in zip(asked, told, strict=True)]
    fed = max(map(len, rest)) - 1
    rest = [(r + empty * fed)[:fed] for r in rest]
    first = _prefill(runner.forward, torch.tensor(prompts, device=model.device))
    cache = first.past_key_values
    report = runner.report(cache, len(batch), longest)
    then = runner.forward(input_ids=torch.tensor(rest, device=model.device), past_key_values=cache, use_cache=True)
    likeliest = torch.cat([first.logits[:, -1:].argmax(-1), then.logits.argmax(-1)], 1).tolist()
    replies = [
        tokenizer.decode(row[len(a) : len(a) + len(t)], skip_special_tokens=True)
        for row, a, t in zip(likeliest, asked, told, strict=True)
    ]
    return replies, report


def ask_inside(model: Any, tokenizer: Any, batch: Sequence[Question]) -> tuple[list[str], CacheReport]:
    """Greedy replies to prompts that end with their questions, and the cache after them."""
    prompts = [question.prompt + question.question for question in batch]
    ids = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    new_tokens = max(question.new_tokens for question in batch)
    return _generate(model, tokenizer, ids["input_ids"], new_tokens, attention_mask=ids["attention_mask"])


def ask_after(model: Any, tokenizer: Any, batch: Sequence[Question]) -> tuple[list[str], CacheReport]:
    """The greedy reply to one question that follows a prompt whose cache is compressed by then, and the cache."""
    (question,) = batch
    prompt = tokenizer(question.prompt, return_tensors="pt").input_ids.to(model.device)
    turn = tokenizer(question.question, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    ids = torch.cat([prompt, turn], -1)
    cache = _prefill(model.forward, prompt).past_key_values
    return _generate(
        model, tokenizer, ids, question.new_tokens, past_key_values=cache, attention_mask=torch.ones_like(ids)
    )


def _generate(model, tokenizer, ids: Tensor, new_tokens: int, **inputs: Any) -> tuple[list[str], CacheReport]:
    out = model.generate(
        ids, **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    replies = tokenizer.batch_decode(out.sequences[:, ids.shape[1] :], skip_special_tokens=True)
    return replies, cache_report(out.past_key_values)


def _prefill(forward: Callable[..., Any], ids: Tensor) -> Any:
    """A prompt, read: its cache, and the logits of its last token at least."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
    return forward(input_ids=ids, use_cache=True, **last)


@dataclass(frozen=True)
class Continuation:
    """How well a text is predicted that follows a compressed prefix."""

    bits: float
    """-log2 of the text's probability."""
    bytes: int
    agreement: float
    """Share of the tokens where the likeliest one is the full cache's."""
    kl: float
    """KL(full || method), mean over the tokens, in nats."""


def continue_text(
    runner: Runner, ids: Tensor, length: int, tokenizer: Any
) -> tuple[Continuation, CacheReport]:
    """Teacher-forced continuation of a prefix: its tokens are fed at once, each sees the compressed prefix and the
    continuation before it. The report is the prefix's.

    Args:
        ids: int64 [1, length + n + 1]; the n last tokens are predicted.
    """

    def predict(forward: Callable[..., Any]) -> tuple[Tensor, CacheReport]:
        cache = _prefill(forward, ids[:, :length]).past_key_values
        report = runner.report(cache, 1, length)
        out = forward(input_ids=ids[:, length:-1], past_key_values=cache, use_cache=True)
        return out.logits[0].float().log_softmax(-1), report

    told = ids[0, length + 1 :]
    (full, _), (mine, report) = predict(runner.plain), predict(runner.forward)
    text = Continuation(
        bits=-mine.gather(-1, told[:, None]).sum().item() / log(2),
        bytes=len(tokenizer.decode(told, clean_up_tokenization_spaces=False).encode()),
        agreement=(full.argmax(-1) == mine.argmax(-1)).float().mean().item(),
        kl=torch.nn.functional.kl_div(mine, full, reduction="none", log_target=True).sum(-1).mean().item(),
    )
    return text, report

