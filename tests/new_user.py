"""A new user, played: `python new_user.py FOLDER FILES` trains on a folder of so many files.

Runs in an environment that has the built wheel and nothing of this checkout (test_new_user.py),
in an empty folder. By the command line and from Python: train, evaluate, generate, save, load.
"""
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from memformers import carry, generate, load_memory, save_memory
from memformers.cli import main
from memformers.data import load_corpus
from memformers.evaluate import evaluate
from memformers.train import TrainOptions, train
from memformers.zoo import create, load_model


def say(line):
    "What a command prints; it must do what it is asked for."
    said = StringIO()
    with redirect_stdout(said): code = main(shlex.split(line))
    assert code == 0, f"memformers {line} ended with {code}"
    return said.getvalue()


def write_texts(folder, files):
    folder.mkdir(parents=True)
    for i in range(files):
        (folder / f"{i}.txt").write_text(f"This is text {i}, says text {i}. " * 60)
    return folder


def own_tokenizer(file):
    "A tokenizer.json of 300 tokens, as its own library writes it."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["This is a text, and it says this. " * 9], trainer)
    tokenizer.save(str(file))


def by_command(texts, tokenizer):
    "The commands in the order in which they name each other."
    for name, more in (("bytes", ""), ("tokens", f"--tokenizer {tokenizer}")):
        said = say(f"train transformer_xl_tiny --corpus {texts} --folder {name} --steps 3 "
                   f"--batch-size 2 --save-every 2 --cpu {more}")
        again = said.split("memformers ", 1)[1].strip()   # what `train` says to type next
        assert again.startswith("evaluate ") and "| on |" in say(again + " --cpu")
        assert "| on |" in say(f"evaluate {name} --corpus {texts} --split all --batch-size 2 "
                               "--max-tokens 90 --cpu")
        written = say(f"generate {name} --prompt 'This is' --length 9 --top-k 5 --cpu")
        assert written.startswith("This is") and len(written) > len("This is\n")


def from_python(texts):
    "The same from Python, and a memory that is kept between two programs."
    model = create("memorizing_tiny")
    done = train(model, texts, "python", TrainOptions(steps=3, batch_size=2, cpu=True,
                                                      progress=False))
    done.model.save_pretrained("saved")
    one, again = load_model("python/model"), load_model("saved")
    tokens = one.encode("This is text 3, says text 3.")[None]
    first = one.step(tokens)
    torch.testing.assert_close(first.logits, again.step(tokens).logits)
    memory = carry(first.memory)
    save_memory(memory, "memory.safetensors")
    loaded = load_memory("memory.safetensors", like=again.init_memory(1))
    torch.testing.assert_close(one.step(tokens, memory).logits, again.step(tokens, loaded).logits)
    assert {"on", "off"} <= set(evaluate(again, texts).modes)
    assert len(generate(again, "This is", 5)) >= 5
    parts = [load_corpus(texts, split).num_bytes for split in ("train", "valid", "test", None)]
    assert all(parts) and sum(parts[:3]) == parts[3]


def play(folder, files):
    texts = write_texts(Path(folder) / "texts", files)
    own_tokenizer(texts.parent / "tokenizer.json")
    for name in (texts, texts / "0.txt") if files == 1 else (texts,):   # a folder, or its one file
        by_command(name, texts.parent / "tokenizer.json")
    from_python(texts)


if __name__ == "__main__":
    folder, files = sys.argv[1:]
    play(folder, int(files))
