"""Neural memory: the documented call, the inner descent, and what published code gets wrong."""
import pytest
import torch
import torch.nn.functional as F

from memformers import NeuralMemoryTransformer, carry
from memformers.delta_rule import delta_rule
from memformers.memory import replace
from memformers.neural_memory import damping, error_gradient, network, totals
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
    (dict(memory_depth=1), .3), (dict(), .1), (dict(wiring="context"), .04),
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


def largest_weight(model, segments):
    """Of the memory after texts (segments, n) that are read one after the other."""
    memory, largest = None, 0
    with torch.no_grad():
        for part in segments:
            memory = carry(model.step(part[None], memory).memory)
            largest = max(largest, memory.weights.abs().max().item())
    assert memory.weights.isfinite().all() and memory.momentum.isfinite().all()
    return largest


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("letters", [1, 256])
def test_a_fresh_preset_reads_any_text_for_long(size, letters):
    """Also one that repeats a single token, whose steps of the inner descent all add up."""
    torch.manual_seed(0)
    model = create(f"neural_memory_{size}").eval()
    assert largest_weight(model, torch.randint(letters, (10, model.seq_len))) < 2


TEXTS = {
    "one-token": lambda n: torch.full((60, n), 7),
    "two-tokens": lambda n: (torch.arange(n) % 2 + 3).expand(60, -1),
    "random": lambda n: torch.randint(64, (60, n)),
    "phases": lambda n: (torch.arange(60) // 10)[:, None].expand(-1, n)}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("n", [1, 4, 64])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_inner_descent_does_not_grow(depth, n, text):
    """With gates far from their start, and with much momentum."""
    model = small(seq_len=n, memory_depth=depth).eval()
    for layer in model.layers:
        gates = layer.memory.to_gates
        gates.weight.data *= 20
        gates.bias.data[2:4] += 3   # of momentum
    torch.manual_seed(0)
    assert largest_weight(model, TEXTS[text](n)) < 100


@pytest.mark.parametrize("eta", [.1, .5, .99])
def test_equal_segments_have_a_stable_recurrence(eta):
    """The eigenvalues of (4) in the weights and the momentum of one layer, for random segments."""
    torch.manual_seed(0)
    grew = []
    for _ in range(200):
        n, d = torch.randint(1, 12, ()).item(), torch.randint(1, 6, ()).item()
        k = F.normalize(torch.randn(1, 1, n, d).double(), dim=-1)[:, :, torch.randint(n, (n,))]
        gates = torch.rand(3, 1, 1, n).double() * torch.tensor([.5, 0, .1])[:, None, None, None]
        gates[1] = eta
        a, b, c, w, s = totals(*gates, torch.ones(1, 1, n).double())
        share = damping(torch.zeros(1, 1, d * d).double(), k, b, c, w, s, torch.ones(1, 1, n))
        def radius(share):
            a_, b_, c_ = (x.item() * torch.eye(d).double() for x in (a, b, c))
            moves, later = (2 * k[0, 0].T @ (k[0, 0] * (share * x)[0, 0, :, None]) for x in (w, s))
            step = torch.cat([torch.cat([a_ - moves, c_], 1), torch.cat([-later, b_], 1)])
            return torch.linalg.eigvals(step).abs().max()
        assert radius(share) < 1 + 1e-9
        grew.append(radius(torch.ones(())) > 1)
    assert any(grew)


def test_small_steps_are_taken_as_they_are():
    """And a row without a token, or with far too much momentum, is no division by zero."""
    k, one = F.normalize(torch.randn(1, 1, 3, 4), dim=-1), torch.ones(1, 1, 3)
    def share(theta, eta, real):
        *_, b, c, w, s = totals(theta * one, eta * one, 0 * one, real)
        return damping(torch.zeros(1, 1, 16), k, b, c, w, s, real).item()
    assert share(.1, 0, one) == 1 and share(.5, .5, 0 * one) == 1
    assert share(.5, 0, one) < 1 and 0 < share(.5, 1, one) < 1e-6
