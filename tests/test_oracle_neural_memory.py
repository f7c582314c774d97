"""Neural memory against an independent loop in float64: outputs, memories and gradients.

The oracle reads one row, one token and one head at a time; the inner descent is one step for each
token, its gradients by autograd, straight from the equations of Behrouz et al. (2024). It shares
nothing with the package but the parameters.
"""
import math

import pytest
import torch
from scalars import gelu, linear, norm, sigmoid, silu, sinusoid, unit

from memformers import NeuralMemoryTransformer, carry, reset

close = torch.testing.assert_close


def ask(weights, x):
    """The network of a head: one layer, or two around a residual connection."""
    d = len(x)
    if len(weights) == d * d: return weights.view(d, d).T @ x
    first, second = weights.chunk(2)
    return x + second.view(-1, d).T @ silu(first.view(d, -1).T @ x)


def learned(memory, head, state, pairs):
    """Weights and momentum of a head after a segment, token by token."""
    weights, momentum = state
    start, grads = memory.initial[head] + weights, []
    for k, v, *_ in pairs:
        error = (ask(start, k) - v).square().sum()
        grads.append(torch.autograd.grad(error, start, create_graph=True)[0])
    gates = [(memory.max_step * sigmoid(theta - 1), sigmoid(eta), sigmoid(alpha - 6))
             for _, _, theta, eta, alpha in pairs]
    w, share = start, damping(start, [k for k, *_ in pairs], gates)
    for (theta, eta, alpha), g in zip(gates, grads):
        momentum = eta * momentum - share * theta * g
        w = (1 - alpha) * w + momentum
    return w - memory.initial[head], momentum


def damping(start, keys, gates):
    """What share of the steps is taken: one unit of each gradient, and of the old momentum, is
    followed through the segment."""
    moved, left = [], []      # what each step has moved at the end, and its part of the momentum
    for i in range(-1, len(keys)):   # -1: the momentum from before
        weight, momentum = start.new_zeros(()), start.new_tensor(float(i < 0))
        for j, (theta, eta, alpha) in enumerate(gates):
            momentum = eta * momentum + (theta if i == j else 0)
            weight = (1 - alpha) * weight + momentum
        moved.append(weight)
        left.append(momentum)
    (c, *w), (b, *s) = moved, left
    row = lambda i, scale: sum(x * alike(start, keys[i], key) for x, key in zip(scale, keys))
    w, s = (max(row(i, scale) for i in range(len(keys))) for scale in (w, s))
    return 1 / max(torch.ones(()).double(), 2 * (w + s * c / (1 - b)))


def alike(weights, x, y):
    """How much a step for one key changes what another one finds, at most."""
    d = len(x)
    if len(weights) == d * d: return abs(x @ y)
    first, second = weights.chunk(2)
    hidden = [silu(first.view(d, -1).T @ key) for key in (x, y)]
    return abs(hidden[0] @ hidden[1]) + 1.21 * (second * second).sum() * abs(x @ y)


def convolved(kernel, inputs):
    """One channel at a time: the newest input with the last weight."""
    return torch.stack([sum(kernel[c, 3 - back] * inputs[-1 - back][c]
                            for back in range(min(4, len(inputs)))) for c in range(len(kernel))])


def run(model, pieces):
    """Logits of one row that is read in these segments, its memory, for each layer and head
    (weights, momentum), and for each layer what its convolution has been given."""
    d, wiring = model.layers[0].memory.d, model.config()["wiring"]
    size = model.layers[0].memory.initial.shape[1]
    zero = lambda: torch.zeros(size).double().requires_grad_()
    memory = [[(zero(), zero()) for _ in range(layer.heads)] for layer in model.layers]
    logits, past = [], [[] for _ in model.layers]
    for cut in pieces:
        states, after = [model.embedding.weight[t] for t in cut], []
        for layer, state, inputs in zip(model.layers, memory, past):
            h, part, pairs, found = layer.heads, layer.memory, [[] for _ in range(layer.heads)], []
            for x in states:
                n = norm(layer.norm_memory, x)
                inputs.append(part.to_qkv.weight @ n)
                q, k, v = convolved(part.conv, inputs).split(h * d)
                gates, read = linear(part.to_gates, n), []
                for i in range(h):
                    rows = slice(i * d, (i + 1) * d)
                    o = ask(part.initial[i] + state[i][0], unit(silu(q[rows])))
                    read.append(o / (o.square().mean() + 1e-6).sqrt() * part.norm.weight)
                    pairs[i].append((unit(silu(k[rows])), v[rows], gates[i], gates[h + i],
                                     gates[2 * h + i]))
                found.append(part.to_out.weight @ torch.cat(read))
            after.append([learned(part, i, state[i], pairs[i]) for i in range(h)])
            if wiring == "layer": states = [x + f for x, f in zip(states, found)]
            states = attended(model, layer, states, found, wiring)
        memory = after
        logits += [linear(model.head, norm(model.norm, x)) for x in states]
    return torch.stack(logits), memory, past


def attended(model, layer, states, found, wiring):
    """States after attention within the segment and the feed-forward."""
    h, d = layer.heads, layer.memory.d
    normed = [norm(layer.norm_attention, x) for x in states]
    prefix = [norm(layer.norm_attention, x) for x in found] if wiring == "context" else []
    wk, wv = layer.to_kv.weight.split(h * d)
    at, after = layer.positions, []
    r = [at.to_r.weight @ sinusoid(t, model.dim) for t in range(len(states))]
    for t, x in enumerate(states):
        heads = []
        for i in range(h):
            rows = slice(i * d, (i + 1) * d)
            q = layer.to_q.weight[rows] @ normed[t]
            u, w = at.content_bias[i, 0], at.position_bias[i, 0]
            keys = [(y, 0) for y in prefix[:t + 1]]
            keys += [(normed[j], (q + w) @ r[t - j][rows]) for j in range(t + 1)]
            s = torch.stack([((q + u) @ (wk[rows] @ y) + p) / math.sqrt(d) for y, p in keys])
            s = (s - s.max()).exp()
            heads.append(sum(a * (wv[rows] @ y) for a, (y, _) in zip(s / s.sum(), keys)))
        out = linear(layer.to_out, torch.cat(heads))
        x = x + (out * sigmoid(found[t]) if wiring == "gate" else out)
        f = layer.feed_forward
        after.append(x + linear(f.contract, gelu(linear(f.expand, norm(layer.norm_feed, x)))))
    return after


def make(**options):
    torch.manual_seed(3)
    model = NeuralMemoryTransformer(**(dict(num_tokens=11, dim=6, depth=2, heads=2, seq_len=5,
                                            dim_head=3, max_step=.2) | options)).double()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    return model.eval()


OPTIONS = pytest.mark.parametrize("options", [
    dict(wiring="layer", memory_depth=1), dict(wiring="gate"),
    dict(wiring="context", expand=1),
    dict(wiring="context", memory_depth=1, heads=3)])


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
    whole = [run(model, row.split(5)) for row in text]
    right = torch.stack([r[0] for r in whole])
    close(logits, right)
    for b, (_, layers, past) in enumerate(whole):
        close(memory.tail[b], torch.stack([torch.stack(inputs[-3:]) for inputs in past]))
        for i, heads in enumerate(layers):
            for head, (weights, momentum) in enumerate(heads):
                close(memory.weights[b, i, head], weights)
                close(memory.momentum[b, i, head], momentum)
    assert memory.tokens.tolist() == [n, n]
    weights = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad((x * seed).sum(), weights)
                              for x in (logits, right))): close(ours, theirs)


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
    def same_state(row, layers, past):
        for i, found in enumerate((second.memory.weights, second.memory.momentum)):
            close(found[row], torch.stack([torch.stack([state[i] for state in heads])
                                           for heads in layers]))
        for i, inputs in enumerate(past):
            there = second.memory.tail[row, i]
            close(there[-len(inputs[-3:]):], torch.stack(inputs[-3:]))
            assert not there[:-len(inputs[-3:])].any()
    logits, *states = run(model, [text[0, [0, 1, 4]], text[0, 5:]])
    close(first.logits[0][mask[0, :5]], logits[:3])
    close(second.logits[0], logits[3:])
    same_state(0, *states)
    close(second.logits[1], run(model, [text[1, 5:]])[0])
    logits, *states = run(model, [text[2, 5:7]])
    close(second.logits[2, :2], logits)
    same_state(2, *states)
    assert second.memory.tokens.tolist() == [8, 5, 2]
