"""Pictures, traces and the command: what is in the files, not only that there are some."""

import json
import re
from collections import Counter, defaultdict

import pytest

from minids.cli import main
from minids.pipeline import NAMES, build_schedule
from minids.pipeline.draw import PALETTE, blend, colour, ink_on, legend_of, paint, picture, shades
from minids.pipeline.poster import compare, poster, poster_picture
from minids.pipeline.simulate import Timeline
from minids.pipeline.trace import trace_events


def written_numbers(fig):
    return [text.get_text() for ax in fig.axes for text in ax.texts]


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_for_every_part_with_its_number(name):
    schedule = build_schedule(name, ranks=4, micro_batches=8)
    parts = [part for row in schedule.actions for action in row for part in action.parts()]
    fig = picture(schedule.simulate())
    assert Counter(written_numbers(fig)) == Counter(str(part.micro_batch) for part in parts)
    rows, cells, borders = fig.axes[0].collections
    assert len(rows.get_paths()) == 4 and len(cells.get_paths()) == len(parts)
    assert len(borders.get_paths()) == sum(action.kind == "FB" for row in schedule.actions for action in row)


def test_cells_stand_where_the_clock_says():
    timeline = build_schedule("dualpipe", ranks=4, micro_batches=8).simulate(fb=2)
    cells = picture(timeline).axes[0].collections[1].get_paths()
    drawn = {(round(float(p.vertices[:, 0].min()), 6), round(float(p.vertices[:, 0].max()), 6), int(p.vertices[:, 1].min()))
             for p in cells}  # fmt: skip
    assert drawn == {(cell.start, cell.end, rank) for rank, row in enumerate(timeline.cells) for cell in row}
    heights = Counter(round(float(p.vertices[:, 1].max() - p.vertices[:, 1].min()), 2) for p in cells)
    pairs = sum(action.kind == "FB" for row in timeline.schedule.actions for action in row)
    assert heights[0.44] == 2 * pairs > 0  # the halves of split cells


def lightness(rgb):
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def test_ways_and_kinds_can_be_told_apart_in_greyscale():
    """Light and dark ways are apart by 0.15 at least, kinds of one way by 0.05, and numbers have contrast 4 or more."""
    light, dark = ([lightness(blend(*PALETTE[kind], way)) for kind in "FIBW"] for way in (0, 1))
    assert min(light) > max(dark) + 0.15
    for row in (light, dark):
        assert all(a > b + 0.05 for a, b in zip(row, row[1:], strict=False))
    for kind in PALETTE:
        for way in (0, 1):
            rgb = blend(*PALETTE[kind], way)
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
            ink = 1.0 if ink_on(rgb) == "white" else 0.016
            one, two = sorted((lightness(linear) + 0.05, ink + 0.05))
            assert two / one > 4


def test_directions_and_rounds_have_their_own_shade():
    schedule = build_schedule("dualpipe", ranks=4, micro_batches=8)
    assert shades(schedule) == {(d, s): float(d) for d in (0, 1) for s in range(4)}
    assert colour(schedule.actions[0][0], shades(schedule)) != colour(schedule.actions[3][0], shades(schedule))
    v = build_schedule("zbv", ranks=4, micro_batches=8)
    assert [shades(v)[0, s] for s in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    three = build_schedule("interleaved_1f1b", ranks=2, micro_batches=4, chunks=3)
    assert [shades(three)[0, s] for s in range(6)] == [0, 0, 0.5, 0.5, 1, 1]
    labels = [entry.get_label() for entry in legend_of(three.simulate())]
    assert "forward, round 2" in labels and "overlapped pair, one border" not in labels
    assert "weight gradient, up the V" in [entry.get_label() for entry in legend_of(v.simulate())]


@pytest.mark.parametrize("suffix,start", [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_files_are_whole_and_the_same_each_time(tmp_path, suffix, start):
    schedule = build_schedule("dualpipe", ranks=4, micro_batches=8)
    files = [schedule.draw(tmp_path / f"{k}{suffix}") for k in range(2)]
    assert all(file.read_bytes().startswith(start) for file in files)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"0{suffix}", f"1{suffix}"]  # no temporary file is left


def test_svg_text_stays_text(tmp_path):
    schedule = build_schedule("dualpipe", ranks=8, micro_batches=20)
    svg = schedule.draw(tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "DualPipe, 8 ranks, 20 micro-batches: makespan 66, bubble 6 (9.1%)" in svg
    assert len(re.findall(r"<text", svg)) > sum(len(a.parts()) for row in schedule.actions for a in row)


def test_numbers_are_left_out_where_they_do_not_fit(tmp_path):
    timeline = build_schedule("1f1b", ranks=2, micro_batches=300).simulate()
    assert written_numbers(picture(timeline, width=6)) == []
    assert picture(build_schedule("1f1b", ranks=2, micro_batches=4000).simulate()).get_figwidth() <= 41


def test_bad_paths_are_refused_before_work(tmp_path):
    schedule = build_schedule("gpipe", ranks=2, micro_batches=2)
    with pytest.raises(ValueError, match="f, b and w must not all be 0"):
        schedule.draw(tmp_path / "a.svg", f=0, b=0, w=0)
    with pytest.raises(ValueError, match="must end in .svg, .png, .pdf"):
        schedule.draw(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="the folder .* does not exist"):
        schedule.draw(tmp_path / "no" / "a.svg")


def test_poster(tmp_path):
    timelines = compare(8, 24)
    fig = poster_picture(timelines)
    assert len(fig.axes) == 7
    words = [text.get_text() for text in fig.texts]
    assert any("bubble 6 of 78 (7.7%)\nactivations 9\nparameters 2x" == word for word in words)
    widths = {name: ax.get_position().width for name, ax in zip(timelines, fig.axes, strict=True)}
    assert widths["gpipe"] / widths["zbv"] == pytest.approx(93 / 75.5)  # one time axis
    assert poster(tmp_path / "p.svg", ranks=4, micro_batches=8).exists()


def test_paint_into_given_axes():
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    paint(ax, build_schedule("gpipe", ranks=2, micro_batches=2).simulate(), inch=0.3, numbers=False)
    assert not ax.texts and ax.get_xlim() == (0, 9)


# ---- trace -----------------------------------------------------------------------------------------------------------


# Trace Event Format: what an event of each phase must have besides ph, ts, pid and tid, and what it may have.
FIELDS = {
    "M": ({"name", "args"}, set()),
    "X": ({"name", "cat", "dur"}, {"args", "cname"}),
    "C": ({"name", "args"}, set()),
    "s": ({"name", "cat", "id"}, set()),
    "f": ({"name", "cat", "id", "bp"}, set()),
}
METADATA = {"process_name": str, "thread_name": str, "thread_sort_index": int}


def trace_of(name: str, **times) -> tuple[Timeline, list[dict]]:
    """A timeline, and its events as a reader of the file sees them."""
    timeline = build_schedule(name, ranks=4, micro_batches=8).simulate(**times)
    trace = json.loads(json.dumps(trace_events(timeline), allow_nan=False))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    return timeline, trace["traceEvents"]


@pytest.mark.parametrize("name", NAMES)
def test_trace_events_have_the_fields_of_their_phase(name):
    for event in trace_of(name, comm=0.25)[1]:
        required, allowed = FIELDS[event["ph"]]
        common = {"ph", "ts", "pid", "tid"}
        assert required | common <= event.keys() <= required | allowed | common
        assert type(event["pid"]) is int and type(event["tid"]) is int and event["ts"] >= 0
        assert isinstance(event["name"], str) and event["name"]
        assert event.get("dur", 1) > 0
        if event["ph"] == "M":
            (value,) = event["args"].values()
            assert isinstance(value, METADATA[event["name"]])
        if event["ph"] == "C":
            assert all(type(value) is int and value >= 0 for value in event["args"].values())


@pytest.mark.parametrize("name", NAMES)
def test_every_track_of_a_trace_has_a_name_and_no_overlap(name):
    timeline, events = trace_of(name)
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert tracks.keys() == names.keys() and len(set(names.values())) == len(names)
    for slices in tracks.values():
        slices.sort()
        assert all(a[1] <= b[0] for a, b in zip(slices, slices[1:], strict=False))
    assert sum(map(len, tracks.values())) == sum(len(a.parts()) for row in timeline.schedule.actions for a in row)
    pairs = any(action.kind == "FB" for row in timeline.schedule.actions for action in row)
    assert len(names) == (8 if pairs else 4)


@pytest.mark.parametrize("name, hops", [("1f1b", 3), ("dualpipe", 3), ("dualpipe_v", 6)])
def test_arrows_of_a_trace_join_slices_of_two_ranks(name, hops):
    _, events = trace_of(name, comm=0.25)
    slices = [event for event in events if event["ph"] == "X"]
    flows = defaultdict(list)
    for event in events:
        if event["ph"] in "sf":
            flows[event["id"]].append(event)
    assert len(flows) == 2 * hops * 8  # hand-overs between ranks: hops of a micro-batch one way
    for start, finish in flows.values():
        assert (start["ph"], finish["ph"], finish["bp"]) == ("s", "f", "e")
        assert start["ts"] < finish["ts"] and (start["name"], start["cat"]) == (finish["name"], finish["cat"])
        ends = [next(s for s in slices if s["tid"] == e["tid"] and s["ts"] <= e["ts"] < s["ts"] + s["dur"])
                for e in (start, finish)]  # fmt: skip
        assert ends[0]["tid"] // 10 != ends[1]["tid"] // 10
        assert ends[0]["args"]["micro_batch"] == ends[1]["args"]["micro_batch"]
        step = ends[1]["args"]["stage"] - ends[0]["args"]["stage"]
        assert step == (1 if start["name"] == "activation" else -1)


def test_counters_of_a_trace_are_the_activations_held():
    timeline, events = trace_of("dualpipe")
    for rank in range(4):
        held = [e["args"]["live"] for e in events if e["ph"] == "C" and e["name"] == f"activations of rank {rank}"]
        assert max(held) == timeline.peak_activations[rank] and held[-1] == 0


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_both_files(tmp_path, capsys):
    main(["schedule", "dualpipe", "--ranks", "8", "--micro-batches", "20", "--out", str(tmp_path / "d.svg"),
          "--chrome-trace", str(tmp_path / "t.json")])  # fmt: skip
    out = capsys.readouterr().out
    assert "makespan 66, bubble 6 (9.1%)" in out and "by the papers' formula 6, by the clock 6\n" in out
    assert "the formula assumes" not in out
    row = next(line.split() for line in out.splitlines() if line.startswith("   0"))
    assert row == ["0", "60", "6", "9.1%", "9", "2x"]
    assert (tmp_path / "d.svg").stat().st_size > 50_000
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_the_command_says_when_a_formula_does_not_apply(capsys):
    main(["schedule", "zb1p", "--ranks", "4", "--micro-batches", "8", "--b", "2.5", "--w", "1.5"])
    out = capsys.readouterr().out
    assert "formula 1.5, by the clock 3" in out
    assert "the formula assumes: W must not exceed F and B - W: W = 1.5, F = 1" in out
    main(["schedule", "1f1b", "--ranks", "4", "--micro-batches", "8", "--comm", "0.5"])
    assert "the formula assumes: hand-overs must be free, they take 0.5" in capsys.readouterr().out
    main(["schedule", "dualpipe_v", "--ranks", "4", "--micro-batches", "8"])
    assert "assumes" not in capsys.readouterr().out


def test_all_draws_the_poster(tmp_path, capsys):
    main(["schedule", "all", "--ranks", "4", "--micro-batches", "10", "--out", str(tmp_path / "all.png")])
    out = capsys.readouterr().out
    assert "interleaved_1f1b does not accept 4 ranks with 10 micro-batches" in out
    assert "dualpipe         bubble 2 of 32" in out
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments,message", [
    (["dualpipe", "--ranks", "7"], "ranks must be even for dualpipe, got 7"),
    (["dualpipe", "--micro-batches", "14"], "an even number of at least 16, got 14"),
    (["nope"], "allowed: gpipe"), (["gpipe", "--out", "x.jpg"], "must end in .svg, .png, .pdf"),
    (["gpipe", "--out", "no/such/x.svg"], "does not exist"), (["gpipe", "--chrome-trace", "x.txt"], "must be a .json file"),
    (["gpipe", "--w", "3"], "w must not exceed b"), (["gpipe", "--f", "-1"], "f must be a time of at least 0, got -1"),
    (["gpipe", "--f", "nan"], "f must be a time"), (["gpipe", "--f", "0", "--b", "0", "--w", "0"], "must not both be 0"),
    (["gpipe", "--comm-mode", "x"], "comm_mode must be one of"), (["all", "--chunks", "2"], "all draws a poster"),
    (["gpipe", "--chunks", "2"], "chunks is for interleaved_1f1b"),
])  # fmt: skip
def test_bad_input_ends_with_status_2_and_says_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["schedule", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err
