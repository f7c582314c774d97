"""Recurrent memory tokens as users call them, and what published code gets wrong."""
import pytest
import torch

from memformers import Reader, RecurrentMemoryTransformer, carry, generate, nbytes
from memformers.attention import recording
from memformers.memory import select
from memformers.tasks import TaskStream, copy_task
from memformers.train import learn
from memformers.zoo import create

close = torch.testing.assert_close


def small(**options):
    torch.manual_seed(0)
    sizes = dict(num_tokens=32, dim=16, depth=2, heads=2, seq_len=8, num_memory_tokens=3)
    model = RecurrentMemoryTransformer(**(sizes | options))
    for p in model.parameters(): torch.nn.init.normal_(p, std=.3)
    return model.eval()


def text(rows=2, length=8, seed=1):
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_the_documented_call():
    model = RecurrentMemoryTransformer(num_tokens=20000, dim=512, depth=4, heads=8, seq_len=128,
                                       num_memory_tokens=10)
    memories = None
    with torch.no_grad():
        for x in text(2, 256).split(128, 1): logits, memories = model(x, memories)
    assert logits.shape == (2, 128, 20000) and memories.mem.shape == (2, 10, 512)
    assert generate(model, text(1, 5)[0], 3).shape == (3,)


def test_the_memory_is_a_few_vectors():
    assert nbytes(small().init_memory(1)) == 3 * 16 * 4 + 16            # and two counts
    assert nbytes(small(mem_len=5).init_memory(1)) == (3 + 2 * 5) * 16 * 4 + 16


def test_the_call_can_keep_the_graph():
    model = small()
    for grad in (False, True):
        _, memories = model(text(), grad=grad)
        assert memories.mem.requires_grad == grad


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_all_weights_learn_by_default(size, recwarn):
    model = create(f"recurrent_memory_{size}", num_tokens=128, dim=8, heads=1, depth=2, seq_len=6)
    learn(model, TaskStream(copy_task(2, 8), 2, 6, loss_everywhere=True), steps=2)
    assert model.train_segments == 2 and all(p.grad is not None for p in model.parameters())
    assert not [w for w in recwarn if "no gradient" in str(w.message)]


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
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(total, total[1:]))


def test_the_first_segment_learns_from_the_last():
    """Through three segments, and to each token of the first."""
    model, vectors = small(), []
    handle = model.embedding.register_forward_hook(
        lambda module, args, out: vectors.append(out) or out.requires_grad_().retain_grad())
    memory = None
    for i in range(4):
        out = model.step(text(seed=i), memory)
        memory = carry(out.memory, grad=True)
    handle.remove()
    out.logits.square().sum().backward()
    assert (vectors[0].grad.abs().amax(-1) > 0).all()


def test_an_empty_segment_leaves_the_memory_as_it_is():
    model = small(mem_len=4)
    memory = carry(model.step(text(), None).memory)
    untouched, _ = model.finish(model.begin(memory))
    padded = model.step(text(seed=2), memory, torch.zeros(2, 8, dtype=torch.bool)).memory
    for after in (untouched, padded):
        for name in ("mem", "queue", "fill", "queue_fill"):
            assert torch.equal(getattr(after, name), getattr(memory, name))
    fresh = model.init_memory(2)
    padded = model.step(text(), fresh, torch.zeros(2, 8, dtype=torch.bool)).memory
    assert not padded.fill.any() and not padded.mem.any()


def test_write_tokens_come_after_each_rows_last_token():
    model, mask = small(), torch.tensor([[True] * 8, [True] * 3 + [False] * 5])
    memory = model.step(text(), None, mask).memory
    alone = model.step(text()[1:, :3]).memory
    close(select(memory, [1]).mem, alone.mem)


def test_write_tokens_run_when_a_segment_ends():
    """Generation computes one position for each token, and 3 + 3 more for each segment."""
    model, seen = small(), []
    model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    reader = Reader(model, 1)
    with torch.no_grad():
        for token in text(1, 10).split(1, 1): reader.read(token)
    assert seen == [3] + [1] * 8 + [3, 3] + [1] * 2


def test_both_ends_get_the_same_tokens():
    """The read and the write tokens of a segment are the memory that came in."""
    model, seen = small(), []
    model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    memory = None
    for i in range(3):
        seen.clear()
        before = memory
        memory = carry(model.step(text(seed=i), memory).memory)
        want = model.initial.expand(2, -1, -1) if before is None else before.mem
        assert torch.equal(seen[0], want) and torch.equal(seen[2], want)
        assert not torch.equal(memory.mem, want)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, "autocast"])
def test_what_is_written_is_not_rounded(kind):
    """Memory tokens are kept in the type in which the last norm gives them: float32 under autocast."""
    auto, seen = kind == "autocast", []
    model = small().to(torch.float32 if auto else kind)
    model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=auto):
        memory = carry(model.step(text(), carry(model.step(text(seed=2)).memory)).memory)
    assert memory.mem.dtype == seen[-1].dtype == (torch.float32 if auto else kind)
    assert torch.equal(memory.mem, seen[-1])


def test_read_only_carries_nothing():
    model = small(read_only=True)
    assert model.train_segments == 1 and nbytes(model.init_memory(1)) == 16
    memory = carry(model.step(text(seed=3)).memory)
    assert torch.equal(model.step(text(), memory).logits, model.step(text()).logits)


def test_the_queue_sends_no_gradient_back():
    model = small(mem_len=8, read_only=True)
    memory = carry(model.step(text()).memory, grad=True)
    assert not memory.queue.requires_grad and memory.queue.any()
    model = small(mem_len=8)
    memory = carry(model.step(text()).memory, grad=True)
    assert not memory.queue.requires_grad and memory.mem.requires_grad


@pytest.mark.parametrize("mem_len", [0, 5])
def test_what_the_write_tokens_read_can_be_seen(mem_len):
    model = small(mem_len=mem_len)
    memory = carry(model.step(text()).memory)
    _, segment = model.extend(model.begin(memory), text(seed=2))
    with recording() as layers: model.finish(segment)
    assert [seen.layer for seen in layers] == [1, 2]
    assert layers[0].weights.shape == (2, 2, 3, mem_len + 3 + 8 + 3)
    assert layers[0].kinds == ["xl"] * mem_len + ["tokens"] * 3 + ["segment"] * 11


@pytest.mark.parametrize("other", [dict(num_memory_tokens=4), dict(mem_len=5), dict(read_only=True)])
def test_a_memory_of_another_size_is_refused(other):
    with pytest.raises(ValueError, match="memory of another model"):
        small().step(text(), small(**other).init_memory(2))
