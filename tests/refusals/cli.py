"""The command line: options, prompts and models that mean nothing."""
import os
from functools import partial

from memformers import cli
from memformers.zoo import load_model
from refusals.common import Refusal, refusals

XL = "transformer_xl_tiny"
train = partial(cli.train, XL, cpu=True)
evaluate, generate = partial(cli.evaluate, ".", cpu=True), partial(cli.generate, ".", cpu=True)
demo = partial(cli.demo, cpu=True)
NAN, INF = float("nan"), float("inf")

ROWS = [
    *refusals("memformers train", lambda model: cli.train(model), "model", "transformer_xxl", "",
              "/nowhere", "/no/where/at/all", error=(ValueError, OSError), match="model|folder"),
    *refusals("memformers train", train, "corpus", "/nowhere/at/all", "enwik", error=OSError),
    *refusals("memformers train", train, "options", "mem_len", "mem_len=big", "mem_len=1.5",
              "mem_len=True", "memlen=5", "=5", "'", "positions=3", "positions=rope", "dim=None",
              "heads=[2]",
              "same_length=yes", "memory_layers=2", match="options|positions|memory_layers"),
    *refusals("memformers train", train, "cut", 1, -1, 1.5, "8"),
    *refusals("memformers train", train, "valid_share", 0, -1, .95, 1, NAN),
    *refusals("memformers train", train, "steps", 0, -1, 1.5),
    *refusals("memformers train", train, "batch_size", 0, -1, 1.5),
    *refusals("memformers train", train, "accumulate", 0, -1),
    *refusals("memformers train", train, "lr", 0, -1, NAN, INF),
    *refusals("memformers train", train, "min_lr", -1, 2, NAN),
    *refusals("memformers train", train, "weight_decay", -1, NAN),
    *refusals("memformers train", train, "clip", -1, NAN),
    *refusals("memformers train", train, "warmup", -1),
    *refusals("memformers train", train, "seed", -1, 1.5),
    *refusals("memformers train", train, "mixed_precision", "int8"),
    *refusals("memformers train", train, "save_every", 0),
    *refusals("memformers train", train, "log_every", 0),
    *refusals("memformers evaluate", lambda folder: cli.evaluate(folder), "folder", "/nowhere",
              "a/b/c", error=OSError, match="folder"),
    *refusals("memformers evaluate", evaluate, "modes", "on,off", "ON", "none"),
    *refusals("memformers evaluate", evaluate, "cut", 1, -1, 1.5, "8"),
    *refusals("memformers evaluate", evaluate, "valid_share", 0, -1, .95, 1, NAN),
    *refusals("memformers evaluate", evaluate, "split", "dev", "", "validation"),
    *refusals("memformers evaluate", evaluate, "documents", -1, 1.5),
    *refusals("memformers evaluate", evaluate, "max_tokens", -1, 1.5),
    *refusals("memformers evaluate", evaluate, "batch_size", 0, -1, 1.5),
    *refusals("memformers generate", lambda folder: cli.generate(folder), "folder", "/nowhere",
              "a/b/c", error=OSError, match="folder"),
    *refusals("memformers generate", generate, "prompt", "", "@/dev/zero", "@/nowhere", "@/tmp",
              "@",
              error=(ValueError, OSError)),
    *refusals("memformers generate", generate, "length", -1, 1.5),
    *refusals("memformers generate", generate, "temperature", -1, NAN, INF),
    *refusals("memformers generate", generate, "top_k", -1, 1.5),
    *refusals("memformers generate", generate, "top_p", -.1, 1.5, NAN),
    *refusals("memformers generate", generate, "min_p", -.1, 1.5, NAN),
    *refusals("memformers generate", generate, "stop", "ab", "é"),
    *refusals("memformers generate", generate, "seed", -1, 1.5),
    *refusals("memformers data", cli.data, "names", ["novels"], [""], match="name"),
    *refusals("memformers demo", demo, "model", "transformer_xxl"),
    *refusals("memformers demo", demo, "steps", 0, -1),
    *refusals("memformers demo", demo, "episodes", 0, -1, 1.5),
    *refusals("memformers demo", demo, "seed", -1, 1.5),
    *refusals("memformers demo", demo, "documents", -1),
    *refusals("memformers demo", demo, "max_tokens", -1),
    *refusals("load_model", load_model, "where", "/nowhere", "a/b/c", "", error=OSError,
              match="folder"),
]


def pipe(folder):
    os.mkfifo(folder / "pipe")
    generate(prompt=f"@{folder / 'pipe'}")


ROWS += [Refusal("memformers generate, a pipe as a prompt", pipe, OSError, "prompt")]
