"""What other libraries expect of a model: a configuration, a call by names, processors, a card."""
import json

import pytest
import torch
import torch.nn.functional as F

from memformers import carry, generate, stream
from memformers.data import Corpus
from memformers.evaluate import evaluate
from memformers.zoo import MODELS, PRESETS, create

TINY = [name for name in PRESETS if name.endswith("_tiny")]
each = pytest.mark.parametrize("name", TINY)


def tiny(name, **options):
    torch.manual_seed(0)
    return create(name, num_tokens=40, dim=16, **options).eval()


def texts(b, n):
    return torch.randint(40, (b, n), generator=torch.Generator().manual_seed(n))


def test_each_mechanism_is_here():
    assert {type(tiny(name)).__name__ for name in TINY} == set(MODELS)


# Configuration


@each
def test_the_configuration_is_an_attribute_and_a_call(name):
    model = tiny(name)
    config = model.config
    assert config() == config == config.to_dict() == json.loads(config.to_json_string())
    assert type(config()) is dict and config.model_class == type(model).__name__
    assert config.dim == config["dim"] == 16 and not hasattr(config, "hidden_size")
    config["dim"] = 3
    assert model.config.dim == 16, "a copy"
    with pytest.raises(AttributeError, match="hidden_size.*dim"): config.hidden_size


# The call by names


@each
def test_a_batch_longer_than_a_segment_is_read_in_segments(name):
    model, x = tiny(name), texts(2, 150)
    out = model(input_ids=x, labels=x)
    memory, logits, aux = None, [], []
    for part in x.split(model.seq_len, 1):
        step = model.step(part, memory)
        memory = carry(step.memory)
        logits.append(step.logits)
        aux.append(step.aux_loss)
    torch.testing.assert_close(out.logits, torch.cat(logits, 1))
    nll = F.cross_entropy(torch.cat(logits, 1)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.loss, nll + sum(aux) / len(aux))
    assert "loss" not in model(input_ids=x) and out["loss"] is out.loss
    again = model.step(texts(2, 5), out.memory).logits
    torch.testing.assert_close(again, model.step(texts(2, 5), memory).logits)


@each
def test_padding_neither_counts_nor_changes_a_row(name):
    model, x = tiny(name), texts(3, 100)
    mask = torch.ones_like(x)
    mask[0, 20:] = mask[1, 90:] = 0
    labels = x.masked_fill(mask == 0, -100)
    x = x.masked_fill(mask == 0, 77)   # no token at all
    out = model(input_ids=x, attention_mask=mask, labels=labels)
    for row, n in enumerate((20, 90, 100)):
        alone = model(input_ids=x[row:row + 1, :n])
        torch.testing.assert_close(out.logits[row, :n], alone.logits[0], rtol=1e-4, atol=1e-5)
    losses = torch.cat([F.cross_entropy(out.logits[r, :n - 1], x[r, 1:n], reduction="none")
                        for r, n in enumerate((20, 90, 100))])
    aux = out.loss - losses.mean()
    assert type(model).__name__ == "CompressiveTransformer" or aux.abs() < 1e-5


@each
def test_it_trains_all_weights_that_training_trains(name):
    model, x = tiny(name).train(), texts(2, 300)
    model(input_ids=x, labels=x).loss.backward()
    untrained = [n for n, p in model.named_parameters() if p.grad is None]
    assert len(untrained) <= 2, untrained


def test_the_call_of_the_package_is_as_it_was():
    model, x = tiny("memorizing_tiny"), texts(2, 30)
    assert torch.equal(model(x), model.step(x).logits)
    own = model(x, labels=x.roll(-1, 1))      # labels as given, not shifted
    named = model(input_ids=x, labels=x).loss # shifted here
    assert own.shape == named.shape == () and own != named


def test_the_trainer_of_transformers_trains(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny("transformer_xl_tiny")
    row = torch.arange(100) % 7
    rows = [dict(input_ids=row, labels=row)] * 8
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=30, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_steps=10, save_strategy="no")
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows,
                                   eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < .5 * before
    trainer.save_model(tmp_path / "saved")


# Processors


def test_processors_see_all_ids_and_change_what_is_drawn():
    model, x, seen = tiny("transformer_xl_tiny"), texts(2, 9), []
    def even(ids, logits):
        seen.append(ids.clone())
        logits[:, 1::2] = -torch.inf           # in place, as some do
        return logits
    drawn = generate(model, x, 12, logits_processor=even)
    assert not (drawn % 2).any() and len(seen) == 12
    for i, ids in enumerate(seen): assert torch.equal(ids, torch.cat([x, drawn[:, :i]], 1))
    both = generate(model, x, 12, temperature=0,
                    logits_processor=[even, lambda ids, s: s.index_fill(1, torch.arange(0, 20), -1e9)])
    assert not (both % 2).any() and both.min() >= 20
    assert torch.equal(generate(model, x, 5, temperature=0, logits_processor=[]),
                       generate(model, x, 5, temperature=0))


def test_processors_of_transformers_will_do():
    transformers = pytest.importorskip("transformers")
    model, x = tiny("transformer_xl_tiny"), texts(1, 9)
    processors = transformers.LogitsProcessorList([
        transformers.NoRepeatNGramLogitsProcessor(1), transformers.TemperatureLogitsWarper(.5)])
    drawn = generate(model, x, 20, logits_processor=processors)
    assert len(set(drawn[0].tolist()) | set(x[0].tolist())) == 20 + len(set(x[0].tolist()))
    one = torch.cat(list(stream(model, x, 20, temperature=0, logits_processor=processors[0])))
    assert len(set(one.tolist())) == 20


# Cards


def test_a_card_is_filled_from_the_model(tmp_path):
    model = create("transformer_xl_tiny")
    corpus = Corpus("letters", ("a", "b"), [b"some text " * 9, b"other text " * 9], source="here")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: memformers") and "# TransformerXL" in text
    for word in ("| parameters | 140,800 |", "32,776 bytes", '"mem_len": 64', "Dai et al. 2019"):
        assert word in text
    assert "Training text" not in text and "Evaluation" not in text
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine", "what a user has written stays"
    result = evaluate(model, corpus)
    model.save_pretrained(tmp_path, model_card_kwargs=dict(evaluation=result, corpus=corpus))
    text = (tmp_path / "README.md").read_text()
    assert result.table() in text and "| name | letters |" in text and corpus.fingerprint in text
    assert model.generate_model_card(corpus=corpus.manifest()).text in \
        model.generate_model_card(corpus=corpus).text


@each
def test_every_model_has_a_card(name):
    card = tiny(name).generate_model_card()
    assert card.data.to_dict()["library_name"] == "memformers" and "bytes |" in str(card)


# Bytes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_a_model_of_bytes_reads_bytes(dtype):
    """256 does not fit into the type of a byte, and 255 is a token."""
    model = create("transformer_xl_tiny")
    x = torch.tensor([[0, 7, 255 if dtype == torch.uint8 else 90]]).to(dtype)
    assert torch.equal(model.step(x).logits, model.step(x.long()).logits)
    assert torch.equal(model(input_ids=x).logits, model.step(x.long()).logits)
    assert generate(model, x, 3, temperature=0).shape == (1, 3)
