"""The Memorizing Transformer against loops over rows, tokens, heads and keys, in float64.

The oracle knows nothing of batches, masks, rings or pieces: a row is a list of tokens, a memory is
a list of keys and values, the nearest are found by sorting.
"""
import math

import pytest
import torch

from memformers import MemorizingTransformer, carry, reset

BASE = dict(num_tokens=11, dim=8, depth=3, dim_head=5, heads=2, seq_len=7)

CASES = {
    "default": dict(max_knn_memories=9, num_retrieved_memories=3),
    "smaller_than_a_segment": dict(max_knn_memories=4, num_retrieved_memories=3),
    "sigmoid": dict(max_knn_memories=50, num_retrieved_memories=4, gate="sigmoid"),
    # Equal tokens can have equal keys, of which any may be found, with another age: find them all.
    "network": dict(max_knn_memories=13, num_retrieved_memories=20, gate="network"),
    "whole": dict(max_knn_memories=10, num_retrieved_memories=None, gate="sigmoid",
                  normalize_all=True, knn_position_bias=False),
    "heads": dict(max_knn_memories=9, num_retrieved_memories=2, knn_attn_heads=3,
                  memorizing_layers=[1, 3], output_gate=True, ff_glu=True),
    "kv_heads": dict(max_knn_memories=9, num_retrieved_memories=3, kv_heads=2, gate="sigmoid",
                     normalize_all=True, memorizing_layers=[1, 3]),
    "kv_heads_shared": dict(heads=4, kv_heads=2, max_knn_memories=6, num_retrieved_memories=2,
                            memorizing_layers=[1, 2], xl_memory_layers=[2, 3], xl_max_memories=3,
                            shift_knn_memories_down=1, shift_xl_memories_down=1),
    "kv_heads_whole": dict(kv_heads=2, max_knn_memories=30, num_retrieved_memories=None,
                           clear_memories_on_sos_token_id=2),
    "shift": dict(max_knn_memories=9, num_retrieved_memories=3, memorizing_layers=[1, 2, 3],
                  shift_knn_memories_down=1),
    "xl": dict(max_knn_memories=6, num_retrieved_memories=3, xl_max_memories=9, gate="network",
               memorizing_layers=[2, 3]),
    "xl_shift": dict(max_knn_memories=9, num_retrieved_memories=3, memorizing_layers=[2, 3],
                     xl_memory_layers=[1, 2], xl_max_memories=4, shift_xl_memories_down=1),
    "clear": dict(max_knn_memories=12, num_retrieved_memories=3, clear_memories_on_sos_token_id=2,
                  clear_memories_on_eos_token_id=5, xl_memory_layers=[2], xl_max_memories=3),
}


def make(options):
    torch.manual_seed(1)
    model = MemorizingTransformer(**(BASE | options)).double()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.5)
    return model


def norm(x, w, b):
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def gelu(x): return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def length_one(v): return v / v.square().sum().sqrt()


def bucket(distance):
    if distance < 16: return distance
    return min(31, 16 + int(16 * math.log(distance / 16) / math.log(128 / 16)))


class Row:
    """One text, read token by token."""
    def __init__(self, model, options):
        self.p = dict(model.named_parameters())
        o = dict(memorizing_layers=[1], xl_memory_layers=[1, 2, 3], xl_max_memories=0,
                 shift_knn_memories_down=0, shift_xl_memories_down=0, gate="softmax",
                 clear_memories_on_sos_token_id=None, clear_memories_on_eos_token_id=None,
                 knn_position_bias=True, normalize_all=False, kv_heads=1) | BASE | options
        if not o["xl_max_memories"]: o["xl_memory_layers"] = []
        self.o = o
        self.forget()

    def forget(self):
        self.xl = {n: [] for n in self.o["xl_memory_layers"]}
        self.knn = {n: [] for n in self.o["memorizing_layers"]}

    def source(self, kind, number):
        layers = self.o[f"{'memorizing' if kind == 'knn' else 'xl_memory'}_layers"]
        i = layers.index(number) + self.o[f"shift_{kind}_memories_down"]
        return layers[min(i, len(layers) - 1)]

    def segment(self, tokens):
        """A segment; where a document ends in it, two shorter ones."""
        sos, eos = (self.o[f"clear_memories_on_{x}_token_id"] for x in ("sos", "eos"))
        logits, part = [], []
        for t in tokens:
            if t == sos:
                logits += self.part(part)
                self.forget()
                part = []
            part.append(t)
            if t == eos:
                logits += self.part(part)
                self.forget()
                part = []
        return logits + self.part(part)

    def part(self, tokens):
        if not tokens: return []
        xs = [self.p["embedding.weight"][t] for t in tokens]
        written = {}
        for number in range(1, self.o["depth"] + 1):
            g = lambda name: self.p[f"layers.{number - 1}.{name}"]
            hs = [norm(x, g("norm_attention.weight"), g("norm_attention.bias")) for x in xs]
            # Of each token: for each head of keys and values a pair.
            own = [[kv.chunk(2) for kv in (g("attention.to_kv.weight") @ h).chunk(self.o["kv_heads"])]
                   for h in hs]
            written[number] = own
            front = self.xl[self.source("xl", number)] if number in self.xl else []
            after = []
            for i, (x, h) in enumerate(zip(xs, hs)):
                x = x + self.attention(number, h, front + own[:i + 1], i)
                y = norm(x, g("norm_feed.weight"), g("norm_feed.bias"))
                y = g("feed_forward.expand.weight") @ y + g("feed_forward.expand.bias")
                if self.o.get("ff_glu"):
                    y, gate = y.chunk(2)
                    y = y * gelu(gate)
                else: y = gelu(y)
                after.append(x + g("feed_forward.contract.weight") @ y
                             + g("feed_forward.contract.bias"))
            xs = after
        self.remember(written)
        return [self.p["head.weight"] @ norm(x, self.p["norm.weight"], self.p["norm.bias"])
                for x in xs]

    def attention(self, number, h, window, i):
        g = lambda name: self.p[f"layers.{number - 1}.attention.{name}"]
        memorizing = number in self.o["memorizing_layers"]
        cosine = memorizing or self.o["normalize_all"]
        d, queries = self.o["dim_head"], (g("to_q.weight") @ h).split(self.o["dim_head"])
        outs = []
        for head, q in enumerate(queries):
            if cosine: q = length_one(q) * g("log_scale")[head, 0, 0].exp()
            near, near_v = [], []
            group = head * self.o["kv_heads"] // len(queries)
            for j, (k, v) in enumerate(pairs[group] for pairs in window):
                score = q @ length_one(k) if cosine else q @ k / math.sqrt(d)
                if not memorizing or self.o["knn_position_bias"]:
                    name = "knn_positions" if memorizing else "positions"
                    bias = self.p[f"{name}.bias.weight"][bucket(len(window) - 1 - j), head]
                    score = score + bias * math.sqrt(d)
                near.append(score)
                near_v.append(v)
            store = self.knn[self.source("knn", number)] if memorizing else []
            store = [pairs[group] for pairs in store]
            if not store:
                outs.append(self.mix(near, near_v))
                continue
            scores = [q @ k.detach() for k, _ in store]
            topk = self.o["num_retrieved_memories"] or len(store)
            best = sorted(range(len(store)), key=lambda j: -scores[j].item())[:topk]
            far, far_v = [scores[j] for j in best], [store[j][1] for j in best]
            if self.o["gate"] == "softmax": outs.append(self.mix(far + near, far_v + near_v))
            else:
                gate = g("gate_bias")[head, 0, 0]
                if self.o["gate"] == "network":
                    source = self.source("knn", number)
                    gap = i + 1 + len(self.xl.get(source, []))
                    ages = [math.log(1 + len(store) - 1 - j + gap) for j in best]
                    inputs = torch.tensor([math.log(1 + len(best)), min(ages),
                                           sum(ages) / len(ages)], dtype=torch.float64)
                    hidden = gelu(g("gate_network.0.weight") @ inputs + g("gate_network.0.bias"))
                    gate = gate + (g("gate_network.2.weight") @ hidden)[0]
                gate = 1 / (1 + torch.exp(-gate))
                outs.append(gate * self.mix(far, far_v) + (1 - gate) * self.mix(near, near_v))
        out = g("to_out.weight") @ torch.cat(outs)
        return out * g("output_gate").tanh() if memorizing and self.o.get("output_gate") else out

    def mix(self, scores, values):
        weights = [torch.exp(s - max(float(s.detach()) for s in scores)) for s in scores]
        return sum(w * v for w, v in zip(weights, values)) / sum(weights)

    def remember(self, written):
        for number in range(1, self.o["depth"] + 1):
            leaving = written[number]
            if number in self.xl:
                queue = self.xl[number] + written[number]
                cut = max(0, len(queue) - self.o["xl_max_memories"])
                leaving, self.xl[number] = queue[:cut], queue[cut:]
            if number in self.knn:
                new = [[(length_one(k).detach(), v.detach()) for k, v in pairs] for pairs in leaving]
                self.knn[number] = (self.knn[number] + new)[-self.o["max_knn_memories"]:]


@pytest.mark.parametrize("name", CASES)
def test_outputs_memories_and_gradients(name):
    """Ragged rows with holes, one that pauses, one reset, four segments of odd lengths."""
    options = CASES[name]
    model = make(options)
    gen = torch.Generator().manual_seed(2)
    rows, oracles = 3, [Row(model, options) for _ in range(3)]
    memory, loss, oracle_loss = None, 0, 0
    for s, n in enumerate((7, 5, 7, 3)):
        tokens = torch.randint(11, (rows, n), generator=gen)
        mask = torch.rand(rows, n, generator=gen) < 0.7
        mask[0] = True
        if s == 1: mask[1] = False
        if s == 2:
            memory = reset(memory, torch.tensor([False, False, True]))
            oracles[2].forget()
        out = model.step(tokens, memory, mask)
        memory = carry(out.memory, grad=True)
        weight = torch.randn(rows, n, 11, generator=gen).double()
        loss = loss + (out.logits * weight)[mask].sum()
        for r, oracle in enumerate(oracles):
            logits = oracle.segment(tokens[r][mask[r]].tolist())
            if not logits: continue
            logits = torch.stack(logits)
            torch.testing.assert_close(out.logits[r, mask[r]], logits, rtol=1e-6, atol=1e-6)
            oracle_loss = oracle_loss + (logits * weight[r, mask[r]]).sum()
    for r, oracle in enumerate(oracles): same_memory(model, memory, r, oracle)
    params = list(model.parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    wanted = torch.autograd.grad(oracle_loss, params, allow_unused=True)
    for (key, p), a, b in zip(model.named_parameters(), grads, wanted):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m: f"{key}: {m}")


def same_memory(model, memory, r, oracle):
    heads = oracle.o["kv_heads"]
    for i in range(len(model.memorizing_layers) * heads):
        kv, _ = memory.knn.layer(i).chronological()
        want = oracle.knn[model.memorizing_layers[i // heads]]
        assert memory.knn.fill[r, i] == len(want)
        for j, pairs in enumerate(want):
            torch.testing.assert_close(kv[r, j], torch.stack(pairs[i % heads]))
    for i, number in enumerate(model.xl_memory_layers):
        want = oracle.xl[number]
        assert memory.xl.fill[r] == len(want)
        m = memory.xl.mem.shape[2]
        for j, pairs in enumerate(want):
            whole = torch.cat([t for pair in pairs for t in pair])
            torch.testing.assert_close(memory.xl.mem[r, i, m - len(want) + j], whole)


def test_everything_retrieved_is_attention_over_the_whole_past():
    """With every key found and no positions: one causal attention over the whole text."""
    options = dict(depth=1, memorizing_layers=[1], knn_position_bias=False, max_knn_memories=64,
                   num_retrieved_memories=64)
    model = make(options)
    tokens = torch.randint(11, (2, 28), generator=torch.Generator().manual_seed(0))
    memory, logits = None, []
    for part in tokens.split(7, 1):
        out = model.step(part, memory)
        memory = carry(out.memory)
        logits.append(out.logits)
    layer = model.layers[0]
    x = model.embedding(tokens)
    h = layer.norm_attention(x)
    q = layer.attention.to_q(h).view(2, 28, 2, 5).transpose(1, 2)
    k, v = layer.attention.to_kv(h)[:, None].chunk(2, -1)
    scores = (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).mT
    scores = scores * layer.attention.log_scale.exp()
    future = torch.ones(28, 28).triu(1).bool()
    out = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    x = x + layer.attention.to_out(out.transpose(1, 2).flatten(2))
    x = x + layer.feed_forward(layer.norm_feed(x))
    torch.testing.assert_close(torch.cat(logits, 1), model.head(model.norm(x)))
