"""The gated delta net: the documented call, cuts anywhere, and what published code gets wrong."""
import torch

from memformers import GatedDeltaNet, carry
from memformers.generate import Reader

close = torch.testing.assert_close


def small(**options):
    torch.manual_seed(0)
    return GatedDeltaNet(**(dict(num_tokens=64, dim=32, depth=2, heads=2, seq_len=16) | options))


def text(b, n, seed=0):
    return torch.randint(64, (b, n), generator=torch.Generator().manual_seed(seed))


def test_the_documented_call():
    model = small(expand_v=2)
    logits, memories = model(text(2, 16))
    logits, memories = model(text(2, 16, 1), memories=memories)
    assert logits.shape == (2, 16, 64) and not memories.state.requires_grad
    assert memories.state.shape == (2, 2, 2, 16, 32) and memories.tail.shape == (2, 2, 3, 128)


def test_gradients_of_pieces_shorter_than_the_convolution():
    """With the tail in the memory, one token at a time has the gradient of the whole segment."""
    model, tokens = small().double(), text(2, 16)
    whole = model.step(tokens).logits
    memory, pieces = None, []
    for token in tokens.split(1, 1):
        out = model.step(token, memory)
        pieces.append(out.logits)
        memory = carry(out.memory, grad=True)
    pieces = torch.cat(pieces, 1)
    close(pieces, whole)
    weights = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), weights) for x in (pieces, whole))):
        close(a, b)


def test_the_gates_begin_where_the_paper_begins():
    """A from 0 to 16, and steps from .001 to .1: a token leaves between 20 % and all of the state."""
    layer = small(heads=16).layers[0]
    dt = torch.nn.functional.softplus(layer.dt)
    assert .001 <= dt.min() and dt.max() <= .1001 and dt.max() > 3 * dt.min()
    assert 0 < layer.log_a.exp().min() and layer.log_a.exp().max() <= 16


def test_a_negative_eigenvalue_turns_the_sign():
    """What is stored along a key is turned around by β = 2 and can only shrink by β = 1."""
    def along(negative):
        model = small(negative_eigenvalues=negative, depth=1, heads=1).double()
        layer = model.layers[0]
        layer.to_qkv.weight.data[64:] = 0           # nothing new is written
        layer.log_a.data.fill_(-30.)                # nothing fades
        layer.to_gates.weight.data.fill_(1.)
        layer.norm.bias.data.fill_(1.)              # so that β is at its upper end
        memory = model.init_memory(1)
        memory.state[:] = torch.eye(32)
        return torch.linalg.eigvals(model.step(text(1, 1), memory).memory.state[0, 0, 0]).real.min()
    assert along(True) < -.9 and along(False) > -1e-6


def test_a_long_text_stays_finite():
    model = small(negative_eigenvalues=True).eval()
    reader = Reader(model)
    with torch.no_grad(): logits = reader.read(text(1, 4096))
    assert logits.isfinite().all() and reader.memory.state.abs().max() < 1e3


def test_steps_begin_within_their_bounds():
    """softplus of the stored numbers is what was drawn: from .001 to .1, and near to both ends."""
    torch.manual_seed(0)
    steps = GatedDeltaNet(num_tokens=8, dim=512, depth=1, heads=512).layers[0].dt
    steps = torch.nn.functional.softplus(steps)
    assert .99e-3 < steps.min() < 1.1e-3 and .09 < steps.max() < .1001
