"""Proves eval.py: the right checkpoint is taken, what is shown is what was decoded, scores equal their definitions.

    python -m pytest tests/test_eval.py
"""
import gzip
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cut

import chat
import checkpoint
import common
import eval as evaluation
import lora
import metrics
import records
import tasks
from dataset import SFTData
from logprobs import token_logprobs
from model import ScalarHead, Transformer
from rows import question

ROOT = Path(__file__).parent.parent
FILES = ROOT / "tests" / "data" / "tasks"
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture
def stage(model_folder, tokenizer, tmp_path):
    """stage(name, **facts) -> folder tmp_path/out/<name>, a copy of the tiny model marked as that finished stage."""

    def make(name, **facts):
        folder = tmp_path / "out" / name
        shutil.copytree(model_folder("dense"), folder)
        if name == "reward":
            shutil.rmtree(folder)
            ScalarHead.from_pretrained(model_folder("dense")).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        checkpoint.write_minillm(folder, {"stage": name, "finished": True, "key": f"key of {name}"} | facts)
        return folder

    return make


@pytest.fixture
def parse(tmp_path):
    """parse(*flags) -> args for tmp_path/out, float32 on one thread."""
    return lambda *flags: evaluation.parse_args(["--save_dir", str(tmp_path / "out"), "--device", "cpu", "--dtype",
                                                 "float32", "--threads", "1", *map(str, flags)])


@pytest.fixture
def player(stage, parse):
    """player(name, *flags) -> (Player, args)."""

    def load(name="sft", *flags):
        args = parse(*flags)
        return evaluation.load(stage(name), args, common.Runtime(torch.device("cpu"), torch.float32)), args

    return load


@pytest.fixture
def scripted(monkeypatch):
    """scripted(texts): generate() speaks these texts in turn, token by token, each with its end token; returns the
    prompts that it was given."""

    def script(texts, tokenizer, interrupt_at=None):
        seen = []

        def generate(self, prompts, max_new_tokens, **settings):
            for row, prompt in enumerate(prompts):
                ids = [*tokenizer.encode(texts[len(seen) % len(texts)]), tokenizer.eos_id]
                seen.append(prompt)
                for i, token in enumerate(ids[:max_new_tokens]):
                    if len(seen) - 1 == interrupt_at and i == 3:
                        raise KeyboardInterrupt
                    yield row, token

        monkeypatch.setattr(Transformer, "generate", generate)
        return seen

    return script


def typed(monkeypatch, text):
    """Let `text` be what the user types."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# -- Which checkpoint --------------------------------------------------------------------------------------------------
def test_newest_is_the_stage_finished_last(stage, tmp_path):
    stage("pretrain", written="2026-01-03T00:00:00")
    stage("sft", written="2026-01-01T00:00:00")
    stage("dpo", written="2026-01-02T00:00:00")
    stage("grpo", written="2026-01-09T00:00:00", finished=False)
    stage("reward", written="2026-01-09T00:00:00")
    assert checkpoint.newest(tmp_path / "out") == "pretrain"  # sft and dpo are older, grpo unfinished, reward is mute
    stage("ppo", written="2026-01-03T00:00:00")
    assert checkpoint.newest(tmp_path / "out") == "ppo"  # within one second the later stage


def test_newest_finds_an_interrupted_swap_and_names_what_is_missing(stage, tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished checkpoint.*run.sh"):
        checkpoint.newest(tmp_path / "out")
    stage("sft").rename(tmp_path / "out" / "sft.previous")
    assert checkpoint.newest(tmp_path / "out") == "sft"


def test_chat_says_which_model_and_uses_it(stage, parse, monkeypatch, capsys):
    stage("pretrain", written="2026-01-01T00:00:00")
    folder = stage("sft", written="2026-01-02T00:00:00")
    typed(monkeypatch, "")
    assert evaluation.main(parse())["weight"] == str(folder)
    assert f"model {folder} (the newest, stage sft)" in capsys.readouterr().out


def test_base_model_says_that_it_only_continues(stage, parse, player, tokenizer, capsys):
    base, args = player("pretrain", "--max_new_tokens", 4)
    assert not base.chat and base.ids(MESSAGES) == [tokenizer.bos_id, *tokenizer.encode("What is 2 + 3?")]
    evaluation.main(parse("--weight", "pretrain", "--prompt", "Anna has", "--max_new_tokens", 4))
    assert "only continues text" in capsys.readouterr().out
    assert evaluation.load(base.folder, parse("--eval_mode", "sft"), base.runtime).chat


def test_foreign_folder_chats_if_it_has_a_template(model_folder, tmp_path, parse, player):
    folder = tmp_path / "foreign"
    shutil.copytree(model_folder("dense"), folder)
    runtime = player()[0].runtime
    assert evaluation.load(folder, parse(), runtime).chat
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert not evaluation.load(folder, parse(), runtime).chat


def test_reward_model_cannot_chat(stage, parse):
    stage("reward")
    with pytest.raises(ValueError, match="reward model.*--mode score"):
        evaluation.main(parse("--weight", "reward", "--prompt", "hello"))


def test_prompt_is_the_beginning_of_what_was_trained(player, tokenizer):
    sft, _ = player()
    talk = [{"role": "system", "content": "Be kind."}, *MESSAGES, {"role": "assistant", "content": "5"}]
    prompt, whole = sft.ids(talk[:-1]), tokenizer.render(talk)
    assert whole[0][: len(prompt)] == prompt and whole[1][len(prompt)] == 1 and not any(whole[1][: len(prompt)])


# -- One answer --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [0, 1])
def test_shown_text_is_the_decoded_text(player, scripted, tokenizer, capsys, stream):
    text = "小猫说：\U0001f431\U0001f389 “naïve” 一二三！"
    scripted([text], tokenizer)
    sft, args = player("sft", "--stream", stream, "--show_speed", 0)
    pieces = list(sft.pieces(sft.ids(MESSAGES), chat.Answer(), args))
    # most of these characters are spread over several tokens: none may be shown in halves
    assert len(pieces) > len(text) and "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    answer = chat.speak(sft, sft.ids(MESSAGES), args)
    assert capsys.readouterr().out == text + "\n" and answer.ended and answer.ids[-1] == tokenizer.eos_id


def test_streamed_answer_equals_generate(player, tokenizer, capsys):
    sft, args = player("sft", "--show_speed", 0, "--temperature", 1, "--top_p", 1, "--max_new_tokens", 40)
    prompt = sft.ids(MESSAGES)
    drawn = sft.model.generate([prompt], 40, seed=args.seed, row_seeds=[5], stop_ids=tokenizer.stop_ids(chat=True))
    ids = [token for _, token in drawn]
    answer = chat.speak(sft, prompt, args, row_seed=5)
    assert answer.ids == ids
    assert answer.text == tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.eos_id else ids)
    assert answer.text in capsys.readouterr().out


@pytest.mark.parametrize(("stops", "shown"), [(["###"], "ab # "), (["# ##", "c"], "ab "), (["zz"], "ab # ### cd")])
def test_stop_string_cuts_wherever_the_pieces_break(stops, shown):
    text = "ab # ### cd"
    for size in range(1, len(text) + 1):
        pieces = [text[i:i + size] for i in range(0, len(text), size)]
        parts = list(chat.until_stop(pieces, stops))
        assert "".join(part for part, _ in parts) == shown and parts[-1][1] == (stops != ["zz"])


def test_stop_string_ends_an_answer(player, scripted, tokenizer, capsys):
    scripted(["one ### two"], tokenizer)
    sft, args = player("sft", "--stop", "###", "--show_speed", 0)
    answer = chat.speak(sft, sft.ids(MESSAGES), args)
    assert answer.text == "one " and answer.ended and capsys.readouterr().out == "one \n"
    # in a batch it has been decoded to its end: only the text is cut, and half an answer is no row to learn from
    row = chat.row_answer(sft, [*tokenizer.encode("one ### two"), tokenizer.eos_id], args)
    assert row["answer"] == "one " and not row["stopped"]
    assert chat.row_answer(sft, [*tokenizer.encode("one two"), tokenizer.eos_id], args)["stopped"]


def test_seed_decides_and_temperature_0_needs_none(stage, parse):
    stage("sft")

    def say(*flags):
        return evaluation.main(parse("--prompt", "hello", "--max_new_tokens", 12, *flags))["answer"]

    hot = ["--temperature", 1, "--top_p", 1]
    assert say(*hot, "--seed", 1) == say(*hot, "--seed", 1) != say(*hot, "--seed", 2)
    assert say("--temperature", 0, "--seed", 1) == say("--temperature", 0, "--seed", 2)
    assert say("--num_beams", 3, "--seed", 1) == say("--num_beams", 3, "--seed", 2)


def test_guessed_tokens_are_reported_and_change_no_answer(stage, parse, capsys):
    stage("sft")
    flags = ["--prompt", "hello", "--max_new_tokens", 40, "--temperature", 0, "--min_p", 0.1]
    plain = evaluation.main(parse(*flags))
    capsys.readouterr()
    assert evaluation.main(parse(*flags, "--speculate", 4)) == plain
    assert "guessed tokens were right: " in capsys.readouterr().out
    for other in (["--temperature", 1], ["--repetition_penalty", 1.1], ["--min_new_tokens", 3]):
        with pytest.raises(ValueError, match="--speculate 4 with .*; .*; give --temperature 0"):
            evaluation.main(parse(*flags, "--speculate", 4, *other))


def test_decoders_give_the_same_answer_and_say_what_they_are(stage, parse, capsys):
    stage("sft")
    answers = {}
    for decoder in ("plain", "fast", "int8"):
        args = parse("--prompt", "hello", "--max_new_tokens", 12, "--temperature", 1, "--min_new_tokens", 12,
                     "--decoder", decoder)
        answers[decoder] = evaluation.main(args)
        assert ("decoding with" in capsys.readouterr().out) == (decoder != "plain")
    assert answers["plain"] == answers["fast"] and answers["int8"]["tokens"] == 12


# -- Conversations -----------------------------------------------------------------------------------------------------
def test_oldest_turns_are_dropped_whole_and_it_is_said(player, scripted, tokenizer, monkeypatch, capsys):
    sft, args = player("sft", "--system", "Be kind.", "--max_new_tokens", 64)
    seen = scripted(["It is a brown cat, and the dog is grey."], tokenizer)
    typed(monkeypatch, "".join(f"Question {i} about Anna and her apples?\n" for i in range(6)))
    assert len(chat.converse(sft, args)["answers"]) == 6
    assert "oldest 2 messages are dropped" in capsys.readouterr().out
    last = tokenizer.decode(seen[-1])
    assert len(seen[-1]) <= sft.context - 64
    assert "Be kind." in last and "Question 5" in last and "Question 0" not in last
    # whole turns: what is left starts with a question, and every question but the last has its answer
    assert last.split("<|im_start|>")[2].startswith("user\n") and last.count("brown cat") == last.count("Question") - 1


def test_prompt_longer_than_the_context_is_refused_and_chat_goes_on(player, scripted, tokenizer, monkeypatch, capsys):
    sft, args = player()
    seen = scripted(["yes"], tokenizer)
    typed(monkeypatch, "z" * 600 + "\nhello\n")
    assert chat.converse(sft, args)["answers"] == ["yes"] and len(seen) == 1
    assert "must fit the model's context of 256; shorten" in capsys.readouterr().out


def test_ctrl_c_ends_the_answer_then_the_chat(player, scripted, tokenizer, monkeypatch, capsys):
    sft, args = player()
    seen = scripted(["abcdefgh"], tokenizer, interrupt_at=0)
    lines = iter(["first", "second"])

    def read(prompt=""):
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    answers = chat.converse(sft, args)["answers"]
    assert answers[1] == "abcdefgh" and answers[1].startswith(answers[0]) and len(answers[0]) < 8
    assert "(stopped)" in capsys.readouterr().out and answers[0] in tokenizer.decode(seen[1])


def test_a_chat_answers_as_if_it_read_everything_anew(player, monkeypatch):
    sft, args = player("sft", "--temperature", 1, "--max_new_tokens", 12, "--stop", "q")
    text = "hello\nWhat is 2 + 3?\n/system Be kind.\nonce more\n/reset\nhello\n"
    reads, forward = [], Transformer.hidden_states
    monkeypatch.setattr(Transformer, "hidden_states", lambda self, ids, cache: reads.append(ids.shape[1]) or forward(
        self, ids, cache=cache))
    found, read = [], []
    for memory in (evaluation.Prefix, lambda: None):
        monkeypatch.setattr(evaluation, "Prefix", memory)
        typed(monkeypatch, text)
        found.append(chat.converse(sft, args)["answers"])
        read.append(sum(reads))
        reads.clear()
    assert found[0] == found[1] and len(found[0]) == 4 and read[0] < read[1]


def test_commands(player, scripted, tokenizer, monkeypatch, capsys):
    sft, args = player()
    seen = scripted(["<think>hm</think>yes"], tokenizer)
    typed(monkeypatch, "/help\nfirst\n\n/system Be kind.\nsecond\n/reset\nthird\n/system\n/wrong\nfourth\n/exit\nfifth")
    assert len(chat.converse(sft, args)["answers"]) == 4
    prompts = [tokenizer.decode(ids) for ids in seen]
    assert "first" in prompts[1] and "Be kind." in prompts[1] and "hm" not in prompts[1]
    assert "second" not in prompts[2] and "Be kind." in prompts[2] and "Be kind." not in prompts[3]
    assert "unknown command /wrong" in capsys.readouterr().out


def run_script(*flags, text=""):
    """eval.py as a user starts it, in a process of its own."""
    command = [sys.executable, ROOT / "eval.py", "--device", "cpu", "--dtype", "float32", "--threads", "1", *flags]
    return subprocess.run(list(map(str, command)), input=text.encode(), capture_output=True, timeout=600,
                          env={**os.environ, "PYTHONUTF8": "1"})


def test_piped_chat(stage, tmp_path):
    stage("sft")
    text = "你好 \U0001f642\n/reset\nhello\n"
    done = run_script("--save_dir", tmp_path / "out", "--stream", 1, "--max_new_tokens", 6, text=text)
    assert done.returncode == 0, done.stderr.decode()
    out = done.stdout.decode()
    assert "the newest, stage sft" in out and out.count("tokens/s)") == 2 and "you>" not in out


def test_unknown_weight_ends_with_code_2_and_a_list(stage, tmp_path):
    stage("sft")
    stage("dpo")
    done = run_script("--save_dir", tmp_path / "out", "--weight", "nope", "--prompt", "hello")
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"error: checkpoint 'nope' not found" in done.stderr and b"there are: dpo, sft" in done.stderr


def test_a_reader_who_leaves_is_no_error(stage, tmp_path):
    """eval.py ... | true: the exit code of any program that SIGPIPE ends, and not a word."""
    stage("sft")
    (tmp_path / "p.txt").write_text("question\n" * 20)
    command = [sys.executable, ROOT / "eval.py", "--save_dir", tmp_path / "out", "--prompts", tmp_path / "p.txt",
               "--max_new_tokens", "4", "--device", "cpu", "--dtype", "float32", "--threads", "1"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 128 + 13 and "rror" not in said and "pipe" not in said


# -- What is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, message", [
    (["--mode", "score", "--weight", ","], "--weight , names nothing; .*; give one, or all"),
    (["--bpb", "empty.jsonl"], "nothing was measured of --weight all; .*; give other weights, or files with rows"),
    (["--bpb", "blank.jsonl"], "1 rows without any text; .*; give other files"),
    (["--bpb", "rows.jsonl", "--weight", "reward"], "nothing was measured of --weight reward; .*; give other weights"),
    (["--tasks", "piqa", "--task_dir", FILES, "--weight", "reward"], "reward models; .*; name another checkpoint"),
    (["--prompts", "p.txt", "--output", "./p.txt"], "--output .* is a file of --prompts; .*; give another --output"),
    (["--prompts", "latin.txt"], "latin.txt:1: not UTF-8 .*; .*; repair the line"),
    (["--mode", "compare"], "--mode compare without names; .*; give --compare"),
    (["--mode", "references"], "--mode references without a file; .*; give --references"),
    *[(["--prompt", "x", "--num_beams", 2, *flags], "--num_beams 2 with .*; .*; leave the others out")
      for flags in (["--speculate", 2], ["--min_new_tokens", 2], ["--repetition_penalty", 2])],
    (["--prompts", "p.txt", "--compare", "sft", "--speculate", 2], "--speculate 2 with .*; .*; give --temperature 0"),
    (["--prompts", "long.txt", "--compare", "sft"], "long.txt:2: the prompt has .* tokens; .*; shorten"),
], ids=str)
def test_what_cannot_be_done_is_said_and_nothing_is_written(stage, parse, tmp_path, monkeypatch, flags, message):
    stage("sft")
    stage("reward")
    monkeypatch.chdir(tmp_path)
    files = {"empty.jsonl": b"", "blank.jsonl": b'{"text": ""}\n', "rows.jsonl": b'{"text": "x"}\n', "p.txt": b"a\n",
             "latin.txt": "für\n".encode("latin-1"), "long.txt": b"a\n" + b"z" * 600}
    for name, content in files.items():
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluation.main(parse("--max_new_tokens", 4, *flags))
    assert {name: Path(name).read_bytes() for name in files} == files
    assert not (tmp_path / "out" / "eval_results.jsonl").exists()


@pytest.mark.parametrize("flags", [
    ["--prompt", "hi", "--prompts", "p.jsonl"], ["--mode", "score", "--tasks", "piqa"],
    ["--tasks", "piqa", "--bpb", "f"], ["--references", "f", "--regression", 1], ["--bpb", "f", "--samples", 2],
    ["--mode", "chat", "--prompt", "hi"], ["--compare", "a,b", "--samples", 1]], ids=str)
def test_a_command_does_one_thing(parse, flags, capsys):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert "one command does one thing; give each a command of its own" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    ["--tasks", "piqa", "--stop", "x"], ["--tasks", "piqa", "--system", "x"], ["--output", "f"],
    ["--prompts", "p", "--judge", "reward"], ["--prompt", "hi", "--pass_k", 2], ["--mode", "score", "--few_shot", 5],
    ["--compare", "a,b", "--stop", "x"]], ids=str)
def test_a_flag_that_would_be_overlooked_is_refused(parse, flags, capsys):
    with pytest.raises(SystemExit):
        parse(*flags)
    said = capsys.readouterr().err
    assert f"{[flag for flag in flags if str(flag).startswith('--')][-1]} with --mode" in said and "belongs" in said


@pytest.mark.parametrize(("flags", "mode"), [
    ([], "chat"), (["--prompt", "hi", "--report", "o"], "single"), (["--compare", "a,b", "--prompts", "p"], "compare"),
    (["--mode", "score", "--samples", 3, "--report", "out"], "score"), (["--mode", "score", "--bpb", "f"], "score"),
    (["--mode", "batch", "--prompts", "p"], "batch"), (["--report", "out"], "report"), (["--samples", 1], "samples"),
    (["--mode", "summary", "--report", "out"], "summary")], ids=str)
def test_flags_say_what_to_do(parse, flags, mode):
    assert parse(*flags).mode == mode


# -- Batches -----------------------------------------------------------------------------------------------------------
def test_batch_answers_in_order(stage, parse, tmp_path, capsys):
    folder = stage("sft")
    flags = ["--weight", folder, "--batch_size", 2, "--max_new_tokens", 5, "--temperature", 1]
    text = "short\na much longer question about Anna\n\n你好\n"
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(text.encode()))
    result = evaluation.main(parse("--prompts", tmp_path / "p.txt.gz", "--output", tmp_path / "new/a.jsonl", *flags))
    lines = [json.loads(line) for line in (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert result["prompts"] == 3 and [line["index"] for line in lines] == [0, 1, 2]
    assert [line["prompt"] for line in lines] == ["short", "a much longer question about Anna", "你好"]
    rows = [{"prompt": "short"}, {"conversations": [{"role": "user", "content": "a much longer question about Anna"},
                                                    {"role": "assistant", "content": "taken off"}]},
            {"prompt": [{"role": "user", "content": "你好"}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    # another batch size and another form of the same prompts: the same answers, and nothing but them on stdout
    evaluation.main(parse("--prompts", tmp_path / "p.jsonl", *flags, "--batch_size", 3))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines


def test_answers_that_ended_are_rows_of_sft_data(stage, parse, tmp_path, scripted, tokenizer):
    """Thoughts become reasoning_content, which renders to think tokens; an answer cut off gives no row."""
    folder = stage("sft")
    scripted(["4", "a long story " * 9, "<think>\n2 + 3\n</think>\n\n5"], tokenizer)
    (tmp_path / "p.txt").write_text("2 + 2?\nTell!\n2 + 3?\n", encoding="utf-8")
    answers = tmp_path / "answers.jsonl"
    evaluation.main(parse("--weight", folder, "--prompts", tmp_path / "p.txt", "--output", answers,
                          "--max_new_tokens", 60))
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [row["stopped"] for row in rows] == ["conversations" in row for row in rows] == [True, False, True]
    assert rows[0]["conversations"] == [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    assert rows[2]["conversations"][1] == {"role": "assistant", "reasoning_content": "2 + 3", "content": "5"}
    data = SFTData([answers], tokenizer, 64, tmp_path / "cache", skip_bad=True)
    assert data.stats["used"] == 2
    ids, mask = tokenizer.render(rows[2]["conversations"])
    assert {tokenizer.think_ids[0], tokenizer.think_ids[1]} <= {i for i, m in zip(ids, mask, strict=True) if m}


def test_half_a_character_costs_no_finished_work(stage, parse, tmp_path, tokenizer, monkeypatch):
    """JSON may hold a lone surrogate, which no file in UTF-8 can: a question mark stands in its place."""
    stage("sft")
    row = {"prompt": "\ud800 a", "answer": "7", "check": "number"}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    echo(monkeypatch, tokenizer, lambda text: "no")
    asked, answers = tmp_path / "s.jsonl", tmp_path / "a.txt"
    for flags, file in ((["--prompts", asked, "--output", answers], answers),
                        (["--prompts", asked, "--output", answers, "--compare", "sft"], answers),
                        (["--regression", 1, "--regression_path", asked], tmp_path / "out" / "eval_results.jsonl")):
        evaluation.main(parse(*flags))
        assert "? a" in file.read_text(encoding="utf-8")


def test_prompts_of_several_files_are_answered_and_only_answers_are_on_the_screen(stage, parse, tmp_path, capsys):
    stage("sft")
    for i in range(2):
        (tmp_path / f"p{i}.txt").write_text(f"question {i}\n")
    evaluation.main(parse("--prompts", tmp_path / "p*.txt", "--report", tmp_path / "out", "--max_new_tokens", 4))
    shown = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in shown.out.splitlines()] == ["question 0", "question 1"]
    assert "report: " in shown.err and (tmp_path / "out" / "report.html").is_file()


def test_batch_names_the_line_that_is_too_long(stage, parse, tmp_path):
    stage("sft")
    (tmp_path / "p.txt").write_text("fine\n" + "z" * 600 + "\n")
    with pytest.raises(ValueError, match=r"p\.txt:2: the prompt has 6\d\d tokens"):
        evaluation.main(parse("--prompts", tmp_path / "p.txt"))


# -- Scores ------------------------------------------------------------------------------------------------------------
TEXTS = [{"text": "Anna has three apples. " * 20, "lang": "en"}, {"text": "小猫是棕色的。", "lang": "zh"},
         {"text": "The dog is grey.", "lang": "en"}]


@pytest.fixture
def data(tmp_path):
    """A folder with the four held-out files and styles.json."""
    folder = tmp_path / "data"
    folder.mkdir()

    def turn(text):
        return [{"role": "user", "content": text}]

    skills = ["add", "story", "translate", "chat", "dialogue", "identity"]
    facts = [{"lang": lang, "skill": skill, "answer": str(i), "check": "number"}
             for i, (skill, lang) in enumerate((skill, lang) for skill in skills for lang in ("en", "zh"))]
    rows = {"pretrain": TEXTS,
            "sft": [{"conversations": [*turn(f"say {f['answer']}"), {"role": "assistant", "content": f["answer"]}], **f}
                    for f in facts],
            "preference": [{"prompt": f"say {f['answer']}", "chosen": f"Sure! It is {f['answer']}.",
                            "rejected": f["answer"], "kind": "curt", **f} for f in facts],
            "rl": [{"conversations": turn(f"say {f['answer']}"), **f} for f in facts]}
    for name, content in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.heldout.jsonl").write_text(text, encoding="utf-8")
    styles = {"polite_openers": ["Sure!"], "rude": ["Go away."], "max_characters": 72}
    (folder / "styles.json").write_text(json.dumps(styles))
    return folder


def results_of(tmp_path):
    """{(weight, group): row} of eval_results.jsonl."""
    lines = (tmp_path / "out" / "eval_results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({(row["weight"], row["group"]) for row in rows}) == len(rows)
    return {(row["weight"], row["group"]): row for row in rows}


def test_score_measures_all_weights_and_keeps_the_results(stage, parse, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "ANSWER_TOKENS", 6)
    sft = stage("sft", parents=[str(stage("pretrain"))])
    stage("reward", parents=[str(sft)])
    stage("dpo", parents=["elsewhere/sft"])  # the folder has moved since; its name still finds it
    evaluation.main(parse("--mode", "score", "--data_dir", data, "--samples", 2))
    shown, rows = capsys.readouterr().out, results_of(tmp_path)
    talk = {"bits_per_byte", "exact_match", "preference", "pass_at_1"}
    names = ("pretrain", "sft", "dpo", "reward")
    groups = [{group for weight, group in rows if weight == name} for name in names]
    assert groups == [{"bits_per_byte", "exact_match"}, talk, talk, {"pair_accuracy"}]
    for (weight, _), row in rows.items():
        assert row["key"] == f"key of {weight}" and row["seconds"] >= 0 and row["n"] > 0 and "standard_error" in row
        assert row["versions"]["torch"] == torch.__version__
    liked = rows["dpo", "preference"]
    assert liked["win_rate"] == 0.5 and liked["against"] == "sft"  # copies of one model, the same random numbers: ties
    assert "win_rate" not in rows["sft", "preference"]
    assert "[several turns, zh]" in shown and shown.count("dpo> ") == 5 * 2 * 2
    # one weight again, on fewer items: its rows are replaced, the others stay, and the summary shows the table again
    evaluation.main(parse("--mode", "score", "--data_dir", data, "--weight", "dpo", "--limit", 2))
    again = results_of(tmp_path)
    assert again.keys() == rows.keys() and again["dpo", "pass_at_1"]["n"] == 2
    assert again["sft", "pass_at_1"] == rows["sft", "pass_at_1"]
    capsys.readouterr()
    evaluation.main(parse("--mode", "summary"))
    table = capsys.readouterr().out
    places = [table.index(f"\n{name}") for name in names]
    assert places == sorted(places)


def test_scores_of_scripted_answers(stage, parse, data, tmp_path, tokenizer, monkeypatch):
    """Answers to "say n" are a polite n where n is even, else a loop: right, polite and ended in half of the cases."""
    sft = stage("sft")
    stage("dpo", parents=[str(sft)])

    def generate(self, prompts, max_new_tokens, **settings):
        for row, prompt in enumerate(prompts):
            n = int(tokenizer.decode(prompt).rsplit("say ", 1)[1].split("<")[0])
            text = f"Sure! It is {n}." if n % 2 == 0 else "ab" * 40
            ids = [*tokenizer.encode(text), *[tokenizer.eos_id] * (n % 2 == 0)]
            yield from ((row, token) for token in ids[:max_new_tokens])

    monkeypatch.setattr(Transformer, "generate", generate)
    evaluation.main(parse("--mode", "score", "--data_dir", data))
    rows = results_of(tmp_path)
    exact = rows["sft", "exact_match"]
    assert exact["exact_match"] == 0.5 and exact["n"] == 8 and exact["stop_rate"] == 0.5 == exact["loop_rate"]
    assert abs(exact["standard_error"] - math.sqrt(0.25 / 8)) < 1e-12
    assert exact["by_lang"] == {"en": {"exact_match": 1.0, "n": 4}, "zh": {"exact_match": 0.0, "n": 4}}
    assert set(exact["apart"]) == {"chat", "identity"} and not set(exact["apart"]) & set(exact["by_skill"])
    assert rows["sft", "pass_at_1"]["pass_at_1"] == 0.5 == rows["dpo", "preference"]["polite"]


def test_bits_per_byte_is_its_definition(player, tmp_path):
    sft, args = player("sft", "--max_seq_len", 16)
    model, tok = sft.model, sft.tokenizer
    by_lang = {}
    for row in TEXTS:
        ids = [tok.bos_id, *tok.encode(row["text"])]
        # every token after at most 15 others, counted again from where its window began
        for start in range(0, len(ids) - 1, 15):
            piece = torch.tensor([ids[start:start + 16]])
            bits = -token_logprobs(model(piece), piece).double().sum().item() / math.log(2)
            by_lang.setdefault(row["lang"], [0, 0])[0] += bits
        by_lang[row["lang"]][1] += len(row["text"].encode())
    result = evaluation.score_bits(sft, TEXTS, args)
    for lang, (bits, size) in by_lang.items():
        assert result["by_lang"][lang]["bytes"] == size
        assert abs(result["by_lang"][lang]["bits_per_byte"] - bits / size) < 1e-5
    totals = [sum(column) for column in zip(*by_lang.values(), strict=True)]
    assert abs(result["bits_per_byte"] - totals[0] / totals[1]) < 1e-5 and result["n"] == 3
    tokens = sum(len(tok.encode(row["text"])) for row in TEXTS)  # each is a target once
    assert result["perplexity"] == pytest.approx(2 ** (totals[0] / tokens), rel=1e-5)


def test_bits_per_byte_of_any_file(stage, parse, tmp_path):
    stage("sft")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    (tmp_path / "b.txt").write_text("Plain text has no language.\n")
    evaluation.main(parse("--bpb", tmp_path / "a.jsonl", tmp_path / "b.txt"))
    row, = results_of(tmp_path).values()
    assert set(row["by_lang"]) == {"en", "zh", "all"} and row["group"] == "bits_per_byte:files" and row["n"] == 4


def test_a_score_is_on_the_disk_before_the_next_one_begins(stage, parse, data, tmp_path, monkeypatch):
    stage("sft")
    monkeypatch.setattr(evaluation, "score_questions", lambda *inputs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(parse("--mode", "score", "--data_dir", data))
    assert set(results_of(tmp_path)) == {("sft", "bits_per_byte")}


def test_a_checkpoint_that_cannot_be_opened_costs_only_its_own_scores(stage, parse, data, tmp_path, monkeypatch,
                                                                      capsys):
    """sft is damaged and pretrain has no tokenizer; dpo is whole, and wins against nobody."""
    monkeypatch.setattr(metrics, "ANSWER_TOKENS", 6)
    (stage("pretrain") / "tokenizer.json").unlink()
    sft = stage("sft")
    cut(sft / "model.safetensors")
    stage("dpo", parents=[str(sft)])
    for weight in ("", "all"):
        evaluation.main(parse("--mode", "score", "--data_dir", data, "--weight", weight))
        shown, rows = capsys.readouterr().out, results_of(tmp_path)
        assert {weight for weight, _ in rows} == {"dpo"} and "win_rate" not in rows["dpo", "preference"]
        assert f"checkpoint {sft} is damaged" in shown and "pretrain" in shown and "dpo has no win rate: " in shown
        row, = evaluation.main(parse("--tasks", "piqa", "--task_dir", FILES, "--weight", weight))["results"]
        assert row["weight"] == "dpo"
    with pytest.raises(ValueError, match="is damaged"):
        evaluation.main(parse("--mode", "score", "--data_dir", data, "--weight", "dpo,sft"))


WRITER = """
import pathlib, sys, results
print("ready", flush=True)
sys.stdin.readline()
for i in range(60):
    results.write(pathlib.Path(sys.argv[1]), [{"weight": sys.argv[2], "group": f"g{i}"}])
"""


@pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="this system has no such locks")
def test_two_evaluations_at_once_keep_each_others_scores(tmp_path):
    path = tmp_path / "out" / "eval_results.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=ROOT, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE) for name in "ab"]
    for writer in writers:
        assert writer.stdout.readline() == b"ready" + os.linesep.encode()
    for writer in writers:  # both are there: now they write at the same time
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=100)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert results_of(tmp_path).keys() == {(name, f"g{i}") for name in "ab" for i in range(60)}
    assert not list(path.parent.glob("*.tmp*"))


ASKED, SAID = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("row, text", [
    ({"prompt": "a?"}, None), ({"prompt": [ASKED]}, None), ({"instruction": "a?"}, None), ({"messages": [ASKED]}, None),
    ({"prompt": "a?", "completion": "b"}, "b"), ({"instruction": "a?", "output": "b"}, "b"),
    ({"conversations": [ASKED, SAID], "answer": "9"}, "b"), ({"prompt": "a?", "chosen": "b", "rejected": "c"}, None)],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_a_question_is_read_from_rows_of_every_kind(row, text):
    assert question(row) == ([ASKED], text)
    assert question(row | {"system": "Be kind."})[0] == [{"role": "system", "content": "Be kind."}, ASKED]


def test_missing_held_out_data_is_said(stage, parse, data, tmp_path, capsys):
    stage("sft")
    for name in ("sft", "preference", "rl"):
        (data / f"{name}.heldout.jsonl").unlink()
    evaluation.main(parse("--mode", "score", "--data_dir", data))
    assert set(results_of(tmp_path)) == {("sft", "bits_per_byte")}
    assert "rl.heldout.jsonl not found" in capsys.readouterr().out
    (data / "pretrain.heldout.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no held-out data.*make_data"):
        evaluation.main(parse("--mode", "score", "--data_dir", data))


def test_rows_and_files_of_other_types_end_no_measurement(stage, parse, data, tmp_path, capsys, monkeypatch):
    """Languages and skills that are no text, foreign rows among the results, odd fields in minillm.json."""
    monkeypatch.setattr(metrics, "ANSWER_TOKENS", 6)
    stage("sft", args={"max_seq_len": "x"}, parents=[5], metrics={"metric": "loss"})
    stage("dpo", args=None, progress=None, parents=5, metrics=7, seconds="x")
    for path in data.glob("*.heldout.jsonl"):
        row = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
        odd = [row | {"lang": lang, "skill": skill} for lang, skill in ((5, ["add"]), (["en"], 7), ({}, None))]
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in odd)
    foreign = [{}, {"weight": 5, "group": []}, {"weight": "a", "group": "exact_match", "by_lang": 5},
               {"weight": "b", "group": "pair_accuracy", "accuracy_by_kind": {"curt": None}},
               {"weight": "c", "group": "exact_match", "by_skill": {"add": 1}, "exact_match": "x"},
               {"weight": "d", "group": "task:piqa", "task": "piqa", "metric": "acc", "scores": {"acc": 1}, "drawn": 5}]
    (tmp_path / "out" / "eval_results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in foreign))
    evaluation.main(parse("--mode", "score", "--data_dir", data, "--samples", 1))
    row = results_of(tmp_path)["sft", "bits_per_byte"]
    assert set(row["by_lang"]) == {"en", "zh", "5", "['en']", "all"}
    evaluation.main(parse("--mode", "summary", "--report", tmp_path / "out", "--data_dir", data))
    shown = capsys.readouterr().out
    assert "b: pair accuracy -: curt -; correlation of score and length -; n -" in shown and "piqa" in shown
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("content", ["[]", "{}", "{",
                                     '{"rude": "ab", "polite_openers": "cd", "max_characters": 72}',
                                     '{"rude": [], "polite_openers": ["a", 3], "max_characters": 72}'])
def test_a_damaged_file_of_styles_is_named(stage, parse, data, content):
    stage("sft")
    (data / "styles.json").write_text(content)
    with pytest.raises(ValueError, match="styles.json is no file of styles; .*; write it again with make_data.py"):
        evaluation.main(parse("--mode", "score", "--data_dir", data))


def test_a_model_without_finite_weights_gets_no_accuracy_and_a_bad_one_no_overflow(player, tmp_path, capsys):
    sft, args = player("sft", "--tasks", "piqa", "--task_dir", FILES, "--weight", "sft")
    with torch.no_grad():
        sft.model.model.norm.weight *= 1e5
    found = evaluation.score_bits(sft, TEXTS, args)
    assert found["perplexity"] == math.inf and 1024 < found["bits_per_byte"] < math.inf
    torch.nn.init.constant_(sft.model.model.norm.weight, math.nan)
    sft.model.save_pretrained(sft.folder)
    checkpoint.write_minillm(sft.folder, {"stage": "sft", "finished": True})
    with pytest.raises(ValueError, match="log-probabilities that are not finite; .*; give --dtype float32"):
        evaluation.main(args)


# -- Benchmarks --------------------------------------------------------------------------------------------------------
def test_tasks_are_scored_said_in_words_and_kept(stage, parse, tmp_path, capsys):
    stage("sft")
    stage("reward")
    result = evaluation.main(parse("--tasks", "all", "--task_dir", FILES, "--limit", 2, "--few_shot", 0))["results"]
    shown, rows = capsys.readouterr().out, results_of(tmp_path)
    assert {row["task"] for row in result} == set(tasks.TASKS) and len(result) == len(tasks.TASKS) == len(rows)
    assert "reward is a reward model" in shown and "at chance" in shown and "perplexity" in shown
    row = rows["sft", "task:piqa"]
    assert row["stage"] == "sft" and len(row["checkpoint"]) == 16 and row["n"] == 2 and row["few_shot"] == 0
    assert {"score", "standard_error", "chance", "majority", "seconds", "versions"} <= row.keys()
    assert row["score"] == row["scores"]["acc"] and row["data"] == "piqa_validation.jsonl"
    alone, = evaluation.main(parse("--tasks", "ceval", "--task_dir", FILES, "--limit", 1))["results"]
    # a question a subject: no spread, and so no error, but a guesser's own error is known
    assert alone["standard_error"] is None and alone["n"] > 1 and "chance" in alone["verdict"]
    assert alone["verdict"] == tasks.verdict(alone["score"], 0.0, alone["chance"], alone["majority"], alone["n"])
    evaluation.main(parse("--mode", "summary"))
    assert "piqa" in capsys.readouterr().out
    assert not list((tmp_path / "out" / "eval_partial").iterdir())


def test_an_interrupted_benchmark_goes_on_where_it_was(stage, parse, tmp_path, monkeypatch, capsys):
    stage("sft")
    flags = ("--tasks", "hellaswag", "--task_dir", FILES, "--batch_size", 8)
    whole, = evaluation.main(parse(*flags))["results"]
    scores, asked = metrics.sequence_scores, []

    def killed(model, groups, *args, **kwargs):
        asked.append(len(groups))
        for n, found in enumerate(scores(model, groups, *args, **kwargs)):
            if n == 4 and len(asked) == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(metrics, "sequence_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(parse(*flags))
    path, = (tmp_path / "out" / "eval_partial").iterdir()
    with open(path, "a") as file:
        file.write("[7, [[-3.")  # what a kill in the middle of a write leaves
    again, = evaluation.main(parse(*flags))["results"]
    assert asked == [10, 6] and again["scores"] == whole["scores"] and "4 of 10 are known" in capsys.readouterr().out

    def overtaken(model, groups, *args, **kwargs):
        for n, found in enumerate(scores(model, groups, *args, **kwargs)):
            if n == 4:  # the same command elsewhere is done first, and has removed what both wrote
                path.unlink()
            yield found

    monkeypatch.setattr(metrics, "sequence_scores", overtaken)
    assert evaluation.main(parse(*flags))["results"][0]["scores"] == whole["scores"]


@pytest.fixture
def drawn(tmp_path, tokenizer, monkeypatch):
    """Three word problems with the answers 10, 11, 12, all answered wrongly when asked for the likeliest. Drawn answer
    t (0 to 3) to problem i is right for t <= i, in the strict form in even turns only. Returns the seeds in use."""
    rows = [{"question": f"How many is {10 + i}?", "answer": f"#### {10 + i}"} for i in range(3)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tasks, "ANSWER_TOKENS", 32)  # the context of 256 is to hold the question as well
    seeds = []

    def generate(self, prompts, max_new_tokens, temperature, top_p, row_seeds, **settings):
        assert (temperature, top_p) in ((0.0, 1.0), (1.0, 1.0)) and (temperature == 0) == (max(row_seeds) < 3)
        for row, (prompt, seed) in enumerate(zip(prompts, row_seeds, strict=True)):
            i, t = int(tokenizer.decode(prompt).split("?")[0].split()[-1]) - 10, seed // 3 - 1
            seeds.append(seed)
            text = ("#### " if t % 2 == 0 else "It is ") + str(10 + i if 0 <= t <= i else 99)
            yield from ((row, token) for token in [*tokenizer.encode(text), tokenizer.eos_id])

    monkeypatch.setattr(Transformer, "generate", generate)
    return seeds


def test_pass_k_of_a_benchmark_equals_a_count_by_hand(stage, parse, tmp_path, drawn, capsys):
    """Of 4 answers 1, 2 and 3 are right: 1 - C(4 - c, 2) / C(4, 2) is 3/6, 5/6 and 1. In the strict form 1, 1 and 2."""
    stage("sft")
    flags = ("--tasks", "gsm8k", "--task_dir", tmp_path, "--few_shot", 0, "--batch_size", 2)
    row, = evaluation.main(parse(*flags, "--pass_k", 4))["results"]
    assert sorted(drawn) == list(range(15)), "three greedy answers and twelve drawn ones, each with a seed of its own"
    assert row["scores"] == {"strict-match": 0.0, "flexible-extract": 0.0} and row["n"] == 3
    assert (row["drawn"]["samples"], row["drawn"]["temperature"], row["drawn"]["top_p"]) == (4, 1.0, 1.0)
    flexible, strict = (row["drawn"]["rates"][name] for name in ("flexible-extract", "strict-match"))
    assert flexible["pass_at_k"] == pytest.approx({"1": 6 / 12, "2": (3 / 6 + 5 / 6 + 1) / 3, "4": 1.0})
    assert strict["pass_at_k"] == pytest.approx({"1": 4 / 12, "2": (3 / 6 + 3 / 6 + 5 / 6) / 3, "4": 1.0})
    assert flexible["pass_at_k_error"]["1"] == pytest.approx(0.25 / math.sqrt(3))  # of 1/4, 2/4 and 3/4
    said = "sft gsm8k, 4 answers at temperature 1, flexible-extract: pass@1 0.500 (0.144), pass@2 0.778 (0.147), pass@4"
    assert said in capsys.readouterr().out
    evaluation.main(parse("--mode", "summary"))
    assert said in capsys.readouterr().out
    drawn.clear()
    assert "drawn" not in evaluation.main(parse(*flags))["results"][0] and sorted(drawn) == [0, 1, 2]


def test_interrupted_pass_k_goes_on_and_finds_the_same(stage, parse, tmp_path, drawn, monkeypatch, capsys):
    stage("sft")
    flags = ("--tasks", "gsm8k", "--task_dir", tmp_path, "--few_shot", 0, "--batch_size", 2, "--pass_k", 4)
    whole, = evaluation.main(parse(*flags))["results"]
    drawn.clear()
    complete, batches = metrics.complete, []

    def killed(*inputs):
        batches.append(1)
        if len(batches) == 5:
            raise KeyboardInterrupt
        return complete(*inputs)

    monkeypatch.setattr(metrics, "complete", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(parse(*flags))
    assert sorted(drawn) == list(range(7))
    again, = evaluation.main(parse(*flags))["results"]
    assert "7 of 15 are known" in capsys.readouterr().out and sorted(drawn) == list(range(15))
    assert again["drawn"] == whole["drawn"] and again["scores"] == whole["scores"]


def test_pass_k_that_would_mean_nothing_is_refused(stage, parse, tmp_path, drawn):
    stage("sft")
    with pytest.raises(ValueError, match="--pass_k 2 with --tasks piqa; .*; add gsm8k"):
        evaluation.main(parse("--tasks", "piqa", "--task_dir", FILES, "--pass_k", 2))
    with pytest.raises(ValueError, match="--pass_k 2 with --temperature 0; .*; give a higher"):
        evaluation.main(parse("--tasks", "gsm8k", "--task_dir", tmp_path, "--pass_k", 2, "--temperature", 0))
    for flag in (["--min_p", 0.1], ["--repetition_penalty", 1.5], ["--min_new_tokens", 2], ["--num_beams", 2],
                 ["--speculate", 2]):
        with pytest.raises(ValueError, match=f"{flag[0]} {flag[1]} with --tasks; .*; leave the others out"):
            evaluation.main(parse("--tasks", "gsm8k", "--task_dir", tmp_path, "--pass_k", 2, *flag))
    assert not drawn, "all of that is known before the first answer"
    assert parse().temperature == 0.7 and parse("--tasks", "gsm8k", "--temperature", 0.5).temperature == 0.5


def test_unknown_task_and_missing_file(stage, parse, tmp_path, capsys):
    stage("sft")
    with pytest.raises(ValueError, match="--tasks pika; there are: hellaswag, .*correct the name"):
        evaluation.main(parse("--tasks", "piqa,pika", "--task_dir", FILES))
    with pytest.raises(FileNotFoundError, match="no file of any benchmark in .*prepare_data.py download eval --output"):
        evaluation.main(parse("--tasks", "all", "--task_dir", tmp_path))
    shutil.copy(FILES / "piqa_validation.jsonl", tmp_path)
    with pytest.raises(FileNotFoundError, match="no file of boolq"):
        evaluation.main(parse("--tasks", "boolq", "--task_dir", tmp_path))
    assert len(evaluation.main(parse("--tasks", "all", "--task_dir", tmp_path))["results"]) == 1
    assert "boolq is left out" in capsys.readouterr().out


# -- References, fixed prompts, comparisons ----------------------------------------------------------------------------
def echo(monkeypatch, tokenizer, change=lambda text: text):
    """generate() answers with the last question's own text, changed."""
    def generate(self, prompts, max_new_tokens, **settings):
        for row, prompt in enumerate(prompts):
            said = tokenizer.decode(prompt).rsplit("user\n", 1)[1].split("<|im_end|>")[0]
            ids = [*tokenizer.encode(change(said)), tokenizer.eos_id]
            yield from ((row, token) for token in ids[:max_new_tokens])

    monkeypatch.setattr(Transformer, "generate", generate)


def test_references_give_the_scores_of_the_libraries(stage, parse, tmp_path, tokenizer, monkeypatch, capsys):
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (requirements-dev.txt)")
    pytest.importorskip("rouge_score", reason="rouge_score is not installed (requirements-dev.txt)")
    stage("sft")
    asked = ["the brown cat sat on the mat today", "a dog is grey and very old now", "one two three four five six"]
    wanted = ["the brown cat lay on the mat today", "a dog is grey and very old now", "six five four three two one"]
    rows = [{"prompt": asked[0], "reference": wanted[0]}, {"prompt": asked[1], "answer": wanted[1]},
            {"conversations": [{"role": "user", "content": asked[2]}, {"role": "assistant", "content": wanted[2]}]}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    echo(monkeypatch, tokenizer)
    row, = evaluation.main(parse("--references", tmp_path / "r.jsonl"))["results"]
    assert row["bleu"] == pytest.approx(sacrebleu.corpus_bleu(asked, [wanted]).score) and 0 < row["bleu"] < 100
    assert row["chrf"] == pytest.approx(sacrebleu.corpus_chrf(asked, [wanted]).score)
    # longest common subsequences 7 of 8, 8 of 8, 1 of 6; equal lengths, so F is that share
    assert row["rouge_l"] == pytest.approx(100 * (7 / 8 + 1 + 1 / 6) / 3) and row["n"] == 3
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"r\.jsonl:1: no reference.*write prompt and reference"):
        evaluation.main(parse("--references", tmp_path / "r.jsonl"))


def test_fixed_prompts_pass_only_when_right_and_stopped(stage, parse, tmp_path, tokenizer, monkeypatch, capsys):
    stage("sft")
    rows = [{"prompt": f"say {n}", "answer": str(n), "check": "number"} for n in range(6)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # 1 is wrong, 2 says so again and again and never stops
    echo(monkeypatch, tokenizer, lambda text: {"say 1": "7", "say 2": "2 " * 80}.get(text, text))
    row, = evaluation.main(parse("--regression", 1, "--regression_path", tmp_path / "s.jsonl"))["results"]
    shown = capsys.readouterr().out
    assert row["pass_rate"] == 4 / 6 and row["failed"] == ["say 1", "say 2"] and row["group"] == "regression"
    assert "4 of 6 fixed prompts passed" in shown and "wrong: 'say 1' -> '7', expected '1'" in shown
    assert "does not stop, repeats itself: 'say 2'" in shown
    (tmp_path / "s.jsonl").write_text('{"prompt": "say 1"}\n')
    with pytest.raises(ValueError, match=r"s\.jsonl:1: found the keys \[prompt\].*add what is missing"):
        evaluation.main(parse("--regression", 1, "--regression_path", tmp_path / "s.jsonl"))


@pytest.mark.parametrize("name", ["train_sft", "train_dpo", "train_ppo", "train_grpo", "train_distill"])
def test_a_run_logs_and_shows_what_the_fixed_prompts_found(stage_of, tmp_path, tokenizer, monkeypatch, capsys, name):
    """One of four is wrong, one loops; what eval.py says of the finished model is what stood in the log. Rates at which
    no weight moves: the second evaluation is no better, and the next step is the last."""
    rows = [{"prompt": f"say {n}", "answer": str(n), "check": "number"} for n in range(4)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    echo(monkeypatch, tokenizer, lambda text: {"say 1": "7", "say 2": "2 " * 80}.get(text, text))
    flags = ["--regression_interval", "1", "--regression_path", str(tmp_path / "s.jsonl"), "--eval_interval", "1",
             "--patience", "1", "--patience_metric", "regression_pass_rate", *["--stage", "sft"] * ("distill" in name)]
    module, argv = stage_of(tmp_path, name, *flags, "--max_steps", "6")
    assert module.main(module.parse_args(argv))["steps"] == 3
    shown = capsys.readouterr().out
    assert shown.count("regression pass rate 0.500") == 3 and "patience is over: regression_pass_rate" in shown
    assert shown.count("    wrong: 'say 1' -> '7', expected '1'\n") == 3 == shown.count("repeats itself: 'say 2'")
    logged = [row["regression_pass_rate"] for row in records.read_metrics(tmp_path / "out" / "logs" / "run")
              if "val_loss" in row or "val_reward" in row or "pass_at_1" in row]
    assert logged == [0.5] * (3 + (name != "train_dpo"))
    argv = ["--regression", "1", "--weight", "run", *flags[2:4], "--save_dir", str(tmp_path / "out")]
    assert evaluation.main(evaluation.parse_args(argv))["results"][0]["pass_rate"] == logged[-1]


def test_a_suite_that_cannot_be_run_ends_a_run_before_its_first_step(stage_of, tmp_path, capsys):
    module, argv = stage_of(tmp_path, "train_sft", "--regression_interval", "9", "--regression_path", "gone.jsonl")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl not found"):
        module.main(module.parse_args(argv))
    for text, message in (('{"prompt": "x", "answer": "1", "check": "regex"}\n', r"s\.jsonl:1: .*check 'regex'"),
                          ('{"prompt": 3, "answer": "1", "check": "exact"}\n', r"s\.jsonl:1: .*a text"),
                          ("", "no rows.*--regression_path")):
        (tmp_path / "s.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            module.main(module.parse_args([*argv[:-1], str(tmp_path / "s.jsonl")]))
    assert not (tmp_path / "out" / "run").exists() and not (tmp_path / "out" / "logs").exists()
    for script, flags, message in (("train_sft", ["--patience_metric", "regression_pass_rate"], "never be measured"),
                                   ("train_distill", ["--regression_interval", "1"], "a base model only continues")):
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args(flags)
        assert message in capsys.readouterr().err


def test_ranks_share_the_fixed_prompts_and_find_the_same(player, tokenizer, monkeypatch):
    echo(monkeypatch, tokenizer, lambda text: text.replace("3", "4"))
    sft, _ = player()
    items = metrics.fixed_prompts(({"prompt": f"say {n}", "answer": str(n), "check": "number"}, "") for n in range(5))
    whole = metrics.run_regression(sft.model, tokenizer, items, sft.runtime)
    assert whole[0] == 0.8 and [item["prompt"] for item, _, _ in whole[1]] == ["say 3"]
    shares = []

    def send(self, value):
        shares.append(value)
        raise EOFError  # the other rank is not there

    def rank(number):
        runtime = common.Runtime(torch.device("cpu"), torch.float32, number, 2)
        return metrics.run_regression(sft.model, tokenizer, items, runtime)

    monkeypatch.setattr(common.Runtime, "gather", send)
    for number in (0, 1):
        with pytest.raises(EOFError):
            rank(number)
    monkeypatch.setattr(common.Runtime, "gather", lambda self, value: shares)
    assert list(map(len, shares)) == [3, 2] and rank(0) == rank(1) == whole


def test_the_fixed_prompts_of_the_project_are_whole():
    rows = [json.loads(line) for line in (ROOT / "assets" / "regression.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 20 and {row["lang"] for row in rows} == {"en", "zh"}
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert metrics.check_answer(row["check"], row["answer"], row["answer"])


def test_compare_writes_a_table_and_says_who_wins(stage, parse, data, tmp_path, tokenizer, monkeypatch, capsys):
    stage("sft")
    stage("dpo")
    reward = ScalarHead.from_pretrained(stage("reward"))
    torch.nn.init.normal_(reward.score.weight, generator=torch.Generator().manual_seed(2))
    reward.save_pretrained(tmp_path / "out" / "reward")
    checkpoint.write_minillm(tmp_path / "out" / "reward", {"stage": "reward", "finished": True})
    (tmp_path / "p.txt").write_text("one | two\nthree\n")
    echo(monkeypatch, tokenizer)
    flags = ("--compare", "sft,dpo", "--output", tmp_path / "t.md")
    result = evaluation.main(parse("--prompts", tmp_path / "p.txt", *flags, "--judge", "reward"))
    table = (tmp_path / "t.md").read_text().splitlines()
    assert table == ["| prompt | sft | dpo |", "|---|---|---|", "| one \\| two | one \\| two | one \\| two |",
                     "| three | three | three |"]
    assert [(row["group"], row["win_rate"]) for row in result["results"]] == [("against dpo by reward model", 0.5)]
    # on the held-out preferences a rule judges as well; with one set of answers all are ties
    result = evaluation.main(parse("--data_dir", data, *flags, "--judge", "reward"))
    assert [row["win_rate"] for row in result["results"]] == [0.5, 0.5] and result["results"][0]["n"] == 12
    shown = capsys.readouterr().out
    assert "judged by the rule: won 0.500 (0.000) of 12" in shown and shown.count("decoding with") == 4
    evaluation.main(parse("--mode", "summary"))
    shown = capsys.readouterr().out
    assert "other scores" in shown and "against dpo by reward model  win rate" in shown and "0.500 (0.000)" in shown
    with pytest.raises(ValueError, match="--compare reward is a reward model.*--judge"):
        evaluation.main(parse("--prompts", tmp_path / "p.txt", "--compare", "sft,reward"))
    with pytest.raises(ValueError, match="--judge sft is no reward model"):
        evaluation.main(parse("--prompts", tmp_path / "p.txt", "--compare", "sft,dpo", "--judge", "sft"))


def test_what_is_missing_is_said_before_the_first_answer(stage, parse, tmp_path, monkeypatch):
    stage("sft")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "reference": "b"}\n')
    monkeypatch.setattr(Transformer, "generate", lambda *inputs, **settings: pytest.fail("it has begun to answer"))
    asked = ("--prompts", tmp_path / "p.jsonl", "--compare")
    for flags in ((*asked, "sft,typo"), (*asked, "sft", "--judge", "typo")):
        with pytest.raises(FileNotFoundError, match="'typo' not found"):
            evaluation.main(parse(*flags))
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match="pip install sacrebleu rouge-score"):
        evaluation.main(parse("--references", tmp_path / "p.jsonl"))


@pytest.mark.parametrize("flags", [[], ["--top_k", 1], ["--min_new_tokens", 12], ["--num_beams", 2],
                                   ["--repetition_penalty", 1.5], ["--temperature", 0, "--speculate", 3],
                                   ["--max_new_tokens", 256, "--top_k", 1]], ids=str)
def test_compared_answers_are_those_of_single_prompts(stage, parse, tmp_path, flags):
    stage("sft")
    (tmp_path / "p.txt").write_text("hello\n")
    flags = ["--prompts", tmp_path / "p.txt", "--max_new_tokens", 12, "--temperature", 1, "--decoder", "plain", *flags]
    evaluation.main(parse(*flags, "--weight", "sft", "--output", tmp_path / "a.jsonl"))
    alone = json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["answer"]
    assert evaluation.main(parse(*flags, "--compare", "sft"))["answers"] == {"sft": [alone]}


def test_adapters_without_their_model_are_told_apart_and_end_no_report(model_folder, tokenizer, parse, data, tmp_path,
                                                                       capsys):
    """Two checkpoints of --merge 0: neither has weights of its own beside adapter/."""
    base, hashes = tmp_path / "base", []
    shutil.copytree(model_folder("dense"), base)
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        adapters = lora.Adapters(Transformer.from_pretrained(base), 2, 4, base=base, merge=False)
        adapters.save_pretrained(tmp_path / "out" / name)
        tokenizer.save_pretrained(tmp_path / "out" / name)
        loaded = evaluation.load(tmp_path / "out" / name, parse(), common.Runtime(torch.device("cpu"), torch.float32))
        hashes.append(loaded.weights_hash)
    assert hashes[0] != hashes[1]
    (tmp_path / "out" / "a").rename(tmp_path / "out" / "c")
    loaded = evaluation.load(tmp_path / "out" / "c", parse(), loaded.runtime)
    assert loaded.weights_hash == hashes[0]
    shutil.rmtree(base)
    shutil.copytree(model_folder("dense"), tmp_path / "out" / "whole")
    evaluation.main(parse("--mode", "report", "--data_dir", data))
    shown = capsys.readouterr().out
    assert shown.count("is not there; adapters are no model without their base") == 2 and "whole answers" in shown


def test_the_judge_reads_an_answer_as_training_did(stage, parse, data, tmp_path, player):
    reward, args = player("reward")
    for weight in reward.model.parameters():  # larger than at a start, where all answers have nearly one score
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.4, generator=torch.Generator().manual_seed(2))
    rows = [json.loads(line) for line in (data / "preference.heldout.jsonl").read_text("utf-8").splitlines()]
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    sides = [metrics.reward_scores(reward.model, reward.tokenizer, asked, [row[side] for row in rows], 5)
             for side in ("chosen", "rejected")]
    pairs = evaluation.PreferenceData(data / "preference.heldout.jsonl", reward.tokenizer, 256,
                                      cache_dir=tmp_path / "cache").batch(range(len(rows)))
    with torch.no_grad():
        expected = reward.model(pairs["ids"], pairs["lengths"])
    assert [*sides[0], *sides[1]] == pytest.approx(expected.tolist(), abs=1e-5) and len(set(sides[0])) > 6
    torch.nn.init.constant_(reward.model.model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="scores that are not finite"):
        metrics.reward_scores(reward.model, reward.tokenizer, asked, [row["chosen"] for row in rows])


def test_pass_k_draws_several_answers(stage, parse, data, tmp_path, tokenizer, monkeypatch, capsys):
    stage("sft")
    turn = []

    def generate(self, prompts, max_new_tokens, row_seeds, **settings):
        """Question n is answered rightly in draw d (12 prompts a draw) when n divides by d + 1."""
        for row, (prompt, seed) in enumerate(zip(prompts, row_seeds, strict=True)):
            n = int(tokenizer.decode(prompt).rsplit("say ", 1)[1].split("<")[0])
            turn.append(seed)
            text = str(n) if n % (seed // 12 + 1) == 0 else "no"
            yield from ((row, token) for token in [*tokenizer.encode(text), tokenizer.eos_id])

    monkeypatch.setattr(Transformer, "generate", generate)
    for name in ("pretrain", "sft", "preference"):
        (data / f"{name}.heldout.jsonl").unlink()
    row, = evaluation.main(parse("--mode", "score", "--data_dir", data, "--pass_k", 3))["results"]
    right = [sum(n % (d + 1) == 0 for d in range(3)) for n in (0, 1, 2, 3, 4, 5, 8, 9)]  # the others are small talk
    assert sorted(turn) == list(range(36)) and row["samples"] == 3 and row["n"] == 8  # and identity
    assert row["pass_at_1"] == pytest.approx(sum(right) / 24) == row["pass_at_k"]["1"]
    assert row["pass_at_k"]["2"] == pytest.approx(1 - sum(math.comb(3 - c, 2) for c in right) / 3 / 8)
    assert row["pass_at_k"]["3"] == 1.0 and "pass@3 1.000" in capsys.readouterr().out
