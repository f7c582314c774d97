"""Infini-attention: the documented call, a gate that moves, and what the published code gets wrong."""
import pytest
import torch

from memformers import InfiniTransformer, carry, reset
from memformers.tasks import TaskStream, copy_task
from memformers.train import learn

close = torch.testing.assert_close


def small(**options):
    torch.manual_seed(0)
    return InfiniTransformer(**(dict(num_tokens=64, dim=32, depth=2, heads=2, seq_len=16) | options))


def text(b, n, seed=0):
    return torch.randint(64, (b, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("delta, z", [(None, 16), ("segment", 16), ("token", 0)])
def test_the_documented_call(delta, z):
    model = small(delta=delta)
    logits, memories = model(text(2, 16))
    logits, memories = model(text(2, 16, 1), memories=memories)
    assert logits.shape == (2, 16, 64) and not memories.matrix.requires_grad
    assert memories.matrix.shape == (2, 2, 2, 16, 16) and memories.norm.shape == (2, 2, 2, z)
    assert memories.tokens.tolist() == [32, 32]


def test_the_gate_is_open_and_moves():
    """Published code begins with a gate of 4.5e-5 whose gradient is 1e-7: it is off and stays off."""
    model = small()
    first, second = text(4, 16), text(4, 16, 1)
    memory = carry(model.step(first).memory)
    told, fresh = (model.step(second, m).logits for m in (memory, None))
    assert (told - fresh).norm() > .01 * fresh.norm(), "the memory changes the logits by over 1 %"
    torch.nn.functional.cross_entropy(told.flatten(0, 1), second.flatten()).backward()
    for layer in model.layers:
        assert .3 < layer.share().min() and layer.share().max() < .5
        assert layer.gate.grad.abs().min() > 1e-6


def test_training_moves_the_gate():
    """Where only the memory has the answer, all gates open."""
    torch.manual_seed(0)
    model = InfiniTransformer(128, 16, 1, heads=1, seq_len=8)
    before = model.layers[0].share().item()
    learn(model, TaskStream(copy_task(1, 12, "ab"), 16, 8), 40, lr=5e-3, segments=2)
    assert model.layers[0].share().item() > before + .02


def test_a_fresh_row_reads_nothing():
    """Zeros must not be mixed in where there is no memory: the paper's form halves attention."""
    model = small()
    heard = model.step(text(2, 16)).logits
    for layer in model.layers: layer.gate.data.fill_(5.)
    close(model.step(text(2, 16)).logits, heard)
    memory = carry(model.step(text(2, 16, 3)).memory)
    close(model.step(text(2, 16), reset(memory, torch.tensor([True, True]))).logits, heard)


def test_long_sums_stay_exact_under_autocast():
    """4,096 keys that are all alike find the mean of their values, also where the model is bfloat16."""
    model = small(heads=1).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        memory = model.init_memory(1)
        for i in range(64): memory = carry(model.step(text(1, 16, i), memory).memory)
    with torch.no_grad():
        right = model.init_memory(1)
        for i in range(64): right = carry(model.step(text(1, 16, i), right).memory)
    assert memory.matrix.dtype == memory.norm.dtype == torch.float32
    # The inputs were rounded to bfloat16, 2 ** -8 each; their sums were not.
    assert (memory.norm - right.norm).abs().max() < 2e-3 * right.norm.abs().max()


@pytest.mark.parametrize("delta, found", [(None, 1.), ("segment", .5), ("token", 1.)])
def test_a_pair_that_is_written_twice(delta, found):
    """The paper's delta form halves what it knows, since its norm grows all the same."""
    from memformers.infini import retrieve, store
    k, v = torch.tensor([1., 0, 0]).view(1, 1, 1, 3), torch.ones(1, 1, 1, 3)
    state = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 0 if delta == "token" else 3)
    for _ in range(2): state = store(k, v, *state, delta, None)
    close(retrieve(k, *state), found * v)


@pytest.mark.parametrize("options, message", [
    (dict(delta="linear"), "delta"), (dict(gate=float("nan")), "gate"), (dict(gate_rate=0), "gate_rate"),
    (dict(heads=5), "heads"), (dict(memory_layers=[3]), "memory_layers")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


@pytest.mark.parametrize("delta", [None, "segment", "token"])
def test_what_is_stored_does_not_depend_on_autocast(delta):
    from memformers.infini import store
    torch.manual_seed(0)
    k, v, state = torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4), torch.zeros(2, 2, 4, 4)
    norm = torch.zeros(2, 2, 0 if delta == "token" else 4)
    right = store(k, v, state, norm, delta, None)
    with torch.autocast("cpu", dtype=torch.bfloat16): ours = store(k, v, state, norm, delta, None)
    for a, b in zip(ours, right): close(a, b)
