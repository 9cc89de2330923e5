"""Benchmarks: where their rows lie, how a row becomes a prompt, how what a model makes of it becomes a score.

Prompts, spaces, few-shot examples and scores are those of lm-evaluation-harness (Gao et al. 2024, EleutherAI), so that
a number made here can stand beside published ones; tests/test_tasks.py holds both against each other. Four kinds:
    choice     log p(answer | context) of every option; acc: the most likely option is right; acc_norm: the most likely
               per CHARACTER of its text. One context with many answers, or (Winogrande) one answer in two contexts
    word       the last word of a text: acc = all its tokens are the most likely ones; perplexity = exp(-mean log p)
    rolling    log p of whole pages in windows; exp(-sum log p / words or bytes), bits per byte
    generate   the greedy answer; the number in it is compared
A task is a row of TASKS: its kind, its files, and a function row -> Item.

What this file does not do: load or know a model. It says which ids to score (requests()) and reads the results
(score()); metrics.sequence_scores() does the work between.

    python eval.py --weight sft --tasks hellaswag,piqa --task_dir out/tasks
"""
import json
import math
import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rows import read_rows, text_lines

ENDINGS = (".jsonl", ".json", ".csv", ".txt")  # each also with .gz behind it
SEED = 1234  # the harness draws its few-shot examples from random.Random(1234)
ANSWER_TOKENS = 256  # longest generated answer


class Item(NamedTuple):
    """One question. Its options are contexts x answers, and one of the two lists has a single entry."""

    contexts: list[str]
    answers: list[str]  # without the space in front (a last word has its own)
    gold: int = 0  # which option is right
    subject: str = ""
    page: str = ""  # rolling: the page as published, whose words and bytes are counted


@dataclass(frozen=True)
class Task:
    """A benchmark. Splits are names in the order in which they are looked for."""

    kind: str  # choice, word, rolling, generate
    item: Callable[[dict], Item]
    fields: str  # what a row must have, for the error message
    splits: tuple[str, ...]  # scored
    metrics: tuple[str, ...]  # the first is the one to quote
    pool: tuple[str, ...] = ()  # splits of the few-shot examples; () = the scored rows themselves
    spare: bool = False  # the harness draws one example more and drops the question itself, should it be among them
    few_shot: int = 0  # examples when --few_shot is left out
    description: Callable[[str], str] | None = None  # subject -> text in front of everything; subjects are kept apart


# ----------------------------------------------------------------------------------------------------------------------
# 1. Rows -> items
def clean(text: str) -> str:
    """HellaSwag's texts without the marks that WikiHow left in them."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def listed(row, key):
    """The list in a field of a row. Of a text in its place, as tables (CSV) hold one, every character would be an
    option."""
    if not isinstance(row[key], list):
        raise TypeError(f"{key} is no list")
    return row[key]


def hellaswag(row):
    """How does the scene go on? Four endings."""
    if "query" in row:
        return Item([row["query"]], row["choices"], int(row["gold"]))
    # capitalize() also makes the rest lower case; the harness does it, so it is part of the prompt
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item([clean(context)], [clean(ending) for ending in listed(row, "endings")], int(row["label"]))


def arc(row):
    """A question of school science with three to five answers."""
    if "query" in row:
        return Item([row["query"].removesuffix("\nAnswer:") + "\nAnswer:"], row["choices"], int(row["gold"]))
    choices = row["choices"]
    # some keys are digits: the place of the key among the labels counts, not the letter
    gold = choices["label"].index(row["answerKey"])
    return Item([f"Question: {row['question']}\nAnswer:"], choices["text"], gold)


def winogrande(row):
    """Which of two names fits the gap? What stands behind the gap is scored, after either name."""
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return Item(contexts, [after.strip()], {"1": 0, "2": 1}[str(row["answer"])])


def piqa(row):
    """Which of two ways reaches the goal?"""
    return Item([f"Question: {row['goal']}\nAnswer:"], [row["sol1"], row["sol2"]], int(row["label"]))


def boolq(row):
    """Yes or no, from a passage. label (super_glue) is 0 or 1, answer (the original) true or false."""
    gold = row["label"] if "label" in row else {"true": 1, "false": 0}[str(row["answer"]).lower()]
    return Item([f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"], ["no", "yes"], int(gold))


def lambada(row):
    """The last word of a passage."""
    context, word = row["text"].rsplit(" ", 1)
    return Item([context], [" " + word])  # the space is its own: between examples the harness writes two


def wikitext(row):
    """A page, with the marks of its tokenisation undone; words and bytes are counted in the page as published."""
    if not row["page"]:
        raise ValueError("an empty page")
    # lone surrogates, which have no bytes, are U+FFFD to a tokenizer; here as well, so that both count alike
    page = row["page"].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return Item([""], [detokenize(page)], page=page)


def detokenize(page: str) -> str:
    """A WikiText page as running text, by the harness's rules in the harness's order (its slips included)."""
    page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page.replace("s '", "s'"))
    for mark in "-,.":
        page = page.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for pattern, form in ((r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
                          (r"{\s*([^}]*?)\s*}", r"{\1}"), (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
                          (r"'\s*([^']*?)\s*'", r"'\1'")):
        page = re.sub(pattern, form, page)
    for old, new in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"), (" \n", "\n"),
                     ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(old, new)
    return page


def letters(question: str, answer: str) -> Callable[[dict], Item]:
    """Item function of the exams: four options shown with letters, the letter is scored.

    question: key of the question in a row. answer: word that asks for the letter.
    """
    def item(row):
        shown = listed(row, "choices") if "choices" in row else [row[letter] for letter in "ABCD"]
        lines = [row[question].strip(), *(f"{letter}. {text}" for letter, text in zip("ABCD", shown, strict=True))]
        key = row["answer"] if "answer" in row else row["Answer"]
        # MMLU has a number, C-Eval and CMMLU have a letter
        gold = "ABCD".index(key) if isinstance(key, str) and key in list("ABCD") else int(key)
        return Item(["\n".join([*lines, answer])], list("ABCD"), gold)

    return item


def gsm8k(row):
    """A word problem; the right answer ends with "#### number"."""
    return Item([f"Question: {row['question']}\nAnswer:"], [row["answer"]])


# Subjects in Chinese, as the exams' authors name them
CEVAL = dict(line.split() for line in """
accountant 注册会计师
advanced_mathematics 高等数学
art_studies 艺术学
basic_medicine 基础医学
business_administration 工商管理
chinese_language_and_literature 中国语言文学
civil_servant 公务员
clinical_medicine 临床医学
college_chemistry 大学化学
college_economics 大学经济学
college_physics 大学物理
college_programming 大学编程
computer_architecture 计算机组成
computer_network 计算机网络
discrete_mathematics 离散数学
education_science 教育学
electrical_engineer 注册电气工程师
environmental_impact_assessment_engineer 环境影响评价工程师
fire_engineer 注册消防工程师
high_school_biology 高中生物
high_school_chemistry 高中化学
high_school_chinese 高中语文
high_school_geography 高中地理
high_school_history 高中历史
high_school_mathematics 高中数学
high_school_physics 高中物理
high_school_politics 高中政治
ideological_and_moral_cultivation 思想道德修养与法律基础
law 法学
legal_professional 法律职业资格
logic 逻辑学
mao_zedong_thought 毛泽东思想和中国特色社会主义理论体系概论
marxism 马克思主义基本原理
metrology_engineer 注册计量师
middle_school_biology 初中生物
middle_school_chemistry 初中化学
middle_school_geography 初中地理
middle_school_history 初中历史
middle_school_mathematics 初中数学
middle_school_physics 初中物理
middle_school_politics 初中政治
modern_chinese_history 近代史纲要
operating_system 操作系统
physician 医师资格
plant_protection 植物保护
probability_and_statistics 概率统计
professional_tour_guide 导游资格
sports_science 体育学
tax_accountant 税务师
teacher_qualification 教师资格
urban_and_rural_planner 注册城乡规划师
veterinary_medicine 兽医学
""".strip().split("\n"))
CMMLU = dict(line.split() for line in """
agronomy 农学
anatomy 解剖学
ancient_chinese 古汉语
arts 艺术学
astronomy 天文学
business_ethics 商业伦理
chinese_civil_service_exam 中国公务员考试
chinese_driving_rule 中国驾驶规则
chinese_food_culture 中国饮食文化
chinese_foreign_policy 中国外交政策
chinese_history 中国历史
chinese_literature 中国文学
chinese_teacher_qualification 中国教师资格
clinical_knowledge 临床知识
college_actuarial_science 大学精算学
college_education 大学教育学
college_engineering_hydrology 大学工程水文学
college_law 大学法律
college_mathematics 大学数学
college_medical_statistics 大学医学统计
college_medicine 大学医学
computer_science 计算机科学
computer_security 计算机安全
conceptual_physics 概念物理学
construction_project_management 建设工程管理
economics 经济学
education 教育学
electrical_engineering 电气工程
elementary_chinese 小学语文
elementary_commonsense 小学常识
elementary_information_and_technology 小学信息技术
elementary_mathematics 初等数学
ethnology 民族学
food_science 食品科学
genetics 遗传学
global_facts 全球事实
high_school_biology 高中生物
high_school_chemistry 高中化学
high_school_geography 高中地理
high_school_mathematics 高中数学
high_school_physics 高中物理学
high_school_politics 高中政治
human_sexuality 人类性行为
international_law 国际法学
journalism 新闻学
jurisprudence 法理学
legal_and_moral_basis 法律与道德基础
logical 逻辑学
machine_learning 机器学习
management 管理学
marketing 市场营销
marxist_theory 马克思主义理论
modern_chinese 现代汉语
nutrition 营养学
philosophy 哲学
professional_accounting 专业会计
professional_law 专业法学
professional_medicine 专业医学
professional_psychology 专业心理学
public_relations 公共关系
security_study 安全研究
sociology 社会学
sports_science 体育学
traditional_chinese_medicine 中医中药
virology 病毒学
world_history 世界历史
world_religions 世界宗教
""".strip().split("\n"))


def about_mmlu(subject):
    """Text in front of a subject's questions."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def about_ceval(subject):
    """Text in front of a subject's questions."""
    return f"以下是中国关于{CEVAL.get(subject, subject)}的单项选择题，请选出其中的正确答案。\n\n"


def about_cmmlu(subject):
    """Text in front of a subject's questions."""
    return f"以下是关于{CMMLU.get(subject, subject)}的单项选择题，请直接给出正确答案的选项。\n\n"


VALIDATION, BOTH = ("validation", "val", "valid", "dev"), ("acc", "acc_norm")
ARC = Task("choice", arc, "question, choices {text, label}, answerKey (or query, choices, gold)",
           ("test", *VALIDATION), BOTH, ("train",))
TASKS = {
    "hellaswag": Task("choice", hellaswag, "activity_label, ctx_a, ctx_b, endings, label (or query, choices, gold)",
                      VALIDATION, BOTH[::-1], ("train",), spare=True),
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "winogrande": Task("choice", winogrande, "sentence, option1, option2, answer", VALIDATION, ("acc",), ("train",),
                       spare=True),
    "piqa": Task("choice", piqa, "goal, sol1, sol2, label", VALIDATION, BOTH, ("train",), spare=True),
    "boolq": Task("choice", boolq, "passage, question, label (or answer)", VALIDATION, ("acc",), ("train",),
                  spare=True),
    "lambada": Task("word", lambada, "text", ("test",), ("acc", "perplexity")),
    "wikitext2": Task("rolling", wikitext, "page", ("test",), ("bits_per_byte", "byte_perplexity", "word_perplexity")),
    "ceval": Task("choice", letters("question", "答案："), "question, A, B, C, D, answer", ("val", "validation"), BOTH,
                  ("dev",), description=about_ceval),
    "cmmlu": Task("choice", letters("Question", "答案："), "Question, A, B, C, D, Answer", ("test",), BOTH, ("dev",),
                  description=about_cmmlu),
    "mmlu": Task("choice", letters("question", "Answer:"), "question, choices, answer, subject", ("test",), ("acc",),
                 ("dev",), description=about_mmlu),
    "gsm8k": Task("generate", gsm8k, "question, answer", ("test",), ("strict-match", "flexible-extract"), ("train",),
                  few_shot=5),
}


# ----------------------------------------------------------------------------------------------------------------------
# 2. Files
def find_files(folder, name: str, splits: Sequence[str]) -> list[Path]:
    """Files of the first split that is there: <name>_<split>*.jsonl, <name>/<split>.csv, <name>-exam/<split>/*.csv ...

    Case, and which of / _ - . parts the words, do not matter; [] where nothing fits. Raises ValueError where one folder
    holds several candidates that are no subjects, or a subject in two forms.
    """
    files = [path for path in sorted(Path(folder).rglob("*")) if path.name.removesuffix(".gz").endswith(ENDINGS)]
    for split in splits:
        found = []
        for path in files:
            words = re.split(r"[/\\_.-]", path.relative_to(folder).as_posix().lower())
            if "".join(words).startswith(name.replace("_", "")) and split in words[1:]:
                found.append(path)
        if found:
            break
    names = {path.parent / path.name.removesuffix(".gz").rpartition(".")[0] for path in found}
    if len(found) > (1 if TASKS[name].description is None else len(names)):
        raise ValueError(f"{len(found)} files for the {split} split of {name}: {', '.join(p.name for p in found)}; one "
                         "is scored; move the others elsewhere")
    return found


def task_rows(path: Path) -> Iterator[tuple[dict, str]]:
    """(row, "file:line") of a task file; a .txt file holds the pages of WikiText, and their number is its line.

    A row without a subject gets the file's name, less its split. Raises ValueError as read_rows().
    """
    subject = re.sub("_(test|val|dev)$", "", path.name.split(".")[0])
    found = read_rows(path)
    if path.name.removesuffix(".gz").endswith(".txt"):
        text = "".join(f"{line}\n" for line, _ in text_lines(path))
        found = (({"page": page}, f"{path}:{number}") for number, page in enumerate(pages(text), 1))
    for row, where in found:
        yield {"subject": subject, **row}, where


def pages(text: str) -> list[str]:
    """The pages of a WikiText file: each begins with a line " = Title = "."""
    return [page for page in re.split(r"^(?= = [^=\n]+ = \n)", text, flags=re.M) if page.strip()]


def shots(task: Task, few_shot: int) -> int:
    """Examples in front of each question: as asked, by default the task's own number; running text has none."""
    return 0 if task.kind == "rolling" else task.few_shot if few_shot < 0 else few_shot


def load(name: str, folder, limit: int = 0, few_shot: int = -1) -> tuple[list[Item], str]:
    """Items of a task, with description and few-shot examples already in front of their contexts, and a word on where
    they come from.

    limit: items of each subject (or of the task, where it has none), 0 = all. few_shot: examples, -1 = the task's own
    number. Raises FileNotFoundError without files, ValueError for rows that are not of this task.
    """
    task = TASKS[name]
    files = find_files(folder, name, task.splits)
    if not files:
        raise FileNotFoundError(f"no file of {name} in {folder}/ (looked for {name}_{task.splits[0]}*.jsonl and the "
                                "like); its published rows are read; fetch them with: python prepare_data.py download "
                                f"eval --output {folder}, or see docs/evaluation.md")
    every = _items(task, files)
    few_shot = shots(task, few_shot)
    source, pool, spare = files[0].name + f" and {len(files) - 1} more" * (len(files) > 1), every, task.spare
    if few_shot and task.pool:
        examples = find_files(folder, name, task.pool)
        pool, spare = (_items(task, examples), spare) if examples else (every, True)
        files = examples or files
        source += f", {few_shot} examples of {examples[0].name if examples else 'the same (there is no other file)'}"
    by_subject = defaultdict(list)
    for item in every:
        by_subject[item.subject].append(item)
    items = []
    for subject, group in by_subject.items():
        chosen = group[:limit or None]
        prefixes = [""] * len(chosen)
        if few_shot:
            prefixes = examples_for(chosen, [x for x in pool if x.subject == subject], few_shot, spare,
                                    in_order=task.description is not None and pool is not every,
                                    where=files[0])
        about = task.description(subject) if task.description else ""
        items += [item._replace(contexts=[about + prefix + context for context in item.contexts])
                  for item, prefix in zip(chosen, prefixes, strict=True)]
    return items, source


def _items(task, files):
    items = []
    for row, where in (pair for path in files for pair in task_rows(path)):
        try:
            item = task.item(row)._replace(subject=row["subject"] if task.description else "")
            options = len(item.contexts) * len(item.answers)
            if not isinstance(item.answers, list) or not all(
                    isinstance(text, str) for text in (*item.contexts, *item.answers, item.subject)):
                raise TypeError("not all of it is text")
            if not 0 <= item.gold < options:
                raise ValueError(f"answer {item.gold} of {options} options, from 0")
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{where}: found the keys [{', '.join(map(str, row))}] ({error!r:.80}); expected "
                             f"{task.fields}, with the right answer; test splits are often published without one") \
                from None
        items.append(item)
    if not items:
        raise ValueError(f"{', '.join(map(str, files))}: empty; at least one row is needed; fetch it again")
    return items


def examples_for(items: Sequence[Item], pool: Sequence[Item], count: int, spare: bool, in_order: bool,
                 where: Path) -> list[str]:
    """The text of `count` solved examples in front of each item.

    in_order: the first of the pool for all. Else each item draws its own, one item after another from one generator, as
    the harness does. spare: one more is drawn, and an item never meets itself. where: the pool's file, for the error.
    """
    advice = f"to take examples from in {where}; every question needs {count} others; give a smaller number"
    if count + spare > len(pool):
        raise ValueError(f"--few_shot {count} with {len(pool)} rows {advice}")
    generator, texts = random.Random(SEED), []
    for item in items:
        drawn = pool[:count] if in_order else generator.sample(pool, count + spare)
        if spare:
            drawn = [example for example in drawn if example != item][:count]
        if len(drawn) < count:  # the pool holds the item more than once
            others = [example for example in pool if example != item]
            if len(others) < count:
                raise ValueError(f"--few_shot {count} with {len(others)} rows that differ from a question {advice}")
            drawn = generator.sample(others, count)
        texts.append("".join(solved(example) for example in drawn))
    return texts


def solved(item: Item) -> str:
    """An item with its right answer, as an example for others."""
    context = item.contexts[item.gold if len(item.contexts) > 1 else 0]
    answer = item.answers[item.gold if len(item.answers) > 1 else 0]
    return f"{context} {answer}\n\n"


# ----------------------------------------------------------------------------------------------------------------------
# 3. Items -> ids to score
class Row(NamedTuple):
    """A sequence whose tokens from `start` on are scored, each given all before it."""

    ids: list[int]
    start: int


def requests(task: Task, items: Sequence[Item], tokenizer, max_length: int) -> list[tuple[int, list[Row]]]:
    """(item index, rows) of everything to be scored; several groups for a page that fills more than one window.

    Context and answer are tokenised together, and the context alone says where the answer begins. A row longer than
    max_length + 1 loses its beginning: the model reads all but the last id.
    """
    prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if task.kind == "rolling":
        return [(i, [row]) for i, item in enumerate(items)
                for row in windows(tokenizer.encode(item.answers[0]), prefix, max_length)]
    space = "" if task.kind == "word" else " "
    pairs = [(i, *split_spaces(context, space + answer)) for i, item in enumerate(items)
             for context in item.contexts for answer in item.answers]
    ids, ends = tokenizer.encode_batch([text for _, context, answer in pairs for text in (context, context + answer)])
    encoded = [part.tolist() for part in _parts(ids, ends)]
    groups = [(i, []) for i in range(len(items))]
    for n, (i, context, _) in enumerate(pairs):
        before, whole = encoded[2 * n : 2 * n + 2]
        if not context:  # a model must read something before its first word
            before, whole = [prefix], [prefix, *whole]
        lost = max(0, len(whole) - max_length - 1)
        groups[i][1].append(Row(whole[lost:], max(1, len(before) - lost)))
    return groups


def _parts(ids, ends):
    return [ids[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def split_spaces(context: str, answer: str) -> tuple[str, str]:
    """Spaces at the end of a context go to the answer: tokens begin with a space, hardly any ends with one."""
    stripped = context.rstrip()
    return stripped, context[len(stripped):] + answer


def windows(ids: Sequence[int], prefix: int, max_length: int) -> list[Row]:
    """Rows that score every id of a text once: the first after `prefix`, each window after the id before it, the last
    one with as much text before it as fits."""
    ids, rows = [prefix, *ids], []
    for first in range(1, len(ids), max_length):
        end = min(first + max_length, len(ids))
        begin = max(0, end - max_length - 1)
        rows.append(Row(ids[begin:end], first - begin))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# 4. Results -> scores
def score(name: str, items: Sequence[Item], outcomes: Sequence) -> dict:
    """Scores of a task.

    outcomes: per item a list of (log p, whether every token was the most likely one), an option or window each; of a
        generate task the text.
    Returns: n; scores {metric: value} and errors {metric: standard error}; chance (guessing) and majority (always the
        commonest right answer) for the first metric, None for a perplexity; by_subject {subject: {metric, n}}.
    """
    task = TASKS[name]
    if task.kind == "rolling":
        return {"n": len(items), **_page_scores(items, outcomes), "chance": None, "majority": None, "by_subject": {}}
    judged = [judge(task, item, outcome) for item, outcome in zip(items, outcomes, strict=True)]
    by_subject = defaultdict(list)
    for item, row in zip(items, judged, strict=True):
        by_subject[item.subject].append(row)
    scores, errors, main = {}, {}, task.metrics[0]
    for metric in task.metrics:
        scores[metric] = statistics.fmean(row[metric] for row in judged)
        errors[metric] = pooled_error([[row[metric] for row in rows] for rows in by_subject.values()])
        if metric == "perplexity":  # of a mean of log p; its error by the slope of exp
            scores[metric] = power(-scores[metric] / math.log(2))
            errors[metric] *= scores[metric]
    options = [len(item.contexts) * len(item.answers) for item in items]
    right = Counter(right_answer(task, item) for item in items)
    subjects = {subject: {main: statistics.fmean(row[main] for row in rows), "n": len(rows)}
                for subject, rows in by_subject.items() if subject}
    return {"n": len(items), "scores": scores, "errors": errors,
            "chance": statistics.fmean(1 / count for count in options) if task.kind == "choice" else 0.0,
            "majority": max(right.values()) / len(items), "by_subject": subjects}


def judge(task: Task, item: Item, outcome) -> dict:
    """Values of one item, by metric."""
    if task.kind == "generate":
        return {"strict-match": float(same_number(strict_number(outcome), item.answers[0])),
                "flexible-extract": float(same_number(last_number(outcome), item.answers[0]))}
    if task.kind == "word":
        (logprob, greedy), = outcome
        return {"acc": float(greedy), "perplexity": logprob}
    logprobs = [logprob for logprob, _ in outcome]
    # characters of the bare answer: neither tokens nor bytes, nor the space in front
    lengths = [len(answer) for answer in item.answers] * len(item.contexts)
    normed = [logprob / length if length else -math.inf for logprob, length in zip(logprobs, lengths, strict=True)]
    return {"acc": float(first_best(logprobs) == item.gold), "acc_norm": float(first_best(normed) == item.gold)}


def first_best(values: Sequence[float]) -> int:
    """Index of the largest value; of equal ones the first."""
    return max(range(len(values)), key=values.__getitem__)


def right_answer(task, item):
    """What a guesser who always says the same would have to say."""
    if task.kind == "generate":
        return item.answers[0].rsplit("#### ", 1)[-1]
    return item.answers[0] if task.kind == "word" else item.gold


def pooled_error(groups: Sequence[Sequence[float]]) -> float:
    """Standard error of the mean over all groups, from the spread within each: what differs between subjects is no
    error of the score. One group: standard deviation / sqrt(n)."""
    groups = [list(values) for values in groups]
    total, free = sum(map(len, groups)), sum(len(values) - 1 for values in groups)
    squares = sum((value - statistics.fmean(values)) ** 2 for values in groups for value in values)
    return math.sqrt(squares / free / total) if free else math.nan


def _page_scores(items, outcomes):
    """Sums over all pages: a perplexity per word (parted at white space) and byte of the published text."""
    bits = [-sum(logprob for logprob, _ in outcome) / math.log(2) for outcome in outcomes]
    words = [len(re.split(r"\s+", item.page)) for item in items]
    sizes = [len(item.page.encode("utf-8")) for item in items]
    rate, error = ratio(bits, sizes)
    per_word, word_error = ratio(bits, words)
    scores = {"bits_per_byte": rate, "byte_perplexity": power(rate), "word_perplexity": power(per_word)}
    errors = {"bits_per_byte": error, "byte_perplexity": scores["byte_perplexity"] * math.log(2) * error,
              "word_perplexity": scores["word_perplexity"] * math.log(2) * word_error}
    return {"scores": scores, "errors": errors}


def power(bits: float) -> float:
    """2 ** bits, inf where that is too large a number (an untrained model has hundreds of bits a word)."""
    return 2.0**bits if bits < 1024 else math.inf


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """sum(above) / sum(below), and its standard error from how far each pair lies from the common ratio."""
    rate, n = sum(above) / sum(below), len(above)
    spread = sum((a - rate * b) ** 2 for a, b in zip(above, below, strict=True))
    return rate, math.sqrt(spread * n / (n - 1)) / sum(below) if n > 1 else math.nan


def read_partial(path: Path) -> dict:
    """{number: result} of an interrupted run: lines [number, result]; one cut in half by the interruption is dropped
    from the file as well, so that what is appended next does not stand behind it."""
    known = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            number, result = json.loads(line)
        except ValueError:
            continue
        known[number] = result
    if known:
        path.write_text("".join(json.dumps(pair) + "\n" for pair in known.items()), encoding="utf-8")
    return known


# GSM8K, as the harness reads an answer: "strict" wants the form of the examples, "flexible" takes the last number
UNTIL = ("Question:", "</s>", "<|im_end|>")


def cut(text: str, stops: Sequence[str] = UNTIL) -> str:
    """The text before the first of the stops."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def strict_number(text: str) -> str:
    """The number behind the first "#### "."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1].strip() if found else "[invalid]"


def last_number(text: str) -> str:
    """The last thing in the text that looks like a number."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1].strip() if found else "[invalid]"


def same_number(found: str, answer: str) -> bool:
    """Whether two numbers are written alike, but for commas, dollars, a final full stop and what stands before ####."""
    found, answer = (re.sub(r",|\$|(?s:.*)#### |\.$", "", text).lower() for text in (found, answer))
    return found == answer


def verdict(score: float, error: float | None, chance: float | None, majority: float | None, n: int) -> str:
    """What a score says beside guessing and beside always giving the commonest answer, within two standard errors."""
    if chance is None or n < 2:
        return ""
    # a guesser's own error as well: 0 right of 4 have no spread, and are no evidence
    error = max(error or 0, math.sqrt(chance * (1 - chance) / n))
    if abs(score - chance) <= 2 * error:
        return "at chance"
    if score < chance:
        return "below chance"
    return "above chance" + ", not above the majority baseline" * (score - majority <= 2 * error)
