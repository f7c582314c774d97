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
    """A decoder with the same matrix products: gates' products, and 320 states in front."""
    def __init__(self, num_tokens, dim, depth, heads, front=320, gates=True, **_):
        super().__init__()
        self.heads, self.front = heads, torch.randn(ROWS, front, dim)
        self.embedding = nn.Embedding(num_tokens, dim)
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            norm=nn.LayerNorm(dim), norm2=nn.LayerNorm(dim), qkv=linear(dim, 3 * dim),
            out=linear(dim, dim), expand=linear(dim, 4 * dim), contract=linear(4 * dim, dim),
            **{f"gate{i}": linear(dim, 3 * dim) for i in range(4 if gates else 0)}))
            for _ in range(depth))
        self.norm, self.head, self.gates = nn.LayerNorm(dim), linear(dim, num_tokens), gates
        keys = torch.arange(front + N) - front
        self.ok = keys <= torch.arange(N)[:, None]

    def join(self, layer, i, y, x):
        if not self.gates: return x + y
        a, b, c = (layer[f"gate{i}"](y) + layer[f"gate{i + 1}"](x)).chunk(3, -1)
        return torch.lerp(c.tanh(), x + a, b.sigmoid())

    def forward(self, tokens):
        b, n = tokens.shape
        x = self.embedding(tokens)
        for layer in self.layers:
            qkv = layer["qkv"](layer["norm"](torch.cat([self.front, x], 1)))
            q, k, v = qkv.view(b, -1, 3, self.heads, 32).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q[:, :, -n:], k, v, attn_mask=self.ok)
            x = self.join(layer, 0, layer["out"](y.transpose(1, 2).reshape(b, n, -1)), x)
            y = layer["contract"](F.gelu(layer["expand"](layer["norm2"](x))))
            x = self.join(layer, 2, y, x)
        return self.head(self.norm(x)), None


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
        cases = {"plain decoder, same products": trained(Plain(**SIZE, gates=gates), memory=False)}
        cases |= {k: trained(m) for k, m in pairs(gru_gated_residual=gates).items()}
        out.append(table(f"training step, {ROWS} × {N} tokens, {'with' if gates else 'no'} gates",
                         interleaved(cases), "plain decoder, same products"))
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
