"""Associative memory as users call it, and what published code gets wrong."""
import pytest
import torch

from memformers import AssociativeTransformer, Reader, carry, generate, nbytes, reset
from memformers.associative import dpfp, retrieve, store
from memformers.memory import select
from memformers.zoo import create

close = torch.testing.assert_close


def small(start=False, **options):
    """A small model, as if it had been trained; `start`: a fresh one."""
    torch.manual_seed(0)
    sizes = dict(num_tokens=32, dim=16, depth=2, heads=2, seq_len=8, num_memory_tokens=3, dim_memory=6)
    model = AssociativeTransformer(**(sizes | options))
    if not start:
        for p in model.parameters(): torch.nn.init.normal_(p, std=.3)
    return model.eval()


def text(rows=2, length=8, seed=1):
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_the_documented_call():
    model = AssociativeTransformer(num_tokens=20000, dim=512, depth=4, heads=8, seq_len=128,
                                   num_memory_tokens=16, dim_memory=64)
    memories = None
    with torch.no_grad():
        for x in text(2, 256).split(128, 1): logits, memories = model(x, memories)
    assert logits.shape == (2, 128, 20000) and memories.matrix.shape == (2, 4, 384, 512)
    assert memories.norm.shape == (2, 4, 384)
    assert generate(model, text(1, 5)[0], 3).shape == (3,)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_presets(size):
    model = create(f"associative_{size}", num_tokens=40, seq_len=8)
    logits, memories = model(text())
    assert logits.shape == (2, 8, 40) and nbytes(memories) == nbytes(model.init_memory(2))


def test_the_call_can_keep_the_graph():
    for grad in (False, True):
        _, memories = small()(text(), grad=grad)
        assert memories.matrix.requires_grad == grad


def test_a_fresh_model_is_a_plain_decoder_that_can_learn_to_write():
    """Values are zero at the start, so nothing is read. The values' weights have a gradient all the
    same, of a size that training can work with: features are of order 1 and not of order 1e-5."""
    model = small(start=True)
    first = model.step(text())
    assert first.memory.norm.any() and not first.memory.matrix.any()
    logits = model.step(text(seed=2), carry(first.memory, grad=True)).logits
    assert torch.equal(logits, model.step(text(seed=2)).logits)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), text(seed=2).flatten()).backward()
    for layer in model.layers: assert layer.to_v.weight.grad.abs().max() > 1e-5
    assert .1 < first.memory.norm.max() < 100


def test_truncation_truncates():
    """How many segments a gradient goes back makes a difference, up to the first one."""
    model, found = small(), []
    for reach in (1, 2, 3, 4):
        memory = None
        for i in range(4):
            out = model.step(text(seed=i), memory)
            memory = carry(out.memory, grad=i >= 4 - reach)
        found.append(torch.autograd.grad(out.logits.square().sum(), list(model.parameters())[1:],
                                         allow_unused=True))
    total = [torch.cat([g.flatten() for g in grads if g is not None]) for grads in found]
    assert len(total[0]) < len(total[1])   # the write tokens are trained from two segments on
    found = [[g for g, h in zip(grads, found[0]) if h is not None] for grads in found]
    total = [torch.cat([g.flatten() for g in grads]) for grads in found]
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(total, total[1:]))


def test_rows_have_memories_of_their_own():
    """A reset empties one row; the rows beside it go on."""
    model = small()
    memory = carry(model.step(text(3)).memory)
    after = model.step(text(3, seed=2), reset(memory, torch.tensor([False, True, False])))
    close(after.logits[1:2], model.step(text(3, seed=2)[1:2]).logits)
    close(after.logits[[0, 2]], model.step(text(3, seed=2), memory).logits[[0, 2]])


def test_write_tokens_are_the_same_in_each_segment():
    model, seen = small(), []
    model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    memory = None
    for i in range(3):
        seen.clear()
        memory = carry(model.step(text(seed=i), memory).memory)
        assert torch.equal(seen[1], model.write_tokens.expand(2, -1, -1))


def test_write_tokens_run_when_a_segment_ends():
    model, seen = small(), []
    model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    reader = Reader(model, 1)
    with torch.no_grad():
        for token in text(1, 10).split(1, 1): reader.read(token)
    assert seen == [1] * 8 + [3] + [1] * 2


def test_write_tokens_come_after_each_rows_last_token():
    model, mask = small(), torch.tensor([[True] * 8, [True] * 3 + [False] * 5])
    memory = model.step(text(), None, mask).memory
    close(select(memory, [1]).matrix, model.step(text()[1:, :3]).memory.matrix)


def test_an_empty_segment_leaves_the_memory_as_it_is():
    model = small()
    memory = carry(model.step(text()).memory)
    untouched, _ = model.finish(model.begin(memory))
    padded = model.step(text(seed=2), memory, torch.zeros(2, 8, dtype=torch.bool)).memory
    for after in (untouched, padded):
        assert torch.equal(after.matrix, memory.matrix) and torch.equal(after.norm, memory.norm)


def test_without_memory_layers_nothing_is_carried():
    model = small(memory_layers=[])
    assert model.train_segments == 1 and nbytes(model.init_memory(1)) == 0
    memory = model.step(text()).memory
    assert torch.equal(model.step(text(seed=2), memory).logits, model.step(text(seed=2)).logits)


def test_a_key_without_features_is_harmless():
    """Features may all be zero, as those of a vector with one number: neither 0/0 is NaN."""
    k = torch.tensor([[[1., 0, 0, 0]]])
    assert not dpfp(k).any()
    state = torch.zeros(1, 24, 2), torch.zeros(1, 24)
    for memory in (state, store(dpfp(torch.randn(1, 1, 4)), *torch.ones(2, 1, 1, 1), *state)):
        assert not retrieve(dpfp(k), *memory).any()
        after = store(dpfp(k), torch.ones(1, 1, 2), torch.ones(1, 1, 1), *memory)
        for a, b in zip(after, memory): assert torch.equal(a, b.expand_as(a))


def test_a_key_that_is_written_again_gets_the_new_value():
    """The norm does not grow with what it knows; without the correction the answer fades."""
    phi, one = dpfp(torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0))), torch.ones(1, 1, 1)
    for correction, right in ((True, [1, 2, 3, 4]), (False, [1, 1, 4 / 3, 5 / 3])):
        state, found = (torch.zeros(1, 24, 1), torch.zeros(1, 24)), []
        for value in (1., 2., 3., 4.):
            state = store(phi, value * one, one, *state, correction)
            found.append(retrieve(phi, *state).item())
        close(found, [float(x) for x in right], rtol=1e-2, atol=0)


def test_sums_stay_float32_under_autocast():
    model = small()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        memory = model.init_memory(2)
        for i in range(8): memory = carry(model.step(text(seed=i), memory).memory)
    assert memory.matrix.dtype == memory.norm.dtype == torch.float32
    layer, x = model.layers[0], torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    state, seen = (memory.matrix[:, 0], memory.norm[:, 0]), []
    for part in (layer.to_k, layer.to_v, layer.to_beta):
        part.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16): after = layer.write(x, *state)
    # The inputs are rounded to bfloat16; nothing after them is.
    k, v, beta = seen
    right = store(dpfp(k.float()), v.float(), beta.sigmoid().float(), *state)
    for a, b in zip(after, right): close(a, b)
