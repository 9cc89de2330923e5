"""The cache changes no logit, samples follow their definition, and a row in a batch gets the answer it gets alone.

    python -m pytest tests/test_decoding.py
"""
import math

import pytest
import torch
from conftest import BF16_SPEEDUP
from test_model import SHAPE, answers, make_model, random_ids

from configuration import ModelConfig
from decoding import KVCache, Prefix, fill_holes, row_uniforms, sample


# -- The cache ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dense", "yarn", "moe", "shared"])
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 1, 10, 7]], ids=["one", "single", "mixed"])
def test_cached_logits_equal_full_forward(kind, chunks):
    model, ids = make_model(kind, torch.float64), random_ids(3, 24)
    cache, parts, start = model.new_cache(3, 24), [], 0
    for count in chunks:
        parts.append(model(ids[:, start : start + count], cache=cache))
        start += count
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-9, rtol=0)


def test_cached_rows_of_different_lengths_equal_full_forward():
    model, ids = make_model(dtype=torch.float64), random_ids(3, 20)
    cache, lengths = model.new_cache(3, 20), [9, 4, 12]
    model(ids[:, :12], cache=cache)  # behind a row's length stands what will be overwritten
    cache.set_lengths(lengths)
    nexts = torch.stack([ids[row, n : n + 3] for row, n in enumerate(lengths)])
    logits = torch.cat([model(nexts[:, :2], cache=cache), model(nexts[:, 2:], cache=cache)], 1)
    for row, n in enumerate(lengths):
        full = model(ids[row : row + 1, : n + 3])[0, n:]
        torch.testing.assert_close(logits[row], full, atol=1e-9, rtol=0)


def test_cache_rows_can_be_kept_repeated_and_truncated():
    model, ids = make_model(dtype=torch.float64), random_ids(4, 10)
    token, full = random_ids(4, 1, seed=9), None
    for rows in ([0, 1, 3], [2, 0], [3, 3, 0, 1], [1, 0, 3, 2], [0, 3, 2]):
        cache = model.new_cache(4, 12)
        model(ids, cache=cache)
        cache.keep(rows)
        logits = model(token[: len(rows)], cache=cache)[:, 0]
        full = model(torch.cat([ids[rows], token[: len(rows)]], 1))[:, -1]
        torch.testing.assert_close(logits, full, atol=1e-9, rtol=0)
    cache = model.new_cache(1, 12)
    model(ids[:1], cache=cache)
    cache.truncate(6)
    cache.expand(4)
    logits = model(token, cache=cache)[:, 0]
    full = model(torch.cat([ids[:1, :6].expand(4, 6), token], 1))[:, -1]
    torch.testing.assert_close(logits, full, atol=1e-9, rtol=0)


def test_cache_overflow_is_an_error_not_a_wrong_answer():
    model, cache = make_model(), KVCache(ModelConfig(**SHAPE), batch=1, slots=4)
    model(random_ids(1, 3), cache=cache)
    with pytest.raises(ValueError, match="overflow: 3 [+] 2 tokens in 4 slots"):
        model(random_ids(1, 2), cache=cache)


# -- Sampling ----------------------------------------------------------------------------------------------------------
def reference_distribution(logits, temperature, top_k, top_p):
    """The probabilities that sample() draws from, by its definition and slowly: one row, plain Python."""
    p = (logits.double() / temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if 0 < top_k < len(p):
        order = order[:top_k]
    total, kept, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += p[i] / total
        if mass >= top_p:
            break
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.5, 7, 1.0), (1.0, 20, 0.6),
                                                       (1.0, 1000, 0.95), (1.0, 0, 0.01), (2.0, 1, 0.5)])
@pytest.mark.parametrize("size, spread", [(50, 2.0), (400, 0.5)], ids=["peaked", "flat"])  # flat: full-sort path
def test_samples_follow_the_reference_distribution(temperature, top_k, top_p, size, spread):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(3)) * spread
    uniform = (torch.arange(20_000) + 0.5) / 20_000  # a grid: frequencies are exact to 1 / 20000, no luck involved
    ids = sample(logits.expand(20_000, size), temperature, top_k, top_p, uniform)
    frequency = torch.bincount(ids, minlength=size) / 20_000
    expected = reference_distribution(logits, temperature, top_k, top_p)
    assert (frequency - expected).abs().max() < 2e-4
    assert not frequency[expected == 0].any()


def test_sampling_edge_cases():
    logits = torch.tensor([[0.0, 3.0, 1.0, -math.inf], [2.0, 0.0, 1.0, -math.inf]])
    top = [1, 0]
    for options in ((0.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.0), (1e-4, 0, 1.0), (1e-38, 0, 1.0),
                    (1e-29, 0, 1.0)):
        for u in (0.0, 0.5, 1 - 2**-24):
            assert sample(logits, *options, torch.full((2,), u)).tolist() == top
    for top_k in (0, 4, 99):  # off
        last = sample(logits, 1.0, top_k, 1.0, torch.full((2,), 1 - 2**-24))
        assert last.tolist() == [2, 2], "an impossible id is never drawn, not even by rounding"
    first_is_impossible = torch.tensor([[-math.inf, 0.0]])
    assert sample(first_is_impossible, 1.0, 0, 1.0, torch.zeros(1)).tolist() == [1]


@pytest.mark.parametrize("temperature, top_k, top_p, min_p", [(1.0, 0, 1.0, 0.1), (0.7, 0, 0.8, 0.02),
                                                              (1.5, 7, 1.0, 0.3), (1.0, 20, 0.6, 0.5),
                                                              (1.0, 0, 1.0, 1.0)])
def test_min_p_keeps_what_transformers_keeps(transformers, temperature, top_k, top_p, min_p):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 2
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    ids = sample(logits.expand(20_000, -1), temperature, top_k, top_p, uniform, min_p)
    warpers = [transformers.TemperatureLogitsWarper(temperature), transformers.TopKLogitsWarper(top_k or 300),
               transformers.TopPLogitsWarper(top_p), transformers.MinPLogitsWarper(min_p)]
    scores = transformers.LogitsProcessorList(warpers)(None, logits[None])  # [1,V]
    frequency, expected = torch.bincount(ids, minlength=300) / 20_000, scores[0].softmax(-1)
    assert (frequency - expected).abs().max() < 2e-4 and not frequency[expected == 0].any()
    assert (expected > 0).sum() < 300


def test_top_p_beyond_the_first_ids_equals_a_full_sort():
    """64 and 512 of 3000 flat logits do not hold the mass: the search goes on."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1], [3], [9]])
    uniform, found = torch.rand(200, 4, generator=torch.Generator().manual_seed(1)), []
    p, order = logits.softmax(-1).sort(dim=-1, descending=True)
    for u in uniform:
        found.append(sample(logits, 1.0, 0, 0.9, u))
    for row in range(4):
        sums = p[row].double().cumsum(0)
        last = int((sums < 0.9).sum())
        index = torch.searchsorted(sums, uniform[:, row].double() * sums[last], right=True)
        same = torch.stack(found)[:, row] == order[row][index]
        assert same.float().mean() > 0.98  # a rounded sum may fall on the other side of a border


def test_random_streams_of_a_row_begin_alike_whatever_their_length():
    long, short = row_uniforms(3, [5, 8], 100), row_uniforms(3, [8], 7)
    assert torch.equal(long[1:, :7], short) and 0 <= long.min() and long.max() < 1


# -- The loop ----------------------------------------------------------------------------------------------------------
def test_greedy_generation_equals_recomputing_the_whole_text():
    model, prompt = make_model(), [5, 9, 30]
    row, expected = list(prompt), []
    for _ in range(12):
        expected.append(model(torch.tensor([row]))[0, -1].argmax().item())
        row.append(expected[-1])
    assert answers(model, [prompt], 12, temperature=0) == [expected]


@pytest.mark.parametrize("kind", ["dense", "moe", "shared"])
@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=0.8, top_k=10, top_p=0.9),
                                     dict(top_p=0.7, repetition_penalty=1.3, stop_ids=range(4, 30))],
                         ids=["greedy", "sampled", "stopping"])
def test_a_row_in_a_ragged_batch_equals_the_row_alone(kind, options):
    model = make_model(kind)
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 17, 2, 30, 17, 3)]  # two prompts occur twice
    together = answers(model, prompts, 16, seed=4, **options)
    alone = [answers(model, [p], 16, seed=4, row_seeds=[row], **options)[0] for row, p in enumerate(prompts)]
    assert together == alone
    if "stop_ids" in options:
        assert len({len(a) for a in together}) > 1 and all(not set(a[:-1]) & set(range(4, 30)) for a in together)
    else:
        assert {len(a) for a in together} == {16}


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("max_batch", [1, 2, 3, 8, 16, 30])
def test_prompts_that_join_later_get_the_answers_they_get_alone(monkeypatch, kind, max_batch):
    model, prompts = make_model(kind), [random_ids(2 + n % 7, seed=n % 17).tolist() for n in range(24)]
    options = dict(stop_ids=range(4, 20), seed=1, repetition_penalty=1.2, min_new_tokens=2)
    alone = [answers(model, [p], 12, row_seeds=[row], **options)[0] for row, p in enumerate(prompts)]
    rows, forward = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, cache: rows.append(tuple(ids.shape)) or forward(
        ids, cache=cache))
    assert answers(model, prompts, 12, max_batch=max_batch, **options) == alone
    assert max(b for b, _ in rows) <= max_batch
    made = sum(map(len, alone))
    steps = [b for b, t in rows if t == 1]
    assert sum(steps) == made - len(prompts), "a row that has ended costs nothing"
    if max_batch == 8:  # prompts are read some at a time, and the batch stays full while any wait
        assert len(rows) - len(steps) <= 24 and sum(steps) / len(steps) > 5


def test_many_rows_leaving_at_once_mix_nothing_up():
    model, prompts = make_model(), [random_ids(2 + n % 5, seed=n).tolist() for n in range(24)]
    options = dict(stop_ids=range(4, 50), seed=1)  # about every second token ends its row
    together = answers(model, prompts, 12, **options)
    assert together == [answers(model, [p], 12, row_seeds=[row], **options)[0] for row, p in enumerate(prompts)]
    order = fill_holes([1, 4, 6, 7, 9], 5)
    assert sorted(order) == [1, 4, 6, 7, 9] and order[1] == 1 and order[4] == 4, "kept rows stay, the tail fills holes"


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_no_stop_id_among_the_first_tokens(transformers, tmp_path, kind):
    model, stops = make_model(kind), [*range(4, 60)]
    short = answers(model, [[5, 9, 30], [8]], 14, temperature=0, stop_ids=stops)
    assert min(map(len, short)) < 6
    longer = answers(model, [[5, 9, 30], [8]], 14, temperature=0, stop_ids=stops, min_new_tokens=6)
    assert all(len(row) > 6 and not set(row[:6]) & set(stops) for row in longer)
    if kind == "dense":
        model.save_pretrained(tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        expected = theirs.generate(torch.tensor([[5, 9, 30]]), max_new_tokens=14, min_new_tokens=6, do_sample=False,
                                   temperature=None, top_p=None, eos_token_id=stops, pad_token_id=3,
                                   attention_mask=torch.ones(1, 3, dtype=torch.int64))
        assert longer[0] == expected[0, 3:].tolist()
    # ids that the model does not have are no reason to fail
    assert answers(model, [[8]], 3, temperature=0, stop_ids=[-1, 500], min_new_tokens=2)[0] == short[1][:1] + answers(
        model, [[8]], 3, temperature=0)[0][1:]


def test_repetition_penalty_equals_transformers(transformers, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for prompt in ([5, 9, 30], [8, 8, 8, 40]):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False, temperature=None,
                                   top_p=None, repetition_penalty=1.7, eos_token_id=None, pad_token_id=3,
                                   attention_mask=torch.ones(1, len(prompt), dtype=torch.int64))
        ours = answers(model, [prompt], 14, temperature=0, repetition_penalty=1.7)
        assert ours == [expected[0, len(prompt):].tolist()]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_turns_of_a_chat_read_only_what_is_new(monkeypatch, kind):
    model, prefix, text = make_model(kind, torch.float64), Prefix(), []
    read, forward = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, cache: read.append(ids.shape[1]) or forward(
        ids, cache=cache))
    for turn, question in enumerate(([5, 9, 30], [11, 12], [40] * 6)):
        text += question
        read.clear()
        found = answers(model, [text], 8, seed=turn, prefix=prefix)[0]
        # the last token of an answer was never fed back, so it is read with the next question
        assert read[0] == len(question) + (turn > 0) and set(read[1:]) == {1}
        assert found == answers(model, [text], 8, seed=turn)[0]
        assert prefix.ids == text + found[:-1]
        text += found
    read.clear()
    other = [*text[:7], 90, 91]  # an earlier turn was changed: what is before it stays
    stream = model.generate([other], 8, temperature=0, prefix=prefix)
    first = [next(stream)[1] for _ in range(3)]
    stream.close()  # a user stops the answer
    assert read[0] == 2 and first == answers(model, [other], 3, temperature=0)[0]
    assert answers(model, [other], 8, temperature=0, prefix=prefix) == answers(model, [other], 8, temperature=0)
    assert prefix.ids[: len(other)] == other
    with pytest.raises(ValueError, match="prefix with 2 prompts; .*; "):
        model.generate([[5], [6]], 3, prefix=prefix)


@pytest.mark.skipif(not BF16_SPEEDUP, reason="bf16 products crash on this machine")
@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_generation_under_autocast_uses_the_numbers_of_the_autocast_forward(kind):
    model, ids = make_model(kind), random_ids(2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        twin, _ = model.decoder()
        assert torch.equal(twin(ids), model(ids))
        assert twin.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
        assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight
        full = answers(model, ids.tolist(), 5, temperature=0)
    assert {len(a) for a in full} == {5}


def test_seeds_reproduce_and_rows_differ():
    model, prompts = make_model(), [[5, 6]] * 4
    first = answers(model, prompts, 12, seed=1)
    assert first == answers(model, prompts, 12, seed=1) != answers(model, prompts, 12, seed=2)
    assert len(set(map(tuple, first))) == 4, "equal prompts in one batch draw different answers"
    # the same sample in another place of another batch, as when two ranks share the work
    assert answers(model, prompts[:2], 12, seed=1, row_seeds=[2, 3]) == first[2:]


def test_generation_leaves_the_global_random_state_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    answers(make_model(), [[5, 6]], 4)
    model = make_model()
    torch.set_rng_state(state)
    answers(model, [[5, 6]], 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_streams_and_may_be_left_early():
    stream = make_model().generate([[5], [6]], 50, temperature=0)
    assert [next(stream)[0] for _ in range(4)] == [0, 1, 0, 1]  # row by row within a step
    stream.close()


def test_generation_edge_cases():
    model = make_model()
    assert answers(model, [[5, 6]], 0) == [[]] and list(model.generate([], 5)) == []
    assert answers(model, [[]], 5) == answers(model, [[1]], 5)  # an empty prompt begins with bos
    assert len(answers(model, [[5] * 120], 50)[0]) == 8  # prompt and answer fill the 128 positions
    stopped = answers(model, [[5]], 50, temperature=0)[0][2]
    assert answers(model, [[5]], 50, temperature=0, stop_ids={stopped})[0][-1] == stopped


@pytest.mark.parametrize("prompt, options, message", [
    ([5] * 128, {}, "128 tokens"), ([97], {}, "outside 0..96"), ([-1], {}, "outside"), ([5], {"top_p": 1.2}, "top_p"),
    ([5], {"temperature": -1}, "temperature"), ([5], {"top_k": -1}, "top_k"), ([5], {"row_seeds": [1, 2]}, "row_seeds"),
    ([5], {"repetition_penalty": 0}, "repetition_penalty"), ([5], {"temperature": math.nan}, "temperature"),
    ([5], {"min_p": 1.5}, "min_p"), ([5], {"min_new_tokens": -1}, "min_new_tokens"),
    ([5], {"max_batch": 0.5}, "max_batch"),
])  # fmt: skip
def test_bad_generation_arguments_are_named_at_the_call(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate([prompt], 5, **options)


def test_empty_prompt_without_bos_is_refused():
    with pytest.raises(ValueError, match="no bos_token_id"):
        make_model(bos_token_id=None).generate([[]], 5)
