"""The Memory Transformer-XL against an independent loop in float64.

The oracle reads one row, one token, one head and one key at a time, and writes one slot, one head
and one feature at a time. It shares nothing with the package but the parameters: outputs, both
memories and all gradients, through the memory too, are compared.
"""
import math

import pytest
import torch
from scalars import feed, linear, norm, sigmoid, softmax

from memformers import MemoryTransformerXL, carry, reset

close = torch.testing.assert_close


def join(residual, kind, new, state):
    if residual.gate is None: return state + new
    if residual.mogrify is not None:
        m = residual.mogrify
        low = lambda pair, x: linear(pair[1], linear(pair[0], x))
        for i in range(5):
            if i in (0, 2, 4): new = 2 * sigmoid(low(m.to_new, state)) * new
            else: state = 2 * sigmoid(low(m.to_state, new)) * state
    gate, d = residual.gate, len(state)
    first, second, third = (gate.of_new.weight[i * d:(i + 1) * d] @ new + gate.bias[i * d:(i + 1) * d]
                            for i in range(3))
    if kind == "brc": own = [gate.own[0] * state, gate.own[1] * state]
    else: own = [gate.of_state.weight[:d] @ state, gate.of_state.weight[d:] @ state]
    if kind == "gru":
        r, z = sigmoid(first + own[0]), sigmoid(second + own[1])
        return z * state + (1 - z) * torch.tanh(third + r * linear(gate.candidate, state))
    a, c = 1 + torch.tanh(first + own[0]), sigmoid(second + own[1])
    return c * state + (1 - c) * torch.tanh(third + a * state)


def attend(model, layer, states, short, long):
    """What each token of the segment reads."""
    h, g = layer.heads, layer.kv_heads
    d = model.dim // h
    wq, (wk, wv) = layer.to_q.weight, layer.to_kv.weight.split(g * d)
    table = model.positions.vectors
    placed = [norm(layer.norm_attention, x) for x in short + states]
    slots = [norm(layer.norm_attention, x) for x in long]
    out = []
    for i in range(len(states)):
        place, heads = len(short) + i, []
        for head in range(h):
            group = head * g // h
            rows, shared = slice(head * d, (head + 1) * d), slice(group * d, (group + 1) * d)
            q, scores, values = wq[rows] @ placed[place], [], []
            for p in range(model.num_mem_kv):
                scores.append(q @ layer.mem_kv[0, group, p])
                values.append(layer.mem_kv[1, group, p])
            for x in slots:
                scores.append(q @ (wk[shared] @ x))
                values.append(wv[shared] @ x)
            for j, x in enumerate(placed[:place + 1]):
                scores.append(q @ (wk[shared] @ x + table[head, :, table.shape[2] - 1 - place + j]))
                values.append(wv[shared] @ x)
            w = softmax([s / math.sqrt(d) for s in scores])
            heads.append(sum(a * v for a, v in zip(w, values)))
        out.append(layer.to_out.weight @ torch.cat(heads))
    return out


def write(model, long, seen):
    """The long-term slots after a segment; `seen` holds, for each memory layer, its states."""
    writer, dim, cfg = model.writer, model.dim, model.config()
    h = writer.heads
    d = dim // h
    wk, wv = writer.to_kv.weight[:dim], writer.to_kv.weight[dim:]
    states = [norm(writer.norm_states, x) + writer.layer[l, 0]
              for l, layer in enumerate(seen) for x in layer]
    for _ in range(cfg["mem_write_iters"]):
        known = [norm(writer.norm_slots, x) for x in long]
        keys, values = ([w @ x for x in states + known] for w in (wk, wv))
        after = []
        for s, slot in enumerate(long):
            q, heads = writer.to_q.weight @ (known[s] + writer.slot[s]), []
            for head in range(h):
                rows = slice(head * d, (head + 1) * d)
                ks, vs = [k[rows] for k in keys], [v[rows] for v in values]
                for p in range(cfg["num_mem_kv"]):
                    ks.append(writer.mem_kv[0, head, p])
                    vs.append(writer.mem_kv[1, head, p])
                if cfg["mem_attention"] == "full":
                    w = softmax([q[rows] @ k / math.sqrt(d) for k in ks])
                    heads.append(sum(a * v for a, v in zip(w, vs)))
                    continue
                over_features, read = softmax(list(q[rows])), 0
                for feature in range(d):
                    w = softmax([k[feature] for k in ks])
                    read = read + over_features[feature] * sum(a * v for a, v in zip(w, vs))
                heads.append(read)
            after.append(join(writer.join, cfg["gate"], writer.to_out.weight @ torch.cat(heads), slot))
        long = after
    return long


def oracle(model, tokens, short, long):
    """Read the tokens of one row. `short`: a list of states for each memory layer; `long`: slots."""
    cfg = model.config()
    kind = cfg["gate"] if cfg["gru_gated_residual"] else None
    xs = [model.embedding.weight[t] for t in tokens]
    if cfg["emb_dim"]: xs = [linear(model.emb_in, x) for x in xs]
    if long is None and model.writer is not None: long = list(model.writer.initial)
    queues, slot = [], 0
    for number, layer in enumerate(model.layers, 1):
        remembers, before = number in model.memory_layers, xs
        read = attend(model, layer, xs, short[slot] if remembers else [],
                      long or [] if remembers else [])
        xs = [join(layer.join_attention, kind, y, x) for x, y in zip(xs, read)]
        xs = [join(layer.join_feed, kind, feed(layer.feed_forward, norm(layer.norm_feed, x)), x)
              for x in xs]
        if remembers:
            queues.append(short[slot] + before)
            slot += 1
    if model.writer is not None: long = write(model, long, queues)
    xs = [norm(model.norm, x) for x in xs]
    if cfg["emb_dim"]: xs = [linear(model.emb_out, x) for x in xs]
    kept = [q[max(0, len(q) - model.mem_len):] for q in queues]
    return torch.stack([model.head.weight @ x for x in xs]), kept, long


OPTIONS = {
    "default": dict(),
    "gru_full": dict(gate="gru", mem_attention="full", mem_len=3),
    "brc_shared_keys": dict(gate="brc", one_kv_head=True, num_mem_kv=2, emb_dim=4),
    "mogrified": dict(mogrify_gru=True, mem_write_iters=1, mem_heads=1, tie_embeddings=True),
    "chosen_layers": dict(memory_layers=[2], gru_gated_residual=False, ff_glu=True, num_mem_kv=1),
    "long_only": dict(mem_len=0, mem_write_iters=3, mem_heads=2),
    "short_only": dict(lmem_len=0),
    "no_memory_layer": dict(memory_layers=[], num_mem_kv=1),
}


def build(**options):
    torch.manual_seed(0)
    sizes = dict(num_tokens=11, dim=6, seq_len=5, depth=2, heads=3, mem_len=7, lmem_len=2)
    model = MemoryTransformerXL(**(sizes | options)).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    return model


def compare(memory, r, short, long, model):
    for layer, queue in enumerate(short):
        assert memory.fill[r] == len(queue)
        assert not memory.short[r, layer, :model.mem_len - len(queue)].any()
        if queue: close(memory.short[r, layer, model.mem_len - len(queue):], torch.stack(queue))
    if long is not None:
        assert memory.long_fill[r] == len(long)
        close(memory.long[r], torch.stack(long))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "even"])
def test_equals_the_loop(options, ragged):
    """Segments of odd lengths, ragged rows, a pause and a reset on the way, graph kept throughout."""
    model = build(**options)
    lengths = [[5, 3], [1, 5], [5, 0], [4, 5]] if ragged else [[5, 5], [4, 4], [1, 1], [3, 3]]
    starts = {3: [1]} if ragged else {}
    torch.manual_seed(1)
    memory, layers = None, len(model.memory_layers)
    past = [([[]] * layers, None) for _ in range(2)]
    loss, want_loss = 0, 0
    for s, counts in enumerate(lengths):
        n = max(counts)
        tokens, mask = torch.randint(11, (2, n)), torch.arange(n) < torch.tensor(counts)[:, None]
        for r in starts.get(s, []):
            memory = reset(memory, torch.arange(2) == r)
            past[r] = ([[]] * layers, None)
        out = model.step(tokens, memory, mask if ragged else None)
        memory = carry(out.memory, grad=True)
        loss = loss + out.logits[mask].square().sum()
        for r, count in enumerate(counts):
            if count == 0: continue
            want, *past[r] = oracle(model, tokens[r, :count].tolist(), *past[r])
            close(out.logits[r, :count], want)
            want_loss = want_loss + want.square().sum()
            compare(memory, r, *past[r], model)
    params = list(model.parameters())
    grads, wants = (torch.autograd.grad(x, params, allow_unused=True) for x in (loss, want_loss))
    for (name, p), a, b in zip(model.named_parameters(), grads, wants):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        close(a, b, msg=lambda m, name=name: f"{name}: {m}")
