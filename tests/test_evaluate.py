"""`minikv eval`: generated tasks, LongBench's format and metrics, and runs on a tiny random model."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from typer.testing import CliRunner

from minikv_compile import ConfigError, MiniKVConfig, longbench
from minikv_compile.cli import app
from minikv_compile.evaluate import (
    ask_after,
    ask_inside,
    continue_text,
    in_chat,
    make_group,
    record_groups,
    run_methods,
    running,
)  # fmt: skip
from minikv_compile.haystack import held_out_ids, source_text
from minikv_compile.measure import parse_method
from minikv_compile.results import Cell, draw_pareto, pareto, tables, wilson
from minikv_compile.tasks import METRICS, TASKS, make_sample

ROOT = Path(__file__).parent.parent
SHIPPED = transformers.AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_decoder" / "model")


def trained_tokenizer():
    """Byte-level BPE that puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([source_text("eval")[:200_000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


OTHER = trained_tokenizer()


@pytest.fixture(scope="module")
def model():
    """A random Llama, fp32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(OTHER), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def n_tokens(tokenizer, sample):
    return len(tokenizer.encode(sample.prompt + sample.question))


# Tasks


@settings(max_examples=30)
@given(task=st.sampled_from(TASKS), length=st.integers(1600, 2400), seed=st.integers(0, 2**40))
@pytest.mark.parametrize("tokenizer", [SHIPPED, OTHER], ids=["shipped", "other"])
def test_a_sample_fits_and_is_a_function_of_its_seed(tokenizer, task, length, seed):
    sample = make_sample(task, length, seed, tokenizer)
    assert sample == make_sample(task, length, seed, tokenizer)
    assert sample.prompt != make_sample(task, length, seed + 1, tokenizer).prompt
    unused = length - n_tokens(tokenizer, sample)
    assert 0 <= unused <= (40 if task in ("keys", "common", "frequent") else 8)
    assert sample.prompt.endswith("\n")
    assert all(fact in sample.prompt for fact in sample.facts)
    for part in sample.answer.split(", "):
        assert part in ("".join(sample.facts) or sample.prompt)
    assert sample.new_tokens > len(tokenizer.encode(sample.completion, add_special_tokens=False))
    assert (sample.score(sample.completion), sample.score(""), sample.score(" nothing\n")) == (1, 0, 0)


@given(length=st.integers(1000, 6000), seed=st.integers(0, 2**40))
@settings(max_examples=15)
def test_the_common_words_are_the_most_common(length, seed):
    sample = make_sample("common", length, seed, SHIPPED)
    counts = Counter(re.findall(r"\d+\. (\w+)", sample.prompt.split("\n\n")[1])).most_common()
    assert {word for word, _ in counts[:10]} == set(sample.answer.split(", "))
    assert {count for _, count in counts[:10]} == {30 if length >= 4096 else 6}
    assert {count for _, count in counts[10:]} == {3 if length >= 4096 else 1}


@given(length=st.integers(700, 6000), seed=st.integers(0, 2**40))
@settings(max_examples=15)
def test_the_frequent_words_are_the_most_frequent(length, seed):
    sample = make_sample("frequent", length, seed, SHIPPED)
    dots, *words = Counter(sample.prompt.split("\n")[1].split()).most_common()
    assert dots[0] == "..." and ", ".join(word for word, _ in words[:3]) == sample.answer
    assert words[2][1] > words[3][1]


def test_the_rule_stands_first_and_is_scored_alone():
    sample = make_sample("instruction", 1024, 0, SHIPPED)
    assert sample.depths == (0.0,)
    assert sample.score(f" {sample.answer.upper()}: 123456") == 1
    assert sample.score(f" 123456 {sample.answer}") == 0


def test_keys_are_told_apart_by_every_haystack():
    sample = make_sample("keys", 1024, 0, SHIPPED)
    keys = [tuple(re.findall(r"(\w+ \w+) (?:is|equals|was set|shall)", line)) for line in sample.prompt.splitlines()]
    assert len(keys) > 40 and len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "metric, reply, score",
    [
        ("exact", " 12,  34\nand so on", 1), ("exact", " 12", 0), ("exact", " 12, 34, 56", 0), ("exact", "", 0),
        ("found", "They are 34 and 12.", 1), ("found", "12 and 345", 0.5), ("found", "123", 0),
    ],
)  # fmt: skip
def test_scores_by_hand(metric, reply, score):
    assert METRICS[metric](reply, "12, 34") == score


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_is_too_short_is_named(task):
    with pytest.raises(ValueError, match=f"20 tokens are too few for the task '{task}'"):
        make_sample(task, 20, 0, SHIPPED)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="'needle'.*single"):
        make_sample("needle", 1024, 0, SHIPPED)


def test_a_chat_template_goes_around_the_question():
    OTHER.chat_template = "{{ bos_token }}[user]{{ messages[0]['content'] | trim }}[/user]"
    sample = make_sample("single", 600, 0, OTHER)
    chat = in_chat(sample, OTHER)
    assert chat.prompt == "[user]" + sample.prompt.lstrip()
    assert chat.question == sample.question + "[/user]"
    group = make_group("single", 600, 1, 0, OTHER, chat=True)
    assert group.questions[0].score(f"It is {sample.answer}, I think.") == 1


# LongBench


@pytest.mark.parametrize(
    "metric, reply, answer, score",
    [
        ("qa_f1", "The cat sat on the mat.", "a cat on mat", 6 / 7),  # 3 words in common, of 4 and 3
        ("qa_f1", "no", "yes", 0), ("qa_f1", "", "yes", 0),
        ("rouge_l", "a b c d", "a c d e", 3 / 4), ("rouge_l", "", "a", 0), ("rouge_l", "x", "a", 0),
        ("classification", "It is a number", "number", 1 / 2),  # "a" is named too
        ("classification", "other number", "other number", 1), ("classification", "date", "number", 0),
        ("count", "5, or 5 of 7", "5", 2 / 3), ("count", "many", "5", 0),
        ("retrieval", "Paragraph 12", "Paragraph 12", 1), ("retrieval", "1 or 12", "Paragraph 12", 1 / 2),
        ("code_similarity", "# first\n```\nabcd\nef", "abxd", 0.75), ("code_similarity", "// only", "a", 0),
    ],
)  # fmt: skip
def test_longbench_metrics_by_hand(metric, reply, answer, score):
    classes = ["number", "other number", "date", "a"]
    assert longbench.METRICS[metric](reply, answer, classes) == pytest.approx(score, abs=1e-6)


RECORD = {
    "context": "Once upon a time. " * 300, "input": "When?", "answers": ["once", "one time"], "dataset": "triviaqa"
}  # fmt: skip


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_a_record_is_asked_and_scored(tmp_path):
    classified = RECORD | {"dataset": "trec_e", "all_classes": ["here", "once"]}
    path = write(tmp_path / "r.jsonl", RECORD, "", classified, RECORD)
    first, second = longbench.load_records(path, SHIPPED, 4096, "Read: {context}\nQ: {input} A:", limit=1)
    assert first.prompt == "Read: " + RECORD["context"] and first.question == "\nQ: When? A:"
    assert (first.metric, first.new_tokens, first.task) == ("qa_f1", 32, "triviaqa")
    assert first.score("One time\nQ: Where? A: here") == 1
    assert second.score("\nonce\nhere") == 1 and second.score("here or once") == 0.5
    assert {record.metric for record in longbench.load_records(path, SHIPPED, 4096, metric="rouge_l")} == {"rouge_l"}
    OTHER.chat_template = "[user]{{ messages[0]['content'] }}[/user]"
    few_shot, *_ = record_groups([first], 4096, OTHER, chat=True)
    asked, *_ = record_groups([replace(first, task="qasper")], 4096, OTHER, chat=True)
    assert few_shot.questions == [first] and asked.questions[0].prompt == "[user]" + first.prompt


def test_templates_come_from_longbenchs_own_file(tmp_path):
    templates = write(tmp_path / "dataset2prompt.json", {"triviaqa": "{context} -> {input}", "lcc": "{context}"})
    (record,) = longbench.load_records(write(tmp_path / "r.jsonl", RECORD), SHIPPED, 4096, str(templates))
    assert record.question == " -> When?"


@given(length=st.integers(1, 300), room=st.integers(40, 200))
def test_the_middle_is_cut(length, room):
    prompt, question = "".join(f"{i % 1000:03}" for i in range(length)), " Q:"  # one token for three digits
    cut = longbench.cut_middle(prompt, question, SHIPPED, room)
    ids, kept = (SHIPPED.encode(text, add_special_tokens=False) for text in (prompt, cut))
    asked = len(SHIPPED.encode(question))
    assert len(kept) == min(length, room - asked)
    assert kept[: room // 2] == ids[: room // 2] and kept[room // 2 - room + asked :] == ids[room // 2 - room + asked :]


@pytest.mark.parametrize(
    "record, message",
    [
        ("{", "line 2: "), ("[]", "line 2: not a JSON object"),
        ({**RECORD, "context": 1}, "line 2: field 'context'"), ({**RECORD, "input": []}, "line 2: field 'input'"),
        ({**RECORD, "answers": []}, "line 2: field 'answers'"), ({**RECORD, "answers": "once"}, "field 'answers'"),
        ({**RECORD, "dataset": "mine"}, "line 2: field 'dataset' must be one of narrativeqa"),
        ({**RECORD, "dataset": "trec"}, "line 2: field 'all_classes'"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        longbench.load_records(write(tmp_path / "r.jsonl", RECORD, record), SHIPPED, 4096)


@pytest.mark.parametrize(
    "template, message", [("{input}", "{context}"), ("{context} {title}", "'title'"), ("{context}" * 2, "once")]
)
def test_a_wrong_template_is_named(tmp_path, template, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        longbench.load_records(write(tmp_path / "r.jsonl", RECORD), SHIPPED, 4096, template)


# Results


def test_wilson_intervals_by_hand():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 200) == pytest.approx((0.0, 0.0188), abs=1e-4)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_nothing_beats_the_frontier(points):
    front = pareto(points)
    assert front == sorted(set(front)) and set(front) <= set(points)
    for x, y in points:
        assert any(a <= x and b >= y for a, b in front)
    assert not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points for x, y in front)


def test_a_method_is_a_preset_with_changes():
    assert parse_method("full") is None
    changed = parse_method("default:group=32:policy=observation_window:heavy=0.25:layer_budget=[1,2]:strict=true")
    assert changed == MiniKVConfig(
        group=32, policy="observation_window", heavy=0.25, layer_budget=(1, 2), strict=True
    )


@pytest.mark.parametrize(
    "method, name",
    [("best", "best"), ("default:groups=32", "groups"), ("default:group=33", "group"), ("default:bits", "bits")],
)
def test_a_wrong_method_is_named(method, name):
    with pytest.raises(ConfigError, match=name):
        parse_method(method)


# Runs


def test_without_compression_every_score_is_the_full_caches(model):
    groups = [make_group(task, 700, 2, 0, OTHER, batch=2, continuation=100) for task in ("single", "text")]
    cells = list(run_methods(model, OTHER, ["full", "lossless"], groups, inner="eager"))
    full, lossless = cells[:3], cells[3:]
    assert [(c.task, c.place) for c in full] == [("single", "inside"), ("single", "after"), ("text", "after")]
    assert [cell.score for cell in lossless] == [cell.score for cell in full]
    assert all(cell.share_of_dense_bytes == 1 for cell in full)
    assert full[-1].kl == 0 and full[-1].score == 1
    assert lossless[-1].kl < 1e-6 and lossless[-1].bits_per_byte == pytest.approx(full[-1].bits_per_byte, rel=1e-5)
    assert "forward" not in vars(model)


@torch.no_grad()
def test_the_bits_of_a_text_are_the_models(model):
    ids = torch.tensor([held_out_ids(OTHER, 300, seed=1)])
    with running(model, "full", "eager") as runner:
        text, report = continue_text(runner, ids, 200, OTHER)
    logits = model(ids).logits[0, 200:-1].log_softmax(-1)
    nats = -logits.gather(-1, ids[0, 201:, None]).sum().item()
    assert text.bits == pytest.approx(nats / math.log(2), rel=1e-5)
    assert text.bytes == len(OTHER.decode(ids[0, 201:]).encode())
    assert report.layers[0].tokens == 200


@torch.no_grad()
def test_places_and_batches_give_the_same_replies_without_compression(model):
    samples = [make_sample("single", length, 0, OTHER) for length in (300, 340)]
    together, report = ask_inside(model, OTHER, samples)
    assert report.layers[0].tokens == 340 + max(s.new_tokens for s in samples) - 1
    for sample, reply in zip(samples, together, strict=True):
        alone, _ = ask_inside(model, OTHER, [sample])
        after, _ = ask_after(model, OTHER, [sample])
        assert reply.startswith(alone[0][:20])
        # The question is tokenized by itself: the same tokens, as a line ends before it.
        assert after == alone


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_command_end_to_end(model, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/minikv", "eval"])
    model.save_pretrained(tmp_path / "model")
    OTHER.save_pretrained(tmp_path / "model")
    record = RECORD | {"context": RECORD["context"][:2000]}
    data, out, plot = write(tmp_path / "r.jsonl", record, record), tmp_path / "out.json", tmp_path / "pareto.png"
    result = run(
        "--model", tmp_path / "model", "--tasks", "keys,text", "--lengths", "500,600", "--methods",
        "full,minikv:layer_budget=[1,2]", "--prompts", 1, "--continuation", 20, "--jsonl", data, "--places", "inside",
        "--max-length", 400, "--inner", "eager", "--device", "cpu", "--json", out, "--plot", plot,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "500 tokens" in result.output and "bpb" in result.output
    found = json.loads(out.read_text())
    assert found["seed"] == 1_000_000 and found["versions"]["torch"] == torch.__version__ and found["command"] == "minikv eval"
    cells = found["cells"]
    assert [(c["task"], c["length"], c["place"]) for c in cells[:5]] == [
        ("keys", 500, "inside"), ("keys", 600, "inside"), ("triviaqa", 400, "inside"), ("text", 500, "after"),
        ("text", 600, "after"),
    ]  # fmt: skip
    assert {c["method"] for c in cells[5:]} == {"minikv:layer_budget=[1,2]"}
    for cell in cells:
        low, high = cell["interval_95"]
        assert 0 <= low <= cell["score"] <= high <= 1 and cell["prompts"] == 1 and cell["seconds"] > 0
        full = cell["method"] == "full"
        assert cell["share_of_dense_bytes"] == 1 if full else cell["share_of_dense_bytes"] < 0.9
        assert cell["task"] != "text" or (cell["kl"] == 0 if full else cell["kl"] > 1e-3)
    assert plot.stat().st_size > 5000


@pytest.mark.parametrize(
    "option, value",
    [("--tasks", "single,best"), ("--methods", "full,best"), ("--methods", "default:bits=3"), ("--places", "before"),
     ("--lengths", "4k"), ("--metric", "best")],
)  # fmt: skip
def test_a_wrong_option_is_named_before_a_model_is_loaded(option, value):
    result = run("--model", "no such model", option, value)
    assert result.exit_code == 2 and option in result.output


def test_the_table_and_the_plot_take_missing_cells(tmp_path):
    cells = [
        Cell("full", "inside", "single", 1024, 8, "exact", 1.0, 1e6, 1.0, 1.0),
        Cell("default", "inside", "single", 1024, 8, "exact", 0.5, 2e5, 0.2, 1.0),
        Cell("full", "after", "text", 2048, 8, "agreement", 1.0, 1e6, 1.0, 1.0, 0.8, 0.0),
    ]
    first, second = tables(cells)
    assert first.row_count == second.row_count == 1
    draw_pareto(cells, tmp_path / "plots" / "pareto.png")
    assert (tmp_path / "plots" / "pareto.png").stat().st_size > 5000
