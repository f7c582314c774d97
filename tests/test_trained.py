"The trained models of the package: they load, they are small, and their cards tell the truth."
import re
import runpy
from pathlib import Path

import pytest
import torch
from memformers import cli
from memformers.data import load_corpus
from memformers.evaluate import evaluate
from memformers.zoo import PRESETS, TRAINED, create, load_model
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "memformers" / "trained"
LIMIT = 4_000_000   # bytes of a model
TOOL = runpy.run_path(str(ROOT / "tools" / "train_models.py"))


def card(name): return (FOLDER / name / "README.md").read_text(encoding="utf-8")


def test_all_are_listed_under_names_of_their_own():
    assert set(TRAINED) == {path.name for path in FOLDER.iterdir()}
    assert set(TRAINED) == {*TOOL["SHIPS"]}
    assert not set(TRAINED) & PRESETS.keys()


@pytest.mark.parametrize("name", TRAINED)
def test_a_name_is_enough(name, tmp_path, monkeypatch):
    """In float32 and offline, whatever the folder one is in; the files are small and of 16 bits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("memformers.zoo._hub_config", lambda name: pytest.fail("asks the hub"))
    model = load_model(name)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    stored = load_file(FOLDER / name / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(t, stored[k].float()) for k, t in model.state_dict().items())
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < LIMIT
    preset, _, options = TOOL["RECIPES"][name].partition(" ")
    changed = {"mem_len": 0} if "mem_len=0" in options else {}
    assert model.config() == create(preset, **changed).config()


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create("infini_tiny").save_pretrained(TRAINED[0])
    assert type(load_model(TRAINED[0])).__name__ == "InfiniTransformer"


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(FileNotFoundError) as error: load_model("transformer_xl_sonnets")
    assert all(name in str(error.value) for name in TRAINED)


def test_the_command_line_takes_the_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "transformer_xl_shakespeare"
    cli.models()
    listed = capsys.readouterr().out
    assert all(name in listed for name in TRAINED)
    cli.generate(name, "KING.\n", length=40, cpu=True)
    assert re.match("KING\\.\n.{20}", capsys.readouterr().out, re.S)
    Path("text.txt").write_text("All the world's a stage.\n" * 40)
    cli.evaluate(name, "text.txt", split="all", modes="off", cpu=True)
    assert (tmp_path / "evaluation/evaluation.json").is_file()
    cli.train(name, "text.txt", steps=1, batch_size=2, valid_share=.1, cpu=True)
    assert (tmp_path / "runs" / name / "model/config.json").is_file()


@pytest.mark.parametrize("name", TRAINED)
def test_a_card_is_complete(name):
    text = card(name)
    assert f'load_model("{name}")' in text and "user/name" not in text
    for part in ("license: mit", "## Budget", "## Training text", "public domain",
                 "## Evaluation", "bits per byte [95 %]", TOOL["command"](name)):
        assert part in text, part
    assert "trained without" in text or "has no memory" in text


@pytest.mark.parametrize("name", TRAINED)
def test_a_card_has_the_scores_of_its_weights(name):
    try: held_out = load_corpus("shakespeare", "valid")
    except FileNotFoundError as error: pytest.skip(str(error))
    said = dict(re.findall(r"^\| (on|off|foreign) \| ([\d.]+ \[[\d., ]+\]) \|", card(name), re.M))
    scored = evaluate(load_model(name), held_out, [*said], max_tokens=TOOL["MOST"])
    numbers = lambda text: [float(number) for number in re.findall(r"[\d.]+", text)]
    assert said.keys() == set(scored.modes)
    for mode, text in said.items():
        assert numbers(text) == pytest.approx([scored.bits(mode), *scored.interval(mode)], abs=.002)
