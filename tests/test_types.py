"What a type checker sees: methods added by `@patch` are declared, and the README's calls pass mypy."
import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memformers.zoo import MODELS

ROOT = Path(__file__).resolve().parent.parent
# Methods that torch's Module or Python's object declare, and hooks that only the package calls.
KNOWN = {"forward", "__repr__", "__getstate__", "on_reset", "on_select", "on_put", "on_shuffle"}
SCRIPT = '''
from pathlib import Path

import torch

from memformers import (GatedDeltaNet, KNNMemory, MemorizingTransformer, TransformerXL, carry, cast,
                        generate, load_memory, nbytes, reset, save_memory, select)
from memformers.data import Corpus
from memformers.evaluate import evaluate
from memformers.sharded_knn import ShardedKNNMemory
from memformers.train import TrainOptions, train
from memformers.transformer_xl import XLMemory
from memformers.zoo import create, load_model

model = create("gated_delta_small")
train(model, "my_texts", "runs/mine", TrainOptions(steps=1000))
train(model, Path("my_texts"), Path("runs/mine"))
scores = evaluate(model, "my_texts")
print(scores.table())
print(generate(model, "Once upon a time", 200))
model.save_pretrained("my_model")
model = load_model("my_model")

text = torch.randint(256, (2, 96))
xl = TransformerXL(num_tokens=256, dim=32, depth=2, heads=2, seq_len=32, mem_len=64)
memory = xl.init_memory(batch_size=2)
for segment in text.split(32, dim=1):
    out = xl.step(segment, memory)
    memory = carry(out.memory)
memory = select(select(memory, [0, 0]), torch.tensor([0, 1]))
memory = reset(reset(memory, [True, False]), torch.tensor([True, False]))
print(nbytes(memory), nbytes(memory, full=True), out.logits.shape)
save_memory(memory, "memory.safetensors")
memory = cast(load_memory("memory.safetensors", like=memory), dtype=torch.float32, device="cpu")
made = XLMemory(torch.zeros(2, 2, 64, 32), torch.zeros(2, dtype=torch.long))

texts = Corpus("mine", ["a", "b"], [b"one", torch.tensor([1, 2])])
names: tuple[str, ...] = texts.names

memorizing = MemorizingTransformer(num_tokens=256, dim=32, depth=2, heads=2, seq_len=32)
stores = memorizing.create_knn_memories(batch_size=2)
memorizing.clear_memory(text, 0, stores)
with memorizing.knn_memories_context(batch_size=2) as stores: pass

with KNNMemory(dim=16, max_memories=64, num_indices=2) as knn:
    knn.add(torch.randn(2, 8, 2, 16), mask=torch.ones(2, 8, dtype=torch.bool))
    found, mask = knn.search(torch.randn(2, 4, 16), topk=3)
    knn.clear([0])
    knn.save("knn.safetensors")
loaded: KNNMemory = KNNMemory.load("knn.safetensors").clone()

sharded = ShardedKNNMemory(16)
sharded.add(torch.randn(1, 8, 2, 16))
found, mask = sharded.search(torch.randn(1, 4, 16), 3)
'''
# Every model as its page builds it, in the calls that all have in common.
MODELS_SCRIPT = '''
import torch
from torch import Tensor, nn

from memformers import (AssociativeTransformer, AutoregressiveWrapper, BlockRecurrentTransformer,
                        ByteTokenizer, CompressiveTransformer, FeedbackTransformer, GatedDeltaNet,
                        InfiniTransformer, KNNAttention, KNNMemoryList, MemorizingTransformer,
                        MemoryLM, MemoryTransformerXL, NeuralMemoryTransformer, Reader,
                        RecurrentMemoryTransformer, Step, TransformerXL, carry, clone, generate,
                        load_corpus, nbytes, select, stream)

models: list[MemoryLM] = [
    TransformerXL(num_tokens=256, dim=32, depth=2, heads=2, seq_len=32, mem_len=64,
                  memory_layers=[2], positions="t5", attn_dropout=0.1),
    CompressiveTransformer(num_tokens=256, dim=32, depth=2, heads=2, seq_len=32, mem_len=32,
                           cmem_len=8, cmem_ratio=4, gru_gated_residual=False,
                           memory_layers=(1, 2)),
    MemoryTransformerXL(num_tokens=256, dim=32, depth=2, heads=2, seq_len=32, mem_len=32,
                        lmem_len=16, mem_write_iters=2, num_mem_kv=8, gate_bias=2.0),
    FeedbackTransformer(num_tokens=256, dim=32, depth=2, seq_len=2, mem_len=64, dim_head=16, heads=2,
                        attn_dropout=0.1, ff_dropout=0.1, segment_len=32, tol=1e-3),
    MemorizingTransformer(num_tokens=256, dim=32, depth=2, heads=2, dim_head=16, seq_len=32,
                          memorizing_layers=2, max_knn_memories=64, num_retrieved_memories=8,
                          xl_memory_layers=(1,), xl_max_memories=16, tie_embeddings=True),
    RecurrentMemoryTransformer(256, 32, 2, heads=2, seq_len=32, num_memory_tokens=4),
    InfiniTransformer(256, 32, 2, heads=2, seq_len=32, delta="token"),
    GatedDeltaNet(256, 32, 2, heads=2, seq_len=32, negative_eigenvalues=True),
    AssociativeTransformer(256, 32, 2, heads=2, seq_len=32, num_memory_tokens=4, dim_memory=16),
    BlockRecurrentTransformer(256, 32, 2, heads=2, seq_len=32, num_states=8, mem_len=16),
    NeuralMemoryTransformer(256, 32, 2, heads=2, seq_len=32, max_step=0.1),
]
text = torch.randint(256, (2, 96))
for model in models:
    memory = model.init_memory(batch_size=2)
    out: Step = model.step(text[:, :32], memory, mask=torch.ones(2, 32, dtype=torch.bool))
    memory = select(carry(out.memory, grad=True), [1, 0])
    logits: Tensor = model(text)[0]
    segment = model.begin(clone(memory))
    logits, segment = model.extend(segment, text[:, 32:40], None)
    memory, aux = model.finish(segment)
    name, size = str(model.config["model_class"]), nbytes(memory)
    ids: Tensor = model.encode("a text")
    read: str = model.decode(ids)
    model.save_pretrained("saved", model_card_kwargs={})
    again: MemoryLM = type(model).from_pretrained("saved", map_location="cpu")
    assert isinstance(model, nn.Module)

xl = TransformerXL(256, 32, 2, heads=2, seq_len=32, mem_len=64)
logits, memories = xl(text, memories=None)
compressive = CompressiveTransformer(256, 32, seq_len=32, depth=2, heads=2, mem_len=32, cmem_len=8)
logits, memories, aux_loss = compressive(text[:, :32], mask=text[:, :32] > 0, memories=None)
print(memories.mem, memories.cmem)
feedback = FeedbackTransformer(256, 32, 2, seq_len=2, mem_len=64)
logits = feedback(text)
logits, memory = feedback(text, memory=None, return_memory=True)

memorizing = MemorizingTransformer(256, 32, 2, heads=2, seq_len=32, memorizing_layers=[2])
stores: KNNMemoryList = memorizing.create_knn_memories(batch_size=2)
logits, xl_memories = memorizing(text, knn_memories=stores, xl_memories=None, add_knn_memory=False)
loss = memorizing(text, knn_memories=stores, labels=text)

wrapper = AutoregressiveWrapper(xl)
for loss, aux in wrapper(text, return_loss=True): (loss + aux).backward()
said = wrapper.generate(text[:, :8], 20, temperature=0.8)

more: Tensor = torch.as_tensor(generate(xl, text[:, :50], 20, temperature=0.8, top_k=5, top_p=0.9,
                                        min_p=0.01, stop_token=[0, 10], pad=0, memory=None,
                                        generator=torch.Generator().manual_seed(0)))
for token in stream(xl, text, 20, mask=text > 0, temperature=0): print(token.tolist())
corpus = load_corpus("stdlib", "valid", valid=0.1).cut(1000).take(5)
print(corpus["os.py"], corpus[0], len(corpus), corpus.manifest()["sha256"], corpus.num_bytes)
tokenizer = ByteTokenizer()
print(tokenizer.decode(tokenizer.encode("text")))
'''
# Training, evaluation, probes, tasks, comparisons, pretrained models and figures.
TOOLS_SCRIPT = '''
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from memformers.compare import (Results, Run, differences, estimate, load_results, missing,
                                score_figure, sized, suite, table, trained)
from memformers.data import Corpus, DocumentStream, load_corpus, text_files, token_ids
from memformers.evaluate import Evaluation, evaluate, token_bits, token_bits_by_mode
from memformers.model import MemoryLM
from memformers.plots import figure, look, plot_loss, save_figure
from memformers.pretrained import add_memory
from memformers.probe import cost, lookup, recall
from memformers.tasks import RecallTask, TaskStream, copy_task, passkey_task
from memformers.train import (Trainer, TrainOptions, latest_checkpoint, learn, read_metrics, train)
from memformers.transformer_xl import TransformerXL
from memformers.zoo import MODELS, PRESETS, budget, create, load_model, models

corpus = Corpus("mine", names=("a", "b"), documents=[b"one text", np.array([1, 2, 3])])
options = TrainOptions(steps=5, batch_size=2, segments=2, curriculum=None, accumulate=1, lr=1e-3,
                       min_lr=0, warmup=2, betas=(0.9, 0.95), weight_decay=0.1, clip=None,
                       aux_weight=1, mixed_precision="bf16", seed=1, save_every=2, keep=1,
                       log_every=1, tensorboard=False, cpu=True, progress=False)
model: MemoryLM = create("transformer_xl_tiny", mem_len=32, tokenizer=None)
task: RecallTask = copy_task(20)
done: Trainer = train(model, task, "runs/task", replace(options, steps=6), resume=False)
train(model, [task, passkey_task(40)], "runs/tasks", options)
train(model, np.arange(100) % 7, "runs/ids", options)
print(done.step, done.interrupted, latest_checkpoint("runs/task"), read_metrics("runs/task")[-1])
trainer = Trainer(model, lambda rows: DocumentStream(corpus, 2, 64, rows=rows), "runs/mine", options)
trainer.run()
losses: list[float] = learn(model, TaskStream(task, 4, 16), steps=3, lr=1e-3, segments=2)

corpus = text_files(["my_texts", "more/*.txt"], split=None)
corpus = token_ids([[1, 2, 3], [4, 5]], num_tokens=50)
corpus = load_corpus(torch.arange(100), None)
scores: Evaluation = evaluate(model, corpus, ("on", "off", "foreign"), batch_size=4, seq_len=32,
                              max_tokens=500, edges=[0, 64, 128], seed=1, progress=True, mem_len=16)
print(scores.bits("on"), scores.difference("off").low, scores.table(), scores.modes)
scores.to_json("scores.json")
scores = Evaluation.from_json("scores.json")
bits: np.ndarray = token_bits(model, corpus[0], memory=None, carry_memory=False, seq_len=16)
print(token_bits_by_mode(model, corpus[0], modes=("on", "off")).saved("off").mean())

found = recall(model, task, [8, 16], 32, memory=False)
print(found.accuracy.mean(), found.interval(), found.chance)
print(cost(model, [0, 256]))
memorizing = create("memorizing_tiny")
print(lookup(memorizing, corpus[0], 70))

loaded: MemoryLM = load_model("runs/task/model", map_location="cpu")
size: dict = budget(loaded)
print(models(), [preset.what for preset in PRESETS.values()], [*MODELS])

inner: nn.Module = nn.Linear(2, 2)
with_store = add_memory(inner, knn=dict(layers=[2], max_memories=64, topk=8), segment=128)
with_matrix = add_memory(inner, infini=dict(layers=[1, 2], delta=True))
with_tokens = add_memory(inner, recurrent=dict(num_memory_tokens=16))
with_tokens.generate(torch.zeros(1, 8, dtype=torch.long))

runs: list[Run] = suite("toy")
net, curve, failed = trained(runs[0], lr=1e-3)
results: Results = load_results("evidence/cpu")
print(table(results, "recall"), differences(results, "recall", "4 pairs, 48", "No memory"))
print(f"{estimate(results, 'recall', 'Compressive, 8 KiB', '4 pairs, 48', minus='No memory'):.2f}",
      missing("cpu", "evidence/cpu"), sized(TransformerXL, dict(num_tokens=32, dim=64), 130_000))
score_figure(results, "recall", ["4 pairs, 48"], chance=1 / 16, title="Recall")
fig, axes = figure(title="Loss")
axes.plot(losses, **look("xl"))
save_figure(plot_loss([1, 2], [3.0, 2.5], unit="tokens"), "loss.svg")
'''
WRONGS = [(SCRIPT, "knn.adds(1)\nknn.add('text')\nselect(memory, 'text')\nCorpus('mine', 'a', b'text', [1])\n"),
          (MODELS_SCRIPT, "TransformerXL(256, 32, 2, head=2)\nmodel.step('text')\n"
                          "corpus.take('two')\nInfiniTransformer(256, dim='wide', depth=2)\n"),
          (TOOLS_SCRIPT, "TrainOptions(step=1)\nTrainOptions(lr='fast')\nevaluate('model', corpus)\n"
                         "add_memory(inner, knn=64)\n")]


def is_patch(function):
    return isinstance(function, ast.FunctionDef) and any(
        ast.unparse(decorator).startswith("patch") for decorator in function.decorator_list)


def arguments(function):
    "Names, types and defaults, without the class of the first argument."
    said = ast.unparse(function.args)
    return said.replace(f": {ast.unparse(owner)}", "", 1) if (
        owner := function.args.args[0].annotation) else said


@pytest.mark.parametrize("path", sorted((ROOT / "memformers").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_what_patch_adds_is_declared_as_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    declared = {}
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for block in (node for node in owner.body if isinstance(node, ast.If)):
            if ast.unparse(block.test) != "TYPE_CHECKING": continue
            declared |= {(owner.name, node.name): arguments(node) for node in block.body
                         if node.name != "__init__"}
    added = {}
    for function in filter(is_patch, tree.body):
        module = importlib.import_module(f"memformers.{path.stem}")
        owner, name = ast.unparse(function.args.args[0].annotation), function.name
        hidden = name.startswith("_") and not name.startswith("__")
        if owner.startswith("_") or hidden or name in KNOWN: continue
        if any(hasattr(base, name) for base in getattr(module, owner).__mro__[1:-1]): continue
        added[owner, name] = arguments(function)
    assert declared == added


@pytest.fixture(scope="module")
def cache(tmp_path_factory): return tmp_path_factory.mktemp("mypy")  # what it knows of torch


def mypy(script, folder, cache):
    (folder / "user.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file=",
         f"--cache-dir={cache}", "user.py"],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT)})
    return done.stdout + done.stderr


def test_every_model_is_in_the_scripts():
    built = {node.func.id for node in ast.walk(ast.parse(MODELS_SCRIPT))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert MODELS.keys() <= built


@pytest.mark.parametrize("script, wrong", WRONGS, ids=["readme", "models", "tools"])
def test_a_users_script_passes_mypy(script, wrong, tmp_path, cache):
    """It has no error, and each line of `wrong` has one: what is checked is not taken for Any."""
    pytest.importorskip("mypy")
    said = mypy(script + wrong, tmp_path, cache)
    first = len(script.splitlines()) + 1
    errors = [line for line in said.splitlines() if ": error: " in line]
    assert {int(line.split(":")[1]) for line in errors} == set(range(first, first + 4)), said
    assert (ROOT / "memformers" / "py.typed").is_file()
