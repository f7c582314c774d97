"""Memories of constant size beside a plain decoder and Transformer-XL: training, generation, length."""
import torch
from common import SIZE, Plain, cached_generation, interleaved, save, table, train

from memformers import (GatedDeltaNet, InfiniTransformer, Reader, RecurrentMemoryTransformer,
                        TransformerXL, carry)

ROWS, N, M, R = 4, 256, 256, 16


def models():
    """All of them at the same width, depth and segment."""
    torch.manual_seed(0)
    same = SIZE | dict(seq_len=N)
    return {
        "Transformer-XL, 256 slots": TransformerXL(**same, mem_len=M),
        "recurrent memory, 16 tokens": RecurrentMemoryTransformer(**same, num_memory_tokens=R),
        "Infini-attention": InfiniTransformer(**same),
        "Infini-attention, delta rule": InfiniTransformer(**same, delta="token"),
        "gated delta net": GatedDeltaNet(**same),
    }


def training():
    """A step with a full memory; the plain decoder also with as many tokens as RMT reads in all."""
    tokens, longer = torch.randint(256, (ROWS, N)), torch.randint(256, (ROWS, N + 2 * R))
    plain = Plain(**SIZE)
    cases = {"plain decoder": train(plain, tokens, lambda: plain(tokens)),
             f"plain decoder, {N} + 2 × {R} tokens": train(plain, longer, lambda: plain(longer))}
    for name, model in models().items():
        memory = carry(model.step(tokens).memory)
        cases[name] = train(model, tokens, lambda model=model, memory=memory: written(model, tokens, memory))
    return table(f"training step, {ROWS} × {N} tokens, width 256, 4 layers, full memory",
                 interleaved(cases), "plain decoder")


def written(model, tokens, memory):
    """Logits of a step; what it writes is computed too, and takes part in the gradient."""
    out = model.step(tokens, memory)
    state = next(t for t in out.memory if t.is_floating_point() and t.numel())
    return out.logits + 0 * state.mean()


@torch.no_grad()
def generation(prompt=64, length=128):
    tokens, plain = torch.randint(256, (1, prompt + length)), Plain(**SIZE).eval()
    cases = {"plain decoder with a key/value cache": cached_generation(plain, tokens, prompt)}

    def read(model, memory):
        reader = Reader(model, 1, memory)
        reader.read(tokens[:, :prompt])
        for i in range(prompt, prompt + length): reader.read(tokens[:, i:i + 1])

    for name, model in models().items():
        memory = carry(model.eval().step(torch.randint(256, (1, N))).memory)
        cases[name] = lambda model=model, memory=memory: read(model, memory)
    rate = {name: length / (t / 1e3) for name, t in interleaved(cases, rounds=3).items()}
    return table(f"generation, 1 row, prompt {prompt}, {length} tokens", rate,
                 "plain decoder with a key/value cache", "tokens per second")


@torch.no_grad()
def length(far=100_000):
    """The next segment after one segment, and after 100,000 tokens."""
    tables = {}
    for name, model in models().items():
        model, tokens = model.eval(), torch.randint(256, (1, N))
        near = memory = carry(model.step(tokens).memory)
        for _ in range(far // N): memory = carry(model.step(tokens, memory).memory)
        tables[name] = interleaved({"after 256 tokens": lambda: model.step(tokens, near),
                                    "after 100,000 tokens": lambda: model.step(tokens, memory)})
    rows = {name: {**{k: round(t, 2) for k, t in ms.items()},
                   "ratio": round(ms["after 100,000 tokens"] / ms["after 256 tokens"], 2)}
            for name, ms in tables.items()}
    return {"title": f"ms for the next {N} tokens of 1 row", "reference": "after 256 tokens",
            "rows": rows}


def main(): save("constant_size", [training(), generation(), length()])


if __name__ == "__main__": main()
