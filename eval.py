"""Talk to a checkpoint, or measure it: chat, single answers, files of prompts, and one table of scores over all stages.

What is measured, always on held-out data and with a standard error:
    bits per byte    = - sum_t log2 p(x_t | x_<t) / UTF-8 bytes of the text: unlike a loss it compares tokenizers
    exact match      = share of right greedy answers, by skill and language; identity and small talk are held out by
                       wording only and reported apart. Beside it: answers that stop by themselves, and that loop
    polite, win rate = answers sampled at temperature 1: share in the preferred style; won against the parent's answer
                       to the same prompt, by a rule (right and polite), ties count half
    pass@k           = chance of a right answer among k sampled ones, to the prompts of reinforcement learning or of a
                       benchmark; pass@1 is the share of right ones
    pair accuracy    = of a reward model, by kind of error
What is here: the loops and the formatting. What is not: the judges (metrics.py), decoding (model.py, generation.py).

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

Letters: B rows, T tokens, V vocabulary.
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
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch

import checkpoint
import cli
import common
import logs
import lora
import metrics
import report
import tasks
from dataset import PreferenceData, conversation, expand_paths, pad_rows, preference, read_rows
from generation import accelerate, beam_search, lookup_decoding
from model import Prefix, ScalarHead, Transformer, read_json, token_logprobs
from tokenizer import StreamDecoder, Tokenizer

SPEAKERS = ("pretrain", "sft", "dpo", "ppo", "grpo")  # stages to talk to, in the order in which run.sh makes them
STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")
# Items per set when --limit is not given: standard errors of one to three points, and about ten seconds for a model of
# 6M parameters on two CPU cores. The win rate needs the most: it compares two noisy answers.
CAPS = {"pretrain": 240, "sft": 300, "preference": 400, "rl": 200}
GROUPS = ("bits_per_byte", "exact_match", "preference", "pass_at_1", "pair_accuracy")  # of --mode score
SCORE_TOKENS = 64  # longest answer in scores, as in the training scripts' evaluations
SAMPLE_KINDS = {"story": ("story",), "arithmetic": ("add", "subtract"), "translation": ("translate",),
                "small talk": ("chat",), "several turns": ("dialogue",)}
# What a flag asks for when --mode is left out; the first that is given decides
MODES = {"compare": "compare", "batch": "prompts", "tasks": "tasks", "references": "references",
         "regression": "regression", "score": "bpb", "samples": "samples", "report": "report"}
HELP = "/reset forget the conversation, /system TEXT set the system message (no text: remove it), /exit leave, /help"


def parse_args(argv=None):
    """Flags; without --mode the others decide: --prompt, those of MODES, else chat."""
    at_least_0 = cli.positive(float, zero=True)
    count = cli.positive(int, zero=True)
    parser = cli.Parser(__doc__)
    g = parser.add_argument_group("what")
    g.add_argument("--mode", default="", choices=("chat", "single", *MODES, "summary"),
                   help="what to do; left out, the other flags decide: chat, or single with --prompt, batch with "
                        "--prompts, score with --bpb, and others as their flag is named. summary prints the last "
                        "scores again")
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
                   help="0 = always the most likely token (default: 0.7, in --tasks with --pass_k 1)")
    g.add_argument("--top_k", type=count, default=0, help="draw from the k most likely tokens, 0 = from all")
    g.add_argument("--top_p", type=at_least_0,
                   help="draw from the fewest tokens with this probability (default: 0.9, in --tasks with --pass_k 1)")
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
                   help="fast: a copy of the weights that a CPU decodes from sooner, if it does; int8: a copy in 8 "
                        "bits; plain: the model itself, which needs half the memory. Scores use the model itself")
    g.add_argument("--stop", nargs="+", default=[], help="strings that end an answer; they are not shown")
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
                   help="answers shown to each of ten fixed held-out questions: one greedy, the others drawn; with "
                        "scores: by the last of the weights")
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
    g.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), or a torch device such as cuda:1")
    g.add_argument("--dtype", default="auto", choices=["auto", *common.DTYPES, *common.SHORT_DTYPES],
                   help="autocast dtype; float64 turns autocast off")
    g.add_argument("--threads", type=count, default=0, help="CPU threads, 0 = all cores")
    g.add_argument("--seed", type=int, default=42, help="seed of all draws")
    cli.switch(g, "--debug", 0, "show the traceback of an error")
    args = parser.parse_args(argv)
    if not args.mode:
        # what is given says what is wanted: nobody types a prompt to start a chat
        asked = {"single": args.prompt, **{mode: getattr(args, flag) for mode, flag in MODES.items()}}
        args.mode = next((mode for mode, value in asked.items() if value), "chat")
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

    @functools.cached_property
    def weights_hash(self):
        """What tells two checkpoints apart wherever they lie: a hash of the weight files' hashes."""
        parts = [checkpoint.file_hash(path) for path in sorted(self.folder.glob("*.safetensors"))]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def ids(self, messages):
        """Prompt ids of a conversation, by the render() that made the training data; a base model reads only the last
        text."""
        if self.chat:
            return self.tokenizer.render(messages, add_generation_prompt=True)[0]
        # every document it was trained on began with bos
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return start + self.tokenizer.encode(messages[-1]["content"])


def newest(save_dir):
    """Name of the stage finished last among those that speak; the later stage where two share a second.

    Raises FileNotFoundError with what to do when there is none.
    """
    finished = []
    for place, name in enumerate(SPEAKERS):
        try:
            # with the folder in front: a folder of that name in the working directory is something else
            facts = checkpoint.read_minillm(checkpoint.find(save_dir, os.path.join(save_dir, name)))
        except FileNotFoundError:
            continue
        except ValueError as error:
            print(error)  # damaged: named, and the others are still there to talk to
            continue
        if facts.get("finished"):
            # not simply the last stage: who has just trained sft again wants to talk to that
            finished.append((facts.get("written", ""), place, name))
    if not finished:
        raise FileNotFoundError(f"no finished checkpoint in {save_dir}/ (looked for {', '.join(SPEAKERS)}); chatting "
                                "needs one; train with: bash run.sh, or name another one with --weight")
    return max(finished)[2]


def folders_to_score(args):
    """Folders named by --weight, or all below --save_dir: the stages in their order, then everything else."""
    if args.weight not in ("", "all"):
        return [checkpoint.find(args.save_dir, name.strip()) for name in args.weight.split(",") if name.strip()]
    names = {p.parent.name for p in Path(args.save_dir).glob("*/config.json")}
    # a stage whose swap was interrupted is there under its earlier name only; find_checkpoint knows
    names = {name.removesuffix(".previous") for name in names if not name.endswith(".tmp")}
    if not names:
        raise FileNotFoundError(f"no checkpoint in {args.save_dir}/; scores need one; train with: bash run.sh, or give "
                                "a folder with --weight")
    return [checkpoint.find(args.save_dir, os.path.join(args.save_dir, name))
            for name in sorted(names, key=stage_order)]


def stage_order(name):
    """Sort key: the stages as run.sh makes them, then everything else by name."""
    return STAGES.index(name) if name in STAGES else len(STAGES), name


def is_reward(folder):
    """Whether a folder holds a model that scores answers and cannot give any."""
    # the class in config.json, not our own stage: a folder from elsewhere has only that
    names = read_json(Path(folder) / "config.json").get("architectures")
    return isinstance(names, list) and any("SequenceClassification" in str(name) for name in names)


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
    if model.config.vocab_size <= tokenizer.max_id:
        raise ValueError(f"token id {tokenizer.max_id} >= vocabulary {model.config.vocab_size} in {folder}; tokenizer "
                         "and model do not match; use the tokenizer saved with the model")
    # a short name where it is enough: two folders elsewhere may share their last part
    name = folder.name.removesuffix(".previous") if folder.parent == Path(args.save_dir) else str(folder)
    return Player(name, folder, facts, model, tokenizer, is_chat(facts, tokenizer, args.eval_mode), runtime)


def speaker(args, runtime):
    """The Player for chat, single answers and batches; says which one it is and what it can do."""
    folder = checkpoint.find(args.save_dir, args.weight or os.path.join(args.save_dir, newest(args.save_dir)))
    if is_reward(folder):
        raise ValueError(f"{folder} is a reward model; it scores answers and cannot give any; chat with another "
                         "--weight, or measure it with --mode score")
    player = load(folder, args, runtime)
    about = "the newest, " * (not args.weight) + f"stage {player.facts.get('stage', 'unknown')}"
    about += ", not finished" * (not player.facts.get("finished", True))
    print(f"model {folder} ({about}), {player.model.num_parameters() / 1e6:.2f}M parameters, context {player.context} "
          "tokens")
    if args.decoder != "plain":
        narrow = runtime.dtype if runtime.dtype == torch.bfloat16 else None
        print(accelerate(player.model, int8=args.decoder == "int8", dtype=narrow))
    if not player.chat:
        # without this line users take a base model's continuation for a bad answer
        print("this is a base model: it only continues text, it does not answer (for answers: --weight sft)")
    return player


# ----------------------------------------------------------------------------------------------------------------------
# 2. One answer
@dataclass
class Answer:
    """What came of a prompt: text without stop token and stop string; how it ended; what it cost."""

    text: str = ""
    ids: list = field(default_factory=list)
    ended: bool = False  # by itself or by a stop string, not by a limit
    interrupted: bool = False
    seconds: float = 0.0
    counts: dict = field(default_factory=dict)  # of guessed tokens, see generation.lookup_decoding


def until_stop(pieces, stops):
    """Pass pieces of text on until a stop string is complete; whatever may be the beginning of one waits.

    Yields (text, whether a stop string ended it).
    """
    tail = ""
    for piece in pieces:
        tail += piece
        cut = min((at for at in map(tail.find, stops) if at >= 0), default=-1)
        if cut >= 0:
            yield tail[:cut], True
            return
        wait = max((n for stop in stops for n in range(1, len(stop)) if tail.endswith(stop[:n])), default=0)
        yield tail[:len(tail) - wait], False
        tail = tail[len(tail) - wait:]
    yield tail, False


def stop_ids(player):
    """Ids that end a generation of this player."""
    return player.tokenizer.stop_ids(chat=player.chat)


def token_stream(player, prompts, args, row_seeds, counts=None, prefix=None):
    """(row, token id) as they are made: drawn, or with --num_beams found and handed over row by row.

    counts: a dict for the facts of --speculate. prefix: model.Prefix of a chat, whose beginning is not read again.
    """
    if args.num_beams > 1:
        # which beam wins is known at the end only, so there is nothing to stream before
        for row, prompt in enumerate(prompts):
            found = beam_search(player.model, prompt, args.num_beams, args.max_new_tokens, stop_ids=stop_ids(player))
            yield from ((row, token) for token in found[0][0])
        return
    if args.speculate:
        if args.temperature or args.repetition_penalty != 1 or args.min_new_tokens:
            raise ValueError(f"--speculate {args.speculate} with other choices than greedy ones; a guess is checked "
                             "against the most likely token; give --temperature 0, without --repetition_penalty and "
                             "--min_new_tokens")
        for row, prompt in enumerate(prompts):
            found = lookup_decoding(player.model, prompt, args.max_new_tokens, args.speculate, stop_ids(player), counts)
            yield from ((row, token) for token in found)
        return
    yield from player.model.generate(prompts, args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                                     top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty,
                                     min_new_tokens=args.min_new_tokens, stop_ids=stop_ids(player), seed=args.seed,
                                     row_seeds=row_seeds, max_batch=args.batch_size, prefix=prefix)


def text_stream(player, prompt, args, row_seed, answer, prefix=None):
    """Text of one answer, piece by piece and never half a character; notes ids and end in `answer`."""
    decoder = StreamDecoder(player.tokenizer)
    for _, token in token_stream(player, [prompt], args, [row_seed], answer.counts, prefix):
        answer.ids.append(token)
        if token in stop_ids(player):
            answer.ended = True  # the stop token is no text, and the row ends with it
            break
        yield decoder.push(token)
    yield decoder.flush()


def speak(player, prompt, args, row_seed=0, prefix=None):
    """Answer one prompt on the screen. Ctrl-C ends the answer, not the program. Returns an Answer."""
    answer, start = Answer(), time.perf_counter()
    try:
        with player.runtime.autocast():
            pieces = text_stream(player, prompt, args, row_seed, answer, prefix)
            for text, stopped in until_stop(pieces, args.stop):
                answer.text += text
                answer.ended |= stopped
                print(text if args.stream else "", end="", flush=True)
    except KeyboardInterrupt:
        answer.interrupted = True
    answer.seconds = time.perf_counter() - start
    print("" if args.stream else answer.text, flush=True)
    for remark in remarks(answer, args, player):
        print(f"({remark})", flush=True)
    return answer


def remarks(answer, args, player):
    """What a user should know about an answer: its speed, why it ended, that it loops."""
    if args.show_speed and answer.ids:
        yield f"{len(answer.ids)} tokens, {len(answer.ids) / max(answer.seconds, 1e-9):.3g} tokens/s"
    if args.show_speed and answer.counts.get("guessed"):
        steps, guessed, accepted = (answer.counts[name] for name in ("steps", "guessed", "accepted"))
        yield f"{accepted} of {guessed} guessed tokens were right: {len(answer.ids) / steps:.2f} tokens a step"
    if answer.interrupted:
        yield "stopped"
    elif not answer.ended and player.chat:
        limit = f"--max_new_tokens {args.max_new_tokens}" if len(answer.ids) >= args.max_new_tokens else "the context"
        yield f"cut off: {limit} is used up"
    if metrics.has_loop(answer.ids):
        yield "it repeats itself: usual for small models; try --repetition_penalty 1.1 or a higher --temperature"


def fit(player, messages, max_new_tokens):
    """Drop the oldest turns, each a question with its answer, until an answer has room; a system message stays.

    Returns: (prompt ids, messages kept, number of messages dropped). Raises ValueError when the last question alone
    does not fit the context.
    """
    # a short context is shared: with all of --max_new_tokens kept free, little of the conversation would be left
    room = player.context - min(max_new_tokens, player.context // 4)
    dropped = 0
    while True:
        ids = player.ids(messages)
        questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if len(ids) <= room or len(questions) < 2 or not player.chat:
            break
        # up to the second question: half a turn would be an answer without its question
        system = int(messages[0]["role"] == "system")
        dropped += questions[1] - system
        messages = messages[:system] + messages[questions[1]:]
    if len(ids) >= player.context:
        raise ValueError(f"the prompt has {len(ids)} tokens; prompt and answer must fit the model's context of "
                         f"{player.context}; shorten the prompt")
    return ids, messages, dropped


# ----------------------------------------------------------------------------------------------------------------------
# 3. Chat, single answers, batches
def typed_lines():
    """Lines from the terminal or a pipe, until the end of input, or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input(); not on Windows
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line.strip()


def opening(args):
    """The messages a conversation begins with."""
    return [{"role": "system", "content": args.system}] if args.system else []


def command(line, messages, player):
    """Carry out a /command. Returns the messages to go on with, None to leave."""
    word, _, rest = line.partition(" ")
    system = [message for message in messages[:1] if message["role"] == "system"]
    talk = messages[len(system):]
    if word == "/exit":
        return None
    if word == "/reset":
        print("(the conversation is forgotten)")
        return system
    if word == "/system":
        rest = rest.strip()
        print("(a base model has no system message)" if not player.chat else f"(system message: {rest or 'none'})")
        return ([{"role": "system", "content": rest}] if rest else []) + talk
    print(HELP if word == "/help" else f"(unknown command {word}; there are: {HELP})")
    return messages


def chat(player, args):
    """Talk until /exit or the end of input. Returns {"answers": texts}."""
    print(HELP)
    messages, answers, prefix = opening(args), [], Prefix()
    for line in typed_lines():
        if line.startswith("/"):
            messages = command(line, messages, player)
            if messages is None:
                break
            continue
        if not line:
            continue
        try:
            prompt, kept, dropped = fit(player, [*messages, {"role": "user", "content": line}], args.max_new_tokens)
        except ValueError as error:
            print(f"error: {error}")
            continue
        if dropped:
            print(f"(the oldest {dropped} messages are dropped: the conversation fills the context of {player.context} "
                  "tokens)")
        # each answer has its own stream of random numbers, so a question asked twice can be answered in two ways
        answer = speak(player, prompt, args, row_seed=len(answers), prefix=prefix)
        answers.append(answer.text)
        # what a model thought is not part of the conversation it goes on with
        said = {"role": "assistant", "content": metrics.spoken(answer.text).lstrip()}
        # and a base model has no turns to remember: each line is a text of its own
        messages = [*kept, said] if player.chat else messages
    return {"weight": str(player.folder), "answers": answers}


def single(player, args):
    """Answer --prompt. Returns the answer's facts."""
    if not args.prompt:
        raise ValueError("--mode single without a prompt; it answers one question; give --prompt TEXT")
    prompt, _, _ = fit(player, [*opening(args), {"role": "user", "content": args.prompt}], args.max_new_tokens)
    answer = speak(player, prompt, args)
    if answer.interrupted:
        raise KeyboardInterrupt  # there is nothing to go on with: exit code 130, as for any other program
    return {"weight": str(player.folder), "answer": answer.text, "stopped": answer.ended, "tokens": len(answer.ids)}


def read_prompts(args):
    """(messages, "file:line") of every prompt in --prompts; a final assistant turn (SFT rows) is taken off."""
    if not args.prompts:
        raise ValueError("--mode batch without prompts; it answers a file of them; give --prompts FILE")
    path, = expand_paths(args.prompts)
    if path.suffix == ".txt":
        # a prompt a line: read_rows takes a .txt for documents between blank lines
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        rows = (({"prompt": line.strip()}, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip())
    else:
        rows = read_rows(path)
    for row, where in rows:
        if isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
        elif "prompt" in row:
            messages = conversation({"messages": row["prompt"]}, where)
        else:
            messages = conversation(row, where)
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not messages:
            raise ValueError(f"{where}: found only an answer; expected a question; add a user turn")
        yield (messages if messages[0]["role"] == "system" else opening(args) + messages), where


def batch(player, args):
    """Answer all prompts of a file, several at a time: one JSON object a line, in their order, as soon as known.

    An answer that ended has its conversation beside it, so that train_sft.py can learn from it (--skip_bad 1 leaves out
    the others): distillation from a teacher's answers (Kim and Rush 2016, arXiv:1606.07947)."""
    conversations, prompts, cut = [], [], 0
    for messages, where in read_prompts(args):
        try:
            prompt, messages, dropped = fit(player, messages, args.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        prompts.append(prompt)
        conversations.append(messages)
        cut += dropped > 0
    start, tokens = time.perf_counter(), 0
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if args.output:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(args.output, "w", encoding="utf-8"))
        # some batches at a time: a row that ends makes room for the next prompt, and answers still appear early
        for first in range(0, len(prompts), 4 * args.batch_size):
            rows = range(first, min(first + 4 * args.batch_size, len(prompts)))
            for row, ids in zip(rows, decode_rows(player, [prompts[i] for i in rows], args, rows), strict=True):
                tokens += len(ids)
                line = {"index": row, "prompt": conversations[row][-1]["content"], **row_answer(player, ids, args)}
                if line["stopped"]:  # a row of SFT data; one that breaks off would teach to break off
                    line["conversations"] = [*conversations[row], assistant_turn(line["answer"])]
                print(json.dumps({"weight": player.name, **line}, ensure_ascii=False), file=file, flush=True)
    speed = tokens / max(time.perf_counter() - start, 1e-9)
    where = f", answers in {args.output}" if args.output else ""
    print(f"{len(prompts)} prompts ({cut} lost their oldest turns), {tokens} tokens, {speed:.0f} tokens/s{where}",
          file=sys.stdout if args.output else sys.stderr)
    return {"weight": str(player.folder), "prompts": len(prompts), "tokens": tokens}


def assistant_turn(text):
    """An answer as a message of a conversation; what was only thought stands apart, as tokenizer.render() wants it."""
    thought, end, said = text.partition("</think>")
    if not end:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "reasoning_content": thought.replace("<think>", "", 1).strip("\n"),
            "content": said.lstrip("\n")}


def decode_rows(player, prompts, args, row_seeds):
    """Answer ids of several prompts decoded together: a list of lists."""
    rows = [[] for _ in prompts]
    with player.runtime.autocast():
        for row, token in token_stream(player, prompts, args, list(row_seeds)):
            rows[row].append(token)
    return rows


def row_answer(player, ids, args):
    """Text and end of an answer that was decoded in a batch."""
    ended = bool(ids) and ids[-1] in stop_ids(player)
    pieces = list(until_stop([player.tokenizer.decode(ids[:-1] if ended else ids)], args.stop))
    return {"answer": "".join(text for text, _ in pieces), "stopped": ended or pieces[-1][1], "tokens": len(ids)}


# ----------------------------------------------------------------------------------------------------------------------
# 4. Scores. Each function takes a Player and held-out items and returns a dict with n and standard_error.
def held_out(args):
    """{set: items} of the held-out files in --data_dir; what is missing is said and empty.

    Items: pretrain rows as they are; else dicts of messages (up to the question), answer, check, lang, skill.
    """
    sets = {}
    for name, cap in CAPS.items():
        path = Path(args.data_dir) / f"{name}.heldout.jsonl"
        sets[name] = []
        if not path.is_file():
            print(f"{path} not found: the scores that need it are left out")
            continue
        cap = cap if args.limit < 0 else args.limit or None
        for row, where in islice(read_rows(path), cap):
            sets[name].append(row if name == "pretrain" else question(row, where, name))
    if not any(sets.values()):
        raise FileNotFoundError(f"no held-out data in {args.data_dir}/ (looked from {Path.cwd()}); scores need "
                                f"{{{','.join(CAPS)}}}.heldout.jsonl; write them with make_data.py, or give --data_dir")
    return sets


def question(row, where, name):
    """One held-out row as an item."""
    messages = preference(row, where)[0] if name == "preference" else conversation(row, where)
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return {"messages": messages} | {key: row.get(key) for key in ("answer", "check", "lang", "skill")}


def answers(player, items, args, temperature, first_seed=0, top_p=1.0, longest=0):
    """metrics.complete over items, in their order; each item has its own random numbers, the same for every player."""
    longest = longest or SCORE_TOKENS
    # a question too long for the model loses its beginning: it will be answered wrongly, and that is the truth
    room = max(1, player.context - longest)
    prompts = [player.ids(item["messages"])[-room:] for item in items]
    with player.runtime.autocast():
        return metrics.complete(player.model, player.tokenizer, prompts, longest, batch_size=args.batch_size,
                                temperature=temperature, top_p=top_p, seed=args.seed,
                                row_seeds=range(first_seed, first_seed + len(items)), stop_ids=stop_ids(player))


def window_batches(player, texts, width):
    """Documents as padded batches for metrics.heldout_loss: windows of `width` tokens that begin with the last token of
    the one before (bos for the first), so that every token of a text is a target once."""
    tok = player.tokenizer
    windows, sizes = [], []
    for text in texts:
        ids = [tok.eos_id if tok.bos_id is None else tok.bos_id, *tok.encode(text)]
        starts = range(0, len(ids) - 1, width - 1)
        windows += [ids[i:i + width] for i in starts]
        # the bytes of a document are counted with its first window: only their sum is used
        sizes += [len(text.encode("utf-8", "replace")) if i == 0 else 0 for i in starts]
    rows = max(1, 2**26 // (width * player.model.config.vocab_size))  # logits [B, T, V] of 256 MB in fp32
    for i in range(0, len(windows), rows):
        ids, lengths = pad_rows(windows[i:i + rows], tok.pad_id)  # [B, T], [B]
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).float()  # [B, T]
        yield {"ids": ids, "mask": mask, "bytes": torch.tensor(sizes[i:i + rows])}


def score_bits(player, rows, args):
    """Bits per byte of documents {"text", "lang"}, by language and in total."""
    # beyond the length it was trained with a model guesses; 2048 keeps the logits of a large vocabulary in memory
    trained = player.facts.get("args", {}).get("max_seq_len", 2048)
    width = max(2, min(args.max_seq_len or trained, player.context))
    texts = defaultdict(list)
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"found a row with the keys [{', '.join(row)}]; bits per byte need text, a string; write "
                             'every row as {"text": "..."}')
        texts[row.get("lang") or "all"].append(row["text"])
    by_lang, nll, size, variance = {}, 0.0, 0, 0.0
    for lang, group in sorted(texts.items()):
        parts = [metrics.heldout_loss(player.model, window_batches(player, group[i:i + 8], width), token_logprobs,
                                      player.runtime.device, player.runtime.autocast) for i in range(0, len(group), 8)]
        bits = [part["nll"] / math.log(2) for part in parts]
        total = sum(part["bytes"] for part in parts)
        rate = sum(bits) / max(total, 1)
        # standard error of a ratio of sums: from how far each part lies from the common ratio
        spread = sum((b - rate * part["bytes"]) ** 2 for b, part in zip(bits, parts, strict=True))
        spread *= len(parts) / (len(parts) - 1) if len(parts) > 1 else math.nan
        # languages apart: their rates differ, and that difference is no error
        by_lang[lang] = {"bits_per_byte": rate, "standard_error": math.sqrt(spread) / max(total, 1), "bytes": total}
        nll, size, variance = nll + sum(bits), size + total, variance + spread
    return {"bits_per_byte": nll / max(size, 1), "standard_error": math.sqrt(variance) / max(size, 1), "n": len(rows),
            "bytes": size, "by_lang": by_lang}


def score_questions(player, items, args):
    """Greedy exact match by skill and language, stop rate, loops; identity and small talk apart."""
    completions = answers(player, items, args, temperature=0.0)
    result = metrics.exact_match(completions, items)
    total = result.pop("total")
    return {"exact_match": total, "standard_error": metrics.standard_error(total, result["n"]), **result,
            "loop_rate": metrics.loop_rate(completions)}


def score_preferences(player, items, args, played):
    """Share of polite answers, and of prompts on which the rule prefers this answer to the parent's.

    played: {folder: answers} of the players so far, so that a parent answers once. None without styles.json.
    """
    path = Path(args.data_dir) / "styles.json"
    if not path.is_file():
        print(f"{path} not found: without it polite and impolite cannot be told apart, no style and no win rate")
        return None
    styles = json.loads(path.read_text(encoding="utf-8"))

    own = played[player.folder.resolve()] = answers(player, items, args, temperature=1.0)
    polite = metrics.share([metrics.style(answer.text, styles) == "polite" for answer in own])
    result = {"polite": polite, "standard_error": metrics.standard_error(polite, len(own)), "n": len(own),
              "exact_match": metrics.exact_match(own, items)["total"], "loop_rate": metrics.loop_rate(own)}
    parent = parent_folder(player, args)
    if parent:
        if parent.resolve() not in played:
            played[parent.resolve()] = answers(load(parent, args, player.runtime), items, args, temperature=1.0)
        scores = [[metrics.rule_score(answer.text, item["answer"], item["check"], styles)
                   for answer, item in zip(side, items, strict=True)] for side in (own, played[parent.resolve()])]
        rate, error = metrics.win_rate(*scores)
        result |= {"win_rate": rate, "win_rate_error": error, "against": parent.name}
    return result


def parent_folder(player, args):
    """Folder of the chat model that this one was trained from; None where there is none to compare with."""
    for parent in player.facts.get("parents", []):
        # the path was written where the training ran; below this --save_dir it may have moved
        for folder in (Path(parent), Path(args.save_dir) / Path(parent).name):
            if (folder / "config.json").is_file():
                stage = checkpoint.read_minillm(folder).get("stage")
                return None if stage in ("pretrain", "reward") else folder
    return None


def score_samples(player, items, args):
    """pass@k: chance of a right answer among k drawn at temperature 1; pass@1 by skill and language as well."""
    draws = [answers(player, items, args, temperature=1.0, first_seed=n * len(items)) for n in range(args.pass_k)]
    result = metrics.exact_match([c for draw in draws for c in draw], list(items) * args.pass_k)
    total = result.pop("total")
    right = [[metrics.check_answer(item["check"], item["answer"], c.text) for c in of_item]
             for item, *of_item in zip(items, *draws, strict=True) if item.get("check")]
    rates = pass_rates(right, args.pass_k)
    return {**result, **rates, "pass_at_1": total, "n": result["n"] // args.pass_k, "samples": args.pass_k,
            "standard_error": rates["pass_at_k_error"]["1"]}


def pass_rates(right, most):
    """pass@k for k = 1, 2, 4, ... and `most`, from which of each prompt's answers are right: rates and errors by k, as
    text (JSON has no other keys)."""
    ks = sorted({most, *(2**i for i in range(most.bit_length()))})
    rates = {str(k): found for k, found in metrics.pass_at(right, ks).items()}
    return {"pass_at_k": {k: rate for k, (rate, _) in rates.items()},
            "pass_at_k_error": {k: error for k, (_, error) in rates.items()}}


def pass_line(result):
    """What pass_rates() found as text: pass@1 0.120 (0.011), pass@2 ..."""
    return ", ".join(f"pass@{k} {cell({'rate': rate, 'error': result['pass_at_k_error'][k]}, 'rate', 'error')}"
                     for k, rate in result["pass_at_k"].items())


def score_pairs(player, count, args):
    """Pair accuracy of a reward model by kind of error, over the first `count` held-out pairs."""
    # the class that training uses, so that a score is read at the same last token here, there and in PPO
    path = Path(args.data_dir) / "preference.heldout.jsonl"
    data = PreferenceData(path, player.tokenizer, player.context, cache_dir=Path(args.save_dir) / "cache")
    count = min(count, len(data))
    chosen, rejected, kinds, lengths = [], [], [], []
    for first in range(0, count, args.batch_size):
        rows = data.batch(range(first, min(first + args.batch_size, count)))
        device = player.runtime.device
        with torch.no_grad(), player.runtime.autocast():
            scores = player.model(rows["ids"].to(device), rows["lengths"].to(device)).float().cpu()  # [2B]
        better, worse = scores.chunk(2)  # [B], [B]
        chosen, rejected, kinds = chosen + better.tolist(), rejected + worse.tolist(), kinds + rows["kind"]
        lengths += rows["mask"].sum(1).view(2, -1).T.tolist()  # [2B] -> [B, 2]
    result = metrics.pair_accuracy(chosen, rejected, kinds)
    both = [score for pair in zip(chosen, rejected, strict=True) for score in pair]
    return {**result, "standard_error": metrics.standard_error(result["accuracy"], result["n"]),
            "length_correlation": metrics.length_correlation(both, [n for pair in lengths for n in pair])}


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
    """Measure all weights, print the table, write eval_results.jsonl. Returns {"results": rows}."""
    folders = folders_to_score(args)
    if args.bpb:
        rows = [row for row, _ in read_rows(expand_paths(args.bpb))]
        sets = dict.fromkeys(CAPS, ()) | {"pretrain": rows[:args.limit if args.limit > 0 else None]}
    else:
        sets = held_out(args)
    results, played = [], {}
    for folder in folders:
        player = load(folder, args, runtime)
        if not player.facts.get("finished", True):
            print(f"{folder} is not finished: step {player.facts.get('progress', {}).get('step')}")
        for group, function in groups(player, sets, args, played):
            start = time.perf_counter()
            result = function()
            if result is None:  # nothing to measure it with, as was said
                continue
            seconds = time.perf_counter() - start
            results.append({"weight": player.name, "group": group + ":files" * bool(args.bpb), **result,
                            **circumstances(player, args), "seconds": round(seconds, 2)})
            print(f"{player.name} {group.replace('_', ' ')}: {result['n']} items, {seconds:.1f} s", flush=True)
    write_results(Path(args.save_dir) / "eval_results.jsonl", results)
    print_tables(results)
    return {"results": results}


def circumstances(player, args):
    """What a score depends on besides the model."""
    return {"folder": str(player.folder), "checkpoint": player.weights_hash, "key": player.facts.get("key"),
            "stage": player.facts.get("stage"), "step": player.facts.get("progress", {}).get("step"),
            "seed": args.seed, "limit": args.limit, "data": args.bpb or args.data_dir,
            "device": player.runtime.device.type, "dtype": str(player.runtime.dtype)[6:],
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "format": checkpoint.FORMAT_VERSION}}


def write_results(path, results):
    """Put the new rows into the file in place of older ones for the same weight and group."""
    new = {(row["weight"], row["group"]) for row in results}
    kept = [row for row in read_results(path) if (row["weight"], row["group"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = [json.dumps(finite(row), ensure_ascii=False) + "\n" for row in kept + results]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)  # as a whole: an interrupted run leaves the old scores


def finite(value):
    """A result with None in place of nan, which is no JSON."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path):
    """Rows of eval_results.jsonl, [] without the file."""
    return [row for row, _ in read_rows(path)] if path.is_file() else []


# ----------------------------------------------------------------------------------------------------------------------
# 5. Benchmarks (tasks.py)
def score_tasks(args, runtime):
    """Measure all weights on --tasks; each result is written as soon as it is there. Returns {"results": rows}."""
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
    results = []
    for player in speakers(args, runtime):
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
            row = {"weight": player.name, "group": f"task:{name}", "task": name, "metric": metric,
                   "score": result["scores"][metric], "standard_error": result["errors"][metric], **result,
                   "few_shot": tasks.shots(tasks.TASKS[name], args.few_shot), **circumstances(player, args),
                   "data": source, "seconds": round(time.perf_counter() - start, 2)}
            results.append(row)
            write_results(Path(args.save_dir) / "eval_results.jsonl", [row])
    if not results:
        raise FileNotFoundError(f"no file of any benchmark in --task_dir {args.task_dir}; their published rows are "
                                f"read; fetch them with: python prepare_data.py download eval --output {args.task_dir}")
    print_tasks(results)
    return {"results": results}


def speakers(args, runtime):
    """The weights to measure, loaded one after another; reward models are passed over."""
    for folder in folders_to_score(args):
        if is_reward(folder):
            print(f"{folder} is a reward model: it scores answers and cannot give any")
        else:
            yield load(folder, args, runtime)


def drawn_rates(name, items, drawn, args):
    """pass@k of a benchmark by each of its metrics, from the texts drawn for every item; {} without any."""
    if not drawn:
        return {}
    task = tasks.TASKS[name]
    judged = [[tasks.judge(task, item, text) for text in texts] for item, texts in zip(items, drawn, strict=True)]
    rates = {metric: pass_rates([[bool(values[metric]) for values in of_item] for of_item in judged], args.pass_k)
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
    path.unlink()
    results = [known[n] for n in range(len(groups))]
    if task.kind == "generate":
        turns = [results[first:first + len(items)] for first in range(len(items), len(results), len(items))]
        return results[:len(items)], list(zip(*turns, strict=True))
    outcomes = [[] for _ in items]
    for (i, _), result in zip(groups, results, strict=True):
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


def print_tasks(results):
    """A line a score, the first of a task with what it is worth, in words."""
    lines = []
    for row in results:
        said = tasks.verdict(row["score"], row["standard_error"], row["chance"], row["majority"], row["n"])
        facts = [number(row["chance"]), number(row["majority"]), said or "-", f"{row['seconds']:.1f}"]
        for metric in tasks.TASKS[row["task"]].metrics:
            score = [metric, number(row["scores"][metric]), number(row["errors"][metric])]
            first = metric == row["metric"]
            lines.append([row["weight"], row["task"], row["few_shot"], row["n"], *score, *facts] if first else
                         ["", "", "", "", *score, *[""] * len(facts)])
    if lines:
        print("\nbenchmarks; majority: always the commonest right answer")
        print(logs.table(["weight", "task", "shots", "n", "metric", "score", "error", "chance", "majority", "in words",
                          "seconds"], lines))
    for row in (row for row in results if "drawn" in row):
        for metric, rates in row["drawn"]["rates"].items():
            print(f"{row['weight']} {row['task']}, {row['drawn']['samples']} answers at temperature "
                  f"{row['drawn']['temperature']:g}, {metric}: {pass_line(rates)}")


def number(value):
    """Four decimals, as the harness prints; "-" for what is not there."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if value < 1e6 else f"{value:.4g}"


# ----------------------------------------------------------------------------------------------------------------------
# 6. References, fixed prompts, one checkpoint against another
def score_references(args, runtime):
    """BLEU, chrF and ROUGE-L of greedy answers to the questions in --references. Returns {"results": rows}."""
    items, wanted = [], []
    for row, where in islice(read_rows(args.references), args.limit if args.limit > 0 else None):
        if isinstance(row.get("prompt"), str):
            messages = [{"role": "user", "content": row["prompt"]}]
            text = row.get("reference", row.get("answer"))
        else:
            *messages, last = conversation(row, where)
            text = last["content"] if last["role"] == "assistant" else None
        if not isinstance(text, str) or not messages:
            raise ValueError(f"{where}: no reference; each question needs one answer to compare with; write prompt and "
                             "reference, or a conversation that ends with the assistant")
        items.append({"messages": messages})
        wanted.append(text)
    if not items:
        raise ValueError(f"{args.references} has no rows; there is nothing to compare with; give another file")
    results = []
    for player in speakers(args, runtime):
        start = time.perf_counter()
        scores = metrics.text_scores([c.text for c in answers(player, items, args, temperature=0.0)], wanted)
        results.append({"weight": player.name, "group": "references", **scores, "n": len(items),
                        **circumstances(player, args), "data": args.references,
                        "seconds": round(time.perf_counter() - start, 2)})
    write_results(Path(args.save_dir) / "eval_results.jsonl", results)
    print(f"\n{len(items)} answers beside their references, 0 to 100")
    print(logs.table(["weight", "BLEU", "chrF", "ROUGE-L"], [
        [row["weight"], *(f"{row[name]:.2f}" for name in ("bleu", "chrf", "rouge_l"))] for row in results]))
    return {"results": results}


def score_regression(args, runtime):
    """The suite of fixed prompts: share passed, and the first failures. Returns {"results": rows}."""
    items = metrics.fixed_prompts(read_rows(args.regression_path))
    results = []
    for player in speakers(args, runtime):
        start = time.perf_counter()
        prompts = [player.ids(item["messages"]) for item in items]
        rate, failures = metrics.run_regression(player.model, player.tokenizer, items, runtime, prompts,
                                                stop_ids(player), args.batch_size)
        results.append({"weight": player.name, "group": "regression", "pass_rate": rate, "n": len(items),
                        "standard_error": metrics.standard_error(rate, len(items)),
                        "failed": [item["prompt"] for item, _, _ in failures], **circumstances(player, args),
                        "data": args.regression_path, "seconds": round(time.perf_counter() - start, 2)})
        print(f"\n{player.name}: {len(items) - len(failures)} of {len(items)} fixed prompts passed ({rate:.3f})")
        for line in metrics.failure_lines(failures, 5):
            print(f"  {line}")
    write_results(Path(args.save_dir) / "eval_results.jsonl", results)
    return {"results": results}


def compare(args, runtime):
    """Answers of several checkpoints side by side, and how often the first wins against each other one. Returns
    {"answers": {name: texts}, "results": rows}."""
    path, styles = Path(args.data_dir) / "preference.heldout.jsonl", {}
    if args.prompts:
        items = [{"messages": messages} for messages, _ in read_prompts(args)]
    else:
        rows = islice(read_rows(path), CAPS["preference"] if args.limit < 0 else args.limit or None)
        items = [question(row, where, "preference") for row, where in rows]
        if (path.parent / "styles.json").is_file():  # without it there is no rule, and only --judge compares
            styles = json.loads((path.parent / "styles.json").read_text(encoding="utf-8"))
    names, texts, facts = [name.strip() for name in args.compare.split(",")], [], []
    for name in names:
        folder = checkpoint.find(args.save_dir, name)
        if is_reward(folder):
            raise ValueError(f"--compare {name} is a reward model; it gives no answers; name it in --judge")
        player = load(folder, args, runtime)
        facts.append(circumstances(player, args))
        found = answers(player, items, args, args.temperature, top_p=args.top_p, longest=args.max_new_tokens)
        texts.append([completion.text for completion in found])
    results = []
    for by, sides in judged(texts, items, styles, args, runtime).items():
        for n, name in enumerate(names[1:], 1):
            rate, error = metrics.win_rate(sides[0], sides[n])
            results.append({"weight": names[0], "group": f"against {name} by {by}", "win_rate": rate,
                            "standard_error": error, "n": len(items), **facts[0]})
            print(f"{names[0]} against {name}, judged by the {by}: won {rate:.3f} ({error:.3f}) of {len(items)}, ties "
                  "count half")
    write_results(Path(args.save_dir) / "eval_results.jsonl", results)
    table = markdown(["prompt", *names], zip((item["messages"][-1]["content"] for item in items), *texts, strict=True))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(table, encoding="utf-8")
    print(f"{len(items)} prompts side by side in {args.output}" if args.output else table)
    return {"answers": dict(zip(names, texts, strict=True)), "results": results}


def judged(texts, items, styles, args, runtime):
    """{judge: scores of each list of texts}: the rule where there are styles, the reward model in --judge."""
    scores = {}
    if styles:
        scores["rule"] = [[metrics.rule_score(text, item["answer"], item["check"], styles)
                           for text, item in zip(side, items, strict=True)] for side in texts]
    if args.judge:
        folder = checkpoint.find(args.save_dir, args.judge)
        if not is_reward(folder):
            raise ValueError(f"--judge {args.judge} is no reward model; it must score answers; train one with "
                             "train_reward.py")
        judge, asked = load(folder, args, runtime), [item["messages"] for item in items]
        scores["reward model"] = [metrics.reward_scores(judge.model, judge.tokenizer, asked, side, args.batch_size,
                                                        runtime.autocast) for side in texts]
    return scores


def markdown(header, rows):
    """A markdown table; bars and line breaks inside a cell are written so that they do not end it."""
    def line(cells):
        safe = (str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>") for cell in cells)
        return "| " + " | ".join(safe) + " |\n"

    return line(header) + "|" + "---|" * len(header) + "\n" + "".join(line(row) for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Tables and samples
def cell(row, name, error=""):
    """A number for a table, with its standard error in brackets; "-" where there is none."""
    value, spread = finite(row.get(name)), finite(row.get(error))
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if spread is None else f" ({spread:.3f})")


def print_tables(results):
    """All scores: a line a weight, then exact match by skill, then pair accuracy by kind of error."""
    table = defaultdict(lambda: defaultdict(dict))
    for row in results:
        if row["group"].removesuffix(":files") not in GROUPS:
            continue
        table[row["weight"]][row["group"].removesuffix(":files")] = row
    speakers = {name: rows for name, rows in table.items() if "pair_accuracy" not in rows}
    langs = sorted({lang for rows in speakers.values() for group in rows.values() for lang in group.get("by_lang", {})})
    lines = []
    for name, rows in speakers.items():
        bits, exact, liked, passed = (rows[g] for g in ("bits_per_byte", "exact_match", "preference", "pass_at_1"))
        lines.append([name])
        for row, key in ((bits, "bits_per_byte"), (exact, "exact_match")):
            split = row.get("by_lang", {})
            lines[-1] += [cell(row, key, "standard_error"), *(cell(split.get(lang, {}), key) for lang in langs)]
        lines[-1] += [cell(exact, "stop_rate"), cell(exact, "loop_rate"), cell(liked, "polite", "standard_error"),
                      cell(liked, "win_rate", "win_rate_error"), cell(passed, "pass_at_1", "standard_error")]
    if lines:
        header = ["weight", "bits/byte", *langs, "exact match", *langs, "stops", "loops", "polite", "win rate",
                  "pass@1"]
        print("\nheld-out scores, standard error in brackets (win rate: against the parent)")
        print(logs.table(header, lines))
    asked = {name: rows["exact_match"] for name, rows in speakers.items() if rows["exact_match"]}
    if asked:
        print("\nexact match by skill; the last ones are held out by wording only and not part of the total")
        print(skill_table(asked))
    for name, rows in speakers.items():
        if len(rows["pass_at_1"].get("pass_at_k", {})) > 1:
            print(f"\n{name}: {pass_line(rows['pass_at_1'])}")
    for name in sorted(table.keys() - speakers.keys()):
        row = table[name]["pair_accuracy"]
        kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in row["accuracy_by_kind"].items())
        print(f"\n{name}: pair accuracy {cell(row, 'accuracy', 'standard_error')}: {kinds}; correlation of score and "
              f"length {row['length_correlation']:.2f}; n {row['n']}")


def skill_table(asked):
    """Exact match of every skill (lines) and weight (columns)."""
    lines = []
    for part in ("by_skill", "apart"):
        for skill in sorted({skill for row in asked.values() for skill in row[part]}):
            cells = [row[part].get(skill, {}) for row in asked.values()]
            lines.append([skill, max(c.get("n", 0) for c in cells), *(cell(c, "exact_match") for c in cells)])
    return logs.table(["skill", "n", *asked], lines)


def stage_table(save_dir):
    """Rows of the closing table: what each finished stage changed, in how many seconds, and where it is."""
    rows = []
    for folder in sorted((f.parent for f in Path(save_dir).glob("*/minillm.json")), key=lambda f: stage_order(f.name)):
        facts = checkpoint.read_minillm(folder)
        found = facts.get("metrics", {})
        if facts.get("finished") and "metric" in found:
            rows.append([folder.name, found["metric"], f"{found['before']:.3f}", f"{found['after']:.3f}",
                         f"{facts['seconds']:.0f}", str(folder)])
    return rows


def summary(args):
    """Print the last scores of all weights again, and last what every stage changed."""
    path = Path(args.save_dir) / "eval_results.jsonl"
    results = read_results(path)
    if not results:
        raise FileNotFoundError(f"no scores in {path}; a summary repeats them; make them: python eval.py --mode score")
    results = [row for row in results if not row["group"].endswith(":files")]
    results = sorted(results, key=lambda row: stage_order(row["weight"]))
    print_tables(results)
    print_tasks([row for row in results if "task" in row])
    print("\n" + logs.table(["stage", "metric", "before", "after", "seconds", "where"], stage_table(args.save_dir)))
    return {"results": results}


def show_samples(player, args):
    """Print fixed held-out conversations, one a kind and language, with --samples answers each."""
    found = defaultdict(list)
    for row, where in read_rows(Path(args.data_dir) / "sft.heldout.jsonl"):
        kind = next((kind for kind, skills in SAMPLE_KINDS.items() if row.get("skill") in skills), None)
        if kind:
            found[kind, row.get("lang")].append(question(row, where, "sft"))
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
    names = {path.parent.name.removesuffix(".previous") for path in out.glob("*/config.json")}
    found, samples = None, []
    for name in sorted((name for name in names if not name.endswith(".tmp")), key=stage_order) if places else ():
        try:
            folder = checkpoint.find(out, out / name)
        except ValueError as error:
            print(error)  # damaged: named, and the others still answer
            continue
        if is_reward(folder):
            continue
        args.data_dir = places[0]
        player = load(folder, args, runtime)
        print(f"report: {player.name} answers", flush=True)
        with contextlib.redirect_stdout(None):  # they are to be read on the page
            answered = show_samples(player, args)["samples"]
        samples = samples or [sample | {"answers": {}} for sample in answered]
        for sample, own in zip(samples, answered, strict=True):
            sample["answers"][player.name] = own["answers"][0]
        found = {"seed": args.seed, "samples": samples, "compression": compression(player.tokenizer, args.data_dir)}
    page = report.write(out, found)[0]
    print(f"report: {page}")
    return {"report": str(page)}


def compression(tokenizer, data_dir):
    """{language: UTF-8 bytes per token} of held-out pretraining text, {} where there is none."""
    path, size, tokens = Path(data_dir) / "pretrain.heldout.jsonl", defaultdict(int), defaultdict(int)
    for row, _ in islice(read_rows(path), CAPS["pretrain"]) if path.is_file() else ():
        lang = row.get("lang") or "all"
        size[lang] += len(row["text"].encode("utf-8", "replace"))
        tokens[lang] += len(tokenizer.encode(row["text"]))
    return {lang: size[lang] / tokens[lang] for lang in sorted(size) if tokens[lang]}


def main(args):
    """Do what --mode says. Returns its facts as a dict."""
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):
            # a terminal in another encoding, or half a character typed, must not end a conversation
            stream.reconfigure(errors="replace")
    args.stop = [stop for stop in args.stop if stop]
    if args.mode == "summary":
        return summary(args)
    # answers on standard output are for another program to read: nothing else may stand between them
    with contextlib.redirect_stdout(sys.stderr if args.mode == "batch" and not args.output else sys.stdout):
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
        result = {"chat": chat, "single": single, "batch": batch, "samples": show_samples}[args.mode](player, args)
    return result | write_report(args, runtime) if args.report else result


if __name__ == "__main__":
    common.run(main, parse_args)
