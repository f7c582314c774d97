"""Figures show exactly what was given, look the same under any settings, and refuse bad shapes."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import same_color, to_rgb

from memformers import plots
from memformers.plots import (KINDS, PALETTE, figure, look, plot_attention, plot_bits_by_position,
                              plot_cost, plot_loss, plot_memory, plot_painted_text, plot_reach,
                              plot_recall, plot_rows, save_figure, style)

SEGMENT = ["segment"] * 4
EDGES = [0, 64, 128, 256]
STEPS = ([3., 2, 1], [2.9, 1.9, .9], [3.1, 2.1, 1.1])

# One call of each figure, with an optional `ax`.
CALLS = {
    "reach": lambda **o: plot_reach([("none", SEGMENT), ("XL", [["xl"] * 2 + SEGMENT[2:]])], **o),
    "attention": lambda **o: plot_attention(torch.eye(2, 6), ["xl"] * 4 + SEGMENT[:2], **o),
    "recall": lambda **o: plot_recall([4, 8], {"xl": [1, .5]}, {"xl": ([1, .4], [1, .6])}, .1, **o),
    "cost": lambda **o: plot_cost([512, 1024], {"xl": [1, 1], "plain": [1, 2]}, **o),
    "bits": lambda **o: plot_bits_by_position(EDGES, {"on": STEPS, "off": STEPS}, **o),
    "loss": lambda **o: plot_loss([1, 2, 3], [8, 4, 2], smooth=2, **o),
    "memory": lambda **o: plot_memory([[3, 2, 1]], [2], "age (segments)", **o),
    "rows": lambda **o: plot_rows([[1, 1, 2, np.nan]], [[0, 1, 0, 0]], **o),
    "painted": lambda **o: plot_painted_text("a b\nc", [0, 1, -2, 0, 3], **o),
}
every_figure = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


def line(ax, label):
    return next(line for line in ax.lines if line.get_label() == label)


def of_kind(ax, kind):
    "(left, width, bottom) of the rectangles in the colour of a kind."
    return [(p.get_x(), p.get_width(), p.get_y()) for p in ax.patches
            if same_color(p.get_facecolor(), PALETTE[kind])]


def drawn(ax):
    "The labels of the ticks after a drawing."
    ax.figure.canvas.draw()
    return [t.get_text() for t in ax.get_xticklabels()]


# --- the palette

def test_palette_has_a_colour_of_its_own_for_each_kind():
    wanted = {"segment", "xl", "compressed", "long_term", "retrieved", "feedback", "tokens",
              "state", "on", "off", "foreign", "shuffled", "full", "without", "chance"}
    assert wanted <= set(PALETTE)
    colors = [*PALETTE.values(), *(kind.color for kind in plots._OTHERS)]
    gaps = [np.abs(np.subtract(to_rgb(a), to_rgb(b))).max()
            for i, a in enumerate(colors) for b in colors[:i]]
    assert min(gaps) > .15


def test_a_line_takes_its_look_from_its_kind():
    fig, ax = figure()
    drawn, = ax.plot([1, 2], **look("xl", "ours"))
    assert same_color(drawn.get_color(), PALETTE["xl"]) and drawn.get_label() == "ours"
    assert (drawn.get_linestyle(), drawn.get_marker()) == (KINDS["xl"].linestyle, "s")
    with pytest.raises(ValueError, match="kind must be one of.*'cache'"): look("cache")


def test_colour_is_never_the_only_cue():
    assert len({(kind.linestyle, kind.marker) for kind in KINDS.values()}) == len(KINDS)
    assert len({kind.hatch for kind in KINDS.values()}) == len(KINDS)


# --- every figure

@every_figure
def test_draws_into_the_given_axes_and_returns_them(call):
    _, axes = figure(ncols=2)
    opened = plt.get_fignums()
    assert call(ax=axes[1]) is axes[1]
    assert not axes[0].has_data() and plt.get_fignums() == opened


@every_figure
def test_leaves_the_settings_alone(call):
    before = plt.rcParams.copy()
    call()
    assert plt.rcParams == before


@every_figure
def test_is_labelled_and_fits(call):
    ax = call()
    ax.figure.canvas.draw()
    assert ax.get_xlabel()
    whole, page = ax.figure.get_tightbbox(), ax.figure.bbox_inches
    assert whole.x0 >= -.02 and whole.y0 >= -.02
    assert whole.x1 <= page.x1 + .02 and whole.y1 <= page.y1 + .02


def test_legends_stay_in_their_panel():
    fig, (left, right) = figure(ncols=2)
    plot_attention(torch.ones(1, 4), ["long_term", "compressed", "xl", "segment"], ax=left)
    plot_recall([1, 2], {name: [1, 1] for name in ("xl", "off", "retrieved")}, chance=.1, ax=right)
    fig.canvas.draw()
    edge = right.get_tightbbox().x0
    assert left.get_legend().get_window_extent().x1 <= edge
    assert right.get_legend().get_window_extent().x1 <= fig.bbox.x1
    assert left.get_window_extent().width > .3 * edge


@pytest.mark.parametrize("name, suffix", [*((name, "png") for name in CALLS), ("recall", "svg"),
                                          ("memory", "svg")])
def test_saves_the_same_bytes_under_any_settings(name, suffix, tmp_path):
    once = save_figure(CALLS[name](), tmp_path / f"a.{suffix}").read_bytes()
    with plt.style.context(["dark_background", {"font.size": 20, "axes.grid": True,
                                                "savefig.bbox": "tight", "lines.linewidth": 5}]):
        again = save_figure(CALLS[name](), tmp_path / f"b.{suffix}").read_bytes()
    assert once == again


@pytest.mark.parametrize("name", ["attention", "bits", "loss"])
def test_is_drawn_later_as_it_was_made(name):
    def pixels(*settings):
        ax = CALLS[name]()
        with plt.style.context(settings): ax.figure.canvas.draw()
        return np.asarray(ax.figure.canvas.buffer_rgba())
    loud = {"xtick.labelsize": 20, "xtick.color": "red", "xtick.major.pad": 9,
            "xtick.major.size": 9, "ytick.major.width": 9, "ytick.direction": "in",
            "grid.color": "red", "grid.alpha": .5, "grid.linestyle": ":", "font.size": 20}
    assert (pixels("dark_background", loud) == pixels()).all()


# --- reach

def test_reach_draws_each_kind_where_it_was_given():
    ax = plot_reach([("one", ["", "xl", "xl", "segment"])])
    assert of_kind(ax, "xl") == [(-2.5, 2, 1)] and of_kind(ax, "segment") == [(-.5, 1, 1)]
    assert ax.get_xlim() == (-3.5, .5)


def test_reach_draws_the_first_layer_lowest():
    ax = plot_reach([("two", [["", "segment"], ["xl", "segment"]])])
    names = dict(zip(ax.get_yticks(), [t.get_text() for t in ax.get_yticklabels()]))
    (_, _, bottom), = of_kind(ax, "xl")
    assert names == {bottom + .4: "layer 2", bottom + 1.4: "layer 1"}
    assert ax.yaxis_inverted()


# --- attention

def test_attention_shows_the_weights_and_their_places():
    weights = torch.rand(3, 8, requires_grad=True)
    ax = plot_attention(weights, ["xl"] * 5 + SEGMENT[:3])
    image, = ax.images
    assert np.allclose(image.get_array(), weights.detach().numpy())
    assert image.get_extent() == [-7.5, .5, .5, -2.5]
    assert ax.lines[0].get_xdata()[0] == -2.5
    assert of_kind(ax, "xl")[0][:2] == (-7.5, 5) and of_kind(ax, "segment")[0][:2] == (-2.5, 3)


def test_attention_labels_keys_with_their_positions():
    ax = plot_attention(np.ones((1, 4)), ["compressed"] * 2 + SEGMENT[:2], [-40, -20, -1, 0])
    assert [label for label in drawn(ax) if label] == ["−40", "−20", "−1", "0"]
    assert "(tokens)" in ax.get_xlabel()
    assert "(slots)" in plot_attention(np.ones((1, 2)), ["long_term", "segment"]).get_xlabel()


def test_attention_over_a_segment_alone_has_no_border():
    assert not plot_attention(torch.ones(4, 4), SEGMENT).lines


def test_attention_takes_bfloat16():
    plot_attention(torch.eye(4, dtype=torch.bfloat16), SEGMENT)


# --- lines

def test_recall_draws_the_numbers_the_intervals_and_chance():
    ax = plot_recall([4, 8, 32], {"xl": [1, .5, .25]}, {"xl": ([.9, .4, .2], [1, .6, .3])}, .1)
    xl = line(ax, "XL memory")
    assert (xl.get_xydata() == [[4, 1], [8, .5], [32, .25]]).all()
    assert same_color(xl.get_color(), PALETTE["xl"])
    assert line(ax, "chance").get_ydata()[0] == .1
    corners = ax.collections[0].get_paths()[0].vertices.tolist()
    assert all([x, y] in corners for x, y in [(4, .9), (8, .4), (32, .2), (8, .6), (32, .3)])
    assert ax.get_xscale() == "log" and drawn(ax) == ["4", "8", "32"]


def test_cost_starts_at_zero_and_names_its_unit():
    ax = plot_cost([512, 16384], {"a": [3, 4]}, "MiB")
    assert (line(ax, "a").get_ydata() == [3, 4]).all()
    assert ax.get_ylim()[0] == 0 and "MiB" in ax.get_ylabel() and drawn(ax) == ["512", "16Ki"]


def test_names_take_the_look_of_their_kind_or_one_that_is_free():
    ax = plot_cost([1, 2], {"xl": [1, 1], "theirs": [1, 1], "ours": [1, 1], "more": [1, 1]},
                   kinds={"ours": "retrieved"})
    looks = {line.get_label(): line.get_color() for line in ax.lines}
    assert looks["XL memory"] == PALETTE["xl"] and looks["ours"] == PALETTE["retrieved"]
    assert len(set(looks.values())) == 4
    meaning = set(PALETTE.values()) - {PALETTE["xl"], PALETTE["retrieved"]}
    assert not meaning & {*looks.values()}   # no kind's colour for what is of no kind


def test_bits_draw_steps_between_the_edges():
    ax = plot_bits_by_position(EDGES, {"on": STEPS})
    band, steps = ax.patches
    assert steps.get_data().values.tolist() == STEPS[0]
    assert steps.get_data().edges.tolist() == EDGES
    assert band.get_data().values.tolist() == STEPS[2]
    assert band.get_data().baseline.tolist() == STEPS[1]
    assert drawn(ax) == ["0", "64", "128", "256"]
    bounds = [ax.transData.transform((edge, 1))[0] for edge in EDGES]
    assert np.ptp(np.diff(bounds)) < 1   # the bin that starts at zero is one octave wide


def test_bits_leave_a_gap_where_a_bin_is_empty():
    gap = np.array(STEPS)
    gap[:, 1] = np.nan
    ax = plot_bits_by_position([64, 128, 256, 512], {"on": gap})
    assert np.isnan(ax.patches[1].get_data().values).tolist() == [False, True, False]


def test_loss_draws_every_value_and_their_mean():
    values = np.array([8., 6, np.nan, 2, 1])
    ax = plot_loss(np.arange(5), values, smooth=3)
    raw, bold = ax.lines
    assert np.array_equal(raw.get_ydata(), values, equal_nan=True)
    assert np.allclose(bold.get_ydata(), [7, 7, 4, 1.5, 1.5])
    assert ax.get_legend() is None


@pytest.mark.parametrize("smooth", [1, 2, 7, 100])
def test_smoothing_keeps_a_constant(smooth):
    ax = plot_loss(np.arange(9), {"training": [2.] * 9, "validation": [3.] * 9}, smooth)
    assert np.allclose(line(ax, "training").get_ydata(), 2)
    assert np.allclose(line(ax, "validation").get_ydata(), 3)


# --- memory

def test_memory_shades_what_is_filled_and_hatches_the_rest():
    ax = plot_memory(torch.tensor([[9, 2, 1], [9, 9, 5]]), torch.tensor([2, 1]))
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    assert mesh.get_array().mask.tolist() == [[True, False, False], [True, True, False]]
    assert mesh.get_array().compressed().tolist() == [2, 1, 5]
    boxes = next(c for c in ax.collections if isinstance(c, PolyCollection)).get_paths()
    assert [tuple(box.vertices[0]) for box in boxes] == [(0, 0), (0, 1), (1, 1)]
    assert [t.get_text() for t in ax.texts] == ["2", "1", "5"]


def test_memory_takes_a_mask_and_may_be_empty():
    ax = plot_memory([[1., 2.]], torch.tensor([[True, False]]), names=["only"])
    assert [t.get_text() for t in ax.texts] == ["1"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["only"]
    plot_memory(np.zeros((2, 40)), [0, 0]).figure.canvas.draw()


# --- rows of a batch

def test_rows_draw_a_stretch_for_each_document_and_a_mark_where_it_counts():
    counted = torch.zeros(2, 6, dtype=torch.bool)
    counted[1, 4] = True
    ax = plot_rows([[7, 7, np.nan, 7, 3, 3], [5] * 6], counted)
    stretches = [(p.get_x(), p.get_width(), round(p.get_y())) for p in ax.patches]
    assert stretches == [(0, 2, 0), (3, 1, 0), (4, 2, 0), (0, 6, 1)]
    shades = [p.get_facecolor() for p in ax.patches]
    assert len(set(shades[:3])) == 3 and shades[3] == shades[0]
    assert [path.vertices[0, 0] for path in ax.collections[0].get_paths()] == [4.5]
    with pytest.raises(ValueError, match="counted"): plot_rows([[1, 2]], [[True]])


# --- painted text

def painted(ax):
    "The letters, each with its place and the number behind it."
    grid = next(c for c in ax.collections if isinstance(c, QuadMesh)).get_array()
    grid = np.ma.getdata(grid).reshape(len(grid), -1)
    return [(t.get_text(), int(t.get_position()[1]), int(t.get_position()[0]),
             grid[int(t.get_position()[1]), int(t.get_position()[0])]) for t in ax.texts]


def test_painted_text_keeps_each_number_behind_its_letter():
    ax = plot_painted_text("ab c\nd\te$", [1, -2, 3, 4, 5, 6, 7, 8, 9], width=3)
    assert painted(ax) == [("a", 0, 0, 1), ("b", 0, 1, -2), ("·", 0, 2, 3), ("c", 1, 0, 4),
                           ("↵", 1, 1, 5), ("d", 2, 0, 6), ("→", 2, 1, 7), ("e", 2, 2, 8),
                           ("$", 3, 0, 9)]


def test_painted_text_is_blue_above_zero_and_orange_below():
    ax = plot_painted_text("+0-", [4, 0, -4])
    cells = next(c for c in ax.collections if isinstance(c, QuadMesh))
    colors = [cells.to_rgba(x) for x in (4, 0, -4)]
    for color, want in zip(colors, (PALETTE["segment"], "white", PALETTE["xl"])):
        np.testing.assert_allclose(color[:3], to_rgb(want), atol=.01)
    low, high = cells.get_clim()
    assert low == -high, "zero is white"


def test_painted_bytes_need_not_be_text():
    data = "aß€".encode() + b"\xff\xe2\x82" + b"z\x00"
    ax = plot_painted_text(data, range(len(data)), start=7)
    assert [(letter, value) for letter, _, _, value in painted(ax)] == \
        [("a", 0), ("ß", 1 + 2), ("€", 3 + 4 + 5), ("�", 6), ("�", 7), ("�", 8), ("z", 9), ("�", 10)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["7"]


def test_painted_tokens_of_several_letters_are_painted_whole():
    ax = plot_painted_text(["hel", "lo\n", "you"], [1, 2, 3], start=10)
    assert [value for *_, value in painted(ax)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["10", "12"]


@pytest.mark.filterwarnings("error")
def test_painted_letters_that_the_font_lacks_are_told():
    ax = plot_painted_text("a漢b", [1, 2, 3])
    assert [letter for letter, *_ in painted(ax)] == ["a", "�", "b"]
    ax.figure.canvas.draw()


def test_a_few_large_numbers_do_not_pale_the_others():
    values = np.ones(200)
    values[7] = 100
    ax = plot_painted_text("x" * 200, values)
    assert next(c for c in ax.collections if isinstance(c, QuadMesh)).get_clim() == (-1, 1)
    ax = plot_painted_text("x" * 200, values, limit=50)
    assert next(c for c in ax.collections if isinstance(c, QuadMesh)).get_clim() == (-50, 50)
    assert plot_painted_text("xy", [0, 0]).collections, "nothing to paint is no error"


# --- titles, and what a notebook keeps

@every_figure
def test_title_stands_above_everything(call):
    ax = call(title="What to see")
    ax.figure.canvas.draw()
    title = ax.figure._suptitle
    assert title.get_text() == "What to see"
    parts = [ax.get_legend(), ax.xaxis, ax.yaxis]
    boxes = [part.get_tightbbox() for part in parts if part]
    assert title.get_window_extent().y0 >= max(box.y1 for box in boxes) - 1
    assert title.get_window_extent().x1 <= ax.figure.bbox.x1


@every_figure
def test_title_of_a_panel_stands_above_its_legend(call):
    _, axes = figure(ncols=2, height=3.2)
    ax = call(ax=axes[1], title="One panel")
    ax.figure.canvas.draw()
    assert ax.get_title(loc="left") == "One panel"
    if ax.get_legend():
        assert ax._left_title.get_window_extent().y0 >= ax.get_legend().get_window_extent().y1 - 1


def kept(ax, monkeypatch):
    "What a notebook keeps of a figure, and the sizes that go with it."
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata:
                        shown.append((data, metadata)))
    ax.figure._ipython_display_()
    return shown[0]


@every_figure
def test_notebook_keeps_the_same_small_svg(call, monkeypatch):
    data, _ = kept(call(title="t"), monkeypatch)
    with plt.style.context(["dark_background", {"font.size": 20, "svg.hashsalt": "other"}]):
        again, _ = kept(call(title="t"), monkeypatch)
    assert data == again and set(data) == {"image/svg+xml", "text/plain"}
    svg = data["image/svg+xml"]
    assert svg.startswith("<svg") and "dc:date" not in svg and matplotlib.__version__ not in svg
    assert len(svg.encode()) <= 100_000


def test_notebook_keeps_a_large_figure_as_png(monkeypatch):
    values = np.zeros(2000)
    data, size = kept(plot_painted_text("abcde fgh\n" * 200, values), monkeypatch)
    assert set(data) == {"image/png", "text/plain"} and size["image/png"]["width"] > 50


def test_style_ends_where_it_should():
    before = plt.rcParams.copy()
    with style(): assert plt.rcParams["svg.hashsalt"] == "memformers"
    assert plt.rcParams == before


# --- saving

def test_saving_makes_folders_and_closes(tmp_path):
    fig, axes = figure(ncols=2)
    path = save_figure(fig, tmp_path / "new" / "folder" / "a.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and not plt.get_fignums()


def test_saved_pictures_carry_no_date_and_no_version(tmp_path):
    svg = save_figure(CALLS["cost"](), tmp_path / "a.svg").read_text()
    png = save_figure(CALLS["cost"](), tmp_path / "a.png").read_bytes()
    assert "dc:date" not in svg and matplotlib.__version__ not in svg
    assert b"Software" not in png


# --- refusals

@pytest.mark.parametrize("call, words", [
    (lambda: plot_reach([]), "views"),
    (lambda: plot_reach(SEGMENT), r"views.*\(name, kinds\)"),
    (lambda: plot_reach([("a", SEGMENT), ("b", SEGMENT[1:])]), r"\[3, 4\]"),
    (lambda: plot_reach([("a", [SEGMENT, SEGMENT[1:]])]), "kinds of 'a'"),
    (lambda: plot_reach([("a", ["cache"])]), "'a'.*cache"),
    (lambda: plot_attention(np.ones((2, 2, 4)), SEGMENT), r"\(queries, keys\).*\(2, 2, 4\).*\[0\]"),
    (lambda: plot_attention(np.ones((0, 4)), SEGMENT), r"weights.*\(0, 4\)"),
    (lambda: plot_attention(np.ones((2, 4)), SEGMENT[1:]), "kinds.*4.*3"),
    (lambda: plot_attention(np.ones((2, 4)), SEGMENT, [1, 2]), r"positions.*\(4\).*\(2,\)"),
    (lambda: plot_attention(np.ones((1, 2)), ["segment", "xl"]), "segment last"),
    (lambda: plot_recall([4, 8], {"xl": [1, .5, .2]}), r"accuracy\['xl'\].*\(2\).*\(3,\)"),
    (lambda: plot_recall([4, 8], {"xl": [100, 50]}), "between 0 and 1.*100"),
    (lambda: plot_recall([4, 8], [1, .5]), "accuracy.*dictionary.*list"),
    (lambda: plot_recall([4, 8], np.ones(2)), "accuracy.*dictionary.*ndarray"),
    (lambda: plot_recall([4, 8], {}), "accuracy.*{}"),
    (lambda: plot_recall([0, 8], {"xl": [1, 1]}), "distances.*> 0"),
    (lambda: plot_recall([8, 4], {"xl": [1, 1]}), "distances.*larger"),
    (lambda: plot_recall([4, 8], {"xl": [1, 1]}, {"off": 0}), "intervals.*'xl'.*'off'"),
    (lambda: plot_recall([4, 8], {"xl": [1, 1]}, {"xl": [0, 1]}), r"intervals.*\(2, 2\)"),
    (lambda: plot_cost([], {"xl": []}), "contexts"),
    (lambda: plot_cost(["a"], {"xl": [1]}), "contexts.*numbers"),
    (lambda: plot_cost([1], {"xl": [1]}, kinds={"xl": "cache"}), r"kinds\['xl'\].*cache"),
    (lambda: plot_bits_by_position([0], {"on": STEPS}), "edges.*2 or more"),
    (lambda: plot_bits_by_position([-1, 2], {"on": STEPS}), "edges.*≥ 0"),
    (lambda: plot_bits_by_position(EDGES, {"on": STEPS[0]}), r"series\['on'\].*\(3, 3\).*\(3,\)"),
    (lambda: plot_loss([1, 2], [3, 2, 1]), r"bits\['training'\].*\(2\).*\(3,\)"),
    (lambda: plot_loss([1, 2], [3, 2], smooth=0), "smooth.*0"),
    (lambda: plot_memory(np.ones(3), [1]), r"slots.*\(rows, slots\).*\(3,\)"),
    (lambda: plot_memory(np.ones((2, 3)), [1]), r"fill.*\(2\).*\(1,\)"),
    (lambda: plot_memory(np.ones((2, 3)), [1, 4]), "fill.*between 0 and 3"),
    (lambda: plot_memory(np.ones((2, 3)), np.ones((2, 2))), r"fill.*\(2, 3\).*\(2, 2\)"),
    (lambda: plot_memory(np.ones((1, 3)), [1], names=["a", "b"]), "names.*1.*2"),
    (lambda: plot_memory(np.ones((1, 3)), [1], kind="cache"), "kind.*cache"),
    (lambda: plot_painted_text("abc", [1, 2]), "values.*3.*2"),
    (lambda: plot_painted_text("", []), r"values.*\(tokens\)"),
    (lambda: plot_painted_text("a", [1], width=0), "width.*0"),
    (lambda: plot_painted_text("a", [1], limit=0), "limit.*0"),
    (lambda: save_figure("figure", "a.png"), "axes.*str"),
    (lambda: save_figure(plt.figure(), "a.pdf"), "path.*a.pdf"),
])
def test_refuses_what_it_cannot_draw_and_says_why(call, words):
    opened = plt.get_fignums()
    with pytest.raises(ValueError, match=words): call()
    assert len(plt.get_fignums()) <= len(opened) + ("pdf" in words)   # nothing half-drawn is shown
