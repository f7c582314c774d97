"""The Compressive Transformer against an independent loop in float64.

The oracle reads one row, one token, one head and one key at a time. Each state carries the number
of its token, so distances are differences of numbers. It shares nothing with the package but the
parameters: outputs, memories, the auxiliary loss and all gradients are compared.
"""
import math

import pytest
import torch
from scalars import feed, linear, sigmoid, softmax

from memformers import CompressiveTransformer, carry, reset

close = torch.testing.assert_close


def norm(module, x, frozen=False):
    w, b = module.weight, module.bias
    if frozen: w, b = w.detach(), b.detach()
    x = x - x.mean()
    return x / (x.square().mean() + module.eps).sqrt() * w + b


def join(residual, kind, new, state, relu):
    """The stream after a part said `new`."""
    if relu: new = new.clamp(min=0)
    if residual.gate is None: return state + new
    if residual.mogrify is not None:
        m = residual.mogrify
        low = lambda pair, x: linear(pair[1], linear(pair[0], x))
        new = 2 * sigmoid(low(m.to_new, state)) * new
        state = 2 * sigmoid(low(m.to_state, new)) * state
        new = 2 * sigmoid(low(m.to_new, state)) * new
        state = 2 * sigmoid(low(m.to_state, new)) * state
        new = 2 * sigmoid(low(m.to_new, state)) * new
    gate, d = residual.gate, len(state)
    if kind in ("input", "output", "highway", "sigtanh"):
        w, b = gate.to_gate.weight, gate.bias
        if kind == "input": return sigmoid(w @ state + b) * state + new
        if kind == "output": return state + sigmoid(w @ state - b) * new
        if kind == "sigtanh":
            return state + sigmoid(w @ new - b) * torch.tanh(gate.candidate.weight @ new)
        z = sigmoid(w @ state + b)
        return z * state + (1 - z) * new
    first, second, third = (gate.of_new.weight[i * d:(i + 1) * d] @ new + gate.bias[i * d:(i + 1) * d]
                            for i in range(3))
    if kind == "brc": own = [gate.own[0] * state, gate.own[1] * state]
    else: own = [gate.of_state.weight[:d] @ state, gate.of_state.weight[d:] @ state]
    if kind == "gru":
        r, z = sigmoid(first + own[0]), sigmoid(second + own[1])
        return z * state + (1 - z) * torch.tanh(third + r * linear(gate.candidate, state))
    a, c = 1 + torch.tanh(first + own[0]), sigmoid(second + own[1])
    return c * state + (1 - c) * torch.tanh(third + a * state)


def split(layer, dim):
    return layer.to_q.weight, layer.to_kv.weight[:dim], layer.to_kv.weight[dim:]


def attend(model, layer, states, front, now):
    """What each token reads; `front` are pairs (token number, state); also what each key received."""
    dim, h = model.dim, layer.heads
    d = dim // h
    wq, wk, wv = split(layer, dim)
    table = model.positions.vectors
    known = table.shape[-1]
    line = front + [(now + i, x) for i, x in enumerate(states)]
    normed = [(t, norm(layer.norm_attention, x)) for t, x in line]
    out, received = [], [[] for _ in line]
    for i in range(len(states)):
        place, heads = len(front) + i, []
        for head in range(h):
            rows = slice(head * d, (head + 1) * d)
            q = wq[rows] @ normed[place][1]
            scores = []
            for t, x in normed[:place + 1]:
                vector = table[head, :, known - 1 - (now + i - t)]
                scores.append(q @ (wk[rows] @ x + vector) / math.sqrt(d))
            w = softmax(scores)
            for j, share in enumerate(w): received[j].append(share / h)
            heads.append(sum(w[j] * (wv[rows] @ x) for j, (_, x) in enumerate(normed[:place + 1])))
        out.append(layer.to_out.weight @ torch.cat(heads))
    usage = [sum(r) / (len(r) // h) for r in received]
    return out, usage


def compress(model, compress, group, following, usage):
    """One slot from a group of states."""
    kind = model.compression
    if kind == "mean": return sum(group) / len(group)
    if kind == "max": return torch.stack(group).max(0).values
    if kind == "most_used": return group[max(range(len(group)), key=lambda i: usage[i].item())]
    if kind == "dilated": group = (group + following)[::2]
    kernel, dim = compress.kernel, model.dim
    return kernel.bias + sum(kernel.weight[:, i * dim:(i + 1) * dim] @ x for i, x in enumerate(group))


def read_frozen(model, layer, x, contents):
    """Attention by contents alone, with weights that get no gradient: (dim,) before the output."""
    dim, h = model.dim, layer.heads
    d = dim // h
    wq, wk, wv = (w.detach() for w in split(layer, dim))
    q = wq @ norm(layer.norm_attention, x, True).detach()
    out = []
    for head in range(h):
        rows = slice(head * d, (head + 1) * d)
        w = softmax([q[rows] @ (wk[rows] @ c) / math.sqrt(d) for c in contents])
        out.append(sum(a * (wv[rows] @ c) for a, c in zip(w, contents)))
    return torch.cat(out)


def aux_attention(model, layer, xs, leaving, slots):
    contents = [norm(layer.norm_attention, s.detach(), True) for s in leaving]
    short = [norm(layer.norm_attention, s, True) for s in slots]
    errors = [(read_frozen(model, layer, x, short) - read_frozen(model, layer, x, contents).detach())
              .square().mean() for x in xs]
    return sum(errors) / len(errors)


def aux_decoding(model, layer, compress, groups, slots):
    errors = []
    for group, slot in zip(groups, slots):
        decoded = linear(compress.decoder, slot).view(len(group), model.dim)
        errors += [(y - norm(layer.norm_attention, x.detach(), True)).square().mean()
                   for x, y in zip(group, decoded)]
    return sum(errors) / len(errors)


def oracle(model, tokens, past, now):
    """Read the tokens of one row. `past`: for each memory layer (cmem, mem), lists of (number, state)."""
    cfg = model.config()
    kind = cfg["gate"] if cfg["gru_gated_residual"] else None
    relu = cfg["gate_relu"]
    xs = [model.embedding.weight[t] for t in tokens]
    if cfg["emb_dim"]: xs = [linear(model.emb_in, x) for x in xs]
    ratio, losses, after, slot = model.cmem_ratio, [], [], 0
    for number, layer in enumerate(model.layers, 1):
        remembers, before = number in model.memory_layers, xs
        cmem, mem = past[slot] if remembers else ([], [])
        read, usage = attend(model, layer, xs, cmem + mem, now)
        xs = [join(layer.join_attention, kind, y, x, relu) for x, y in zip(xs, read)]
        xs = [join(layer.join_feed, kind, feed(layer.feed_forward, norm(layer.norm_feed, x)), x,
                   relu) for x in xs]
        if not remembers: continue
        written = xs if cfg["enhanced_recurrence"] else before
        line = mem + [(now + i, x) for i, x in enumerate(written)]
        usage = usage[len(cmem):]
        groups, made, wants = [], [], []
        while len(line) - ratio >= model.mem_len:
            group, line = line[:ratio], line[ratio:]
            if not model.cmem_len: continue
            f = model.compress[slot]
            following = [x for _, x in line[:ratio - 1]]
            args = [x for _, x in group], following, usage[:ratio]
            usage = usage[ratio:]
            made.append((group[-1][0], compress(model, f, *args)))
            wants.append(compress(model, f, [x.detach() for x in args[0]],
                                  [x.detach() for x in following], args[2]))
            groups.append(args[0])
        if made and model.aux == "attention":
            leaving = [x for g in groups for x in g]
            losses.append(aux_attention(model, layer, [x.detach() for x in before], leaving, wants))
        elif made: losses.append(aux_decoding(model, layer, model.compress[slot], groups, wants))
        cmem = cmem + made
        after.append((cmem[max(0, len(cmem) - model.cmem_len):], line))
        slot += 1
    xs = [norm(model.norm, x) for x in xs]
    if cfg["emb_dim"]: xs = [linear(model.emb_out, x) for x in xs]
    aux = sum(losses) / len(model.memory_layers) * cfg["reconstruction_loss_weight"] if losses else 0
    return torch.stack([model.head.weight @ x for x in xs]), after, aux


OPTIONS = {
    "default": dict(),
    "ratio_2": dict(cmem_ratio=2, cmem_len=3, mem_len=3),
    "ratio_4_short_memory": dict(cmem_ratio=4, cmem_len=2, mem_len=2, gru_gated_residual=False),
    "one_slot_for_one": dict(cmem_ratio=1, cmem_len=5, mem_len=4, enhanced_recurrence=False),
    "long_memory": dict(cmem_ratio=2, cmem_len=4, mem_len=9, memory_layers=[2], emb_dim=4),
    "mean_decoded": dict(compression="mean", aux="autoencoding", reconstruction_loss_weight=0.5),
    "max_mogrified": dict(compression="max", mogrify_gru=True),
    "dilated": dict(compression="dilated", gate="brc", ff_glu=True),
    "most_used": dict(compression="most_used", gate="nbrc", mem_len=4),
    "most_used_at_once": dict(compression="most_used", cmem_ratio=3, cmem_len=3, mem_len=0),
    "most_used_of_two": dict(compression="most_used", cmem_ratio=2, cmem_len=3, mem_len=2,
                             memory_layers=[1]),
    "input_gate": dict(gate="input", gate_relu=True),
    "output_gate": dict(gate="output"),
    "highway": dict(gate="highway"),
    "sigtanh": dict(gate="sigtanh", gate_relu=True),
    "decoded": dict(aux="autoencoding", tie_embeddings=True),
    "nothing_compressed": dict(cmem_len=0),
    "no_memory": dict(mem_len=0, cmem_len=0),
    "slots_only": dict(mem_len=0, cmem_len=3),
    "no_memory_layer": dict(memory_layers=[]),
}


def build(**options):
    torch.manual_seed(0)
    sizes = dict(num_tokens=11, dim=6, seq_len=5, depth=2, heads=3, mem_len=5, cmem_len=2,
                 cmem_ratio=3)
    model = CompressiveTransformer(**(sizes | options)).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    return model


def compare(memory, r, past, model):
    """The memory of row `r` against the oracle's."""
    for layer, (cmem, mem) in enumerate(past):
        for slots, count, want in ((memory.cmem, memory.cfill, cmem), (memory.mem, memory.fill, mem)):
            held, room = slots[r, layer], slots.shape[2]
            assert count[r] == len(want)
            assert not held[:room - len(want)].any()
            if want: close(held[room - len(want):], torch.stack([x for _, x in want]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "even"])
def test_equals_the_loop(options, ragged):
    """Segments of odd lengths, ragged rows, a pause and a reset on the way, graph kept throughout."""
    model = build(**options)
    lengths = [[5, 3], [1, 5], [5, 0], [4, 5], [5, 5]] if ragged else [[5, 5], [4, 4], [5, 5], [3, 3]]
    starts = {3: [1]} if ragged else {}
    torch.manual_seed(1)
    memory, layers = None, len(model.memory_layers)
    past, now = [[([], [])] * layers for _ in range(2)], [0, 0]
    loss, want_loss = 0, 0
    for s, counts in enumerate(lengths):
        n = max(counts)
        tokens, mask = torch.randint(11, (2, n)), torch.arange(n) < torch.tensor(counts)[:, None]
        for r in starts.get(s, []):
            memory = reset(memory, torch.arange(2) == r)
            past[r] = [([], [])] * layers
        out = model.step(tokens, memory, mask if ragged else None)
        memory = carry(out.memory, grad=True)
        loss = loss + out.logits[mask].square().sum() + 3 * out.aux_loss
        aux = 0
        for r, count in enumerate(counts):
            if count == 0: continue
            want, past[r], row_aux = oracle(model, tokens[r, :count].tolist(), past[r], now[r])
            now[r] += count
            close(out.logits[r, :count], want)
            want_loss, aux = want_loss + want.square().sum(), aux + row_aux / 2
            compare(memory, r, past[r], model)
        close(out.aux_loss, torch.as_tensor(aux, dtype=torch.float64))
        want_loss = want_loss + 3 * aux
    params = list(model.parameters())
    grads, wants = (torch.autograd.grad(x, params, allow_unused=True) for x in (loss, want_loss))
    for (name, p), a, b in zip(model.named_parameters(), grads, wants):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        close(a, b, msg=lambda m, name=name: f"{name}: {m}")
