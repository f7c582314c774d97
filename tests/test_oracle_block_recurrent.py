"""The block-recurrent transformer against an independent loop in float64: outputs, memories and
gradients.

The oracle reads one row, one token or state, one head and one key at a time, straight from the
equations of Hutchins et al. (2022). It shares nothing with the package but the parameters.
"""
import math

import pytest
import torch
from scalars import gelu, linear, norm, sigmoid

from memformers import BlockRecurrentTransformer, carry, reset

close = torch.testing.assert_close


def bucket(distance):
    """T5's bucket of a distance: exact below 16, logarithmic up to 128."""
    if distance < 16: return distance
    return min(31, 16 + int(16 * math.log(distance / 16) / math.log(128 / 16)))


def softmax_mean(scores, values):
    weights = [(s - max(scores)).exp() for s in scores]
    return sum(w * v for w, v in zip(weights, values)) / sum(weights)


def split(x, heads): return x.view(heads, -1)


def read(query, pairs, heads, bias=lambda head, key: 0):
    """What a query of all heads reads in (key, value) of all heads: (dim,)."""
    q, out = split(query, heads), []
    for i in range(heads):
        scores = [q[i] @ split(k, heads)[i] / math.sqrt(q.shape[1]) + bias(i, j)
                  for j, (k, _) in enumerate(pairs)]
        out.append(softmax_mean(scores, [split(v, heads)[i] for _, v in pairs]))
    return torch.cat(out)


def ff(layer, x):
    f = layer.feed_forward
    return x + linear(f.contract, gelu(linear(f.expand, norm(layer.norm_feed, x))))


def gated(gate, h, s, kind):
    """A state s that has read h: (4) or (5)."""
    if kind == "bias":
        g = sigmoid(gate.bias)
        return g * s + (1 - g) * linear(gate.to_new, h)
    z, i, f = linear(gate.to_new, h).view(3, -1)
    return sigmoid(f + 1) * s + sigmoid(i - 1) * z.tanh()


def block(model, tokens, states, queue):
    """A block of one row: logits, the states, and what entered each layer."""
    heads, x, entered = model.layers[0].heads, [model.embedding.weight[t] for t in tokens], []
    for number, layer in enumerate(model.layers, 1):
        entered.append(x)
        window = [norm(layer.norm_attention, y) for y in queue[number - 1] + x]
        m, d = len(queue[number - 1]), model.dim
        wk, wv = layer.to_kv.weight.split(d)
        pairs = [(wk @ y, wv @ y) for y in window]
        recurrent, after = number == model.recurrent_layer, []
        if recurrent:
            placed = [norm(layer.norm_states, s) + p for s, p in zip(states, layer.state_positions)]
            sk, sv = layer.states_kv.weight.split(d)
            own = [(sk @ s, sv @ s) for s in placed]                                       # (1)
        for t, y in enumerate(x):
            bias = lambda head, j: model.positions.bias.weight[bucket(m + t - j), head]
            out = read(layer.to_q.weight @ window[m + t], pairs[:m + t + 1], heads, bias)
            if recurrent:                                                                  # (2)
                out = torch.cat([out, read(layer.to_state_q.weight @ window[m + t], own, heads)])
            after.append(ff(layer, y + layer.to_out.weight @ out))
        if recurrent:
            qs, qt = layer.states_q.weight.split(d)
            new = [gated(layer.gate, torch.cat([read(qs @ s, own, heads), read(qt @ s, pairs, heads)]),
                         old, model.config()["gate"]) for s, old in zip(placed, states)]   # (3)
        x = after
    return [linear(model.head, norm(model.norm, y)) for y in x], new, entered


def run(model, pieces):
    """Logits of one row that is read in these blocks, its states, and its queues."""
    states = list(model.layers[model.recurrent_layer - 1].initial)
    queue, logits = [[] for _ in model.layers], []
    for cut in pieces:
        out, states, entered = block(model, cut, states, queue)
        logits += out
        queue = [(q + e)[len(q + e) - min(len(q + e), model.mem_len):]
                 for q, e in zip(queue, entered)]
    return torch.stack(logits), torch.stack(states), queue


def make(**options):
    torch.manual_seed(3)
    model = BlockRecurrentTransformer(**(dict(
        num_tokens=11, dim=6, depth=3, heads=2, seq_len=5, mem_len=4, num_states=3) | options))
    for p in model.double().parameters(): torch.nn.init.normal_(p, std=0.5)
    return model.eval()


OPTIONS = pytest.mark.parametrize("options", [
    {}, dict(gate="lstm", recurrent_layer=1, num_states=2, heads=3),
    dict(mem_len=0, recurrent_layer=3), dict(mem_len=19, gate="lstm", num_states=1)])


@OPTIONS
def test_outputs_memories_and_gradients(options):
    model, n = make(**options), 13
    text = torch.randint(11, (2, n), generator=torch.Generator().manual_seed(0))
    memory, logits = None, []
    for cut in text.split(5, 1):
        out = model.step(cut, memory)
        logits.append(out.logits)
        memory = carry(out.memory, grad=True)
    logits = torch.cat(logits, 1)
    seed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    ours = torch.autograd.grad((logits * seed).sum(), list(model.parameters()), retain_graph=True,
                               allow_unused=True)
    whole = [run(model, row.split(5)) for row in text]
    right = torch.stack([r[0] for r in whole])
    close(logits, right)
    for b, (_, states, queue) in enumerate(whole):
        close(memory.states[b], states)
        for j, q in enumerate(queue):
            if q: close(memory.mem[b, j, memory.mem.shape[2] - len(q):], torch.stack(q))
    assert memory.tokens.tolist() == [n, n] and memory.fill.tolist() == [min(n, model.mem_len)] * 2
    theirs = torch.autograd.grad((right * seed).sum(), list(model.parameters()), allow_unused=True)
    assert sum(a is not None for a in ours) == sum(b is not None for b in theirs) > 40
    for a, b in zip(ours, theirs):
        if b is not None: close(a, b)


@OPTIONS
def test_ragged_rows_and_padding(options):
    """Rows of different lengths, with padding in the middle, and one that is reset."""
    model = make(**options)
    text = torch.randint(11, (3, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[0, 2:4], mask[1, :5], mask[2, 7:] = False, False, False
    first = model.step(text[:, :5], None, mask[:, :5])
    memory = reset(carry(first.memory), torch.tensor([False, False, True]))
    second = model.step(text[:, 5:], memory, mask[:, 5:])
    logits, states, _ = run(model, [text[0, [0, 1, 4]], text[0, 5:]])
    close(first.logits[0][mask[0, :5]], logits[:3])
    close(second.logits[0], logits[3:])
    close(second.memory.states[0], states)
    for row, piece in ((1, text[1, 5:]), (2, text[2, 5:7])):
        logits, states, _ = run(model, [piece])
        close(second.logits[row, :len(piece)], logits)
        close(second.memory.states[row], states)
    assert second.memory.tokens.tolist() == [8, 5, 2]
    # The first row pauses: what it remembers stays as it is.
    pause = torch.tensor([[False], [True], [True]]).expand(3, 5)
    third = model.step(text[:, :5], carry(second.memory), pause).memory
    close(third.states[0], second.memory.states[0], rtol=0, atol=0)
    assert third.tokens.tolist() == [8, 10, 7]
