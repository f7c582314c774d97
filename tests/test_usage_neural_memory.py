"""Neural memory: the documented call, the inner descent, and what published code gets wrong."""
import pytest
import torch
import torch.nn.functional as F

from memformers import NeuralMemoryTransformer, carry
from memformers.delta_rule import delta_rule
from memformers.memory import replace
from memformers.neural_memory import error_gradient, network, totals
from memformers.zoo import create

close = torch.testing.assert_close
WIRINGS = pytest.mark.parametrize("wiring", ["layer", "gate", "context"])


def small(**options):
    torch.manual_seed(0)
    return NeuralMemoryTransformer(**(dict(num_tokens=64, dim=32, depth=2, heads=2, seq_len=16) | options))


def text(b, n, seed=0):
    return torch.randint(64, (b, n), generator=torch.Generator().manual_seed(seed))


@WIRINGS
def test_the_documented_call(wiring):
    model = small(wiring=wiring, memory_depth=1)
    logits, memories = model(text(2, 16))
    logits, memories = model(text(2, 5, 1), memories=memories)
    assert logits.shape == (2, 5, 64) and not memories.weights.requires_grad
    assert memories.weights.shape == memories.momentum.shape == (2, 2, 2, 256)
    assert memories.tokens.tolist() == [21, 21]


@WIRINGS
def test_no_gradient_comes_from_later_tokens(wiring):
    """Public code is not causal inside a chunk: gates are means over it."""
    model = small(wiring=wiring).double()
    memory = carry(model.step(text(1, 16)).memory)
    states = []
    hook = model.emb_in.register_forward_hook(
        lambda module, args, out: states.append(out.requires_grad_()) or out)
    logits = model.step(text(1, 16, 1), memory).logits
    hook.remove()
    grad, = torch.autograd.grad(logits[0, 7].square().sum(), states[0])
    assert grad[0, :8].abs().amin(-1).gt(0).all() and not grad[0, 8:].any()


@pytest.mark.parametrize("options, least", [
    (dict(memory_depth=1), .3), (dict(), .1), (dict(wiring="context"), .1),
    (dict(wiring="gate", memory_depth=1), .005)])
def test_a_fresh_model_shows_what_it_has_read(options, least):
    """At least this share of the logits comes from the memory, before any training. A gate that
    multiplies attention lets the least through."""
    model = small(**options).eval()
    memory = None
    with torch.no_grad():
        for cut in text(4, 48).split(16, 1): memory = carry(model.step(cut, memory).memory)
        with_it, without = (model.step(text(4, 16, 1), m).logits
                            for m in (memory, replace(model.init_memory(4), tail=memory.tail)))
    assert (with_it - without).norm() / without.norm() > least


def test_segments_of_any_length_continue():
    """Public code crashes where a carried state meets a segment that is no multiple of the chunk."""
    model, memory = small(), None
    for n in (16, 3, 1, 7, 16):
        out = model.step(text(2, n), memory)
        memory = carry(out.memory)
        assert out.logits.isfinite().all()


def test_one_layer_is_the_delta_rule():
    """Without momentum and decay, token after token, with steps of half of β."""
    torch.manual_seed(0)
    k, v = F.normalize(torch.randn(1, 2, 9, 4), dim=-1).double(), torch.randn(1, 2, 9, 4).double()
    beta = torch.rand(1, 2, 9).double()
    weights, momentum, one = torch.zeros(1, 2, 16).double(), torch.zeros(1, 2, 16).double(), torch.ones(1, 2, 1)
    for t in range(9):
        at = slice(t, t + 1)
        a, b, c, w, s = totals(beta[..., at] / 2, 0 * beta[..., at], 0 * beta[..., at], one)
        step, moved = error_gradient(weights, k[:, :, at], v[:, :, at], [w, s])
        weights, momentum = a * weights + c * momentum - step, b * momentum - moved
    close(weights.view(1, 2, 4, 4), delta_rule(k, k, v, beta)[1])


def test_descent_lowers_the_error():
    torch.manual_seed(0)
    k, v = F.normalize(torch.randn(1, 1, 4, 8), dim=-1), torch.randn(1, 1, 4, 8)
    weights = torch.randn(1, 1, 256) * .02
    before = (network(weights, k) - v).square().sum()
    for _ in range(200): weights = weights - error_gradient(weights, k, v, [torch.full((1, 1, 4), .05)])[0]
    assert (network(weights, k) - v).square().sum() < .05 * before


def test_gates_are_of_single_tokens():
    """What a token is to write depends on nothing after it, and a long text stays finite."""
    model = small(depth=1).eval()
    whole = model.extend(model.begin(model.init_memory(1)), text(1, 16))[1].written[0].data
    half = model.extend(model.begin(model.init_memory(1)), text(1, 16)[:, :8])[1].written[0].data
    close(whole[:, :, :8], half[:, :, :8])
    memory = None
    with torch.no_grad():
        for i in range(64): memory = carry(model.step(text(1, 16, i), memory).memory)
    assert memory.weights.isfinite().all()


def largest_weight(model, letters, segments=10):
    """Of the memory after some segments of a text with so many different tokens."""
    torch.manual_seed(0)
    memory, text = None, torch.randint(letters, (1, segments * model.seq_len))
    with torch.no_grad():
        for part in text.split(model.seq_len, 1): memory = carry(model.step(part, memory).memory)
    return memory.weights.abs().max()


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("letters", [1, 256])
def test_a_fresh_preset_reads_any_text_for_long(size, letters):
    """Also one that repeats a single token, whose steps of the inner descent all add up."""
    torch.manual_seed(0)
    assert largest_weight(create(f"neural_memory_{size}").eval(), letters) < 10


@pytest.mark.parametrize("n", [16, 64, 256])
def test_steps_of_long_segments_begin_smaller(n):
    """So many tokens are written together that steps of one size would overshoot."""
    assert largest_weight(small(num_tokens=256, dim=128, depth=4, heads=4, seq_len=n).eval(), 256) < 10
