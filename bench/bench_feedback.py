"""Feedback Transformer beside the original package: training, peak memory, generation.

The passes of the parallel solver depend on the weights: it is measured as made, on random tokens,
and after 60 steps of training, on the text that it was trained with. The original's time does not.

The original is measured where it is installed: pip install --no-deps feedback-transformer-pytorch
"""
import torch
import torch.nn.functional as F
from common import interleaved, peak_mb, save, table

from memformers import FeedbackTransformer, carry, generate
from memformers.data import DocumentStream, stdlib

SIZE = dict(num_tokens=256, dim=256, depth=4, heads=8, dim_head=32, mem_len=256, seq_len=1)
KINDS = {"parallel, implicit gradient": dict(tol=1e-2),
         "sequential, implicit gradient": dict(solver="sequential", tol=1e-2),
         "sequential, gradient through the loop": dict(solver="sequential", gradient="unrolled")}
try: from feedback_transformer_pytorch import FeedbackTransformer as Original
except ImportError:
    Original = None
    print("The original is not installed, so it is left out: "
          "pip install --no-deps feedback-transformer-pytorch")


def train(model, tokens):
    """One forward and backward pass."""
    def run():
        model.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    return run


def weights_after(steps: int) -> dict:
    """The weights of a model that has learned from text for some steps."""
    model, memory = FeedbackTransformer(**SIZE, tol=1e-2), None
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _, segment in zip(range(steps), DocumentStream(stdlib(), 2, 128, seed=0)):
        out = model.step(segment.tokens, memory, segment.mask)
        loss = F.cross_entropy(out.logits[segment.loss_mask], segment.labels[segment.loss_mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        memory = carry(out.memory)
    return model.state_dict()


def training(rows: int, learned: dict, n: int = 512):
    tokens = torch.randint(256, (rows, n))
    cases = {name: train(FeedbackTransformer(**SIZE, **options), tokens)
             for name, options in KINDS.items()}
    model = FeedbackTransformer(**SIZE, tol=1e-2)
    model.load_state_dict(learned)
    cases["parallel, after 60 steps"] = train(
        model, next(DocumentStream(stdlib(), rows, n, seed=1)).tokens)
    if Original: cases["original"] = train(Original(**SIZE), tokens)
    ms = interleaved(cases, 3)
    reference = "original" if Original else "parallel, implicit gradient"
    return table(f"Training step, {rows} x {n} tokens, window 1", ms, reference)


@torch.no_grad()
def by_hand(model, prompt, length):
    """The loop that users of the original write: one token, then its memory."""
    memory = None
    for token in prompt.split(1, 1): out, memory = model(token, memory=memory, return_memory=True)
    for _ in range(length):
        token = out[:, -1].argmax(-1, keepdim=True)
        out, memory = model(token, memory=memory, return_memory=True)


def generation(length: int = 128):
    prompt = torch.randint(256, (1, 64))
    ours = FeedbackTransformer(**SIZE).eval()
    cases = {"generate": lambda: generate(ours, prompt, length, temperature=0)}
    if Original:
        original = Original(**SIZE).eval()
        cases["original, loop by hand"] = lambda: by_hand(original, prompt, length)
    ms = {name: t / length for name, t in interleaved(cases, 5).items()}
    return table(f"Generation after 64 tokens, {length} tokens, batch 1", ms, list(cases)[-1],
                 "ms per token")


def memory(rows: int = 4, n: int = 512):
    script = ("import torch\nfrom {module} import FeedbackTransformer\n"
              f"model = FeedbackTransformer(**{{options}})\nx = torch.randint(256, ({rows}, {n}))\n"
              "for _ in range(2): model(x).logsumexp(-1).mean().backward()")
    mb = {name: peak_mb(script.format(module="memformers", options=SIZE | options))
          for name, options in KINDS.items()}
    if Original: mb["original"] = peak_mb(script.format(module="feedback_transformer_pytorch",
                                                        options=SIZE))
    mb["importing torch alone"] = peak_mb("import torch")
    return table(f"Peak memory of training, {rows} x {n} tokens", mb,
                 "original" if Original else "parallel, implicit gradient", "MB")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    learned = weights_after(60)
    save("feedback", [training(1, learned), training(4, learned), generation(), memory()])


if __name__ == "__main__": main()
