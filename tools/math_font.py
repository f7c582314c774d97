"""The site's font for mathematics: the part of STIX Math that formulas need.

    python tools/math_font.py STIXMath-Regular.otf nbs/assets/math.woff2

The original is in Debian's package fonts-stix (version 1.1.1, SIL Open Font License). Needs
fonttools and brotli. The licence asks that a changed font has another name, so it gets one.
"""
import sys

from fontTools import subset
from fontTools.ttLib import TTFont

NAME = "Memformers Math"
LETTERS = [*range(0x20, 0x7F), *range(0x391, 0x3F6), *range(0x2102, 0x2136)]
STYLED = [*range(0x1D400, 0x1D468), *range(0x1D49C, 0x1D4D0), *range(0x1D538, 0x1D56C),
          *range(0x1D670, 0x1D6A6), *range(0x1D6FC, 0x1D71C), *range(0x1D7CE, 0x1D800)]
SIGNS = [*map(ord, "\u00a0¬±·×÷\u0302\u0303\u0304\u0307\u0308‖†…′‾\u2061\u2062\u2063←↑→↓↔↦⇐⇒⇔"
             "⊂⊃⊆⊇⊕⊗⊙⊤⊥⋅⋆⋮⋯⋱⌈⌉⌊⌋⏞⏟⟨⟩⩽⩾"), *range(0x2200, 0x226C)]


def make(source, target):
    "Write the subset of `source` as WOFF2."
    font = TTFont(source)
    options = subset.Options(layout_features=["*"], name_IDs=["*"], notdef_outline=True)
    keep = subset.Subsetter(options)
    keep.populate(unicodes=LETTERS + STYLED + SIGNS)
    keep.subset(font)
    for entry in font["name"].names:
        if entry.nameID in (1, 3, 4, 16): entry.string = NAME
        if entry.nameID == 6: entry.string = NAME.replace(" ", "")
    outlines = font["CFF "].cff
    outlines.fontNames = [NAME.replace(" ", "")]
    outlines.topDictIndex[0].FullName = outlines.topDictIndex[0].FamilyName = NAME
    font.flavor = "woff2"
    font.save(target)


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    make(*sys.argv[1:])
