"""A local JSONL file in LongBench's format, and LongBench's English metrics.

LongBench (arXiv 2308.14508, table 1 and appendix): one JSON object per line with the fields `context`, `input`,
`answers` (the best match counts), `all_classes`, `dataset`. The data sets' prompts come with LongBench's repository
(`config/dataset2prompt.json`); `load_records` takes that file as it is.
"""

from __future__ import annotations

import difflib
import json
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATE = "{context}\n\n{input}\n\nAnswer:"


def qa_f1(reply: str, answer: str, classes: list[str]) -> float:
    """F1 of the words in common; case, punctuation and articles do not count (SQuAD's)."""
    words, truth = Counter(_normal_words(reply)), Counter(_normal_words(answer))
    return 2 * (words & truth).total() / max(words.total() + truth.total(), 1)


def rouge_l(reply: str, answer: str, classes: list[str]) -> float:
    """F of the longest common subsequence; 0 for an empty text."""
    from rouge import Rouge  # the implementation behind LongBench's published scores

    try:
        return Rouge(metrics=["rouge-l"]).get_scores([reply], [answer])[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


def classification(reply: str, answer: str, classes: list[str]) -> float:
    """1 / the number of classes that the reply names, if the right one is among them. A class whose name is part of
    the right one's does not count."""
    named = [name for name in classes if name in reply and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def count(reply: str, answer: str, classes: list[str]) -> float:
    """The share of the reply's numbers that are the right one."""
    numbers = re.findall(r"\d+", reply)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(reply: str, answer: str, classes: list[str]) -> float:
    """The share of the reply's numbers that are the right paragraph's; `answer` is "Paragraph 7"."""
    return count(reply, re.sub(r"\D", "", answer), classes)


def code_similarity(reply: str, answer: str, classes: list[str]) -> float:
    """Similarity of the first line that is neither a comment nor Markdown, in whole percent (fuzzywuzzy's ratio)."""
    lines = (line for line in reply.lstrip("\n").split("\n") if not re.search("[`#]|//", line))
    return round(100 * difflib.SequenceMatcher(None, next(lines, ""), answer).ratio()) / 100


Metric = Callable[[str, str, list[str]], float]
METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1, "rouge_l": rouge_l, "classification": classification, "count": count, "retrieval": retrieval,
    "code_similarity": code_similarity,
}  # fmt: skip

DATASETS: dict[str, tuple[str, int]] = {
    "narrativeqa": ("qa_f1", 128), "qasper": ("qa_f1", 128), "multifieldqa_en": ("qa_f1", 64),
    "hotpotqa": ("qa_f1", 32), "2wikimqa": ("qa_f1", 32), "musique": ("qa_f1", 32), "triviaqa": ("qa_f1", 32),
    "gov_report": ("rouge_l", 512), "qmsum": ("rouge_l", 512), "multi_news": ("rouge_l", 512),
    "samsum": ("rouge_l", 128), "trec": ("classification", 64), "passage_count": ("count", 32),
    "passage_retrieval_en": ("retrieval", 32), "lcc": ("code_similarity", 64), "repobench-p": ("code_similarity", 64),
}  # fmt: skip
"""Metric, and how many tokens a reply may have."""

FEW_SHOT = ("trec", "triviaqa", "samsum")
"""Prompts of examples: a model goes on with the next one after its answer, so only the first line counts."""
CONTINUED = (*FEW_SHOT, "lcc", "repobench-p")
"""Prompts that a chat model just continues too, without a chat template."""


@dataclass(frozen=True)
class Record:
    """One line of a file, ready to be asked. The same fields as `tasks.Sample`, where they mean the same."""

    task: str
    prompt: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    new_tokens: int
    metric: str

    def score(self, completion: str) -> float:
        """The best match with any of the answers, in [0, 1]."""
        if self.task in FEW_SHOT:
            completion = completion.lstrip("\n").split("\n")[0]
        return max(METRICS[self.metric](completion, answer, list(self.classes)) for answer in self.answers)


def load_records(
    path: Path, tokenizer: Any, max_length: int, template: str = TEMPLATE, metric: str | None = None,
    limit: int | None = None,
) -> list[Record]:  # fmt: skip
    """Read a file; prompts of more than `max_length` tokens, question included, lose their middle.

    Args:
        template: of a prompt, with the places {context}, {input} and any other field; or the path of a JSON file with
            a template for each data set. What stands after {context} is the question.
        metric: of `METRICS`, for all records; None is each data set's own.
        limit: read so many records of each data set at most.

    Raises:
        ValueError: a field is missing or wrong; the message names it and the line.
    """
    templates = _templates(template)
    taken: Counter[str] = Counter()
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = _checked(json.loads(line), metric)
            dataset = fields["dataset"]
            if limit is not None and taken[dataset] >= limit:
                continue
            taken[dataset] += 1
            records.append(_record(fields, tokenizer, max_length, templates, metric))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from None
    if not records:
        raise ValueError(f"{path.name}: no records")
    return records


def cut_middle(prompt: str, question: str, tokenizer: Any, max_length: int) -> str:
    """The prompt without its middle, so that it has `max_length` tokens with its question, give or take what the seam
    changes: instructions mostly stand at the ends (as LongBench does)."""
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    room = max_length - len(tokenizer.encode(question))
    if len(ids) <= room:
        return prompt
    begin, end = max_length // 2, room - max_length // 2
    if end <= 0:
        raise ValueError(f"the question alone takes more than half of {max_length} tokens")
    first, last = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids[:begin], ids[-end:]))
    return first + last


def _record(fields: dict, tokenizer: Any, max_length: int, templates: dict[str, str], metric: str | None) -> Record:
    dataset = fields["dataset"]
    own_metric, new_tokens = DATASETS.get(dataset, ("", 64))
    template = templates.get(dataset, templates.get(""))
    if template is None:
        raise ValueError(f"field 'dataset': the template file has none for {dataset!r}")
    head, tail = template.split("{context}")
    try:
        prompt, question = head.format_map(fields) + fields["context"], tail.format_map(fields)
    except KeyError as error:
        raise ValueError(f"field {error} is missing: the template asks for it") from None
    prompt = cut_middle(prompt, question, tokenizer, max_length)
    answers, classes = tuple(fields["answers"]), tuple(fields.get("all_classes") or ())
    return Record(dataset, prompt, question, answers, classes, new_tokens, metric or own_metric)


def _checked(fields: Any, metric: str | None) -> dict:
    def check(ok: bool, field: str, must: str) -> None:
        if not ok:
            raise ValueError(f"field {field!r} must be {must}")

    def texts(value: object) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)

    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    fields = {"input": "", "dataset": ""} | fields
    fields["dataset"] = str(fields["dataset"]).removesuffix("_e")  # LongBench-E
    check(isinstance(fields.get("context"), str), "context", "a text")
    check(isinstance(fields["input"], str), "input", "a text")
    check(texts(fields.get("answers")), "answers", "a list of texts, one at least")
    known = f"one of {', '.join(DATASETS)}, or a metric must be given"
    check(metric is not None or fields["dataset"] in DATASETS, "dataset", known)
    needs_classes = (metric or DATASETS[fields["dataset"]][0]) == "classification"
    check(not needs_classes or texts(fields.get("all_classes")), "all_classes", "a list of texts: the classes")
    return fields


def _templates(template: str) -> dict[str, str]:
    """Data set -> template; the name "" stands for all."""
    found = json.loads(Path(template).read_text(encoding="utf-8")) if template.endswith(".json") else {"": template}
    for name, text in found.items():
        if text.count("{context}") != 1:
            raise ValueError(f"prompt template {name or text!r} must have the place {{context}} once")
    return found


def _normal_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
