"""The command line: a whole run, the demo in small, and errors of one line."""
import ast
import errno
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import memformers
from memformers import cli, zoo
from memformers.cli import COMMANDS, _parse, main
from memformers.data import Corpus
from memformers.evaluate import evaluate
from memformers.zoo import PRESETS, budget, create, load_model, models


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, word in enumerate(("alpha", "beta", "gamma", "delta")):
        (folder / f"{word}.txt").write_text(f"{word} is letter number {i}. " * 40)
    return folder


def words(text, **paths): return [w.format(**paths) for w in text.split()]


def test_a_run_from_training_to_text(texts, tmp_path, capsys):
    run = tmp_path / "run"
    train = "train transformer_xl_tiny --corpus {texts} --folder {run} --steps {steps} " \
            "--batch-size 4 --cpu --options mem_len=32 --save_every 5"
    assert main(words(train, texts=texts, run=run, steps=6)) == 0
    assert {"options.json", "metrics.jsonl", "command.txt", "model", "checkpoints"} <= \
        {p.name for p in run.iterdir()}
    record = json.loads((run / "options.json").read_text())
    assert record["model"]["mem_len"] == 32 and record["corpus"]["documents"] == 4
    assert {"torch", "python", "memformers"} <= record["versions"].keys()
    assert main(words(train, texts=texts, run=run, steps=9)) == 0      # goes on
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 9
    capsys.readouterr()

    one_file = words("evaluate {run} --corpus {texts}/alpha.txt --cpu", run=run, texts=texts)
    assert main(one_file) == 0                         # nobody else's memory to read with
    said = capsys.readouterr().out
    assert "| shuffled |" in said and "| foreign |" not in said
    assert main(one_file + ["--modes", "on foreign"]) == 1
    assert "foreign" in capsys.readouterr().err
    assert main(one_file + ["--modes", "on off"]) == 0
    assert "| off |" in capsys.readouterr().out
    assert main(words("evaluate {run} --corpus {texts} --cpu", run=run, texts=texts)) == 0
    assert "4 documents" in capsys.readouterr().out    # as `train` has recommended
    card = (run / "model/README.md").read_text()
    assert "| on |" in card and "| documents | 4 |" in card
    assert (run / "evaluation" / "evaluation.json").is_file()

    generate = words("generate {run} --prompt alpha --length 20 --seed 3 --cpu", run=run)
    assert main(generate) == 0
    once = capsys.readouterr().out
    assert main(generate) == 0
    assert capsys.readouterr().out == once and once.startswith("alpha")


@pytest.mark.parametrize("files", [1, 10, 26])
def test_any_folder_trains_and_evaluates(files, tmp_path, capsys):
    texts, run = tmp_path / "texts", tmp_path / "run"
    texts.mkdir()
    for i in range(files): (texts / f"{i}.txt").write_text(f"file {i} says {i}. " * 60)
    assert main(words("train transformer_xl_tiny --corpus {t} --folder {r} --steps 2 --cpu "
                      "--batch-size 2 --valid-share 0.2 --cut 300", t=texts, r=run)) == 0
    said = capsys.readouterr().out
    assert f"--corpus {texts} --valid-share 0.2" in said
    sizes = {}
    for split in ("valid", "test", "all"):
        assert main(words("evaluate {r} --corpus {t} --cpu --valid-share 0.2 --split {s} --cut 60",
                          t=texts, r=run, s=split)) == 0
        said = capsys.readouterr().out
        assert "| on |" in said and ("| foreign |" in said or split == "test")
        sizes[split] = int(said.split(" predictions")[0].split()[-1].replace(",", ""))
    assert sizes["all"] > 3 * sizes["valid"]


def test_files_of_ids_train_and_evaluate(tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.arange(3000, dtype=np.uint16) * 7 % 1000)
    train = "train transformer_xl_tiny --corpus {t} --folder {r} --steps 2 --batch-size 2 --cpu " \
            "--cut 500"
    paths = dict(t=tmp_path / "ids.npy", r=tmp_path / "run")
    assert main(words(train, **paths)) == 1
    assert "num_tokens=1000" in capsys.readouterr().err
    assert main(words(train + " --options num_tokens=1000", **paths)) == 0
    assert main(words("evaluate {r} --corpus {t} --cpu", **paths)) == 0
    assert "bits per token" in capsys.readouterr().out


DEMO = "demo --folder {folder} --model {model} --steps {steps} --episodes 3 --documents 4 " \
       "--max-tokens 300 --cpu"


@pytest.mark.parametrize("model", ["transformer_xl_tiny", "memorizing_tiny"])
def test_the_demo_in_small(model, tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(words(DEMO, folder=folder, model=model, steps=3)) == 0
    said = capsys.readouterr().out
    for name in ("loss.png", "sample.txt", "metrics.jsonl", "recall/recall.md", "recall/recall.png",
                 "evaluation/evaluation.json", "evaluation/evaluation.md",
                 "evaluation/bits_by_position.png"):
        assert (folder / name).stat().st_size > 0 and name in said
    for place in (folder, folder / "without"): assert (place / "model" / "config.json").is_file()
    headline, diagnosis = said.split("Diagnosis")
    assert "by the same model trained without (guessing: 10%)" in headline
    assert "against the same model trained without\n(95 % interval" in headline
    assert "| with memory | trained without |" in headline and "| off |" not in headline
    assert "| on |" in diagnosis and "| off |" in diagnosis and "| foreign |" in diagnosis
    assert ("| knn.off |" in said) == (model == "memorizing_tiny")
    with_memory, without = (torch.cat([p.flatten() for p in load_model(f).parameters()])
                            for f in (folder / "model", folder / "without" / "model"))
    assert not torch.equal(with_memory, without)


def test_the_demo_goes_on_where_it_stopped(tmp_path, capsys):
    folder = tmp_path / "demo"
    for steps in (2, 4):
        assert main(words(DEMO, folder=folder, model="transformer_xl_tiny", steps=steps)) == 0
        for place in (folder, folder / "without"):
            lines = (place / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1])["step"] == steps and len(lines) == steps // 2
    assert "Two models of" in capsys.readouterr().out


def test_the_second_process_of_the_demo_stops_with_the_first(tmp_path):
    """Killed, the first one can tell nobody; what the other has learned is saved all the same."""
    line = words(DEMO, folder=tmp_path / "demo", model="transformer_xl_tiny", steps=10**6)
    first = subprocess.Popen([sys.executable, "-m", "memformers", *line],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def until(there, seconds=240):
        end = time.time() + seconds
        while not there() and time.time() < end: time.sleep(.1)
        assert there()
    without = tmp_path / "demo" / "without"
    lock = without / "run.lock.json"
    try:
        until(lambda: (without / "metrics.jsonl").exists()
              and (without / "metrics.jsonl").stat().st_size > 0)
        second = json.loads(lock.read_text())["process"]
    finally:
        first.kill()
        first.wait()
    try:
        until(lambda: list(without.glob("checkpoints/step_*")))
        until(lambda: not lock.exists())
    finally:
        with suppress(ProcessLookupError): os.kill(second, signal.SIGKILL)


def test_what_the_second_process_cannot_do_is_said(tmp_path, capfd):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "without").touch()  # a file where its folder should be
    assert main(words(DEMO, folder=tmp_path / "demo", model="transformer_xl_tiny", steps=1)) == 1
    said = capfd.readouterr().err
    assert "memformers demo: without memory: " in said
    assert "memformers demo: the model without memory was not trained" in said


def lessons(rows=slice(0, 9), memory=True):
    corpus = Corpus("c", [f"{i}" for i in range(9)], [f"number {i}, a text ".encode() * 40
                                                      for i in range(9)])
    return cli._Lessons(cli._hidden_keys(corpus, 8, (2, 4), lessons=True), corpus, 9, 8, 0, rows,
                        memory)


def test_lessons_are_keys_and_plain_text_side_by_side():
    read, kinds = [next(stream) for stream in [lessons()] * 120], []
    for segment in read:
        asked, plain = segment.loss_mask[:6], segment.loss_mask[6:]
        assert not (asked.any() and plain.any())
        if plain.any(): assert torch.equal(plain, segment.mask[6:])
        else: assert not torch.equal(asked, segment.mask[:6])
        kinds.append(bool(plain.any()))
    assert 40 < sum(kinds) < 80 and sum(segment.loss_mask[:6].sum() for segment in read) > 40


def test_lessons_without_memory_begin_in_each_segment():
    for one, other, _ in zip(lessons(), lessons(memory=False), range(20)):
        assert other.start.all() and torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.loss_mask, other.loss_mask)
    assert not one.start.all()


def test_lessons_go_on_bit_for_bit_and_are_split_over_processes():
    whole, parts = lessons(), [lessons(slice(0, 3)), lessons(slice(3, 9))]
    for _ in range(17):
        segment, *own = map(next, (whole, *parts))
        for field in ("tokens", "loss_mask"):
            assert torch.equal(getattr(segment, field),
                               torch.cat([getattr(part, field) for part in own]))
    again = lessons()
    again.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(9):
        one, other = next(again), next(whole)
        assert torch.equal(one.labels, other.labels) and torch.equal(one.loss_mask, other.loss_mask)
    with pytest.raises(ValueError, match="memory=True"):
        lessons(memory=False).load_state_dict(whole.state_dict())


def test_the_headline_is_the_difference_to_the_model_trained_without():
    """Paired by document: documents differ by more than the models do."""
    corpus = Corpus("c", [f"{i}" for i in range(20)], [bytes([i, 200 - i] * (10 + i))
                                                       for i in range(20)])
    torch.manual_seed(0)
    one, other = create("transformer_xl_tiny"), create("transformer_xl_tiny")
    first, second = (evaluate(model, corpus, ("on", "off")) for model in (one, other))
    gain = cli._difference(first, second)
    assert gain.value == pytest.approx(second.bits("off") - first.bits("on"))
    assert gain.low < gain.value < gain.high
    assert cli._difference(first, first) == first.difference("off")


@pytest.mark.parametrize("line, message", [
    ("train transformer_xxl", "no model is called"),
    ("train transformer_xl_tiny --corpus /nowhere/at/all", "/nowhere/at/all"),
    ("train transformer_xl_tiny --options mem_len", "name=value"),
    ("train transformer_xl_tiny --options positions=alibi", "'xl', 't5'"),
    ("train transformer_xl_tiny --options mem_len=big", "mem_len takes int"),
    ("train transformer_xl_tiny --options mem_len=1.5", "mem_len takes int"),
    ("train transformer_xl_tiny --options memlen=5", "no 'memlen'; it has num_tokens"),
    ("train transformer_xl_tiny --options ='", "options: No closing quotation"),
    ("train transformer_xl_tiny --cut 1", "cut: expected"),
    ("train transformer_xl_tiny --cut -5", "cut: expected"),
    ("train transformer_xl_tiny --steps 0", "steps"),
    ("train transformer_xl_tiny --seed -1", "seed"),
    ("train transformer_xl_tiny --seed 99999999999999999999", "seed: expected less than"),
    ("train transformer_xl_tiny --segments -1", "from 1, or 0; got -1"),
    ("train transformer_xl_tiny --clip -1", "above 0, or 0; got -1"),
    ("train transformer_xl_tiny --mixed-precision int8", "'no', 'bf16', 'fp16'; got 'int8'"),
    ("train transformer_xl_tiny --folder file", "memformers train: folder: expected a folder, but "
     "file is a file"),
    ("train transformer_xl_tiny --folder file/run", "folder: expected a folder, but file is a file"),
    ("train transformer_xl_tiny --corpus empty", "no file in 'empty'"),
    ("train transformer_xl_tiny --corpus text --tokenizer text", "tokenizer: text holds none"),
    ("train transformer_xl_tiny --corpus text --tokenizer empty", "tokenizer.json' is no file"),
    ("train empty", "no config.json in empty"),
    ("evaluate /nowhere/at/all", "neither a folder"),
    ("evaluate . --modes on,off", "modes: expected some of"),
    ("evaluate . --documents -1", "documents: expected"),
    ("evaluate . --max-tokens -1", "max_tokens: expected"),
    ("evaluate . --max-tokens 1", "max_tokens: expected 0 or at least 2"),
    ("evaluate . --out file", "out: expected a folder, but file is a file"),
    ("evaluate . --batch-size 0", "batch_size: expected"),
    ("generate /nowhere/at/all", "neither a folder"),
    ("generate . --temperature -1", "temperature: expected"),
    ("generate . --temperature nan", "temperature: expected"),
    ("generate . --length -3", "length: expected"),
    ("generate . --top-k -3", "top_k: expected"),
    ("generate . --top-p 1.5", "top_p: expected"),
    ("generate . --min-p -1", "min_p: expected"),
    ("generate . --seed -1", "seed: expected"),
    ("generate . --seed 99999999999999999999", "seed: expected less than"),
    ("generate . --stop ab", "stop: expected"),
    ("generate . --prompt=", "prompt: expected"),
    ("generate . --prompt @/dev/zero", "prompt: '/dev/zero' is not a file"),
    ("generate . --prompt @nowhere", "prompt: 'nowhere' is not a file"),
    ("data novels", "name: expected one of golang, "),
    ("demo --steps 0", "steps"),
    ("demo --documents -1", "documents: expected"),
    ("demo --max-tokens 1", "max_tokens: expected 0 or at least 2"),
    ("demo --folder file", "folder: expected a folder, but file is a file"),
    ("compare large", "suite: expected one of cpu, gpu, toy"),
    ("compare toy --jobs 0", "jobs: expected"),
    ("compare toy --only nothing", "only: no run has"),
    ("compare toy --folder file", "folder: expected a folder, but file is a file"),
    ("compare toy --folder file --dry-run", "folder: expected a folder, but file is a file"),
    ("demo --model nothing", "no model is called"),
])
def test_errors_are_one_line(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "text").write_text("no tokenizer, but a text")
    (tmp_path / "empty").mkdir()
    assert main(line.split()) == 1
    said, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not said, "nothing is printed before it is refused"


def test_a_run_is_not_taken_for_a_model(texts, tmp_path, capsys):
    """What `train` is told to begin from; both ways that it names lead on."""
    run = tmp_path / "run"
    began = words("train transformer_xl_tiny --corpus {t} --folder {r} --steps 1 --batch-size 2 "
                  "--cpu", t=texts, r=run)
    assert main(began) == 0
    (run / "command.txt").write_text(shlex.join(["memformers", *began]))
    capsys.readouterr()
    assert main(words("train {r} --corpus {t} --cpu", t=texts, r=run)) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"model: {run} is the folder of a run" in said
    again, saved = re.search("again: memformers (.*); to begin .* train (.*)", said).groups()
    assert main(shlex.split(again)) == 0
    assert main(words("train {m} --corpus {t} --folder {o} --steps 1 --batch-size 2 --cpu", m=saved,
                      t=texts, o=tmp_path / "other")) == 0


def test_the_command_that_began_a_run_is_one_that_worked(texts, tmp_path, monkeypatch):
    run = tmp_path / "run"
    def train(tokens, steps):
        line = words("train transformer_xl_tiny --corpus {t} --folder {r} --steps {s} --batch-size 2 "
                     "--cpu --options num_tokens={n}", t=texts, r=run, s=steps, n=tokens)
        monkeypatch.setattr(sys, "argv", ["memformers", *line])
        return main(line)
    assert train(9, 1) == 1 and train(256, 1) == 0 and train(256, 2) == 0
    assert "num_tokens=256" in (said := (run / "command.txt").read_text()) and "--steps 1" in said


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_a_run_that_has_learned_nothing_yet_is_told(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/options.json").write_text("{}")
    assert main([command, "run"]) == 1
    said = capsys.readouterr().err
    assert "run is the folder of a run. To go on with it, type the command that began it" in said \
        if command == "train" else "folder: run is a run that has no checkpoint yet" in said


@pytest.mark.parametrize("text", ["ab", "abc", "a text that is short"])
def test_what_is_recommended_works_for_the_shortest_text(text, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(text)
    assert main(words("train transformer_xl_tiny --corpus {t} --folder {r} --steps 1 --batch-size 2 "
                      "--cpu", t=tmp_path / "text.txt", r=tmp_path / "run")) == 0
    said, errors = capsys.readouterr()
    assert "too little text to hold any of" in errors and "--split all" in errors
    assert "1 documents for 2 rows" in errors and "; --cut makes more of them" in errors
    again = said.split("memformers ", 1)[1].strip()
    assert again.endswith("--split all") and main([*shlex.split(again), "--cpu"]) == 0
    said = capsys.readouterr().out
    assert "| on |" in said and "no other document; --cut makes several" in said
    assert "--cut makes several" in (tmp_path / "run/evaluation/evaluation.md").read_text()


def test_what_the_package_says_names_options(texts, tmp_path, capsys):
    """Each text that is put into the words of the shell stands in the package as it is written."""
    parts = "\n".join(
        "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        if isinstance(node, ast.JoinedStr) else str(node.value)
        for path in Path(cli.__file__).parent.glob("*.py") if path.stem != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.JoinedStr, ast.Constant)))
    rules = "whole number from 1, or None; got", "'no', 'bf16', 'fp16' or None"
    lost = [said for said in cli._AS_TYPED if said not in parts + "\n".join(rules)]
    assert not lost
    assert main(words("train transformer_xl_tiny --corpus {t} --folder {r} --cpu --options "
                      "num_tokens=9", t=texts, r=tmp_path / "run")) == 1
    assert "corpus has tokens" in (said := capsys.readouterr().err)
    assert "make it with --options num_tokens=256" in said
    create("transformer_xl_tiny").save_pretrained(tmp_path / "model")
    assert main(words("evaluate {m} --corpus {t}/beta.txt --modes", t=texts, m=tmp_path / "model")
                + ["on foreign"]) == 1
    assert "Cut it with --cut, or leave it out" in capsys.readouterr().err


def test_a_gradient_of_any_length(texts, tmp_path):
    assert main(words("train transformer_xl_tiny --corpus {t} --folder {r} --steps 1 --batch-size 2 "
                      "--clip 0 --cpu", t=texts, r=tmp_path / "run")) == 0
    record = json.loads((tmp_path / "run/options.json").read_text())
    assert record["options"]["clip"] is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A saved model with fresh weights."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    create("transformer_xl_tiny").save_pretrained(folder)
    return folder


def text_of(capsys, folder, more):
    assert main(words("generate {f} --length 30 --prompt ab --cpu " + more, f=folder)) == 0
    return capsys.readouterr().out


def test_generation_follows_its_seed_and_its_filters(tiny, capsys):
    one, same, other = (text_of(capsys, tiny, f"--seed {seed}") for seed in (1, 1, 2))
    assert one == same != other
    likeliest = text_of(capsys, tiny, "--temperature 0")
    assert likeliest == text_of(capsys, tiny, "--top-k 1") == text_of(capsys, tiny, "--min-p 1") \
        == text_of(capsys, tiny, "--top-p 0") != one
    assert text_of(capsys, tiny, "--seed 1 --top-k 5") != one
    assert text_of(capsys, tiny, "--seed 1 --temperature 0.1") != one


def test_training_follows_its_seed(texts, tmp_path):
    train = "train transformer_xl_tiny --corpus {texts} --folder {run} --steps 1 --batch-size 2 " \
            "--seed {seed} --cpu"
    def weights(run, seed):
        assert main(words(train, texts=texts, run=tmp_path / run, seed=seed)) == 0
        return torch.cat([p.flatten() for p in load_model(tmp_path / run / "model").parameters()])
    one, same, other = weights("a", 5), weights("b", 5), weights("c", 6)
    assert torch.equal(one, same) and (one - other).abs().max() > .01


@pytest.mark.parametrize("error, message", [
    (OSError(errno.ENOSPC, "No space left on device"), "Free some space"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "Free some space"),
    (PermissionError(errno.EACCES, "Permission denied", "runs/model"), "runs/model"),
    (MemoryError(), "MemoryError"), (torch.OutOfMemoryError("CUDA out of memory"), "CUDA"),
], ids=["disk", "safetensors", "permission", "memory", "accelerator"])
def test_what_the_machine_refuses_is_one_line(error, message, texts, tmp_path, capsys, monkeypatch):
    def fail(*_): raise error
    monkeypatch.setattr(cli, "train_model", fail)
    train = words("train transformer_xl_tiny --corpus {t} --folder {f} --cpu", t=texts, f=tmp_path)
    assert main(train) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("memformers train: ")
    monkeypatch.setenv("MEMFORMERS_DEBUG", "1")
    with pytest.raises(type(error)): main(train)


def test_a_fault_of_the_package_keeps_its_traceback(monkeypatch):
    def fail(): raise KeyError("a fault")
    monkeypatch.setattr(cli, "models_table", fail)
    with pytest.raises(KeyError): main(["models"])


def test_warnings_are_one_line(texts, tmp_path, capsys):
    (texts / "empty.txt").touch()
    assert main(words("train transformer_xl_tiny --corpus {t} --folder {f} --steps 1 --cpu "
                      "--batch-size 9", t=texts, f=tmp_path / "run")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line.lower()]
    assert len(lines) >= 2 and all(line.startswith("memformers train: warning: ") for line in lines)
    assert any("empty.txt" in line for line in lines)
    assert any("documents for 9 rows" in line for line in lines)


def test_prompts_come_from_files_and_from_the_standard_input(tiny, tmp_path, capsysbinary,
                                                             monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9 \xc3\xa9")
    for prompt in (f"@{tmp_path / 'prompt.txt'}", "@-"):
        monkeypatch.setattr("sys.stdin", open(tmp_path / "prompt.txt"))
        assert main(words("generate {f} --prompt {p} --length 0 --cpu", f=tiny, p=prompt)) == 0
        assert capsysbinary.readouterr().out.decode() == "caf\ufffd é\n"


def test_prompts_without_an_end_are_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="is not a file; @- reads"): cli._read_prompt(f"@{path}")
    monkeypatch.setattr(cli, "_LONGEST_PROMPT", 8)
    (tmp_path / "long").write_text("123456789")
    with pytest.raises(ValueError, match="at most 8 bytes"): cli._read_prompt(f"@{tmp_path}/long")
    monkeypatch.setattr("sys.stdin", open("/dev/zero"))
    with pytest.raises(ValueError, match="at most 8 bytes"): cli._read_prompt("@-")


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.Popen([sys.executable, "-m", "memformers", "models"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    assert (done.wait(), done.stderr.read()) == (141, "")


@pytest.mark.parametrize("answer, message", [
    (ConnectionError("no network"), "could not be asked.*no network"),
    (False, "has no such model")], ids=["unreachable", "unknown"])
def test_a_missing_hub_model_is_told_at_once(answer, message, monkeypatch):
    """The client repeats its request for half a minute, which is in vain without a network."""
    asked = []
    def file_exists(*args):
        asked.append(args)
        if isinstance(answer, Exception): raise answer
        return answer
    def look_up(*args, local_files_only=False):
        assert local_files_only
        raise FileNotFoundError("nothing is cached")
    monkeypatch.setattr(zoo, "file_exists", file_exists)
    monkeypatch.setattr(zoo, "hf_hub_download", look_up)
    with pytest.raises(FileNotFoundError, match=f"nobody/nothing is not a folder.*{message}"):
        load_model("nobody/nothing")
    assert asked == [("nobody/nothing", "config.json")]


def test_help(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as done: main([name, "--help"])
        assert done.value.code == 0
        text = capsys.readouterr().out
        options = [line for line in text.splitlines() if line.startswith("  --")]
        assert all(len(line.split(maxsplit=2)) > 2 or line.strip().startswith("--")
                   for line in options)
    assert main(["nothing"]) == 2


def options_of(command):
    "Every option of a command with a value that is not its default."
    values = {int: 7, float: 0.25, str: "two words"}
    return {name: True if p.annotation is bool else values[p.annotation]
            for name, p in inspect.signature(command).parameters.items()
            if p.default is not p.empty and p.annotation != list[str]}


@pytest.mark.parametrize("spell", [lambda name: "--" + name.replace("_", "-"),
                                   lambda name: "--" + name], ids=["dashes", "underscores"])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_option_is_known_in_both_spellings(command, spell):
    """Not through a parser of others, whose newer version may know one spelling only."""
    required = [name for name, p in inspect.signature(command).parameters.items()
                if p.default is p.empty]
    wanted = options_of(command)
    lists = {name: p.default for name, p in inspect.signature(command).parameters.items()
             if p.annotation == list[str]}
    apart = [word for name, value in wanted.items()
             for word in ([spell(name)] if value is True else [spell(name), str(value)])]
    joined = [spell(name) if value is True else f"{spell(name)}={value}"
              for name, value in wanted.items()]
    for words in (apart, joined):
        found = _parse(command, required + words)
        assert found == {name: name for name in required} | lists | wanted
        assert all(type(found[name]) is type(value) for name, value in wanted.items())
    assert _parse(command, required) == lists | {
        name: name if p.default is p.empty else p.default
        for name, p in inspect.signature(command).parameters.items() if name not in lists}


def test_a_list_takes_all_words():
    assert _parse(COMMANDS["data"], ["a_b", "c-d"]) == {"names": ["a_b", "c-d"]}


def test_values_keep_their_dashes_and_underscores():
    found = _parse(COMMANDS["generate"], ["my_run", "--prompt=a_b-c --d_e", "--stop", "_"])
    assert (found["folder"], found["prompt"], found["stop"]) == ("my_run", "a_b-c --d_e", "_")


def test_options_come_from_a_file_and_what_is_typed_wins(tmp_path, capsys):
    file = tmp_path / "options.toml"
    file.write_text('steps = 7\nbatch_size = 3\n"min-lr" = 0.5\ncpu = true\ntensorboard = false\n'
                    'options = "mem_len=8 positions=t5"\nfolder = "--odd name"\n')
    train = COMMANDS["train"]
    for words in (["m", "--config", str(file)], [f"--config={file}", "m"]):
        found = _parse(train, words)
        assert (found["steps"], found["batch_size"], found["min_lr"]) == (7, 3, .5)
        assert (found["cpu"], found["tensorboard"]) == (True, False)
        assert (found["options"], found["folder"]) == ("mem_len=8 positions=t5", "--odd name")
    assert _parse(train, ["m", "--steps", "9", "--config", str(file)])["steps"] == 9
    for text, message in (("stepps = 3", "--stepps"), ("steps = ", "config: "), ("steps = 1.5", "steps"),
                          ("[train]\nsteps = 3", "train must be"), (None, "config: ")):
        file.unlink(missing_ok=True)
        if text: file.write_text(text)
        with pytest.raises(SystemExit) as done: _parse(train, ["m", "--config", str(file)])
        assert done.value.code == 2 and message in capsys.readouterr().err


def test_unknown_options_are_refused(capsys):
    for words in (["--batch-sizes", "3"], ["--batch", "3"], ["--steps", "many"]):
        with pytest.raises(SystemExit) as done: _parse(COMMANDS["train"], ["m", *words])
        assert done.value.code == 2 and words[0] in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"memformers {memformers.__version__}\n"


def test_every_preset_can_be_built_and_told():
    table = models()
    for name, preset in PRESETS.items():
        assert name in table
        with torch.device("meta"): model = preset.model_class(**preset.options)
        assert budget(model)["parameters"] > 0 and budget(model)["memory_bytes"] > 0


def test_load_model_finds_the_class(tmp_path):
    create("transformer_xl_tiny").save_pretrained(tmp_path)
    assert type(load_model(tmp_path)).__name__ == "TransformerXL"
    (tmp_path / "config.json").write_text('{"model_class": "SomethingElse"}')
    with pytest.raises(ValueError, match="SomethingElse"): load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="not a configuration"): load_model(tmp_path)
    with pytest.raises(FileNotFoundError): load_model(tmp_path / "nothing")


def test_characters_come_whole():
    """However many bytes they take; what is no text does not hold the rest up."""
    model = create("transformer_xl_tiny")
    show = lambda data: list(cli._characters(model, [], iter(torch.tensor(list(data)))))
    assert show("aé€😀b".encode()) == ["a", "é", "€", "😀", "b"]
    assert "".join(show(b"\xffabcd")).endswith("abcd") and show("€".encode()[:2]) == ["�"]
