"""Generation: prompts, masks, memories and settings that mean nothing; reader and wrapper."""
import torch

from memformers import AutoregressiveWrapper, Reader, generate, stream
from refusals.common import REFUSED, Refusal, refusals
from refusals.step import OTHER, memory, model

XL, PROMPT, MASK = "TransformerXL", torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3).bool()


def call(prompt=PROMPT, length=2, **options): return generate(model(XL), prompt, length, **options)


def lazily(length=2, **options): return list(stream(model(XL), PROMPT, length, **options))



def rows(call, name, pairs, match): return [
    Refusal(f"{name} {what}", lambda v=value: call(v), REFUSED, match)
    for what, value in pairs.items()]


PROMPTS = {
    "a list": [1, 2], "a string": "text", "None": None, "float": PROMPT.float(),
    "bool": PROMPT.bool(), "3-D": PROMPT[None], "empty": PROMPT[:, :0], "no rows": PROMPT[:0],
    "an id of num_tokens": PROMPT * 17, "a negative id": -PROMPT,
}
MASKS = {
    "shorter": MASK[:, :2], "longer": torch.ones(1, 4).bool(), "of two rows": MASK.expand(2, 3),
    "of floats": MASK.float(), "of integers": MASK.long(), "a list": [[True] * 3],
    "of nothing": ~MASK,
}
ROWS = rows(lambda v: call(prompt=v), "generate, prompt", PROMPTS, "prompt|tokens")
ROWS += rows(lambda v: call(mask=v), "generate, mask", MASKS, "mask")
ROWS += [Refusal("generate, memory of two rows", lambda: call(memory=memory(XL, 2)),
                 REFUSED, "memory"),
         Refusal("generate, memory of another mechanism", lambda: call(memory=memory(OTHER[XL], 1)),
                 REFUSED, "memory"),
         Refusal("generate, memory a tensor", lambda: call(memory=torch.zeros(1, 2, 4, 8)), REFUSED,
                 "memory"),
         Refusal("generate, model a module", lambda: generate(torch.nn.Linear(2, 2), PROMPT, 2),
                 REFUSED, "model")]
for argument, bad in dict(
        length=(-1, 1.5, "2", None), temperature=(-1, "hot", float("nan")), top_k=(0, -1, 1.5, "2"),
        top_p=(-0.1, 1.1, "half", float("nan")), min_p=(-0.1, 1.1, "half", float("nan")),
        stop_token=("a", 1.5, -1, 17, [17], ["a"]),
        pad=("a", 1.5), filter_logits=(3,), generator=(3,), logits_processor=(3, "ab", [3])).items():
    ROWS += refusals("generate", call, argument, *bad)
    ROWS += refusals("stream", lazily, argument, bad[0])

ROWS += refusals("Reader", lambda **o: Reader(model(XL), **o), "batch_size", -1, 1.5, "2")
ROWS += rows(lambda v: Reader(model(XL), memory=v), "Reader, memory", {
    "of another mechanism": memory(OTHER[XL]), "a tensor": torch.zeros(1, 2, 4, 8)}, "memory")
READER = rows(lambda v: Reader(model(XL), 1).read(v), "Reader.read, tokens",
              {k: v for k, v in PROMPTS.items() if k != "empty"} | {
                  "1-D": PROMPT[0], "of two rows": PROMPT.expand(2, 3)}, "tokens")
READER += rows(lambda v: Reader(model(XL), 1).read(PROMPT, v), "Reader.read, mask", MASKS,
               "mask|token")
ROWS += READER

WRAPPER = lambda: AutoregressiveWrapper(model(XL))
LONG = torch.ones(2, 9, dtype=torch.long)
ROWS += rows(lambda v: list(WRAPPER()(v, return_loss=True)), "wrapper, x", {
    "a string": "text", "None": None, "a number": 3, "float": LONG.float(), "3-D": LONG[None],
    "one token": LONG[:, :1], "no rows": LONG[:0], "an empty list": [],
    "a list of matrices": [LONG], "an id of num_tokens": LONG * 17}, r"\bx\b|tokens")
ROWS += rows(lambda v: list(WRAPPER()(LONG, mask=v, return_loss=True)), "wrapper, mask", {
    "shorter": torch.ones(2, 5).bool(), "of floats": torch.ones(2, 9),
    "of one row": torch.ones(1, 9).bool(), "a list": [[True] * 9] * 2}, "mask")
for argument in ("max_batch_size", "truncate_every"):
    ROWS += refusals("wrapper", lambda **o: list(WRAPPER()(LONG, return_loss=True, **o)), argument,
                     0, -1, 1.5, "2")
ROWS += rows(lambda v: list(WRAPPER()(LONG, return_loss=True, memory=v)), "wrapper, memory", {
    "of one row": memory(XL, 1), "of another mechanism": memory(OTHER[XL]),
    "a tensor": torch.zeros(2, 2, 4, 8)}, "memor")
ROWS += [Refusal("wrapper, net a module", lambda: AutoregressiveWrapper(torch.nn.Linear(2, 2)),
                 REFUSED, r"\bnet\b")]
