"""The laws of the contract, over every mechanism. They know nothing of how one works."""
import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from mechanisms import SIZES, each
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import checkpoint

from memformers.files import load_memory, save_memory
from memformers.generate import Reader
from memformers.memory import (carry, cast, clone, fields, filled, full_precision, is_memory,
                               memory_state, nbytes, put, reset, select, shuffle)
from memformers.model import MemoryLM

N = SIZES["seq_len"]
close = torch.testing.assert_close


def text(rows=3, length=N, seed=1):
    return torch.randint(SIZES["num_tokens"], (rows, length),
                         generator=torch.Generator().manual_seed(seed))


def leaves(memory): return tree_flatten(memory)[0]


def same(a, b):
    """Exactly the same memory."""
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def read(model, tokens, memory=None, mask=None, grad=False, seq_len=N):
    """Read a text segment by segment: all logits, and the memory at its end."""
    logits = []
    for i in range(0, tokens.shape[1], seq_len):
        out = model.step(tokens[:, i:i + seq_len], memory,
                         None if mask is None else mask[:, i:i + seq_len])
        memory = carry(out.memory, grad=grad)
        logits.append(out.logits)
    return torch.cat(logits, 1), memory


def states(memory):
    """A memory and the memories inside it."""
    yield memory
    for f in fields(memory):
        if is_memory(getattr(memory, f.name)):
            yield from states(getattr(memory, f.name))


# 1. none is init; constant shapes; what is not filled is not read

@each
def test_none_is_a_fresh_memory(mechanism):
    model = mechanism.make()
    a, b = model.step(text()), model.step(text(), model.init_memory(3))
    assert torch.equal(a.logits, b.logits) and same(a.memory, b.memory)
    assert a.aux_loss.shape == () and all(not x.any() for x in leaves(model.init_memory(3)))


@each
def test_shapes_are_constant_from_the_first_call(mechanism):
    model = mechanism.make()
    growing = lambda memory: [(getattr(s, f.name), f.metadata["grows"], s.max_memories)
                              for s in states(memory) for f in fields(s) if "grows" in f.metadata]

    def shape(memory):
        moves = {id(x): dim for x, dim, _ in growing(memory)}
        return [([n for d, n in enumerate(x.shape, -x.ndim) if d != moves.get(id(x))], x.dtype)
                for x in leaves(memory)]

    memory, size = model.init_memory(3), nbytes(model.init_memory(3), full=True)
    if not growing(memory): assert nbytes(memory) == size
    for i in range(14):
        before = [x.shape[dim] for x, dim, _ in growing(memory)]
        memory = carry(model.step(text(seed=i), memory).memory)
        assert shape(memory) == shape(model.init_memory(3))
        assert nbytes(memory, full=True) == size >= nbytes(memory)
        # Only a store may grow: by doubling, up to its limit.
        for (x, dim, most), old in zip(growing(memory), before):
            now = x.shape[dim]
            assert now == old or now == most or (now > old and now.bit_count() == 1 and now <= most)
    assert nbytes(memory) == size


@each
@pytest.mark.parametrize("read_before", [0, 2, N, 2 * N + 1])
def test_an_empty_slot_is_never_read(mechanism, read_before):
    """Whatever stands in the slots that are not filled changes nothing, least of all a zero."""
    model = mechanism.make()
    memory = model.init_memory(3) if not read_before else read(model, text(3, read_before))[1]

    def poison(state):
        changed = {}
        for f in fields(state):
            value = getattr(state, f.name)
            if is_memory(value): value = poison(value)
            elif "slots" in f.metadata:
                dim, m = f.metadata["slots"], value.shape[f.metadata["slots"]]
                there = filled(getattr(state, f.metadata["fill"]), m)
                there = there.view([s if d in (0, dim) else 1 for d, s in enumerate(value.shape)])
                value = value.where(there, torch.full_like(value, 30.0))
            changed[f.name] = value
        return type(state)(**changed)

    a, b = (model.step(text(seed=2), m).logits for m in (memory, poison(memory)))
    close(a, b)


# 2. pure

@each
def test_a_step_is_pure(mechanism):
    model = mechanism.make()
    memory = read(model, text(3, 2 * N))[1]
    before = clone(memory)
    a, b = model.step(text(seed=2), memory), model.step(text(seed=2), memory)
    assert torch.equal(a.logits, b.logits) and same(memory, before)
    # Only now: a carry may write into the store that the memory before it holds.
    assert same(carry(clone(a.memory)), carry(b.memory))
    assert not set(dict(model.named_buffers())), "a memory lives in no buffer"


@each
def test_activation_checkpointing_changes_nothing(mechanism):
    """Under checkpointing the forward pass runs twice; the memory is written once."""
    def run(step):
        model = mechanism.make()
        memory, loss = None, 0
        for i in range(3):
            out = step(model)(text(seed=i), memory)
            memory, loss = carry(out.memory, grad=True), loss + out.logits.square().mean()
        memory = carry(memory)
        loss.backward()
        return memory, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    plain, grads = run(lambda model: model.step)
    twice, grads_twice = run(
        lambda model: lambda *a: checkpoint(model.step, *a, use_reentrant=False))
    assert same(plain, twice) and grads.keys() == grads_twice.keys()
    for k in grads: close(grads[k], grads_twice[k])


# 3. causal

@each
@pytest.mark.parametrize("t", [0, 1, N - 1, N, N + 2, 2 * N])
def test_nothing_sees_the_future(mechanism, t):
    model = mechanism.make()
    a = text(2, 3 * N)
    b = a.clone()
    b[:, t] = (b[:, t] + 1) % SIZES["num_tokens"]
    x, y = read(model, a)[0], read(model, b)[0]
    assert torch.equal(x[:, :t], y[:, :t]) and not torch.equal(x[:, t:], y[:, t:])


@each
def test_the_memory_is_read(mechanism):
    """The next segment depends on the one before, and on each of its tokens."""
    model = mechanism.make()
    for t in range(N):
        a = text(1, N)
        b = a.clone()
        b[:, t] = (b[:, t] + 1) % SIZES["num_tokens"]
        x, y = (model.step(text(1, seed=9), read(model, s)[1]).logits for s in (a, b))
        # What is farther back than the memory reaches may be forgotten.
        if t == N - 1: assert not torch.allclose(x, y)


# 4. rows

@each
def test_rows_are_isolated(mechanism):
    model = mechanism.make()
    a = text(3, 3 * N)
    b = a.clone()
    b[1] = text(1, 3 * N, seed=5)[0]
    (x, mx), (y, my) = read(model, a), read(model, b)
    others = [0, 2]
    assert torch.equal(x[others], y[others]) and same(select(mx, others), select(my, others))


@each
def test_a_reset_row_is_a_fresh_row(mechanism):
    model = mechanism.make()
    memory = read(model, text(3, 2 * N))[1]
    rows = torch.tensor([False, True, False])
    after = reset(memory, rows)
    assert same(select(after, [1]), model.init_memory(1))
    assert same(select(after, [0, 2]), select(memory, [0, 2]))
    x = model.step(text(seed=3), after).logits
    close(x[1:2], model.step(text(seed=3)[1:2]).logits)
    close(x[[0, 2]], model.step(text(seed=3), memory).logits[[0, 2]])


@each
def test_ragged_rows_equal_each_row_alone(mechanism):
    """Padding in front, behind and in the middle, rows that pause, a reset on the way."""
    model = mechanism.make()
    tokens = text(4, 4 * N)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0] = True
    mask[1, N:2 * N] = False                 # this row pauses for a segment
    mask[2, :N] = torch.arange(N) >= 2       # padding in front
    mask[3, 2 * N:] = False                  # this row ends early
    starts = {2: torch.tensor([False, False, True, False])}

    memory, together = None, []
    for s in range(4):
        if s in starts: memory = reset(memory, starts[s])
        cut = slice(s * N, (s + 1) * N)
        out = model.step(tokens[:, cut], memory, mask[:, cut])
        memory = carry(out.memory)
        together.append(out.logits)
    for r in range(4):
        alone = None
        for s in range(4):
            if s in starts and starts[s][r]: alone = None
            cut, real = slice(s * N, (s + 1) * N), mask[r, s * N:(s + 1) * N]
            if not real.any(): continue
            out = model.step(tokens[r:r + 1, cut][:, real], alone)
            alone = carry(out.memory)
            close(together[s][r:r + 1, real], out.logits)
        for x, y in zip(leaves(select(memory, [r])), leaves(select(alone, [0])), strict=True):
            close(x, y)


@each
def test_what_stands_in_the_padding_does_not_matter(mechanism):
    model = mechanism.make()
    mask = torch.tensor([[True, True, False, True, False]] * 3)
    a, b = text(seed=1), text(seed=1).where(mask, -100)
    x, y = model.step(a, None, mask), model.step(b, None, mask)
    assert torch.equal(x.logits[mask], y.logits[mask]) and same(carry(x.memory), carry(y.memory))


@each
def test_a_reset_row_is_a_fresh_row_even_after_nan(mechanism):
    """One text that blows up must not be felt by the next one, nor by its neighbours."""
    model = mechanism.make()
    memory, rows = read(model, text(3, 2 * N))[1], torch.tensor([False, True, False])
    others = clone(select(memory, [0, 2]))

    def poison(x):
        x = x.clone()
        if x.is_floating_point(): x[1] = float("nan")
        return x

    after = reset(tree_map(poison, memory), rows)
    assert same(select(after, [1]), model.init_memory(1))
    assert same(select(after, [0, 2]), others)
    tokens = text(3, 2 * N, seed=3)
    logits, after = read(model, tokens, after)
    close(logits[1:2], read(model, tokens[1:2])[0])
    close(logits[[0, 2]], read(model, tokens[[0, 2]], others)[0])
    # A selection leaves out what no longer counts, such as the empty slots of a store.
    assert all(x.isfinite().all() for x in leaves(select(after, [0, 1, 2])))


# 5. select

@each
def test_select_commutes_with_a_step(mechanism):
    model = mechanism.make()
    memory = read(model, text(3, 2 * N))[1]
    rows = torch.tensor([2, 0, 0, 1])
    out = model.step(text(seed=2), memory)
    picked = model.step(text(seed=2)[rows], select(memory, rows))
    close(picked.logits, out.logits[rows])
    picked, whole = select(carry(picked.memory), range(4)), select(carry(out.memory), rows)
    for x, y in zip(leaves(picked), leaves(whole), strict=True): close(x, y)


@each
def test_put_is_the_inverse_of_select(mechanism):
    model = mechanism.make()
    memory = read(model, text(3, 2 * N))[1]
    there = put(model.init_memory(3), [2, 0], select(memory, [2, 0]))
    assert same(select(there, [0, 2]), select(memory, [0, 2]))
    assert same(select(there, [1]), model.init_memory(1))


# 6. the graph

@each
def test_carry_cuts_the_graph(mechanism):
    model = mechanism.make()
    out = model.step(text())
    memory = carry(out.memory)
    assert not any(x.requires_grad for x in leaves(memory))
    model.step(text(seed=2), memory).logits.sum().backward()


@each
def test_the_graph_can_be_kept(mechanism):
    """With `grad=True` the loss of the second segment reaches what wrote the first."""
    model = mechanism.make()
    hidden = []

    def watch(module, args, out):
        out.requires_grad_()
        hidden.append(out)
        out.retain_grad()

    handle = model.embedding.register_forward_hook(watch)
    first = model.step(text())
    second = model.step(text(seed=2), carry(first.memory, grad=True))
    handle.remove()
    second.logits.square().sum().backward()
    if mechanism.gradient == "none": assert hidden[0].grad is None and hidden[1].grad.any()
    else: assert hidden[0].grad is not None and hidden[0].grad[:, -1].abs().min() > 0


@each
def test_the_documented_call_is_a_step_and_a_carry(mechanism):
    """`model(x, memories)` cuts the graph; with `grad=True`, where a model has it, keeps it."""
    model = mechanism.make()
    if type(model).forward is not MemoryLM.forward: pytest.skip("it has a call of its own")
    for grad in (False, True):
        logits, memory = model(text(), grad=grad)
        out = model.step(text())
        assert same(memory, carry(out.memory)) and torch.equal(logits, out.logits)
        assert any(x.requires_grad for x in leaves(memory)) == (grad and mechanism.gradient != "none")
    mask = torch.arange(N).expand(3, N) < N - 1
    close(model(text(), memory, mask)[0], model.step(text(), memory, mask).logits)


# 7. files

@each
def test_a_saved_memory_continues_bit_for_bit(mechanism, tmp_path):
    model = mechanism.make()
    for length in (0, 3, 2 * N):
        memory = read(model, text(3, length))[1] if length else model.init_memory(3)
        save_memory(memory, tmp_path / "memory.safetensors")
        loaded = load_memory(tmp_path / "memory.safetensors", like=model.init_memory(3))
        assert same(memory, loaded)
        a, b = read(model, text(3, 2 * N, 7), memory), read(model, text(3, 2 * N, 7), loaded)
        assert torch.equal(a[0], b[0]) and same(a[1], b[1])


@each
def test_a_saved_model_is_the_same_model(mechanism, tmp_path):
    model = mechanism.make()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config() == model.config()
    assert torch.equal(read(again, text(3, 2 * N))[0], read(model, text(3, 2 * N))[0])


@each
def test_no_memory_in_the_state_dict(mechanism):
    model = mechanism.make()
    before = set(model.state_dict())
    read(model, text(3, 3 * N))
    assert set(model.state_dict()) == before


@each
def test_a_memory_can_be_copied_and_pickled(mechanism, tmp_path):
    model = mechanism.make()
    memory = read(model, text(3, 2 * N))[1]
    torch.save(memory, tmp_path / "memory.pt")
    for again in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)),
                  torch.load(tmp_path / "memory.pt", weights_only=False)):
        assert type(again) is type(memory) and same(again, memory)
        a, b = (read(model, text(3, 2 * N, 7), clone(m)) for m in (memory, again))
        assert torch.equal(a[0], b[0]) and same(a[1], b[1])


# 8. cutting

@each
def test_a_text_may_be_cut_anywhere(mechanism):
    if mechanism.splits: model = mechanism.make()
    elif mechanism.splits_with: model = mechanism.make(**mechanism.splits_with)
    else: pytest.skip("this mechanism does not promise it")
    tokens = text(2, 3 * N)
    whole = read(model, tokens)[0]
    for seq_len in (1, 2, 3): close(read(model, tokens, seq_len=seq_len)[0], whole)


# 9. numbers

@each
def test_gradients_equal_finite_differences(mechanism):
    """Through three segments and the memory between them, along random directions."""
    model = mechanism.make()
    params = [p for p in model.parameters()]
    tokens, memory = text(2, 3 * N), None
    if mechanism.gradient != "full":
        # What a store holds is a constant to the gradient: differences must not change it.
        memory, tokens = read(model, tokens[:, :2 * N])[1], tokens[:, 2 * N:]

    def loss():
        logits, _ = read(model, tokens, memory, grad=True)
        return logits.log_softmax(-1)[..., 3].mean()

    grads = torch.autograd.grad(loss(), params, allow_unused=True)
    torch.manual_seed(4)
    for _ in range(3):
        directions = [torch.randn_like(p) for p in params]
        slope = sum((g * d).sum() for g, d in zip(grads, directions) if g is not None)
        eps, ends = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(params, directions): p += sign * eps * d
                ends.append(loss())
                for p, d in zip(params, directions): p -= sign * eps * d
        assert math.isclose(slope.item(), ((ends[0] - ends[1]) / (2 * eps)).item(), rel_tol=1e-4,
                            abs_tol=1e-7)


@each
def test_half_precision(mechanism):
    model = mechanism.make().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, memory = read(model, text(3, 3 * N))
    assert logits.isfinite().all()
    for x, y in zip(leaves(memory), leaves(model.init_memory(3))): assert x.dtype == y.dtype
    model = model.bfloat16()
    logits, memory = read(model, text(3, 3 * N))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    for state in states(memory):
        for f in fields(state):
            x, exact = getattr(state, f.name), "full_precision" in f.metadata
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                assert x.dtype == (torch.float32 if exact else torch.bfloat16)


@each
def test_accelerate_keeps_the_type_of_a_memory(mechanism):
    from accelerate import Accelerator
    model = mechanism.make().bfloat16()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(Stepper(model))
    memory = carry(prepared(text(), None).memory)
    assert all(x.dtype == y.dtype for x, y in zip(leaves(memory), leaves(model.init_memory(3))))


class Stepper(torch.nn.Module):
    """`step` as a module, which wrappers of modules want."""
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, tokens, memory): return self.model.step(tokens, memory)


@each
def test_a_memory_of_another_type_is_refused_and_can_be_cast(mechanism, tmp_path):
    model = mechanism.make()
    memory = cast(read(model, text(3, 2 * N))[1], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"memory\.\S+ must be torch.float64.*cast\(memory, dtype="):
        model.step(text(seed=2), memory)
    again = cast(memory, dtype=torch.float64)
    save_memory(memory, tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match="convert=True"):
        load_memory(tmp_path / "memory.safetensors", like=model.init_memory(3))
    loaded = load_memory(tmp_path / "memory.safetensors", like=model.init_memory(3), convert=True)
    for x, y, z in zip(leaves(memory), leaves(again), leaves(loaded)):
        assert x.is_floating_point() == (x.dtype != y.dtype) and torch.equal(x.to(y.dtype), y)
        assert z.dtype == y.dtype and torch.equal(z, y)
    assert model.step(text(seed=2), again).logits.dtype == torch.float64


@each
def test_inference_then_training(mechanism):
    """A memory made under inference_mode is refused in training, unless it was cloned."""
    model = mechanism.make()
    with torch.inference_mode(): memory = read(model, text(3, 2 * N))[1]
    with torch.no_grad(): expected = model.step(text(seed=2), memory).logits
    assert any(x.is_inference() for x in leaves(memory))
    with pytest.raises(ValueError, match=r"inference_mode.*clone\(memory\)"):
        model.step(text(seed=2), memory)
    logits = model.step(text(seed=2), clone(memory)).logits
    close(logits, expected)
    logits.sum().backward()


@pytest.fixture(scope="module")
def mesh():
    """One process that stands for a group of them."""
    if dist.is_initialized(): pytest.skip("another test has a process group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(module, mesh):
    return fully_shard(module, mesh=mesh,
                       mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


@each
def test_fully_shard_leaves_a_memory_alone(mechanism, mesh):
    """FSDP casts the tensors of tuples, dicts and dataclasses; a memory must pass as it is."""
    step = sharded(Stepper(mechanism.make().float()), mesh)
    memory = None
    for i in range(2):
        out = step(text(seed=i), memory)
        memory = carry(out.memory)
        out.logits.float().sum().backward()
    for state in states(memory):
        for f in fields(state):
            x, exact = getattr(state, f.name), "full_precision" in f.metadata
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                assert x.dtype == (torch.float32 if exact else torch.bfloat16)
    # Inside, the model is bfloat16. A memory of another type arrives as it is, and is refused.
    with pytest.raises(ValueError, match=r"must be torch\.(bfloat16|float32).*got torch.float64"):
        step(text(), cast(memory, dtype=torch.float64))


@memory_state
class Sums:
    total: torch.Tensor = full_precision()   # (b, d)
    mem: torch.Tensor = None                 # (b, d)


class Summing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x, memory):
        y = self.linear(x)
        return {"y": y, "memory": Sums(memory.total + y, memory.mem + y)}


def test_a_float32_state_stays_float32(mesh):
    """Whatever wraps the model: FSDP2, Accelerate, autocast, and a cast of the memory."""
    from accelerate import Accelerator
    fresh = Sums(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bfloat16))
    for dtype, total in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        assert cast(fresh, dtype=dtype).total.dtype == total
        assert cast(fresh, dtype=dtype).mem.dtype == dtype
    for module in (sharded(Summing(), mesh),
                   Accelerator(cpu=True, mixed_precision="bf16").prepare(Summing())):
        memory = fresh
        for _ in range(2): memory = carry(module(torch.ones(2, 4), memory)["memory"])
        assert [x.dtype for x in leaves(memory)] == [torch.float32, torch.bfloat16]


# 10. piece by piece

@each
def test_one_token_at_a_time_equals_the_segment(mechanism):
    model = mechanism.make()
    tokens = text(2, 3 * N + 2)
    reader = Reader(model, 2)
    with torch.no_grad():
        pieces = torch.stack([reader.read(t) for t in tokens.split(1, 1)], 1)
        whole, memory = read(model, tokens)
    close(pieces, whole)
    for x, y in zip(leaves(reader.memory), leaves(memory), strict=True): close(x, y)


@each
def test_rows_are_read_at_their_own_pace(mechanism):
    model = mechanism.make()
    tokens, lengths = text(3, 4 * N), torch.tensor([4 * N, 2, N + 3])
    mask = torch.arange(4 * N) < lengths[:, None]
    reader = Reader(model, 3)
    with torch.no_grad():
        reader.read(tokens[:, :3], mask[:, :3])
        reader.read(tokens[:, 3:], mask[:, 3:])
        after = reader.read(text(3, 1, seed=8))
    for r in range(3):
        alone = torch.cat([tokens[r:r + 1, :lengths[r]], text(3, 1, seed=8)[r:r + 1]], 1)
        logits, memory = read(model, alone)
        close(after[r], logits[0, -1])
        memories = select(reader.memory, [r]), select(memory, [0])
        for x, y in zip(*map(leaves, memories), strict=True): close(x, y)


@each
def test_branches_of_a_reader(mechanism):
    model = mechanism.make()
    reader = Reader(model, 2)
    with torch.no_grad():
        reader.read(text(2, N + 2))
        reader.select([1, 1, 0])
        after = reader.read(text(3, 1, seed=8))
    for r, source in enumerate([1, 1, 0]):
        whole = torch.cat([text(2, N + 2)[source:source + 1], text(3, 1, seed=8)[r:r + 1]], 1)
        close(after[r], read(model, whole)[0][0, -1])


@each
def test_shuffling_keeps_what_is_remembered(mechanism):
    model = mechanism.make()
    memory = read(model, text(3, N + 2))[1]
    mixed = shuffle(memory, torch.Generator().manual_seed(0))
    for a, b in zip(states(memory), states(mixed)):
        for f in fields(a):
            x, y = getattr(a, f.name), getattr(b, f.name)
            if not isinstance(x, torch.Tensor): continue
            if "slots" in f.metadata:
                dim = f.metadata["slots"]
                empty = ~filled(getattr(a, f.metadata["fill"]), x.shape[dim])
                assert torch.equal(*(v.movedim(dim, 1)[empty] for v in (x, y)))
                x, y = (v.movedim(dim, 1).flatten(2).sum(-1).sort(1).values
                        for v in (x, y))
            elif hasattr(a, "on_shuffle"):   # a store knows for itself where its slots are
                x, y = (v.flatten(1).sort(1).values for v in (x, y))
            close(x, y)
    assert torch.isfinite(model.step(text(seed=4), mixed).logits).all()
    tree_map(lambda x, y: None, memory, mixed)


# 11. what a mechanism says of its attention

def attention(model, tokens):
    """Of a model of one layer, asked with the last segment: the weights by the position in the text
    of the newest token that a key stands for, NaN where there is none, (b, heads, n, positions);
    and how many tokens it stands for."""
    start = (tokens.shape[1] - 1) // N * N
    seen, = model.attention_weights(tokens[:, start:], read(model, tokens[:, :start])[1])
    span, shape = torch.tensor(seen.span), seen.weights.shape
    at = start + torch.arange(shape[2])[:, None] - seen.age.expand(shape)
    at = at.where((span > 0) & (seen.weights > 0), -1) + 1
    nothing = torch.full((*shape[:3], tokens.shape[1] + 1), float("nan"), dtype=torch.float64)
    return [nothing.scatter(-1, at, x.expand(shape).double())[..., 1:] for x in (seen.weights, span)]


@each
def test_attention_weights_are_shares(mechanism):
    model = mechanism.make().train()
    memory = read(model, text(3, 2 * N + 2))[1]
    before = clone(memory)
    layers = model.attention_weights(text(3, 4, seed=5), memory)
    assert same(memory, before) and model.training
    if not mechanism.attends:
        assert layers == []
        return
    assert [seen.layer for seen in layers] == [1, 2, 3]
    for seen in layers:
        b, h, n, keys = seen.weights.shape
        assert len(seen.kinds) == len(seen.span) == keys and not seen.weights.requires_grad
        torch.broadcast_to(seen.age, seen.weights.shape)
        close(seen.weights.sum(-1), torch.ones(b, h, n).double())
        ahead = (seen.age < 0).expand_as(seen.weights)
        assert not seen.weights[ahead].any(), "nothing is seen before it was read"
    assert all({"segment", "long_term", "feedback"} & set(seen.kinds) for seen in layers)


@each
def test_a_key_stands_for_the_tokens_that_it_names(mechanism):
    """In one layer: when a token changes, the scores of those keys change that stand for it, and no
    others. (Entries of the Feedback Transformer depend on all that was read before them.)"""
    if not mechanism.attends: pytest.skip("it attends to nothing")
    ones = {name: [1] for name in mechanism.options if name.endswith("layers")}
    if "recurrent_layer" in mechanism.options: ones["recurrent_layer"] = 1
    # Where the attention of later tokens chooses what is kept, a gate stands between two softmaxes,
    # or a memory holds what a layer gives or is read before attention, other scores change too.
    for name, plain in (("compression", "max"), ("gate", "softmax"), ("wiring", "gate")):
        if mechanism.options.get(name) in ("most_used", "sigmoid", "network", "layer"):
            ones[name] = plain
    name = mechanism.name.split("_")[0]
    # What is looked up is added before attention, so that it changes all keys.
    if name == "associative": ones["memory_layers"] = []
    if name == "compressive" or mechanism.name == "xl_enhanced": ones["enhanced_recurrence"] = False
    model, tokens, tried = mechanism.make(depth=1, **ones), text(2, 3 * N), 0
    seen, span = attention(model, tokens)
    position = torch.arange(3 * N)
    for changed in range(2 * N):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % SIZES["num_tokens"]
        score = (attention(model, other)[0].log() - seen.log()).flatten(0, 2)
        for row, width in zip(score, span.flatten(0, 2)):
            there = ~row.isnan() & (position <= changed if name == "feedback" else True)
            stands = (changed <= position) & (changed > position - width)
            others = row[there & ~stands]
            if not len(others): continue
            close(others, others[:1].expand_as(others), rtol=0, atol=1e-9)
            assert ((row[there & stands] - others[0]).abs() > 1e-9).all()
            tried += int((there & stands).any())
    assert tried > 5 or seen[..., :2 * N].isnan().all()
