"What a type checker sees: methods added by `@patch` are declared, and the README's calls pass mypy."
import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
WRONG = "knn.adds(1)\nknn.add('text')\nselect(memory, 'text')\nCorpus('mine', 'a', b'text', [1])\n"


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


def mypy(script, folder):
    (folder / "user.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file=",
         f"--cache-dir={folder / 'cache'}", "user.py"],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(ROOT)})
    return done.stdout + done.stderr


def test_a_users_script_passes_mypy(tmp_path):
    pytest.importorskip("mypy")
    said = mypy(SCRIPT + WRONG, tmp_path)
    first = len(SCRIPT.splitlines()) + 1
    errors = [line for line in said.splitlines() if ": error: " in line]
    assert {int(line.split(":")[1]) for line in errors} == set(range(first, first + 4)), said
    assert (ROOT / "memformers" / "py.typed").is_file()
