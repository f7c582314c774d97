"""Constructors of the models: sizes, layers, dropouts and choices that mean nothing."""
from functools import partial

from memformers import (AssociativeTransformer, BlockRecurrentTransformer,
                        CompressiveTransformer, FeedbackTransformer,
                        GatedDeltaNet, InfiniTransformer, MemorizingTransformer,
                        MemoryTransformerXL, NeuralMemoryTransformer,
                        RecurrentMemoryTransformer, TransformerXL)
from refusals.common import refusals

SMALL = dict(num_tokens=17, dim=8, depth=2, heads=2)
MODELS = {
    "TransformerXL": partial(TransformerXL, **SMALL, seq_len=4),
    "CompressiveTransformer": partial(CompressiveTransformer, **SMALL, seq_len=4),
    "MemoryTransformerXL": partial(MemoryTransformerXL, **SMALL, seq_len=4),
    "FeedbackTransformer": partial(FeedbackTransformer, **SMALL, seq_len=2, dim_head=4),
    "MemorizingTransformer": partial(MemorizingTransformer, **SMALL, seq_len=4, dim_head=4,
                                     max_knn_memories=8),
    "RecurrentMemoryTransformer": partial(RecurrentMemoryTransformer, **SMALL, seq_len=4),
    "InfiniTransformer": partial(InfiniTransformer, **SMALL, seq_len=4),
    "GatedDeltaNet": partial(GatedDeltaNet, **SMALL, seq_len=4),
    "AssociativeTransformer": partial(AssociativeTransformer, **SMALL, seq_len=4),
    "BlockRecurrentTransformer": partial(BlockRecurrentTransformer, **SMALL, seq_len=4,
                                         num_states=3),
    "NeuralMemoryTransformer": partial(NeuralMemoryTransformer, **SMALL, seq_len=4),
}
QUEUES = ("TransformerXL", "CompressiveTransformer", "MemoryTransformerXL")
SIZE = (0, -1, 1.5, "8")     # of what must be an integer of 1 or more
OPTIONAL = (0, 1.5, "8")     # the same, where None has a meaning
LENGTH = (-1, 1.5, "8")      # of an integer of 0 or more
DROPOUT = (-0.1, 1.5, "half", float("nan"))
LAYERS = (0, [0], [3], [1, 1], [1.5], "12")
FF = (0, -1, "4", float("nan"))

# Model → argument → what cannot be right.
BAD = {name: dict(num_tokens=SIZE, dim=SIZE, depth=SIZE, heads=SIZE, seq_len=SIZE,
                  emb_dim=OPTIONAL, emb_dropout=DROPOUT, ff_dropout=DROPOUT)
       for name in MODELS}
for name in MODELS:
    if name != "GatedDeltaNet": BAD[name] |= dict(attn_dropout=DROPOUT)
for name in (*QUEUES, "FeedbackTransformer", "RecurrentMemoryTransformer",
             "BlockRecurrentTransformer"):
    BAD[name] |= dict(mem_len=LENGTH)
for name in ("FeedbackTransformer", "MemorizingTransformer"): BAD[name] |= dict(dim_head=SIZE)
for name in (*QUEUES, "InfiniTransformer", "AssociativeTransformer"):
    BAD[name] |= dict(memory_layers=LAYERS)
for name in (*QUEUES, "RecurrentMemoryTransformer", "InfiniTransformer", "AssociativeTransformer",
             "BlockRecurrentTransformer"):
    BAD[name] |= dict(attn_layer_dropout=DROPOUT)
for name in MODELS:
    if name in ("CompressiveTransformer", "MemoryTransformerXL"):
        BAD[name] |= dict(gate=("lstm", None), gate_bias=("one", float("nan")))
    BAD[name] |= dict(ff_mult=FF)

BAD["TransformerXL"] |= dict(dim_head=OPTIONAL, positions=("rope", None), clamp_len=OPTIONAL)
BAD["CompressiveTransformer"] |= dict(
    cmem_len=LENGTH, cmem_ratio=SIZE, compression=("sum", None), aux=("none", None),
    reconstruction_attn_dropout=DROPOUT,
    reconstruction_loss_weight=(-1, "one", float("nan")))
BAD["MemoryTransformerXL"] |= dict(
    lmem_len=LENGTH, mem_write_iters=SIZE, num_mem_kv=LENGTH, mem_heads=(-1, 3, 1.5),
    mem_attention=("cosine", None))
BAD["RecurrentMemoryTransformer"] |= dict(num_memory_tokens=SIZE)
BAD["FeedbackTransformer"] |= dict(
    positions=("rope", None), solver=("newton", None), gradient=("none", None),
    tol=(-1, "small", float("nan")), max_passes=SIZE, block_len=SIZE, segment_len=SIZE)
BAD["MemorizingTransformer"] |= dict(
    knn_attn_heads=OPTIONAL, kv_heads=(*SIZE, 3), memorizing_layers=LAYERS,
    xl_memory_layers=LAYERS, max_knn_memories=SIZE, num_retrieved_memories=OPTIONAL,
    clear_memories_on_sos_token_id=(-1, 17, "a", 1.5),
    clear_memories_on_eos_token_id=(-1, 17, "a", 1.5),
    xl_max_memories=LENGTH, shift_knn_memories_down=LENGTH, shift_xl_memories_down=LENGTH,
    gate=("hard", None), pad_id=("a", 1.5), knn_memories_directory=(3,))
BAD["InfiniTransformer"] |= dict(
    dim_head=OPTIONAL, delta=("linear", 1), gate=("open", float("nan")),
    gate_rate=(0, "fast", float("inf")))
BAD["BlockRecurrentTransformer"] |= dict(
    num_states=SIZE, recurrent_layer=(0, 3, 1.5, "2"), gate=("gru", None))
BAD["NeuralMemoryTransformer"] |= dict(
    dim_head=OPTIONAL, attn_layer_dropout=DROPOUT, wiring=("both", None),
    memory_depth=(0, 3, "2"), expand=SIZE, max_step=(-1, "small", float("nan")))
BAD["GatedDeltaNet"] |= dict(dim_head=OPTIONAL, expand_v=SIZE, layer_dropout=DROPOUT)
BAD["AssociativeTransformer"] |= dict(num_memory_tokens=SIZE, nu=SIZE, dim_memory=(1, *SIZE))

ROWS = [row for name, arguments in BAD.items() for argument, bad in arguments.items()
        for row in refusals(name, MODELS[name], argument, *bad)]
ROWS += [row for name in (*QUEUES, "RecurrentMemoryTransformer", "InfiniTransformer",
                          "GatedDeltaNet", "AssociativeTransformer", "BlockRecurrentTransformer",
                          "NeuralMemoryTransformer")
         for row in refusals(name, MODELS[name], "heads", 3)]
# Lengths that no machine can hold.
HUGE = {"TransformerXL": ("mem_len", "seq_len"), "CompressiveTransformer": ("mem_len", "cmem_len"),
        "MemoryTransformerXL": ("mem_len", "lmem_len", "num_mem_kv"),
        "MemorizingTransformer": ("xl_max_memories", "max_knn_memories")}
ROWS += [row for name, arguments in HUGE.items() for argument in arguments
         for row in refusals(name, MODELS[name], argument, 2 ** 31)]
