"""Tokenizers, and texts for them, that mean nothing."""

from memformers import TransformerXL
from memformers.data import Corpus, TextTokenizer
from memformers.evaluate import evaluate
from memformers.zoo import create
from refusals.common import Refusal, refusals

try: from tokenizers import Tokenizer, models
except ImportError: ROWS = []   # an extra
else:
    TEXT = Corpus("c", ("a", "b"), [b"abab", b"baab"])
    IDS = Corpus("c", ("a",), [[1, 2]], num_tokens=300)
    LETTERS = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    OTHER = Tokenizer(models.BPE({"b": 0, "a": 1}, []))

    def model(tokenizer, num_tokens=8):
        net = TransformerXL(num_tokens, 8, 1, heads=2, seq_len=4)
        net.tokenizer = tokenizer
        return net

    def damaged(folder):
        (folder / "tokenizer.json").write_text('{"model": ')
        TextTokenizer.load(folder)

    ROWS = [
        *refusals("TextTokenizer", TextTokenizer, "tokenizer", None, 3, [1], len, b"{}"),
        *refusals("TextTokenizer.load", TextTokenizer.load, "path", "/nowhere", "/dev/zero",
                  error=OSError, match="tokenizer: "),
        *refusals("TextTokenizer.encode", TextTokenizer(LETTERS).encode, "text", None, 3, ["a"]),
        *refusals("TextTokenizer.decode", TextTokenizer(LETTERS).decode, "ids", [.5], [-1], "a",
                  None, [999]),
        *refusals("model", model, "tokenizer", 3, [1], b"{}"),
        *refusals("create", lambda tokenizer: create("transformer_xl_tiny", tokenizer=tokenizer),
                  "tokenizer", 3, [1]),
        *refusals("Corpus.encode", TEXT.encode, "tokenizer", None, 3, "byte"),
        Refusal("Corpus.encode of ids", lambda: IDS.encode(LETTERS), ValueError, "only text"),
        Refusal("Corpus.encode twice", lambda: TEXT.encode(LETTERS).encode(LETTERS), ValueError,
                "only text"),
        Refusal("Corpus.encode, nothing is known", lambda: Corpus("c", ("a",), [b"xyz"]).encode(
            LETTERS), ValueError, "tokenizer: no text"),
        Refusal("model of fewer tokens", lambda: model(LETTERS, 1), ValueError, "num_tokens"),
        Refusal("evaluate in other tokens", lambda: evaluate(model(OTHER), TEXT.encode(LETTERS)),
                ValueError, "tokenizer: .*another"),
        Refusal("TextTokenizer.load of a damaged file", damaged, ValueError, "holds none"),
    ]
