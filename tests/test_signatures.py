"""Positional arguments mean what they mean in the original packages.

Two of those take keywords only: of them every name must be known. Arguments of ours come last.
"""
import inspect

import pytest

import memformers

IN_ORDER = {
    "TransformerXL": "num_tokens dim depth heads seq_len mem_len memory_layers",
    "CompressiveTransformer": """num_tokens dim seq_len depth emb_dim memory_layers
        enhanced_recurrence mem_len cmem_len cmem_ratio heads gru_gated_residual mogrify_gru
        attn_dropout ff_glu ff_dropout attn_layer_dropout reconstruction_attn_dropout
        reconstruction_loss_weight""",
    "MemoryTransformerXL": """num_tokens dim seq_len depth emb_dim memory_layers mem_len lmem_len
        heads gru_gated_residual mogrify_gru attn_dropout ff_glu ff_dropout attn_layer_dropout
        one_kv_head num_mem_kv mem_write_iters""",
}
BY_NAME = {
    "FeedbackTransformer": """num_tokens dim depth mem_len seq_len heads dim_head attn_dropout
        ff_dropout keep_last_hidden""",
    "MemorizingTransformer": """num_tokens dim depth dim_head heads knn_attn_heads attn_dropout
        ff_mult ff_dropout memorizing_layers max_knn_memories num_retrieved_memories
        clear_memories_on_sos_token_id clear_memories_on_eos_token_id knn_memories_directory
        shift_knn_memories_down pad_id xl_max_memories xl_memory_layers shift_xl_memories_down
        knn_memory_multiprocessing""",
}
CALLS = {
    "TransformerXL": "x memories mask",
    "CompressiveTransformer": "x memories mask",
    "MemoryTransformerXL": "x memories mask detach_lmem",
    "FeedbackTransformer": "x memory return_memory",
    "MemorizingTransformer": "x knn_memories xl_memories labels add_knn_memory",
}


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", IN_ORDER)
def test_positional_arguments_come_in_the_original_order(name):
    wanted = IN_ORDER[name].split()
    assert parameters(getattr(memformers, name).__init__)[:len(wanted)] == wanted


@pytest.mark.parametrize("name", BY_NAME)
def test_every_argument_of_the_original_is_known(name):
    assert set(BY_NAME[name].split()) <= set(parameters(getattr(memformers, name).__init__))


@pytest.mark.parametrize("name", CALLS)
def test_calls_take_their_arguments_in_the_original_order(name):
    wanted = CALLS[name].split()
    assert parameters(getattr(memformers, name).forward)[:len(wanted)] == wanted
