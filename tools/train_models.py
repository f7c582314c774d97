"""The trained models that come with the package: train them, round them, write their cards.

    python tools/train_models.py          do the runs that are not finished, then the rest
    python tools/train_models.py --cards  only the rest, when all runs have been finished

The runs are in runs/trained. They can be stopped at any moment and go on where they were.
"""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from memformers.data import load_corpus
from memformers.evaluate import Estimate, evaluate, resampled_sums
from memformers.packages import PACKAGES, fetch_package
from memformers.zoo import load_model

ROOT = Path(__file__).resolve().parent.parent
RUNS, SHIPPED = ROOT / "runs" / "trained", ROOT / "memformers" / "trained"
TEXT, MOST = "shakespeare", 4096   # bytes that are scored of each held-out document
RECIPES = {"transformer_xl_shakespeare": "transformer_xl_small --steps 2500",
           "no_memory_shakespeare": "transformer_xl_small --options mem_len=0 --steps 2500",
           "gated_delta_shakespeare": "gated_delta_small --steps 2000",
           # Only to compare with: each piece is one segment, 128 bytes read and 128 predicted.
           "mixed_control": "transformer_xl_small --options mem_len=0 --cut 129 --steps 2500"}
SHIPS = [name for name in RECIPES if not name.endswith("_control")]
CONTROLS = {"no_memory_shakespeare": "the same batches",
            "mixed_control": "batches of shuffled pieces, 129 bytes each"}
# Of the weights in the repository, not of a run here.
STOPPED = {"gated_delta_shakespeare": " The run of these weights was stopped after 1,840 "
                                      "of the 2,000 updates."}


def command(name):
    return (f"memformers train {RECIPES[name]} --corpus {TEXT} --lr 3e-3 --mixed-precision bf16 "
            "--save-every 250 --cpu")


def train(name):
    subprocess.run([sys.executable, "-m", *shlex.split(command(name)), "--folder",
                    str(RUNS / name)], check=True)


def rounded(name):
    "A model of a run here, or else as it is shipped; the weights are rounded, in float32."
    run = RUNS / name / "model"
    return load_model(run if run.is_dir() else SHIPPED / name).bfloat16().float()


def against(control, own):
    "Bits per byte of the control, and what the memory saves: on the same draws of documents."
    values = np.stack([own.num_bytes, control.nats["off"], own.nats["on"]]).sum(2).T
    bits = lambda sums: sums[..., 1:] / sums[..., :1] / np.log(2)
    score, on = bits(values.sum(0))
    drawn = bits(resampled_sums(values))
    interval = lambda drawn: np.percentile(drawn, [2.5, 97.5])
    return (Estimate(score, *interval(drawn[:, 0])),
            Estimate(score - on, *interval(drawn[:, 0] - drawn[:, 1])))


def compared(name, own, held_out):
    "Lines on the same model, trained without a memory."
    if name == "no_memory_shakespeare":
        return ["This model has no memory. It is there to compare transformer_xl_shakespeare with."]
    if name != "transformer_xl_shakespeare":
        return ["*off* takes the memory away from a model that has learned with one, so it does "
                "not say what the memory is worth. The same model trained without a memory would; "
                "it has not been trained."]
    lines = ["", "What is the memory worth? The same model, with the same first weights and as "
             "many updates, trained without one:", "",
             "| trained without memory, on | bits per byte [95 %] | minus on [95 %] |",
             "|:--|--:|--:|"]
    says = []
    for control, what in CONTROLS.items():
        off = evaluate(rounded(control), held_out, ["off"], max_tokens=MOST)
        score, saved = against(off, own)
        lines.append(f"| {what} | {score} | {saved:+.3f} |")
        says.append(f"Against the one trained on {what}, the memory " + (
            "saves bits." if saved.low > 0 else "**does not save anything for certain**."))
    return [*lines, "", *says, "Without a memory no text has to be read in order, so batches can "
            "be mixed better, which is worth about as much here."]


def write_card(name, texts, held_out):
    model, has_run = rounded(name), (RUNS / name).is_dir()
    if has_run: model.bfloat16().save_pretrained(SHIPPED / name)
    modes = [] if name in CONTROLS else ["off", "foreign"]
    result = evaluate(model.float(), held_out, modes, max_tokens=MOST)
    record = texts.manifest()
    record["source"] += f", {PACKAGES[TEXT].licence}"
    card = model.generate_model_card(result, record)
    card.data.license = "mit"
    head, title, tail = str(card).replace("user/name", name).partition("## Options")
    # The speed depends on the machine.
    head = re.sub(r"(?m)^((?:\|[^|\n]*){3})\|[^|\n]*((?:\|[^|\n]*){2}\|)$", r"\1\2", head)
    more = [*compared(name, result, held_out), "", "## Training", "", "``` sh",
            f"memformers data {TEXT}", command(name), "```", "",
            "The weights are rounded to bfloat16, and those are scored in float32."
            + ("" if has_run else STOPPED.get(name, "")) + " `make models` in a clone does all "
            "of it again, controls included.", "", ""]
    (SHIPPED / name / "README.md").write_text(head + "\n".join(more) + title + tail,
                                              encoding="utf-8")


def main():
    fetch_package(TEXT)
    texts, held_out = load_corpus(TEXT), load_corpus(TEXT, "valid")
    if "--cards" not in sys.argv:
        for name in RECIPES: train(name)
    for name in SHIPS: write_card(name, texts, held_out)


if __name__ == "__main__": main()
