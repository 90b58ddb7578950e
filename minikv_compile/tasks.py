"""Long-context tasks whose answers can be checked, generated without downloads.

A sample is a long prompt, a question and a short answer:

    >>> sample = make_sample("multikey", length_tokens=8192, seed=0, tokenizer=tokenizer)
    >>> text = generate(sample.prompt + sample.question)      # or: feed the prompt, then the question
    >>> sample.score(text)

The tasks follow RULER (arXiv 2404.06654, section 3 and appendix B), in the haystack of source code that `haystack`
makes:

    single       one key with its number                                                    (RULER: single NIAH)
    multikey     many keys, one is asked for                                                (multi-keys NIAH 1)
    keys         a haystack of nothing but keys, one is asked for                           (multi-keys NIAH 2)
    multivalue   keys that were given several numbers, all of one key's are asked for, in order
    tracking     chains of assignments; all variables that hold a number are asked for, in order
    common       a list of words, ten of which come more often                              (CWE)
    frequent     coded words, as frequent as a zeta distribution says; the top three        (FWE)
    instruction  a rule for the reply at the very beginning, then `multikey`: is the rule obeyed? (The risk of losing
                 the context's rules: MiKV, arXiv 2402.18096.)

Everything is a function of the seed, the tokenizer and the Python version (the haystack is the standard library's own
source). The "eval" split uses packages and pairings of sentence parts that the "train" split never shows.

The same generator feeds training: texts are made of `Fragments`, pieces that `tiny_decoder`'s tokenizer never merges
across, so that a trainer can concatenate their token ids instead of tokenizing every text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from string import ascii_lowercase

from .haystack import haystack, source_words

FACT_TASKS = ("single", "multikey", "keys", "multivalue", "tracking")
"""What the shipped decoder is trained on."""
TASKS = (*FACT_TASKS, "common", "frequent", "instruction")

Fragments = tuple[str, ...]

ADJECTIVES = tuple("""amber ancient arctic autumn azure bitter blue bold brave brass brief bright broad bronze calm
candid careful cheerful chilly clever cloudy coastal copper coral cosmic crimson crisp curious daring deep distant
dusty eager early eastern elegant emerald empty faint fancy fierce flat fluffy foggy frosty gentle giant gilded glad
golden graceful grand green grey happy hidden hollow honest humble icy indigo ivory jade jolly keen lavender lively
lonely loud lucky lunar mellow mighty misty modest narrow noble northern olive orange pale patient plain polite proud
purple quick quiet rapid royal ruby rustic scarlet secret shady sharp silent silver sleepy smooth solar southern steep
sunny sweet tender tiny velvet violet western wild windy wooden yellow young""".split())

NOUNS = tuple("""acorn anchor apple arrow badger bamboo barn basket beacon beaver bell bridge brook butter candle canoe
canyon carrot castle cedar cherry cliff clover comet cottage crane creek crow daisy desert dolphin dragon drum eagle
falcon fern ferry field fiddle forest fountain fox garden garnet glacier goose grove hammer harbor hawk hazel heron
hill honey horse island ivy jungle kettle kite ladder lagoon lake lantern lemon lily lizard lobster maple marble meadow
melon mill mirror moon moss mountain oak ocean orchard otter owl palace panda parrot peach pebble pepper pigeon pine
planet plum pond prairie pumpkin rabbit raven reef river robin saddle salmon shell shore sparrow spring squirrel
stream swan temple thistle tiger tower trail tulip turtle valley violin walnut whale willow wolf""".split())

VARIABLES = tuple("""alpha beta gamma delta epsilon zeta theta kappa lambda sigma omega bravo charlie echo foxtrot hotel
india juliet kilo lima mike november oscar papa quebec romeo sierra tango uniform victor whiskey zulu""".split())

# A phrasing is a beginning and an ending. Every part occurs in training, a quarter of the pairs only in evaluation.
_PAIRS = {
    "train": tuple((i, j) for i in range(4) for j in range(4) if (i + j) % 4 != 3),
    "eval": tuple((i, j) for i in range(4) for j in range(4) if (i + j) % 4 == 3),
}
_FACT = (
    ("The magic number of", "Remember that the code for", "Note: the value stored under", "Here the number given to"),
    (" is", " equals", " was set to", " shall be"),
)
_ASSIGNMENT = (
    ("VAR", "let", "Set the variable", "Define"),
    (" =", " :=", " to be", " as"),
)
_QUESTION_ENDINGS = ("? Answer:", "? It is:", ". Reply:", ". Result:")
_ASK_ONE = (
    (
        "What is the magic number of", "Recall the code for", "Which value was stored under",
        "Tell me the number given to",
    ),
    _QUESTION_ENDINGS,
)  # fmt: skip
_ASK_ALL = (
    (
        "List all the magic numbers of", "Recall every code for", "Which values were stored under",
        "Tell me each number given to",
    ),
    _QUESTION_ENDINGS,
)  # fmt: skip
_ASK_VARIABLES = (
    (
        "List all the variables that hold", "Find every variable with the value", "Which variables were set to",
        "Name each variable equal to",
    ),
    _QUESTION_ENDINGS,
)  # fmt: skip
_RULE = (
    (
        "Rule: begin the reply to any question with the word",
        "Whatever is asked later, the first word of the answer must be",
        "Every answer to a question about this text starts with the word",
        "When you are asked something, reply first with the word",
    ),
    (".", ", without exception.", ", then answer.", ", and go on as usual."),
)

_COMMON = "In the numbered list below some words come more often than others. Remember those that come most often.\n"
_ASK_COMMON = "Question: Which 10 words come most often in the list? Answer: The 10 words that come most often are:"
_FREQUENT = "Count how often each coded word occurs in the coded text below; the dots are only noise.\n"
_ASK_FREQUENT = "Question: Which 3 coded words occur most often? Answer: The 3 most frequent coded words are:"

ZETA_2 = pi**2 / 6
"""The normaliser of RULER's word frequencies, k ** -2."""


def exact(completion: str, answer: str) -> float:
    """Whether the first line is the answer, spacing aside."""
    lines = completion.strip().splitlines()
    return float(bool(lines) and lines[0].split() == answer.split())


def found(completion: str, answer: str) -> float:
    """The share of the answer's parts that the completion mentions, as whole words (RULER's recall)."""
    words, parts = re.findall(r"\w+", completion.lower()), answer.lower().split(", ")
    return sum(part in words for part in parts) / len(parts)


def obeyed(completion: str, answer: str) -> float:
    """Whether the completion begins with the word."""
    return float(re.findall(r"\w+", completion.lower())[:1] == [answer])


METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact, "found": found, "obeyed": obeyed}


@dataclass(frozen=True)
class Sample:
    """One prompt with its question and the only right answer.

    prompt:      haystack and facts; ends with a newline.
    question:    one line that ends where the answer begins. Fed in a second call, it must be tokenized with
                 `add_special_tokens=False`.
    answer:      what is looked for, without surrounding space; parts are separated by ", ".
    facts:       the lines of the prompt that hold the answer, in order.
    new_tokens:  how many tokens a reply may have.
    metric:      of `METRICS`.
    """

    task: str
    prompt: str
    question: str
    answer: str
    facts: tuple[str, ...]
    new_tokens: int
    metric: str

    @property
    def completion(self) -> str:
        """What a perfect model writes after the question."""
        return f" {self.answer}\n"

    @property
    def depths(self) -> tuple[float, ...]:
        """Where in the prompt the facts are: 0 is its beginning, 1 its end."""
        return tuple(self.prompt.index(fact) / len(self.prompt) for fact in self.facts)

    def score(self, completion: str) -> float:
        """How good a reply is, in [0, 1]."""
        return METRICS[self.metric](completion, self.answer)


@dataclass(frozen=True)
class Item:
    """Something to remember: its lines in order, what a question about it names, and the answer."""

    lines: tuple[Fragments, ...]
    subject: Fragments
    answer: Fragments
    wording: tuple[tuple[str, ...], tuple[str, ...]]

    def question(self, rng: random.Random, split: str) -> Fragments:
        beginning, ending = _phrase(self.wording, rng, split)
        return (beginning, *self.subject, ending)


class ItemMaker:
    """Draws the items of one prompt: no key, number or variable comes twice."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split
        self._seen: set[Fragments] = set()

    def make(self, task: str) -> Item:
        if task == "tracking":
            return self._chain(self.rng.randint(2, 5))
        return self._fact(self.rng.randint(2, 4) if task == "multivalue" else 1)

    def _fact(self, n_values: int) -> Item:
        key = self._fresh(_key)
        values = [self._number() for _ in range(n_values)]
        lines = tuple(self._line(_FACT, key, value) for value in values)
        return Item(lines, key, _listed(values), _ASK_ONE if n_values == 1 else _ASK_ALL)

    def _chain(self, n_variables: int) -> Item:
        number = self._number()
        names = [self._fresh(_variable) for _ in range(n_variables)]
        lines = tuple(self._line(_ASSIGNMENT, *pair) for pair in zip(names, [number, *names[:-1]], strict=True))
        return Item(lines, number, _listed(names), _ASK_VARIABLES)

    def _number(self) -> Fragments:
        return self._fresh(_six_digits)

    def _line(self, wording, subject: Fragments, value: Fragments) -> Fragments:
        beginning, middle = _phrase(wording, self.rng, self.split)
        return (beginning, *subject, middle, *value, ".", "\n")

    def _fresh(self, draw) -> Fragments:
        while (drawn := draw(self.rng)) in self._seen:
            pass
        self._seen.add(drawn)
        return drawn


def make_sample(task: str, length_tokens: int, seed: int, tokenizer, split: str = "eval") -> Sample:
    """A sample whose prompt and question have together `length_tokens` tokens or a few less, never more.

    A haystack of keys or words ends with a whole line or word, so it may be that much shorter.

    Args:
        tokenizer: any `transformers` tokenizer; the special tokens that it adds by default are counted.

    Raises:
        ValueError: unknown task, or a length that the task does not fit into.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    rng = random.Random(f"{split}-{task}-{length_tokens}-{seed}")
    try:
        return {"common": _common, "frequent": _frequent}.get(task, _facts)(task, length_tokens, rng, tokenizer, split)
    except _TooShort:
        raise ValueError(f"{length_tokens} tokens are too few for the task {task!r}") from None


def spread(lines: tuple[Fragments, ...], rng: random.Random) -> list[tuple[float, Fragments]]:
    """The lines of an item at random depths in [0, 1), in their order."""
    return list(zip(sorted(rng.random() for _ in lines), lines, strict=True))


def task_words() -> list[str]:
    """Every text fragment that the fact tasks use, numbers aside."""
    wordings = (_FACT, _ASSIGNMENT, _ASK_ONE, _ASK_ALL, _ASK_VARIABLES)
    return [part for parts in wordings for side in parts for part in side] + [
        " " + word for word in ADJECTIVES + NOUNS + VARIABLES
    ]


class _TooShort(Exception):
    pass


def _facts(task: str, length: int, rng: random.Random, tokenizer, split: str) -> Sample:
    """One item is asked for, of several in the prompt."""
    maker = ItemMaker(rng, split)
    asked = maker.make(task)
    question = _text(asked.question(rng, split))
    facts, answer, metric = tuple(map(_text, asked.lines)), _text(asked.answer).strip(), "exact"
    if task == "keys":
        prompt = _keys(facts[0], question, lambda: _text(maker.make(task).lines[0]), length, rng, tokenizer)
    else:
        many = max(3, length // 256)
        n_others = {"single": 0, "multikey": many, "multivalue": 3, "tracking": 3, "instruction": many}[task]
        items = [asked, *(maker.make(task) for _ in range(n_others))]
        placed = sorted((depth, _text(line)) for item in items for depth, line in spread(item.lines, rng))
        if task == "instruction":
            answer, metric = rng.choice(NOUNS), "obeyed"
            beginning, ending = _phrase(_RULE, rng, split)
            facts = (f"{beginning} {answer}{ending}\n",)
            placed.insert(0, (0.0, facts[0]))
        prompt = _in_source(placed, question, length, rng, tokenizer, split)
    return Sample(task, prompt, question, answer, facts, _reply_tokens(tokenizer, answer), metric)


def _keys(asked: str, question: str, draw: Callable[[], str], length: int, rng: random.Random, tokenizer) -> str:
    """As many lines of facts as fit, shuffled."""
    lines = [asked]
    room = length - _count(tokenizer, asked + question)
    while (room := room - _count(tokenizer, line := draw(), special=False)) >= 0:
        lines.append(line)
    if len(lines) == 1:
        raise _TooShort
    rng.shuffle(lines)
    # Tokenizers that add tokens to every text counted too many above, but one may also merge across lines.
    while _count(tokenizer, (prompt := "".join(lines)) + question) > length:
        lines.pop(0 if lines[0] != asked else 1)
    return prompt


def _in_source(
    placed: list[tuple[float, str]], question: str, length: int, rng: random.Random, tokenizer, split: str
) -> str:
    """Source code with lines at their depths, of just the length that leaves room for the question."""
    start = rng.random()
    room = length - _count(tokenizer, "".join(line for _, line in placed) + question)
    for _ in range(12):
        if room < 16:
            raise _TooShort
        prompt = _weave(haystack(tokenizer, room, split, start), placed)
        missing = length - _count(tokenizer, prompt + question)
        if 0 <= missing <= 4:
            break
        # Where a cut changes how the last line is tokenized the length may jump: then rather short than long.
        room += missing if missing < 0 else missing - 1
    if missing < 0:
        raise RuntimeError(f"no haystack of {length} tokens found")
    return prompt


def _common(task: str, length: int, rng: random.Random, tokenizer, split: str) -> Sample:
    """Common words: an example, then the list (RULER appendix B: 10 words come 30 times, the others 3 times; in short
    prompts 6 times and once)."""
    seed = rng.random()
    example, uses, list_uses = (20, (3, 1), (6, 1)) if length < 4096 else (40, (10, 3), (30, 3))
    words = rng.sample(source_words(), len(source_words()))

    def ask(words: list[str], uses: tuple[int, int]) -> str:
        listed = words[:10] * uses[0] + words[10:] * uses[1]
        random.Random(seed).shuffle(listed)
        return _COMMON + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)) + "\n"

    shown = f"{ask(words[:example], uses)}{_ASK_COMMON} {', '.join(words[:10])}\n\n"
    words = words[example:]

    def prompt(n: int) -> str:
        if n > len(words):
            raise ValueError(f"{length} tokens are too many for the task {task!r}: there are {len(words)} words")
        return shown + ask(words[:n], list_uses)

    n = _most(lambda n: _count(tokenizer, prompt(n) + _ASK_COMMON), 11, length)
    answer = ", ".join(words[:10])
    return Sample(task, prompt(n), _ASK_COMMON, answer, (), _reply_tokens(tokenizer, answer), "found")


def _frequent(task: str, length: int, rng: random.Random, tokenizer, split: str) -> Sample:
    """Frequent words: six letters each, the k-th as frequent as k ** -2, the first one dots (RULER appendix B)."""
    seed, words = rng.random(), ["..."]
    while len(words) < max(length // 50, 5):
        if (word := "".join(rng.choices(ascii_lowercase, k=6))) not in words:
            words.append(word)

    def prompt(n: int) -> str:
        text = [word for k, word in enumerate(words, 1) for _ in range(int(n * k**-2 / ZETA_2))]
        random.Random(seed).shuffle(text)
        return _FREQUENT + " ".join(text) + "\n"

    # From 80 words on, the fourth is more frequent than the fifth.
    n = _most(lambda n: _count(tokenizer, prompt(n) + _ASK_FREQUENT), 80, length)
    answer = ", ".join(words[1:4])
    return Sample(task, prompt(n), _ASK_FREQUENT, answer, (), _reply_tokens(tokenizer, answer), "found")


def _most(count: Callable[[int], int], least: int, length: int) -> int:
    """The largest n, or nearly so, with `count(n)` at most `length`, for a count that grows about evenly."""
    n, used = least, count(least)
    if used > length:
        raise _TooShort
    each = used / n
    while more := int((length - used) / each):
        tokens = count(n + more)
        each = max((tokens - used) / more, 0.5)  # after a miss, `more` shrinks by this
        if tokens <= length:
            n, used = n + more, tokens
    return n


def _reply_tokens(tokenizer, answer: str) -> int:
    """Room for the answer and a little talk."""
    return _count(tokenizer, answer, special=False) + 16


def _key(rng: random.Random) -> Fragments:
    return " " + rng.choice(ADJECTIVES), " " + rng.choice(NOUNS)


def _variable(rng: random.Random) -> Fragments:
    return " " + rng.choice(VARIABLES), f"{rng.randrange(1000):03}"


def _six_digits(rng: random.Random) -> Fragments:
    return " ", str(rng.randrange(100, 1000)), f"{rng.randrange(1000):03}"


def _phrase(wording, rng: random.Random, split: str) -> tuple[str, str]:
    beginning, ending = rng.choice(_PAIRS[split])
    return wording[0][beginning], wording[1][ending]


def _listed(values: list[Fragments]) -> Fragments:
    listed = values[0]
    for value in values[1:]:
        listed += (",", *value)
    return listed


def _text(fragments: Fragments) -> str:
    return "".join(fragments)


def _count(tokenizer, text: str, special: bool = True) -> int:
    return len(tokenizer.encode(text, add_special_tokens=special))


def _weave(lines: list[str], placed: list[tuple[float, str]]) -> str:
    """The lines with each line of `placed` before the line at its depth."""
    parts, done = [], 0
    for depth, line in placed:
        end = int(depth * (len(lines) + 1))
        parts += lines[done:end]
        parts.append(line)
        done = end
    return "".join(parts + lines[done:])
