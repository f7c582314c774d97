"""`step` and the original calls: tokens, masks and memories that do not fit the model."""
from functools import cache

import torch

from memformers import Reader, cast, generate, select
from refusals.common import REFUSED, Refusal
from refusals.constructors import MODELS, QUEUES

OPTIONS = {name: dict(mem_len=4) for name in QUEUES} | {"FeedbackTransformer": dict(segment_len=4)}


@cache
def model(name, **options):
    torch.manual_seed(0)
    return MODELS[name](**OPTIONS.get(name, {}) | options).eval()


def memory(name, rows=2, **options): return model(name, **options).init_memory(rows)


def step(name, tokens=None, memory=None, mask=None):
    tokens = torch.ones(2, 3, dtype=torch.long) if tokens is None else tokens
    return model(name).step(tokens, memory, mask)


TOKENS = {
    "a list": [[1, 2], [3, 4]], "a string": "text", "an array": torch.ones(2, 3).numpy(),
    "float": torch.ones(2, 3), "bool": torch.ones(2, 3, dtype=torch.bool),
    "complex": torch.ones(2, 3, dtype=torch.cfloat),
    "1-D": torch.ones(3, dtype=torch.long), "3-D": torch.ones(2, 3, 1, dtype=torch.long),
    "no rows": torch.ones(0, 3, dtype=torch.long), "no tokens": torch.ones(2, 0, dtype=torch.long),
    "longer than seq_len": torch.ones(2, 5, dtype=torch.long),
    "an id of num_tokens": torch.full((2, 3), 17), "a negative id": torch.full((2, 3), -1),
}
MASKS = {
    "a list": [[True] * 3] * 2, "of integers": torch.ones(2, 3, dtype=torch.long),
    "of floats": torch.ones(2, 3), "shorter": torch.ones(2, 2, dtype=torch.bool),
    "longer": torch.ones(2, 4, dtype=torch.bool), "of one row": torch.ones(1, 3, dtype=torch.bool),
    "1-D": torch.ones(3, dtype=torch.bool), "a string": "all",
}
OTHER = dict(zip(MODELS, [*list(MODELS)[1:], *MODELS]))
MEMORIES = {
    "of fewer rows": lambda name: memory(name, 1), "of more rows": lambda name: memory(name, 3),
    "of no rows": lambda name: select(memory(name), []),
    "of another mechanism": lambda name: memory(OTHER[name]),
    "of another width": lambda name: memory(name, **(
        dict(dim_head=8) if name == "MemorizingTransformer" else dict(dim=16))),
    "a tensor": lambda name: torch.zeros(2, 2, 4, 8), "a string": lambda name: "none",
    "a model": model, "a dict": lambda name: {"mem": torch.zeros(2, 2, 4, 8)},
}
ROWS = [Refusal(f"{name}.step, tokens {what}", lambda n=name, t=tokens: step(n, t), REFUSED,
                "tokens") for name in MODELS for what, tokens in TOKENS.items()]
ROWS += [Refusal(f"{name}.step, mask {what}", lambda n=name, m=mask: step(n, mask=m), REFUSED,
                 "mask") for name in MODELS for what, mask in MASKS.items()]
ROWS += [Refusal(f"{name}.step, memory {what}", lambda n=name, m=make: step(n, memory=m(n)),
                 REFUSED, "memory") for name in MODELS for what, make in MEMORIES.items()]
ROWS += [
    Refusal(f"{name}.init_memory, batch_size={bad!r}",
            lambda n=name, b=bad: model(n).init_memory(b), REFUSED, "batch_size")
    for name in MODELS for bad in (-1, 1.5, "2")]
ELSEWHERE = {"step": step,
             "Reader": lambda name, memory: Reader(model(name), memory=memory),
             "generate": lambda name, memory: generate(model(name), torch.ones(2, 3).long(), 1,
                                                       memory=memory)}
ROWS += [
    Refusal(f"{name}, {what}, memory on another device",
            lambda n=name, f=call: f(n, memory=cast(memory(n), device="meta")), ValueError,
            r"memory\.\w.*on cpu.*got meta.*cast\(memory, device='cpu'\)")
    for name in MODELS for what, call in ELSEWHERE.items()]
