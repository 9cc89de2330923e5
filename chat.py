"""Answers to people: one as it is made, a conversation that fits the model's context, a file full of questions.

It knows no model. Who answers comes in as a player (eval.Player), of which it uses
    chat, context, ids(messages)      whether it holds conversations; tokens that prompt and answer may have; prompt ids
    pieces(prompt, answer, ...)       the text of an answer, piece by piece; notes ids and end in an Answer
    tokens(prompts, ...), stop_ids    (row, token id) of several answers as they are made; ids that end one
    said(text), loops(ids), memory()  an answer as a turn; whether it repeats itself; what keeps a prompt's beginning
    tokenizer, runtime, name, folder  for decode(), autocast(), and to say whose answers they are
What this file does not do: choose a checkpoint, read questions, measure (eval.py); decode (decoding.py, generation.py).

    python eval.py --stream 1                                                   # converse()
    python eval.py --weight sft --prompt "What is 3 + 4?" --temperature 0       # single()
    python eval.py --weight sft --prompts questions.txt --output answers.jsonl  # batch()
"""
import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HELP = "/reset forget the conversation, /system TEXT set the system message (no text: remove it), /exit leave, /help"


# ----------------------------------------------------------------------------------------------------------------------
# 1. One answer
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


def speak(player, prompt, args, row_seed=0, prefix=None):
    """Answer one prompt on the screen. Ctrl-C ends the answer, not the program. Returns an Answer."""
    answer, start = Answer(), time.perf_counter()
    try:
        with player.runtime.autocast():
            for text, stopped in until_stop(player.pieces(prompt, answer, args, row_seed, prefix), args.stop):
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
    if player.loops(answer.ids):
        yield "it repeats itself: usual for small models; try --repetition_penalty 1.1 or a higher --temperature"


# ----------------------------------------------------------------------------------------------------------------------
# 2. Conversations
def opening(args):
    """The messages a conversation begins with."""
    return [{"role": "system", "content": args.system}] if args.system else []


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


def fit_all(player, questions, max_new_tokens):
    """fit() of every question, a pair of (messages, "file:line"), which an error names."""
    for messages, where in questions:
        try:
            yield fit(player, messages, max_new_tokens)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def single(player, args):
    """Answer --prompt. Returns the answer's facts."""
    if not args.prompt:
        raise ValueError("--mode single without a prompt; it answers one question; give --prompt TEXT")
    prompt, _, _ = fit(player, [*opening(args), {"role": "user", "content": args.prompt}], args.max_new_tokens)
    answer = speak(player, prompt, args)
    if answer.interrupted:
        raise KeyboardInterrupt  # there is nothing to go on with: exit code 130, as for any other program
    return {"weight": str(player.folder), "answer": answer.text, "stopped": answer.ended, "tokens": len(answer.ids)}


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


def converse(player, args):
    """Talk until /exit or the end of input. Returns {"answers": texts}."""
    print(HELP)
    messages, answers, prefix = opening(args), [], player.memory()
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
        # a base model has no turns to remember: each line is a text of its own
        messages = [*kept, player.said(answer.text)] if player.chat else messages
    return {"weight": str(player.folder), "answers": answers}


# ----------------------------------------------------------------------------------------------------------------------
# 3. Many questions
def batch(player, args, questions):
    """Answer questions, pairs of (messages, "file:line"), several at a time: one JSON object a line to --output or the
    screen, in their order, as soon as known.

    An answer that ended by itself ("stopped") has its conversation beside it, so that train_sft.py can learn from it
    (--skip_bad 1 leaves out the others): distillation from a teacher's answers (Kim and Rush 2016, arXiv:1606.07947).
    """
    conversations, prompts, cut = [], [], 0
    for prompt, messages, dropped in fit_all(player, questions, args.max_new_tokens):
        prompts.append(prompt)
        conversations.append(messages)
        cut += dropped > 0
    start, tokens = time.perf_counter(), 0
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if args.output:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(args.output, "w", encoding="utf-8", errors="replace"))
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


def decode_rows(player, prompts, args, row_seeds):
    """Answer ids of several prompts decoded together: a list of lists."""
    rows = [[] for _ in prompts]
    with player.runtime.autocast():
        for row, token in player.tokens(prompts, args, list(row_seeds)):
            rows[row].append(token)
    return rows


def row_answer(player, ids, args):
    """Text of an answer that was decoded in a batch, and whether all of it is there: it ended by itself, and no stop
    string has cut it."""
    ended = bool(ids) and ids[-1] in player.stop_ids
    pieces = list(until_stop([player.tokenizer.decode(ids[:-1] if ended else ids)], args.stop))
    return {"answer": "".join(text for text, _ in pieces), "stopped": ended and not pieces[-1][1], "tokens": len(ids)}


def assistant_turn(text):
    """An answer as a message of a conversation; what was only thought stands apart, as tokenizer.render() wants it."""
    thought, end, said = text.partition("</think>")
    if not end:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "reasoning_content": thought.replace("<think>", "", 1).strip("\n"),
            "content": said.lstrip("\n")}
