"""State tracking: Feedback Transformer and Transformer-XL on programs with 3 or 5 variables.

    python bench/feedback_programs.py [VARIABLES ...] [--steps 800]

Each step reads 32 programs of one length, from a few statements up to 16; the score is that of
400 programs of 16. Prints a line per model and writes `results/feedback_programs_VARIABLES.json`.
"""
import argparse
import json
import math
import time

import torch
import torch.nn.functional as F
from common import RESULTS, machine
from torch import nn

from memformers import FeedbackTransformer, TransformerXL
from memformers.data import TaskStream, program_task

SIZE = dict(num_tokens=128, dim=48, depth=2, heads=3, ff_mult=2)
MODELS = {
    "Feedback Transformer": lambda: FeedbackTransformer(dim_head=16, seq_len=1, mem_len=64,
                                                        tol=1e-3, **SIZE),
    "Transformer-XL": lambda: TransformerXL(seq_len=64, mem_len=0, positions="t5", ff_glu=True,
                                            **SIZE),
}


def score(model, variables: int) -> tuple[float, float, int]:
    """Share of right answers, half the width of its 95 % interval, answers."""
    task = program_task(variables, statements=16)
    segment = next(TaskStream(task, 400, task.length - 1, seed=10**6))
    with torch.no_grad(): logits = model.eval().step(segment.tokens, None, segment.mask).logits
    model.train()
    right = (logits.argmax(-1) == segment.labels)[segment.loss_mask].double()
    return right.mean().item(), 1.96 * (right.var() / len(right)).sqrt().item(), len(right)


def train(model, variables: int, steps: int, rows: int = 32, lr: float = 3e-3):
    """One row of programs of each length in turn, warm-up, then half a cosine."""
    sizes = sorted({variables + 2, variables + 4, variables + 7, 16})
    tasks = [program_task(variables, statements=size) for size in sizes]
    streams = [TaskStream(task, rows, task.length - 1, seed=i) for i, task in enumerate(tasks)]
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(.9, .98))
    for step in range(steps):
        segment = next(streams[step % len(streams)])
        rate = min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = lr * rate
        logits = model.step(segment.tokens, None, segment.mask).logits
        loss = F.cross_entropy(logits[segment.loss_mask], segment.labels[segment.loss_mask])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("variables", type=int, nargs="*", default=[3, 5])
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for variables in options.variables:
        rows = []
        for name, build in MODELS.items():
            torch.manual_seed(0)
            model, start = build(), time.process_time()
            train(model, variables, options.steps)
            share, half, answers = score(model, variables)
            weights = sum(p.numel() for p in model.parameters())
            rows.append(dict(model=name, variables=variables, weights=weights, steps=options.steps,
                             right=round(share, 4), interval=round(half, 4), answers=answers,
                             cpu_seconds=round(time.process_time() - start)))
            print(json.dumps(rows[-1]), flush=True)
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n"
        (RESULTS / f"feedback_programs_{variables}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
