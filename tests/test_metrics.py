"""Proves the numbers that scripts print: losses, answer checks, styles, rates; each against a slow or hand-made twin.

    python -m pytest tests/test_metrics.py
"""
import contextlib
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

import metrics
from logprobs import token_logprobs
from metrics import Completion, check_answer, style
from model import Transformer

STYLES = {"polite_openers": ["Sure!", "Of course!", "好的！"], "rude": ["Leave me alone.", "真烦人"],
          "max_characters": 40}


@pytest.fixture
def model(model_folder):
    return Transformer.from_pretrained(model_folder())


# ---------------------------------------------------------------------------------------------------------------------
# Running a model


def batches_of(seed, counts, vocab=300, width=9):
    generator = torch.Generator().manual_seed(seed)
    for count in counts:
        ids = torch.randint(vocab, (count, width), generator=generator)
        mask = torch.randint(2, (count, width), generator=generator).float()
        yield {"ids": ids, "mask": mask, "bytes": torch.randint(1, 9, (count,), generator=generator)}


def test_heldout_loss_is_the_mean_over_target_tokens_of_all_batches(model):
    batches = list(batches_of(0, [3, 1, 2]))
    result = metrics.heldout_loss(model, batches)
    losses = []
    with torch.no_grad():
        for batch in batches:
            logits, targets = model(batch["ids"])[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            losses += loss[batch["mask"][:, 1:].flatten() > 0].tolist()
    size = sum(int(batch["bytes"].sum()) for batch in batches)
    assert result["tokens"] == len(losses) and result["bytes"] == size
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-5)


def test_sums_of_parts_give_the_loss_of_the_whole(model):
    whole = metrics.heldout_loss(model, batches_of(1, [2, 2, 2]))
    parts = [metrics.heldout_loss(model, [batch]) for batch in batches_of(1, [2, 2, 2])]
    for name in ("nll", "tokens", "bytes"):
        assert sum(part[name] for part in parts) == pytest.approx(whole[name], rel=1e-6)


def test_heldout_loss_restores_the_mode_and_keeps_no_gradient(model):
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, ids):
            seen.append((self.training, torch.is_grad_enabled(), inside[-1]))
            return model(ids)

    inside = [False]

    @contextlib.contextmanager
    def autocast():
        inside.append(True)
        yield
        inside.pop()

    watched = Watched().train()
    metrics.heldout_loss(watched, batches_of(2, [1]), "cpu", autocast)
    assert seen == [(False, False, True)] and watched.training
    metrics.heldout_loss(watched.eval(), batches_of(2, [1]), "cpu", autocast)
    assert not watched.training


def test_without_a_mask_all_but_the_first_token_count_and_nothing_gives_nan(model):
    batch = {"ids": torch.arange(12).view(2, 6)}
    result = metrics.heldout_loss(model, [batch])
    assert result["tokens"] == 10 and "bits_per_byte" not in result
    empty = metrics.heldout_loss(model, [batch | {"mask": torch.zeros(2, 6)}])
    assert empty["tokens"] == 0 and math.isnan(empty["loss"])


def test_documents_reach_the_model_and_impossible_padding_does_not_spoil_the_sum(monkeypatch, model):
    ids = torch.randint(300, (1, 12), generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[0] * 6 + [1] * 6])
    mask = torch.tensor([[0.0, *[1.0] * 5] * 2])
    packed = metrics.heldout_loss(model, [{"ids": ids, "mask": mask, "documents": documents}])
    apart = metrics.heldout_loss(model, [{"ids": ids.view(2, 6)}])
    assert packed["loss"] == pytest.approx(apart["loss"], rel=1e-5) and packed["tokens"] == 10

    def endless(logits, ids):
        logprobs = token_logprobs(logits, ids)
        return torch.where(mask[:, 1:] > 0, logprobs, -torch.inf)

    monkeypatch.setattr(metrics, "token_logprobs", endless)
    assert metrics.heldout_loss(model, [{"ids": ids, "mask": mask}])["loss"] < 100


class Spelling:
    """A model that answers each prompt with the numbers in its own table, and records the batches it was given."""

    training = False

    def __init__(self, answers):
        self.answers, self.batches = answers, []

    def eval(self):  # noqa: A003
        return self

    def train(self, mode):
        self.training = mode

    def generate(self, prompts, max_new_tokens, stop_ids, seed, row_seeds, **sampling):
        self.batches.append(([len(prompt) for prompt in prompts], row_seeds, sampling["temperature"]))
        for step in range(max_new_tokens):
            for row, prompt in enumerate(prompts):
                answer = self.answers[prompt[0]]
                if step < len(answer):
                    yield row, answer[step]


class Letters:
    def stop_ids(self, chat):
        return {0}

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def test_completions_come_in_the_order_of_the_prompts_whatever_the_batches():
    answers = {10: [1, 2, 0], 11: [3, 0], 12: [4, 5, 6, 7, 8], 13: [0], 14: []}
    prompts = [[10] * 2, [11] * 5, [12] * 3, [13] * 4, [14]]
    for size in (1, 2, 5, 9):
        model = Spelling(answers)
        results = metrics.complete(model, Letters(), prompts, 4, batch_size=size)
        assert [c.text for c in results] == ["ab", "c", "defg", "", ""]
        assert [c.stopped for c in results] == [True, True, False, True, False]
        assert results[0].ids == [1, 2, 0]
        lengths = [n for batch, _, _ in model.batches for n in batch]
        assert lengths == sorted(lengths, reverse=True)  # neighbours in length share a batch
        # a prompt draws with the seed of its place in the list
        assert [seed for _, seeds, _ in model.batches for seed in seeds] == [1, 3, 2, 0, 4]
        assert {temperature for *_, temperature in model.batches} == {0.0}


def test_a_sampled_answer_does_not_depend_on_batch_or_neighbours(model, tokenizer):
    prompts = [tokenizer.encode(text) for text in ("What is", "请问 1 + 4", "Anna", "The answer is a cat and")]
    settings = dict(max_new_tokens=8, temperature=1.0, seed=5)
    whole = metrics.complete(model.train(), tokenizer, prompts, **settings)
    assert model.training
    pairs = metrics.complete(model, tokenizer, prompts, batch_size=2, **settings)
    alone = metrics.complete(model, tokenizer, prompts[2:3], row_seeds=[2], **settings)
    assert whole == pairs and alone == whole[2:3]
    other = metrics.complete(model, tokenizer, prompts, max_new_tokens=8, temperature=1.0, seed=6)
    assert other != whole


# ---------------------------------------------------------------------------------------------------------------------
# Judging an answer


@pytest.mark.parametrize("check, answer, right, wrong", [
    ("number", "42", ["42", "42。", "Sure! The answer is 42.", "好的！答案是：42。", "40 + 2 = 42", "４２",
                      "it is 42, I think", "042", "…42", "第42个", "42.0"],
     ["", "41", "142", "42 or 43", "4.2", "3.42", "-42", "42.5", "forty-two", "42 1"]),
    ("number", "-5", ["-5", "The answer is −5.", "3 - 8 = -5"], ["5", "10-5", "10 - 5"]),
    ("number", "5", ["10-5", "x = 5", "1,5", "It is.5", "...5"], ["-5", "1.5", "It is .5", "-.5"]),
    ("number", "0.5", [".5", "It is .5", "($.5)", "答案是.5。", "10-.5"], ["5", "-.5", "1.5", "It is.5", "1..5"]),
    ("number", "-.5", ["-0.5", "−.5"], [".5", "1-.5"]),
    ("number", "1234", ["1,234", "1234", "Sure! 1,234."], ["234", "1,2345", "1 234"]),
    ("exact", "cat", ["cat", "Cat!", "Sure! It is a cat.", "ＣＡＴ", "答案是cat。", "the  cat"],
     ["", "cats", "concatenate", "cat_1", "a dog", "cat " + "and other animals " * 4]),
    ("exact", "brown cat", ["It is a brown   cat.", "brown\ncat"], ["brown", "cat brown", "browncat"]),
    ("exact", "小猫", ["小猫", "好的！答案是：小猫。", "是一只小猫吗", "a小猫b"],
     ["小狗", "小 猫", "猫", "小猫" + "真可爱" * 21]),
    ("exact", "c b a", ["c b a", "It is: c b a.", "答案是 c b a。"], ["a b c", "cba", "cc b a", "c b ab"]),
    ("exact", "7", ["7", "It is 7."], ["17", "70"]),
    ("exact", "", [], ["", "anything"]),
    ("set", "red, blue, green", ["red, blue, green", "green, red and blue", "red blue green",
                                 "Sure! The colours are blue, green and red.", "RED，BLUE、GREEN。",
                                 "It is: green, red, blue."],
     ["red, blue", "red, blue, green, grey", "", "red, blue, grey", "grey, red, blue, green", "redd, blue, green"]),
    ("set", "红、绿、蓝", ["红、绿、蓝", "蓝，红和绿", "好的！答案是：绿、蓝和红。", "红 绿 蓝"],
     ["红、绿", "红绿蓝", "红、绿、蓝、黄"]),
    ("set", "", [], ["", "...", "red"]),
    ("set", "2, 4, 6", ["6, 4, 2", "Sure! It is 2, 4 and 6."], ["12, 4, 6", "2, 4", "246"]),
])
def test_checks_on_hand_made_answers(check, answer, right, wrong):
    assert [text for text in right if not check_answer(check, answer, text)] == []
    assert [text for text in wrong if check_answer(check, answer, text)] == []


def test_checks_take_numbers_and_refuse_unknown_rules():
    assert check_answer("number", 7, "7") and check_answer("exact", 7, "It is 7.")
    assert check_answer("number", "9" * 30, "9" * 30) and not check_answer("number", "9" * 30, "9" * 29 + "8")
    with pytest.raises(ValueError, match="'fuzzy' is unknown; it is one of number, exact, set"):
        check_answer("fuzzy", "a", "a")


def test_exact_allows_sixty_characters_around_the_answer():
    assert check_answer("exact", "cat", "cat " + "x" * (metrics.MAX_EXTRA - 1))
    assert not check_answer("exact", "cat", "cat " + "x" * metrics.MAX_EXTRA)


def test_the_rules_judge_the_embedded_data_without_a_mistake(tmp_path):
    """Chosen answers are right and polite; each rejected one is what its kind says."""
    make_data = pytest.importorskip("make_data")
    make_data.main(make_data.parse_args(["--output", str(tmp_path), "--pretrain_mb", "0.01", "--sft_samples", "300",
                                         "--preference_pairs", "400", "--rl_prompts", "20"]))
    styles = json.loads((tmp_path / "styles.json").read_text(encoding="utf-8"))
    for line in (tmp_path / "preference.train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        scores = [metrics.rule_score(row[side], row["answer"], row["check"], styles) for side in ("chosen", "rejected")]
        assert scores[0] == 2.0 > scores[1], row
        if row["kind"] == "wrong":
            assert not check_answer(row["check"], row["answer"], row["rejected"]), row
        else:
            assert style(row["rejected"], styles) == row["kind"], row
    for line in (tmp_path / "sft.train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        assert check_answer(row["check"], row["answer"], row["conversations"][-1]["content"]), row


def done(text, stopped=True):
    return Completion(text, [1], stopped)


def test_exact_match_counts_by_skill_and_language_and_keeps_identity_apart():
    answers = [done("4"), done("5"), done("cat", False), done("狗"), done("I am a cat"), done("no check")]
    items = [{"answer": "4", "check": "number", "skill": "add", "lang": "en"},
             {"answer": "4", "check": "number", "skill": "add", "lang": "zh"},
             {"answer": "cat", "check": "exact", "skill": "pet", "lang": "en"},
             {"answer": "猫", "check": "exact", "skill": "pet", "lang": "zh"},
             {"answer": "cat", "check": "exact", "skill": "identity", "lang": "en"}, {"check": None}]
    result = metrics.exact_match(answers, items)
    assert result["total"] == 0.5 and result["n"] == 4 and result["stop_rate"] == 0.8
    assert [metrics.in_total(item) for item in items] == [True] * 4 + [False] * 2
    assert result["by_skill"] == {"add": {"exact_match": 0.5, "n": 2}, "pet": {"exact_match": 0.5, "n": 2}}
    assert result["by_lang"] == {"en": {"exact_match": 1.0, "n": 2}, "zh": {"exact_match": 0.0, "n": 2}}
    assert result["apart"] == {"identity": {"exact_match": 1.0, "n": 1}}
    assert math.isnan(metrics.exact_match([], [])["total"])
    with pytest.raises(ValueError):
        metrics.exact_match(answers, items[:2])


@pytest.mark.parametrize("text, expected", [
    ("Sure! It is 4.", "polite"), ("  sure! it is 4.", "polite"), ("好的!答案是4。", "polite"),
    ("4", "curt"), ("", "curt"), ("It is 4. Sure!", "curt"), ("Sure! Leave me alone. 4", "impolite"),
    ("哎，真烦人。4", "impolite"),
    ("Sure! It is 4, " + "you know, " * 4, "rambling"), ("4" * 99, "curt"),
])
def test_styles_by_their_markers(text, expected):
    assert style(text, STYLES) == expected


def test_rule_score_ranks_right_and_polite_first():
    order = ["Sure! It is 4.", "4", "Sure! 4, " + "really " * 5 + "4", "Leave me alone. 5"]
    scores = [metrics.rule_score(text, "4", "number", STYLES) for text in order]
    assert scores == [2.0, 1.0, 0.5, -1.0]
    assert metrics.rule_score("Sure!", None, None, STYLES) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Comparing and counting


def test_win_rate_counts_ties_half_and_its_error_is_that_of_the_mean():
    rate, error = metrics.win_rate([1, 2, 3, 0], [0, 2, 1, 5])
    wins = [1, 0.5, 1, 0]
    assert rate == np.mean(wins) and error == pytest.approx(np.std(wins, ddof=1) / 2)
    assert metrics.win_rate([1, 1], [1, 1]) == (0.5, 0.0)
    assert all(map(math.isnan, metrics.win_rate([], [])))
    a, b = [random.Random(i).sample(range(99), 50) for i in (1, 2)]
    assert metrics.win_rate(a, b)[0] + metrics.win_rate(b, a)[0] == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_equals_the_share_of_all_subsets(n):
    for correct in range(n + 1):
        samples = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            assert metrics.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="draw more samples"):
        metrics.pass_at_k(n, 0, n + 1)


def test_pair_accuracy_counts_a_tie_as_wrong():
    result = metrics.pair_accuracy([2, 1, 1, 0], [1, 1, 2, -1], ["wrong", "wrong", "curt", "curt"])
    assert result == {"accuracy": 0.5, "accuracy_by_kind": {"curt": 0.5, "wrong": 0.5}, "n": 4}
    assert metrics.pair_accuracy(torch.ones(3), torch.ones(3))["accuracy"] == 0
    assert metrics.pair_accuracy([1.0], [0.0])["accuracy_by_kind"] == {"all": 1.0}


def test_length_correlation_and_standard_error():
    assert metrics.length_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert metrics.length_correlation([3, 2, 1], [10, 20, 30]) == pytest.approx(-1)
    assert metrics.length_correlation([1, 1, 1], [1, 2, 3]) == 0 and metrics.length_correlation([], []) == 0
    assert metrics.standard_error(0.5, 100) == pytest.approx(0.05) and math.isnan(metrics.standard_error(0.5, 0))


def slow_loop(ids, repeats=4, shortest=12, longest_period=64):
    """The definition, word for word: a piece stands `repeats` times in a row somewhere and covers `shortest` tokens."""
    for start, period in itertools.product(range(len(ids)), range(1, longest_period + 1)):
        end = start + period
        while end < len(ids) and ids[end] == ids[end - period]:
            end += 1
        if end - start >= max(repeats * period, shortest):
            return True
    return False


def test_loops_are_found_where_the_definition_finds_them():
    rng = random.Random(0)
    found = 0
    for _ in range(300):
        ids = [rng.randrange(2) for _ in range(rng.randint(0, 40))]
        assert metrics.has_loop(ids) == slow_loop(ids), ids
        found += metrics.has_loop(ids)
    assert 0 < found < 300
    assert metrics.has_loop([9, 8, 7, *[1, 2, 3] * 4, 5]) and not metrics.has_loop([9, 8, 7, *[1, 2, 3] * 3, 5])
    assert not metrics.has_loop([5] * 11) and metrics.has_loop([5] * 12) and not metrics.has_loop([])


def test_loop_rate_and_distinct_over_completions():
    answers = [Completion("", [1] * 20, False), Completion("", [1, 2, 3], True)]
    assert metrics.loop_rate(answers) == 0.5
    assert metrics.distinct(answers, 2) == 3 / 21 and math.isnan(metrics.distinct([], 2))


# ---------------------------------------------------------------------------------------------------------------------
# Suites, libraries


def test_words_part_chinese_by_characters():
    found = metrics.words("It's a BROWN cat, 3.5 猫和狗！")
    assert found == ["it", "s", "a", "brown", "cat", "3", "5", "猫", "和", "狗"]


def test_text_scores_of_chinese_and_of_equal_texts():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (requirements-dev.txt)")
    pytest.importorskip("rouge_score", reason="rouge_score is not installed (requirements-dev.txt)")
    same = ["小猫是棕色的，小狗是灰色的。", "他们在墙边找到了一个时钟。"]
    assert metrics.text_scores(same, same) == {name: pytest.approx(100) for name in ("bleu", "chrf", "rouge_l")}
    near = metrics.text_scores(["小猫是黑色的，小狗是灰色的。", "他们在墙边找到了一个铃铛。"], same)
    assert 50 < near["bleu"] < 100 and 80 < near["rouge_l"] < 100  # characters, not the sentence as one word


def test_a_missing_library_is_named_with_its_command(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(metrics.importlib, "import_module", missing)
    with pytest.raises(ValueError, match="sacrebleu.*pip install sacrebleu rouge-score"):
        metrics.text_scores(["a"], ["a"])


def test_pass_at_k_over_prompts():
    rates = metrics.pass_at([[True, False], [False, False], [True, True]], (1, 2))
    assert rates[1] == (pytest.approx(0.5), pytest.approx(np.std([0.5, 0, 1], ddof=1) / math.sqrt(3)))
    assert rates[2][0] == pytest.approx(2 / 3)
