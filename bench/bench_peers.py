"""Published packages beside ours: a training step, what is carried, and the laws that hold.

Each package is used by its public calls alone and in the same sizes, for the laws in float64. Where
a law does not hold, the table says what was found instead.
"""
import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import SIZE, Plain, interleaved, save, train
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from memformers import (BlockRecurrentTransformer, InfiniTransformer, NeuralMemoryTransformer,
                        RecurrentMemoryTransformer, carry, reset)

INSTALL = {
    "recurrent-memory-transformer-pytorch": "hyper-connections einops",
    "infini-transformer-pytorch": "rotary-embedding-torch einops",
    "block-recurrent-transformer-pytorch": "memorizing-transformers-pytorch beartype einops",
    "titans-pytorch":
        "assoc-scan accelerated-scan axial-positional-embedding cloudpickle einops einx frozendict "
        "hyper-connections loguru pyvers rotary-embedding-torch tensordict torch-einops-utils "
        "x-transformers",
}
TINY = dict(num_tokens=17, dim=16, depth=2, heads=2)   # for the laws
N, ROWS = 8, 3                                         # tokens of a segment there, rows


class Side(NamedTuple):
    """A model and how it is called."""
    make: Callable             # sizes, segment, tokens of a text to the model
    step: Callable | None      # model, tokens, memory, mask to logits and memory, with its graph
    read: Callable | None = None     # model, text to logits: several segments in one call
    mask: bool = False               # does `step` take a mask?
    fresh: Callable | None = None    # model, memory, row to the memory with that row anew
    pieces: Callable | None = None   # model, tokens to logits, token by token
    sums: Callable | None = None     # memory to what is summed up in it
    segment: int = 256               # tokens of a segment in the timed step


def ours(cls, sums=None, segment=256, **options):
    def make(sizes, n, text): return cls(**sizes, seq_len=n, **options)

    def step(model, tokens, memory, mask=None):
        out = model.step(tokens, memory, mask)
        return out.logits, carry(out.memory, grad=True)

    def pieces(model, tokens):
        memory, logits = model.init_memory(len(tokens)), []
        for part in tokens.split(model.seq_len, 1):
            opened = model.begin(memory)
            for token in part.split(1, 1):
                out, opened = model.extend(opened, token)
                logits.append(out)
            memory = carry(model.finish(opened)[0])
        return torch.cat(logits, 1)

    fresh = lambda model, memory, row: reset(memory, torch.arange(ROWS) == row)
    return Side(make, step, None, True, fresh, pieces, sums, segment)


def zeroed(memory, row):
    """The memory with zeros in a row, wherever the rows are."""
    def zero(t):
        where = torch.arange(ROWS).eq(row).view([-1 if n == ROWS else 1 for n in t.shape])
        return t.masked_fill(where, 0)
    return tree_map(zero, memory)


def recurrent(package, **options):
    def make(sizes, n, text):
        return package.RecurrentMemoryTransformer(
            **sizes, dim_head=sizes["dim"] // sizes["heads"], num_memory_tokens=R, seq_len=n,
            use_xl_memories=False, **options)
    step = lambda model, x, memory, mask=None: model(x, memory, mask=mask)[:2]
    return Side(make, step, mask=True, fresh=lambda model, memory, row: zeroed(memory, row))


def infini(package):
    def make(sizes, n, text):
        return package.InfiniTransformer(**sizes, dim_head=sizes["dim"] // sizes["heads"])

    def step(model, x, memory, mask=None):
        out = model(x, past_memories=memory, return_new_memories=True)
        return out.logits, out.past_memories

    def pieces(model, tokens):
        memory, logits = None, []
        for part in tokens.split(N, 1):
            cache = None
            for i in range(1, part.shape[1] + 1):
                out = model(part[:, :i], past_memories=memory, cached_kv=cache,
                            return_new_memories=i == N)
                cache, memory = out.cached_kvs, out.past_memories
                logits.append(out.logits[:, -1:])
        return torch.cat(logits, 1)

    return Side(make, step, None, False, lambda model, memory, row: zeroed(memory, row), pieces,
                lambda memory: memory)


def block_recurrent(package):
    def make(sizes, n, text):
        return package.BlockRecurrentTransformer(
            **sizes, dim_head=sizes["dim"] // sizes["heads"], block_width=n, max_seq_len=text,
            num_state_vectors=4 * R)

    def step(model, x, memory, mask=None):
        xl, states = ([], []) if memory is None else memory
        logits, *memory = model(x, xl_memories=xl, states=states, return_memories_and_states=True)
        return logits, memory

    def fresh(model, memory, row):
        first = next(layer.state_container.init_state for layer, _ in model.layers
                     if layer.is_recurrent_layer)
        xl, (states,) = zeroed(memory, row)
        here = torch.arange(ROWS).eq(row)[:, None, None]
        return [xl, [torch.where(here, first, states)]]

    return Side(make, step, lambda model, x: model(x)[0], fresh=fresh,
                sums=lambda memory: memory[1])


def titans(package):
    def make(sizes, n, text):
        return package.MemoryAsContextTransformer(
            **sizes, dim_head=sizes["dim"] // sizes["heads"], segment_len=n,
            num_longterm_mem_tokens=2, num_persist_mem_tokens=2)

    def pieces(model, tokens):   # as its `sample` does it
        axes = model.axial_pos_emb.maybe_derive_outer_dim(
            model.seq_len_with_longterm_mem(tokens.shape[1]), (model.neural_memory_segment_len,))
        places = model.axial_pos_emb(axes, return_factorized=True)
        cache, logits, i = None, [], 1
        while i <= tokens.shape[1]:
            out, cache = model(tokens[:, :i], cache=cache, return_cache=True,
                               factorized_pos_emb=places)
            if out is None: continue   # one of its memory tokens was read
            logits.append(out[:, -1:])
            i += 1
        return torch.cat(logits, 1)

    return Side(make, None, lambda model, x: model(x), pieces=pieces, segment=64)


class Layer(nn.Module):
    """The neural memory of titans-pytorch alone, between an embedding and a head."""
    def __init__(self, package, sizes, n):
        super().__init__()
        self.embedding = nn.Embedding(sizes["num_tokens"], sizes["dim"])
        self.memory = package.NeuralMemory(dim=sizes["dim"], chunk_size=n // 2)
        self.head = nn.Linear(sizes["dim"], sizes["num_tokens"], bias=False)


def neural_layer(package):
    def step(model, x, memory, mask=None):
        found, memory = model.memory(model.embedding(x), state=memory, store_mask=mask)
        return model.head(found), memory
    return Side(lambda sizes, n, text: Layer(package, sizes, n), step, mask=True,
                sums=lambda memory: [memory.weights, memory.states])


R = 16   # memory tokens; states of block recurrence: 4 R
FAST = "recurrent-memory-transformer-pytorch, one residual stream"
PEERS = {
    "recurrent-memory-transformer-pytorch": recurrent,
    FAST: partial(recurrent, num_residual_streams=1),
    "infini-transformer-pytorch": infini,
    "block-recurrent-transformer-pytorch": block_recurrent,
    "titans-pytorch": titans,
    "titans-pytorch, the layer": neural_layer,
}
OURS = {
    "memformers, recurrent memory": ours(RecurrentMemoryTransformer, num_memory_tokens=R),
    "memformers, Infini-attention": ours(InfiniTransformer, lambda m: [m.matrix, m.norm]),
    "memformers, block-recurrent": ours(BlockRecurrentTransformer, lambda m: m.states,
                                        num_states=4 * R),
    "memformers, neural memory": ours(NeuralMemoryTransformer, lambda m: [m.weights, m.momentum],
                                      segment=64, wiring="context"),
}


def sides():
    """Ours and each peer that can be imported; and for the others why not."""
    found, missing = dict(OURS), {}
    for name, side in PEERS.items():
        package = name.split(",")[0]
        try: found[name] = side(importlib.import_module(package.replace("-", "_")))
        except ImportError as error:
            missing[name] = str(error)
            print(f"\n{name} is left out ({error}): pip install --no-deps {package} "
                  + INSTALL[package])
    try: importlib.import_module("fla.ops.gated_delta_rule")   # measured with the delta rule
    except ImportError as error: missing["fla-core"] = str(error)
    return found, missing


# The laws. Each gives None if it holds, or what was found instead.

def model_of(side, large=True):
    """In float64; with large weights, nothing hides in rounding."""
    torch.manual_seed(0)
    model = side.make(TINY, N, 3 * N).double().eval()
    if large:
        with torch.no_grad():
            for p in model.parameters(): p.add_(torch.randn_like(p) * 0.2)
    return model


def text(length=3 * N, seed=1):
    return torch.randint(17, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def other(tokens, at):
    """The text with another token at one place."""
    tokens = tokens.clone()
    tokens[:, at] = (tokens[:, at] + 1) % 17
    return tokens


def read(side, model, tokens, memory=None):
    """Logits of a text, in one call where there is one."""
    if side.read: return side.read(model, tokens)
    logits = []
    for part in tokens.split(N, 1):
        out, memory = side.step(model, part, memory)
        logits.append(out)
    return torch.cat(logits, 1)


def far(a, b, least=1e-6):
    """How far apart, relative to the size; None if not at all (some peers compute in float32)."""
    apart = float((a - b).detach().abs().max() / b.detach().abs().max())
    return None if apart <= least else f"differs by {apart:.0e}"


def causal(side):
    model, a = model_of(side), text()
    whole = read(side, model, a)
    for t in range(1, 3 * N):
        if why := far(read(side, model, other(a, t))[:, :t], whole[:, :t]): return why


def rows(side):
    model, a, b = model_of(side), text(), text()
    b[1] = text(seed=2)[1]
    return far(read(side, model, b)[[0, 2]], read(side, model, a)[[0, 2]])


def carried(side):
    if side.step is None: return "no memory between calls"


def padding(side):
    if not side.mask: return "takes no mask"
    model, a, b, real = model_of(side), text(N), text(N, 2), 5
    mask = torch.ones(ROWS, N, dtype=torch.bool)
    mask[1, real:] = False
    first, memory = side.step(model, a, None, mask)
    alone, own = side.step(model, a[1:2, :real], None)
    return far(first[1:2, :real], alone) or \
        far(side.step(model, b, memory)[0][1:2], side.step(model, b[1:2], own)[0])


def anew(side):
    if carried(side): return carried(side)
    if side.fresh is None: return "one position for all rows"
    model, a, b = model_of(side), text(N), text(N, 2)
    memory = side.fresh(model, side.step(model, a, None)[1], 1)
    return far(side.step(model, b, memory)[0][1], side.step(model, b, None)[0][1])


def pure(side):
    if carried(side): return carried(side)
    model, a, b = model_of(side), text(N), text(N, 2)
    memory = side.step(model, a, None)[1]
    before = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, memory)
    x, y = side.step(model, b, memory)[0], side.step(model, b, memory)[0]
    for t, u in zip(tree_flatten(memory)[0], tree_flatten(before)[0]):
        if isinstance(t, torch.Tensor) and not torch.equal(t, u): return "the memory is changed"
    return far(x, y)


def by_token(side):
    if side.pieces is None: return "no such call"
    model, a = model_of(side), text()
    return far(side.pieces(model, a), read(side, model, a))


def past(side, run):
    """Does each token of the first segment get a gradient from the loss of the last one?"""
    model, seen = model_of(side), []
    embedding = lambda m: isinstance(m, nn.Embedding) and m.num_embeddings == 17
    next(filter(embedding, model.modules())).register_forward_hook(
        lambda module, given, out: seen.append(out) or out.requires_grad_().retain_grad())
    run(model).square().sum().backward()
    grad = seen[0].grad[:, :N] if seen[0].grad is not None else torch.zeros(1)
    return None if (grad.abs().amax(-1) > 0).all() else "none"


def one_call(side):
    if side.read: return past(side, lambda model: side.read(model, text())[:, 2 * N:])
    return two_calls(side)


def two_calls(side):
    if carried(side): return carried(side)
    def run(model): return side.step(model, text(N, 2), side.step(model, text(N), None)[1])[0]
    return past(side, run)


def any_length(side):
    """Segments of 5, 3 and 8 tokens; a token of the second is remembered."""
    if carried(side): return carried(side)
    model, a, found = model_of(side), text(2 * N), []
    for given in (a, other(a, 6)):
        memory = None
        for part in given.split([5, 3, 8], 1): out, memory = side.step(model, part, memory)
        found.append(out)
    return None if far(*found) else "a short segment is forgotten"


def noticed(side):
    """The last segment, as initialised, after other texts before it."""
    model, a, b = model_of(side, large=False), text(), text(seed=2)
    b[:, 2 * N:] = a[:, 2 * N:]
    x, y = (read(side, model, t)[:, 2 * N:] for t in (a, b))
    share = float((x - y).detach().std() / y.detach().std())
    return None if share > 1e-3 else f"{share:.0e} of the logits"


def exact(side):
    if carried(side): return carried(side)
    if side.sums is None: return None
    model = side.make(TINY, N, 3 * N).bfloat16().eval()
    kept = tree_flatten(side.sums(side.step(model, text(N), None)[1]))[0]
    kinds = {str(t.dtype).removeprefix("torch.") for t in kept}
    return None if kinds == {"float32"} else ", ".join(sorted(kinds))



LAWS = {
    "nothing sees the future": causal,
    "rows do not mix": rows,
    "padding changes nothing": padding,
    "one row can begin a new text": anew,
    "a step leaves the given memory as it was": pure,
    "token by token gives the same": by_token,
    "a gradient reaches earlier segments": one_call,
    "… also from one call to the next": two_calls,
    "segments of any length are remembered": any_length,
    "the memory counts from the start (0.1 % of the logits)": noticed,
    "sums stay float32 in bfloat16": exact,
}


def verdict(law, side):
    try: return law(side) or "holds"
    except Exception as error:   # of a peer, whatever it is
        return f"{type(error).__name__}: " + (str(error).strip().splitlines() or [""])[0][:60]


def laws(found):
    made = {law: {name: verdict(test, side) for name, side in found.items() if name != FAST}
            for law, test in LAWS.items()}
    return {"title": "laws, tried in float64 on 3 rows, segments of 8 tokens, width 16, 2 layers",
            "rows": made}


# A training step

TEXT = 256


def timed(side):
    """One forward and backward pass over 4 × 256 tokens, with a memory from before."""
    torch.manual_seed(0)
    tokens, model = torch.randint(256, (4, TEXT)), side.make(SIZE, side.segment, TEXT)
    if side.step is None: return model, None, train(model, tokens, lambda: side.read(model, tokens))
    with torch.no_grad():
        _, old = side.step(model, tokens[:, :side.segment], None)
    old = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, old)

    def forward():
        memory, logits = old, []
        for part in tokens.split(side.segment, 1):
            out, memory = side.step(model, part, memory)
            logits.append(out)
        floats = [t for t in tree_flatten(memory)[0]
                  if isinstance(t, torch.Tensor) and t.requires_grad]
        return torch.cat(logits, 1) + 0 * sum(t.mean() for t in floats)   # what is written counts
    return model, old, train(model, tokens, forward)


def peak(call) -> float:
    """Peak memory in MB that a call adds, in a fork of this process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        high = lambda: int(next(line.split()[1] for line in open("/proc/self/status")
                                if line.startswith("VmHWM")))
        before = high()
        call()
        os.write(write, str(high() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(read, 99)) / 1024


def training(found):
    torch.manual_seed(0)
    tokens, plain = torch.randint(256, (4, TEXT)), Plain(**SIZE)
    cases, facts = {"plain decoder": train(plain, tokens, lambda: plain(tokens))}, {}
    # First, while this process has used little memory itself.
    peaks = {name: peak(lambda side=side: timed(side)[2]()) for name, side in found.items()}
    for name, side in found.items():
        if name.endswith("the layer"): continue   # it is no language model
        model, memory, cases[name] = timed(side)
        carried = [t for t in tree_flatten(memory)[0] if isinstance(t, torch.Tensor)]
        weights = sum(p.numel() for p in model.parameters())
        facts[name] = {"weights, millions": round(weights / 1e6, 2),
                       "KB carried per row": round(sum(t.nbytes for t in carried) / 4096, 1) or "",
                       "tokens a segment": side.segment}
    ms = interleaved(cases, 3)
    made = {}
    for name, t in ms.items():
        made[name] = {"ms": round(t, 1), "ratio": round(t / ms["plain decoder"], 2)}
        if name in facts:
            made[name] |= {"peak MB": round(peaks[name])} | facts[name]
    return {"title": f"training step, 4 × {TEXT} tokens, width 256, 4 layers, after a segment",
            "reference": "plain decoder", "rows": made}


def main():
    found, missing = sides()
    tables = [laws(found)]
    if missing: tables.append({"title": "not imported here, and why",
                               "rows": {name: {"": why} for name, why in missing.items()}})
    save("peers", tables)   # the laws can be read while the rest is measured
    save("peers", [*tables, training(found)])


if __name__ == "__main__": main()
