"""Every option of a constructor does something: in outputs, the auxiliary loss or gradients.

The two models of a comparison have the same weights, so that only the option can make a difference.
Options drawn at random go together: the laws hold for combinations that nobody wrote down.
"""
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten

from memformers import (AssociativeTransformer, BlockRecurrentTransformer, CompressiveTransformer,
                        FeedbackTransformer, GatedDeltaNet, InfiniTransformer,
                        MemorizingTransformer, MemoryTransformerXL, NeuralMemoryTransformer, Reader,
                        RecurrentMemoryTransformer, TransformerXL, carry, load_memory, save_memory)
from memformers.memory import select

SMALL = dict(num_tokens=13, dim=8, depth=3, heads=2)
DROPOUT = dict(attn_dropout=0.5, ff_dropout=0.5, emb_dropout=0.5)
MODELS = {
    TransformerXL: (dict(SMALL, seq_len=4, mem_len=6), DROPOUT | dict(
        attn_layer_dropout=0.5, mem_len=3, memory_layers=[2], enhanced_recurrence=True,
        same_length=True, clamp_len=3, post_norm=True, shared_biases=True)),
    CompressiveTransformer: (
        dict(SMALL, seq_len=4, mem_len=4, cmem_len=2, cmem_ratio=2), DROPOUT | dict(
        attn_layer_dropout=0.5, reconstruction_attn_dropout=0.5, reconstruction_loss_weight=0.5,
        memory_layers=[1, 3], enhanced_recurrence=False, mem_len=5, cmem_len=3, aux="autoencoding",
        gate_bias=1.0, gate_relu=True)),
    MemoryTransformerXL: (
        dict(SMALL, seq_len=4, mem_len=4, lmem_len=3, num_mem_kv=1), DROPOUT | dict(
        attn_layer_dropout=0.5, mem_len=3, mem_write_iters=1, mem_heads=4, mem_attention="full",
        detach_lmem=True, gate_bias=1.0)),
    FeedbackTransformer: (
        dict(SMALL, seq_len=2, segment_len=4, mem_len=6, dim_head=4), DROPOUT | dict(
        seq_len=1, mem_len=3, keep_last_hidden=True)),
    MemorizingTransformer: (
        dict(SMALL, seq_len=4, dim_head=4, memorizing_layers=[1, 2], max_knn_memories=12,
             num_retrieved_memories=3, xl_max_memories=2),
        DROPOUT | dict(num_retrieved_memories=1, max_knn_memories=2, xl_max_memories=1,
                       xl_memory_layers=[3], shift_knn_memories_down=1, shift_xl_memories_down=1,
                       clear_memories_on_sos_token_id=3, clear_memories_on_eos_token_id=3,
                       gate="sigmoid", knn_position_bias=False, normalize_all=True,
                       output_gate=True)),
    RecurrentMemoryTransformer: (
        dict(SMALL, seq_len=4, num_memory_tokens=2, mem_len=4), DROPOUT | dict(
        attn_layer_dropout=0.5, num_memory_tokens=3, mem_len=3, read_only=True)),
    InfiniTransformer: (
        dict(SMALL, seq_len=4), DROPOUT | dict(
        attn_layer_dropout=0.5, memory_layers=[2], delta="segment", gate=0.0, gate_rate=2.0)),
    GatedDeltaNet: (
        dict(SMALL, seq_len=4), dict(
        layer_dropout=0.5, ff_dropout=0.5, emb_dropout=0.5, negative_eigenvalues=True)),
    AssociativeTransformer: (
        dict(SMALL, seq_len=4, num_memory_tokens=2, dim_memory=4, nu=2), DROPOUT | dict(
        attn_layer_dropout=0.5, correction=False, memory_layers=[2])),
    BlockRecurrentTransformer: (
        dict(SMALL, seq_len=4, num_states=3), DROPOUT | dict(
        attn_layer_dropout=0.5, mem_len=2, recurrent_layer=1, gate="lstm")),
    NeuralMemoryTransformer: (
        dict(SMALL, seq_len=4), DROPOUT | dict(
        attn_layer_dropout=0.5, wiring="context", max_step=0.2)),
}
CASES = [(cls, option, value) for cls, (_, options) in MODELS.items()
         for option, value in options.items()]


def build(cls, **options):
    torch.manual_seed(0)
    return cls(**MODELS[cls][0] | options).double()


def outcome(model):
    """Logits and auxiliary losses of four segments in training, and all gradients, by name."""
    torch.manual_seed(1)
    tokens, found, memory, total = torch.randint(13, (2, 16)), {}, None, 0
    for i, part in enumerate(tokens.split(4, dim=1)):
        out = model.step(part, memory)
        memory = carry(out.memory, grad=True)
        found[f"logits {i}"], found[f"aux {i}"] = out.logits.detach(), out.aux_loss.detach()
        total = total + out.logits.square().sum() + out.aux_loss
    total.backward()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_the_comparison_is_fair(cls):
    """Without a change of an option, nothing changes."""
    assert same(outcome(build(cls)), outcome(build(cls)))


@pytest.mark.parametrize("cls, option, value", CASES,
                         ids=[f"{cls.__name__}-{option}" for cls, option, _ in CASES])
def test_the_option_does_something(cls, option, value):
    assert not same(outcome(build(cls)), outcome(build(cls, **{option: value})))


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_tied_embeddings_are_one_matrix(cls):
    model = build(cls, tie_embeddings=True)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_a_new_model_guesses_evenly(cls):
    """Small first weights: the loss begins at that of guessing."""
    logits = build(cls, num_tokens=256, dim=64).eval()(torch.randint(256, (4, 4)))
    logits = logits[0] if isinstance(logits, tuple) else logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(256, (16,)))
    assert abs(loss - math.log(256)) < 0.2


def test_shared_biases_are_one_pair(tmp_path):
    model = build(TransformerXL, shared_biases=True)
    pairs = [(p.content_bias, p.position_bias) for p in (layer.positions for layer in model.layers)]
    assert all(u is pairs[0][0] and v is pairs[0][1] for u, v in pairs)
    model.save_pretrained(tmp_path)
    again = TransformerXL.from_pretrained(tmp_path)
    assert again.layers[1].positions.content_bias is again.layers[0].positions.content_bias
    with pytest.raises(ValueError, match="shared_biases"):
        build(TransformerXL, shared_biases=True, positions="t5")


# Each option alone is tested above; here any of them together, drawn with a seed.

COMMON = dict(dim=[8, 12], depth=[1, 2, 3], heads=[1, 2], seq_len=[1, 2, 5, 6], emb_dim=[None, 6],
              tie_embeddings=[False, True])
LAYERS, PLAIN = [None, [1], []], dict(ff_glu=[False, True])
DRAWN = {
    TransformerXL: PLAIN | dict(
        mem_len=[0, 1, 4, 9], memory_layers=LAYERS, dim_head=[None, 5], positions=["xl", "t5"],
        enhanced_recurrence=[False, True], same_length=[False, True], clamp_len=[None, 3],
        post_norm=[False, True]),
    CompressiveTransformer: PLAIN | dict(
        mem_len=[0, 1, 4, 9], cmem_len=[0, 6], cmem_ratio=[1, 2, 3], memory_layers=LAYERS,
        enhanced_recurrence=[False, True], gru_gated_residual=[False, True],
        mogrify_gru=[False, True], compression=["conv", "mean", "max", "dilated", "most_used"],
        aux=["attention", "autoencoding"], gate=["gru", "brc", "highway"]),
    MemoryTransformerXL: PLAIN | dict(
        mem_len=[0, 1, 4, 9], lmem_len=[0, 1, 3], memory_layers=LAYERS, one_kv_head=[False, True],
        num_mem_kv=[0, 2], mem_write_iters=[1, 3], mem_heads=[None, 2, 4],
        mem_attention=["linear", "full"], gate=["gru", "brc", "nbrc"], detach_lmem=[False, True]),
    FeedbackTransformer: dict(
        seq_len=[1, 2, 5], segment_len=[5, 6], mem_len=[1, 4, 9], dim_head=[4, 5], tol=[0],
        keep_last_hidden=[False, True], positions=["t5", "learned"], block_len=[2, 32],
        solver=["parallel", "sequential"]),
    MemorizingTransformer: PLAIN | dict(
        dim_head=[4, 5], memorizing_layers=[[1], []], max_knn_memories=[1, 6, 20],
        num_retrieved_memories=[None, 1, 3], xl_memory_layers=LAYERS, xl_max_memories=[0, 1, 4],
        gate=["softmax", "sigmoid", "network"], knn_position_bias=[False, True],
        normalize_all=[False, True], output_gate=[False, True],
        clear_memories_on_sos_token_id=[None, 3], clear_memories_on_eos_token_id=[None, 4]),
    RecurrentMemoryTransformer: PLAIN | dict(
        num_memory_tokens=[1, 2, 5], mem_len=[0, 1, 4, 9], read_only=[False, True]),
    InfiniTransformer: PLAIN | dict(
        memory_layers=LAYERS, delta=[None, "segment", "token"], dim_head=[None, 5],
        gate=[-0.5, 1.0], gate_rate=[1.0, 10.0]),
    GatedDeltaNet: PLAIN | dict(
        dim_head=[None, 1, 5], expand_v=[1, 2], negative_eigenvalues=[False, True]),
    AssociativeTransformer: PLAIN | dict(
        num_memory_tokens=[1, 2, 5], dim_memory=[2, 5], nu=[1, 3], correction=[False, True],
        memory_layers=LAYERS),
    BlockRecurrentTransformer: PLAIN | dict(
        mem_len=[None, 0, 1, 9], num_states=[1, 4], recurrent_layer=[None, 1],
        gate=["bias", "lstm"]),
    NeuralMemoryTransformer: PLAIN | dict(
        wiring=["layer", "gate", "context"], memory_depth=[1, 2], expand=[1, 3],
        dim_head=[None, 5], max_step=[0, 0.1]),
}
assert DRAWN.keys() == MODELS.keys()


def drawn(cls, seed):
    """A model in float64 of options drawn at random, with weights that make a difference."""
    rng = random.Random(f"{cls.__name__} {seed}")
    options = {name: rng.choice(values) for name, values in (COMMON | DRAWN[cls]).items()}
    if options.get("positions") == "t5": options.pop("clamp_len", None)   # refused together
    print(options)   # pytest shows it with a failure
    torch.manual_seed(seed)
    model = cls(num_tokens=40, **options).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.4)
    return model


def segments(model, tokens, mask=None, memory=None):
    """Logits (b, n, num_tokens) of a text read segment by segment, and the memory after it."""
    logits, length = [], getattr(model, "segment_len", model.seq_len)
    for part in torch.arange(tokens.shape[1]).split(length):
        out = model.step(tokens[:, part], memory, None if mask is None else mask[:, part])
        memory = carry(out.memory)
        logits.append(out.logits)
    return torch.cat(logits, 1), memory


def close(a, b):
    for x, y in zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", DRAWN, ids=lambda cls: cls.__name__)
def test_options_go_together(cls, seed, tmp_path):
    """Token by token, row by row, from a file, and not from the future."""
    model = drawn(cls, seed)
    # No token comes twice: of two equal keys, a store may find either.
    tokens = torch.stack([torch.randperm(35)[:14] + 5 for _ in range(3)])
    length = torch.tensor([14, 9, 1])
    tokens[1, 6] = 3   # some models begin anew at this token
    with torch.no_grad():
        whole, after = segments(model, tokens)
        reader = Reader(model, 3)
        pieces = torch.stack([reader.read(token) for token in tokens.split(1, 1)], 1)
        close((pieces, reader.memory), (whole, after))
        # Padding in front of each row: what a row reads does not depend on it or on the others.
        mask = torch.arange(14) >= 14 - length[:, None]
        padded, together = segments(model, tokens.where(mask, -1), mask)
        for r, n in enumerate(length):
            memory, logits = None, []
            for part in torch.arange(14).split(getattr(model, "segment_len", model.seq_len)):
                real = part[mask[r, part]]
                if not len(real): continue
                out = model.step(tokens[r:r + 1, real], memory)
                memory = carry(out.memory)
                logits.append(out.logits)
            close((padded[r:r + 1, 14 - n:], select(together, [r])),
                  (torch.cat(logits, 1), select(memory, [0])))
        # In two pieces, each row at its own pace: the memories are the same.
        reader = Reader(model, 3)
        for part in (slice(0, 6), slice(6, None)):
            if mask[:, part].any(): reader.read(tokens[:, part].where(mask[:, part], 0), mask[:, part])
        for r, n in enumerate(length):
            close(select(reader.memory, [r]), segments(model, tokens[r:r + 1, 14 - n:])[1])
        # The future changes nothing; a memory from a file goes on.
        other = torch.cat([tokens[:, :8], tokens[:, 8:].flip(1)], 1)
        close(segments(model, other)[0][:, :8], whole[:, :8])
        save_memory(after, tmp_path / "memory.safetensors")
        loaded = load_memory(tmp_path / "memory.safetensors", like=model.init_memory(3))
        close(segments(model, tokens, memory=loaded), segments(model, tokens, memory=after))


def pieces(model, tokens, memory, mask):
    """A step, token by token."""
    if memory is None: memory = model.init_memory(len(tokens))
    segment, logits = model.begin(memory, tokens.shape[1]), []
    for token, real in zip(tokens.split(1, 1), mask.split(1, 1)):
        out, segment = model.extend(segment, token, real)
        logits.append(out)
    return torch.cat(logits, 1), *model.finish(segment)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", DRAWN, ids=lambda cls: cls.__name__)
def test_options_go_together_in_training(cls, seed):
    """The gradient through several segments is the same token by token; bfloat16 gives a finite one."""
    model = drawn(cls, seed)
    tokens, size = torch.randint(13, (3, 12)), min(model.seq_len, 4)
    mask = (torch.rand(3, 12 // size, size) < 0.7).sort(-1, descending=True).values.flatten(1)

    def gradients(step, kind=torch.float64):
        model.to(kind).zero_grad()
        memory, loss = None, 0
        for part in torch.arange(12).split(size):
            logits, memory, aux = step(tokens[:, part], memory, mask[:, part])
            memory = carry(memory, grad=True)
            loss = loss + logits[mask[:, part]].square().sum() + aux
        loss.backward()
        for x, y in zip(tree_flatten(memory)[0], tree_flatten(model.init_memory(3))[0]):
            assert x.dtype == y.dtype
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients(model.step)
    close(gradients(lambda *given: pieces(model, *given)), whole)
    assert all(g.isfinite().all() for g in gradients(model.train().step, torch.bfloat16).values())


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_dropout_is_off_in_evaluation(cls):
    drops = {name: value for name, value in MODELS[cls][1].items() if "dropout" in name}
    assert drops and same(outcome(build(cls, **drops).eval()), outcome(build(cls).eval()))
