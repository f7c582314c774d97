"""The Compressive Transformer as its users call it, and what the original package gets wrong."""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from memformers import CompressiveTransformer, carry, generate, reset
from memformers.attention import Keys
from memformers.compressive import _keys, attention_loss, leaving, push_out

close = torch.testing.assert_close


def small(**options):
    torch.manual_seed(0)
    sizes = dict(num_tokens=32, dim=16, depth=2, seq_len=8, heads=2, mem_len=8, cmem_len=4,
                 cmem_ratio=2)
    return CompressiveTransformer(**(sizes | options))


def text(rows=2, length=8, seed=1):
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(seed))


# calls

def test_the_documented_call():
    """The arguments of the users' README at their sizes, on shorter segments."""
    model = CompressiveTransformer(
        num_tokens=20000, emb_dim=128, dim=512, depth=12, seq_len=1024, mem_len=1024,
        cmem_len=1024 // 4, cmem_ratio=4, reconstruction_loss_weight=1, attn_dropout=0.1,
        ff_dropout=0.1, attn_layer_dropout=0.1, gru_gated_residual=True, mogrify_gru=False,
        memory_layers=range(6, 13), ff_glu=True)
    segments = torch.randint(0, 256, (1, 256)).reshape(1, -1, 128).transpose(0, 1)
    masks = torch.ones_like(segments).bool()
    with torch.no_grad():
        logits, memories, aux_loss = model(segments[0], mask=masks[0])
        logits, memories, aux_loss = model(segments[1], mask=masks[1], memories=memories)
    assert logits.shape == (1, 128, 20000) and aux_loss.shape == ()
    mem, cmem = memories
    assert mem is memories.mem and cmem is memories.cmem
    assert mem.shape == (1, 7, 1024 + 3, 512) and cmem.shape == (1, 7, 256, 512)


def test_the_documented_loop_trains():
    model = small(emb_dim=8, mogrify_gru=True, ff_glu=True, attn_dropout=0.1, ff_dropout=0.1,
                  attn_layer_dropout=0.1, reconstruction_attn_dropout=0.1)
    optimizer, memories = torch.optim.Adam(model.parameters(), 1e-3), None
    for s in range(6):
        x = text(2, 9, seed=s)
        logits, memories, aux_loss = model(x[:, :-1], memories=memories)
        (F.cross_entropy(logits.transpose(1, 2), x[:, 1:]) + aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert aux_loss > 0 and memories.cfill.tolist() == [4, 4]


def test_defaults():
    model = CompressiveTransformer(32, 16, 8, 2, heads=2)
    assert (model.mem_len, model.cmem_len, model.cmem_ratio) == (8, 2, 4)
    assert model.memory_layers == (1, 2) and model.enhanced_recurrence
    assert model.layers[0].join_feed.gate is not None


def test_every_option_changes_something():
    sizes = {k: sum(p.numel() for p in small(**o).parameters()) for k, o in dict(
        plain=dict(), mogrify=dict(mogrify_gru=True), glu=dict(ff_glu=True), emb=dict(emb_dim=4),
        sums=dict(gru_gated_residual=False), brc=dict(gate="brc"), nbrc=dict(gate="nbrc"),
        one=dict(memory_layers=[2]), mean=dict(compression="mean"),
        decoder=dict(aux="autoencoding"), tied=dict(tie_embeddings=True)).items()}
    assert len(set(sizes.values())) == len(sizes)


# what the original gets wrong

def test_keys_and_values_keep_learning_after_the_first_compression():
    model, memory = small(), None
    for s in range(6):
        model.zero_grad()
        out = model.step(text(seed=s), memory)
        memory = carry(out.memory)
        (out.logits.square().mean() + out.aux_loss).backward()
        assert all(p.requires_grad for p in model.parameters())
        for name, p in model.named_parameters():
            if not name.startswith("compress."): assert p.grad.abs().max() > 0, f"{name}, segment {s}"


@pytest.mark.parametrize("options", [dict(), dict(compression="dilated"), dict(aux="autoencoding")],
                         ids=str)
def test_aux_loss_trains_the_compression_and_nothing_else(options):
    model, memory = small(**options), None
    for s in range(4):
        out = model.step(text(seed=s), memory)
        memory = carry(out.memory)
    model.zero_grad()
    out.aux_loss.backward()
    for name, p in model.named_parameters():
        learns = p.grad is not None and bool(p.grad.abs().max() > 0)
        assert learns == name.startswith("compress."), name


def test_the_language_loss_reaches_the_compression_when_the_graph_is_kept():
    model, memory = small(), None
    for s in range(4):
        out = model.step(text(seed=s), memory)
        memory = carry(out.memory, grad=True)
    out.logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.compress.parameters())


@pytest.mark.parametrize("compression", ["conv", "dilated"])
def test_a_slot_begins_as_the_mean_of_its_group(compression):
    """Equal states are compressed to about themselves, not to their sum."""
    torch.manual_seed(0)
    compress = CompressiveTransformer(num_tokens=9, dim=32, seq_len=8, depth=1, heads=4,
                                      cmem_ratio=4, compression=compression).compress[0]
    state = torch.randn(32)
    slots = compress(state.expand(1, 15, 32)[:, :12 + compress.ahead])
    assert slots.shape == (1, 3, 32)
    assert ((slots - state).norm(dim=-1) < 0.5 * state.norm()).all()


def test_a_distance_has_one_vector_from_the_first_segment_on():
    model, memory = small(), None
    q = torch.randn(2, 2, 8, 8)
    seen = []
    positions, forward = model.positions, model.positions.forward

    def watch(_, keys):
        seen.append(forward(q, keys))
        return forward(_, keys)

    positions.forward = watch
    for s in range(4): memory = carry(model.step(text(seed=s), memory).memory)
    q = q * 8 ** -0.5
    for bias in seen:
        for back in range(4):   # a token and those just before it are the last columns
            own = torch.stack([bias[:, :, i, bias.shape[3] - 8 + i - back] for i in range(back, 8)], 2)
            close(own, (q[:, :, back:] * positions.vectors[None, :, :, -1 - back, None].mT).sum(-1))


def keys_after(model, memory, n):
    """What the next n tokens read in a layer with memory."""
    segment = model.begin(memory)
    span, front = segment.cursor.advance(n)[0], segment.caches[0].front
    return _keys(memory, front, span, model.cmem_ratio, model.ahead, None)


def test_compressed_slots_stand_where_the_newest_of_their_group_stood():
    model = small(cmem_ratio=3, mem_len=5, cmem_len=4)
    memory = None
    for n in (8, 8, 4): memory = carry(model.step(text(1, n), memory).memory)
    fill, c = int(memory.fill), int(memory.cfill)
    keys = keys_after(model, memory, 2)
    unused = memory.mem.shape[2] - fill
    vector = torch.zeros(1, model.positions.vectors.shape[-1])
    model.positions.vectors.data.copy_(torch.arange(vector.shape[-1] - 1., -1, -1))   # the distance
    bias = model.positions(torch.ones(1, 2, 2, 8), keys)[0, 0] * 8 ** .5 / 8
    assert bias[:, c:c + unused].eq(-torch.inf).all()
    bias = torch.cat([bias[:, :c], bias[:, c + unused:]], 1)
    line = [-fill - 1 - 3 * k for k in reversed(range(c))] + list(range(-fill, 2))
    for i in range(2):
        close(bias[i, :len(line) - 1 + i], torch.tensor([float(i - t) for t in line[:len(line) - 1 + i]]))


def test_rows_at_different_places_give_the_same_scores_as_rows_at_one():
    model, memory = small(cmem_ratio=3, mem_len=5, cmem_len=4), None
    for n in (8, 8, 4): memory = carry(model.step(text(1, n), memory).memory)
    keys = keys_after(model, memory, 4)
    assert keys.distance is None
    key_times = torch.cat([-1 - memory.fill - 3 * torch.arange(4).flip(0), torch.arange(-7, 4)])
    single = Keys(4, 11, (0, 1, 4), distance=(torch.arange(4)[:, None] - key_times)[None],
                  hidden=keys.hidden)
    q = torch.randn(1, 2, 4, 8)
    a, b = model.positions(q, keys), model.positions(q, single)
    close(a, b)


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("mem_len", [3, 5, 8])
def test_nothing_that_leaves_is_padded_or_lost(ratio, mem_len):
    """Every token is in exactly one place: in a group that left, or still in the memory, in order."""
    room = mem_len + ratio - 1
    mem, fill = torch.zeros(2, 1, room, 1), torch.zeros(2, dtype=torch.long)
    read, gone = torch.zeros(2, dtype=torch.long), [[], []]
    for s, counts in enumerate([[5, 2], [1, 5], [3, 0], [5, 5], [4, 1], [5, 5]]):
        counts = torch.tensor(counts)
        new = (read[:, None] + 1 + torch.arange(5)).float().view(2, 1, 5, 1)
        mem, fill, out, go = push_out(mem, fill, new, counts,
                                      lambda f, n: leaving(f, n, mem_len, ratio) * ratio)
        read = read + counts
        for r in range(2):
            gone[r] += out[r, 0, :go[r], 0].tolist()
            held = mem[r, 0, room - fill[r]:, 0].tolist()
            assert gone[r] + held == [float(i) for i in range(1, read[r] + 1)]
            assert len(gone[r]) % ratio == 0 and (not gone[r] or len(held) >= mem_len)
            assert not mem[r, 0, :room - fill[r]].any()


def test_the_target_of_the_reconstruction_is_what_left():
    """A group of one state is its own slot: nothing is lost, whatever else is in the memory."""
    model, memory = small(cmem_ratio=1, cmem_len=8, mem_len=20, compression="mean"), None
    for s in range(5):
        out = model.step(text(seed=s), memory)
        memory = carry(out.memory)
    assert memory.cfill.min() > 0
    close(out.aux_loss, torch.zeros(()))


def test_the_loss_of_the_attention_by_hand():
    q, k, v, a, c = (torch.randn(1, 1, n, 4) for n in (2, 6, 6, 3, 3))
    read = lambda k, v: (q @ k.mT / 2).softmax(-1) @ v
    close(attention_loss(q, (k, v), (a, c)), (read(a, c) - read(k, v)).square().mean((1, 3)))


def test_memories_stay_in_their_layer():
    model, memory = small(depth=3, mem_len=6), None
    for s in range(5):
        before = memory
        memory = carry(model.step(text(1, 2, seed=s), memory).memory)
        if before is None or before.fill[0] < 6: continue
        m = memory.mem.shape[2]
        close(memory.mem[:, :, m - 6:m - 2], before.mem[:, :, m - 4:])


def test_the_last_layer_reads_its_own_output():
    """Enhanced recurrence: what a layer wrote is what it reads, and nothing wraps around."""
    model = small()
    entered = []
    model.norm.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    memory = carry(model.step(text()).memory)
    close(memory.mem[:, 1, -8:], entered[0])


def test_padding_is_not_written():
    model = small()
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    memory = carry(model.step(text(), None, mask).memory)
    assert memory.fill.tolist() == [8, 3] and not memory.mem[1, :, :-3].any()
    after = model.step(text(seed=2), memory).logits[1:]
    alone = carry(model.step(text()[1:, :3]).memory)
    close(after, model.step(text(seed=2)[1:], alone).logits)


def test_a_memory_without_compression_and_layers_without_memory():
    assert len(small(cmem_len=0).compress) == 0 == len(small(memory_layers=[]).compress)
    assert len(small(memory_layers=[2]).compress) == 1
    for model in (small(cmem_len=0), small(memory_layers=[]), small(mem_len=0)):
        memory = None
        for s in range(3): memory = carry(model.step(text(seed=s), memory).memory)
        assert memory.cmem.shape[1] == len(model.memory_layers)


def test_old_slots_leave_first():
    model, memory = small(compression="mean", memory_layers=[1], enhanced_recurrence=False), None
    for s in range(5):
        before, memory = memory, carry(model.step(text(seed=s), memory).memory)
    close(memory.cmem[:, :, -4:], before.mem[:, :, -8:].unflatten(2, (4, 2)).mean(3))


def test_generation_of_any_prompt():
    model = small(num_tokens=5)
    long = torch.randint(5, (2, 19))
    assert generate(model, long, 10, temperature=0).shape == (2, 10)
    assert generate(model, long[0], 3, top_k=2).shape == (3,)
    # The same as reading everything again for each token.
    for _ in range(4):
        memory = None
        for cut in long.split(8, 1):
            out = model.eval().step(cut, memory)
            memory = carry(out.memory)
        long = torch.cat([long, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, long[:, :19], 4, temperature=0), long[:, 19:])


def test_a_reset_row_has_no_slots():
    model, memory = small(), None
    for s in range(4): memory = carry(model.step(text(seed=s), memory).memory)
    memory = reset(memory, torch.tensor([True, False]))
    assert memory.fill.tolist() == [0, 8] and memory.cfill.tolist() == [0, 4]
    out = model.step(text(seed=9), memory)
    close(out.logits[:1], model.step(text(seed=9)[:1]).logits)


def test_cost_does_not_grow_with_the_document():
    model, memory, sizes = small(), None, []
    for s in range(12):
        out = model.step(text(seed=s), memory)
        memory = carry(out.memory)
        graph, seen = [(out.logits.sum() + out.aux_loss).grad_fn], set()
        while graph:
            node = graph.pop()
            if node is None or node in seen: continue
            seen.add(node)
            graph += [n for n, _ in node.next_functions]
        sizes.append(len(seen))
    assert len(set(sizes[3:])) == 1


# adapters, old weights, tuples

class Adapter(torch.nn.Module):
    """A linear module with a low-rank change beside it, as adapters make it."""
    def __init__(self, linear):
        super().__init__()
        self.weight, self.linear = linear.weight, linear
        self.down, self.up = (torch.nn.Parameter(0.3 * torch.randn(n)) for n in ((2, 16), (32, 2)))

    def forward(self, x): return self.linear(x) + x @ self.down.mT @ self.up.mT


def test_an_adapter_changes_the_keys_of_memory_and_segment_alike():
    adapted, merged = small(), small()
    for layer, other in zip(adapted.layers, merged.layers):
        layer.to_kv = Adapter(layer.to_kv)
        with torch.no_grad(): other.to_kv.weight += layer.to_kv.up @ layer.to_kv.down
    outs = []
    for model in (adapted, merged):
        memory = None
        for s in range(4):
            out = model.step(text(seed=s), memory)
            memory = carry(out.memory)
        outs.append(out)
    close(outs[0].logits, outs[1].logits)
    close(outs[0].aux_loss, outs[1].aux_loss)
    outs[0].aux_loss.backward()
    assert adapted.layers[0].to_kv.up.grad is None


def test_weights_of_version_0_1_are_loaded(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    old = dict(model.state_dict())
    for i in range(2):
        parts = [old.pop(f"layers.{i}.{name}.weight") for name in ("to_q", "to_kv")]
        old[f"layers.{i}.to_qkv.weight"] = torch.cat(parts)
    save_file(old, tmp_path / "model.safetensors")
    again = CompressiveTransformer.from_pretrained(tmp_path)
    close(again.step(text()).logits, model.eval().step(text()).logits)


def test_a_memory_may_be_passed_as_a_tuple():
    model, memory = small(), None
    close(model(text(), memories=(None, None))[0], model(text())[0])
    for n in (8, 3, 8):
        memory = model(text(length=n), memories=memory)[1]
        mem, cmem = memory
        for given in ((mem, cmem), (mem[:, :, -int(memory.fill[0]):], cmem)):
            logits, after, _ = model(text(seed=9), memories=given)
            want, as_value, _ = model(text(seed=9), memories=memory)
            close(logits, want)
            for x, y in zip(after, as_value): close(x, y)
            assert after.fill.equal(as_value.fill) and after.cfill.equal(as_value.cfill)
    assert memory.compressed_mem is memory.cmem is memory[1]
    assert model(text(), memories=(mem, None))[1].cfill.tolist() == [4, 4]
    for wrong in ((mem,), (mem.transpose(0, 1)[:1], None), (mem[0], cmem), ("mem", None)):
        with pytest.raises(ValueError, match="memories must be a"): model(text(), memories=wrong)


# the auxiliary loss of pieces

@pytest.mark.parametrize("options", [dict(), dict(compression="most_used"),
                                     dict(aux="autoencoding", memory_layers=[2])], ids=str)
def test_pieces_of_a_segment_have_the_loss_of_the_whole(options):
    model, memory = small(**options), None
    for s in range(2): memory = carry(model.step(text(seed=s), memory).memory)
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    whole, segment = model.step(text(seed=3), memory, mask), model.begin(memory)
    for part in torch.arange(8).split(3):
        _, segment = model.extend(segment, text(seed=3)[:, part], mask[:, part])
    after, aux = model.finish(segment)
    assert aux > 0
    close(aux, whole.aux_loss)
    for x, y in zip(after, whole.memory): close(x, y)



# bad input

@pytest.mark.parametrize("options, words", [
    (dict(cmem_len=3), "cmem_len must be at least seq_len // cmem_ratio = 4"),
    (dict(memory_layers=[3]), "memory_layers"), (dict(memory_layers=[0, 1]), "memory_layers"),
    (dict(compression="pca"), "compression"), (dict(aux="none"), "aux"), (dict(gate="lstm"), "gate"),
    (dict(heads=3), "multiple of heads"), (dict(cmem_ratio=0), "cmem_ratio"),
    (dict(mem_len=-1), "mem_len"), (dict(depth=0), "depth"),
    (dict(compression="dilated", mem_len=0), "dilated")], ids=lambda x: str(x)[:40])
def test_refuses_to_be_built(options, words):
    with pytest.raises(ValueError, match=words): small(**options)


def test_refuses_what_it_cannot_read():
    model = small()
    with pytest.raises(ValueError, match="seq_len = 8"): model(text(2, 9))
    for other in (small(depth=3), small(dim=8), small(mem_len=9), small(cmem_len=5)):
        with pytest.raises(ValueError, match="memory of another model"):
            model(text(), other.init_memory(2))
    with pytest.raises(ValueError, match="one row for each"): model(text(), model.init_memory(3))
    with pytest.raises(TypeError, match="CompressiveMemory"): model(text(), torch.zeros(2))


def test_the_auxiliary_loss_is_there_without_a_graph():
    """Evaluation reports it; reading token by token does not pay for it."""
    torch.manual_seed(0)
    model = CompressiveTransformer(17, 12, seq_len=4, depth=2, heads=3, mem_len=4, cmem_ratio=2)
    tokens, memory = torch.randint(17, (2, 12)), None
    for cut in tokens.split(4, 1):
        out = model.step(cut, memory)
        with torch.no_grad(): close(model.step(cut, memory).aux_loss, out.aux_loss.detach())
        memory = carry(out.memory)
    assert out.aux_loss > 0
    with torch.no_grad():
        _, segment = model.extend(model.begin(memory), tokens[:, :2])
        assert model.finish(segment)[1] == 0
