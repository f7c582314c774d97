"""What the oracles compute with: functions of one token's vector, written from their definitions."""
import math

import torch


def norm(module, x):
    x = x - x.mean()
    return x / (x.square().mean() + module.eps).sqrt() * module.weight + module.bias


def linear(module, x):
    return module.weight @ x + (0 if module.bias is None else module.bias)


def gelu(x): return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def sigmoid(x): return 1 / (1 + (-x).exp())


def silu(x): return x / (1 + (-x).exp())


def unit(x): return x / x.square().sum().sqrt()


def softmax(scores):
    s = torch.stack(scores)
    w = (s - s.max()).exp()
    return w / w.sum()


def feed(ff, x):
    x = linear(ff.expand, x)
    if ff.glu:
        half = len(x) // 2
        x = x[:half] * gelu(x[half:])
    else: x = gelu(x)
    return linear(ff.contract, x)


def sinusoid(distance, dim):
    angles = [distance / 10000 ** (2 * i / dim) for i in range(dim // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles],
                        dtype=torch.float64)
