"""Long-context retrieval tasks whose answers can be checked exactly.

A sample is a long prompt (source code with facts on lines of their own), a question and a short answer:

    >>> sample = make_sample("multikey", length_tokens=8192, seed=0, tokenizer=tokenizer)
    >>> text = generate(sample.prompt + sample.question)      # or: feed the prompt, then the question
    >>> is_correct(sample, text)

The tasks:

    single      one key with its number in a haystack of source code
    multikey    many keys in source code, one is asked for
    keys        a haystack of nothing but keys, one is asked for
    multivalue  keys that were given several numbers, all of one key's are asked for, in order
    tracking    chains of assignments; all variables that hold a number are asked for, in order

Everything is a function of the seed, the tokenizer and the Python version (the haystack is the standard library's own
source). The "eval" split uses packages and pairings of sentence parts that the "train" split never shows.

The same generator feeds training: texts are made of `Fragments`, pieces that `tiny_decoder`'s tokenizer never merges
across, so that a trainer can concatenate their token ids instead of tokenizing every text.
"""

import functools
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

TASKS = ("single", "multikey", "keys", "multivalue", "tracking")

HELD_OUT_PACKAGES = ("asyncio", "concurrent", "email", "http", "json", "logging", "sqlite3", "tomllib", "unittest",
                     "wsgiref", "xml", "zoneinfo")

# Not source that anybody reads: tests, tables, generated files and other people's packages.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data",
                    "__pycache__", "__phello__", "lib-dynload"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

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
    ("What is the magic number of", "Recall the code for", "Which value was stored under",
     "Tell me the number given to"),
    _QUESTION_ENDINGS,
)
_ASK_ALL = (
    ("List all the magic numbers of", "Recall every code for", "Which values were stored under",
     "Tell me each number given to"),
    _QUESTION_ENDINGS,
)
_ASK_VARIABLES = (
    ("List all the variables that hold", "Find every variable with the value", "Which variables were set to",
     "Name each variable equal to"),
    _QUESTION_ENDINGS,
)


@dataclass(frozen=True)
class Sample:
    """One prompt with its question and the only right answer.

    prompt:    haystack and facts; ends with a newline.
    question:  one line that ends where the answer begins. Fed in a second call, it must be tokenized with
               `add_special_tokens=False`.
    answer:    what `is_correct` looks for, without surrounding space.
    facts:     the lines of the prompt that hold the answer, in order.
    """

    task: str
    prompt: str
    question: str
    answer: str
    facts: tuple[str, ...]

    @property
    def completion(self) -> str:
        """What a perfect model writes after the question."""
        return f" {self.answer}\n"

    @property
    def depths(self) -> tuple[float, ...]:
        """Where in the prompt the facts are: 0 is its beginning, 1 its end."""
        return tuple(self.prompt.index(fact) / len(self.prompt) for fact in self.facts)


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
        key = self._fresh(lambda rng: (" " + rng.choice(ADJECTIVES), " " + rng.choice(NOUNS)))
        values = [self._number() for _ in range(n_values)]
        lines = tuple(self._line(_FACT, key, value) for value in values)
        return Item(lines, key, _listed(values), _ASK_ONE if n_values == 1 else _ASK_ALL)

    def _chain(self, n_variables: int) -> Item:
        number = self._number()
        names = [self._fresh(lambda rng: (" " + rng.choice(VARIABLES), f"{rng.randrange(1000):03}"))
                 for _ in range(n_variables)]
        lines = tuple(self._line(_ASSIGNMENT, name, value) for name, value in zip(names, [number, *names]))
        return Item(lines, number, _listed(names), _ASK_VARIABLES)

    def _number(self) -> Fragments:
        return self._fresh(lambda rng: (" ", str(rng.randrange(100, 1000)), f"{rng.randrange(1000):03}"))

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

    `tokenizer` is any `transformers` tokenizer; the special tokens that it adds by default are counted. A haystack of
    keys ends with a whole line, so it may be a line short.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    rng = random.Random(f"{split}-{task}-{length_tokens}-{seed}")
    maker = ItemMaker(rng, split)
    asked = maker.make(task)
    question = "".join(asked.question(rng, split))

    if task == "keys":
        lines = [_text(asked.lines[0])]
        room = length_tokens - _count(tokenizer, lines[0] + question)
        while (room := room - _count(tokenizer, line := _text(maker.make(task).lines[0]), special=False)) >= 0:
            lines.append(line)
        if len(lines) == 1:
            raise ValueError(f"{length_tokens} tokens are too few for the task {task!r}")
        rng.shuffle(lines)
        # Tokenizers that add tokens to every text counted too many above, but one may also merge across lines.
        while _count(tokenizer, (prompt := "".join(lines)) + question) > length_tokens:
            lines.pop(0 if lines[0] != _text(asked.lines[0]) else 1)
    else:
        n_others = {"single": 0, "multikey": max(3, length_tokens // 256), "multivalue": 3, "tracking": 3}[task]
        items = [asked, *(maker.make(task) for _ in range(n_others))]
        placed = sorted(((depth, _text(line)) for item in items for depth, line in spread(item.lines, rng)))
        start = rng.random()
        fixed = _count(tokenizer, "".join(line for _, line in placed) + question)
        room = length_tokens - fixed
        for _ in range(12):
            if room < 16:
                raise ValueError(f"{length_tokens} tokens are too few for the task {task!r}")
            prompt = _weave(_haystack(tokenizer, room, split, start), placed)
            missing = length_tokens - _count(tokenizer, prompt + question)
            if 0 <= missing <= 4:
                break
            # Where a cut changes how the last line is tokenized the length may jump: then rather short than long.
            room += missing if missing < 0 else missing - 1

        if missing < 0:
            raise RuntimeError(f"no haystack of {length_tokens} tokens found")

    facts = tuple(_text(line) for line in asked.lines)
    return Sample(task, prompt, question, _text(asked.answer).strip(), facts)


def is_correct(sample: Sample, completion: str) -> bool:
    """Whether the first line that the model wrote after the question is the answer, spacing aside."""
    lines = completion.strip().splitlines()
    return bool(lines) and lines[0].split() == sample.answer.split()


def spread(lines: tuple[Fragments, ...], rng: random.Random) -> list[tuple[float, Fragments]]:
    """The lines of an item at random depths in [0, 1), in their order."""
    return list(zip(sorted(rng.random() for _ in lines), lines))


def held_out_text(n_chars: int, seed: int = 0) -> str:
    """`n_chars` characters of source code that the model was not trained on, from a random line on."""
    return _cut(source_text("eval"), n_chars, random.Random(f"held-out-{seed}").random())


def source_files(split: str) -> list[Path]:
    """The standard library's sources in a fixed order: held-out packages for "eval", all others for "train"."""
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in python_files(root) if
            (path.relative_to(root).parts[0] in HELD_OUT_PACKAGES) == (split == "eval")]


def python_files(root: Path) -> list[Path]:
    """All Python sources below a folder, without tests, tables and generated files."""
    return [path for path in sorted(root.rglob("*.py")) if not any(
        part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in path.relative_to(root).parts)]


def read_source(path: Path) -> str:
    """The file's text with a newline at its end; empty where it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8").strip("\n")
    except (UnicodeDecodeError, OSError):
        return ""
    return text + "\n" if text else ""


@functools.cache
def source_text(split: str) -> str:
    return "".join(map(read_source, source_files(split)))


def task_words() -> list[str]:
    """Every text fragment that the tasks use, numbers aside."""
    wordings = (_FACT, _ASSIGNMENT, _ASK_ONE, _ASK_ALL, _ASK_VARIABLES)
    return [part for parts in wordings for side in parts for part in side] + [
        " " + word for word in ADJECTIVES + NOUNS + VARIABLES]


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


def _cut(text: str, n_chars: int, start: float) -> str:
    """`n_chars` characters from a line near the relative position `start` on, around the end if need be."""
    begin = text.find("\n", int(start * (len(text) - 1))) + 1
    while len(text) - begin < n_chars:
        text += text
    return text[begin:begin + n_chars]


def _haystack(tokenizer, n_tokens: int, split: str, start: float) -> list[str]:
    """Lines of source code with about `n_tokens` tokens."""
    source, n_chars = source_text(split), 4 * n_tokens
    while len(ids := tokenizer.encode(_cut(source, n_chars, start), add_special_tokens=False)) < n_tokens:
        n_chars *= 2
    text = tokenizer.decode(ids[:n_tokens - 1], clean_up_tokenization_spaces=False)
    return [line + "\n" for line in text.rstrip("\n").split("\n")]


def _weave(haystack: list[str], placed: list[tuple[float, str]]) -> str:
    """The haystack with each line of `placed` before the haystack's line at its depth."""
    parts, done = [], 0
    for depth, line in placed:
        end = int(depth * (len(haystack) + 1))
        parts += haystack[done:end]
        parts.append(line)
        done = end
    return "".join(parts + haystack[done:])
