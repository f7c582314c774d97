"""Infini-attention against an independent loop in float64: outputs, memories and gradients.

The oracle reads one row, one token, one head and one key at a time, and writes one pair at a time,
straight from the equations of Munkhdalai et al. (2024) and, for `delta="token"`, from the delta
rule. It shares nothing with the package but the parameters.
"""
import math

import pytest
import torch
from scalars import gelu, linear, norm, sinusoid, unit

from memformers import InfiniTransformer, carry, reset

close = torch.testing.assert_close


def sigma(x): return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def found(q, matrix, z, delta):
    """What a query reads from the memory of its head: (1) or (5)."""
    if delta == "token": return matrix.T @ unit(q)
    return matrix.T @ sigma(q) / (sigma(q) @ z + 1e-6)


def written(pairs, matrix, z, delta):
    """The memory of a head after the pairs of a segment: (3), (4) or (5)."""
    old = matrix, z
    for k, v in pairs:
        if delta == "token":
            matrix = matrix + torch.outer(unit(k), v - matrix.T @ unit(k))
            continue
        if delta == "segment": v = v - found(k, *old, delta)
        matrix, z = matrix + torch.outer(sigma(k), v), z + sigma(k)
    return matrix, z


def layer_out(model, layer, states, memory, fresh):
    """States after a layer, and the pairs of each head; `memory` is (matrix, z) for each head."""
    h, delta = layer.heads, model.config()["delta"]
    wq = layer.to_q.weight
    d = len(wq) // h
    wk, wv = layer.to_kv.weight.split(len(wq))
    r = [layer.positions.to_r.weight @ sinusoid(t, model.dim) for t in range(len(states))]
    normed = [norm(layer.norm_attention, x) for x in states]
    pairs = [[(wk[i * d:(i + 1) * d] @ x, wv[i * d:(i + 1) * d] @ x) for x in normed]
             for i in range(h)]
    after = []
    for t, x in enumerate(states):
        heads = []
        for i in range(h):
            rows = slice(i * d, (i + 1) * d)
            q, at = wq[rows] @ normed[t], layer.positions
            u, w = at.content_bias[i, 0], at.position_bias[i, 0]
            scores = torch.stack([((q + u) @ pairs[i][j][0] + (q + w) @ r[t - j][rows])
                                  / math.sqrt(d) for j in range(t + 1)])
            weights = (scores - scores.max()).exp()
            weights = weights / weights.sum()
            local = sum(weights[j] * pairs[i][j][1] for j in range(t + 1))
            if memory is not None and not fresh:
                g = 1 / (1 + (-layer.gate_rate * layer.gate[i]).exp())
                local = g * found(q, *memory[i], delta) + (1 - g) * local
            heads.append(local)
        x = x + linear(layer.to_out, torch.cat(heads))
        f = layer.feed_forward
        after.append(x + linear(f.contract, gelu(linear(f.expand, norm(layer.norm_feed, x)))))
    return after, pairs


def run(model, pieces):
    """Logits of one row that is read in these segments, and its memory:
    {layer: [(matrix, z) of each head]}."""
    d, delta = model.width, model.config()["delta"]
    fresh = lambda: (torch.zeros(d, d).double(), torch.zeros(d).double())
    memory = {i: [fresh() for _ in range(model.heads)] for i in model.memory_layers}
    logits, read = [], 0
    for cut in pieces:
        states = [model.embedding.weight[t] for t in cut]
        after = dict(memory)
        for i, layer in enumerate(model.layers, 1):
            states, pairs = layer_out(model, layer, states, memory.get(i), read == 0)
            if i in memory:
                after[i] = [written(p, *m, delta) for p, m in zip(pairs, memory[i])]
        logits += [linear(model.head, norm(model.norm, x)) for x in states]
        memory, read = after, read + len(cut)
    return torch.stack(logits), memory


def make(delta, **options):
    torch.manual_seed(3)
    model = InfiniTransformer(**(dict(num_tokens=11, dim=6, depth=3, heads=2, seq_len=5, dim_head=3,
                                      delta=delta) | options)).double()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    for layer in model.layers:
        if layer.gate is not None: torch.nn.init.normal_(layer.gate, std=0.1)
    return model.eval()


DELTAS = pytest.mark.parametrize("delta", [None, "segment", "token"])


@DELTAS
@pytest.mark.parametrize("options", [{}, dict(memory_layers=[2]), dict(heads=3, memory_layers=[1, 3])])
def test_outputs_memories_and_gradients(delta, options):
    model, n = make(delta, **options), 13
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
    for b, (_, state) in enumerate(whole):
        for j, i in enumerate(model.memory_layers):
            for head, (matrix, z) in enumerate(state[i]):
                close(memory.matrix[b, j, head], matrix)
                if delta != "token": close(memory.norm[b, j, head], z)
    assert memory.tokens.tolist() == [n, n]
    theirs = torch.autograd.grad((right * seed).sum(), list(model.parameters()), allow_unused=True)
    used = [(a, b) for a, b in zip(ours, theirs) if b is not None]
    assert len(used) > 20
    for a, b in used: close(a, b)


@DELTAS
def test_ragged_rows_and_padding(delta):
    """Rows of different lengths, with padding in the middle, and one that is reset."""
    model = make(delta)
    text = torch.randint(11, (3, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[0, 2:4], mask[1, :5], mask[2, 7:] = False, False, False
    first = model.step(text[:, :5], None, mask[:, :5])
    memory = reset(carry(first.memory), torch.tensor([False, False, True]))
    second = model.step(text[:, 5:], memory, mask[:, 5:])
    logits, _ = run(model, [text[0, [0, 1, 4]], text[0, 5:]])
    close(first.logits[0][mask[0, :5]], logits[:3])
    close(second.logits[0], logits[3:])
    close(second.logits[1], run(model, [text[1, 5:]])[0])
    close(second.logits[2, :2], run(model, [text[2, 5:7]])[0])
    assert second.memory.tokens.tolist() == [8, 5, 2]
