"""Every option of a constructor does something: in outputs, the auxiliary loss or gradients.

The two models of a comparison have the same weights, so that only the option can make a difference.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from memformers import (CompressiveTransformer, FeedbackTransformer, MemorizingTransformer,
                        MemoryTransformerXL, RecurrentMemoryTransformer, TransformerXL, carry)

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
