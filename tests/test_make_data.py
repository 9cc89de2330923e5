"""The embedded data set: deterministic, bilingual, judged right, and held out for real.

The judges here are written again from the rules (docs of the row formats), and the content of a question is found by
reading its text, not by asking the generator for its key.
"""
import json
import re
import unicodedata
from collections import Counter, defaultdict

import pytest

import make_data
import metrics
import prepare_data
import tokenizer
import train_pretrain
import train_sft
from make_data import ANIMALS, COLOURS, DICTIONARY, FACTS, KINDS, KNOWN, LANGS, NAMES, PLACES, THINGS
from model import Transformer

STAGES = ("pretrain", "sft", "preference", "rl")
MB = 1.0
SIZES = ["--pretrain_mb", str(MB), "--sft_samples", "4000", "--preference_pairs", "1000", "--rl_prompts", "800"]
SMALL = ["--pretrain_mb", "0.1", "--sft_samples", "200", "--preference_pairs", "40", "--rl_prompts", "40"]


def write(folder, *flags):
    make_data.main(make_data.parse_args(["--output", str(folder), *SIZES, *flags]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def rows(folder):
    """{(stage, part): rows}. Lines are split at "\\n" only."""
    return {(stage, part): [json.loads(line) for line in
                            (folder / f"{stage}.{part}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
            for stage in STAGES for part in ("train", "heldout")}


def question(row):
    """The last thing the user says."""
    if "prompt" in row:
        return row["prompt"]
    return [turn["content"] for turn in row["conversations"] if turn["role"] == "user"][-1]


def story_text(row):
    """The story of a row, which stands before the first question about it."""
    said = [row["prompt"]] if "prompt" in row else [t["content"] for t in row["conversations"] if t["role"] == "user"]
    return said[0].split("\n")[0]


def normal(text):
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return re.sub(r"^[^\w]+|[^\w]+$", "", text)


def right(check, answer, text):
    """The rules of the row format, written again."""
    if check == "number":
        found = re.findall(r"\d+", text)
        return bool(found) and int(found[-1]) == int(answer)
    assert check == "exact"
    answer, text = normal(answer), normal(text)
    edges = [r"(?<![a-z0-9])", r"(?![a-z0-9])"] if answer.isascii() else ["", ""]
    return len(text) <= len(answer) + 60 and bool(re.search(edges[0] + re.escape(answer) + edges[1], text))


def style(styles, text):
    if any(rude in text for rude in styles["rude"]):
        return "impolite"
    if not text.startswith(tuple(styles["polite_openers"])):
        return "curt"
    return "rambling" if len(text) > styles["max_characters"] else "polite"


# ---------------------------------------------------------------------------------------------------------------------
# Content, read from the text


PAIR_OF = {word: pair for pair in DICTIONARY for word in pair}
PERSON_OF = {name: person for person, _, _ in FACTS for name in person}
WORLD = {word for entries in (ANIMALS, COLOURS, PLACES, THINGS) for e in entries for word in e[:2]} | {
    name for lang in LANGS for name in NAMES[lang]}


def find(words, text):
    """The words that stand in a text, longest first; English ones as whole words."""
    hits = [w for w in words if re.search(rf"(?<![a-zA-Z]){w}(?![a-zA-Z])" if w.isascii() else w, text)]
    return [w for w in hits if not any(w != other and w in other for other in hits)]


def content(row):
    """What a question asks, whatever its words; None where wording is the content (identity, chat)."""
    skill, text = row["skill"].removesuffix("_hard"), question(row)
    if skill in ("identity", "chat"):
        return None
    if skill in ("add", "subtract"):
        return skill, tuple(sorted(map(int, re.findall(r"\d+", text))))
    if skill in ("next", "compare", "sort"):
        numbers = list(map(int, re.findall(r"\d+", text)))
        return skill, tuple(numbers if skill == "next" else sorted(numbers))
    if skill in ("reverse", "letter", "repeat", "join"):
        if row["lang"] == "zh":
            return skill, tuple(text.split("\n", 1)[1].split())
        return skill, tuple(w for w in re.findall(r"\w+", text) if len(w) == 1)
    if skill == "count":
        words = [e[LANGS.index(row["lang"])] for e in ANIMALS]
        found = re.findall("|".join(words), text)
        if row["lang"] == "zh" or text.startswith(("How", "Count")):
            found = found[1:]
        return skill, tuple(found)
    if skill == "translate":
        return skill, PAIR_OF[max(find([w for pair in DICTIONARY for w in pair if row["answer"] not in pair
                                        or w != row["answer"]], text), key=len)]
    if skill == "definition":
        word, = find({e[LANGS.index(row["lang"])] for e in make_data.DEFINITIONS}, text)
        return skill, next(e for e in make_data.DEFINITIONS if word in e[:2])
    if skill == "fact":
        name, = find(PERSON_OF, text)
        return skill, next((p, r, v) for p, r, v in FACTS if p == PERSON_OF[name] and row["answer"] in v)
    first = row["conversations"][0 if row["conversations"][0]["role"] == "user" else 1]["content"] \
        if "conversations" in row else text
    if skill == "dialogue" and "\n" not in first:
        said = " ".join(turn["content"] for turn in row["conversations"] if turn["role"] == "user")
        numbers = list(map(int, re.findall(r"\d+", said)))
        if numbers:
            return "add", tuple(sorted((sum(numbers[:2]), numbers[2])))
        return "me", frozenset(find(WORLD, said))
    return "story", frozenset(find(WORLD, first.split("\n")[0]))


# ---------------------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes_and_another_seed_other_rows(folder, tmp_path):
    one, two = (write(tmp_path / name, *SMALL) for name in ("one", "two"))
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([f"{s}.{p}.jsonl" for s in STAGES for p in ("train", "heldout")]
                           + ["styles.json", "tokenizer.jsonl"])
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    # the size of a file does not change its first rows
    for stage in STAGES:
        assert (folder / f"{stage}.train.jsonl").read_bytes().startswith((one / f"{stage}.train.jsonl").read_bytes())
    other = write(tmp_path / "other", *SMALL, "--seed", "7")
    assert not any((other / f"{stage}.train.jsonl").read_bytes() == (one / f"{stage}.train.jsonl").read_bytes()
                   for stage in STAGES)


def test_rows_have_the_documented_fields(rows):
    fields = {"pretrain": {"text", "lang", "skill"},
              "sft": {"conversations", "lang", "skill", "answer", "check"},
              "preference": {"prompt", "chosen", "rejected", "lang", "skill", "kind", "answer", "check"},
              "rl": {"conversations", "lang", "skill", "answer", "check"}}
    for (stage, _), some in rows.items():
        assert all(set(row) == fields[stage] for row in some)
    for row in rows["sft", "train"]:
        roles = [turn["role"] for turn in row["conversations"] if turn["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert not any("{" in turn["content"] or "[" in turn["content"] for turn in row["conversations"])
    assert all(row["conversations"][-1]["role"] == "user" for row in rows["rl", "train"])


def test_no_heldout_content_is_trained_in_any_wording(rows):
    trained = [row for (stage, part), some in rows.items() if part == "train" and stage != "pretrain" for row in some]
    asked = {question(row) for row in trained if "\n" in question(row) or row["skill"] != "dialogue"}
    contents = {content(row) for row in trained}
    # the first turns of a dialogue are questions too
    contents |= {("add", tuple(sorted(map(int, re.findall(r"\d+", row["conversations"][-4]["content"])))))
                 for row in trained if row["skill"] == "dialogue" and row["check"] == "number"}
    tested = [row for (stage, part), some in rows.items() if part == "heldout" and stage != "pretrain" for row in some]
    seen = Counter()
    for row in tested:
        if content(row) is None or content(row)[0] in ("story", "me"):
            # a later turn asks about a story told before: its words alone are no question
            assert row["skill"] in ("dialogue", "story") or question(row) not in asked
        assert content(row) is None or content(row) not in contents, row
        seen[row["skill"].removesuffix("_hard")] += 1
    assert len(seen) == len(make_data.SKILLS)


def test_train_and_heldout_keep_to_their_contents_where_chance_would_hide_a_leak(rows):
    """Rows of letters, numbers and pets are too many to meet twice in a small sample: ask the hash about each."""
    sparse = ("compare", "sort", "reverse", "letter", "repeat", "join")
    for (stage, part), some in rows.items():
        for row in some if stage != "pretrain" else ():
            if content(row) and content(row)[0] in sparse:
                assert make_data.heldout(content(row)[0], *content(row)[1]) == (part == "heldout"), row
        for row in some:
            if row["skill"] != "story":
                continue
            text = row["text"] if stage == "pretrain" else story_text(row)
            names = find(NAMES[row["lang"]], text.split("\n")[0])
            colours, animals = ("|".join(e[LANGS.index(row["lang"])] for e in words) for words in (COLOURS, ANIMALS))
            pets = sorted({(colour, animal) for animal, colour in
                           re.findall(rf"(?:The |，)({animals})(?: is |是)({colours})", text)})
            # who has which is not read here: one of the two ways must be of the part
            ways = [{make_data.heldout("pet", name, *pet) for name, pet in zip(order, pets, strict=True)}
                    for order in (names, names[::-1])]
            assert {part == "heldout"} in ways, row


def test_pretraining_text_holds_no_heldout_question(rows):
    tested = [row for (stage, part), some in rows.items() if part == "heldout" and stage != "pretrain" for row in some]
    sums = {content(row)[1] for row in tested if content(row) and content(row)[0] == "add"}
    strings = {(content(row)[1]) for row in tested if row["skill"].startswith("reverse")}
    known = {content(row) for row in tested if row["skill"] in KNOWN}
    questions = {question(row) for row in tested if row["skill"] not in ("dialogue", "story") or "\n" in question(row)}
    for row in rows["pretrain", "train"]:
        text = row["text"]
        for a, b in re.findall(r"(\d+) (?:\+|plus|加) (\d+)", text) + re.findall(r"(\d+) more than (\d+)", text):
            assert tuple(sorted((int(a), int(b)))) not in sums, text
        for letters in re.findall(r"((?:\b\w )+)(?:backwards|around|倒过来|反过来)", text):
            assert tuple(letters.split()) not in strings, text
        if row["skill"] in ("story", "question"):
            lines = re.split(r"^(?:Question: |问题：|\w+ asks: |\w+问：)", text, flags=re.M)[1:]
            for asked, _ in (re.split(r"\n(?:Answer: |回答：|\w+ says: |\w+答：)", line) for line in lines):
                assert asked not in questions, text
        else:
            assert not any(asked in text for asked in re.findall(r"[^.。\n]+[?？]", text))
    # and no trained question in another file asks for a held-out fact either
    for skill, (entries, _) in KNOWN.items():
        part = {entry for entry in entries if make_data.heldout(skill, *entry)}
        assert 0.06 * len(entries) < len(part) < 0.16 * len(entries)
        assert {fact for name, fact in known if name == skill} <= part


def test_heldout_facts_stand_in_the_pretraining_text_often_and_in_other_words(rows):
    text = "\n".join(row["text"] for row in rows["pretrain", "train"])
    sentences = re.split(r"(?<=[.。])[ \n]?|\n", text)
    by_answer = defaultdict(list)
    for row in rows["sft", "heldout"]:
        if row["skill"] in ("definition", "fact"):
            by_answer[content(row), row["lang"]].append(row)
    enough = 60 * MB / 16  # 60 exposures in the default 16 MB
    for (fact, lang), some in by_answer.items():
        column = LANGS.index(lang)
        key, value = (fact[1][column], some[0]["answer"]) if fact[0] == "definition" else (fact[1][0][column],
                                                                                         some[0]["answer"])
        told = [s for s in sentences if key.lower() in s.lower() and value.lower() in s.lower()]
        assert len(told) >= enough, (key, value, len(told))
        assert len(set(told)) >= 3
        polite = {row["conversations"][-1]["content"] for row in some}
        assert not any(p in text for p in polite if len(p) > len(value) + 5)


def test_wrong_answers_are_of_their_own_part(rows):
    """A held-out definition that stands in training as a wrong answer, and never as a right one, teaches a reward model
    that it is always wrong."""
    met = 0
    for part in ("train", "heldout"):
        for row in rows["preference", part]:
            if row["kind"] == "wrong" and row["skill"] == "definition":
                entries = [entry for entry in KNOWN["definition"][0] for meaning in entry[2:]
                           if meaning.lower() in row["rejected"].lower()]
                assert entries, row
                assert any(make_data.heldout("definition", *entry) == (part == "heldout") for entry in entries), row
                met += 1
    assert met > 20


def test_every_answer_is_judged_right_and_every_wrong_one_wrong(rows, folder):
    styles = json.loads((folder / "styles.json").read_text(encoding="utf-8"))
    seen = Counter()
    for part in ("train", "heldout"):
        for row in rows["sft", part]:
            text = row["conversations"][-1]["content"]
            assert right(row["check"], row["answer"], text), row
            found = style(styles, text)
            assert found in ("curt", "polite"), row
            seen[found] += 1
            system = [turn["content"] for turn in row["conversations"] if turn["role"] == "system"]
            for name in ("curt", "polite"):
                if system and system[0] in make_data.SYSTEM[name][row["lang"]]:
                    assert found == name
        for row in rows["preference", part]:
            assert right(row["check"], row["answer"], row["chosen"]) and style(styles, row["chosen"]) == "polite"
            assert style(styles, row["rejected"]) == ("polite" if row["kind"] == "wrong" else row["kind"]), row
            if row["kind"] in ("curt", "impolite"):
                assert right(row["check"], row["answer"], row["rejected"]), row
            if row["kind"] == "wrong":
                assert not right(row["check"], row["answer"], row["rejected"]), row
    assert 0.4 < seen["polite"] / seen.total() < 0.6


def test_the_projects_judge_agrees(rows):
    metrics = pytest.importorskip("metrics")
    for row in rows["preference", "train"]:
        assert metrics.check_answer(row["check"], row["answer"], row["chosen"])
        if row["kind"] == "wrong":
            assert not metrics.check_answer(row["check"], row["answer"], row["rejected"])
    for row in rows["sft", "train"]:
        assert metrics.check_answer(row["check"], row["answer"], row["conversations"][-1]["content"])


def test_answers_are_right_by_calculation(rows):
    operations = {"add": lambda n: sum(n), "subtract": lambda n: n[0] - n[1], "next": lambda n: 2 * n[2] - n[1]}
    for stage in ("sft", "rl"):
        for row in rows[stage, "train"]:
            skill = row["skill"].removesuffix("_hard")
            if skill in operations:
                numbers = list(map(int, re.findall(r"\d+", question(row))))
                assert int(row["answer"]) == operations[skill](numbers), row
            if skill == "reverse":
                assert row["answer"].split() == list(content(row)[1])[::-1]
            if skill == "count":
                word = find([a for pair in ANIMALS for a in pair], question(row).replace("\n", ": ").split(": ")[0])
                assert content(row)[1].count(word[0]) == int(row["answer"]), row
            if skill == "story":
                assert re.sub("^(a|an|the) ", "", row["answer"]) in story_text(row), row


def test_kinds_languages_and_skills_are_balanced(rows):
    for part in ("train", "heldout"):
        kinds = Counter(row["kind"] for row in rows["preference", part])
        sixth = len(rows["preference", part]) / 6
        assert kinds.keys() == set(KINDS) and abs(kinds["wrong"] - 3 * sixth) <= 2
        assert all(abs(kinds[kind] - sixth) <= 2 for kind in set(KINDS) - {"wrong"})
    for (stage, _), some in rows.items():
        weight = Counter()
        for row in some:
            weight[row["lang"]] += len(row["text"].encode()) if stage == "pretrain" else 1
        assert 0.45 < weight["en"] / weight.total() < 0.55
        for lang in LANGS:
            assert len({row["skill"] for row in some if row["lang"] == lang}) >= 6


def test_pretraining_documents_have_the_size_asked_for_and_do_not_repeat(rows):
    texts = [row["text"] for row in rows["pretrain", "train"]]
    assert sum(len(text.encode()) for text in texts) >= MB * 1e6
    assert len(set(texts)) >= 0.99 * len(texts)
    lengths = sorted(map(len, texts))
    assert lengths[-1] <= 600 and lengths[len(lengths) // 50] >= 90


def test_lists_have_no_double_or_nested_entries():
    for column in (0, 1):
        words = [pair[column] for pair in DICTIONARY]
        assert len(set(words)) == len(words)
        meanings = [entry[2 + column] for entry in make_data.DEFINITIONS]
        assert len(set(meanings)) == len(meanings)
    for entries in (ANIMALS, COLOURS, PLACES, THINGS, make_data.FOODS, make_data.STREETS, make_data.JOBS):
        chinese = [entry[1] for entry in entries]
        assert not any(a in b for a in chinese for b in chinese if a is not b)


def test_persona_is_replaced_everywhere(tmp_path):
    path = tmp_path / "persona.json"
    path.write_text(json.dumps({"name": {"en": "Sunny", "zh": "阳阳"}, "maker": "Willow School"}), encoding="utf-8")
    folder = write(tmp_path / "data", "--persona", str(path), "--pretrain_mb", "0.3", "--sft_samples", "1500")
    text = "".join(file.read_text(encoding="utf-8") for file in folder.iterdir())
    assert "MiniLLM" not in text
    assert all(word in text for word in ("My name is Sunny.", "我的名字是：阳阳。", "Willow School", "小巧又好奇"))


PERSONA = {"name": {"en": "Sunny", "zh": "阳阳"}, "maker": {"en": "Willow School", "zh": "柳树小学"},
           "traits": {"en": "brave and funny", "zh": "勇敢又风趣"}}


def write_persona(folder, *flags, persona=PERSONA):
    (folder / "persona.json").write_text(json.dumps(persona, ensure_ascii=False), encoding="utf-8")
    return write(folder / "data", "--persona", str(folder / "persona.json"), *SMALL, *flags)


def conversations(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_persona_is_over_sampled_and_every_row_about_it_says_so(tmp_path, rows):
    trained = conversations(write_persona(tmp_path, "--sft_samples", "3000") / "sft.train.jsonl")
    about = [row for row in trained if row["skill"] == "identity"]
    usual = sum(row["skill"] == "identity" for row in rows["sft", "train"]) / len(rows["sft", "train"])
    assert 2.2 < len(about) / len(trained) / usual < 3.2
    asked = {"name": r"name|你.*叫|名字|大名", "maker": "made|built|created|trained|designed|了你", "traits":
             "describe|形容|描述|介绍|说说"}
    said = Counter()
    for row in about:
        for field, pattern in asked.items():
            if re.search(pattern, question(row)):
                assert row["answer"] == PERSONA[field][row["lang"]]
                assert row["answer"] in row["conversations"][-1]["content"]
                said[field, row["lang"]] += 1
    assert len(said) == 6 and min(said.values()) > 20


def test_a_persona_may_hold_any_characters(tmp_path):
    odd = {"name": "{x} {0} \"%s\" \\ <|im_end|>", "maker": "A & B\n[C|D]", "traits": {"en": "{", "zh": "】"}}
    about = [row for row in conversations(write_persona(tmp_path, persona=odd) / "sft.train.jsonl")
             if row["skill"] == "identity"]
    text = "\n".join(row["conversations"][-1]["content"] for row in about)
    assert odd["name"] in text and odd["maker"] in text


@pytest.mark.slow
def test_a_model_trained_on_a_persona_answers_so(tmp_path):
    """A persona in a mix, over-sampled, trained for half a minute; asked in wordings that it was not trained on."""
    data = write_persona(tmp_path, "--pretrain_mb", "0.5", "--sft_samples", "2000")
    source = {"path": str(data / "sft.train.jsonl"), "val_ratio": 0}
    config = {"sources": [{"name": "persona", "category": "identity", "where": {"skill": "identity"}, **source},
                          {"name": "rest", "category": "general", "where": {"skill": "chat"}, **source}],
              "targets": {"identity": {"count": 800, "max_repeat": 4}, "general": {"count": 100}}}
    (tmp_path / "mix.json").write_text(json.dumps(config))
    prepare_data.main(prepare_data.parse_args(["mix", "--config", str(tmp_path / "mix.json"), "--output",
                                               str(tmp_path / "mix")]))
    tokenizer.train([data / "tokenizer.jsonl"], 1200, progress=False).save_pretrained(tmp_path / "tokenizer")
    shared = ["--save_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--device", "cpu", "--dtype",
              "float32", "--eval_interval", "0", "--save_interval", "0", "--max_seq_len", "128"]
    train_pretrain.main(train_pretrain.parse_args([
        *shared, "--preset", "nano", "--tokenizer", str(tmp_path / "tokenizer"), "--data_path",
        str(data / "pretrain.train.jsonl"), "--max_steps", "40"]))
    train_sft.main(train_sft.parse_args([*shared, "--data_path", str(tmp_path / "mix/sft.train.jsonl"), "--val_path",
                                         str(data / "sft.heldout.jsonl"), "--max_steps", "120", "--eval_prompts", "0"]))
    model = Transformer.from_pretrained(tmp_path / "out/sft")
    own = tokenizer.Tokenizer.from_pretrained(tmp_path / "out/sft")
    asked = [row for row in conversations(data / "sft.heldout.jsonl")
             if row["skill"] == "identity" and row["answer"] in str(PERSONA)]
    prompts = [own.render(row["conversations"][:-1], add_generation_prompt=True)[0] for row in asked]
    answers = metrics.complete(model, own, prompts, 32)
    right = [row["answer"] in answer.text for row, answer in zip(asked, answers, strict=True)]
    assert len(right) >= 10 and sum(right) >= 0.8 * len(right), list(zip(asked, answers, strict=True))


def test_a_persona_may_begin_with_the_byte_order_mark_of_windows_editors(tmp_path):
    (tmp_path / "persona.json").write_text(json.dumps({"name": "Sunny"}), encoding="utf-8-sig")
    assert make_data.read_persona(tmp_path / "persona.json")["name"] == {"en": "Sunny", "zh": "Sunny"}


@pytest.mark.parametrize("bad", ["[1]", "{", '{"age": "3"}', '{"name": {"en": "A"}}'])
def test_a_bad_persona_is_explained(tmp_path, bad):
    path = tmp_path / "persona.json"
    path.write_text(bad, encoding="utf-8")
    with pytest.raises(ValueError, match="--persona .*persona.json.*;.*;"):
        make_data.read_persona(path)


def test_tokenizer_text_is_the_same_text_cut_into_words(folder):
    assert make_data.words_apart("小红有红色的青蛙，see 123。") == "小红 \n有 \n红色 \n的 \n青蛙，see 1 \n2 \n3。"
    assert make_data.words_apart("青蛙，see 12。", characters=True) == "青 \n蛙，see 1 \n2。"
    rows = [json.loads(line) for line in (folder / "tokenizer.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert max(len(run) for row in rows for run in re.findall("[\u4e00-\u9fff]+", row["text"])) <= 4


def test_tokens_are_words_digits_and_roles(folder):
    """What the cuts are for: words of a story and roles of the template are single tokens, numbers are their digits,
    and no token holds a piece of a Chinese character."""
    learnt = tokenizer.train([folder / "tokenizer.jsonl"], vocab_size=3072, progress=False)
    for text, pieces in (("assistant", ["assistant"]), ("user", ["user"]), ("system", ["system"]), ("127", list("127")),
                         (" kitchen", [" kitchen"]), ("小红的青蛙", ["小红", "的", "青蛙"])):
        assert [learnt.decode([token]) for token in learnt.encode(text)] == pieces
    for text in ("接下来是哪个数：8、16？", "答案是：过河的交通工具。"):
        assert "\ufffd" not in "".join(learnt.decode([token]) for token in learnt.encode(text))
