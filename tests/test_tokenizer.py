"""A tokenizer of one's own: widths that add up, saved with the model, scores by the byte."""
import copy
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformers import TransformerXL, generate
from memformers.cli import main
from memformers.data import ByteTokenizer, Corpus, TextTokenizer
from memformers.evaluate import evaluate, token_bits
from memformers.train import TrainOptions, train
from memformers.zoo import create, load_model

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)
TEXT = ["the quick brown fox jumps over the lazy dog. " * 3, "naïve café, 日本語のテキスト 😀😀 " * 3]


def byte_level(size=300):
    "Byte-level BPE, as GPT-2 has it."
    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    found.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return found


def word_piece():
    "Loses blanks and capitals, and does not know every character."
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    found.pre_tokenizer, found.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    found.train_from_iterator(TEXT[:1], trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=["[UNK]", "[CLS]"], show_progress=False))
    return found


def unigram():
    "As sentencepiece: blanks become a character of their own."
    found = Tokenizer(models.Unigram())
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    found.train_from_iterator(TEXT, trainers.UnigramTrainer(
        vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False))
    return found


KINDS = {f.__name__: TextTokenizer(f()) for f in (byte_level, word_piece, unigram)}
kinds = pytest.mark.parametrize("kind", KINDS)


def xl(tokenizer, **options):
    torch.manual_seed(0)
    model = TransformerXL(tokenizer.num_tokens, 16, 2, heads=2, seq_len=4, mem_len=4, **options)
    model.tokenizer = tokenizer
    return model


@kinds
@given(text=st.text(max_size=60) | st.sampled_from(TEXT))
@quick
def test_widths_add_up_to_the_bytes_of_the_text(kind, text):
    tokenizer, naive, last = KINDS[kind], [], 0
    ids, widths = tokenizer.encode_with_widths(text)
    found = tokenizer.inner.encode(text, add_special_tokens=False)
    assert ids.tolist() == found.ids == tokenizer.encode(text).tolist() and len(widths) == len(ids)
    if len(ids): assert widths.sum() == len(text.encode())
    for _, end in found.offsets:
        last = max(last, len(text[:end].encode()))
        naive.append(last)
    assert np.cumsum(widths)[:-1].tolist() == naive[:-1]


@given(st.text(max_size=60))
@quick
def test_bytes_of_a_text_say_what_the_text_says(text):
    tokenizer = KINDS["byte_level"]
    assert tokenizer.decode(tokenizer.encode(text.encode())) == text
    whole, cut = text.encode(), text.encode()[1:-1]   # perhaps inside a character
    middle = cut.decode(errors="ignore")
    assert tokenizer.decode(tokenizer.encode(np.frombuffer(cut, np.uint8))).startswith(middle[:1])
    assert tokenizer.encode(whole).tolist() == tokenizer.encode(text).tolist()


def test_a_cut_character_at_an_end_is_left_out():
    tokenizer = KINDS["byte_level"]
    assert tokenizer.decode(tokenizer.encode("éaé".encode()[1:-1])) == "a"


def test_nothing_is_added_and_nothing_is_changed():
    inner = byte_level()
    inner.enable_truncation(3), inner.enable_padding(length=50)
    tokenizer = TextTokenizer(inner)
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0]
    assert len(inner.encode(TEXT[0]).ids) == 50 and tokenizer == KINDS["byte_level"]
    assert copy.deepcopy(tokenizer) is tokenizer and pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    assert tokenizer != KINDS["unigram"] and TextTokenizer(tokenizer) == tokenizer


def test_a_fast_tokenizer_of_transformers_will_do():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level())
    assert TextTokenizer(fast).encode(TEXT[1]).tolist() == KINDS["byte_level"].encode(TEXT[1]).tolist()
    fast.add_special_tokens({"eos_token": "<end>"})
    assert TextTokenizer(fast).num_tokens == KINDS["byte_level"].num_tokens + 1


@kinds
def test_it_is_saved_with_the_model(kind, tmp_path):
    model = xl(KINDS[kind])
    model.save_pretrained(tmp_path)
    for again in (load_model(tmp_path), TransformerXL.from_pretrained(tmp_path)):
        assert again.tokenizer == model.tokenizer and again.config() == model.config()
        assert again.encode("the fox").tolist() == model.encode("the fox").tolist()
    assert "tokenizer" not in model.config()
    assert TextTokenizer.load(tmp_path) == TextTokenizer.load(tmp_path / "tokenizer.json")
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).tokenizer is None, "the file of an earlier model is not its own"


def test_bytes_are_the_default(tmp_path):
    model = create("transformer_xl_tiny")
    assert model.tokenizer is None and model.encode("naïve").tolist() == [*"naïve".encode()]
    assert model.decode(model.encode("naïve")) == "naïve"
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert "tokenizer" not in json.loads((tmp_path / "config.json").read_text())


def test_a_named_model_takes_the_size_of_its_vocabulary(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for given in (byte_level(), tmp_path, str(tmp_path / "tokenizer.json")):
        model = create("transformer_xl_tiny", tokenizer=given)
        assert model.num_tokens == model.tokenizer.num_tokens == 300
    assert create("transformer_xl_tiny", tokenizer=given, num_tokens=320).num_tokens == 320


@kinds
@pytest.mark.parametrize("most, cut", [(None, None), (7, None), (None, 9)])
def test_bits_are_counted_by_the_byte(kind, most, cut):
    """Of all tokens but the first of each document, which is given."""
    model, tokenizer = xl(KINDS[kind]), KINDS[kind]
    corpus = Corpus("c", ("a", "b", "c"), [text.encode() for text in (*TEXT, "the fox, the dog")])
    encoded = corpus.encode(tokenizer)
    if cut: encoded = encoded.cut(cut)
    found = evaluate(model, encoded if cut else corpus, max_tokens=most, edges=[0, 3, 8])
    bits, sizes, first, past = 0, 0, 0, 0
    for text, widths in zip(encoded.documents, encoded.widths):
        bits += token_bits(model, text[:most]).sum()
        sizes += widths[1:most].sum()
        first, past = first + widths[1:4].sum(), past + widths[9:most].sum()
    assert found.unit == "byte" and found.bits() == pytest.approx(bits / sizes, rel=1e-5)
    assert found.num_bytes.sum() == sizes
    assert found.num_bytes[:, 0].sum() == first and found.num_bytes[:, 2:].sum() == past
    assert "bits per byte" in found.table()
    if not most and not cut:
        assert sum(map(np.sum, encoded.widths)) == encoded.num_bytes == corpus.num_bytes


def test_scores_of_bytes_and_tokens_can_be_compared():
    """A model that knows nothing pays log2 of its vocabulary for each token."""
    corpus = Corpus("c", ("a", "b"), [text.encode() for text in TEXT])
    for tokenizer in (None, KINDS["byte_level"]):
        model = xl(tokenizer) if tokenizer else TransformerXL(256, 16, 1, heads=2, seq_len=4)
        torch.nn.init.zeros_(model.head.weight)
        seen = corpus.encode(tokenizer) if tokenizer else corpus
        tokens = sum(map(len, seen.documents)) - 2
        size = sum(w[1:].sum() for w in seen.widths) if tokenizer else tokens
        assert evaluate(model, corpus).bits() == pytest.approx(
            math.log2(model.num_tokens) * tokens / size)


def test_parts_of_a_corpus_keep_their_widths():
    corpus = Corpus("c", ("a", "b"), [text.encode() for text in TEXT]).encode(byte_level())
    assert corpus.cut(7).num_bytes == corpus.num_bytes
    assert all(len(d) == len(w) for d, w in zip(corpus.cut(7).documents, corpus.cut(7).widths))
    assert corpus.take(1).num_bytes == len(TEXT[0].encode())
    manifest = corpus.manifest()
    assert (manifest["bytes"], manifest["num_tokens"]) == (corpus.num_bytes, 300)
    assert "for 2" in repr(corpus) and corpus.tokenizer == KINDS["byte_level"]


def test_a_text_of_one_token_is_skipped():
    corpus = Corpus("c", ("a", "b"), [TEXT[0].encode(), b"  "])
    with pytest.warns(UserWarning, match="b .0 tokens"): corpus = corpus.encode(word_piece())
    assert corpus.names == ("a",) and corpus.skipped[0][0] == "b"


def test_training_encodes_text_and_saves_the_tokenizer(tmp_path):
    texts = Corpus("c", ("a", "b"), [text.encode() for text in TEXT])
    options = TrainOptions(steps=2, batch_size=2, cpu=True, progress=False)
    model = xl(KINDS["byte_level"])
    train(model, texts, tmp_path / "run", options)
    assert load_model(tmp_path / "run/model").tokenizer == model.tokenizer
    train(xl(KINDS["byte_level"]), texts, tmp_path / "run", TrainOptions(
        steps=3, batch_size=2, cpu=True, progress=False))   # goes on
    taker = TransformerXL(300, 16, 2, heads=2, seq_len=4)
    train(taker, texts.encode(byte_level()), tmp_path / "other", options)
    assert load_model(tmp_path / "other/model").tokenizer == KINDS["byte_level"]


@kinds
def test_a_prompt_may_be_text(kind):
    model = xl(KINDS[kind])
    ids = generate(model, model.encode("the fox"), 9, temperature=0)
    assert generate(model, "the fox", 9, temperature=0) == model.decode(ids)
    plain = create("transformer_xl_tiny")
    ids = generate(plain, torch.tensor([*b"the fox"]), 9, temperature=0)
    assert generate(plain, "the fox", 9, temperature=0) == ByteTokenizer().decode(ids)


@kinds
def test_the_command_line_knows_it(kind, tmp_path, capsys):
    texts, run, file = tmp_path / "texts", tmp_path / "run", tmp_path / "tokenizer.json"
    texts.mkdir()
    for i, text in enumerate(TEXT): (texts / f"{i}.txt").write_text(text * 9)
    KINDS[kind].save(file)
    def do(line): return main([w.format(t=texts, r=run, f=file) for w in line.split()])
    assert do("train transformer_xl_tiny --corpus {t} --folder {r} --steps 2 --batch-size 2 --cpu "
              "--tokenizer {f} --cut 50") == 0
    assert do("evaluate {r} --corpus {t} --cpu --cut 20") == 0
    assert "bits per byte" in capsys.readouterr().out
    assert do("generate {r} --prompt the --length 30 --cpu --seed 4") == 0
    said = capsys.readouterr().out
    model = load_model(run / "model")
    ids = generate(model, model.encode("the"), 30, temperature=.8, top_p=.95,
                   generator=torch.Generator().manual_seed(4))
    after = model.decode([*model.encode("the"), *ids])[len(model.decode(model.encode("the"))):]
    assert said == "the" + after + "\n"
    stop = next(c for c in after if c.isascii() and c.isalpha())
    assert do("generate {r} --prompt the --length 30 --cpu --seed 4 --stop " + stop) == 0
    assert capsys.readouterr().out == "the" + after[:after.index(stop) + 1] + "\n"
    assert do("train {r}/model --tokenizer {f} --corpus {t} --cpu") == 1
    assert "tokenizer: goes with a named model only" in capsys.readouterr().err


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    xl(KINDS["byte_level"]).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: TextTokenizer.load(tmp_path), lambda: load_model(tmp_path)):
        with pytest.raises(ImportError, match=r"pip install 'torch-memformers\[tokenizers\]'"): call()
