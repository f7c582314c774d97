"""The command line: a whole run, the demo in small, and errors of one line."""
import inspect
import json

import pytest
import torch

import memformers
from memformers.cli import COMMANDS, _parse, main
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
    assert main(one_file) == 1                         # nobody else's memory to read with
    assert "foreign" in capsys.readouterr().err
    assert main(one_file + ["--modes", "on off"]) == 0
    assert "| off |" in capsys.readouterr().out
    assert (run / "evaluation" / "evaluation.json").is_file()

    generate = words("generate {run} --prompt alpha --length 20 --seed 3 --cpu", run=run)
    assert main(generate) == 0
    once = capsys.readouterr().out
    assert main(generate) == 0
    assert capsys.readouterr().out == once and once.startswith("alpha")


@pytest.mark.parametrize("model", ["transformer_xl_tiny", "memorizing_tiny"])
def test_the_demo_in_small(model, tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(words(f"demo --folder {{folder}} --model {model} --steps 3 --documents 4 "
                      "--max-tokens 300 --cpu", folder=folder)) == 0
    said = capsys.readouterr().out
    for name in ("loss.png", "sample.txt", "metrics.jsonl", "evaluation/evaluation.json",
                 "evaluation/evaluation.md", "evaluation/bits_by_position.png"):
        assert (folder / name).stat().st_size > 0 and name in said
    assert (folder / "model" / "config.json").is_file()
    assert "| on |" in said and "| off |" in said and "| foreign |" in said
    assert "bits per byte (95 % interval" in said
    assert ("| knn.off |" in said and "kNN memory alone" in said) == (model == "memorizing_tiny")


@pytest.mark.parametrize("line, message", [
    ("train transformer_xxl", "no model is called"),
    ("train transformer_xl_tiny --corpus /nowhere/at/all", "/nowhere/at/all"),
    ("train transformer_xl_tiny --options mem_len", "name=value"),
    ("train transformer_xl_tiny --options positions=alibi", "'xl' or 't5'"),
    ("evaluate /nowhere/at/all", "neither a folder"),
    ("evaluate . --modes on,off", "modes must be among"),
    ("generate /nowhere/at/all", "neither a folder"),
])
def test_errors_are_one_line(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


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
            if p.default is not p.empty}


@pytest.mark.parametrize("spell", [lambda name: "--" + name.replace("_", "-"),
                                   lambda name: "--" + name], ids=["dashes", "underscores"])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_option_is_known_in_both_spellings(command, spell):
    """Not through a parser of others, whose newer version may know one spelling only."""
    required = [name for name, p in inspect.signature(command).parameters.items()
                if p.default is p.empty]
    wanted = options_of(command)
    apart = [word for name, value in wanted.items()
             for word in ([spell(name)] if value is True else [spell(name), str(value)])]
    joined = [spell(name) if value is True else f"{spell(name)}={value}"
              for name, value in wanted.items()]
    for words in (apart, joined):
        found = _parse(command, required + words)
        assert found == {name: name for name in required} | wanted
        assert all(type(found[name]) is type(value) for name, value in wanted.items())
    assert _parse(command, required) == {
        name: name if p.default is p.empty else p.default
        for name, p in inspect.signature(command).parameters.items()}


def test_values_keep_their_dashes_and_underscores():
    found = _parse(COMMANDS["generate"], ["my_run", "--prompt=a_b-c --d_e", "--stop", "_"])
    assert (found["folder"], found["prompt"], found["stop"]) == ("my_run", "a_b-c --d_e", "_")


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
