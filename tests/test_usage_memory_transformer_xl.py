"""The Memory Transformer-XL as its users call it, and what the original package gets wrong."""
import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from memformers import MemoryTransformerXL, Reader, carry, generate, load_memory, save_memory
from memformers.memory_transformer_xl import MemoryWriter, full_attention, linear_attention

close = torch.testing.assert_close


def small(**options):
    torch.manual_seed(0)
    sizes = dict(num_tokens=32, dim=16, depth=2, seq_len=8, heads=2, mem_len=8, lmem_len=4)
    return MemoryTransformerXL(**(sizes | options))


def text(rows=2, length=8, seed=1):
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(seed))


def graph_size(logits):
    nodes, seen = [logits.sum().grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen: continue
        seen.add(node)
        nodes += [n for n, _ in node.next_functions]
    return len(seen)


# calls

def test_the_documented_call():
    """The arguments of the users' README at their sizes, on shorter segments."""
    model = MemoryTransformerXL(
        num_tokens=20000, dim=1024, heads=8, depth=8, seq_len=1024, mem_len=256, lmem_len=256,
        mem_write_iters=2, memory_layers=[6, 7, 8], num_mem_kv=128)
    memories = None
    with torch.no_grad():
        for x in torch.randint(0, 20000, (2, 1, 32)): logits, memories = model(x, memories=memories)
    short, long = memories
    assert logits.shape == (1, 32, 20000) and short is memories.short and long is memories.long
    assert short.shape == (1, 3, 256, 1024) and long.shape == (1, 256, 1024)


def documented_loop(model, steps=5, optimizer=None):
    """`backward` after each segment, and the optimizer's step if there is one: what comes of it."""
    memories = None
    for s in range(steps):
        x = text(2, 9, seed=s)
        logits, memories = model(x[:, :-1], memories=memories)
        loss = F.cross_entropy(logits.transpose(1, 2), x[:, 1:])
        loss.backward()
        yield logits, memories
        if optimizer is None: continue
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("step", [True, False], ids=["step after each segment", "one step at the end"])
def test_every_weight_trains_in_the_documented_loop(step):
    model = small(emb_dim=8, mogrify_gru=True, ff_glu=True, num_mem_kv=3, one_kv_head=True,
                  attn_dropout=0.1, ff_dropout=0.1, attn_layer_dropout=0.1)
    optimizer, learns = torch.optim.Adam(model.parameters(), 1e-3), set()
    for _, memories in documented_loop(model, optimizer=optimizer if step else None):
        learns |= {k for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {k for k, _ in model.named_parameters()}
    assert memories.fill.tolist() == [8, 8] and memories.long_fill.tolist() == [4, 4]


def test_the_documented_loop_trains_what_the_last_segment_wrote():
    """By finite differences: the loss of a segment, and the weights that wrote the slots before it."""
    model = small().double()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    weight, (_, first) = model.writer.to_kv.weight, model(text(seed=0))
    first = carry(first)

    def loss(memories):
        return model(text(seed=2), memories=model(text(seed=1), memories=memories)[1])[0].square().mean()

    slope, = torch.autograd.grad(loss(first), [weight])
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[3, 5] += sign * 1e-6
            ends.append(loss(first))
            weight[3, 5] -= sign * 1e-6
    assert abs(slope[3, 5]) > 1e-6
    close(slope[3, 5], (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-9)
    # Whatever wrote the slots before that is a constant, and so are the states of the segment.
    params = [model.embedding.weight, *model.layers.parameters(), *model.writer.parameters()]
    older, constant = (torch.autograd.grad(loss(m), params, allow_unused=True)
                       for m in (model(text(seed=0))[1], first))
    for a, b in zip(older, constant): assert a is b is None or torch.equal(a, b)


def test_memories_serve_several_backward_calls():
    """Two losses of the same memories: one after the other gives the gradient of their sum."""
    grads = []
    for together in (True, False):
        model = small()
        memories = model(text(seed=1), memories=model(text(seed=0))[1])[1]
        losses = [model(text(seed=s), memories=memories)[0].square().mean() for s in (2, 3)]
        for loss in [sum(losses)] if together else losses: loss.backward()
        grads.append([p.grad for p in model.writer.parameters()])
    for a, b in zip(*grads): close(a, b)
    assert any(grad.any() for grad in grads[0])


def test_frozen_weights_get_no_gradient_in_the_documented_loop():
    model = small()
    model.writer.to_q.requires_grad_(False)
    for _ in documented_loop(model, steps=3): pass
    assert model.writer.to_q.weight.grad is None and model.writer.to_kv.weight.grad.any()
    model.writer.requires_grad_(False)
    assert not model(text())[1].long.requires_grad


def test_the_documented_call_under_autocast():
    """The write is computed again in the type in which it was computed."""
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        memories = model(text(seed=0))[1]
        logits = model(text(seed=1), memories=memories)[0]
    seen = []
    model.writer.to_kv.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    logits.float().square().mean().backward()
    assert {*seen} == {torch.bfloat16}


def test_a_row_that_pauses_holds_on_to_no_graph():
    model, mask, sizes = small(), torch.tensor([[True] * 8, [False] * 8]), []
    memories = model(text())[1]
    for s in range(4):
        logits, memories = model(text(seed=s), memories=memories, mask=mask)
        sizes.append(graph_size(logits))
    assert len(set(sizes[1:])) == 1


def test_the_documented_loop_does_not_grow():
    model, sizes, states = small(), [], []
    for logits, memories in documented_loop(model, steps=20):
        sizes.append(graph_size(logits))
        states.append(weakref.ref(memories.long))
    del logits
    gc.collect()
    assert len(set(sizes[1:])) == 1 and sum(state() is not None for state in states) <= 1


def test_the_documented_call_equals_a_step():
    model, memory, memories = small(), None, None
    for s in range(3):
        out = model.step(text(seed=s), memory)
        logits, memories = model(text(seed=s), memories=memories)
        memory = carry(out.memory)
        assert torch.equal(logits, out.logits) and torch.equal(memories.long, memory.long)
        assert memories.long.requires_grad and not memories.short.requires_grad


def test_detach_lmem_is_an_option_of_the_model_and_of_the_call():
    learns = lambda model, **call: model(text(), **call)[1].long.requires_grad
    assert learns(small()) and not learns(small(), detach_lmem=True)
    assert not learns(small(detach_lmem=True)) and learns(small(), detach_lmem=False)
    with torch.no_grad(): assert not learns(small())


def test_memories_of_the_documented_call_go_where_a_memory_goes(tmp_path):
    model = small()
    memories = model(text())[1]
    save_memory(memories, tmp_path / "memory.safetensors")
    again = load_memory(tmp_path / "memory.safetensors", like=model.init_memory(2))
    assert torch.equal(again.long, memories.long)
    assert generate(model, text(), 9, memory=memories).shape == (2, 9)


def test_an_adapter_of_the_keys_is_used_for_memory_and_segment():
    """The layers and the writer call their projections; none reads the weight past the module."""
    model, memory = small().double(), None
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    plain = copy.deepcopy(model)
    for part in (*model.layers, model.writer):
        part.to_kv = torch.nn.Sequential(part.to_kv, torch.nn.Linear(part.to_kv.out_features,
                                                                     part.to_kv.out_features).double())
        adapter = part.to_kv[1]
        torch.nn.init.eye_(adapter.weight)
        torch.nn.init.zeros_(adapter.bias)
        adapter.weight.data *= 1.5
    for part in (*plain.layers, plain.writer): part.to_kv.weight.data *= 1.5
    other = None
    for s in range(3):
        (a, memory), (b, other) = model(text(seed=s), memory), plain(text(seed=s), other)
        close(a, b)
        close(memory.long, other.long)


def test_a_checkpoint_of_version_0_1_loads(tmp_path):
    """It had one matrix for queries, keys and values."""
    model = small(one_kv_head=True, num_mem_kv=2)
    model.save_pretrained(tmp_path)
    old = load_file(tmp_path / "model.safetensors")
    for i in range(2):
        parts = [old.pop(f"layers.{i}.{name}.weight") for name in ("to_q", "to_kv")]
        old[f"layers.{i}.to_qkv.weight"] = torch.cat(parts)
    save_file(old, tmp_path / "model.safetensors")
    again = MemoryTransformerXL.from_pretrained(tmp_path)
    assert torch.equal(again(text())[0], model.eval()(text())[0])
    old["layers.0.to_qkv.weight"] = old["layers.0.to_qkv.weight"][:-1].clone()
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit a MemoryTransformerXL"):
        MemoryTransformerXL.from_pretrained(tmp_path)


def test_defaults():
    model = MemoryTransformerXL(32, 16, 8, 2, heads=2)
    assert (model.mem_len, model.lmem_len, model.writer.iters) == (8, 8, 2)
    assert model.memory_layers == (1, 2) and model.layers[0].mem_kv is None


def test_every_option_changes_something():
    sizes = {k: sum(p.numel() for p in small(**o).parameters()) for k, o in dict(
        plain=dict(), mogrify=dict(mogrify_gru=True), glu=dict(ff_glu=True), emb=dict(emb_dim=4),
        sums=dict(gru_gated_residual=False), brc=dict(gate="brc"), gru=dict(gate="gru"),
        one=dict(memory_layers=[2]), shared=dict(one_kv_head=True), kv=dict(num_mem_kv=3),
        slots=dict(lmem_len=5), tied=dict(tie_embeddings=True, emb_dim=4)).items()}
    assert len(set(sizes.values())) == len(sizes)
    memory = carry(small().step(text()).memory)
    for options in (dict(mem_write_iters=1), dict(mem_attention="full"), dict(mem_heads=1)):
        other = carry(small(**options).step(text()).memory)
        assert torch.equal(other.short, memory.short) and not torch.equal(other.long, memory.long)


# what the original gets wrong

@pytest.mark.parametrize("attention", ["linear", "full"])
def test_the_query_of_a_slot_changes_that_slot_alone(attention):
    torch.manual_seed(0)
    writer = MemoryWriter(16, 8, 2, heads=4, iters=1, attention=attention)
    long, states = torch.randn(1, 8, 16), torch.randn(1, 2, 5, 16)
    before = writer(long, states, None)
    writer.slot.data[0] += 1
    changed = (writer(long, states, None) != before).any(-1)[0]
    assert changed.tolist() == [True] + 7 * [False]


@pytest.mark.parametrize("attend", [linear_attention, full_attention])
def test_heads_stay_heads(attend):
    q, k, v = torch.randn(3, 2, 4, 6, 5).unbind()
    whole, value = attend(q, k, v), v.clone()
    value[:, 1] += 1
    changed = (attend(q, k, value) - whole).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, False, False]
    close(attend(q[:, 2:3], k[:, 2:3], v[:, 2:3]), whole[:, 2:3])


def test_linear_attention_by_hand():
    q, k, v = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 2)
    out = torch.zeros(3, 2)
    for i in range(3):
        for f in range(4):
            over_positions = k[:, f].exp() / k[:, f].exp().sum()
            out[i] += q[i].softmax(-1)[f] * sum(over_positions[j] * v[j] for j in range(5))
    close(linear_attention(q[None, None], k[None, None], v[None, None])[0, 0], out)


@pytest.mark.parametrize("mem_len", [0, 3, 8, 20])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_written_after_every_segment_whatever_its_length(mem_len, n):
    model, memory = small(mem_len=mem_len), None
    for s in range(3):
        before = None if memory is None else memory.long
        memory = carry(model.step(text(2, n, seed=s), memory).memory)
        assert memory.long_fill.tolist() == [4, 4]
        assert before is None or not torch.equal(memory.long, before)


def test_written_once_for_each_segment_of_a_generation():
    model, writes = small(mem_len=3), []
    model.writer.register_forward_hook(lambda *_: writes.append(1))
    generate(model, text(1, 1), 8 * 3)   # 24 tokens are read: one and the 23 that are generated
    assert len(writes) == 2
    reader, tokens = Reader(model.eval(), 2), text(2, 20)
    with torch.no_grad():
        for t in tokens.split(1, 1): reader.read(t)
        memory = None
        for cut in tokens.split(8, 1): memory = carry(model.step(cut, memory).memory)
    close(reader.memory.long, memory.long)


@pytest.mark.parametrize("dim", [8, 16, 32])
def test_a_distance_has_one_vector_whatever_the_width_and_the_slots(dim):
    model, memory, seen = small(dim=dim, num_mem_kv=2, lmem_len=5), None, []
    positions, forward = model.positions, model.positions.forward
    d = dim // 2
    ones = torch.ones(2, 2, 8, d)
    known = positions.vectors.shape[-1]
    positions.vectors.data.copy_(torch.arange(known - 1., -1, -1).expand(2, d, known))

    def watch(q, keys):
        seen.append(forward(ones, keys))
        return forward(q, keys)

    positions.forward = watch
    for s in range(3): memory = carry(model.step(text(seed=s), memory).memory)
    for i, bias in enumerate(seen):
        timeless, m = 7, 0 if i < 2 else 8   # nothing is in the queue in the first segment
        want = torch.arange(8)[:, None] - torch.arange(-m, 8)
        states, slots, own = bias.split([m, timeless, 8], -1)
        own = torch.cat([states, own], -1)[0, 0] * d ** .5 / d
        close(own, want.float().masked_fill(want < 0, -torch.inf))
        assert not slots.any()


def test_only_the_kept_graph_trains_the_writer():
    """By finite differences, through two later segments."""
    model = small().double()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    weight = model.writer.to_kv.weight

    def loss(grad=True):
        memory, total = None, 0
        for s in range(3):
            out = model.step(text(seed=s), memory)
            memory, total = carry(out.memory, grad=grad), total + out.logits.square().mean()
        return total

    slope, = torch.autograd.grad(loss(), [weight])
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[3, 5] += sign * 1e-6
            ends.append(loss())
            weight[3, 5] -= sign * 1e-6
    assert abs(slope[3, 5]) > 1e-6
    close(slope[3, 5], (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-9)
    assert torch.autograd.grad(loss(grad=False), [weight], allow_unused=True)[0] is None


def test_detach_lmem_cuts_the_slots_and_only_them():
    model, memory = small(detach_lmem=True), None
    for s in range(2):
        out = model.step(text(seed=s), memory)
        memory = carry(out.memory, grad=True)
    assert not memory.long.requires_grad and memory.short.requires_grad


def test_truncation_keeps_the_graph_bounded():
    model, sizes = small(), {1: [], 2: []}
    for every, counts in sizes.items():
        memory = None
        for s in range(10):
            out = model.step(text(seed=s), memory)
            counts.append(graph_size(out.logits))
            memory = carry(out.memory, grad=(s + 1) % every != 0)
    assert len(set(sizes[1][2:])) == 1 and max(sizes[2][4:]) == max(sizes[2][2:4])


def test_the_short_term_memory_is_read_as_the_tokens_are():
    """States of any scale: they meet the same norm as the tokens beside them."""
    model = small()
    memory = carry(model.step(text()).memory)
    loud = type(memory)(memory.short * 1e3, memory.long, memory.fill, memory.long_fill)
    quiet = type(memory)(memory.short * 1e2, memory.long, memory.fill, memory.long_fill)
    close(*(model.step(text(seed=2), m).logits for m in (loud, quiet)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [dict(dim=18, heads=3), dict(lmem_len=0), dict(memory_layers=[]),
                                     dict(mem_len=0), dict(mem_len=0, lmem_len=0)], ids=str)
def test_sizes_that_must_work(options):
    model, memory = small(**options), None
    for s in range(3): memory = carry(model.step(text(seed=s), memory).memory)
    assert generate(model, text(2, 11), 3, temperature=0).shape == (2, 3)


def test_a_pausing_row_is_not_written():
    model = small()
    memory = carry(model.step(text()).memory)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1] = False
    after = carry(model.step(text(seed=2), memory, mask).memory)
    assert torch.equal(after.long[1], memory.long[1]) and not torch.equal(after.long[0], memory.long[0])


def test_a_fresh_row_that_pauses_stays_fresh():
    model, mask = small(), torch.ones(2, 8, dtype=torch.bool)
    mask[1] = False
    after = carry(model.step(text(), mask=mask).memory)
    assert after.long_fill.tolist() == [4, 0]
    close(model.step(text(seed=2), after).logits[1], model.step(text(seed=2)).logits[1])


# bad input

@pytest.mark.parametrize("options, words", [
    (dict(memory_layers=[3]), "memory_layers"), (dict(gate="lstm"), "gate"),
    (dict(heads=3), "multiple of heads = 3"), (dict(mem_heads=3), "multiple of mem_heads = 3"),
    (dict(lmem_len=-1), "lmem_len"), (dict(num_mem_kv=-1), "num_mem_kv"), (dict(depth=0), "depth"),
    (dict(mem_write_iters=0), "mem_write_iters"), (dict(mem_attention="none"), "mem_attention")],
    ids=lambda x: str(x)[:40])
def test_refuses_to_be_built(options, words):
    with pytest.raises(ValueError, match=words): small(**options)


def test_refuses_what_it_cannot_read():
    model = small()
    with pytest.raises(ValueError, match="seq_len = 8"): model(text(2, 9))
    for other in (small(depth=3), small(dim=8), small(lmem_len=5)):
        with pytest.raises(ValueError, match="memory of another model"):
            model(text(), other.init_memory(2))
    with pytest.raises(TypeError, match="LongShortMemory"): model(text(), torch.zeros(2))
