"""Feedback Transformer against a loop over tokens, layers and heads, written from the paper alone.

The loop reads one text, token after token, and shares nothing with the package but the weights.
"""
import math

import pytest
import torch
from torch import tensor

from memformers.feedback import FeedbackTransformer
from memformers.memory import carry, reset

close = torch.testing.assert_close
SIZES = dict(num_tokens=13, dim=10, depth=3, heads=3, dim_head=4)


def make(**options):
    torch.manual_seed(0)
    model = FeedbackTransformer(**(SIZES | dict(tol=0, block_len=4) | options)).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.4)
    return model


def norm(x, layer):
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias


def gelu(x): return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def bucket(d):
    """Bucket of a distance: 16 exact ones, 16 logarithmic ones up to 128."""
    return d if d < 16 else min(31, 16 + int(math.log(d / 16) / math.log(8) * 16))


def position(model, head, q, d):
    """What the distance d adds to the score of a head."""
    if hasattr(model.positions, "bias"): return model.positions.bias.weight[bucket(d), head]
    vector = model.positions.vectors[head, :, -1 - d]
    return q @ vector / math.sqrt(len(q))


def attend(model, layer, x, keys):
    """keys: (distance, key, value) of everything the token may read."""
    if not keys: return torch.zeros_like(x)
    queries = (layer.to_q.weight @ norm(x, layer.norm_attention)).view(model.heads, -1)
    out = []
    for head, q in enumerate(queries):
        scores = torch.stack([q @ k[head] / math.sqrt(len(q)) + position(model, head, q, d)
                              for d, k, _ in keys])
        weights = scores.exp() / scores.exp().sum()
        out.append(sum(weight * v[head] for weight, (_, _, v) in zip(weights, keys)))
    return layer.to_out.weight @ torch.cat(out)


def key_value(model, normed):
    k, v = (model.to_kv.weight @ normed).view(2, model.heads, -1)
    return k, v


def loop(model, text, seq_len, mem_len):
    """Logits and memory entries of one text, one token at a time."""
    entries, memory, inputs, logits = [], [], [[] for _ in model.layers], []
    for t, token in enumerate(text):
        begin = t - t % seq_len                       # where the window of this token begins
        front = [(t - s, *memory[s]) for s in range(max(0, begin - mem_len), begin)]
        x = model.embedding.weight[token]
        states = [x]
        for layer, seen in zip(model.layers, inputs):
            seen.append(key_value(model, norm(x, layer.norm_attention)))
            own = [(t - s, *seen[s]) for s in range(begin, t + 1)] if seq_len > 1 else []
            x = x + attend(model, layer, x, front + own)
            ff = layer.feed_forward
            inner, gate = (ff.expand.weight @ norm(x, layer.norm_feed) + ff.expand.bias).chunk(2)
            x = x + ff.contract.weight @ (inner * gelu(gate)) + ff.contract.bias
            states.append(x)
        if model.mixture is None: entry = states[-1]
        else:
            odds = model.mixture.exp()
            entry = sum(o / odds.sum() * state for o, state in zip(odds, states))
        entries.append(entry)
        memory.append(key_value(model, norm(entry, model.norm_memory)))
        logits.append(model.head.weight @ norm(x, model.norm))
    return torch.stack(logits), torch.stack(entries)


def read(model, tokens, cuts, mask=None, starts=()):
    """The model's logits and memory, segment by segment, with resets in front of some segments."""
    memory, logits, at = None, [], 0
    for number, n in enumerate(cuts):
        rows = starts[number] if starts else None
        if rows is not None and memory is not None: memory = reset(memory, rows)
        out = model.step(tokens[:, at:at + n], memory, None if mask is None else mask[:, at:at + n])
        memory, at = carry(out.memory, grad=True), at + n
        logits.append(out.logits)
    return torch.cat(logits, 1), memory


def gradients(model, logits, entries):
    """Of a loss that looks at the outputs and at the memory."""
    loss = logits.log_softmax(-1)[..., 2].mean() + entries.sin().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads)]


KINDS = [
    dict(seq_len=1, mem_len=5),
    dict(seq_len=1, mem_len=30, positions="learned"),
    dict(seq_len=1, mem_len=4, keep_last_hidden=True),
    dict(seq_len=2, mem_len=3, positions="learned", keep_last_hidden=True),
    dict(seq_len=2, mem_len=30),
    dict(seq_len=5, mem_len=7),
    dict(seq_len=5, mem_len=0, positions="learned"),
    dict(seq_len=9, mem_len=2),
]
SOLVERS = [(s, g) for s in ("sequential", "parallel") for g in ("unrolled", "implicit")]


@pytest.mark.parametrize("solver,gradient", SOLVERS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(str(v) for v in k.values()))
def test_outputs_memory_and_gradients(kind, solver, gradient):
    model = make(**kind, solver=solver, gradient=gradient)
    text = torch.randint(13, (11,), generator=torch.Generator().manual_seed(1))
    want, entries = loop(model, text, kind["seq_len"], kind["mem_len"])
    logits, memory = read(model, text[None], [4, 1, 6])
    close(logits[0], want)
    kept = memory.mem.shape[1]
    if kept:
        there = entries[-kept:]
        close(memory.mem[0, kept - len(there):], there)
        assert memory.fill.tolist() == [min(kept, 11)] and not memory.mem[0, :-len(there)].any()
        got, there = memory.mem[0, -len(there):], entries[-kept:]
    else: got = there = want.new_zeros(1)
    for a, b in zip(gradients(model, logits[0], got), gradients(model, want, there)): close(a, b)


@pytest.mark.parametrize("solver", ["sequential", "parallel"])
@pytest.mark.parametrize("seq_len", [1, 2, 5])
def test_ragged_rows_with_resets(seq_len, solver):
    model = make(seq_len=seq_len, mem_len=6, solver=solver, block_len=16)
    tokens = torch.randint(13, (4, 15), generator=torch.Generator().manual_seed(2))
    mask = torch.rand(4, 15, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[0], mask[1, 3:8] = True, False
    starts = [None, tensor([False, False, True, False]), tensor([True, False, False, False])]
    logits, memory = read(model, tokens, [3, 5, 7], mask, starts)
    begin = [8, 0, 3, 0]
    for row in range(4):
        for first, last in ((0, begin[row]), (begin[row], 15)):
            real = mask[row, first:last]
            if not real.any(): continue
            want, entries = loop(model, tokens[row, first:last][real], seq_len, 6)
            close(logits[row, first:last][real], want)
        kept = min(memory.mem.shape[1], len(entries))
        close(memory.mem[row, memory.mem.shape[1] - kept:], entries[-kept:])
        assert memory.open[row] == len(entries) % seq_len


def test_buckets_of_far_entries():
    """A memory longer than the last exact bucket: the distances themselves are right."""
    model = make(seq_len=1, mem_len=150, depth=1, dim_head=2, heads=2, block_len=32)
    text = torch.randint(13, (160,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        close(model.step(text[None]).logits[0], loop(model, text, 1, 150)[0])
