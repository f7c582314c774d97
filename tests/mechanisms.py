"""Every mechanism that the laws are held against. A new one adds one line to `MECHANISMS`."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from memformers import (AssociativeTransformer, BlockRecurrentTransformer,
                        CompressiveTransformer, FeedbackTransformer,
                        GatedDeltaNet, InfiniTransformer, MemorizingTransformer,
                        MemoryTransformerXL, NeuralMemoryTransformer,
                        RecurrentMemoryTransformer, TransformerXL)

SIZES = dict(num_tokens=17, dim=12, depth=3, heads=3, seq_len=5)
N, KNN = SIZES["seq_len"], dict(dim_head=4, memorizing_layers=[2])
FEEDBACK = dict(dim_head=4, segment_len=N)   # its seq_len is the window inside a segment


@dataclass(frozen=True)
class Mechanism:
    name: str
    cls: type
    options: dict = field(default_factory=dict)
    # May a text be cut into segments anywhere without a change in the output?
    splits: bool = False
    # Options under which it may, where it needs them (as enough memory).
    splits_with: dict | None = None
    # Does a gradient pass through the memory: "full", in "part", or "none"?
    gradient: str = "full"
    # Does it attend to single keys, so that there are weights to look at?
    attends: bool = True

    def make(self, **overrides):
        """The model in float64, with weights large enough that nothing hides in rounding."""
        torch.manual_seed(0)
        model = self.cls(**(SIZES | self.options | overrides)).double()
        for p in model.parameters(): torch.nn.init.normal_(p, std=0.4)
        return model.eval()


MECHANISMS = [
    Mechanism("xl", TransformerXL, dict(mem_len=7), splits_with=dict(mem_len=40)),
    Mechanism("xl_t5", TransformerXL, dict(mem_len=7, positions="t5", ff_glu=True),
              splits_with=dict(mem_len=40, positions="t5")),
    Mechanism("xl_short", TransformerXL, dict(mem_len=3, memory_layers=[2], post_norm=True)),
    Mechanism("xl_enhanced", TransformerXL, dict(mem_len=6, enhanced_recurrence=True, clamp_len=4,
                                                 emb_dim=8, tie_embeddings=True)),
    Mechanism("xl_same_length", TransformerXL, dict(mem_len=6, same_length=True), splits=True),
    Mechanism("compressive", CompressiveTransformer, dict(mem_len=5, cmem_len=4, cmem_ratio=2),
              splits_with=dict(mem_len=40, enhanced_recurrence=False)),
    Mechanism("compressive_3", CompressiveTransformer,
              dict(mem_len=7, cmem_len=2, cmem_ratio=3, memory_layers=[1, 3],
                   enhanced_recurrence=False, emb_dim=8, aux="autoencoding")),
    Mechanism("compressive_4", CompressiveTransformer,
              dict(mem_len=3, cmem_len=2, cmem_ratio=4, gru_gated_residual=False, ff_glu=True,
                   compression="most_used")),
    Mechanism("compressive_dilated", CompressiveTransformer,
              dict(mem_len=5, cmem_len=3, cmem_ratio=3, compression="dilated", gate="brc")),
    Mechanism("compressive_none", CompressiveTransformer,
              dict(mem_len=0, cmem_len=3, cmem_ratio=2, compression="max", gate="nbrc")),
    Mechanism("memory_xl", MemoryTransformerXL, dict(mem_len=7, lmem_len=4)),
    Mechanism("memory_xl_options", MemoryTransformerXL,
              dict(mem_len=3, lmem_len=2, memory_layers=[2, 3], num_mem_kv=2, one_kv_head=True,
                   gate="gru", mem_write_iters=1, mem_attention="full", emb_dim=8)),
    Mechanism("memory_xl_long_only", MemoryTransformerXL,
              dict(mem_len=0, lmem_len=3, num_mem_kv=1, gate="brc", mem_write_iters=3, ff_glu=True)),
    Mechanism("memory_xl_short_only", MemoryTransformerXL,
              dict(mem_len=6, lmem_len=0, gru_gated_residual=False),
              splits_with=dict(mem_len=40, lmem_len=0)),
    Mechanism("memory_xl_heads", MemoryTransformerXL, dict(mem_len=5, lmem_len=3, mem_heads=2)),
    Mechanism("feedback_1", FeedbackTransformer, FEEDBACK | dict(
              seq_len=1, mem_len=7, tol=0, block_len=4), splits=True),
    Mechanism("feedback_2", FeedbackTransformer, FEEDBACK | dict(
              seq_len=2, mem_len=7, positions="learned", gradient="unrolled", tol=0), splits=True),
    Mechanism("feedback_5", FeedbackTransformer, FEEDBACK | dict(
              seq_len=5, mem_len=6, tol=0, emb_dim=8, tie_embeddings=True), splits=True),
    Mechanism("feedback_1_sequential", FeedbackTransformer, FEEDBACK | dict(
              seq_len=1, mem_len=7, solver="sequential", gradient="unrolled",
              positions="learned"), splits=True),
    Mechanism("feedback_2_sequential", FeedbackTransformer, FEEDBACK | dict(
              seq_len=2, mem_len=3, solver="sequential", tol=0, keep_last_hidden=True),
              splits=True),
    Mechanism("feedback_5_sequential", FeedbackTransformer, FEEDBACK | dict(
              seq_len=5, mem_len=6, solver="sequential", gradient="unrolled"), splits=True),
    Mechanism("knn_small", MemorizingTransformer, KNN | dict(
              max_knn_memories=3, num_retrieved_memories=2), gradient="none"),
    Mechanism("knn_equal", MemorizingTransformer, KNN | dict(
              max_knn_memories=N, memorizing_layers=[1, 3], shift_knn_memories_down=1,
              gate="sigmoid", normalize_all=True, knn_attn_heads=2), gradient="none"),
    Mechanism("knn_large", MemorizingTransformer, KNN | dict(
              max_knn_memories=40, gate="network", num_retrieved_memories=7, ff_glu=True, emb_dim=8,
              tie_embeddings=True), gradient="none"),
    Mechanism("knn_whole", MemorizingTransformer, KNN | dict(
              memorizing_layers=[1, 2, 3], max_knn_memories=40, num_retrieved_memories=None,
              knn_position_bias=False), splits=True, gradient="none"),
    Mechanism("knn_all_found", MemorizingTransformer, KNN | dict(
              memorizing_layers=[1, 2, 3], max_knn_memories=40, num_retrieved_memories=30,
              knn_position_bias=False), splits=True, gradient="none"),
    Mechanism("knn_heads", MemorizingTransformer, KNN | dict(
              max_knn_memories=8, num_retrieved_memories=3, kv_heads=3, memorizing_layers=[1, 3],
              shift_knn_memories_down=1, gate="sigmoid", normalize_all=True), gradient="none"),
    Mechanism("knn_heads_xl", MemorizingTransformer, KNN | dict(
              heads=4, kv_heads=2, max_knn_memories=6, num_retrieved_memories=4, xl_max_memories=4,
              gate="network", clear_memories_on_eos_token_id=9), gradient="part"),
    Mechanism("knn_heads_whole", MemorizingTransformer, KNN | dict(
              kv_heads=3, memorizing_layers=[1, 2, 3], max_knn_memories=40,
              num_retrieved_memories=30, knn_position_bias=False), splits=True, gradient="none"),
    Mechanism("knn_xl", MemorizingTransformer, KNN | dict(max_knn_memories=6, xl_max_memories=7,
              memorizing_layers=[2], num_retrieved_memories=4), gradient="part"),
    Mechanism("knn_xl_some", MemorizingTransformer, KNN | dict(
              max_knn_memories=4, xl_max_memories=3, memorizing_layers=[1, 2],
              xl_memory_layers=[2, 3], shift_xl_memories_down=1, num_retrieved_memories=3,
              gate="network", clear_memories_on_sos_token_id=9), gradient="part"),
    Mechanism("recurrent_memory", RecurrentMemoryTransformer, dict(num_memory_tokens=3)),
    Mechanism("recurrent_memory_one", RecurrentMemoryTransformer, dict(
              num_memory_tokens=1, ff_glu=True, emb_dim=8, tie_embeddings=True)),
    Mechanism("recurrent_memory_hybrid", RecurrentMemoryTransformer, dict(
              num_memory_tokens=2, mem_len=7), gradient="part"),
    Mechanism("recurrent_memory_read_only", RecurrentMemoryTransformer, dict(
              num_memory_tokens=2, mem_len=3, read_only=True), gradient="none"),
    Mechanism("infini", InfiniTransformer),
    Mechanism("infini_segment", InfiniTransformer, dict(delta="segment", memory_layers=[1, 3],
              dim_head=5, ff_glu=True, emb_dim=8, tie_embeddings=True)),
    Mechanism("infini_token", InfiniTransformer, dict(delta="token", gate_rate=1.0)),
    Mechanism("gated_delta", GatedDeltaNet, splits=True, attends=False),
    Mechanism("gated_delta_options", GatedDeltaNet, dict(
              negative_eigenvalues=True, expand_v=2, dim_head=2, ff_glu=True, emb_dim=8,
              tie_embeddings=True), splits=True, attends=False),
    # The share of a key that is new is a constant to the gradient.
    Mechanism("associative", AssociativeTransformer, dict(num_memory_tokens=3, dim_memory=7),
              gradient="part"),
    Mechanism("associative_some", AssociativeTransformer, dict(
              num_memory_tokens=1, dim_memory=5, nu=2, memory_layers=[1, 3], ff_glu=True, emb_dim=8,
              tie_embeddings=True), gradient="part"),
    Mechanism("associative_uncorrected", AssociativeTransformer, dict(
              num_memory_tokens=2, dim_memory=9, nu=2, correction=False)),
    Mechanism("block_recurrent", BlockRecurrentTransformer, dict(num_states=4, mem_len=7)),
    Mechanism("block_recurrent_lstm", BlockRecurrentTransformer, dict(
              num_states=1, gate="lstm", recurrent_layer=1, ff_glu=True, emb_dim=8,
              tie_embeddings=True)),
    Mechanism("block_recurrent_states_only", BlockRecurrentTransformer, dict(
              num_states=3, mem_len=0, recurrent_layer=3)),
    Mechanism("neural_gate", NeuralMemoryTransformer, dict(wiring="gate")),
    Mechanism("neural_layer", NeuralMemoryTransformer, dict(
              wiring="layer", memory_depth=1, dim_head=5, ff_glu=True, emb_dim=8,
              tie_embeddings=True)),
    Mechanism("neural_context", NeuralMemoryTransformer, dict(wiring="context", expand=1)),
]


def each(test: Callable) -> Callable:
    """Run a test once for every mechanism."""
    import pytest
    return pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)(test)
