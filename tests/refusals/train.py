"""Training, evaluation, probes and named models: options, arguments and files that mean nothing."""
import json
import math

import numpy as np
import torch

from memformers import TransformerXL
from memformers.data import Corpus, DocumentStream
from memformers.evaluate import Evaluation, evaluate, resampled_sums, token_bits, token_bits_by_mode
from memformers.probe import cost, lookup, recall, seconds
from memformers.tasks import copy_task
from memformers.train import TrainOptions, Trainer, learn, train
from memformers.zoo import create, load_model
from refusals.common import REFUSED, Refusal, refusals

NAN = float("nan")
COUNT, NUMBER = (0, -1, 1.5, "8", True, None), (-1, "one", NAN, math.inf, True)
ROWS = [row for argument, bad in dict(
    steps=COUNT, batch_size=COUNT, segments=COUNT[:-1], curriculum=COUNT[:-1],
    accumulate=COUNT, save_every=COUNT,
    keep=COUNT, log_every=COUNT, warmup=(-1, 1.5, "8", None), seed=(-1, 1.5, "8", None),
    lr=(0, *NUMBER, None), min_lr=(*NUMBER, 1.5, None), clip=(0, *NUMBER),
    weight_decay=(*NUMBER, None), aux_weight=(*NUMBER, None),
    betas=(0.9, (0.9,), (0.9, 1), (-0.1, 0.9), "ab", None), mixed_precision=("fp8", 16, True),
    tensorboard=(1, "yes", None), cpu=(0, "no", None), progress=(1, None)).items()
    for row in refusals("TrainOptions", TrainOptions, argument, *bad)]


def model(num_tokens=17):
    torch.manual_seed(0)
    return TransformerXL(num_tokens, 8, 2, heads=2, seq_len=4, mem_len=4)


TEXT = np.arange(12) % 7
CORPUS = Corpus("tiny", ["a", "b"], [TEXT, TEXT[::-1]])
OPTIONS = TrainOptions(steps=2, batch_size=2, cpu=True, progress=False)


def stream(): return DocumentStream(CORPUS, 2, 4)


def call_learn(**o): return learn(**(dict(model=model(), stream=stream(), steps=1) | o))


def call_train(at, **o):
    return train(**(dict(model=model(), source=CORPUS, folder=at / "run", options=OPTIONS) | o))


for argument, bad in dict(
        model=(None, "xl", torch.nn.Linear(2, 2)), stream=(None, [1, 2], CORPUS),
        steps=COUNT, lr=(0, -1, "one"), segments=(0, 1.5), curriculum=(0, 1.5),
        warmup=(-1, "8"), min_lr=(2, NAN),
        clip=(0, -1, "one")).items():
    ROWS += refusals("learn", call_learn, argument, *bad)
for argument, bad in dict(
        model=(None, "xl", torch.nn.Linear(2, 2)), folder=(None, 3, ""),
        source=(None, "stdlib", [], [b"a"], 3, {"a": TEXT}, TEXT + 11), options=(None, {"steps": 2}, 3)).items():
    ROWS += [Refusal(f"train, {argument}={value!r}",
                     lambda folder, a=argument, v=value: call_train(folder, **{a: v}),
                     REFUSED, rf"\b{argument}\b") for value in bad]


def in_file(folder):
    (folder / "file").write_text("")
    call_train(folder, folder=folder / "file")


def twice(folder):
    call_train(folder)
    call_train(folder, resume=False)


def changed(folder, **state):
    "Resume from a checkpoint whose state says something else."
    run = call_train(folder)
    path = next((run.folder / "checkpoints").glob("*/state.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | state))
    call_train(folder)


def parts(folder): call_train(folder, options=TrainOptions(batch_size=3, accumulate=2, cpu=True))


ROWS += [Refusal("train into a file", in_file, OSError, "folder"),
         Refusal("train twice, resume=False", twice, OSError, "resume=True"),
         Refusal("train, batch_size no multiple", parts, ValueError, "batch_size"),
         Refusal("Trainer of a stream of other rows", lambda folder: Trainer(
             model(), lambda rows: DocumentStream(CORPUS, 3, 4), folder, OPTIONS).run(),
             ValueError, "make_stream")]
for field, value in dict(step=-5, tokens="many", tally=[], must_stay=None, options=3, scaler=1,
                         format="other").items():
    ROWS.append(Refusal(f"resume, state.json with {field}={value!r}",
                        lambda folder, f=field, v=value: changed(folder, **{f: v}),
                        ValueError, rf"\b{field}\b"))


def spoiled():
    net = model()
    net.head.weight.data[0, 0] = NAN
    return net


def call_evaluate(**o): return evaluate(**(dict(model=model(), corpus=CORPUS) | o))


def call_bits(**o): return token_bits(**(dict(model=model(), tokens=TEXT) | o))


def call_modes(**o): return token_bits_by_mode(**(dict(model=model(), tokens=TEXT) | o))


TOKENS = {"a string": "text", "None": None, "a number": 3, "floats": [1.0, 2.0], "one id": [1],
          "nothing": [], "2-D": [[1, 2], [3, 4]], "a negative id": [1, -1],
          "an id of num_tokens": [1, 17], "booleans": [True, False]}
for argument, bad in dict(
        corpus=(None, [b"abc"], {"a": TEXT}), modes=("on", 3, ["of"], [None], ["knn.off"]),
        batch_size=COUNT, seq_len=(0, 5, 1.5, "4"), max_tokens=(0, 1, -1, 1.5, "4"),
        edges=(5, "ab", [], [1, 2], [0, 2, 2], [0, 1.5], [[0, 1]]), seed=(-1, 1.5, "0", None),
        model=(None, "xl", torch.nn.Linear(2, 2)), menlen=(4,)).items():
    ROWS += refusals("evaluate", call_evaluate, argument, *bad)
for argument, bad in dict(memory=(3, torch.zeros(1, 2), (1, 2)), seq_len=(0, 5, "4"),
                          model=(None, torch.nn.Linear(2, 2))).items():
    ROWS += refusals("token_bits", call_bits, argument, *bad)
for argument, bad in dict(modes=("on", 3, ["of"], ["foreign"]), seed=(-1, "0"),
                          seq_len=(0, 5), model=(None,)).items():
    ROWS += refusals("token_bits_by_mode", call_modes, argument, *bad)
for what, value in TOKENS.items():
    ROWS += [Refusal(f"token_bits, tokens {what}", lambda v=value: call_bits(tokens=v), REFUSED,
                     "tokens"),
             Refusal(f"token_bits_by_mode, foreign {what}", lambda v=value: call_modes(foreign=v),
                     REFUSED, "foreign") if value is not None else
             Refusal("token_bits_by_mode, tokens None", lambda: call_modes(tokens=None), REFUSED,
                     "tokens"),
             Refusal(f"lookup, tokens {what}", lambda v=value: lookup(model(), v, 0), REFUSED,
                     "tokens")]
ROWS += [Refusal("evaluate, ids of other tokens", lambda: call_evaluate(corpus=TEXT + 11),
                 ValueError, "num_tokens"),
         Refusal("evaluate, a corpus of other tokens",
                 lambda: call_evaluate(corpus=Corpus("text", ["a"], [b"text"])), ValueError,
                 "num_tokens"),
         Refusal("evaluate, foreign of one document", lambda: call_evaluate(
             corpus=CORPUS.take(1), modes=["foreign"]), ValueError, "modes"),
         Refusal("evaluate, spoiled weights", lambda: call_evaluate(model=spoiled()), ValueError,
                 "not finite"),
         Refusal("token_bits, spoiled weights", lambda: call_bits(model=spoiled()), ValueError,
                 "not finite"),
         Refusal("Evaluation.bits of a mode that was not scored",
                 lambda: call_evaluate(modes=()).bits("off"), ValueError, "mode"),
         Refusal("TokenBits.saved of a mode that was not scored",
                 lambda: call_modes(modes=()).saved("off"), ValueError, "without")]


def from_json(folder, change):
    path = folder / "e.json"
    call_evaluate().to_json(path)
    text = path.read_text()
    path.write_text(change(text) if callable(change) else json.dumps(json.loads(text) | change))
    return Evaluation.from_json(path)


for what, change in {
        "cut in half": lambda t: t[:len(t) // 2], "empty": lambda t: "", "a list": lambda t: "[]",
        "another format": {"format": "other"}, "nats of a number": {"nats": 3},
        "nats of another shape": {"nats": {"on": [[1.0]]}}, "names of a number": {"names": 3},
        "tokens of text": {"tokens": "ab"}, "settings of a list": {"settings": []}}.items():
    ROWS.append(Refusal(f"Evaluation.from_json, {what}",
                        lambda folder, c=change: from_json(folder, c), ValueError, "e.json"))

TASK = copy_task(1)


def call_recall(**o): return recall(**(dict(model=model(128), task=TASK, distances=[3],
                                            episodes=2) | o))


def call_cost(**o): return cost(**(dict(model=model(), contexts=[0], repeats=1) | o))


def call_lookup(**o): return lookup(**(dict(model=model(), tokens=TEXT, at=9) | o))


for argument, bad in dict(
        task=(None, "copy", [TASK]), distances=([], 3, "12", [0], [1.5], ["4"], None),
        episodes=COUNT, batch_size=COUNT, seed=(-1, "0"), seq_len=(0, 5),
        model=(None, torch.nn.Linear(2, 2)), menlen=(4,)).items():
    ROWS += refusals("recall", call_recall, argument, *bad)
for argument, bad in dict(
        contexts=([], 3, "12", [-1], [8, 4], [1.5], None), batch_size=COUNT, repeats=COUNT,
        seq_len=(0, 5), seed=(-1, "0"), model=(None, torch.nn.Linear(2, 2)), menlen=(4,)).items():
    ROWS += refusals("cost", call_cost, argument, *bad)
for argument, bad in dict(at=(12, -13, 1.5, "3", None), top=COUNT, layer=(0, 3, "1", 1.5),
                          head=(-1, 2, "0", 1.5), seq_len=(0, 5), model=(None,),
                          menlen=(4,)).items():
    ROWS += refusals("lookup", call_lookup, argument, *bad)
ROWS += refusals("seconds", lambda **o: seconds(**(dict(call=int) | o)), "repeats", 0, -1, "5")
ROWS += refusals("resampled_sums", lambda **o: resampled_sums(**(dict(values=np.ones((3, 1))) | o)),
                 "values", [], np.ones(3), np.ones((0, 2)), "text", match="values")
ROWS += refusals("resampled_sums", lambda **o: resampled_sums(np.ones((3, 1)), **o), "resamples",
                 0, -1, "9")

for name in ("transformer_xxl", "", None, 3, ["transformer_xl_tiny"], TransformerXL):
    ROWS.append(Refusal(f"create, {name!r}", lambda n=name: create(n), REFUSED, "name|model"))
ROWS += refusals("create", lambda **o: create("transformer_xl_tiny", **o), "menlen", 4)
for where in (None, 3, "", "no/such/folder", "/no/such/folder", "no_folder"):
    ROWS.append(Refusal(f"load_model, {where!r}", lambda w=where: load_model(w),
                        (ValueError, TypeError, OSError), "where|folder"))


def saved(folder, config):
    model().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else
                    json.dumps(json.loads(path.read_text()) | config))
    return load_model(folder)


for what, config in {"no model_class": "{}", "not JSON": "{", "a list": "[]",
                     "an unknown class": {"model_class": "LSTM"}, "class of a number": {"model_class": 3},
                     "another dim": {"dim": 16}, "an unknown argument": {"menlen": 4}}.items():
    ROWS.append(Refusal(f"load_model, config.json with {what}",
                        lambda folder, c=config: saved(folder, c), (ValueError, TypeError, OSError),
                        "model_class|config|weights|fit|menlen|does not know|argument"))
ROWS.append(Refusal("load_model, an empty folder", lambda folder: load_model(folder), OSError,
                    "config.json"))
