"""Transformer-XL against an independent loop in float64: outputs, memories and gradients.

The oracle reads one row, one token, one head and one key at a time, straight from the equations of
Dai et al. (2019). It shares nothing with the package but the parameters.
"""
import math

import pytest
import torch
from scalars import feed, linear, norm, sinusoid

from memformers import TransformerXL, carry, reset

close = torch.testing.assert_close


def bucket(distance, buckets=32, far=128):
    exact = buckets // 2
    if distance < exact: return distance
    step = math.log(distance / exact) / math.log(far / exact) * (buckets - exact)
    return min(buckets - 1, exact + int(step))


def score(layer, q, k, head, distance, model):
    """Equation (2) for one query, one key, one head."""
    positions, d = layer.positions, len(q)
    if model.config()["positions"] == "t5":
        return q @ k / math.sqrt(d) + positions.bias.weight[bucket(distance), head]
    clamp = model.config()["clamp_len"]
    if clamp is not None: distance = min(distance, clamp)
    r = (positions.to_r.weight @ sinusoid(distance, model.dim))[head * d:(head + 1) * d]
    u, v = positions.content_bias[head, 0], positions.position_bias[head, 0]
    return ((q + u) @ k + (q + v) @ r) / math.sqrt(d)


def attend(model, layer, states, remembered, window):
    """What each token of the segment reads: `states` of the segment after those `remembered`."""
    h, out = layer.heads, []
    wq = layer.to_q.weight
    d = len(wq) // h
    wk, wv = layer.to_kv.weight.split(len(wq))
    context = remembered + states
    for i, x in enumerate(states):
        place, heads = len(remembered) + i, []
        for head in range(h):
            rows = slice(head * d, (head + 1) * d)
            near = [j for j in range(place + 1) if window is None or place - j < window]
            s = torch.stack([score(layer, wq[rows] @ x, wk[rows] @ context[j], head, place - j,
                                   model) for j in near])
            w = (s - s.max()).exp()
            w = w / w.sum()
            heads.append(sum(w[a] * (wv[rows] @ context[j]) for a, j in enumerate(near)))
        out.append(layer.to_out.weight @ torch.cat(heads))
    return out


def oracle(model, tokens, memory):
    """Read the tokens of one row; `memory` is a list of past states for each memory layer."""
    cfg, m = model.config(), model.mem_len
    xs = [model.embedding.weight[t] for t in tokens]
    if cfg["emb_dim"]: xs = [linear(model.emb_in, x) for x in xs]
    after, slot = [], 0
    for number, layer in enumerate(model.layers, 1):
        remembers, before = number in model.memory_layers, xs
        past = memory[slot] if remembers else []
        prepare = (lambda x: x) if cfg["post_norm"] else (lambda x: norm(layer.norm_attention, x))
        window = m if cfg["same_length"] and remembers else None
        read = attend(model, layer, [prepare(x) for x in xs], [prepare(x) for x in past], window)
        xs = [x + y for x, y in zip(xs, read)]
        if cfg["post_norm"]:
            xs = [norm(layer.norm_attention, x) for x in xs]
            xs = [norm(layer.norm_feed, x + feed(layer.feed_forward, x)) for x in xs]
        else: xs = [x + feed(layer.feed_forward, norm(layer.norm_feed, x)) for x in xs]
        if remembers:
            queue = past + (xs if cfg["enhanced_recurrence"] else before)
            after.append(queue[len(queue) - m:] if len(queue) > m else queue)
            slot += 1
    if not cfg["post_norm"]: xs = [norm(model.norm, x) for x in xs]
    if cfg["emb_dim"]: xs = [linear(model.emb_out, x) for x in xs]
    return torch.stack([model.head.weight @ x for x in xs]), after


OPTIONS = {
    "paper": dict(post_norm=True),
    "default": dict(),
    "t5": dict(positions="t5", ff_glu=True),
    "chosen_layers": dict(memory_layers=[1, 3], clamp_len=3),
    "enhanced": dict(enhanced_recurrence=True, emb_dim=4, tie_embeddings=True),
    "same_length": dict(same_length=True),
    "window_shorter_than_the_segment": dict(same_length=True, mem_len=2),
    "one_pair_of_biases": dict(shared_biases=True),
    "no_memory": dict(mem_len=0),
    "no_memory_layer": dict(memory_layers=[]),
}


def build(**options):
    torch.manual_seed(0)
    model = TransformerXL(11, 6, 3, heads=3, seq_len=5, **({"mem_len": 7} | options)).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_loop(options):
    """Three ragged rows, four segments of odd lengths, a reset on the way."""
    model = build(**options)
    lengths = [[5, 3, 5], [1, 5, 0], [4, 5, 2], [5, 1, 5]]   # tokens of each row in each segment
    starts = {2: [1]}                                        # rows that begin a document
    torch.manual_seed(1)
    memory, layers = None, len(model.memory_layers)
    past = [[[] for _ in range(layers)] for _ in range(3)]
    loss, loss_oracle = 0, 0
    for s, counts in enumerate(lengths):
        tokens = torch.randint(11, (3, 5))
        mask = torch.arange(5) < torch.tensor(counts)[:, None]
        if s in starts:
            memory = reset(memory, torch.tensor([r in starts[s] for r in range(3)]))
            for r in starts[s]: past[r] = [[] for _ in range(layers)]
        out = model.step(tokens, memory, mask)
        memory = carry(out.memory, grad=True)
        loss = loss + out.logits[mask].square().sum()
        for r, count in enumerate(counts):
            if count == 0: continue
            want, past[r] = oracle(model, tokens[r, :count].tolist(), past[r])
            close(out.logits[r, :count], want)
            loss_oracle = loss_oracle + want.square().sum()
            for layer, queue in enumerate(past[r]):
                assert memory.fill[r] == len(queue)
                if queue: close(memory.mem[r, layer, model.mem_len - len(queue):],
                                torch.stack(queue))
    params = [p for p in model.parameters()]
    grads, wants = (torch.autograd.grad(x, params, allow_unused=True) for x in (loss, loss_oracle))
    for (name, _), a, b in zip(model.named_parameters(), grads, wants):
        # A part that the options leave unused gets a zero here and nothing there.
        zero = torch.zeros(())
        close(zero if a is None else a, zero.expand_as(a) if b is None else b,
              msg=lambda m, name=name: f"{name}: {m}", check_dtype=False)


def test_a_longer_memory_at_evaluation():
    model = build()
    tokens = torch.randint(11, (1, 20))
    memory, past = model.init_memory(1, mem_len=13), [[] for _ in range(3)]
    model.mem_len = 13   # for the oracle alone: the model reads the size off the memory
    for cut in tokens.split(5, dim=1):
        out = model.step(cut, memory)
        want, past = oracle(model, cut[0].tolist(), past)
        close(out.logits[0], want)
        memory = carry(out.memory)
