"""Decoding beyond sampling: what model.Transformer.generate does not do. Functions take a model object.

Here: beam search; prompt lookup, which writes several tokens a step where a text repeats itself. Not here: greedy
decoding, temperature, top-k, top-p, batches and streaming (decoding.py), decoders that are faster than the model itself
(inference.py), stop strings and chat (chat.py).

Beam search keeps the `num_beams` most probable beginnings instead of one, and so finds answers whose first word is not
the most likely one. For open text it is a poor choice (it prefers short, repetitive answers); for tasks with one right
answer it is the strongest simple decoder.

Prompt lookup guesses that what followed the last words earlier in the text follows again, and lets the model check
several guessed tokens in one forward: reading T tokens costs less than T times reading one. A guess is kept as far as
it is what the model would have chosen, so the answer is exactly that of greedy decoding.

Papers: Sutskever et al. 2014 (arXiv:1409.3215); length normalisation, Wu et al. 2016 (arXiv:1609.08144); speculative
decoding, Leviathan et al. 2022 (arXiv:2211.17192); lookup in the prompt, Yang et al. 2023 (arXiv:2304.04487).

    from generation import beam_search, lookup_decoding
    ids, score = beam_search(model, prompt_ids, num_beams=4, max_new_tokens=64, stop_ids={eos})[0]

Letters: T tokens, V vocabulary, D hidden size, K beams.
"""
from collections.abc import Iterable, Iterator

import torch

from decoding import check_prompts


# -- Beam search -------------------------------------------------------------------------------------------------------
def beam_search(model, prompt: list[int], num_beams: int = 4, max_new_tokens: int = 64, length_penalty: float = 1.0,
                stop_ids: Iterable[int] = (), num_return: int = 1) -> list[tuple[list[int], float]]:
    """The best answers to one prompt, best first, as (ids with their stop id, score).

    score = (sum of log-probabilities) / (number of answer tokens) ** length_penalty: 0 compares sums and so prefers
    short answers, 1 compares means. The search ends when no running beam can beat the worst of `num_beams` finished
    answers at its present length, after max_new_tokens, or at max_position_embeddings. Equal to transformers'
    generate(num_beams=..., do_sample=False, early_stopping=False), a test holds the two together.

    Raises: ValueError for a prompt that generate() refuses too, and for counts below 1.
    """
    stops = frozenset(stop_ids)
    check_prompts([prompt], model.config)
    if num_beams < 1 or max_new_tokens < 1 or not 1 <= num_return <= num_beams:
        raise ValueError(f"num_beams={num_beams}, max_new_tokens={max_new_tokens}, num_return={num_return}; all are at "
                         "least 1 and no more answers are returned than there are beams; correct the value")
    steps = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
    decoder, context = model.decoder()
    with torch.inference_mode(), context():
        return _search(decoder, list(prompt), num_beams, steps, length_penalty, stops)[:num_return]


def _search(decoder, prompt, num_beams, steps, length_penalty, stops):
    """The loop of beam_search(): all finished answers, best first."""
    cache = decoder.new_cache(num_beams, len(prompt) + steps)
    device = cache.kv.device
    cache.keep([0])  # all beams start as the same one: the prompt is read once
    logits = decoder.lm_head(decoder.hidden_states(torch.tensor([prompt], device=device), cache=cache)[:, -1])  # [1,V]
    scores = torch.zeros(1, device=device, dtype=torch.promote_types(logits.dtype, torch.float32))  # [K]
    answers: list[list[int]] = [[]]
    finished: list[tuple[list[int], float]] = []
    for length in range(1, steps + 1):
        totals = scores[:, None] + logits.to(scores.dtype).log_softmax(-1)  # [K,V]
        running, ended = _split(totals, answers, stops, num_beams, last=length == steps)
        finished += [(ids, score / length**length_penalty) for ids, score in ended]
        finished = sorted(finished, key=lambda answer: -answer[1])[:num_beams]
        # The hope of a running beam is judged at its present length: more tokens only lower the sum.
        if not running or (len(finished) == num_beams and running[0][2] / length**length_penalty <= finished[-1][1]):
            break
        answers = [ids for _, ids, _ in running]
        scores = scores.new_tensor([score for _, _, score in running])
        cache.keep([beam for beam, _, _ in running])  # each beam goes on with the cache of the one it came from
        tokens = torch.tensor([ids[-1:] for ids in answers], device=device)  # [K,1]
        logits = decoder.lm_head(decoder.hidden_states(tokens, cache=cache)[:, -1])  # [K,V]
    return finished


def _split(totals, answers, stops, num_beams, last):
    """The best continuations of all beams: (running [(beam, ids, sum)], ended [(ids, sum)]), both best first.

    totals [K,V] are sums of log-probabilities. Enough candidates are looked at that `num_beams` go on even if every
    other one ends. An ended candidate counts only if it is among the first num_beams: a worse one would be an answer
    that plain search by rank had not reached yet.
    """
    count = min(max(2, 1 + len(stops)) * num_beams, totals.numel())
    values, indices = totals.flatten().topk(count)  # [count]
    running, ended = [], []
    for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        beam, token = divmod(index, totals.shape[1])
        ids = [*answers[beam], token]
        if last or token in stops:
            if rank < num_beams:
                ended.append((ids, value))
        elif len(running) < num_beams:
            running.append((beam, ids, value))
    return running, ended


# -- Prompt lookup -----------------------------------------------------------------------------------------------------
def lookup_decoding(model, prompt: list[int], max_new_tokens: int, lookahead: int = 4, stop_ids: Iterable[int] = (),
                    counts: dict | None = None) -> Iterator[int]:
    """Yield the ids of model.generate([prompt], max_new_tokens, temperature=0, stop_ids=stop_ids), some at a time.

    lookahead: how many tokens are guessed at most in a step. counts: a dict that receives steps (forwards), guessed and
    accepted (tokens); 1 + accepted / steps tokens come of a step.
    Raises: ValueError for a prompt that generate() refuses too, and for a lookahead below 1.
    """
    check_prompts([prompt], model.config)
    if lookahead < 1:
        raise ValueError(f"lookahead={lookahead}; at least 1 token is guessed in a step; correct the value")
    limit = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
    return _lookup(model, list(prompt), limit, lookahead, frozenset(stop_ids), {} if counts is None else counts)


def _lookup(model, text, limit, lookahead, stops, counts):
    """The loop of lookup_decoding(); `text` grows by the answer."""
    counts |= {"steps": 0, "guessed": 0, "accepted": 0}
    decoder, context = model.decoder()
    device = model.model.embed_tokens.weight.device
    end = len(text) + limit
    with torch.inference_mode(), context():
        cache = decoder.new_cache(1, end - 1)
    read = 0  # tokens in the cache
    while len(text) < end:
        # the last token of the text is always read anew: its logits say what comes next
        guess = look_up(text, min(lookahead, end - len(text) - 1)) if read else []
        with torch.inference_mode(), context():
            h = decoder.hidden_states(torch.tensor([text[read:] + guess], device=device), cache=cache)  # [1,T,D]
            choices = decoder.lm_head(h[0, -1 - len(guess):]).argmax(-1).tolist()  # 1 + guesses
        # choices[i] follows guess[:i]: it counts as long as the guesses before it were right
        right = next((i for i, (a, b) in enumerate(zip(guess, choices, strict=False)) if a != b), len(guess))
        counts["steps"] += 1
        counts["guessed"] += len(guess)
        counts["accepted"] += right
        read = len(text) + right
        cache.truncate(read)  # what was read of a wrong guess
        for token in choices[: right + 1]:
            text.append(token)
            yield token
            if token in stops:
                return


def look_up(text: list[int], count: int, longest: int = 3) -> list[int]:
    """`count` tokens that followed the last `longest` tokens of the text where these stood before, latest place first;
    with no such place the last two, then the last one, are looked up; else []. What followed may be shorter than
    `count`: then the text has begun to repeat it, and it is taken to go on so."""
    for size in range(min(longest, len(text) - 1), 0, -1):
        tail = text[-size:]
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - 1] == tail[-1] and text[end - size : end] == tail:
                return [text[end + i % (len(text) - end)] for i in range(count)]
    return []
