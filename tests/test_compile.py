"""A compiled step gives what the eager one gives, in one graph where the zoo's page says so."""
import pytest
import torch

import memformers
from memformers import carry

SIZES = dict(num_tokens=32, dim=16, depth=2, heads=2, seq_len=8)
ONE_GRAPH = [("TransformerXL", dict(mem_len=6)),
             ("CompressiveTransformer", dict(mem_len=8, cmem_len=4, cmem_ratio=4)),
             ("MemoryTransformerXL", dict(mem_len=6, lmem_len=4)),
             ("MemorizingTransformer", dict(dim_head=8, max_knn_memories=20)),
             ("InfiniTransformer", dict()), ("InfiniTransformer", dict(delta="token")),
             ("GatedDeltaNet", dict()), ("BlockRecurrentTransformer", dict(num_states=4)),
             ("NeuralMemoryTransformer", dict()),
             ("NeuralMemoryTransformer", dict(wiring="context"))]
SEVERAL = [("FeedbackTransformer", dict(seq_len=2, segment_len=8, mem_len=6, dim_head=8)),
           ("RecurrentMemoryTransformer", dict()),
           ("AssociativeTransformer", dict(num_memory_tokens=3, dim_memory=8))]


@pytest.mark.slow
@pytest.mark.parametrize("name, options, one_graph", [
    *((name, options, True) for name, options in ONE_GRAPH),
    *((name, options, False) for name, options in SEVERAL)])
@torch.no_grad()
def test_a_compiled_step_equals_the_eager_one(name, options, one_graph):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = getattr(memformers, name)(**(SIZES | options)).eval()
    step = torch.compile(lambda tokens, memory: model.step(tokens, memory), backend="eager",
                         fullgraph=one_graph)
    memories = [None, None]
    for tokens in torch.randint(32, (2, 16)).split(8, 1):
        outs = [f(tokens, memory) for f, memory in zip((step, model.step), memories)]
        torch.testing.assert_close(outs[0].logits, outs[1].logits)
        memories = [carry(out.memory) for out in outs]
