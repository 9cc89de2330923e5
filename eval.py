"""Talk to a checkpoint, or measure it: chat, single answers, files of prompts, and one table of scores over all stages.

What is measured, always on held-out data and with a standard error:
    bits per byte    = - sum_t log2 p(x_t | x_<t) / UTF-8 bytes of the text: unlike a loss it compares tokenizers.
                       Beside it the perplexity of a token, which compares models of one tokenizer only
    exact match      = share of right greedy answers, by skill and language; identity and small talk are held out by
                       wording only and reported apart. Beside it: answers that stop by themselves, and that loop
    polite, win rate = answers sampled at temperature 1: share in the preferred style; won against the parent's answer
                       to the same prompt, by a rule (right and polite), ties count half
    pass@k           = chance of a right answer among k sampled ones, to the prompts of reinforcement learning or of a
                       benchmark; pass@1 is the share of right ones
    pair accuracy    = of a reward model, by kind of error
What is here: opening checkpoints, the loops over questions. What is not: talking on a terminal (chat.py), judges
(metrics.py), benchmark formats (tasks.py), tables (results.py), decoding (decoding.py, generation.py).

Papers: Gao et al. 2020 (bits per byte, arXiv:2101.00027), Ouyang et al. 2022 (win rate, arXiv:2203.02155), Chen et al.
2021 (pass@k, arXiv:2107.03374).

    python eval.py --stream 1                                                   # chat with the newest model
    python eval.py --weight sft --prompt "What is 3 + 4?" --temperature 0       # one answer
    python eval.py --weight out/sft --prompts questions.txt --output answers.jsonl
    python eval.py --mode score --weight pretrain,sft,dpo --data_dir out/data   # the table; --weight all is the default
    python eval.py --mode score --weight pretrain --bpb my/articles.jsonl       # bits per byte of any text
    python eval.py --weight sft --tasks all --task_dir out/tasks                # benchmarks, as lm-evaluation-harness
    python eval.py --weight grpo --tasks gsm8k --pass_k 8 --temperature 0.8     # and pass@1, 2, 4, 8 of drawn answers
    python eval.py --samples 1                                                  # fixed held-out questions, answered
    python eval.py --report out                                                 # report.html and report.md, made again
"""
import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import platform
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

import chat
import checkpoint
import cli
import common
import logs
import lora
import metrics
import records
import report
import results
import tasks
from dataset import PreferenceData
from decoding import Prefix
from generation import beam_search, lookup_decoding
from inference import accelerate
from model import ScalarHead, Transformer
from rows import expand_paths, question, read_rows, text_lines
from tokenizer import StreamDecoder, Tokenizer, bytes_per_token
from weights import is_reward

# Items per set when --limit is not given: standard errors of one to three points, and about ten seconds for a model of
# 6M parameters on two CPU cores. The win rate needs the most: it compares two noisy answers.
CAPS = {"pretrain": 240, "sft": 300, "preference": 400, "rl": 200}
SAMPLE_KINDS = {"story": ("story",), "arithmetic": ("add", "subtract"), "translation": ("translate",),
                "small talk": ("chat",), "several turns": ("dialogue",)}
# What a flag asks for when --mode is left out
MODES = {"compare": "compare", "batch": "prompts", "tasks": "tasks", "references": "references",
         "regression": "regression", "score": "bpb", "samples": "samples", "report": "report"}
# Flags that the other modes would overlook
READ_BY = {"system": ("chat", "single", "batch", "compare"), "stop": ("chat", "single", "batch"),
           "output": ("batch", "compare"), "judge": ("compare",), "pass_k": ("score", "tasks"), "few_shot": ("tasks",)}


def parse_args(argv=None):
    """Flags; without --mode the others decide: --prompt, those of MODES, else chat."""
    at_least_0 = cli.positive(float, zero=True)
    count = cli.positive(int, zero=True)
    parser = cli.Parser(__doc__)
    g = parser.add_argument_group("what")
    g.add_argument("--mode", default="", choices=("chat", "single", *MODES, "summary"),
                   help="what to do; left out, the other flags decide: chat, or single with --prompt, batch with "
                        "--prompts, score with --bpb, and others as their flag is named. summary prints the last "
                        "scores again; report is of --save_dir where --report names no folder")
    g.add_argument("--weight", default="",
                   help="checkpoint: name below --save_dir, or any Qwen3 folder; left out: the newest; for scores a "
                        "comma list or all; left out: all")
    g.add_argument("--save_dir", default="out", help="folder of all checkpoints; scores go to its eval_results.jsonl")
    g.add_argument("--report", default="", help="write report.html and report.md of this output folder, with "
                   "answers of all its checkpoints; after scores or whatever else is asked for")
    g.add_argument("--eval_mode", default="auto", choices=("auto", "pretrain", "sft"),
                   help="pretrain continues text, sft answers; auto: as the checkpoint's stage or chat template says")
    g = parser.add_argument_group("answers")
    g.add_argument("--prompt", default="", help="text of a single question")
    g.add_argument("--prompts", default="", help=".txt with a prompt a line, or .jsonl with prompt or conversations")
    g.add_argument("--output", default="", help="file for the answers to --prompts, one JSON object a line; "
                                                "left out: standard output")
    g.add_argument("--system", default="", help="system message in front of the conversation")
    g.add_argument("--max_new_tokens", type=cli.positive(int), default=200, help="longest answer, in tokens")
    g.add_argument("--temperature", type=at_least_0,
                   help="0 = always the most likely token (default: 0.7, and 1 where --tasks draws)")
    g.add_argument("--top_k", type=count, default=0, help="draw from the k most likely tokens, 0 = from all")
    g.add_argument("--top_p", type=at_least_0,
                   help="draw from the fewest tokens with this probability (default: 0.9, and 1 where --tasks draws)")
    g.add_argument("--min_p", type=at_least_0, default=0.0,
                   help="draw from tokens at least so many times as likely as the most likely one, 0 = from all")
    g.add_argument("--min_new_tokens", type=count, default=0, help="shortest answer, in tokens")
    g.add_argument("--repetition_penalty", type=cli.positive(float), default=1.0,
                   help="above 1: tokens that have occurred become less likely")
    g.add_argument("--num_beams", type=cli.positive(int), default=1,
                   help="beams of a search for the likeliest answer (nothing is drawn or streamed); 1 = no search")
    g.add_argument("--speculate", type=count, default=0,
                   help="guess so many tokens a step from what stood in the text before; the answer stays the same; "
                        "needs --temperature 0; 0 = off")
    g.add_argument("--decoder", default="fast", choices=("fast", "int8", "plain"),
                   help="fast: what a CPU decodes from sooner, a step in Rust or a copy of the weights; int8: with "
                        "weights in 8 bits; plain: the model itself, which needs least memory. Scores use the model "
                        "itself")
    g.add_argument("--stop", nargs="+", default=[], help="strings that end an answer; they are not shown; "
                   "an answer to --prompts is cut when it is done, and is no row of training data")
    cli.switch(g, "--stream", 1, "show an answer while it is made")
    cli.switch(g, "--show_speed", 1, "show tokens per second after each answer")
    g = parser.add_argument_group("scores")
    g.add_argument("--data_dir", default="out/data", help="folder with {pretrain,sft,preference,rl}.heldout.jsonl")
    g.add_argument("--limit", type=int, default=-1,
                   help=f"items per held-out set, 0 = all, -1 = {', '.join(f'{k} {v}' for k, v in CAPS.items())}")
    g.add_argument("--bpb", nargs="+", default=[], help="only bits per byte, of these files or globs (text, lang)")
    g.add_argument("--max_seq_len", type=count, default=0,
                   help="tokens per window in bits per byte, 0 = what the model was trained with, or its context")
    g.add_argument("--samples", type=count, default=0,
                   help="answers shown to each of ten fixed held-out questions: one greedy, the others drawn with "
                        "--temperature and --top_p alone; with scores: by the last of the weights")
    g.add_argument("--pass_k", type=cli.positive(int), default=1,
                   help="samples of each checked prompt, in --tasks of each question that is answered in writing "
                        "(gsm8k), from 2 on; pass@k for k = 1, 2, 4, ... up to it")
    g.add_argument("--references", default="", help="file of questions with answers (the formats of SFT, or prompt and "
                                                    "reference): BLEU, chrF and ROUGE-L of the greedy answers")
    g.add_argument("--compare", default="",
                   help="comma list of checkpoints: their answers to --prompts as a markdown table (to --output), and "
                        "who wins; left out prompts: those of the held-out preferences, where a rule judges as well")
    g.add_argument("--judge", default="", help="reward model that judges in --compare, name or folder")
    cli.switch(g, "--regression", 0, "only the suite of fixed prompts in --regression_path: share passed, failures")
    cli.suite_path(g)
    g = parser.add_argument_group("benchmarks")
    g.add_argument("--tasks", default="", help=f"comma list or all: {', '.join(tasks.TASKS)}; --limit counts the items "
                                               "of each subject")
    g.add_argument("--task_dir", default="out/tasks", help="folder with the published files (docs/evaluation.md)")
    g.add_argument("--few_shot", type=int, default=-1,
                   help="solved examples in front of each question, -1 = as lm-evaluation-harness: 5 for gsm8k, else 0")
    g = parser.add_argument_group("run")
    g.add_argument("--batch_size", type=cli.positive(int), default=64, help="rows decoded or scored together")
    cli.machine_flags(g)
    args = parser.parse_args(argv)
    # what is given says what is wanted: nobody types a prompt to start a chat
    flags = {"single": "prompt", **MODES}
    given = [mode for mode, flag in flags.items() if getattr(args, flag)]
    args.mode = args.mode or next(iter(given), "chat")
    besides = {"compare": ("batch",), "score": () if args.bpb else ("samples",)}.get(args.mode, ())
    spare = [f"--{flags[mode]}" for mode in given if mode not in (args.mode, "report", *besides)]
    if spare:
        parser.error(f"{', '.join(spare)} with --mode {args.mode}, given or meant; one command does one thing; give "
                     "each a command of its own")
    for name, modes in READ_BY.items():
        if args.mode not in modes and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} with --mode {args.mode}, given or meant; it would be overlooked there, and belongs "
                         f"to {', '.join(modes)}; leave it out, or say with --mode what is wanted")
    if args.mode == "report":
        args.report = args.report or args.save_dir
    # pass@k is about all that a model may say, a conversation about the better part of it
    for name, in_talk in (("temperature", 0.7), ("top_p", 0.9)):
        if getattr(args, name) is None:
            setattr(args, name, 1.0 if args.mode == "tasks" else in_talk)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 1. Which checkpoint
@dataclass
class Player:
    """A checkpoint, loaded and ready to answer (chat) or to continue text (not chat)."""

    name: str
    folder: Path
    facts: dict  # minillm.json, {} for a folder from elsewhere
    model: torch.nn.Module
    tokenizer: Tokenizer
    chat: bool
    runtime: common.Runtime

    @property
    def context(self):
        """Tokens that prompt and answer may have together."""
        return self.model.config.max_position_embeddings

    @property
    def stop_ids(self):
        """Ids that end a generation."""
        return self.tokenizer.stop_ids(chat=self.chat)

    @functools.cached_property
    def weights_hash(self):
        """What tells two checkpoints apart wherever they lie: a hash of the weight files' hashes."""
        adapter = lora.alone(self.folder)
        paths = sorted((lora.base_of(adapter) if adapter else self.folder).glob("*.safetensors"))
        paths += sorted(adapter.glob("adapter_*")) if adapter else []
        return hashlib.sha256("".join(map(checkpoint.file_hash, paths)).encode()).hexdigest()[:16]

    def ids(self, messages):
        """Prompt ids of a conversation, by the render() that made the training data; a base model reads only the last
        text."""
        if self.chat:
            return self.tokenizer.render(messages, add_generation_prompt=True)[0]
        # every document it was trained on began with bos
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return start + self.tokenizer.encode(messages[-1]["content"])

    def tokens(self, prompts, args, row_seeds, counts=None, prefix=None):
        """(row, token id) as they are made: drawn, or with --num_beams found and handed over row by row.

        counts: a dict for the facts of --speculate. prefix: memory() of a chat, whose beginning is not read again.
        """
        if args.num_beams > 1:
            # which beam wins is known at the end only, so there is nothing to stream before
            for row, prompt in enumerate(prompts):
                found = beam_search(self.model, prompt, args.num_beams, args.max_new_tokens, stop_ids=self.stop_ids)
                yield from ((row, token) for token in found[0][0])
        elif args.speculate:
            for row, prompt in enumerate(prompts):
                found = lookup_decoding(self.model, prompt, args.max_new_tokens, args.speculate, self.stop_ids, counts)
                yield from ((row, token) for token in found)
        else:
            yield from self.model.generate(
                prompts, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                min_p=args.min_p, repetition_penalty=args.repetition_penalty, min_new_tokens=args.min_new_tokens,
                stop_ids=self.stop_ids, seed=args.seed, row_seeds=row_seeds, max_batch=args.batch_size, prefix=prefix)

    def pieces(self, prompt, answer, args, row_seed=0, prefix=None):
        """Text of one answer, piece by piece and never half a character; notes ids and end in a chat.Answer."""
        decoder = StreamDecoder(self.tokenizer)
        for _, token in self.tokens([prompt], args, [row_seed], answer.counts, prefix):
            answer.ids.append(token)
            if token in self.stop_ids:
                answer.ended = True  # the stop token is no text, and the row ends with it
                break
            yield decoder.push(token)
        yield decoder.flush()

    def said(self, text):
        """An answer as a turn of the conversation that goes on: what a model only thought is no part of it."""
        return {"role": "assistant", "content": metrics.spoken(text).lstrip()}

    def loops(self, ids):
        """Whether an answer repeats itself."""
        return metrics.has_loop(ids)

    def memory(self):
        """What keeps the beginning of a conversation, so that it is read once."""
        return Prefix()


def is_chat(facts, tokenizer, eval_mode):
    """Whether to hold a conversation with this checkpoint: as asked, else by its stage, else by its chat template."""
    if eval_mode != "auto":
        return eval_mode == "sft"
    if facts.get("stage"):
        return facts["stage"] != "pretrain"
    # transformers keeps the template in a file of its own, older versions inside tokenizer_config.json
    files = tokenizer.files
    template = "chat_template.jinja" in files or "chat_template" in files.get("tokenizer_config.json", "")
    return template and tokenizer.im_start_id is not None


def load(folder, args, runtime):
    """Open a checkpoint folder as a Player. Raises ValueError when tokenizer and model do not belong together."""
    facts = checkpoint.read_minillm(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    kind = ScalarHead if is_reward(folder) else Transformer
    adapter = lora.alone(folder)
    model = kind.from_pretrained(lora.base_of(adapter) if adapter else folder, device=runtime.device,
                                 dtype=torch.float64 if runtime.dtype == torch.float64 else torch.float32)
    if adapter:
        model = lora.Adapters.from_pretrained(model, adapter).merged()
    common.check_vocabulary(model.config, tokenizer, folder)
    # a short name where it is enough: two folders elsewhere may share their last part
    name = folder.name.removesuffix(".previous") if folder.parent == Path(args.save_dir) else str(folder)
    return Player(name, folder, facts, model, tokenizer, is_chat(facts, tokenizer, args.eval_mode), runtime)


def check_decoding(args):
    """ValueError where Player.tokens() would have to overlook a flag."""
    shaped = args.repetition_penalty != 1 or args.min_new_tokens
    if args.num_beams > 1 and (args.speculate or shaped):
        raise ValueError(f"--num_beams {args.num_beams} with --speculate, --repetition_penalty or --min_new_tokens; a "
                         "search goes by the model's own probabilities alone; leave the others out")
    if args.speculate and (args.temperature or shaped):
        raise ValueError(f"--speculate {args.speculate} with other choices than greedy ones; a guess is checked against"
                         " the most likely token; give --temperature 0, without --repetition_penalty and "
                         "--min_new_tokens")


def speed_up(player, args):
    """Give a player the decoder that --decoder asks for, and say what it is."""
    if args.decoder != "plain":
        narrow = player.runtime.dtype if player.runtime.dtype == torch.bfloat16 else None
        rows = min(args.batch_size, 64) if args.mode in ("batch", "compare") else 1
        print(accelerate(player.model, int8=args.decoder == "int8", dtype=narrow, rows=rows))


def speaker(args, runtime):
    """The Player for chat, single answers and batches; says which one it is and what it can do."""
    check_decoding(args)
    name = args.weight or os.path.join(args.save_dir, checkpoint.newest(args.save_dir))
    folder = checkpoint.find(args.save_dir, name)
    if is_reward(folder):
        raise ValueError(f"{folder} is a reward model; it scores answers and cannot give any; chat with another "
                         "--weight, or measure it with --mode score")
    player = load(folder, args, runtime)
    about = "the newest, " * (not args.weight) + f"stage {player.facts.get('stage', 'unknown')}"
    about += ", not finished" * (not player.facts.get("finished", True))
    print(f"model {folder} ({about}), {player.model.num_parameters() / 1e6:.2f}M parameters, context {player.context} "
          "tokens")
    speed_up(player, args)
    if not player.chat:
        # without this line users take a base model's continuation for a bad answer
        print("this is a base model: it only continues text, it does not answer (for answers: --weight sft)")
    return player


def players(args, runtime, judges=True):
    """The weights to measure, loaded one after another; reward models where judges are wanted. Of all that there are,
    one that cannot be opened is named and passed over; one that was asked for by name is an error."""
    every = checkpoint.names(args.save_dir) if args.weight in ("", "all") else []
    # of all, chosen() would end at the first damaged one
    return opened(every or checkpoint.chosen(args.save_dir, args.weight), bool(every), judges, args, runtime)


def opened(names, every, judges, args, runtime):
    """The loop of players(): names below --save_dir (every), or folders."""
    found = False
    for name in names:
        try:
            folder = checkpoint.find(args.save_dir, name) if every else name
            if is_reward(folder) and not judges:
                print(f"{folder} is a reward model: it scores answers and cannot give any")
                continue
            player = load(folder, args, runtime)
        except (OSError, ValueError) as error:
            if not every:
                raise
            print(error)
            continue
        found = True
        yield player
    if not found and not judges:
        raise ValueError(f"--weight {args.weight or 'all'}: none that can be opened but reward models; they score "
                         "answers and cannot give any; name another checkpoint")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Questions, and answers to many of them
def read_prompts(args):
    """(messages, "file:line") of every prompt in --prompts; an answer behind it (SFT rows) is taken off."""
    if not args.prompts:
        raise ValueError("--mode batch without prompts; it answers a file of them; give --prompts FILE")
    for path in expand_paths(args.prompts):
        if args.output and path.resolve() == Path(args.output).resolve():
            raise ValueError(f"--output {args.output} is a file of --prompts; the answers would replace the questions; "
                             "give another --output")
        text = path.name.removesuffix(".gz").endswith(".txt")
        for row, where in prompt_lines(path) if text else read_rows(path):
            messages, _ = question(row, where)
            if not messages:
                raise ValueError(f"{where}: found only an answer; expected a question; add a user turn")
            yield (messages if messages[0]["role"] == "system" else chat.opening(args) + messages), where


def prompt_lines(path):
    """Rows of a text file with a prompt a line; read_rows() takes such a file for documents between blank lines."""
    return (({"prompt": line.strip()}, where) for line, where in text_lines(path) if line.strip())


def answers(player, items, args, temperature, first_seed=0, top_p=1.0):
    """metrics.complete over items, in their order; each item has its own random numbers, the same for every player."""
    # a question too long for the model loses its beginning: it will be answered wrongly, and that is the truth
    room = max(1, player.context - metrics.ANSWER_TOKENS)
    prompts = [player.ids(item["messages"])[-room:] for item in items]
    with player.runtime.autocast():
        return metrics.complete(player.model, player.tokenizer, prompts, metrics.ANSWER_TOKENS,
                                batch_size=args.batch_size, temperature=temperature, top_p=top_p, seed=args.seed,
                                row_seeds=range(first_seed, first_seed + len(items)), stop_ids=player.stop_ids)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Scores. Each function takes a Player and held-out items and returns a dict with n and standard_error.
def held_out(args, wanted=tuple(CAPS)):
    """{set: items} of the wanted held-out files in --data_dir; what is missing is said and empty.

    Items: pretrain rows as they are; else dicts of messages (up to the question), answer, check, lang, skill.
    """
    sets = {}
    for name in wanted:
        path = Path(args.data_dir) / f"{name}.heldout.jsonl"
        sets[name] = []
        if not path.is_file():
            print(f"{path} not found: the scores that need it are left out")
            continue
        for row, where in islice(read_rows(path), CAPS[name] if args.limit < 0 else args.limit or None):
            sets[name].append(row if name == "pretrain" else heldout_item(row, where))
    if not any(sets.values()):
        raise FileNotFoundError(f"no held-out data in {args.data_dir}/ (looked from {Path.cwd()}); scores need "
                                f"{{{','.join(wanted)}}}.heldout.jsonl; write them with make_data.py, or give "
                                "--data_dir")
    return sets


def heldout_item(row, where):
    """One held-out row as an item."""
    return {"messages": question(row, where)[0], "where": where, "answer": row.get("answer"), "check": row.get("check"),
            **{key: str(row[key]) for key in ("lang", "skill") if row.get(key)}}


def read_styles(args):
    """The markers of the preferred style, which make_data.py writes; None without them, which is said."""
    path = Path(args.data_dir) / "styles.json"
    if path.is_file():
        return metrics.read_styles(path)
    print(f"{path} not found: without it polite and impolite cannot be told apart, no style and no win rate by rule")
    return None


def score_bits(player, rows, args):
    """Bits per byte of documents {"text", "lang"}, by language and in total, and the perplexity of a token."""
    # beyond the length it was trained with a model guesses; 2048 keeps the logits of a large vocabulary in memory
    trained = player.facts.get("args", {}).get("max_seq_len")
    trained = trained if isinstance(trained, int) else 2048
    width = max(2, min(args.max_seq_len or trained, player.context))
    texts = defaultdict(list)
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"found a row with the keys [{', '.join(row)}]; bits per byte need text, a string; write "
                             'every row as {"text": "..."}')
        if row["text"]:
            texts[str(row.get("lang") or "all")].append(row["text"])
    if not texts:
        raise ValueError(f"{len(rows)} rows without any text; bits per byte need a byte; give other files")
    by_lang, every, variance = {}, [], 0.0
    for lang, group in sorted(texts.items()):
        parts = [metrics.heldout_loss(
            player.model, metrics.text_batches(player.tokenizer, group[i:i + 8], width, player.model.config.vocab_size),
            player.runtime.device, player.runtime.autocast) for i in range(0, len(group), 8)]
        sizes = [part["bytes"] for part in parts]
        rate, error = tasks.ratio([part["nll"] / math.log(2) for part in parts], sizes)
        by_lang[lang] = {"bits_per_byte": rate, "standard_error": error, "bytes": sum(sizes)}
        # languages apart: their rates differ, and that difference is no error
        every, variance = every + parts, variance + (error * sum(sizes)) ** 2
    nll, tokens, size = (sum(part[name] for part in every) for name in ("nll", "tokens", "bytes"))
    bits = nll / math.log(2)
    return {"bits_per_byte": bits / size, "standard_error": math.sqrt(variance) / size,
            "perplexity": tasks.power(bits / tokens), "n": len(rows), "bytes": size, "by_lang": by_lang}


def score_questions(player, items, args):
    """Greedy exact match by skill and language, stop rate, loops; identity and small talk apart."""
    completions = answers(player, items, args, temperature=0.0)
    result = metrics.exact_match(completions, items)
    total = result.pop("total")
    return {"exact_match": total, "standard_error": metrics.standard_error(total, result["n"]), **result,
            "loop_rate": metrics.loop_rate(completions)}


def score_preferences(player, items, args, played):
    """Share of polite answers, and of prompts on which the rule prefers this answer to the parent's.

    played: {folder: answers} of the players so far, so that a parent answers once; one that cannot be opened is named
    and takes the win rate with it. None without styles.json.
    """
    styles = read_styles(args)
    if styles is None:
        return None
    own = played[player.folder.resolve()] = answers(player, items, args, temperature=1.0)
    polite = metrics.share([metrics.style(answer.text, styles) == "polite" for answer in own])
    result = {"polite": polite, "standard_error": metrics.standard_error(polite, len(own)), "n": len(own),
              "exact_match": metrics.exact_match(own, items)["total"], "loop_rate": metrics.loop_rate(own)}
    parent = checkpoint.chat_parent(player.facts, args.save_dir)
    if parent and parent.resolve() not in played:
        try:
            other = load(checkpoint.find(args.save_dir, parent), args, player.runtime)
        except (OSError, ValueError) as error:
            print(f"{player.name} has no win rate: {error}")
            return result
        played[parent.resolve()] = answers(other, items, args, temperature=1.0)
    if parent:
        scores = [[metrics.rule_score(answer.text, item["answer"], item["check"], styles)
                   for answer, item in zip(side, items, strict=True)] for side in (own, played[parent.resolve()])]
        rate, error = metrics.win_rate(*scores)
        result |= {"win_rate": rate, "win_rate_error": error, "against": parent.name}
    return result


def score_samples(player, items, args):
    """pass@k: chance of a right answer among k drawn at temperature 1; pass@1 by skill and language as well."""
    draws = [answers(player, items, args, temperature=1.0, first_seed=n * len(items)) for n in range(args.pass_k)]
    result = metrics.exact_match([c for draw in draws for c in draw], list(items) * args.pass_k)
    total = result.pop("total")
    right = [[metrics.check_answer(item["check"], item["answer"], c.text) for c in of_item]
             for item, *of_item in zip(items, *draws, strict=True) if metrics.in_total(item)]
    rates = metrics.pass_rates(right, args.pass_k)
    return {**result, **rates, "pass_at_1": total, "n": result["n"] // args.pass_k, "samples": args.pass_k,
            "standard_error": rates["pass_at_k_error"]["1"]}


def score_pairs(player, count, args):
    """Pair accuracy of a reward model by kind of error, over the first `count` held-out pairs."""
    path = Path(args.data_dir) / "preference.heldout.jsonl"
    data = PreferenceData(path, player.tokenizer, player.context, cache_dir=Path(args.save_dir) / "cache")
    return metrics.score_pairs(player.model, data, min(count, len(data)), player.runtime, args.batch_size)


def groups(player, sets, args, played):
    """(name, function) of every group of scores that this checkpoint can have."""
    if isinstance(player.model, ScalarHead):
        if sets["preference"]:
            yield "pair_accuracy", lambda: score_pairs(player, len(sets["preference"]), args)
        return
    if sets["pretrain"]:
        yield "bits_per_byte", lambda: score_bits(player, sets["pretrain"], args)
    if sets["sft"]:
        yield "exact_match", lambda: score_questions(player, sets["sft"], args)
    # a base model has no style to prefer, and long answers: its samples would cost the most and say nothing
    if sets["preference"] and player.chat:
        yield "preference", lambda: score_preferences(player, sets["preference"], args, played)
    if sets["rl"] and player.chat:
        yield "pass_at_1", lambda: score_samples(player, sets["rl"], args)


def score(args, runtime):
    """Measure all weights on held-out data and print the table. Returns {"results": rows}."""
    measured = players(args, runtime)
    if args.bpb:
        documents = [row for row, _ in islice(read_rows(args.bpb), args.limit if args.limit > 0 else None)]
        sets = dict.fromkeys(CAPS, ()) | {"pretrain": documents}
    else:
        sets = held_out(args)
    rows, played = [], {}
    for player in measured:
        if not player.facts.get("finished", True):
            print(f"{player.folder} is not finished: step {player.facts.get('progress', {}).get('step')}")
        for group, function in groups(player, sets, args, played):
            start = time.perf_counter()
            result = function()
            if result is None:  # nothing to measure it with, as was said
                continue
            rows.append(row_of(player, group + ":files" * bool(args.bpb), result, args, start))
            keep(rows[-1:], args)
            print(f"{player.name} {group.replace('_', ' ')}: {result['n']} items, {rows[-1]['seconds']:.1f} s",
                  flush=True)
    if not rows:
        raise ValueError(f"nothing was measured of --weight {args.weight or 'all'}; reward models need preferences, "
                         "others texts or questions; give other weights, or files with rows in them")
    show(*results.held_out(rows))
    return {"results": rows}


def row_of(player, group, numbers, args, start):
    """A row of eval_results.jsonl: the numbers of a measurement that began at `start`, and what they depend on besides
    the model."""
    return {"weight": player.name, "group": group, "folder": str(player.folder), "checkpoint": player.weights_hash,
            "key": player.facts.get("key"), "stage": player.facts.get("stage"),
            "step": player.facts.get("progress", {}).get("step"), "seed": args.seed, "limit": args.limit,
            "data": args.bpb or args.data_dir, "device": player.runtime.device.type,
            "dtype": str(player.runtime.dtype)[6:], "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "format": checkpoint.FORMAT_VERSION},
            **numbers, "seconds": round(time.perf_counter() - start, 2)}


def keep(rows, args):
    """Put new rows into eval_results.jsonl: at once, for what comes next may take hours."""
    results.write(Path(args.save_dir) / "eval_results.jsonl", rows)


def show(tables, lines):
    """Print what a function of results.py has made."""
    for title, header, rows in tables:
        print(f"\n{title}\n{logs.table(header, rows)}")
    print("".join(f"\n{line}\n" for line in lines), end="")


# ----------------------------------------------------------------------------------------------------------------------
# 4. Benchmarks (tasks.py)
def asked_tasks(args):
    """Names of the benchmarks in --tasks. Raises ValueError for a flag that would be overlooked."""
    names = list(tasks.TASKS) if args.tasks == "all" else [name.strip() for name in args.tasks.split(",")]
    unknown = [name for name in names if name not in tasks.TASKS]
    if unknown:
        raise ValueError(f"--tasks {', '.join(unknown)}; there are: {', '.join(tasks.TASKS)}; correct the name")
    if args.pass_k > 1 and not any(tasks.TASKS[name].kind == "generate" for name in names):
        raise ValueError(f"--pass_k {args.pass_k} with --tasks {args.tasks}; only answers in writing can be drawn; add "
                         "gsm8k, or leave --pass_k out")
    if args.pass_k > 1 and not args.temperature:
        raise ValueError(f"--pass_k {args.pass_k} with --temperature 0; all answers would be the same; give a higher "
                         "--temperature, or leave it out")
    overlooked = [f"--{name} {getattr(args, name)}" for name, off in (
        ("min_p", 0), ("repetition_penalty", 1), ("min_new_tokens", 0), ("num_beams", 1), ("speculate", 0))
        if getattr(args, name) != off]
    if overlooked:
        raise ValueError(f"{', '.join(overlooked)} with --tasks; answers there are the likeliest ones, or drawn with "
                         "--temperature, --top_k and --top_p alone; leave the others out")
    return names


def score_tasks(args, runtime):
    """Measure all weights on --tasks and print the table. Returns {"results": rows}."""
    names = asked_tasks(args)
    rows = []
    for player in players(args, runtime, judges=False):
        for name in names:
            try:
                items, source = tasks.load(name, args.task_dir, max(0, args.limit), args.few_shot)
            except FileNotFoundError as error:
                if args.tasks != "all":
                    raise
                print(f"{name} is left out: {str(error).split(';')[0]}")
                continue
            print(f"{player.name} {name}: {len(items)} items of {source}", flush=True)
            start = time.perf_counter()
            outcomes, drawn = task_outcomes(player, name, items, args)
            result = tasks.score(name, items, outcomes) | drawn_rates(name, items, drawn, args)
            metric = tasks.TASKS[name].metrics[0]
            score, error = result["scores"][metric], records.finite(result["errors"][metric])
            facts = {"task": name, "metric": metric, "score": score, "standard_error": error, **result, "data": source,
                     "verdict": tasks.verdict(score, error, result["chance"], result["majority"], result["n"]),
                     "few_shot": tasks.shots(tasks.TASKS[name], args.few_shot)}
            rows.append(row_of(player, f"task:{name}", facts, args, start))
            keep(rows[-1:], args)
    if not rows:
        raise FileNotFoundError(f"no file of any benchmark in --task_dir {args.task_dir}; their published rows are "
                                f"read; fetch them with: python prepare_data.py download eval --output {args.task_dir}")
    show(*results.benchmarks(rows))
    return {"results": rows}


def drawn_rates(name, items, drawn, args):
    """pass@k of a benchmark by each of its metrics, from the texts drawn for every item; {} without any."""
    if not drawn:
        return {}
    task = tasks.TASKS[name]
    judged = [[tasks.judge(task, item, text) for text in texts] for item, texts in zip(items, drawn, strict=True)]
    rates = {metric: metrics.pass_rates([[bool(values[metric]) for values in row] for row in judged], args.pass_k)
             for metric in task.metrics}
    return {"drawn": {"samples": args.pass_k, "temperature": args.temperature, "top_p": args.top_p, "rates": rates}}


def task_outcomes(player, name, items, args):
    """What tasks.score() wants of every item, and with --pass_k above 1 the texts drawn for each where answers are in
    writing, else []. What is known is on the disk at once, so that an interrupted run goes on where it was."""
    task, model, tok, turns = tasks.TASKS[name], player.model, player.tokenizer, 0
    facts = [player.weights_hash, str(player.runtime.dtype), tok.fingerprint, items]
    if task.kind == "generate":
        turns = args.pass_k if args.pass_k > 1 else 0
        facts += [args.temperature, args.top_k, args.top_p, args.seed] * bool(turns)
        room = max(1, player.context - tasks.ANSWER_TOKENS)
        prompts = [tok.encode(item.contexts[0])[-room:] for item in items]
        groups = list(enumerate(prompts)) * (1 + turns)  # the greedy answers, then the drawn ones in turns
    else:
        groups = tasks.requests(task, items, tok, player.context)
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = Path(args.save_dir) / "eval_partial" / f"{name}-{key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {n: result for n, result in tasks.read_partial(path).items() if n < len(groups)}
    todo = [n for n in range(len(groups)) if n not in known]
    if known:
        print(f"{len(known)} of {len(groups)} are known from an interrupted run ({path})")
    if task.kind == "generate":
        found = written_answers(player, [(n, groups[n][1]) for n in todo], len(items), args)
    else:
        found = metrics.sequence_scores(model, [groups[n][1] for n in todo], args.batch_size, pad_id=tok.pad_id,
                                        autocast=player.runtime.autocast)
    with (open(path, "a", encoding="utf-8", buffering=1) as file,
          logs.progress(len(groups), name, len(known), unit="item") as bar):
        for place, result in found:
            known[todo[place]] = result
            file.write(json.dumps([todo[place], result]) + "\n")
            bar.update()
    path.unlink(missing_ok=True)  # the same evaluation may have run twice at once
    ordered = [known[n] for n in range(len(groups))]
    if task.kind == "generate":
        greedy, *turns = (ordered[first:first + len(items)] for first in range(0, len(ordered), len(items)))
        return greedy, list(zip(*turns, strict=True))
    outcomes = [[] for _ in items]
    for (i, _), result in zip(groups, ordered, strict=True):
        outcomes[i] += result  # the windows of a page add up; everything else is one group an item
    return outcomes, []


def written_answers(player, prompts, count, args):
    """(place, text up to a stop) of the answers to [(number, ids)]: the most likely ones to numbers below `count`,
    others drawn, each with random numbers of its own."""
    tok = player.tokenizer
    for drawn in (False, True):
        places = [place for place, (number, _) in enumerate(prompts) if (number >= count) == drawn]
        for batch in (places[i:i + args.batch_size] for i in range(0, len(places), args.batch_size)):
            numbers, ids = zip(*(prompts[place] for place in batch), strict=True)
            with player.runtime.autocast():
                found = metrics.complete(player.model, tok, ids, tasks.ANSWER_TOKENS, args.batch_size,
                                         args.temperature * drawn, args.seed, numbers, tok.stop_ids(chat=True),
                                         args.top_k, args.top_p)
            for place, completion in zip(batch, found, strict=True):
                yield place, tasks.cut(tok.decode(completion.ids, skip_special=True))


# ----------------------------------------------------------------------------------------------------------------------
# 5. References, fixed prompts, one checkpoint against another
def score_references(args, runtime):
    """BLEU, chrF and ROUGE-L of greedy answers to the questions in --references. Returns {"results": rows}."""
    if not args.references:
        raise ValueError("--mode references without a file; it holds questions and their answers; give --references "
                         "FILE")
    metrics.text_libraries()  # what is not installed is said before hours of answering
    items, wanted = [], []
    for row, where in islice(read_rows(args.references), args.limit if args.limit > 0 else None):
        messages, text = question(row, where)
        text = row.get("reference", row.get("answer")) if text is None else text
        if not isinstance(text, str) or not messages:
            raise ValueError(f"{where}: no reference; each question needs one answer to compare with; write prompt and "
                             "reference, or a conversation that ends with the assistant")
        items.append({"messages": messages})
        wanted.append(text)
    if not items:
        raise ValueError(f"{args.references} has no rows; there is nothing to compare with; give another file")
    rows = []
    for player in players(args, runtime, judges=False):
        start = time.perf_counter()
        scores = metrics.text_scores([c.text for c in answers(player, items, args, temperature=0.0)], wanted)
        rows.append(row_of(player, "references", scores | {"n": len(items), "data": args.references}, args, start))
        keep(rows[-1:], args)
    print(f"\n{len(items)} answers beside their references, 0 to 100")
    print(logs.table(["weight", "BLEU", "chrF", "ROUGE-L"], [
        [row["weight"], *(f"{row[name]:.2f}" for name in ("bleu", "chrf", "rouge_l"))] for row in rows]))
    return {"results": rows}


def score_regression(args, runtime):
    """The suite of fixed prompts: share passed, and the first failures. Returns {"results": rows}."""
    items, rows = metrics.fixed_prompts(read_rows(args.regression_path)), []
    for player in players(args, runtime, judges=False):
        start = time.perf_counter()
        prompts = [player.ids(item["messages"]) for item in items]
        rate, failures = metrics.run_regression(player.model, player.tokenizer, items, runtime, prompts,
                                                player.stop_ids, args.batch_size)
        found = {"pass_rate": rate, "standard_error": metrics.standard_error(rate, len(items)), "n": len(items),
                 "failed": [item["prompt"] for item, _, _ in failures], "data": args.regression_path}
        rows.append(row_of(player, "regression", found, args, start))
        keep(rows[-1:], args)
        print(f"\n{player.name}: {len(items) - len(failures)} of {len(items)} fixed prompts passed ({rate:.3f})")
        for line in metrics.failure_lines(failures, 5):
            print(f"  {line}")
    return {"results": rows}


def compare(args, runtime):
    """Answers of several checkpoints side by side, and how often the first wins against each other one. Returns
    {"answers": {name: texts}, "results": rows}."""
    names, folders, judge = contestants(args)
    if args.prompts:
        items, styles = [{"messages": messages, "where": where} for messages, where in read_prompts(args)], None
    else:
        items, styles = held_out(args, ["preference"])["preference"], read_styles(args)
    texts, start, first = [], time.perf_counter(), None
    for folder in folders:
        player = load(folder, args, runtime)
        speed_up(player, args)
        first = first or player
        fitted = chat.fit_all(player, [(item["messages"], item["where"]) for item in items], args.max_new_tokens)
        found = chat.decode_rows(player, [prompt for prompt, _, _ in fitted], args, range(len(items)))
        texts.append([chat.row_answer(player, ids, args)["answer"] for ids in found])
    rows = []
    for by, sides in judged(texts, items, styles, judge, args, runtime).items():
        for name, scores in zip(names[1:], sides[1:], strict=True):
            rate, error = metrics.win_rate(sides[0], scores)
            facts = {"win_rate": rate, "standard_error": error, "n": len(items), "data": args.prompts or args.data_dir}
            rows.append(row_of(first, f"against {name} by {by}", facts, args, start) | {"weight": names[0]})
            print(f"{names[0]} against {name}, judged by the {by}: won {rate:.3f} ({error:.3f}) of {len(items)}, ties "
                  "count half")
    keep(rows, args)
    asked = [item["messages"][-1]["content"] for item in items]
    table = results.markdown(["prompt", *names], zip(asked, *texts, strict=True))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(table, encoding="utf-8", errors="replace")
    print(f"{len(items)} prompts side by side in {args.output}" if args.output else table)
    return {"answers": dict(zip(names, texts, strict=True)), "results": rows}


def contestants(args):
    """(names, their folders, folder of the judge or None) of --compare, all looked up before any of them answers."""
    check_decoding(args)
    names = [name.strip() for name in args.compare.split(",") if name.strip()]
    if not names:
        raise ValueError("--mode compare without names; it puts the answers of checkpoints side by side; give "
                         "--compare NAME,NAME")
    folders = [checkpoint.find(args.save_dir, name) for name in names]
    mute = [name for name, folder in zip(names, folders, strict=True) if is_reward(folder)]
    if mute:
        raise ValueError(f"--compare {mute[0]} is a reward model; it gives no answers; name it in --judge")
    judge = checkpoint.find(args.save_dir, args.judge) if args.judge else None
    if judge and not is_reward(judge):
        raise ValueError(f"--judge {args.judge} is no reward model; it must score answers; train one with "
                         "train_reward.py")
    return names, folders, judge


def judged(texts, items, styles, judge, args, runtime):
    """{judge: scores of each list of texts}: the rule where there are styles, the reward model in folder `judge`."""
    scores = {}
    if styles:
        scores["rule"] = [[metrics.rule_score(text, item["answer"], item["check"], styles)
                           for text, item in zip(side, items, strict=True)] for side in texts]
    if judge:
        reader, asked = load(judge, args, runtime), [item["messages"] for item in items]
        scores["reward model"] = [metrics.reward_scores(reader.model, reader.tokenizer, asked, side, args.batch_size,
                                                        runtime.autocast) for side in texts]
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# 6. Summary, samples, report
def summary(args):
    """Print the last scores of all weights again, and last what every stage changed."""
    path = Path(args.save_dir) / "eval_results.jsonl"
    rows = [row for row in results.read(path) if not row["group"].endswith(":files")]
    if not rows:
        raise FileNotFoundError(f"no scores in {path}; a summary repeats them; make them: python eval.py "
                                "--mode score")
    rows.sort(key=lambda row: checkpoint.stage_order(row["weight"]))
    show(*results.held_out(rows))
    show(*results.benchmarks(rows))
    show(*results.others(rows))
    for name, text in report.outdated(report.read_stages(args.save_dir), rows, {}):
        print(f"\n{name}: {text}")
    header = ["stage", "metric", "before", "after", "seconds", "where"]
    print("\n" + logs.table(header, checkpoint.stage_rows(args.save_dir)))
    return {"results": rows}


def show_samples(player, args):
    """Print fixed held-out conversations, one a kind and language, with --samples answers each."""
    found = defaultdict(list)
    for row, where in read_rows(Path(args.data_dir) / "sft.heldout.jsonl"):
        item = heldout_item(row, where)
        kind = next((kind for kind, skills in SAMPLE_KINDS.items() if item.get("skill") in skills), None)
        if kind:
            found[kind, item.get("lang")].append(item)
    order = list(SAMPLE_KINDS)
    items = {key: random.Random(f"{args.seed} {key}").choice(found[key])
             for key in sorted(found, key=lambda key: (order.index(key[0]), str(key[1])))}
    # the first answer shows what the model holds for most likely, the others how sure it is of it
    rounds = [answers(player, list(items.values()), args, temperature=args.temperature if n else 0.0,
                      first_seed=n * len(items), top_p=args.top_p) for n in range(max(1, args.samples))]
    print(f"\nsamples of {player.folder}: first the greedy answer, then others at temperature {args.temperature}")
    shown = []
    for i, ((kind, lang), item) in enumerate(items.items()):
        texts = [completions[i].text for completions in rounds]
        print(f"\n[{kind}, {lang}]" + f" expected: {item['answer']}" * bool(item["check"]))
        for message in item["messages"]:
            print(f"{message['role']}: {message['content']}")
        for text in texts:
            print(f"{player.name}> {text}", flush=True)
        shown.append({"kind": kind, "lang": lang, "messages": item["messages"], "answers": texts,
                      "expected": item["answer"] if item["check"] else ""})
    return {"weight": str(player.folder), "samples": shown}


def write_report(args, runtime):
    """Write the report of --report, for which every checkpoint there answers the same held-out questions. Returns
    {"report": path of the page}."""
    args = copy.copy(args)
    args.save_dir, args.samples = args.report, 0
    out = Path(args.report)
    if not out.is_dir():
        raise FileNotFoundError(f"--report {out} is no folder (looked from {Path.cwd()}); a report is made of what the "
                                "training scripts left; give their --save_dir")
    # a folder's own questions first: the smoke test has other ones than the default run
    places = [place for place in (out / "data", Path(args.data_dir)) if (place / "sft.heldout.jsonl").is_file()]
    found, samples, written = None, [], {}
    for name in checkpoint.names(out) if places else ():
        try:
            folder = checkpoint.find(out, out / name)
            if is_reward(folder):
                continue
            player = load(folder, args, runtime)
        except (OSError, ValueError) as error:
            print(error)  # damaged, or its base is gone: named, and the others still answer
            continue
        args.data_dir = places[0]
        print(f"report: {player.name} answers", flush=True)
        with contextlib.redirect_stdout(None):  # they are to be read on the page
            answered = show_samples(player, args)["samples"]
        samples = samples or [sample | {"answers": {}} for sample in answered]
        for sample, own in zip(samples, answered, strict=True):
            sample["answers"][player.name] = own["answers"][0]
        written[player.name] = player.facts.get("written", "")
        found = {"seed": args.seed, "samples": samples, "checkpoints": written,
                 "compression": compression(player.tokenizer, args.data_dir)}
    page = report.write(out, found)[0]
    print(f"report: {page}")
    return {"report": str(page)}


def compression(tokenizer, data_dir):
    """{language: UTF-8 bytes per token} of held-out pretraining text, {} where there is none."""
    path, texts = Path(data_dir) / "pretrain.heldout.jsonl", defaultdict(list)
    for row, _ in islice(read_rows(path), CAPS["pretrain"]) if path.is_file() else ():
        texts[str(row.get("lang") or "all")].append(str(row.get("text") or ""))
    rates = {lang: bytes_per_token(tokenizer, texts[lang]) for lang in sorted(texts)}
    return {lang: rate for lang, rate in rates.items() if math.isfinite(rate)}


def main(args):
    """Do what --mode says. Returns its facts as a dict."""
    with contextlib.suppress(AttributeError):
        sys.stdin.reconfigure(errors="replace")  # half a character typed must not end a conversation
    args.stop = [stop for stop in args.stop if stop]
    if args.mode == "batch" and args.prompts:
        expand_paths(args.prompts)  # a wrong path is named before a model is opened
    if args.mode == "summary":
        return summary(args) | (write_report(args, common.setup(args)) if args.report else {})
    # answers on standard output are for another program to read: nothing else may stand between them
    aside = sys.stderr if args.mode == "batch" and not args.output else sys.stdout
    with contextlib.redirect_stdout(aside):
        runtime = common.setup(args)
        measures = {"score": score, "tasks": score_tasks, "references": score_references,
                    "regression": score_regression, "compare": compare}
        player = speaker(args, runtime) if args.mode not in ("report", *measures) else None
    result = measures[args.mode](args, runtime) if args.mode in measures else {}
    if args.mode == "score" and args.samples:
        names = [row["weight"] for row in result["results"] if row["group"] == "exact_match"]
        folders = {row["weight"]: Path(row["folder"]) for row in result["results"]}
        result |= show_samples(load(folders[names[-1]], args, runtime), args) if names else {}
    if player:
        talk = {"chat": chat.converse, "single": chat.single, "samples": show_samples,
                "batch": lambda player, args: chat.batch(player, args, read_prompts(args))}
        result = talk[args.mode](player, args)
    with contextlib.redirect_stdout(aside):
        return result | write_report(args, runtime) if args.report else result


if __name__ == "__main__":
    common.run(main, parse_args)
