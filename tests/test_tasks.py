"""Proves tasks.py: every published layout is read, prompts are as they should be word for word, and scores equal those
of lm-evaluation-harness on the same model and files (slow: the harness itself is run).

    python -m pytest tests/test_tasks.py -m "slow or not slow"
"""
import csv
import gzip
import importlib.util
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BF16_SPEEDUP

import eval as evaluation
import metrics
import tasks
from configuration import ModelConfig
from model import Transformer

ROOT = Path(__file__).parent.parent
FILES = ROOT / "tests" / "data" / "tasks"  # small files of our own, in every layout


def first(name, few_shot=0):
    """The first item of a task."""
    return tasks.load(name, FILES, few_shot=few_shot)[0][0]


# -- Prompts, word for word --------------------------------------------------------------------------------------------
PROMPTS = {
    "hellaswag": ("Tidying up: Ben looks for the old lamp at the market. How to find things. Look twice. They all", 2,
                  "and sells it for two coins. That was all."),
    "arc_easy": ("Question: What melts in the sun?\nAnswer:", 0, "stone"),
    "arc_challenge": ("Question: Which is a liquid at home?\nAnswer:", 2, "a brick"),
    "piqa": ("Question: To keep soup warm\nAnswer:", 1, "Put a lid on the pot."),
    "ceval": ("以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n年满几岁成年？\n"
              "A. 八\nB. 十\nC. 十八\nD. 八十\n答案：", 2, "B"),
    "cmmlu": ("以下是关于天文学的单项选择题，请直接给出正确答案的选项。\n\n哪个是行星？\n"
              "A. 太阳\nB. 月亮\nC. 火星\nD. 彗尾\n答案：", 2, "B"),
    "mmlu": ("The following are multiple choice questions (with answers) about global facts.\n\n"
             "What melts in the sun?\nA. ice\nB. stone\nC. iron\nD. sand\nAnswer:", 0, "B"),
    "gsm8k": ("Question: Jun has 25,000 nuts and finds 16 more. How many nuts are there?\nAnswer:", 0,
              "Jun has 25000 + 16 = <<25000+16=25016>>25016 nuts.\n#### 25,016"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_word_for_word(name):
    item, (context, gold, answer) = first(name), PROMPTS[name]
    assert item.contexts == [context] and item.gold == gold
    assert (item.answers[1] if len(item.answers) > 1 else item.answers[0]) == answer


def test_winogrande_scores_what_stands_behind_the_gap():
    row = {"sentence": "Ada told Ben that _ was late. ", "option1": "Ada", "option2": "Ben", "answer": "2"}
    assert tasks.winogrande(row) == tasks.Item(["Ada told Ben that Ada", "Ada told Ben that Ben"], ["was late."], 1)


def test_lambada_and_boolq():
    item = first("lambada")
    assert item.contexts[0].endswith('"It is," said') and item.answers == [" Ben"]
    hub, original = ({"passage": "P.", "question": "is it", **label} for label in ({"label": 1}, {"answer": True}))
    assert tasks.boolq(hub) == tasks.boolq(original) == tasks.Item(["P.\nQuestion: is it?\nAnswer:"], ["no", "yes"], 1)


def test_pages_are_those_of_the_file_and_lose_the_marks_of_tokenisation():
    items, _ = tasks.load("wikitext2", FILES)
    assert len(items) == 4 and items[1].page.startswith(" = Ben 's Lamp = \n")
    text = items[1].answers[0]
    for mark, gone in (("= Ben's Lamp =", " 's "), ("(born 1910)", "( "), ("1,100 coins", "@"), ("2.5-fold", " @-@ "),
                       ("== Early life ==", "= = "), ("1 days of it: the' dry 'years", " : "), ("[so called]", "[ "),
                       ("4\u00b0C", " \u00b0")):
        assert mark in text and gone not in text
    assert "".join(item.page for item in items).split() == (FILES / "wikitext2_test.txt").read_text().split()


def test_examples_stand_solved_in_front():
    text = tasks.load("piqa", FILES, few_shot=2)[0][0].contexts[0]
    train = [json.loads(line) for line in (FILES / "piqa_train.jsonl").read_text().splitlines()]
    solved = [f"Question: {row['goal']}\nAnswer: {row['sol2' if row['label'] else 'sol1']}\n\n" for row in train]
    own = "Question: To keep soup warm\nAnswer: Put a lid on the pot.\n\n"  # in both files: it is not its own example
    drawn = [example for example in random.Random(1234).sample(solved, 3) if example != own][:2]
    assert text == "".join(drawn) + "Question: To keep soup warm\nAnswer:" and own in solved
    # an exam takes the first of its own subject's, for all questions
    law = [item for item in tasks.load("ceval", FILES, few_shot=2)[0] if item.subject == "law"]
    head = law[0].contexts[0].rsplit("\n\n", 1)[0]
    assert head.endswith("法律由谁遵守？\nA. 无人\nB. 所有人\nC. 只有猫\nD. 石头\n答案： B")
    assert head.count("答案：") == 2
    assert all(item.contexts[0].startswith(head) for item in law)


def test_without_a_file_of_examples_no_question_meets_itself(tmp_path):
    shutil.copy(FILES / "piqa_validation.jsonl", tmp_path)
    items, source = tasks.load("piqa", tmp_path, few_shot=3)
    plain = [item.contexts[0] for item in tasks.load("piqa", tmp_path)[0]]
    assert "the same" in source and len(items) == 10
    for item, question in zip(items, plain, strict=True):
        parts = item.contexts[0].split("\n\n")
        assert len(parts) == 4 and parts[-1] == question
    with pytest.raises(ValueError, match="--few_shot 10 with 10 rows.*smaller number"):
        tasks.load("piqa", tmp_path, few_shot=10)
    path = tmp_path / "piqa_validation.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n" + path.read_text().split("\n")[0])
    with pytest.raises(ValueError, match="--few_shot 1 with 0 rows that differ .*piqa_validation.jsonl; .*; "):
        tasks.load("piqa", tmp_path, few_shot=1)


# -- Files -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "csv", "csv.gz"])
def test_every_file_form_gives_the_same_items(form, tmp_path):
    rows = [json.loads(line) for line in (FILES / "piqa_validation.jsonl").read_text().split("\n") if line]
    rows[0]["goal"] = 'To say "a, b"\u2028or\nnothing'  # what each form must quote
    path = tmp_path / "PIQA" / f"validation.{form.removesuffix('.gz')}"
    path.parent.mkdir()
    if "csv" in form:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif form == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if form.endswith(".gz"):
        path.with_suffix(path.suffix + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert tasks.load("piqa", tmp_path)[0] == [tasks.piqa(row) for row in rows]


@pytest.mark.parametrize(("content", "message"), [
    ('{"goal": "x"}\n', r"piqa_val\.jsonl:1: found the keys \[subject, goal\].*expected goal, sol1, sol2, label"),
    ('{"goal": "x", "sol1": "a", "sol2": "b", "label": ""}\n', "often published without one"),
    ('{"goal": \n', r"piqa_val\.jsonl:1: not valid JSON .*one object each"), ("[1, 2]\n", "jsonl:1: a JSON list where"),
    ("[" * 100_000 + "\n", r"piqa_val\.jsonl:1: not valid JSON"), ("\n", r"piqa_val\.jsonl: empty; .*; fetch")])
def test_wrong_rows_are_named(content, message, tmp_path):
    (tmp_path / "piqa_val.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        tasks.load("piqa", tmp_path)


EXAM = {"question": "q", "choices": list("wxyz"), "answer": 1, "subject": "law"}


@pytest.mark.parametrize(("name", "row"), [
    ("piqa", {"goal": "x", "sol1": "a", "sol2": "b", "label": -1}), ("gsm8k", {"question": "q", "answer": 5}),
    ("piqa", {"goal": "x", "sol1": 5, "sol2": "b", "label": 0}), ("wikitext2", {"page": ""}),
    ("boolq", {"passage": "p", "question": "q", "label": 9}), ("hellaswag", {"query": "q", "choices": [], "gold": 0}),
    ("hellaswag", {"query": "q", "choices": ["a", "b"], "gold": 5}), ("mmlu", EXAM | {"answer": 9}),
    ("hellaswag", {"query": 5, "choices": ["a", "b"], "gold": 0}), ("mmlu", EXAM | {"choices": []}),
    ("arc_easy", {"query": "q", "choices": "ab", "gold": 0}), ("mmlu", EXAM | {"subject": 5}),
    ("mmlu", EXAM | {"subject": None}), ("mmlu", EXAM | {"subject": ["law"]}),
    # text where a list should be, as a table holds it: no character of it is an option
    ("mmlu", EXAM | {"choices": "wxyz"}), ("hellaswag", {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "label": 1,
                                                         "endings": "['one', 'two', 'three', 'four']"})])
def test_what_is_no_question_with_a_right_answer_is_a_wrong_row(name, row, tmp_path):
    (tmp_path / f"{name}_{tasks.TASKS[name].splits[0]}.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"\.jsonl:1: found the keys .*; expected .*; test splits"):
        tasks.load(name, tmp_path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("piqa_val.jsonl", "\u00e9".encode("latin-1"), "1: not UTF-8"), ("piqa_val.json", b"[{", "1: not valid JSON"),
    ("piqa_val.json", b"[" * 100_000, "1: not valid JSON"), ("piqa_val.jsonl.gz", b"no gzip", "1: broken gzip data"),
    ("piqa_val.jsonl.gz", gzip.compress(b"\n" * 99)[:-9], r"\d+: broken gzip data"),
    ("piqa_val.csv", b'goal\n"never closed\n', "2: not valid CSV")])
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}:{message}.*;.*;"):
        tasks.load("piqa", tmp_path)


def test_missing_and_doubled_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of arc_easy in .*docs/evaluation\.md"):
        tasks.load("arc_easy", tmp_path)
    for name in ("arc_easy_test.jsonl", "arc_easy_test_processed.jsonl"):
        shutil.copy(FILES / "arc_easy_test.jsonl", tmp_path / name)
    with pytest.raises(ValueError, match="2 files for the test split of arc_easy"):
        tasks.load("arc_easy", tmp_path)
    for name in ("mmlu_test.jsonl", "mmlu_test.json"):  # subjects have files of their own, but one each
        (tmp_path / name).write_text(json.dumps(EXAM))
    with pytest.raises(ValueError, match="2 files for the test split of mmlu"):
        tasks.load("mmlu", tmp_path)


def test_limit_counts_the_items_of_a_subject():
    assert [item.subject for item in tasks.load("ceval", FILES, limit=3)[0]] == ["law"] * 3 + ["logic"] * 3
    assert len(tasks.load("piqa", FILES, limit=3)[0]) == 3


# -- Requests ----------------------------------------------------------------------------------------------------------
class Bytes:
    """A tokenizer that joins a space and the letter after it, as a BPE does."""

    bos_id = eos_id = 999

    def encode(self, text):
        return [ord(piece[-1]) + 200 * (len(piece) > 1) for piece in re.findall(r" .|.|\n", text)]

    def encode_batch(self, texts):
        ids = [self.encode(text) for text in texts]
        ends = [sum(map(len, ids[:n])) for n in range(len(ids) + 1)]
        return torch.tensor([i for row in ids for i in row]).numpy(), ends


def test_a_space_belongs_to_the_answer_and_long_rows_lose_their_beginning():
    item = tasks.Item(["ab  "], ["c", "de"])
    (_, rows), = tasks.requests(tasks.TASKS["piqa"], [item], Bytes(), 100)
    assert [row.start for row in rows] == [2, 2]
    assert rows[1].ids == [*b"ab", *Bytes().encode("   de")]
    (_, rows), = tasks.requests(tasks.TASKS["piqa"], [item], Bytes(), 3)
    assert [len(row.ids) for row in rows] == [4, 4] and [row.start for row in rows] == [2, 1]
    (_, (row,)), = tasks.requests(tasks.TASKS["lambada"], [tasks.Item([""], ["a"])], Bytes(), 9)
    assert row == tasks.Row([999, 97], 1)  # without a context bos is one


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 9, 13])
def test_windows_score_every_id_once_with_as_much_before_it_as_fits(count):
    rows, scored = tasks.windows(range(1, count + 1), 0, 4), []
    for row in rows:
        assert len(row.ids) == (5 if row is not rows[0] else min(5, count + 1)) and row.start >= 1
        scored += row.ids[row.start:]
    assert scored == list(range(1, count + 1))


# -- Scores ------------------------------------------------------------------------------------------------------------
def test_choices_by_sum_and_by_characters():
    item = tasks.Item(["q"], ["aa", "bbbb", "猫狗鸟"], 1)
    row = tasks.judge(tasks.TASKS["piqa"], item, [(-2.0, False), (-3.0, False), (-2.5, True)])
    assert row == {"acc": 0.0, "acc_norm": 1.0}  # -1, -0.75, -0.83 a character; by bytes the third would win
    tie = tasks.judge(tasks.TASKS["piqa"], item._replace(gold=0), [(-2.0, False)] * 3)
    assert tie["acc"] == 1.0  # of equal ones the first


def test_scores_chance_and_majority_by_hand():
    items = [tasks.Item(["q"], ["a", "b"], gold, subject) for gold, subject in ((0, "x"), (1, "x"), (1, "y"), (1, "y"))]
    right, wrong = [(0.0, True), (-1.0, False)], [(-1.0, False), (0.0, True)]
    result = tasks.score("mmlu", items, [right, right, wrong, wrong])  # right, wrong, right, right
    assert result["scores"] == {"acc": 0.75} and result["n"] == 4
    assert result["chance"] == 0.5 and result["majority"] == 0.75
    # subject x: 1, 0: squares 0.5; y: 1, 1: 0; variance 0.5 / (4 - 2); error sqrt(0.25 / 4)
    assert result["errors"]["acc"] == pytest.approx(0.25)
    assert result["by_subject"] == {"x": {"acc": 0.5, "n": 2}, "y": {"acc": 1.0, "n": 2}}
    words = tasks.score("lambada", [tasks.Item(["q"], [" a"])] * 4, [[(-1.0, True)], [(-3.0, False)]] * 2)
    assert words["scores"] == {"acc": 0.5, "perplexity": pytest.approx(math.exp(2))} and words["majority"] == 1


def test_pages_are_counted_in_words_and_bytes_of_the_original():
    items = [tasks.Item([""], ["x"], page="one two  three"), tasks.Item([""], ["y"], page="猫 four")]
    result = tasks.score("wikitext2", items, [[(-3.0, False), (-4.0, False)], [(-5.0, False)]])
    nats, size, words = 12.0, 14 + 8, 3 + 2
    assert result["scores"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2))
    assert result["scores"]["byte_perplexity"] == pytest.approx(math.exp(nats / size))
    assert result["scores"]["word_perplexity"] == pytest.approx(math.exp(nats / words))


def test_a_page_counts_the_bytes_that_a_tokenizer_encodes(tokenizer, tmp_path):
    page = "a \ud800 b \ud83d\ude00"  # a lone surrogate, and a pair
    (tmp_path / "wikitext2_test.jsonl").write_text(json.dumps({"page": page}))
    items, _ = tasks.load("wikitext2", tmp_path)
    size = sum(len(tokenizer.token_bytes[i]) for i in tokenizer.encode(page))
    assert size == len("a b ") + 1 + 3 + 4
    scores = tasks.score("wikitext2", items, [[(-1e5, False)]])["scores"]  # so bad a model that 2**rate overflows
    assert scores["bits_per_byte"] == pytest.approx(1e5 / math.log(2) / size) and scores["byte_perplexity"] == math.inf


@pytest.mark.parametrize(("score", "error", "n", "said"), [
    (0.26, 0.02, 100, "at chance"), (0.1, 0.02, 100, "below chance"), (0.0, 0.0, 4, "at chance"), (0.5, 0.0, 1, ""),
    (0.4, 0.02, 900, "above chance, not above the majority baseline"), (0.7, 0.02, 900, "above chance")])
def test_verdict_in_words(score, error, n, said):
    assert tasks.verdict(score, error, 0.25, 0.5, n) == said
    assert tasks.verdict(score, error, None, None, n) == ""


ANSWERS = ["so\n#### 42", "#### 1,234.", "#### -5 or #### 6", "the answer is $7.50.", "3 4 5", "", "no number", "12.",
           "#### x 9", "It is 1,000, then .", "-3-4", "#### $8", "a $ b", "99%\n\nQuestion: 5", "7</s>8"]


def test_numbers_are_read_as_they_should_be():
    texts = [tasks.cut(text) for text in ANSWERS]
    assert [tasks.strict_number(text) for text in texts] == [
        "42", "1,234.", "-5", *["[invalid]"] * 12]
    assert [tasks.last_number(text) for text in texts] == [
        "42", "1,234.", "6", "$7.50.", "5", "[invalid]", "[invalid]", "12.", "9", "1,000,", "-4", "$8", "[invalid]",
        "99", "7"]
    assert tasks.same_number("1,234.", "words\n#### 1234") and not tasks.same_number("42", "#### 4.2")


# -- The harness itself ------------------------------------------------------------------------------------------------
YAML = {"hellaswag": "hellaswag/hellaswag", "arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge",
        "winogrande": "winogrande/default", "piqa": "piqa/piqa", "boolq": "super_glue/boolq/default",
        "lambada": "lambada/lambada_openai", "wikitext2": "wikitext/wikitext", "gsm8k": "gsm8k/gsm8k",
        "ceval": "ceval/ceval-valid_{}", "cmmlu": "cmmlu/cmmlu_{}", "mmlu": "mmlu/default/mmlu_{}"}
SUBJECTS = {"ceval": ("law", "logic"), "cmmlu": ("astronomy", "logical"),
            "mmlu": ("global_facts", "high_school_physics")}


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A random float64 model of strong opinions: its options differ, so that no agreement is by chance."""
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=64, max_position_embeddings=640,
                         initializer_range=0.25, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
                         pad_token_id=tokenizer.pad_id)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Transformer(config)
    path = tmp_path_factory.mktemp("harness") / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def published(name, split, subject=""):
    """Rows as the harness would get them from the hub, read without tasks.py."""
    if name in ("ceval", "cmmlu"):
        file = {"ceval": f"ceval-exam/{split}/{subject}_{split}.csv", "cmmlu": f"cmmlu/{split}/{subject}.csv"}[name]
        with open(FILES / file, encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))
    if name == "wikitext2":
        text = (FILES / "wikitext2_test.txt").read_text(encoding="utf-8")
        return [{"page": page} for page in re.split(r"(?<=\n)(?= = [A-Z])", text)[1:]] if split == "test" else []
    file, = (path for path in FILES.glob(f"{name}*_{split}*.jsonl"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    if name == "arc_challenge" and split == "test":
        rows = [{"question": row["query"].removeprefix("Question: "), "answerKey": "ABCDE"[row["gold"]],
                 "choices": {"text": row["choices"], "label": list("ABCDE")[:len(row["choices"])]}} for row in rows]
    if name == "boolq":
        rows = [row | {"label": int(row["label"] if "label" in row else row["answer"])} for row in rows]
    return [row for row in rows if row.get("subject", subject) == subject]


def harness_task(name, few_shot, subject=""):
    """The harness's own task (its prompts, its filters, its scores) over our files instead of the hub's."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    class Local(ConfigurableTask):
        def download(self, *args, **kwargs):
            splits = {self.config.training_split, self.config.validation_split, self.config.test_split,
                      self.config.fewshot_split} - {None}
            rows = {split: published(name, split, subject) for split in splits
                    if split != "validation" or not name.startswith("arc")}
            self.dataset = datasets.DatasetDict({split: datasets.Dataset.from_list(group or [{"page": ""}])
                                                 for split, group in rows.items()})

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / (YAML[name].format(subject) + ".yaml"))
    if name.startswith("arc"):
        config["validation_split"] = None  # the harness scores the test split; we have no third file
    task = Local(config=config | {"num_fewshot": few_shot})
    task.set_fewshot_seed(1234)
    return task


@pytest.fixture(scope="module")
def harness(folder):
    """harness(name, few_shot) -> (scores, errors, results of all requests in order)."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (requirements-dev.txt)")
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float64", batch_size=3, softmax_dtype="float64")

    def run(name, few_shot):
        found, resps = [], []
        for subject in SUBJECTS.get(name, [""]):
            task = harness_task(name, few_shot, subject)
            results = evaluate(model, {name: task}, bootstrap_iters=10, log_samples=True)
            with_errors = {key: value for key, value in results["results"][name].items() if "," in key}
            found.append((with_errors, results["n-samples"][name]["effective"]))
            samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
            resps += [sample["resps"] for sample in samples if sample["filter"] in ("none", "strict-match")]
        sizes = [size for _, size in found]
        scores = {key: aggregate_subtask_metrics([row[key] for row, _ in found], sizes) if len(found) > 1
                  else found[0][0][key] for key in found[0][0] if "_stderr" not in key}
        return scores, found, resps, lambda errors: pooled_sample_stderr(errors, sizes)

    return run


CASES = [(name, few_shot) for name in YAML for few_shot in ((0, 2) if name != "wikitext2" else (0,))
         if (name, few_shot) != ("gsm8k", 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "few_shot"), CASES)
def test_scores_equal_the_harness(name, few_shot, harness, folder, tmp_path):
    theirs, found, resps, pooled = harness(name, few_shot)
    args = evaluation.parse_args(["--weight", str(folder), "--save_dir", str(tmp_path), "--tasks", name, "--task_dir",
                                  str(FILES), "--few_shot", str(few_shot), "--device", "cpu", "--dtype", "float64",
                                  "--threads", "1", "--batch_size", "5"])
    seen, score = [], tasks.score

    def spy(name, items, outcomes):
        seen.append(outcomes)
        return score(name, items, outcomes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "score", spy)
        row, = evaluation.main(args)["results"]
    # Every single request first: a score of a few items would hide much. transformers rotates in float32.
    assert len(seen[0]) == len(resps) == row["n"]
    assert name != "wikitext2" or max(map(len, seen[0])) > 1  # one page fills several windows
    for ours, other in zip(seen[0], resps, strict=True):
        if name == "gsm8k":
            assert ours == other[0][0] or [ours] == other[0]
        elif name == "wikitext2":
            assert sum(logprob for logprob, _ in ours) == pytest.approx(_number(other[0]), rel=1e-6)
        else:
            for (logprob, greedy), ((their_logprob, their_greedy),) in zip(ours, other, strict=True):
                assert logprob == pytest.approx(float(their_logprob), rel=1e-6) and greedy == _true(their_greedy)
    for metric in tasks.TASKS[name].metrics:
        key = f"exact_match,{metric}" if name == "gsm8k" else f"{metric},none"
        if "perplexity" in metric:  # an exponential of the sums above
            assert row["scores"][metric] == pytest.approx(theirs[key], rel=1e-4), metric
        else:
            assert f"{row['scores'][metric]:.4f}" == f"{theirs[key]:.4f}", metric
        errors = [result[key.replace(",", "_stderr,")] for result, _ in found]
        if errors[0] != "N/A" and metric != "perplexity":  # of which the harness draws an estimate
            assert row["errors"][metric] == pytest.approx(pooled(errors) if len(errors) > 1 else errors[0]), metric


def _number(resp):
    return float(resp[0] if isinstance(resp, (list, tuple)) else resp)


def _true(flag):
    return flag if isinstance(flag, bool) else flag == "True"


@pytest.mark.slow
def test_numbers_are_read_as_the_harness_reads_them():
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-dev.txt)")
    task, golds = harness_task("gsm8k", 0), ["x #### 42", "#### 1,234", "#### 7.50", "#### 5", "#### 9", "#### 7"]
    texts = [tasks.cut(text) for text in ANSWERS]
    for ensemble, read in zip(task._filters, (tasks.strict_number, tasks.last_number), strict=True):
        for text in texts:
            extracted = [text]
            for make in ensemble.filters:
                extracted = list(make().apply([extracted], [{}]))[0]
            value = extracted if isinstance(extracted, str) else extracted[0]
            assert value == read(text), text
            for gold in golds:
                right = task.process_results({"question": "", "answer": gold}, [value])["exact_match"]
                assert bool(right) == tasks.same_number(value, gold), (value, gold)


# -- Shared beginnings -------------------------------------------------------------------------------------------------
def test_a_tree_holds_every_beginning_once_and_knows_what_follows_what():
    # without the 7 in front:  1 2 3 4     from 1 2 two branches, 3 4 and 5; the last ids are only scored
    #                              5       nodes 0 1 2 3 are 1 2 3 4, node 4 is 5
    tree = metrics._tree(0, [([7, 1, 2, 5, 8], 3), ([7, 1, 2, 3, 4, 6], 3), ([7, 1, 2, 9], 3)], known=1)
    assert tree.ids == [1, 2, 3, 4, 5] and tree.positions == [1, 2, 3, 4, 3]
    assert tree.ends == [5, 5, 4, 4, 5]
    assert tree.rows == [([5, 8], [1, 4]), ([3, 4, 6], [1, 2, 3]), ([9], [1])]


def test_of_equal_logits_the_first_id_is_the_most_likely_one(model_folder):
    model = Transformer.from_pretrained(model_folder(), dtype=torch.float64)
    states = torch.zeros(2, model.config.hidden_size, dtype=torch.float64)  # all logits are 0
    logprobs, best = metrics._read_targets(model, states, torch.tensor([1, 0]), torch.tensor([0, 5]))
    assert best == [True, False] and logprobs == pytest.approx([-math.log(model.config.vocab_size)] * 2)


def test_a_pass_stays_within_its_budget(model_folder, monkeypatch):
    model, draw, passes = Transformer.from_pretrained(model_folder()), random.Random(5), []
    forward = model.hidden_states

    def counted(ids, *given, cache=None, **named):
        passes.append((ids.shape, 0 if cache is None else cache.kv.shape[2] * cache.slots))
        return forward(ids, *given, cache=cache, **named)

    monkeypatch.setattr(model, "hidden_states", counted)
    trunk = [draw.randrange(300) for _ in range(100)]
    groups = [[(trunk * (n < 20) + [draw.randrange(300) for _ in range(n % 20 + 3)], 101 if n < 20 else 2)] * 2
              for n in range(50)]
    groups.append([(trunk[::-1], 1)])  # larger than the budget: alone
    list(metrics.sequence_scores(model, groups, batch_size=9, max_tokens=40))
    large = [shape for shape, _ in passes if shape.numel() > 40]
    assert large == [(1, 100), (1, 99)], "but for what is shared and what cannot be parted"
    assert max(shape[0] for shape, _ in passes) > 2 and all(shape[0] <= 9 for shape, _ in passes)
    assert 0 < max(slots for _, slots in passes) <= 16 * 40
    assert sum(shape == (1, 100) for shape, _ in passes) == 1, "the shared beginning is read once"


@pytest.mark.parametrize(("kind", "dtype", "apart"), [("dense", torch.float64, 1e-10), ("moe", torch.float64, 1e-10),
                                                      ("shared", torch.float64, 1e-10), ("dense", torch.float32, 1e-5)])
def test_shared_beginnings_change_no_score(kind, dtype, apart, model_folder):
    """The slow twin scores each row alone, in one forward pass without a cache."""
    model = Transformer.from_pretrained(model_folder(kind), dtype=dtype)
    draw = random.Random(3)

    def ids(count):
        return [draw.randrange(300) for _ in range(count)]

    trunk, groups = ids(40), []
    for n in range(30):
        stem = (trunk if n % 3 else []) + ids(draw.randrange(1, 30))
        tails = [ids(draw.randrange(1, 9)) for _ in range(n % 4 + 1)]
        if n % 5 == 0:
            tails = [tail[:1] for tail in tails]  # answers of one id need no second pass
        if n % 7 == 0:
            tails.append(list(tails[0]))  # the same answer twice
        groups.append([(stem + tail, len(stem)) for tail in tails])
    twin = trunk + ids(3)
    groups += [[(twin + [1], len(twin)), (twin + [2], len(twin))]] * 8  # one question again and again
    groups += [[(twin + ids(3), len(twin)), (twin + ids(2), len(twin))]] * 2
    groups.append([(ids(9), 1), (ids(20), 15)])  # rows with nothing in common
    groups.append([(ids(2), 1)])
    # and one row that is the model's own choice throughout
    row = ids(5)
    for _ in range(3):
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    groups.append([(row, 5), (row, 4)])
    found = dict(metrics.sequence_scores(model, groups, batch_size=7, max_tokens=200))
    assert sorted(found) == list(range(len(groups)))
    greedy = 0
    for n, group in enumerate(groups):
        for (row, start), (logprob, best) in zip(group, found[n], strict=True):
            logp = model(torch.tensor([row]))[0].log_softmax(-1)[start - 1:-1]
            target = torch.tensor(row[start:])
            assert logprob == pytest.approx(logp.gather(1, target[:, None]).sum().item(), rel=apart)
            assert best == bool((logp.argmax(-1) == target).all())
            greedy += best
    assert greedy >= 1 and found[len(groups) - 1][0][1]


@pytest.mark.skipif(not BF16_SPEEDUP, reason="bf16 products crash on this CPU")
def test_scores_in_bf16_are_the_models_own_and_leave_its_weights_alone(model_folder):
    model, draw = Transformer.from_pretrained(model_folder()), random.Random(3)
    before = [p.clone() for p in model.parameters()]
    groups = [[([draw.randrange(300) for _ in range(20)], 12)] for _ in range(9)]

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    found = dict(metrics.sequence_scores(model, groups, autocast=autocast))
    for n, [(row, start)] in enumerate(groups):
        with autocast():
            logp = model(torch.tensor([row]))[0].float().log_softmax(-1)[start - 1:-1]
        expected = logp.gather(1, torch.tensor(row[start:])[:, None]).sum().item()
        assert found[n][0][0] == pytest.approx(expected, rel=2e-3)
    assert all(p.dtype == torch.float32 and torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
def test_the_bench_runs_and_finds_the_same_numbers(folder, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-dev.txt)")
    output = tmp_path / "bench.jsonl"
    command = [sys.executable, ROOT / "bench" / "evaluation.py", "--weight", folder, "--task_dir", FILES, "--tasks",
               "piqa,wikitext2", "--limit", 3, "--rounds", 1, "--batch_sizes", 1, 2, "--output", output,
               "--few_shot", 0, 2]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["task"], row["few_shot"]) for row in rows] == [("piqa", 0), ("wikitext2", 0), ("piqa", 2)]
    assert all(row["largest_difference"] < 1e-4 and row["ratio"] > 0 and row["arithmetic"] > 1 for row in rows)
    table = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line[1].strip() for line in table] == ["task", "piqa", "wikitext2", "piqa", "all"]
