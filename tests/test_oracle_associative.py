"""Associative memory against an independent loop in float64: outputs, memories and gradients.

The oracle reads one row, one token, one head and one key at a time, from the equations of Rodkin et
al. (2024). It shares nothing with the package but the parameters.
"""
import math

import pytest
import torch
from scalars import feed, linear, norm

from memformers import AssociativeTransformer, carry, reset

close = torch.testing.assert_close


def phi(u, nu):
    parts = [x if x > 0 else 0 * x for x in u] + [-x if x < 0 else 0 * x for x in u]
    return torch.stack([parts[i] * parts[i - j] for j in range(1, nu + 1)
                        for i in range(len(parts))])


def look(f, memory):
    matrix, z = memory
    return sum(f[i] * matrix[i] for i in range(len(f))) / (f @ z + 1e-5)


def written(layer, states, memory, cfg):
    """The memory of a layer after the write tokens, all of which see the old one."""
    matrix, z = memory
    for x in states:
        x = norm(layer.norm_write, x)
        f, beta = phi(layer.to_k.weight @ x, cfg["nu"]), 1 / (1 + (-linear(layer.to_beta, x)).exp())
        gamma = 1.0
        if cfg["correction"]:
            gamma = 1 - float((f @ memory[1]).detach() / ((f @ f).detach() + 1e-5))
            gamma = min(1.0, max(0.0, gamma))
        matrix = matrix + torch.outer(f, beta * (layer.to_v.weight @ x - look(f, memory)))
        z = z + gamma * f
    return matrix, z


def attend(model, layer, states):
    """What each state reads of the states up to itself."""
    h, d = layer.heads, layer.dim_head
    wk, wv = layer.to_kv.weight.split(h * d)
    vectors, out = model.positions.vectors, []   # (h, d, known), distances known - 1, …, 0
    for i, x in enumerate(states):
        heads = []
        for head in range(h):
            rows = slice(head * d, (head + 1) * d)
            q = layer.to_q.weight[rows] @ x
            w = torch.stack([q @ (wk[rows] @ states[j] + vectors[head, :, j - i - 1]) / math.sqrt(d)
                             for j in range(i + 1)])
            w = (w - w.max()).exp()
            w = w / w.sum()
            heads.append(sum(w[j] * (wv[rows] @ states[j]) for j in range(i + 1)))
        out.append(layer.to_out.weight @ torch.cat(heads))
    return out


def oracle(model, tokens, memory):
    """Read one segment of one row; `memory` is {layer: (matrix, z)}."""
    cfg, n, after = model.config(), len(tokens), dict(memory)
    xs = [model.embedding.weight[t] for t in tokens]
    if cfg["emb_dim"]: xs = [linear(model.emb_in, x) for x in xs]
    xs = xs + list(model.write_tokens)
    for i, layer in enumerate(model.layers, 1):
        inner = layer.layer if i in memory else layer
        if i in memory:
            q = [layer.to_q.weight @ norm(layer.norm_read, x) for x in xs]
            xs = [x + look(phi(u, cfg["nu"]), memory[i]) for x, u in zip(xs, q)]
        read = attend(model, inner, [norm(inner.norm_attention, x) for x in xs])
        xs = [x + y for x, y in zip(xs, read)]
        xs = [x + feed(inner.feed_forward, norm(inner.norm_feed, x)) for x in xs]
        if i in memory: after[i] = written(layer, xs[n:], memory[i], cfg)
    out = [norm(model.norm, x) for x in xs[:n]]
    if cfg["emb_dim"]: out = [linear(model.emb_out, x) for x in out]
    return torch.stack([model.head.weight @ x for x in out]), after


OPTIONS = {
    "paper": dict(),
    "uncorrected": dict(correction=False, nu=2, dim_memory=4),
    "some_layers": dict(memory_layers=[2], num_memory_tokens=1, dim_memory=2, nu=2, ff_glu=True,
                        emb_dim=4, tie_embeddings=True),
}


def build(**options):
    torch.manual_seed(0)
    options = dict(num_memory_tokens=2, dim_memory=3) | options
    model = AssociativeTransformer(11, 6, 2, heads=3, seq_len=4, **options).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_loop(options):
    """Three ragged rows, four segments of odd lengths, a pause and a reset on the way."""
    model = build(**options)
    lengths = [[4, 3, 4], [1, 4, 0], [3, 4, 2], [2, 1, 2]]   # tokens of each row in each segment
    starts = {2: [1]}                                        # rows that begin a document
    fresh = lambda: {i: (torch.zeros(model.features, 6).double(), torch.zeros(model.features).double())
                     for i in model.memory_layers}
    torch.manual_seed(1)
    memory, past, loss, loss_oracle = None, [fresh() for _ in range(3)], 0, 0
    for s, counts in enumerate(lengths):
        tokens, mask = torch.randint(11, (3, 4)), torch.arange(4) < torch.tensor(counts)[:, None]
        if s in starts:
            memory = reset(memory, torch.tensor([r in starts[s] for r in range(3)]))
            for r in starts[s]: past[r] = fresh()
        out = model.step(tokens, memory, mask)
        memory = carry(out.memory, grad=True)
        loss = loss + out.logits[mask].square().sum()
        for r, count in enumerate(counts):
            if count:
                want, past[r] = oracle(model, tokens[r, :count].tolist(), past[r])
                close(out.logits[r, :count], want)
                loss_oracle = loss_oracle + want.square().sum()
            for j, i in enumerate(model.memory_layers):
                close(memory.matrix[r, j], past[r][i][0])
                close(memory.norm[r, j], past[r][i][1])
    params = dict(model.named_parameters())
    grads, wants = (torch.autograd.grad(x, list(params.values()), allow_unused=True)
                    for x in (loss, loss_oracle))
    for name, p, a, b in zip(params, params.values(), grads, wants):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert all(g is not None and g.any() for g in grads)
