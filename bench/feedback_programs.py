"""State tracking: Feedback Transformer and Transformer-XL on programs with 3 and with 5 variables.

    python bench/feedback_programs.py [--variables 3 5] [--seeds 1] [--steps 3000]

Both models have the same sizes and see the same programs, about 2,000 tokens in each step: first
short ones with one variable, then longer ones with more, up to 16 statements with all of them.
The score is that of 400 new programs of 16 statements with all variables. Prints a line per model
and writes `results/feedback_programs.json` and `.md`, after every model.
"""
import argparse
import json
import math
import random
import time

import torch
import torch.nn.functional as F
from common import RESULTS, machine
from torch import nn

from memformers import FeedbackTransformer, TransformerXL
from memformers.tasks import TaskStream, program_task

STATEMENTS = 16
SIZE = dict(num_tokens=128, dim=64, depth=2, heads=4, ff_mult=2)
MODELS = {
    "Feedback Transformer": lambda: FeedbackTransformer(dim_head=16, seq_len=1, mem_len=64,
                                                        tol=1e-2, **SIZE),
    "Transformer-XL": lambda: TransformerXL(seq_len=64, mem_len=0, positions="t5", ff_glu=True,
                                            **SIZE),
}
PAPER = {("Feedback Transformer", 3): .991, ("Transformer-XL", 3): .337,
         ("Feedback Transformer", 5): .926, ("Transformer-XL", 5): .375}


def build(name: str, seed: int) -> nn.Module:
    """A new model. Matrices this narrow learn nothing for long if they begin as small as wide ones."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    for p in model.parameters():
        if p.ndim > 1: nn.init.normal_(p, std=p.shape[1] ** -.5)
    nn.init.normal_(model.embedding.weight, std=.5)
    return model


@torch.no_grad()
def score(model, variables: int) -> tuple[float, float, int]:
    """Share of right answers, half the width of its 95 % interval, answers."""
    task = program_task(variables, statements=STATEMENTS)
    segment = next(TaskStream(task, 400, task.length - 1, seed=10**6))
    logits = model.eval().step(segment.tokens, None, segment.mask).logits
    model.train()
    right = (logits.argmax(-1) == segment.labels)[segment.loss_mask].double()
    return right.mean().item(), 1.96 * (right.var() / len(right)).sqrt().item(), len(right)


def lessons(variables: int, steps: int, seed: int):
    """Batches of programs of one kind each; in the first half harder and harder kinds join."""
    kinds = [(v, n) for v in range(1, variables + 1) for n in range(v + 1, STATEMENTS + 1)]
    kinds.sort(key=lambda kind: 3 * kind[0] + kind[1])
    tasks = [program_task(v, statements=n) for v, n in kinds]
    streams = [TaskStream(task, max(16, 2000 // task.length), task.length - 1,
                          seed=1000 * seed + i) for i, task in enumerate(tasks)]
    choice = random.Random(seed)
    for step in range(steps):
        yield next(streams[choice.randrange(min(len(kinds), 5 + 2 * step * len(kinds) // steps))])


def train(model, variables: int, steps: int, seed: int, lr: float = 3e-3):
    """The loss is that of the answers. Warm-up, then a constant rate that falls in the second half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(.9, .98))
    for step, segment in enumerate(lessons(variables, steps, seed)):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100, 2 * (1 - step / steps))
        logits = model.step(segment.tokens, None, segment.mask).logits
        loss = F.cross_entropy(logits[segment.loss_mask], segment.labels[segment.loss_mask])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def save(rows: list):
    """All runs as JSON, and as a table to read."""
    where = machine()
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": where, "rows": rows}, indent=2) + "\n"
    (RESULTS / "feedback_programs.json").write_text(text, encoding="utf-8")
    head = "# feedback_programs\n\n" + ", ".join(f"{k}: {v}" for k, v in where.items()
                                                 if v is not None)
    lines = [head, "", "| | variables | seed | weights | steps | right | paper | CPU seconds |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        lines.append("| {model} | {variables} | {seed} | {weights:,} | {steps:,} | {right:.1%} ± "
                     "{interval:.1%} | {paper:.1%} | {cpu_seconds:,} |".format(**row))
    (RESULTS / "feedback_programs.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--variables", type=int, nargs="+", choices=[3, 5], default=[3, 5])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.seeds):
        for variables in options.variables:
            for name in MODELS:
                model, start = build(name, seed), time.process_time()
                train(model, variables, options.steps, seed)
                share, half, answers = score(model, variables)
                rows.append(dict(model=name, variables=variables, seed=seed, steps=options.steps,
                                 weights=sum(p.numel() for p in model.parameters()),
                                 right=round(share, 4), interval=round(half, 4), answers=answers,
                                 paper=PAPER[name, variables],
                                 cpu_seconds=round(time.process_time() - start)))
                print(json.dumps(rows[-1]), flush=True)
                save(rows)


if __name__ == "__main__": main()
