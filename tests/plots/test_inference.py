"""The figures of notebook 11 show what they are given: who waits for what, who owns which page, what both sides share."""

import pytest

from minids import plots


def texts(fig):
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def test_the_longer_time_is_drawn_in_full_colour():
    fig = plots.compute_or_read({"a": (0.2, 0.1), "b": (0.001, 0.004)})
    alphas = [bar.get_alpha() for bar in fig.axes[0].patches]
    assert alphas == [1.0, 0.35, 0.35, 1.0]  # computing, reading of a; of b
    assert "reading 4 ms" in texts(fig)


def test_busy_slots_are_counted_over_the_whole_span():
    fig = plots.slot_timelines({"plan": [(0, 0, 10, 0), (1, 0, 5, 1)]}, slots=2, span=12)
    assert fig.axes[0].get_title(loc="left") == "plan: 10 steps, slots busy 75% of them"


def test_pages_are_filled_as_far_as_they_hold_tokens():
    fig = plots.page_table([7, None, 7], [64, 0, 16], 64, {7: [2, 0]})
    widths = [p.get_width() for p in fig.axes[0].patches]
    assert widths[:5] == pytest.approx([0.88, 0.88, 0.88, 0.88, 0.22])  # box and content of 0, box of 1, both of 2
    assert "request 7: pages" in texts(fig)


def test_what_draft_and_model_share_is_the_acceptance():
    fig = plots.rejection_rule([0.25, 0.5, 0.25, 0.0], [0.5, 0.25, 0.125, 0.125])
    labels = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert "shared: 0.625 in all, accepted" in labels
    assert [bar.get_height() for bar in fig.axes[1].patches] == pytest.approx([0, 2 / 3, 1 / 3, 0])


def test_a_slot_of_an_unknown_kind_is_an_error():
    assert "c" in texts(plots.draft_slots({"now": ["pa nb dc .", "px ry . ."]}))
    with pytest.raises(KeyError):
        plots.draft_slots({"now": ["xa"]})


def test_letters_have_the_colour_of_who_wrote_them():
    fig = plots.drafted_text("ab\nc", [0, 1, 2, 0], columns=3)
    colours = [patch.get_facecolor() for patch in fig.axes[0].patches]
    assert colours[0] == colours[3] and len(set(colours)) == 3
    assert texts(fig) == ["a", "b", "↵", "c"]
