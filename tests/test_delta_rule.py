"""The chunkwise delta rule against a loop over single numbers in float64: outputs, memories, gradients."""
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from memformers import delta_rule as module
from memformers.delta_rule import delta_rule

close = torch.testing.assert_close
NAMES = ("q", "k", "v", "beta", "g", "state")


def inputs(n=11, b=2, h=2, dk=3, dv=4, gates=1.0, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    q, k = torch.randn(2, b, h, n, dk, dtype=dtype)
    return dict(q=q, k=F.normalize(k, dim=-1), v=torch.randn(b, h, n, dv, dtype=dtype),
                beta=torch.rand(b, h, n, dtype=dtype), g=-gates * torch.rand(b, h, n, dtype=dtype),
                state=torch.randn(b, h, dk, dv, dtype=dtype))


def oracle(q, k, v, beta, g=None, state=None):
    """One row, one head, one token, one entry of the memory at a time, from the definition."""
    (b, h, n, dk), dv = q.shape, v.shape[-1]
    zero, out, after = q.new_zeros(()), [], []
    for r in range(b):
        for i in range(h):
            s = [[zero if state is None else state[r, i, x, y] for y in range(dv)]
                 for x in range(dk)]
            for t in range(n):
                fade = 1.0 if g is None else g[r, i, t].exp()
                s = [[fade * cell for cell in line] for line in s]
                known = [sum(k[r, i, t, x] * s[x][y] for x in range(dk)) for y in range(dv)]
                new = [beta[r, i, t] * (v[r, i, t, y] - known[y]) for y in range(dv)]
                s = [[s[x][y] + k[r, i, t, x] * new[y] for y in range(dv)] for x in range(dk)]
                out += [sum(q[r, i, t, x] * s[x][y] for x in range(dk)) for y in range(dv)]
            after += [cell for line in s for cell in line]
    shape = lambda cells, *size: torch.stack(cells).view(size) if cells else v.new_zeros(size)
    return shape(out, b, h, n, dv), shape(after, b, h, dk, dv)


def gradients(call, given):
    given = {name: t.clone().requires_grad_() for name, t in given.items()}
    out, state = call(**given)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out)).sum() + state.square().sum()
    return torch.autograd.grad(loss, list(given.values()), allow_unused=True)


@pytest.mark.parametrize("n, chunk", [(1, 4), (2, 1), (5, 5), (7, 3), (8, 4), (6, 64)])
@pytest.mark.parametrize("without", [(), ("g", "state")], ids=["all", "without"])
def test_equals_the_loop(n, chunk, without):
    given = {name: t for name, t in inputs(n).items() if name not in without}
    out, state = delta_rule(**given, chunk=chunk)
    want, want_state = oracle(**given)
    close(out, want)
    close(state, want_state)
    grads = gradients(lambda **x: delta_rule(**x, chunk=chunk), given), gradients(oracle, given)
    for name, a, b in zip(given, *grads): close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_gradients_against_differences(chunk):
    given = inputs(5, b=1, h=1, dk=2, dv=3)
    call = lambda *x: delta_rule(*x, chunk=chunk)
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in given.values()])


def test_no_tokens():
    given = inputs(0)
    out, state = delta_rule(**given)
    assert out.shape == (2, 2, 0, 4) and torch.equal(state, given["state"])
    assert not delta_rule(**given | dict(state=None))[1].any()


def test_a_text_may_be_cut_anywhere():
    given = inputs(23)
    whole, end = delta_rule(**given, chunk=4)
    for sizes in ([1] * 23, [5, 18], [0, 3, 0, 20]):
        state, outs, at = given["state"], [], 0
        for size in sizes:
            part = {name: t[:, :, at:at + size] for name, t in given.items() if name != "state"}
            out, state = delta_rule(**part, state=state, chunk=4)
            outs.append(out)
            at += size
        close(torch.cat(outs, 2), whole)
        close(state, end)


def test_nothing_sees_the_future_and_rows_are_isolated():
    given = inputs(12)
    out, state = delta_rule(**given, chunk=5)
    for name in NAMES[:5]:
        changed = given[name].clone()
        changed[1, 1, 7] += .5 if name != "g" else -.5
        other, after = delta_rule(**given | {name: changed}, chunk=5)
        same = torch.ones_like(out, dtype=torch.bool)
        same[1, 1, 7:] = False
        assert torch.equal(out[same], other[same]) and not torch.allclose(out[1, 1, 7], other[1, 1, 7])
        assert torch.equal(state[0], after[0]) and torch.equal(state[1, 0], after[1, 0])


def test_padding_leaves_the_memory_alone():
    given, real = inputs(12), torch.ones(2, 12, dtype=torch.bool)
    real[0, 5:] = False
    real[1, [0, 3, 4, 11]] = False
    masked = {name: given[name].masked_fill(~real[:, None], 0) for name in ("beta", "g")}
    out, state = delta_rule(**given | masked, chunk=4)
    for r in range(2):
        row = {name: t[r:r + 1] if name == "state" else t[r:r + 1, :, real[r]]
               for name, t in given.items()}
        alone, after = delta_rule(**row, chunk=4)
        close(out[r:r + 1, :, real[r]], alone)
        close(state[r:r + 1], after)


@pytest.mark.parametrize("at", [0, 3, 4, 7, 11])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_gate_of_minus_infinity_begins_anew(at, chunk):
    """Row 1 begins a document at a token: it reads as if it had begun there, in the gradient too."""
    given = inputs(12)
    given["g"][1, :, at] = -math.inf
    out, state = delta_rule(**given, chunk=chunk)
    row = {name: t[1:, :, at:] for name, t in given.items() if name != "state"}
    row["g"] = row["g"].clone()
    row["g"][:, :, 0] = 0
    alone, after = delta_rule(**row, chunk=chunk)
    close(out[1:, :, at:], alone)
    close(state[1:], after)
    grads = dict(zip(NAMES, gradients(lambda **x: delta_rule(**x, chunk=chunk), given)))
    assert all(g.isfinite().all() for g in grads.values())
    if at: return
    assert not grads["state"][1].any() and grads["state"][0].all()
    for name, wanted in zip(NAMES, gradients(oracle, given)): close(grads[name], wanted)


@pytest.mark.parametrize("gates", [1e-3, 30.0, 1e3, 1e8])
def test_strong_gates(gates):
    """No overflow, no underflow that spoils what comes after, no NaN; float32 as good as it can be."""
    given = inputs(40, gates=gates, dtype=torch.float32)
    given["g"][:, :, ::3] = -.1
    out, state = delta_rule(**given, chunk=16)
    exact = {name: t.double() for name, t in given.items()}
    want, want_state = delta_rule(**exact, chunk=1)
    close(out, want.float(), rtol=1e-4, atol=1e-5)
    close(state, want_state.float(), rtol=1e-4, atol=1e-5)
    grads = zip(gradients(lambda **x: delta_rule(**x, chunk=16), given),
                gradients(lambda **x: delta_rule(**x, chunk=1), exact))
    for a, b in grads: close(a, b.float(), rtol=1e-3, atol=1e-4)


def test_long_texts_stay_exact():
    given = inputs(3000, b=1, h=1, gates=.01, dtype=torch.float32)
    out, state = delta_rule(**given)
    want, after = delta_rule(**{name: t.double() for name, t in given.items()}, chunk=7)
    close(out, want.float(), rtol=1e-4, atol=1e-5)
    close(state, after.float(), rtol=1e-4, atol=1e-5)


def test_the_newest_value_is_read_exactly():
    given = inputs(9)
    given |= dict(beta=torch.ones_like(given["beta"]), q=given["k"])
    close(delta_rule(**given, chunk=4)[0], given["v"])


@pytest.mark.parametrize("n", [1, 9])
def test_the_memory_is_float32(n):
    given = inputs(n, dtype=torch.float32)
    want, after = delta_rule(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16): out, state = delta_rule(**given)
    assert torch.equal(out, want) and torch.equal(state, after)
    half = {name: t if name == "state" else t.bfloat16() for name, t in given.items()}
    out, state = delta_rule(**half)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    close(state, delta_rule(**{name: t.float() for name, t in half.items()})[1])
    assert delta_rule(**inputs(n) | dict(state=None))[1].dtype == torch.float64


def fla_like(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    """A stand-in with the signature and the layout of flash-linear-attention's kernel."""
    assert g.isfinite().all() and g.dtype == torch.float32 and output_final_state
    first = lambda t: t.transpose(1, 2)
    scale = q.shape[-1] ** -.5 if scale is None else scale
    out, state = oracle(first(q) * scale, *map(first, (k, v, beta, g)), initial_state)
    return first(out), state


@pytest.mark.parametrize("gates", [True, False])
def test_how_the_kernel_is_called(gates):
    given = inputs(5)
    given["g"][1, :, 2] = -math.inf
    if not gates: given["g"] = None
    out, state = module._kernel(fla_like, *given.values())
    want, want_state = delta_rule(**given)
    close(out, want, rtol=1e-5, atol=1e-6)
    close(state, want_state, rtol=1e-5, atol=1e-6)


def test_without_the_kernel(monkeypatch):
    module._fla.cache_clear()
    try:
        monkeypatch.setitem(sys.modules, "fla", None)
        assert module._fla() is None
        module._fla.cache_clear()
        there = types.SimpleNamespace(chunk_gated_delta_rule=fla_like)
        for name in ("fla", "fla.ops"): monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", there)
        assert module._fla() is fla_like
    finally: module._fla.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("gates", [True, False])
def test_the_kernel_gives_the_same_numbers(gates):
    pytest.importorskip("fla")
    given = {name: t.cuda() for name, t in inputs(150, dk=64, dv=64, dtype=torch.float32).items()}
    given |= {name: given[name].bfloat16() for name in "qkv"}
    given["state"] = given["state"] / 8
    given["g"][1, :, 70] = -math.inf
    if not gates: del given["g"]
    exact = {name: t.double() for name, t in given.items()}
    with torch.no_grad(): (out, state), (want, after) = delta_rule(**given), delta_rule(**exact)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    near = lambda a, b: (a.double() - b).norm() / b.norm()
    assert near(out, want) < .02 and near(state, after) < .02
    for a, b in zip(gradients(delta_rule, given), gradients(delta_rule, exact)): assert near(a, b) < .05
