"""Feedback Transformer and the solver of fixed points: options, memories, calls that mean nothing."""
from functools import partial

import torch

from memformers import FeedbackTransformer
from memformers.fixed_point import solve
from refusals.common import Refusal, refusals

SMALL = dict(num_tokens=17, dim=8, depth=2, heads=2, dim_head=4, mem_len=4)
NAN, INF = float("nan"), float("inf")
TOKENS = torch.zeros(2, 3, dtype=torch.long)


def feedback(seq_len=2, **options): return FeedbackTransformer(**(SMALL | options), seq_len=seq_len)


def step(tokens=TOKENS, memory=None, mask=None, **options):
    return feedback(**options).step(tokens, memory, mask)


def other(**options): return feedback(**options).init_memory(2)


def f(entries): return (entries * 0,)


def looking_ahead():
    x = torch.ones(1, 3, 2, requires_grad=True)
    (entries,), _ = solve(lambda e: (0.9 * e.flip(1) + x,), torch.zeros(1, 3, 2))
    entries.sum().backward()


ROWS = [
    *refusals("feedback", feedback, "tol", -1e-3, NAN, INF, -INF, None, "1e-3", True),
    *refusals("feedback", feedback, "max_passes", 0, -1, 2.5, "8"),
    *refusals("feedback", feedback, "block_len", 0, -4, 1.5, None),
    *refusals("feedback", feedback, "segment_len", 0, -1, 1.5, "2048"),
    *refusals("feedback", feedback, "solver", "newton", None, "Parallel"),
    *refusals("feedback", feedback, "gradient", "exact", None),
    *refusals("feedback", feedback, "positions", "xl", "none", None),
    *refusals("feedback", feedback, "mem_len", -1, 1.5),
    *refusals("feedback memory", lambda mem_len: feedback().init_memory(2, mem_len=mem_len),
              "mem_len", -1, 1.5),
    *refusals("feedback memory", lambda batch_size: feedback().init_memory(batch_size),
              "batch_size", 0, -1, 1.5),
    Refusal("feedback, memory of a longer window", lambda: step(memory=other(seq_len=5)),
            ValueError, r"window of 2 token"),
    Refusal("feedback, memory of a wider model", lambda: step(memory=other(dim=10)),
            ValueError, r"memory\.mem"),
    Refusal("feedback, memory of a deeper model", lambda: step(memory=other(depth=3)),
            ValueError, r"memory\.window"),
    Refusal("feedback, a tensor as memory", lambda: step(memory=torch.zeros(2, 5, 8)), TypeError,
            r"\bmemory\b"),
    Refusal("feedback, memory of three rows", lambda: step(memory=feedback().init_memory(3)),
            ValueError, r"\bmemory\b"),
    Refusal("feedback, a longer segment than segment_len", lambda: step(segment_len=2), ValueError,
            r"\btokens\b"),
    Refusal("feedback, an integer mask", lambda: step(mask=torch.ones(2, 3).long()), ValueError,
            r"\bmask\b"),
    *refusals("solve", partial(solve, f, torch.zeros(1, 3, 2)), "tol", -1.0, NAN, INF, None),
    *refusals("solve", partial(solve, f, torch.zeros(1, 3, 2)), "max_passes", -1, 1.5),
    *refusals("solve", partial(solve, f, torch.zeros(1, 3, 2)), "gradient", "exact", None),
    Refusal("solve, a function that looks ahead", looking_ahead, ValueError, r"\bf must be causal"),
]
