"""Stored outputs of a notebook beside those of a fresh run: what text and numbers differ.

A cell may say `#| tolerance: 0.1` where its numbers depend on a training, or `#| varies: REASON`
where its output can't be compared, as a time.
"""
import re

from nbdev.clean import clean_nb

# Training ends a little differently on another processor or another version of torch.
RELATIVE, ABSOLUTE = 0.02, 0.02

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d*)?"
                     r"(?:[eE][-+]?\d+)?(?![\w.]*\d)(?:\s*%)?|\b(?:nan|inf)\b")


def _split(text):
    "The text between the numbers, each run of white space as one space, and the numbers."
    words = [re.sub(r"\s+|-{3,}", " ", part).strip() for part in _NUMBER.split(text)]
    return words, _NUMBER.findall(text)


def _close(a, b, tolerance):
    "Counts must be equal; measured numbers, with a point, an exponent or a percent sign, close."
    if a == b: return True
    a, b = a.replace(",", ""), b.replace(",", "")
    if all(re.fullmatch(r"[-+]?\d+", x) for x in (a, b)): return int(a) == int(b)
    scale = 100 if "%" in a + b else 1
    a, b = (float(x.rstrip("% \n")) / scale for x in (a, b))
    return abs(a - b) <= tolerance + RELATIVE * max(abs(a), abs(b))


def same_text(
    stored: str,
    fresh: str,
    tolerance: float = ABSOLUTE, # of a number, beside the relative one; percents count as shares
) -> bool:
    "Are the words equal and the numbers close?"
    (words, numbers), (other_words, other_numbers) = _split(stored), _split(fresh)
    return words == other_words and all(
        _close(a, b, tolerance) for a, b in zip(numbers, other_numbers))


def texts(outputs) -> list[tuple[str, str]]:
    "The text that a cell shows: all that it printed, then each text of what it displayed."
    join = lambda text: re.sub("<_?Figure size .*?>", "<Figure>",   # depends on the fonts
                               text if isinstance(text, str) else "".join(text))
    printed = "".join(join(o["text"]) for o in outputs
                      if o["output_type"] == "stream" and o["name"] == "stdout")
    shown = [(kind, join(text)) for o in outputs for kind, text in sorted(o.get("data", {}).items())
             if kind in ("text/plain", "text/markdown", "text/html")]
    return [("stdout", printed), *shown]


def differences(
    stored,  # a notebook, as committed
    fresh,   # the same, executed; it is cleaned as a committed notebook is
    options, # cell → the options at its top
) -> list[tuple[str, str]]:
    "Cells that a reader would find to be different, by id, and how."
    clean_nb(fresh)
    found = []
    for old, new in zip(stored["cells"], fresh["cells"], strict=True):
        if old["cell_type"] != "code" or "varies" in options(old): continue
        tolerance = options(old).get("tolerance", ABSOLUTE)
        old_texts, new_texts = texts(old["outputs"]), texts(new.get("outputs", []))
        if [kind for kind, _ in old_texts] != [kind for kind, _ in new_texts]:
            found.append((old["id"], f"cell {old['id']} shows {[k for k, _ in new_texts]}, "
                                     f"stored are {[k for k, _ in old_texts]}"))
            continue
        found += [(old["id"], f"cell {old['id']}, {kind}, stored:\n{a}\nfresh:\n{b}")
                  for (kind, a), (_, b) in zip(old_texts, new_texts)
                  if not same_text(a, b, tolerance)]
    return found
