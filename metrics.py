"""What the scripts measure: held-out loss, answers and their checks, styles, win rate, pass@k, pair accuracy, loops.

Every number that a script prints about quality is computed here, by one function, for all stages. The judge of an
answer is a rule (check_answer), never a model: the same rule scores an evaluation, a reward and a win rate.

What this file does not do: load or know a model (model and tokenizer come as arguments), benchmark formats (tasks.py),
printing.
Letters: B batch, T tokens, V vocabulary, N samples.

Sources: bits per byte as in Gao et al. 2020 (The Pile, arXiv:2101.00027); pass@k, Chen et al. 2021 (arXiv:2107.03374);
distinct-n, Li et al. 2016 (arXiv:1510.03055).
Commands: used by every train_*.py and eval.py.
"""

import contextlib
import importlib
import json
import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from logprobs import token_logprobs

CHECKS = ("number", "exact", "set")  # of check_answer()
ANSWER_TOKENS = 64  # longest answer in scores and to fixed prompts: rates are comparable only with one limit
APART = ("identity", "chat")  # skills with many right wordings: held out by wording, reported beside the total
MAX_EXTRA = 60  # characters a text may have beyond an exact answer: a sentence around it, not a list of guesses
STYLE_SCORES = {"polite": 1.0, "curt": 0.0, "rambling": -0.5, "impolite": -1.0}  # beside 1.0 for a right answer
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"  # scripts written without spaces between words
LETTER = rf"[^\W{CJK}]"  # a character of a word that has spaces around it
# A minus behind a digit is no sign ("10-5" ends with 5); a comma joins only groups of three digits.
# ".5" is a number, unless the point ends a word.
NUMBER = re.compile(r"(?<!\d)(?<!\d\.)-?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?!\d)|[0-9]+)(?:\.[0-9]+)?"
                    r"|(?<![a-z\d.])\.[0-9]+)")
PUNCTUATION = " \t\n.,;:!?'\"`()[]{}<>*_~。，、；：！？…—「」『』《》“”‘’"


class Completion(NamedTuple):
    """A generated answer: its text without the stop token, all its ids, and whether it ended by itself."""

    text: str
    ids: list[int]
    stopped: bool


# ---------------------------------------------------------------------------------------------------------------------
# 1. Running a model


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, batches: Iterable[dict], device: torch.device | str = "cpu",
                 autocast: Callable = contextlib.nullcontext) -> dict[str, float]:
    """Mean loss over all target tokens of all batches.

    batches: dicts of ids [B,T]; optional mask [B,T] (1 on targets; without it every token but the first is one),
        documents [B,T] (passed to the model) and bytes [B] (text bytes of the targets).
    autocast: a function that returns a context, as runtime.autocast.
    Returns: nll (sum, nats), tokens, bytes: sums that can be added over ranks; loss = nll / tokens (nats per token, nan
        without tokens); bits_per_byte = nll / ln 2 / bytes where bytes are given: unlike the loss it can be compared
        between tokenizers. The mode of the model (train or eval) is restored.
    """
    was_training = model.training
    model.eval()
    nll, tokens, size = 0.0, 0.0, 0
    for batch in batches:
        ids = batch["ids"].to(device)  # [B,T]
        extra = {"documents": batch["documents"].to(device)} if "documents" in batch else {}
        with autocast():
            logits = model(ids, **extra)  # [B,T,V]
        logp = token_logprobs(logits, ids)  # [B,T-1]
        mask = batch["mask"][:, 1:].to(device) if "mask" in batch else torch.ones_like(logp)
        # where() and not a product: 0 * inf would turn a padding position into nan for the whole set.
        # float64, on the CPU because some devices have none: a sum over millions of tokens loses digits in float32.
        nll -= torch.where(mask > 0, logp, 0).cpu().double().sum().item()
        tokens += mask.sum(dtype=torch.float32).item()
        size += int(batch["bytes"].sum()) if "bytes" in batch else 0
    model.train(was_training)
    result = {"nll": nll, "tokens": tokens, "bytes": size, "loss": nll / tokens if tokens else math.nan}
    if size:
        result["bits_per_byte"] = nll / math.log(2) / size
    return result


def _padded(rows, fill, device="cpu"):
    """Lists of numbers as a tensor [B,T], filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)


def text_batches(tokenizer, texts: Iterable[str], width: int, vocab_size: int) -> Iterator[dict]:
    """Documents as padded batches for heldout_loss(): windows of `width` ids, each of which begins with the last id of
    the one before (bos for the first), so that every token of a text is a target once."""
    windows, sizes = [], []
    for text in texts:
        ids = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id, *tokenizer.encode(text)]
        starts = range(0, len(ids) - 1, width - 1)
        windows += [ids[i:i + width] for i in starts]
        # the bytes of a document are counted with its first window: only their sum is used
        sizes += [len(text.encode("utf-8", "surrogatepass")) if i == 0 else 0 for i in starts]
    rows = max(1, 2**26 // (width * vocab_size))  # logits [B,T,V] of 256 MB in fp32
    for i in range(0, len(windows), rows):
        part = windows[i:i + rows]
        ids = _padded(part, tokenizer.pad_id)  # [B,T]
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in part])[:, None]  # [B,T]
        yield {"ids": ids, "mask": mask.float(), "bytes": torch.tensor(sizes[i:i + rows])}


def pick(items: Sequence, count: int, seed: int = 0) -> list:
    """`count` items (all, if there are fewer) drawn by a fixed shuffle. Every n-th instead could miss a kind for good:
    where two languages alternate, every second row is of one language."""
    order = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[int(i)] for i in sorted(order)]


def complete(model, tokenizer, prompts_ids: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int = 64,
             temperature: float = 0.0, seed: int = 0, row_seeds: Sequence[int] | None = None,
             stop_ids: Iterable[int] | None = None, top_k: int = 0, top_p: float = 1.0) -> list[Completion]:
    """Answer prompts, batch_size at a time (one that ends makes room for the next); results in the order of the
    prompts. Shows nothing.

    The draws of a prompt depend on (seed, its row seed) only, by default its place in the list: batch size and number
    of processes change nothing. stop_ids: by default those of a chat. The mode of the model is restored.
    """
    stop_ids = set(tokenizer.stop_ids(chat=True) if stop_ids is None else stop_ids)
    row_seeds = range(len(prompts_ids)) if row_seeds is None else row_seeds
    answers = [[] for _ in prompts_ids]
    # Neighbours in length are read together, so little padding is computed; the longest come first: if memory is too
    # small, it fails at once.
    order = sorted(range(len(prompts_ids)), key=lambda i: -len(prompts_ids[i]))
    was_training = model.training
    model.eval()
    stream = model.generate([list(prompts_ids[i]) for i in order], max_new_tokens, temperature=temperature, top_k=top_k,
                            top_p=top_p, repetition_penalty=1.0, stop_ids=stop_ids, seed=seed,
                            row_seeds=[int(row_seeds[i]) for i in order], max_batch=batch_size)
    for row, token in stream:
        answers[order[row]].append(token)
    model.train(was_training)
    completions = []
    for ids in answers:
        stopped = bool(ids) and ids[-1] in stop_ids
        completions.append(Completion(tokenizer.decode(ids[:-1] if stopped else ids), ids, stopped))
    return completions


SHARED = 16  # so many equal ids at the beginning of eight groups or more are worth a pass of their own


class _Tree(NamedTuple):
    """The rows of a group as one sequence in which every common beginning stands once, depth first: all that goes on
    from node j stands directly behind it, up to ends[j]. So node i follows node j exactly if j <= i < ends[j]."""

    group: int
    ids: list[int]
    positions: list[int]
    ends: list[int]
    rows: list[tuple[list[int], list[int]]]  # of each row the ids to score, and the nodes in front of them


@torch.no_grad()
def sequence_scores(model, groups: Sequence[Sequence[tuple[list[int], int]]], batch_size: int = 64,
                    max_tokens: int = 0, pad_id: int = 0,
                    autocast: Callable = contextlib.nullcontext) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
    """Score the ends of many sequences. What sequences have in common at their beginning is computed once.

    groups: lists of (ids, start): the ids from `start` (1 at least) on are scored, each given all before it. The rows
        of a group, the options of a question, become one tree. What many groups begin with (a subject's examples) is
        read once and kept.
    batch_size, max_tokens: trees and ids in one pass. 0: 512 ids on a CPU (1,024 in bf16), where larger tensors leave
        the cache, and 65,536 elsewhere. Keys and values are kept of at most 16 times as many ids. Only a single tree
        larger than that takes more.
    Yields (index of the group, [(sum of log p, whether every id was the most likely one) of each row]) batch by batch.
    The mode of the model is restored.
    """
    was_training = model.training
    model.eval()
    with autocast():
        reader, context = model.reader()
    head = reader.lm_head.weight
    max_tokens = max_tokens or (2048 // head.itemsize if head.device.type == "cpu" else 65536)
    for trunk, members in _families(groups):
        trees = sorted((_tree(n, groups[n], len(trunk)) for n in members), key=lambda tree: -len(tree.ids))
        widest, cache = len(trees[0].ids), None
        most = max(1, min(batch_size, len(trees), 16 * max_tokens // (len(trunk) + widest)))
        if trunk:
            with context():
                cache = model.new_cache(most, len(trunk) + widest)
                cache.keep([0])  # read once, then copied to all rows
                ids = torch.tensor([trunk], device=cache.kv.device)  # [1,T]
                reader.hidden_states(ids, cache=cache, wanted=ids.new_zeros(1))  # for keys and values only
                cache.keep([0] * most)
        while trees:  # neighbours in size stand together, so hardly any padding is computed
            count = max(1, min(most, max_tokens // len(trees[0].ids)))
            batch, trees = trees[:count], trees[count:]
            with context():
                scores = _score_trees(reader, batch, len(trunk), cache, pad_id)
            yield from zip((tree.group for tree in batch), scores, strict=True)
    model.train(was_training)


def _families(groups):
    """(trunk, numbers of groups): groups that all begin with the ids of the trunk, which is worth a pass of its own.
    The others come last, with an empty trunk."""
    by_head, others = defaultdict(list), []
    for n, group in enumerate(groups):
        by_head[tuple(group[0][0][:SHARED])].append(n)
    for members in by_head.values():
        rows = [row for n in members for row in groups[n]]
        # commonprefix compares sequences of anything; every row keeps at least the id in front of its first scored one
        trunk = os.path.commonprefix([ids for ids, _ in rows])[: min(start for _, start in rows) - 1]
        if len(members) >= 8 and len(trunk) >= SHARED:
            yield trunk, members
        else:
            others += members
    if others:
        yield [], others


def _tree(group, rows, known):
    """The _Tree of rows (ids, start), without the `known` ids that stand in front of all of them."""
    ids, positions, ends, path, before, found = [], [], [], [], [], {}
    # in alphabetical order, so to speak, rows that begin alike are neighbours
    for n in sorted(range(len(rows)), key=lambda n: rows[n][0]):
        row, start = rows[n]
        piece = row[known:-1]  # nothing follows the last id
        shared = len(os.path.commonprefix([before, piece]))
        path = path[:shared] + list(range(len(ids), len(ids) + len(piece) - shared))
        ids += piece[shared:]
        positions += range(known + shared, known + len(piece))
        ends += [0] * (len(piece) - shared)
        for node in path:
            ends[node] = len(ids)
        found[n], before = (row[start:], path[start - 1 - known:]), piece
    return _Tree(group, ids, positions, ends, [found[n] for n in range(len(rows))])


def _score_trees(model, trees, known, cache, pad_id):
    """For each tree the (sum of log p, whether every id was the most likely one) of its rows. One tree is one row of a
    batch, behind the `known` ids that the cache holds."""
    device, width = next(model.parameters()).device, max(len(tree.ids) for tree in trees)
    positions, mask = None, None
    # without branches the causal rule says it all, and costs less
    if any(len(set(tree.ends)) > 1 for tree in trees):
        positions = _padded([tree.positions for tree in trees], 0, device)  # [B,T]
        # padding ends with the row, so it sees itself: a softmax over nothing would be nan
        node, ends = torch.arange(width, device=device), _padded([tree.ends for tree in trees], width, device)
        follows = (node <= node[:, None]) & (node[:, None] < ends[:, None])  # [B,T,T]
        mask = torch.nn.functional.pad(follows, (known, 0), value=True)[:, None]  # [B,1,T,S]
    if cache is not None:
        cache.set_lengths([known] * len(trees))  # what an earlier batch has left behind them is overwritten
    places = [b * width + node for b, tree in enumerate(trees) for _, nodes in tree.rows for node in nodes]
    # options that begin alike, or have one id each, are read from the same state
    wanted, sources = torch.tensor(places, device=device).unique(return_inverse=True)  # [N], [M]
    states = model.hidden_states(_padded([tree.ids for tree in trees], pad_id, device), positions, cache=cache,
                                 mask=mask, wanted=wanted)[0]  # [N,D]
    targets = torch.tensor([i for tree in trees for ids, _ in tree.rows for i in ids], device=device)  # [M]
    logprob, right = map(iter, _read_targets(model, states, sources, targets))
    return [[(sum([next(logprob) for _ in ids]), all([next(right) for _ in ids])) for ids, _ in tree.rows]
            for tree in trees]


def _read_targets(model, states, sources, targets):
    """Lists of log p of the targets [M], and of whether each is the most likely id, from states[sources] of [N,D]."""
    wide = torch.promote_types(states.dtype, torch.float32)
    logprobs, best = states.new_empty(len(targets), dtype=wide), states.new_empty(len(targets), dtype=torch.bool)
    size = max(1, 2**21 // model.config.vocab_size)  # logits of a few megabytes, which stay in a CPU's cache
    for first in range(0, len(states), size):
        logits = model.lm_head(states[first : first + size]).to(wide)  # [n,V]
        here = ((sources >= first) & (sources < first + size)).nonzero().squeeze(1)  # [m]
        row, wanted = sources[here] - first, targets[here]  # [m]
        top = logits.amax(-1)  # [n]
        gold = logits[row, wanted] - top[row]  # [m], 0 where no other id is more likely
        right = gold == 0
        right[right.clone()] = logits[row[right]].argmax(-1) == wanted[right]  # of equal ones the first counts
        norm = logits.sub_(top[:, None]).exp_().sum(-1).log_()  # [n]
        logprobs[here], best[here] = gold - norm[row], right
    if not logprobs.isfinite().all():  # of options that are all nan the first would be taken, as if it were a choice
        raise ValueError("the model gives log-probabilities that are not finite; they say nothing about any answer; "
                         "give --dtype float32, and if that is no cure train it again at a lower rate")
    return logprobs.tolist(), best.tolist()


@torch.no_grad()
def reward_scores(model, tokenizer, conversations: Sequence[list[dict]], texts: Sequence[str], batch_size: int = 64,
                  autocast: Callable = contextlib.nullcontext) -> list[float]:
    """What a reward model gives each text as the answer to its conversation, read at the end token as in training.
    Raises: ValueError for a score that is not finite, which would lose every comparison as if it were a bad one."""
    rows = []
    for messages, text in zip(conversations, texts, strict=True):
        ids, mask = tokenizer.render([*messages, {"role": "assistant", "content": text}])
        rows.append(ids[: len(ids) - mask[::-1].index(1)][-model.config.max_position_embeddings:])
    device, scores = next(model.parameters()).device, []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        ids = _padded(part, tokenizer.pad_id, device)  # [B,T]
        with autocast():
            scores += model(ids, torch.tensor([len(row) for row in part], device=device)).float().tolist()  # [B]
    if not all(map(math.isfinite, scores)):
        raise ValueError("the reward model gives scores that are not finite; they say nothing about any answer; "
                         "train it again, or give another")
    return scores


@torch.no_grad()
def score_pairs(model, data, count: int, runtime, batch_size: int = 64) -> dict:
    """Scores of the first `count` pairs of a dataset.PreferenceData by a reward model, read at the same last token as
    in training and in PPO: pair_accuracy(), its standard error, and length_correlation()."""
    chosen, rejected, kinds, lengths = [], [], [], []
    for first in range(0, count, batch_size):
        rows = data.batch(range(first, min(first + batch_size, count)))
        with runtime.autocast():
            scores = model(rows["ids"].to(runtime.device), rows["lengths"].to(runtime.device)).float().cpu()  # [2B]
        better, worse = scores.chunk(2)  # [B], [B]
        chosen, rejected, kinds = chosen + better.tolist(), rejected + worse.tolist(), kinds + rows["kind"]
        lengths.append(rows["mask"].sum(1).view(2, -1))  # [2B] -> [2,B]
    result = pair_accuracy(chosen, rejected, kinds)
    return {**result, "standard_error": standard_error(result["accuracy"], result["n"]),
            "length_correlation": length_correlation(chosen + rejected, torch.cat(lengths, 1).flatten().tolist())}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Judging an answer


def _fold(text: str) -> str:
    """NFKC (full-width characters become plain ones) and lower case."""
    return unicodedata.normalize("NFKC", str(text)).lower()


def normalise(text: str) -> str:
    """_fold(), white space collapsed, punctuation at both ends removed."""
    return " ".join(_fold(text).split()).strip(PUNCTUATION)


def _last_number(text: str) -> Decimal | None:
    """The last number of a text: "1,234" is one number, "3.5" too (it must not count as 5)."""
    found = NUMBER.findall(_fold(text).replace("\u2212", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def _contains(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as whole words; at a Chinese character a word may begin or end anywhere."""
    before = "" if re.match(f"[{CJK}]", answer) else f"(?<!{LETTER})"
    after = "" if re.match(f"[{CJK}]", answer[-1]) else f"(?!{LETTER})"
    return re.search(before + re.escape(answer) + after, text) is not None


def _items(text: str) -> list[str]:
    """The items of a list: parts between commas, "and" and "和"."""
    parts = [normalise(part) for part in re.split(r"[,，、;；]|\band\b|和", text)]
    return [part for part in parts if part]


def _same_set(text: str, answer: str) -> bool:
    """Whether the text lists exactly the items of the answer, in any order.

    Two readings count: the whole text is the list (also one with spaces only), or its last sentence ends with the list,
    so that words may stand before the first item ("Sure! The colours are red and blue.").
    """
    wanted = set(_items(normalise(answer)))
    words = [set(" ".join(_items(normalise(side))).split()) for side in (text, answer)]
    if words[0] == words[1]:
        return bool(wanted)  # nothing is no answer, as in the other checks
    sentence = re.split(r"[!?:！？：\n]", text.strip(PUNCTUATION))[-1]
    first, *rest = _items(normalise(sentence)) or [""]
    starts = [item for item in wanted if first.endswith(item) and _contains(first, item)]
    return any({item, *rest} == wanted for item in starts)


def spoken(text: str) -> str:
    """What an answer says: the text behind its last </think>. Nobody is judged by what they only think."""
    return str(text).rsplit("</think>", 1)[-1]


def check_answer(check: str, answer: str, text: str) -> bool:
    """Whether `text` gives `answer`. This function is the only judge, in evaluation and in every reward.

    check: "number": the last number of the text equals the answer.
           "exact":  after normalise() the answer occurs in the text as whole words (in Chinese: as a substring), and
                     the text is at most MAX_EXTRA characters longer, so that a list of guesses does not pass.
           "set":    the text lists the same items as the answer "a, b, c", in any order.
    Raises ValueError for another check.
    """
    answer, text = str(answer), spoken(text)
    if check == "number":
        value = _last_number(text)
        return value is not None and value == _last_number(answer)
    if check == "exact":
        answer, text = normalise(answer), normalise(text)
        return bool(answer) and len(text) <= len(answer) + MAX_EXTRA and _contains(text, answer)
    if check == "set":
        return _same_set(text, answer)
    raise ValueError(f"check {check!r} is unknown; it is one of {', '.join(CHECKS)}; correct the field in the data")


def in_total(item: dict) -> bool:
    """Whether exact_match() counts the answer to an item in its total."""
    return bool(item.get("check")) and str(item.get("skill") or "all") not in APART


def exact_match(completions: Sequence[Completion], items: Sequence[dict]) -> dict:
    """Share of right answers. items: dicts with answer, check, lang, skill (as PromptData); those without a check are
    left out.

    Returns: total (share right) and n, both without the skills in APART; stop_rate (share of all that ended by
        itself); by_skill and by_lang: {name: {"exact_match", "n"}}; apart: the same for the skills in APART. A share of
        nothing is nan.
    """
    judged = [(c, i) for c, i in zip(completions, items, strict=True) if i.get("check")]
    groups = {"by_skill": defaultdict(list), "by_lang": defaultdict(list), "apart": defaultdict(list)}
    counted = []
    for completion, item in judged:
        right = check_answer(item["check"], item["answer"], completion.text)
        skill = str(item.get("skill") or "all")
        if not in_total(item):
            groups["apart"][skill].append(right)
            continue
        counted.append(right)
        groups["by_skill"][skill].append(right)
        groups["by_lang"][str(item.get("lang") or "all")].append(right)
    tables = {name: {key: {"exact_match": share(values), "n": len(values)} for key, values in sorted(group.items())}
              for name, group in groups.items()}
    return {"total": share(counted), "n": len(counted), "stop_rate": share([c.stopped for c, _ in judged]), **tables}


def share(values: Sequence[bool]) -> float:
    """Mean of truth values; nan for none, so that an empty group cannot pass for a bad one."""
    return sum(map(bool, values)) / len(values) if values else math.nan


def read_styles(path) -> dict:
    """The content of styles.json, for style(). Raises ValueError naming the file where it is something else."""
    try:
        styles = json.loads(Path(path).read_text(encoding="utf-8"))
        markers = [] + styles["rude"] + styles["polite_openers"]  # to a list nothing but lists can be added
        whole = all(isinstance(marker, str) for marker in markers) and styles["max_characters"] > 0
    except (ValueError, TypeError, LookupError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is no file of styles; it has rude and polite_openers, lists of texts, and "
                         "max_characters, a number; write it again with make_data.py")
    return styles


def style(text: str, styles: dict) -> str:
    """"impolite", "curt", "rambling" or "polite", by the markers in styles.json (make_data.py writes it).

    Impolite: contains a rude text; else curt: starts with no polite opener; else rambling: longer than max_characters;
    else polite. Width and case of characters do not matter.
    """
    text = spoken(text).strip()
    folded = _fold(text)
    if any(_fold(marker) in folded for marker in styles["rude"]):
        return "impolite"
    if not folded.startswith(tuple(_fold(marker) for marker in styles["polite_openers"])):
        return "curt"
    return "rambling" if len(text) > styles["max_characters"] else "polite"


def rule_score(text: str, answer: str | None, check: str | None, styles: dict) -> float:
    """The rule that win rates and rule rewards use: 1.0 for a right answer plus the STYLE_SCORES entry of its style.

    Right and polite 2.0; wrong but polite, or right but curt, 1.0; right and rambling 0.5 at best. Without a check the
    style alone counts.
    """
    right = check_answer(check, answer, text) if check else False
    return float(right) + STYLE_SCORES[style(text, styles)]


def words(text: str) -> list[str]:
    """The words of a text for ROUGE: runs of letters and digits in lower case, each Chinese character for itself."""
    return re.findall(rf"[{CJK}]|[^\W{CJK}]+", _fold(text))


def text_libraries():
    """The modules sacrebleu and rouge_score.rouge_scorer, imported only now. Raises ValueError where one is not
    installed."""
    try:
        return importlib.import_module("sacrebleu"), importlib.import_module("rouge_score.rouge_scorer")
    except ImportError as error:
        raise ValueError(f"{error}; BLEU, chrF and ROUGE-L are computed by libraries that training does not need; "
                         "install them: pip install sacrebleu rouge-score") from None


def text_scores(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How much of the references the texts repeat, each score from 0 to 100: bleu and chrf over all texts together
    (sacrebleu), rouge_l as the mean F over the texts (rouge-score).

    Raises ValueError as text_libraries().
    """
    sacrebleu, rouge = text_libraries()
    # the usual tokenisation takes a Chinese sentence for one word; this one parts it and leaves other text alone
    chinese = any(re.search(f"[{CJK}]", text) for text in references)
    bleu = sacrebleu.corpus_bleu(list(texts), [list(references)], tokenize="zh" if chinese else "13a")
    chrf = sacrebleu.corpus_chrf(list(texts), [list(references)])
    scorer = rouge.RougeScorer(["rougeL"], tokenizer=_Words())
    rouge_l = [scorer.score(reference, text)["rougeL"].fmeasure
               for text, reference in zip(texts, references, strict=True)]
    return {"bleu": bleu.score, "chrf": chrf.score, "rouge_l": 100 * sum(rouge_l) / len(rouge_l)}


class _Words:
    tokenize = staticmethod(words)


# ---------------------------------------------------------------------------------------------------------------------
# 3. A regression suite: fixed prompts of which every model of a kind should pass as many as the one before


def fixed_prompts(rows: Iterable[tuple[dict, str]]) -> list[dict]:
    """Items of a suite from its rows {"prompt", "answer", "check"}, each with the "file:line" where it stands
    (rows.read_rows()). Raises ValueError for a row that could not be judged, and for a suite without any."""
    items = []
    for row, where in rows:
        if not {"prompt", "answer", "check"} <= row.keys():
            raise ValueError(f"{where}: found the keys [{', '.join(row)}]; a fixed prompt needs prompt, answer and "
                             "check (number, exact or set); add what is missing")
        if not isinstance(row["prompt"], str) or row["check"] not in CHECKS:
            raise ValueError(f"{where}: found the prompt {row['prompt']!r:.60} with the check {row['check']!r}; a "
                             f"fixed prompt is a text, its check one of {', '.join(CHECKS)}; correct the row")
        items.append(row | {"messages": [{"role": "user", "content": row["prompt"]}]})
    if not items:
        raise ValueError("the file of fixed prompts has no rows; there is nothing to pass; give another file with "
                         "--regression_path")
    return items


def regression(completions: Sequence[Completion], items: Sequence[dict]) -> tuple[float, list[tuple[dict, str, str]]]:
    """A suite of fixed prompts: (share passed, (item, answer, what is wrong) of each that failed).

    To pass, an answer must be right (check_answer), end by itself and not run in a circle: the three things that break
    without any loss showing it.
    """
    failures = []
    for completion, item in zip(completions, items, strict=True):
        wrong = [name for name, bad in (("wrong", not check_answer(item["check"], item["answer"], completion.text)),
                                        ("does not stop", not completion.stopped),
                                        ("repeats itself", has_loop(completion.ids))) if bad]
        if wrong:
            failures.append((item, completion.text, ", ".join(wrong)))
    return share([True] * (len(items) - len(failures)) + [False] * len(failures)), failures


def run_regression(model, tokenizer, items: Sequence[dict], runtime, prompts: Sequence[Sequence[int]] | None = None,
                   stop_ids: Iterable[int] | None = None, batch_size: int = 64):
    """What regression() finds of a model's most likely answers to a suite (fixed_prompts()).

    runtime: common.Runtime, whose ranks share the work and all get the result. prompts: ids to answer, by default those
    of a chat; one too long for the model loses its beginning.
    """
    if prompts is None:
        prompts = [tokenizer.render(item["messages"], add_generation_prompt=True)[0] for item in items]
    room = max(1, model.config.max_position_embeddings - ANSWER_TOKENS)
    with runtime.autocast():
        answers = complete(model, tokenizer, runtime.shard([ids[-room:] for ids in prompts]), ANSWER_TOKENS, batch_size,
                           stop_ids=stop_ids)
    return regression(runtime.unshard(answers), items)


def failure_lines(failures: Sequence[tuple[dict, str, str]], count: int) -> list[str]:
    """The first `count` failures that regression() found, a line each."""
    return [f"{wrong}: {item['prompt']!r} -> {text!r:.80}, expected {item['answer']!r}"
            for item, text, wrong in failures[:count]]


def check_regression(model, tokenizer, items: Sequence[dict], args, runtime, step: int, done: bool = False):
    """--regression_interval, at every evaluation of a training script: when it is the suite's turn, that is every so
    many evaluations (the one before the first step is number 0) and at the end.

    Returns: ({"regression_pass_rate": share} for the log, lines on the first three failures); ({}, []) out of turn and
        without items.
    """
    # the number follows from the step: a run that goes on after kill -9 needs no counter to be where it was
    number = step // args.eval_interval if args.eval_interval else 0
    if not items or (number % args.regression_interval and not done):
        return {}, []
    rate, failures = run_regression(model, tokenizer, items, runtime)
    return {"regression_pass_rate": rate}, failure_lines(failures, 3)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Comparing and counting


def pass_at(samples: Sequence[Sequence[bool]], ks: Iterable[int]) -> dict[int, tuple[float, float]]:
    """{k: (mean pass@k over the prompts, standard error)}; samples: of each prompt, which of its answers are right."""
    result = {}
    for k in ks:
        values = [pass_at_k(len(right), sum(right), k) for right in samples]
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        result[k] = (float(np.mean(values)) if values else math.nan, error)
    return result


def pass_rates(samples: Sequence[Sequence[bool]], most: int) -> dict[str, dict[str, float]]:
    """pass_at() for k = 1, 2, 4, ... and `most`: {"pass_at_k": {k: mean}, "pass_at_k_error": {k: error}}; k is
    text, for JSON has no other keys."""
    rates = pass_at(samples, sorted({most, *(2**i for i in range(most.bit_length()))}))
    return {"pass_at_k": {str(k): rate for k, (rate, _) in rates.items()},
            "pass_at_k_error": {str(k): error for k, (_, error) in rates.items()}}


def standard_error(rate: float, n: int) -> float:
    """Standard error of a share of n independent samples: sqrt(p (1 - p) / n)."""
    return math.sqrt(rate * (1 - rate) / n) if n else math.nan


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float]) -> tuple[float, float]:
    """(share of pairs that A wins, ties count half; its standard error from the spread of the pairs)."""
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(scores_a, scores_b, strict=True)]
    if not wins:
        return math.nan, math.nan
    # The pairs' own spread, not p (1 - p): with ties the latter is too large.
    error = float(np.std(wins, ddof=1)) / math.sqrt(len(wins)) if len(wins) > 1 else math.nan
    return sum(wins) / len(wins), error


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of k of the n samples is right, unbiased: 1 - C(n - c, k) / C(n, k)."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {correct} right among {n}; 0 <= right <= n and 1 <= k <= n; draw more samples")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float], kinds: Sequence[str] | None = None) -> dict:
    """Share of pairs in which the chosen answer scores higher. A tie is wrong: a model that says the same to everything
    must get 0, not a half.

    Returns: accuracy, accuracy_by_kind {kind: share}, n.
    """
    right = [bool(c > r) for c, r in zip(chosen, rejected, strict=True)]
    groups = defaultdict(list)
    for kind, value in zip(kinds or ["all"] * len(right), right, strict=True):
        groups[kind].append(value)
    by_kind = {kind: share(values) for kind, values in sorted(groups.items())}
    return {"accuracy": share(right), "accuracy_by_kind": by_kind, "n": len(right)}


def length_correlation(scores: Sequence[float], lengths: Sequence[float]) -> float:
    """Pearson correlation of scores and lengths: near 1 the reward only counts words. 0 if one of them is constant."""
    x, y = np.asarray(scores, np.float64), np.asarray(lengths, np.float64)
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def has_loop(ids: Sequence[int], repeats: int = 4, shortest: int = 12, longest_period: int = 64) -> bool:
    """Whether a piece of 1 to longest_period tokens stands `repeats` times in a row and covers `shortest` tokens.

    A loop of period p is a stretch in which each token equals the one p places before. "ha ha ha" is no loop yet: the
    second bound keeps short honest repetitions out.
    """
    tokens = np.asarray(ids)  # [T]
    for period in range(1, min(longest_period, len(ids) // repeats) + 1):
        breaks = np.flatnonzero(tokens[period:] != tokens[:-period])
        run = np.diff(breaks, prepend=-1, append=len(tokens) - period).max() - 1  # the longest stretch without a break
        if run + period >= max(repeats * period, shortest):
            return True
    return False


def loop_rate(completions: Sequence[Completion]) -> float:
    """Share of completions that run into a loop."""
    return share([has_loop(completion.ids) for completion in completions])


def distinct(completions: Sequence[Completion], n: int = 2) -> float:
    """Different n-grams of token ids / all n-grams, over all completions together; nan without any."""
    grams = [tuple(c.ids[i : i + n]) for c in completions for i in range(len(c.ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
