"""Decoding beyond sampling: what model.Transformer.generate does not do. Functions take a model object.

Here: beam search. Not here: greedy decoding, temperature, top-k, top-p and streaming (model.py), stop strings and chat
(eval.py).

Beam search keeps the `num_beams` most probable beginnings instead of one, and so finds answers whose first word is not
the most likely one. For open text it is a poor choice (it prefers short, repetitive answers); for tasks with one right
answer it is the strongest simple decoder.

Papers: Sutskever et al. 2014 (arXiv:1409.3215); length normalisation, Wu et al. 2016 (arXiv:1609.08144).

    from generation import beam_search
    ids, score = beam_search(model, prompt_ids, num_beams=4, max_new_tokens=64, stop_ids={eos})[0]

Letters: V vocabulary, T tokens, K beams.
"""
from collections.abc import Iterable

import torch


@torch.inference_mode()
def beam_search(model, prompt: list[int], num_beams: int = 4, max_new_tokens: int = 64, length_penalty: float = 1.0,
                stop_ids: Iterable[int] = (), num_return: int = 1) -> list[tuple[list[int], float]]:
    """The best answers to one prompt, best first, as (ids with their stop id, score).

    score = (sum of log-probabilities) / (number of answer tokens) ** length_penalty: 0 compares sums and so prefers
    short answers, 1 compares means. The search ends when no running beam can beat the worst of `num_beams` finished
    answers at its present length, after max_new_tokens, or at max_position_embeddings. Equal to transformers'
    generate(num_beams=..., do_sample=False, early_stopping=False), a test holds the two together.

    Raises: ValueError for an empty or too long prompt, and for counts below 1.
    """
    stops = frozenset(stop_ids)
    room = model.config.max_position_embeddings - len(prompt)
    if not prompt or room < 1:
        raise ValueError(f"prompt of {len(prompt)} tokens; it has at least 1 and leaves room for an answer in "
                         f"max_position_embeddings {model.config.max_position_embeddings}; give another prompt")
    if num_beams < 1 or max_new_tokens < 1 or not 1 <= num_return <= num_beams:
        raise ValueError(f"num_beams={num_beams}, max_new_tokens={max_new_tokens}, num_return={num_return}; all are at "
                         "least 1 and no more answers are returned than there are beams; correct the value")
    steps = min(max_new_tokens, room)
    device = model.model.embed_tokens.weight.device
    cache = model.new_cache(num_beams, len(prompt) + steps)
    cache.keep([0])  # all beams start as the same one: the prompt is read once
    logits = model(torch.tensor([prompt], device=device), cache=cache, logits_to_keep=1)[:, -1]  # [1,V]
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
        logits = model(tokens, cache=cache)[:, -1]  # [K,V]
    return finished[:num_return]


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
