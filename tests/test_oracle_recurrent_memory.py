"""Recurrent memory tokens against an independent loop in float64: outputs, memories and gradients.

The oracle reads one row, one token, one head and one key at a time, from the equations of Bulatov et
al. (2022). It shares nothing with the package but the parameters.
"""
import math

import pytest
import torch
from scalars import feed, linear, norm

from memformers import RecurrentMemoryTransformer, carry, reset

close = torch.testing.assert_close


def distance(query, key):
    """Tokens from a query back to a key, each a (kind, index); None where positions do not count."""
    if key[0] == "read" and query[0] != "read": return None
    return query[1] - key[1]


def attend(model, layer, states, places, remembered):
    """What each state reads: the queue, and the states up to itself."""
    h, d = layer.heads, layer.dim_head
    wk, wv = layer.to_kv.weight.split(h * d)
    vectors = model.positions.vectors   # (h, d, known), distances known - 1, …, 0
    queue = [("past", i - len(remembered)) for i in range(len(remembered))]
    keys, values = remembered + states, queue + places
    out = []
    for i, (x, place) in enumerate(zip(states, places)):
        heads = []
        for head in range(h):
            rows, scores = slice(head * d, (head + 1) * d), []
            q = layer.to_q.weight[rows] @ x
            seen = range(len(remembered) + i + 1)
            for j in seen:
                s, back = q @ (wk[rows] @ keys[j]), distance(place, values[j])
                if back is not None:
                    s = s + q @ vectors[head, :, max(0, vectors.shape[2] - 1 - back)]
                scores.append(s / math.sqrt(d))
            w = torch.stack(scores)
            w = (w - w.max()).exp()
            w = w / w.sum()
            heads.append(sum(w[j] * (wv[rows] @ keys[j]) for j in seen))
        out.append(layer.to_out.weight @ torch.cat(heads))
    return out


def oracle(model, tokens, memory):
    """Read one segment of one row; `memory` is (written tokens or None, a queue for each layer)."""
    cfg, (mem, queues) = model.config(), memory
    n, count = len(tokens), cfg["num_memory_tokens"]
    read = list(model.initial) if mem is None else mem
    write = [] if cfg["read_only"] else read
    xs = [model.embedding.weight[t] for t in tokens]
    if cfg["emb_dim"]: xs = [linear(model.emb_in, x) for x in xs]
    xs = read + xs + write
    places = [("read", i) for i in range(count)] + [("text", i) for i in range(n + len(write))]
    after = []
    for layer, past in zip(model.layers, queues):
        text = xs[count:count + n]
        after.append((past + [x.detach() for x in text])[-cfg["mem_len"]:] if cfg["mem_len"] else [])
        normed, old = ([norm(layer.norm_attention, x) for x in part] for part in (xs, past))
        xs = [x + y for x, y in zip(xs, attend(model, layer, normed, places, old))]
        xs = [x + feed(layer.feed_forward, norm(layer.norm_feed, x)) for x in xs]
    xs = [norm(model.norm, x) for x in xs]
    out = xs[count:count + n]
    if cfg["emb_dim"]: out = [linear(model.emb_out, x) for x in out]
    return torch.stack([model.head.weight @ x for x in out]), (xs[count + n:] or None, after)


OPTIONS = {
    "paper": dict(),
    "one_token": dict(num_memory_tokens=1, ff_glu=True, emb_dim=4, tie_embeddings=True),
    "hybrid": dict(mem_len=7),
    "short_queue": dict(mem_len=2, num_memory_tokens=4),
    "read_only": dict(read_only=True),
    "read_only_hybrid": dict(read_only=True, mem_len=4),
}


def build(**options):
    torch.manual_seed(0)
    options = dict(num_memory_tokens=3) | options
    model = RecurrentMemoryTransformer(11, 6, 2, heads=3, seq_len=5, **options).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_loop(options):
    """Three ragged rows, four segments of odd lengths, a pause and a reset on the way."""
    model = build(**options)
    lengths = [[5, 3, 4], [1, 5, 0], [4, 5, 2], [2, 1, 2]]   # tokens of each row in each segment
    starts = {2: [1]}                                        # rows that begin a document
    fresh = lambda: (None, [[] for _ in model.layers])
    torch.manual_seed(1)
    memory, past, loss, loss_oracle = None, [fresh() for _ in range(3)], 0, 0
    for s, counts in enumerate(lengths):
        tokens, mask = torch.randint(11, (3, 5)), torch.arange(5) < torch.tensor(counts)[:, None]
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
            mem, queues = past[r]
            assert memory.fill[r] == (0 if mem is None else len(mem))
            if mem is not None: close(memory.mem[r], torch.stack(mem))
            for layer, queue in enumerate(queues):
                assert memory.queue_fill[r] == len(queue)
                if queue: close(memory.queue[r, layer, -len(queue):], torch.stack(queue))
    params = dict(model.named_parameters())
    grads, wants = (torch.autograd.grad(x, list(params.values()), allow_unused=True)
                    for x in (loss, loss_oracle))
    for name, p, a, b in zip(params, params.values(), grads, wants):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        close(a, b, msg=lambda m, name=name: f"{name}: {m}")
