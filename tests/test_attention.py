"The parts of 10 and 11 against plain loops: attention, the cache and relative positions."
import math

import pytest
import torch
from torch import nn

from memformers import TransformerXL, carry
from memformers.attention import (Buffer, Cursor, Keys, KVCache, attend, check_layers, keys_of,
                                  recording, split_qkv, valid_slots)
from memformers.generate import Reader
from memformers.memory import put, select
from memformers.positions import (LearnedPositions, T5Positions, XLPositions, distance_scores,
                                  t5_bucket)

close = torch.testing.assert_close


def loop(q, k, v, bias):
    "Attention, one query and one head at a time."
    out, share = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for b, h, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        g = h // share
        w = (k[b, g] @ q[b, h, n] / q.shape[-1] ** .5 + bias[b, h, n]).softmax(0)
        out[b, h, n] = w @ v[b, g]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("way", ["kernel", "weights", "recorded"])
def test_attend_equals_the_loop(groups, way):
    torch.manual_seed(0)
    q, bias = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 4, 3, 7).double()
    k, v = torch.randn(2, 2, groups, 7, 5).double()
    span, _ = Cursor.start(2, 3).advance(3)
    given = bias.clone().requires_grad_(way == "weights") * 1
    if way == "recorded":
        with recording() as seen: out = attend(q, k, v, given, keys=keys_of(span, 4))
        close(seen[0].weights.sum(-1), torch.ones(2, 4, 3).double())
        close(seen[0].weights @ v.repeat_interleave(4 // groups, 1), out)
    else: out = attend(q, k, v, given)
    close(out, loop(q, k, v, bias))


@pytest.mark.parametrize("make", [lambda: XLPositions(6, 2, 3), lambda: T5Positions(2, 8, 12),
                                  lambda: LearnedPositions(4, 2, 3)], ids=["xl", "t5", "learned"])
@pytest.mark.parametrize("n", [1, 4])
def test_positions_agree_whether_rows_are_together_or_not(make, n):
    """A row at the same place as the others gets the scores that it gets alone."""
    torch.manual_seed(0)
    positions, q, m = make().double(), torch.randn(2, 2, n, 3).double(), 3
    for p in positions.parameters(): nn.init.normal_(p)
    given = () if isinstance(positions, LearnedPositions) else \
        (positions.project(positions.encode(m + n + 2)),)
    cursor = Cursor.start(2, 9)
    _, cursor = cursor.advance(2, torch.tensor([[True, True], [True, False]]))
    ragged = keys_of(cursor.advance(n)[0], m)
    both = positions(q, ragged, *given)
    for row, before in enumerate((2, 1)):
        _, alone = Cursor.start(1, 9).advance(before)
        keys = keys_of(alone.advance(n)[0], m)
        own = positions(q[row:row + 1], keys, *given)
        close(both[row if len(both) > 1 else 0, :, :, :keys.count][None], own)
        assert both[row if len(both) > 1 else 0, :, :, keys.count:].isneginf().all()


def test_distance_scores_share_the_last_vector_beyond_the_table():
    table = torch.tensor([[[7., 1., 0.]]])      # distances 2, 1, 0
    scores = distance_scores(torch.ones(1, 1, 1, 1), table, Keys(n=1, near=5))
    assert scores[0, 0, 0].tolist() == [7, 7, 7, 1, 0]


def test_buffers_of_different_sizes_come_together():
    a = Buffer(torch.arange(1., 13).view(2, 6, 1), front=2)
    b = Buffer(torch.full((1, 5, 1), 9.), front=4)
    both = put(a, [1], b)
    assert both.front == 4 and both.data[..., 0].tolist() == [[0, 0, 1, 2, 3, 4, 5, 6],
                                                              [9, 9, 9, 9, 9, 0, 0, 0]]


@torch.no_grad()
def test_a_cache_holds_rows_at_their_own_places():
    cache, cursor = KVCache.open(*torch.zeros(2, 2, 1, 1, 1)), Cursor.start(2, 4)
    for new, mask in ((1., [[True, False], [True, True]]), (2., None)):
        n = 1 if mask is None else 2
        span, cursor = cursor.advance(n, mask and torch.tensor(mask))
        cache = cache.append(*torch.full((2, 2, 1, n, 1), new), span)
    k = cache.read(span)[0][:, 0, :, 0]
    assert k.tolist() == [[0, 1, 2, 0], [0, 1, 1, 2]] and cursor.length.tolist() == [2, 3]
    picked = select(cache, [1, 1, 0]).read(span)[0][:, 0, :, 0]
    assert torch.equal(picked, k[[1, 1, 0]])


@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_piece_follows_padding_that_all_rows_have(keep_graph):
    """Three real tokens of five in every row: the next piece begins at column three."""
    new = torch.arange(16.).view(2, 1, 8, 1)
    with torch.set_grad_enabled(keep_graph):
        span, cursor = Cursor.start(2, 8).advance(5, torch.arange(5).expand(2, 5) < 3)
        cache = KVCache.open(*torch.zeros(2, 2, 1, 1, 1)).append(new[:, :, :5], new[:, :, :5], span)
        span, _ = cursor.advance(3)
        k, _ = cache.append(new[:, :, 5:], new[:, :, 5:], span).read(span)
    assert k[:, 0, 1:, 0].tolist() == [[0, 1, 2, 5, 6, 7], [8, 9, 10, 13, 14, 15]]


def test_an_open_segment_is_not_overfilled():
    _, cursor = Cursor.start(2, 4).advance(3)
    with pytest.raises(ValueError, match="4 tokens"): cursor.advance(2)


@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_segment_in_ragged_pieces_equals_the_segment(keep_graph):
    torch.manual_seed(0)
    model = TransformerXL(11, 6, 2, heads=3, seq_len=6, mem_len=4).double()
    for p in model.parameters(): nn.init.normal_(p, std=.4)
    tokens, lengths = torch.randint(11, (2, 6)), [6, 4]
    memory = carry(model.step(torch.randint(11, (2, 6))).memory)
    with torch.set_grad_enabled(keep_graph):
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        whole = model.step(tokens, memory, mask)
        first = torch.tensor([[True, True, True], [True, False, False]])
        segment = model.begin(memory)
        a, segment = model.extend(segment, tokens[:, :3], first)
        rest = torch.stack([tokens[0, 3:], tokens[1, 1:4]])
        b, segment = model.extend(segment, rest)
        after, _ = model.finish(segment)
    close(torch.cat([a[0], b[0]]), whole.logits[0])
    close(torch.cat([a[1, :1], b[1]]), whole.logits[1, :4])
    close(after.mem, whole.memory.mem)
    assert torch.equal(after.fill, whole.memory.fill)


def test_same_length_holds_from_the_first_segment():
    """A memory shorter than the segment: the window also cuts the segment itself."""
    torch.manual_seed(0)
    model = TransformerXL(17, 8, 2, heads=2, seq_len=5, mem_len=2, same_length=True).double()
    for p in model.parameters(): nn.init.normal_(p, std=.4)
    tokens, reader, memory, whole = torch.randint(17, (2, 13)), Reader(model, 2), None, []
    with torch.no_grad():
        for cut in tokens.split(5, 1):
            out = model.step(cut, memory)
            memory, whole = carry(out.memory), whole + [out.logits]
        pieces = torch.stack([reader.read(t) for t in tokens.split(1, 1)], 1)
    close(pieces, torch.cat(whole, 1))


def test_an_adapter_changes_memory_and_segment():
    """The keys of the memory and of the segment go through one module."""
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.up = base, nn.Linear(base.in_features, base.out_features, bias=False)
        def forward(self, x): return self.base(x) + self.up(x)

    torch.manual_seed(0)
    model = TransformerXL(11, 8, 2, heads=2, seq_len=4, mem_len=4).double().eval()
    tokens = torch.randint(11, (1, 8))
    for layer in model.layers:
        up = torch.randn_like(layer.to_kv.weight)
        with torch.no_grad(): merged = layer.to_kv.weight + up
        layer.to_kv = Adapter(layer.to_kv).double()
        layer.to_kv.up.weight.data.copy_(up)
        layer.merged = merged
    read = lambda: model.step(tokens[:, 4:], carry(model.step(tokens[:, :4]).memory)).logits
    adapted = read()
    for layer in model.layers:
        layer.to_kv = layer.to_kv.base
        layer.to_kv.weight.data.copy_(layer.merged)
    close(adapted, read())


def test_weights_of_the_first_version_load():
    torch.manual_seed(0)
    model, other = (TransformerXL(11, 8, 2, heads=2, seq_len=4, mem_len=4) for _ in range(2))
    old = model.state_dict()
    for i in range(2):
        both = [old.pop(f"layers.{i}.to_{name}.weight") for name in ("q", "kv")]
        old[f"layers.{i}.attention.to_qkv.weight"] = torch.cat(both)
        for name in ("to_out.weight", "positions.to_r.weight", "positions.content_bias",
                     "positions.position_bias"):
            old[f"layers.{i}.attention.{name}"] = old.pop(f"layers.{i}.{name}")
    other.load_state_dict(old)
    tokens = torch.randint(11, (1, 4))
    assert torch.equal(other.step(tokens).logits, model.step(tokens).logits)
    assert split_qkv(nn.Linear(2, 2), {"weight": 0}, "") is None


def test_only_filled_slots_count_as_valid():
    assert valid_slots(torch.tensor([3, 4]), 3) is None
    assert valid_slots(torch.tensor([3, 1]), 3).tolist() == [[True] * 3, [False, False, True]]


def test_a_saved_model_of_the_first_version_loads(tmp_path):
    from safetensors.torch import load_file, save_file
    torch.manual_seed(0)
    model = TransformerXL(11, 8, 2, heads=2, seq_len=4, mem_len=4).eval()
    model.save_pretrained(tmp_path)
    new, old = load_file(tmp_path / "model.safetensors"), {}
    for name, tensor in new.items():
        *layer, part = name.split(".", 2)
        moved = part.split(".")[0] in ("to_q", "to_kv", "to_out", "positions")
        old[".".join([*layer, "attention", part]) if moved else name] = tensor
    for i in range(2):
        both = [old.pop(f"layers.{i}.attention.to_{n}.weight") for n in ("q", "kv")]
        old[f"layers.{i}.attention.to_qkv.weight"] = torch.cat(both)
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    tokens = torch.randint(11, (1, 4))
    again = TransformerXL.from_pretrained(tmp_path)
    assert torch.equal(again.step(tokens).logits, model.step(tokens).logits)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.update({"head.weight": torch.zeros(5, 8)}), r"head.weight is \(5, 8\)"),
    (lambda t: t.pop("norm.weight"), r"missing \['norm.weight'\]"),
    (lambda t: t.update(other=torch.zeros(1)), r"unknown \['other'\]"),
])
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    from safetensors.torch import load_file, save_file
    TransformerXL(11, 8, 2, heads=2, seq_len=4).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message): TransformerXL.from_pretrained(tmp_path)


def test_attention_leaves_the_table_of_positions_alone():
    """A single query reads a part of it, which `attend` may overwrite."""
    torch.manual_seed(0)
    positions, (q, k, v) = T5Positions(2), torch.randn(3, 1, 2, 4, 3)
    table = positions.project(positions.encode(4))
    before = table.detach().clone()
    attend(q[:, :, :1], k, v, positions(q[:, :, :1], Keys(1, 4), table))
    assert torch.equal(table, before)


def test_attend_takes_dropout_that_was_drawn_and_records_what_is_named():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 3, 4).double()
    factors = torch.tensor([0., 2., 2.]).double().expand(2, 2, 3, 3)
    with recording() as seen: out = attend(q, k, v, None, factors)
    close(out, (q @ k.mT / 2).softmax(-1) * factors @ v)
    assert not seen


@pytest.mark.parametrize("keep_graph", [False, True])
def test_columns_that_are_padding_in_all_rows_stay(keep_graph):
    """Three tokens and one of padding, then padding alone: the four columns are all there still."""
    with torch.set_grad_enabled(keep_graph):
        cursor, buffer = Cursor.start(2, 5), Buffer(torch.zeros(2, 0, 1), 0)
        for mask in ([True, True, True, False], [False], [True]):
            span, cursor = cursor.advance(len(mask), torch.tensor([mask, mask]))
            buffer = buffer.append(torch.arange(1., len(mask) + 1).expand(2, -1)[..., None], span)
            data = buffer.read(cursor.columns)
            assert data.shape[1] == cursor.columns == 4
        assert cursor.valid() is None and data[..., 0].tolist() == [[1, 2, 3, 1]] * 2


def test_a_longer_row_may_be_put_into_a_segment():
    short, long = (Cursor.start(b, 9).advance(n)[1] for b, n in ((3, 2), (1, 5)))
    both = put(short, [1], long)
    assert both.length.tolist() == [2, 5, 2] and both.columns == 5
    assert both.valid().sum(1).tolist() == [2, 5, 2]


def test_layers_come_in_order():
    assert check_layers("memory_layers", [3, 1], 3) == (1, 3)


def test_t5_buckets_equal_the_formula():
    """Sixteen exact ones, sixteen logarithmic ones, and the last for all from 128 on."""
    want = [d if d < 16 else min(31, 16 + int(16 * math.log(d / 16) / math.log(8)))
            for d in range(300)]
    assert t5_bucket(torch.arange(300)).tolist() == want and set(want) == set(range(32))


def test_distances_are_exact_in_half_precision():
    """bfloat16 can't count beyond 256: sinusoids are computed in float32 first."""
    exact = XLPositions(8, 2, 4)
    half = XLPositions(8, 2, 4).bfloat16()
    assert torch.equal(half.encode(600), exact.encode(600)) and half.encode(1).dtype == torch.float32
