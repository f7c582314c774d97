"""The Memorizing Transformer as its users call it, at their sizes, and what it refuses."""
import os

import pytest
import torch

from memformers import (KNNAttention, KNNMemory, MemorizingTransformer, carry, clone, generate,
                        load_memory, nbytes, reset, save_memory, select)
from memformers.generate import Reader
from memformers.knn import KNNStore
from memformers.memorizing import to_memory


def small(**options):
    torch.manual_seed(0)
    sizes = dict(num_tokens=32, dim=16, depth=2, heads=2, dim_head=8, seq_len=8,
                 memorizing_layers=[2], max_knn_memories=20, num_retrieved_memories=4)
    return MemorizingTransformer(**(sizes | options)).eval()


def text(rows=2, n=8, seed=0, low=0):
    return torch.randint(low, 32, (rows, n), generator=torch.Generator().manual_seed(seed))


# the documented calls

@torch.no_grad()
def test_the_documented_call():
    model = MemorizingTransformer(num_tokens=20000, dim=512, dim_head=64, depth=8,
                                  memorizing_layers=(4, 5), max_knn_memories=64000,
                                  num_retrieved_memories=32, clear_memories_on_sos_token_id=1)
    data = torch.randint(2, 20000, (2, 256))
    knn_memories = model.create_knn_memories(batch_size=2)
    logits = model(data, knn_memories=knn_memories)
    assert logits.shape == (2, 256, 20000)
    logits = model(data, knn_memories=knn_memories)
    assert [m.fill.tolist() for m in knn_memories] == [[512, 512]] * 2
    before = knn_memories[0].kv.clone()
    again = model(data, knn_memories=knn_memories, add_knn_memory=False)
    assert torch.equal(knn_memories[0].kv, before) and not torch.equal(again, logits)


def test_the_documented_training_loop():
    model = small(num_tokens=16).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data, losses = torch.arange(33).remainder(11).repeat(2, 1), []
    for _ in range(6):
        with model.knn_memories_context(batch_size=2) as knn_memories:
            for part in data.unfold(1, 9, 8).unbind(1):
                loss = model(part[:, :-1], knn_memories=knn_memories, labels=part[:, 1:])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match="closed"): knn_memories[0].add(torch.zeros(2, 1, 2, 8))


def test_the_documented_call_with_xl_memories():
    model = small(depth=3, xl_memory_layers=(1, 2, 3), xl_max_memories=5,
                  memorizing_layers=(2, 3), shift_knn_memories_down=1, shift_xl_memories_down=1)
    with model.knn_memories_context(batch_size=2) as knn_memories:
        logits, xl_memories = model(text(), knn_memories=knn_memories)
        assert [m.fill.tolist() for m in knn_memories] == [[3, 3]] * 2, "only what XL discards"
        logits, xl_memories = model(text(seed=1), knn_memories=knn_memories,
                                    xl_memories=xl_memories)
        assert xl_memories.fill.tolist() == [5, 5] and logits.shape == (2, 8, 32)
        mem, fill = xl_memories
        assert not mem.requires_grad
        loss, xl_memories = model(text(seed=2), knn_memories=knn_memories,
                                  xl_memories=xl_memories, labels=text())
        loss.backward()


def test_forward_is_a_view_of_step():
    model = small(xl_max_memories=5, xl_memory_layers=[2], clear_memories_on_sos_token_id=3)
    knn, xl, memory = model.create_knn_memories(batch_size=3), None, None
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < .8
    for i in range(5):
        logits, xl = model(text(3, seed=i), knn_memories=knn, xl_memories=xl, mask=mask)
        out = model.step(text(3, seed=i), memory, mask)
        memory = carry(out.memory)
        torch.testing.assert_close(logits, out.logits)
    ours = memory.knn.layer(0)
    assert torch.equal(knn[0].fill, ours.fill)
    for r in range(3):
        same = ours.chronological()[0][r, :ours.fill[r]]
        torch.testing.assert_close(knn[0]._chronological(r), same)


@pytest.mark.parametrize("options", [dict(), dict(gate="network", num_retrieved_memories=None),
                                     dict(xl_max_memories=5, shift_knn_memories_down=1)])
def test_the_documented_call_with_keys_and_values_per_head(options):
    """A memory for each memorizing layer and head; the same as the contract's."""
    model = small(kv_heads=2, memorizing_layers=[1, 2], clear_memories_on_sos_token_id=3, **options)
    with model.knn_memories_context(batch_size=2) as knn:
        assert len(knn) == 4 and knn[0].dim == 8
        memory, xl = None, None
        for i in range(4):
            if "xl_max_memories" in options:
                logits, xl = model(text(seed=i), knn_memories=knn, xl_memories=xl)
            else: logits = model(text(seed=i), knn_memories=knn)
            out = model.step(text(seed=i), memory)
            memory = carry(out.memory)
            torch.testing.assert_close(logits, out.logits)
        for i in range(4):
            store = memory.knn.layer(i)
            assert torch.equal(knn[i].fill, store.fill)
            for r in range(2):
                same = store.chronological()[0][r, :store.fill[r]]
                torch.testing.assert_close(knn[i]._chronological(r), same)
        assert not torch.equal(knn[0].kv, knn[1].kv)
        with pytest.raises(ValueError, match="kv_heads = 2; got 2"):
            model(text(), knn_memories=list(knn)[:2], xl_memories=xl)
    one_head = small(memorizing_layers=[1, 2], **options)
    full = [nbytes(m.init_memory(1), full=True) for m in (model, one_head)]
    assert full[0] > 1.9 * full[1]


def test_keys_and_values_per_head_in_a_layer_for_another_model():
    layer = KNNAttention(16, heads=4, dim_head=8, kv_heads=2)
    stores, x = [KNNMemory(8, 100, 2), KNNMemory(8, 100, 2)], torch.randn(2, 7, 16)
    first = layer(x, stores)
    assert [store.fill.tolist() for store in stores] == [[7, 7]] * 2
    assert not torch.allclose(layer(x, stores, add_knn_memory=False), first)
    for heads, message in ((3, "a divisor of the 4 heads"), (0, "1 or more")):
        with pytest.raises(ValueError, match=f"kv_heads must be {message}"):
            KNNAttention(16, heads=4, kv_heads=heads)
    with pytest.raises(ValueError, match="kv_heads"): small(kv_heads=2, knn_attn_heads=3)


def test_a_part_of_the_rows():
    model, knn = small(), small().create_knn_memories(batch_size=3)
    with knn.at_batch_indices([2, 0]): model(text(2), knn_memories=knn)
    assert knn[0].fill.tolist() == [8, 0, 8]
    a = model(text(3, seed=1), knn_memories=knn, add_knn_memory=False)
    with knn.at_batch_indices([2]): b = model(text(3, seed=1)[2:], knn_memories=knn)
    torch.testing.assert_close(a[2:], b)


def test_without_a_memory():
    model = small()
    torch.testing.assert_close(model(text()), model.step(text()).logits)


@pytest.mark.parametrize("options", [dict(backend="faiss"), dict(memories_directory="here")])
def test_other_stores_give_the_same_logits(options, tmp_path):
    if "backend" in options: pytest.importorskip("faiss")
    else: options = dict(memories_directory=tmp_path)
    model = small()
    with model.knn_memories_context(batch_size=2) as a, \
            model.knn_memories_context(batch_size=2, **options) as b:
        for i in range(4):
            torch.testing.assert_close(model(text(seed=i), knn_memories=a),
                                       model(text(seed=i), knn_memories=b))
    assert os.listdir(tmp_path) == []


def test_every_option_works():
    for options in (dict(gate="sigmoid"), dict(gate="network"), dict(num_retrieved_memories=None),
                    dict(knn_attn_heads=3), dict(kv_heads=2), dict(attn_dropout=.1, ff_dropout=.1, emb_dropout=.1),
                    dict(tie_embeddings=True, emb_dim=8), dict(knn_position_bias=False),
                    dict(normalize_all=True), dict(output_gate=True), dict(ff_glu=True, ff_mult=2),
                    dict(memorizing_layers=2), dict(memorizing_layers=[]),
                    dict(knn_memory_multiprocessing=True), dict(max_knn_memories=1),
                    dict(xl_max_memories=4, xl_memory_layers=1), dict(xl_max_memories=4)):
        model = small(**options).train()
        memory = None
        for i in range(3):
            out = model.step(text(seed=i), memory)
            memory = carry(out.memory)
        out.logits.square().sum().backward()
        assert out.logits.isfinite().all()
        assert all(p.grad is not None for p in model.head.parameters())


def test_defaults_are_those_that_users_know():
    with torch.device("meta"): model = MemorizingTransformer(num_tokens=100, dim=64, depth=8)
    assert model.memorizing_layers == (4,) and model.max_knn_memories == 250_000
    assert model.layers[3].attention.num_retrieved_memories == 32
    assert model.layers[3].attention.gate == "softmax"
    assert MemorizingTransformer(num_tokens=4, dim=8, depth=1).memorizing_layers == (1,)
    scale = MemorizingTransformer(num_tokens=4, dim=8, depth=1).layers[0].attention.log_scale
    torch.testing.assert_close(scale.exp(), torch.full_like(scale, 20.))


def test_a_layer_for_another_model():
    """Behind an output gate that starts at 0, an inserted layer changes nothing at first."""
    layer, memory = KNNAttention(16, heads=2, dim_head=8, output_gate=True), KNNMemory(8, 100, 2)
    x = torch.randn(2, 7, 16)
    assert not layer(x, memory).any() and memory.fill.tolist() == [7, 7]
    torch.nn.init.ones_(layer.output_gate)
    a, b = layer(x, memory, add_knn_memory=False), layer(x)
    assert not torch.allclose(a, b) and memory.fill.tolist() == [7, 7]
    y = x.clone()
    y[:, 4] += 1
    assert torch.equal(layer(y)[:, :4], layer(x)[:, :4])


# defects of the original, each as a test of its own

def test_reading_another_layers_store_is_not_a_renaming():
    shifted, plain = (small(depth=3, memorizing_layers=[2, 3], shift_knn_memories_down=s)
                      for s in (1, 0))
    a, b = (carry(m.step(text()).memory) for m in (shifted, plain))
    assert torch.equal(a.knn.kv, b.knn.kv), "each layer writes its own"
    x, y = (m.step(text(seed=1), memory).logits for m, memory in ((shifted, a), (plain, b)))
    assert not torch.allclose(x, y)


def test_the_top_layer_reads_its_own_memory_and_nothing_wraps():
    model = small(depth=3, memorizing_layers=[1, 2, 3], shift_knn_memories_down=2,
                  xl_max_memories=4, shift_xl_memories_down=1)
    assert model.knn_source == {1: 3, 2: 3, 3: 3} and model.xl_source == {1: 2, 2: 3, 3: 3}


def test_shifted_xl_memories_stay_with_the_layer_that_wrote_them():
    """Also when the segment is shorter than the memory."""
    model = small(depth=3, xl_max_memories=20, shift_xl_memories_down=1, memorizing_layers=[2])
    memory = None
    for i in range(3):
        before = memory
        out = model.step(text(seed=i)[:, :3], memory)
        memory = carry(out.memory)
        if before is not None:
            assert torch.equal(memory.xl.mem[:, :, -6:-3], before.xl.mem[:, :, -3:])


def test_clearing_fires_at_the_tokens_own_row_and_in_the_middle_of_a_segment():
    model = small(clear_memories_on_sos_token_id=1, clear_memories_on_eos_token_id=0,
                  xl_max_memories=3, xl_memory_layers=[1])
    tokens = text(3, 16, low=2)
    tokens[1, 11], tokens[2, 10] = 1, 0
    memory = carry(model.step(tokens[:, :8]).memory)
    out = model.step(tokens[:, 8:], memory)
    after = carry(out.memory)
    assert after.knn.fill[:, 0].tolist() == [16, 5, 5]
    for row, start in ((1, 11), (2, 11)):
        alone = model.step(tokens[row:row + 1, start:])
        torch.testing.assert_close(out.logits[row:row + 1, start - 8:], alone.logits)
        one = carry(alone.memory)
        torch.testing.assert_close(after.xl.mem[row], one.xl.mem[0])
        torch.testing.assert_close(after.knn.kv[row, 0, :5], one.knn.kv[0, 0, :5])
    unbroken = small(xl_max_memories=3, xl_memory_layers=[1])
    whole = unbroken.step(tokens[:, 8:], carry(unbroken.step(tokens[:, :8]).memory)).logits
    torch.testing.assert_close(out.logits[0], whole[0])
    torch.testing.assert_close(out.logits[1, :3], whole[1, :3])
    torch.testing.assert_close(out.logits[2, :3], whole[2, :3])


def test_an_end_before_padding_clears_at_the_segments_end():
    model = small(clear_memories_on_eos_token_id=0, xl_max_memories=3, xl_memory_layers=[1])
    tokens = text(low=1)
    tokens[0, 4] = 0
    mask = torch.arange(8) < torch.tensor([[5], [8]])
    memory = carry(model.step(tokens, None, mask).memory)
    assert memory.knn.fill[:, 0].tolist() == [0, 8]
    following = text(low=1, seed=1)
    after, alone = model.step(following, memory).logits, model.step(following).logits
    torch.testing.assert_close(after[0], alone[0])
    assert not torch.allclose(after[1], alone[1])


def test_a_padded_sos_clears_nothing():
    model = small(clear_memories_on_sos_token_id=0)
    memory = carry(model.step(text(low=1)).memory)
    mask = torch.arange(8) < 5
    memory = carry(model.step(text(low=1, seed=1), memory, mask.expand(2, 8)).memory)
    assert memory.knn.fill.flatten().tolist() == [13, 13]


def test_relative_positions_count_the_memory_in_front():
    """A layer with an XL memory of enough room reads a text as if it were one segment."""
    model = small(depth=1, memorizing_layers=[], xl_max_memories=16, seq_len=16)
    memory, parts = None, []
    for part in text(2, 16).split(4, 1):
        out = model.step(part, memory)
        memory = carry(out.memory)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), model.step(text(2, 16)).logits)


def test_a_memory_of_one_layer_does_not_move_the_positions_of_another():
    some, none = small(depth=1, memorizing_layers=[1], xl_max_memories=0), \
        small(depth=1, memorizing_layers=[1], xl_max_memories=9, xl_memory_layers=[])
    memory = carry(some.step(text()).memory), carry(none.step(text()).memory)
    a, b = (m.step(text(seed=1), x).logits for m, x in zip((some, none), memory))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_precision(dtype):
    model = small(gate="network", xl_max_memories=3).to(dtype)
    memory = None
    for i in range(3):
        out = model.step(text(seed=i), memory)
        memory = carry(out.memory)
    out.logits.sum().backward()
    assert out.logits.dtype == memory.knn.kv.dtype == dtype and out.logits.isfinite().all()
    knn = model.create_knn_memories(batch_size=2)
    model(text(), knn_memories=knn)
    assert knn[0].kv.dtype == dtype


def test_all_labels_padded_is_no_nan():
    model = small(pad_id=0)
    loss = model(text(), labels=torch.zeros(2, 8).long())
    assert loss.item() == 0
    loss.backward()
    labels = text(low=1).index_fill(1, torch.tensor([3]), 0)
    want = torch.nn.functional.cross_entropy(model(text()).mT, labels, ignore_index=0)
    torch.testing.assert_close(model(text(), labels=labels), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_labels_is_summed_in_float32(dtype):
    model = small(seq_len=64).to(dtype)
    model.head.weight.data *= 8000   # a sum beyond the range of float16
    x, labels = text(n=64), text(n=64, seed=1, low=1)
    loss = model(x, labels=labels)
    want = torch.nn.functional.cross_entropy(model(x).double().mT, labels)
    assert want * labels.numel() > 65504
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)


def test_padding_has_no_label():
    model, labels = small(), text(seed=1, low=1)
    mask = torch.arange(8) < torch.tensor([[5], [8]])
    want = model(text(), mask=mask).log_softmax(-1).gather(-1, labels[..., None])[mask].mean()
    torch.testing.assert_close(model(text(), labels=labels, mask=mask), -want)
    with pytest.raises(ValueError, match=r"labels must be \(b, n\) = \(2, 8\)"):
        model(text(), labels=labels[:, 1:])


def test_logits_are_not_unpacked_as_rows():
    """As the call of an older version: `logits, _ = model(data, knn_memories=…)`."""
    model = small()
    with pytest.raises(TypeError, match="logits alone.*logits = model"): logits, _ = model(text())
    logits = model(text())
    assert len(logits) == 2 and logits[0].shape == (8, 32) and len(logits.unbind()) == 2
    logits.sum().backward()
    logits, xl_memories = small(xl_max_memories=3)(text())
    first, second = logits


def test_a_directory_is_a_path_and_is_not_ignored(tmp_path):
    model = small(knn_memories_directory=tmp_path / "stores")
    with model.knn_memories_context(batch_size=2) as knn:
        model(text(), knn_memories=knn)
        assert len(list((tmp_path / "stores").iterdir())) == 1
        with pytest.raises(TypeError, match="memory must be a MemorizingMemory"):
            model.step(text(), knn)
    model(text())
    for call in (lambda: model.step(text()), lambda: generate(model, text(), 2)):
        with pytest.raises(ValueError, match="knn_memories_directory.*stores.*= None"): call()
    model.knn_memories_directory = None
    model.step(text())


def test_rows_with_a_token_are_cleared():
    model, x = small(), text(3, low=2)
    x[1, 4] = 1
    with model.knn_memories_context(batch_size=3) as knn:
        model(text(3), knn_memories=knn)
        model.clear_memory(x, 0, knn)
        assert knn[0].fill.tolist() == [8, 8, 8]
        model.clear_memory(x, 1, knn)
        assert knn[0].fill.tolist() == [8, 0, 8]


def test_a_changed_projection_changes_memory_and_segment():
    """An adapter in place of `to_kv`: a text in pieces is still the text at once."""
    options = dict(depth=1, seq_len=16, xl_max_memories=16, knn_position_bias=False)
    for layers in ([], [1]):
        model = small(memorizing_layers=layers, num_retrieved_memories=None, **options)
        model.layers[0].attention.to_kv.register_forward_hook(lambda m, x, out: out * 1.5 + 0.1)
        memory, parts = None, []
        for part in text(2, 16).split(4, 1):
            out = model.step(part, memory)
            memory = carry(out.memory)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), model.step(text(2, 16)).logits)


def test_padding_after_an_end_is_finite():
    model = small(clear_memories_on_eos_token_id=0)
    x = text(low=1)
    x[0, 3] = 0
    assert model.step(x, mask=torch.arange(8).expand(2, 8) < 4).logits.isfinite().all()


def test_a_checkpoint_has_the_names_of_version_0_1():
    names = set(small(gate="network", output_gate=True).state_dict())
    layer = {f"attention.{name}" for name in ("to_q.weight", "to_kv.weight", "to_out.weight")}
    layer |= {f"{norm}.{p}" for norm in ("norm_attention", "norm_feed") for p in ("weight", "bias")}
    layer |= {f"feed_forward.{x}.{p}" for x in ("expand", "contract") for p in ("weight", "bias")}
    knn = {f"attention.{name}" for name in (
        "log_scale", "gate_bias", "output_gate", "gate_network.0.weight", "gate_network.0.bias",
        "gate_network.2.weight")}
    assert names == {f"layers.{i}.{name}" for i in (0, 1) for name in layer} | {
        f"layers.1.{name}" for name in knn} | {
        "embedding.weight", "head.weight", "norm.weight", "norm.bias", "positions.bias.weight",
        "knn_positions.bias.weight"}


def test_the_store_is_never_read_as_zeros():
    """A store with fewer memories than are asked for: what is missing takes no part."""
    for gate in ("softmax", "sigmoid", "network"):
        few, many = (small(num_retrieved_memories=k, gate=gate) for k in (8, 19))
        memory = carry(few.step(text()).memory)
        torch.testing.assert_close(few.step(text(seed=1), memory).logits,
                                   many.step(text(seed=1), memory).logits)


# the contract

def test_a_spent_memory_says_so():
    model = small()
    memory = carry(model.step(text()).memory)
    kept = clone(memory)
    out = model.step(text(seed=1), memory)
    after = carry(out.memory)
    for spent in (memory, out.memory):
        with pytest.raises((ValueError, TypeError), match="spent.*clone|PendingMemory"):
            model.step(text(seed=2), spent)
    with pytest.raises(ValueError, match="spent.*clone"): carry(out.memory)
    with pytest.raises(ValueError, match="spent.*clone"): model.step(text(seed=2), memory)
    model.step(text(seed=2), kept), model.step(text(seed=2), after)


def test_backward_may_come_after_carry():
    """The store is overwritten in between; the gradient is that of what was read."""
    grads = []
    for late in (False, True):
        for k in (4, None):
            model = small(num_retrieved_memories=k).double()
            memory = carry(model.step(text(n=8)).memory)
            memory = carry(model.step(text(seed=1), memory).memory)
            out = model.step(text(seed=2), memory)
            if late: memory = carry(out.memory)
            out.logits.square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
    for a, b in zip(grads[0] + grads[1], grads[2] + grads[3]):
        assert (a is None and b is None) or torch.equal(a, b)


def test_an_empty_slot_of_the_store_is_never_read():
    model = small()
    memory = carry(model.step(text(n=5)).memory)
    kv = memory.knn.kv.clone()
    kv[:, :, 5:] = 30.
    poisoned = type(memory)(memory.xl, KNNStore(kv, memory.knn.written))
    a, b = (model.step(text(), m).logits for m in (memory, poisoned))
    torch.testing.assert_close(a, b)


def test_a_reset_before_the_carry_writes_nothing_to_that_row():
    model = small(xl_max_memories=3)
    out = model.step(text(2))
    memory = carry(reset(out.memory, torch.tensor([True, False])))
    assert memory.knn.fill.flatten().tolist() == [0, 5] and memory.xl.fill.tolist() == [0, 3]
    assert not select(memory, [0]).knn.kv.any()


def test_memory_bytes_and_a_larger_memory_at_evaluation(tmp_path):
    model = small()
    memory = model.init_memory(2, max_knn_memories=100)
    assert nbytes(memory, full=True) == 2 * 100 * 2 * 8 * 4 + 2 * 8 + 2 * 8
    assert nbytes(memory) == 2 * 8 + 2 * 8
    for i in range(9): memory = carry(model.step(text(seed=i), memory).memory)
    assert memory.knn.fill.flatten().tolist() == [72, 72]
    save_memory(memory, tmp_path / "m.safetensors")
    again = load_memory(tmp_path / "m.safetensors", model.init_memory(2, max_knn_memories=100))
    assert torch.equal(model.step(text(), again).logits, model.step(text(), memory).logits)


def test_a_memory_of_the_default_capacity_costs_nothing_until_it_is_written():
    model = MemorizingTransformer(num_tokens=32, dim=64, depth=2, dim_head=64, seq_len=8)
    memory = model.init_memory(1)
    assert nbytes(memory) < 100 and nbytes(memory, full=True) > 250_000 * 2 * 64 * 4
    memory = carry(model.step(text(rows=1), memory).memory)
    assert nbytes(memory) < 8 * 2 * 64 * 4 + 100   # eight tokens
    # XL memories fill first: what they discard is what is written.
    model = small(xl_max_memories=10, max_knn_memories=100)
    memory, sizes = None, []
    for i in range(4):
        memory = carry(model.step(text(seed=i), memory).memory)
        sizes.append(memory.knn.capacity)
    assert sizes == [0, 8, 16, 32]


def test_generation_reads_the_memory():
    model = small(xl_max_memories=4)
    prompt = text(2, 37)
    new = generate(model, prompt, 12, temperature=0)
    whole, memory, logits = torch.cat([prompt, new], 1), None, []
    with torch.no_grad():
        for part in whole.split(8, 1):
            out = model.step(part, memory)
            memory = carry(out.memory)
            logits.append(out.logits)
    assert torch.equal(torch.cat(logits, 1)[:, 36:-1].argmax(-1), new)


def test_a_compiled_step_is_one_graph_and_equals_the_eager_one():
    """Also when the store grows between segments and is partly empty, and with the gradient."""
    torch._dynamo.reset()
    model = small(max_knn_memories=40, num_retrieved_memories=30).double()
    step = torch.compile(lambda tokens, memory: model.step(tokens, memory), backend="eager",
                         fullgraph=True)
    memories = [None, None]
    for i in range(4):
        outs = [f(text(seed=i), memory) for f, memory in zip((step, model.step), memories)]
        torch.testing.assert_close(outs[0].logits, outs[1].logits)
        grads = [torch.autograd.grad(out.logits.square().sum(), model.embedding.weight)[0]
                 for out in outs]
        torch.testing.assert_close(*grads)
        memories = [carry(out.memory) for out in outs]
    assert memories[0].knn.capacity == 32


def test_equal_keys_are_interchangeable():
    """In layer 1 equal tokens have equal keys. Which of them is found changes their ages only, so
    only the gate that looks at ages can tell."""
    tokens = text(2, 64)[:, :64] % 8
    def gap(**options):
        model, memory, parts = small(memorizing_layers=[1], **options).double(), None, []
        reader = Reader(model, 2)
        with torch.no_grad():
            pieces = torch.stack([reader.read(t) for t in tokens.split(1, 1)], 1)
            for part in tokens.split(8, 1):
                out = model.step(part, memory)
                memory, parts = carry(out.memory), parts + [out.logits]
        return (pieces - torch.cat(parts, 1)).abs().max()
    assert gap() < 1e-10 and gap(gate="sigmoid") < 1e-10
    assert gap(gate="network", num_retrieved_memories=None, max_knn_memories=64) < 1e-10
    assert gap(gate="network") < .1


# what is refused

@pytest.mark.parametrize("options, message", [
    (dict(depth=0), "depth must be 1"), (dict(heads=0), "heads"), (dict(dim_head=0), "dim_head"),
    (dict(max_knn_memories=0), "max_knn_memories must be 1"),
    (dict(num_retrieved_memories=0), "num_retrieved_memories must be 1 or more"),
    (dict(memorizing_layers=[3]), "memorizing_layers.*depth = 2"),
    (dict(memorizing_layers=[0]), "memorizing_layers.*must be 1 or more"), (dict(memorizing_layers=[1, 1]), "different"),
    (dict(xl_max_memories=4, xl_memory_layers=[5]), "xl_memory_layers.*depth = 2"),
    (dict(xl_max_memories=-1), "xl_max_memories must be 0"), (dict(gate="tanh"), "softmax"),
    (dict(shift_knn_memories_down=-1), "shift_knn_memories_down must be 0"),
])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): small(**options)


@pytest.mark.parametrize("call, error, message", [
    (lambda m: m.step(text(n=9)), ValueError, "seq_len = 8"),
    (lambda m: m.step(text().float()), ValueError, "integer"),
    (lambda m: m.step(text(), m.step(text()).memory), TypeError, "Memory.*PendingMemory"),
    (lambda m: m.step(text(), m.init_memory(3)), ValueError, "each of the 2 rows"),
    (lambda m: m.step(text(), small(dim_head=4).init_memory(2)), ValueError, "another model"),
    (lambda m: m.step(text(), small(xl_max_memories=3).init_memory(2)), ValueError, "another"),
    (lambda m: m.step(text(), small(memorizing_layers=[1, 2]).init_memory(2)), ValueError,
     "another model"),
    (lambda m: m(text(), knn_memories=[]), ValueError, "1 memorizing.*create_knn_memories"),
    (lambda m: m(text(), knn_memories=m.create_knn_memories(batch_size=3)), ValueError,
     "2 rows of width 8, got 3"),
    (lambda m: m(text(), knn_memories=[KNNMemory(4, 10, 2)]), ValueError, "of width 4"),
])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message): call(small())


def test_what_a_memory_keeps_has_length_one():
    k, v = torch.randn(2, 3, 5, 8)
    kv = to_memory(k, v)
    torch.testing.assert_close(kv[..., 0, :].norm(dim=-1), torch.ones(3, 5))
    assert torch.equal(kv[..., 1, :], v)
    assert to_memory(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)).isfinite().all()
