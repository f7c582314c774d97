"""The gated delta net against an independent loop in float64: outputs, memories and gradients.

The oracle reads one row, one token and one head at a time, and convolves one channel at a time,
straight from the equations of Yang et al. (2025). It shares nothing with the package but the
parameters.
"""
import math

import pytest
import torch
from scalars import gelu, linear, norm, silu, unit

from memformers import GatedDeltaNet, carry, reset
from memformers.generate import Reader

close = torch.testing.assert_close


def feed(f, x):
    x = linear(f.expand, x)
    x = x[:len(x) // 2] * gelu(x[len(x) // 2:]) if f.glu else gelu(x)
    return linear(f.contract, x)


def read(layer, x, states, past, most):
    """One token through one layer; `past` holds the inputs of its convolution so far."""
    h, dk, dv = layer.heads, layer.dk, layer.dv
    n = norm(layer.norm, x)
    past.append(layer.to_qkv.weight @ n)
    channels = []
    for c in range(h * (2 * dk + dv)):
        total = 0
        for back in range(4):
            if back < len(past): total = total + layer.conv[c, 3 - back] * past[-1 - back][c]
        channels.append(silu(total))
    channels, both, out = torch.stack(channels), layer.to_gates.weight @ n, []
    for i in range(h):
        q = unit(channels[i * dk:(i + 1) * dk]) / math.sqrt(dk)
        k = unit(channels[(h + i) * dk:(h + i + 1) * dk])
        v = channels[2 * h * dk + i * dv:2 * h * dk + (i + 1) * dv]
        beta = most / (1 + (-both[i]).exp())
        alpha = (-layer.log_a[i].exp() * (1 + (both[h + i] + layer.dt[i]).exp()).log()).exp()
        s = alpha * states[i]
        states[i] = s + beta * torch.outer(k, v - s.T @ k)
        o = states[i].T @ q
        out.append(o / (o.square().mean() + 1e-6).sqrt() * layer.norm_state.weight)
    gate = silu(layer.to_gate.weight @ n)
    x = x + layer.to_out.weight @ (torch.cat(out) * gate)
    return x + feed(layer.feed_forward, norm(layer.norm_feed, x))


def run(model, text):
    """Logits of one row, and for each layer the matrices of its heads and all inputs so far."""
    most = 2. if model.config()["negative_eigenvalues"] else 1.
    memory = [([torch.zeros(l.dk, l.dv).double() for _ in range(l.heads)], []) for l in model.layers]
    logits = []
    for token in text:
        x = linear(model.emb_in, model.embedding.weight[token]) \
            if isinstance(model.emb_in, torch.nn.Linear) else model.embedding.weight[token]
        for layer, (states, past) in zip(model.layers, memory):
            x = read(layer, x, states, past, most)
        x = norm(model.norm, x)
        if isinstance(model.emb_out, torch.nn.Linear): x = linear(model.emb_out, x)
        logits.append(linear(model.head, x))
    return torch.stack(logits), memory


def make(**options):
    torch.manual_seed(3)
    model = GatedDeltaNet(**(dict(num_tokens=11, dim=6, depth=2, heads=2, seq_len=5) | options)).double()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    return model.eval()


OPTIONS = pytest.mark.parametrize("options", [
    {}, dict(negative_eigenvalues=True, expand_v=2, dim_head=2),
    dict(heads=3, depth=1, ff_glu=True, emb_dim=4, tie_embeddings=True)])


@OPTIONS
@pytest.mark.parametrize("cuts", [(5, 5, 3), (1, 2, 1, 4, 5), (5, 1, 1, 5, 1)])
def test_outputs_memories_and_gradients(options, cuts):
    """In segments of any length, those shorter than the convolution included."""
    model = make(**options)
    text = torch.randint(11, (2, 13), generator=torch.Generator().manual_seed(0))
    memory, logits = None, []
    for cut in text.split(cuts, 1):
        out = model.step(cut, memory)
        logits.append(out.logits)
        memory = carry(out.memory, grad=True)
    logits = torch.cat(logits, 1)
    seed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    whole = [run(model, row) for row in text]
    right = torch.stack([r[0] for r in whole])
    close(logits, right)
    for b, (_, layers) in enumerate(whole):
        for i, (states, past) in enumerate(layers):
            close(memory.state[b, i], torch.stack(states))
            close(memory.tail[b, i], torch.stack(past[-3:]))
    weights = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad((x * seed).sum(), weights)
                              for x in (logits, right))): close(ours, theirs)


@OPTIONS
def test_ragged_rows_and_padding(options):
    """Rows of different lengths, with padding anywhere, and one that is reset."""
    model = make(**options)
    text = torch.randint(11, (4, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[0, 2:4], mask[1, :4], mask[2, 7:], mask[3, 1:5] = False, False, False, False
    first = model.step(text[:, :5], None, mask[:, :5])
    memory = reset(carry(first.memory), torch.tensor([False, False, True, False]))
    second = model.step(text[:, 5:], memory, mask[:, 5:])
    for row in (0, 1, 3):
        logits, layers = run(model, text[row][mask[row]])
        close(torch.cat([first.logits[row], second.logits[row]])[mask[row]], logits)
        close(second.memory.state[row], torch.stack([torch.stack(s) for s, _ in layers]))
        close(second.memory.tail[row], torch.stack([torch.stack(past[-3:]) for _, past in layers]))
    logits, layers = run(model, text[2, 5:7])
    close(second.logits[2, :2], logits)
    close(second.memory.tail[2, :, 1:], torch.stack([torch.stack(past) for _, past in layers]))
    assert not second.memory.tail[2, :, 0].any()


def test_generation_keeps_the_tail():
    model = make()
    text = torch.randint(11, (1, 12), generator=torch.Generator().manual_seed(4))
    reader = Reader(model)
    close(torch.cat([reader.read(t) for t in text.split(1, 1)]), run(model, text[0])[0])
