"""The Compressive Transformer and the Memory Transformer-XL beside the original packages.

The peers are measured if they are installed: in an environment of their own,
`pip install --no-deps compressive-transformer-pytorch memory-transformer-xl mogrifier`.
"""
import importlib
import sys

import torch
import torch.nn.functional as F
from common import interleaved, peak_mb, save, table
from torch import nn

from memformers import CompressiveTransformer, MemoryTransformerXL, carry, generate

SIZE = dict(num_tokens=256, dim=256, depth=4, seq_len=256, mem_len=256, heads=8)
ROWS, N = 4, 256
MODELS = {  # name: module of the peer, class name, ours, options
    "Compressive": ("compressive_transformer_pytorch", CompressiveTransformer,
                    dict(cmem_len=64, cmem_ratio=4)),
    "Memory Transformer-XL": ("memory_transformer_xl", MemoryTransformerXL, dict(lmem_len=64)),
}


class Plain(nn.Module):
    """A decoder with the matrix products of a mechanism, and of that mechanism nothing else.

    In each layer: keys and values of `front` states and the segment; queries, attention, output and
    feed-forward of the segment; with `gates`, in the place of each of the two sums, three squares
    of what comes and `of_stream` squares of the stream. What a mechanism adds is taken apart below,
    product by product.
    """
    def __init__(self, num_tokens, dim, depth, heads, front=320, gates=True, of_stream=3, places=0,
                 compress=0, write=0, **_):
        super().__init__()
        self.heads, self.front, self.dim = heads, torch.randn(ROWS, front, dim), dim
        self.embedding = nn.Embedding(num_tokens, dim)
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            norm=nn.LayerNorm(dim), norm2=nn.LayerNorm(dim), qkv=linear(dim, 3 * dim),
            out=linear(dim, dim), expand=linear(dim, 4 * dim), contract=linear(4 * dim, dim),
            **{f"gate{i}": linear(dim, (of_stream if i % 2 else 3) * dim)
               for i in range(4 if gates else 0)},
            **({"compress": linear(compress * dim, dim)} if compress else {})))
            for _ in range(depth))
        self.norm, self.head, self.gates = nn.LayerNorm(dim), linear(dim, num_tokens), gates
        self.ok = torch.arange(front + N) - front <= torch.arange(N)[:, None]
        self.places = nn.Parameter(torch.randn(heads, dim // heads, places)) if places else None
        self.write, self.writer = write, linear(dim, 3 * dim)
        self.added = nn.Parameter(torch.zeros(dim))   # to what the writer reads, as ours learns it

    def project(self, x, weight):
        """Queries, keys, values, or some of them: each (b, heads, n, dim_head)."""
        return F.linear(x, weight).unflatten(2, (-1, self.heads, 32)).permute(2, 0, 3, 1, 4)

    def mask(self, q):
        """What joins the scores. With `places`: queries times a vector for each distance there is,
        (b·n, dim_head) × (dim_head, places) for each head, and its two products backward. Learned,
        so attention cannot take the fused path, in this decoder as in any."""
        if self.places is None: return self.ok
        by_place = (q.transpose(0, 1).flatten(1, 2) @ self.places).unflatten(1, (len(q), -1))
        bare = self.ok.shape[1] - by_place.shape[-1]
        by_key = F.pad(by_place, (bare, 0)).transpose(0, 1)
        return by_key.masked_fill(~self.ok, -torch.inf)

    def compressed(self, layer, q, states):
        """The compression and its loss: one product for each group of states that leave; keys and
        values of states and slots; the segment's attention to both, the first without gradient."""
        ratio = layer["compress"].in_features // self.dim
        made = layer["compress"](states.unflatten(1, (-1, ratio)).flatten(2))
        kv = layer["qkv"].weight[self.dim:].detach()
        (k, v), (k_made, v_made) = (self.project(t, kv) for t in (states, made))
        attend, q = F.scaled_dot_product_attention, q.detach()
        return F.mse_loss(attend(q, k_made, v_made), attend(q, k, v).detach())

    def written(self, states):
        """The writer of long-term slots: keys and values of the states of all layers, then twice
        queries of the slots, linear attention, output (the gate's few rows are left out)."""
        weight = self.writer.weight
        states = torch.cat(states, 1).detach() + self.added
        k, v = self.project(states, weight[self.dim:])
        for _ in range(2):
            q, = self.project(states[:, :self.write], weight[:self.dim])
            slots = F.linear((q @ (k.mT @ v)).transpose(1, 2).flatten(2), weight[:self.dim])
        return slots

    def join(self, layer, i, y, x):
        if not self.gates: return x + y
        a, b, c = layer[f"gate{i}"](y).chunk(3, -1)
        d, e, *f = layer[f"gate{i + 1}"](x).split(self.dim, -1)
        return torch.lerp((c + d + sum(f)).tanh(), x + a, (b + e).sigmoid())

    def forward(self, tokens):
        n, aux, states = tokens.shape[1], [], []
        x = self.embedding(tokens)
        for layer in self.layers:
            both = torch.cat([self.front, x], 1)
            normed, weight = layer["norm"](both), layer["qkv"].weight
            q, = self.project(normed[:, -n:], weight[:self.dim])
            k, v = self.project(normed, weight[self.dim:])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(q))
            if "compress" in layer: aux.append(self.compressed(layer, q, self.front[:, -N:]))
            if self.write: states.append(both[:, -2 * N:])
            x = self.join(layer, 0, layer["out"](y.transpose(1, 2).flatten(2)), x)
            y = layer["contract"](F.gelu(layer["expand"](layer["norm2"](x))))
            x = self.join(layer, 2, y, x)
        if states:
            # A segment is written without a graph. The loss of the next one trains the writer, and
            # so writes once more: in one step, this segment's writing and training of the last.
            with torch.no_grad(): self.written(states)
            aux.append(self.written(states).mean())
        return self.head(self.norm(x)), None, sum(aux)


# What each mechanism multiplies beyond a decoder with 320 states in front. Distances there are:
# 256 tokens back in the memory and 64 slots of 4 behind it; 256 tokens back.
PRODUCTS = {"Compressive": dict(of_stream=3, places=765, compress=4),
            "Memory Transformer-XL": dict(of_stream=2, places=512, write=64)}


def peer(module, name):
    """A class of an original package, or None."""
    try: return getattr(importlib.import_module(module), name)
    except ImportError:
        print(f"{module} is not installed: pip install --no-deps {module.replace('_', '-')}",
              file=sys.stderr)


def trained(model, memory=True):
    """A training step behind full memories."""
    model.train()
    text, memories = torch.randint(256, (4, ROWS, N + 1)), None
    read = lambda x: model(x[:, :-1], memories=memories) if memory else model(x[:, :-1])

    def step(x):
        out = read(x)
        loss = F.cross_entropy(out[0].flatten(0, 1), x[:, 1:].flatten())
        (loss + (out[2] if len(out) > 2 else 0)).backward()
        model.zero_grad()
        return out[1]
    for x in text:
        memories = step(x)
        if isinstance(memories, tuple): memories = type(memories)(*[m.detach() for m in memories])
    return lambda: step(text[0])


def pairs(**options):
    """Ours and theirs, by name."""
    models = {}
    for name, (module, cls, own) in MODELS.items():
        models[name] = cls(**SIZE, **own, **options)
        other = peer(module, cls.__name__)
        if other: models[f"{name}, original"] = other(**SIZE, **own, **options)
    return models


def training():
    torch.manual_seed(0)
    out = []
    for gates in (True, False):
        made = {k: trained(m) for k, m in pairs(gru_gated_residual=gates).items()}
        for name, products in PRODUCTS.items():
            sizes = SIZE | dict(gates=gates, of_stream=products["of_stream"])
            cases = {"plain decoder, same products": trained(Plain(**sizes | products), False),
                     "plain decoder without the mechanism's": trained(Plain(**sizes), False)}
            cases |= {k: step for k, step in made.items() if k.startswith(name)}
            out.append(table(f"training step, {ROWS} × {N} tokens, {'with' if gates else 'no'} "
                             f"gates: {name}", interleaved(cases), "plain decoder, same products"))
    return out


def generation(prompt=64, length=128):
    torch.manual_seed(0)
    cases, text = {}, torch.randint(256, (1, prompt))
    for name, model in pairs().items():
        model.eval()
        if "original" not in name:
            cases[name] = lambda model=model: generate(model, text, length)
            continue
        module = MODELS[name.removesuffix(", original")][0]
        wrap = peer(f"{module}.autoregressive_wrapper", "AutoregressiveWrapper")
        cases[name] = lambda w=wrap(model): w.generate(text, length)
    weights = {name: p for name, p in pairs().items() if "original" not in name}
    for name, model in weights.items():
        vectors = [p for p in model.parameters() if p.ndim == 2 and p is not model.embedding.weight]
        x = {p.shape[1]: torch.randn(1, p.shape[1]) for p in vectors}
        cases[f"{name}, its matrix products alone"] = lambda vectors=vectors, x=x: [
            F.linear(x[p.shape[1]], p) for _ in range(length) for p in vectors]
    with torch.no_grad(): ms = interleaved(cases, rounds=3)
    rates = {name: length / (t / 1e3) for name, t in ms.items()}
    reference = next((name for name in rates if "original" in name), next(iter(rates)))
    return table(f"generation, 1 row, prompt {prompt}, {length} tokens", rates, reference,
                 "tokens per second")


def growth():
    torch.manual_seed(0)
    out = []
    for name, (_, cls, own) in MODELS.items():
        model, memory, cases = cls(**SIZE, **own).eval(), None, {}
        for segments in range(1, 33):
            x = torch.randint(256, (1, N))
            memory = carry(model.step(x, memory).memory)
            if segments in (4, 8, 32):
                cases[f"after {segments * N} tokens"] = lambda m=memory, x=x: model.step(x, m)
        with torch.no_grad(): out.append(table(f"{name}: a segment of {N}, 1 row",
                                               interleaved(cases), "after 1024 tokens"))
    return out


def memory():
    rows = {"nothing but the imports": peak_mb("import bench_compressive")}
    for name, (module, cls, own) in MODELS.items():
        for who, source in (("", "memformers"), (", original", module)):
            if who and not peer(module, cls.__name__): continue
            rows[name + who] = peak_mb(
                "import torch; torch.manual_seed(0); from bench_compressive import *\n"
                f"from {source} import {cls.__name__} as Model\n"
                f"step = trained(Model(**SIZE, **{own!r}))\n"
                "for _ in range(3): step()")
    base = rows.pop("nothing but the imports")
    print(f"\npeak memory above the imports' {base:.0f} MB:")
    return table("peak memory of training steps", {k: v - base for k, v in rows.items()},
                 next(iter(rows)), "MB")


def main():
    # Memory first: a child process begins with its parent's peak.
    save("compressive", [memory(), *training(), generation(), *growth()])


if __name__ == "__main__": main()
