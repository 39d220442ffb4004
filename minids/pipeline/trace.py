"""A timeline as Trace Event JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Each rank is a process with two tracks, since slices of one track must not overlap: `computes`, and `pair`, where the
backward of an overlapped pair stands beside its forward. Arrows are the hand-overs between ranks, a counter shows the
activations in memory. One unit of simulated time is written as one millisecond.
"""

import json
import os
from pathlib import Path

from minids.pipeline.draw import TITLES, WORDS
from minids.pipeline.simulate import Timeline, gives, needs

MICROSECONDS = 1000  # of trace time for one unit of simulated time
COLOURS = {"F": "thread_state_runnable", "B": "good", "I": "thread_state_running", "W": "thread_state_iowait"}


def trace_events(timeline: Timeline) -> dict:
    """The whole trace as what json.dump writes: metadata, complete slices (X), counters (C), flows (s, f)."""
    schedule = timeline.schedule
    events: list[dict] = []
    senders: dict[tuple, tuple[int, int, float]] = {}  # output -> rank, track, moment of its slice's end
    arrivals: list[tuple[tuple, int, int, float]] = []
    for rank, cells in enumerate(timeline.cells):
        events += [
            {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}},
            {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}},
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": 0, "args": {"name": "computes"}},
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": 1, "args": {"name": "pair"}},
        ]
        live = 0
        for cell in cells:
            start, end = float(cell.start) * MICROSECONDS, float(cell.end) * MICROSECONDS
            for track, part in enumerate(cell.action.parts()):
                events.append(slice_event(part, rank, track, start, end))
                if (key := needs(part, schedule.stages)) is not None:
                    arrivals.append((key, rank, track, start))
                if (given := gives(part, schedule.stages)) is not None:
                    senders[given[0]] = (rank, track, end - min(1e-3, (end - start) / 2))
            live += cell.action.kind in ("F", "FB")
            events.append(counter_event(rank, start, live))
            live -= cell.action.kind in ("B", "W", "FB")
            events.append(counter_event(rank, end, live))
    events += flow_events(senders, arrivals)
    return {"traceEvents": events, "displayTimeUnit": "ms",
            "otherData": {"schedule": TITLES.get(schedule.name, schedule.name), "unit": "1 unit of time = 1 ms"}}


def slice_event(part, rank: int, track: int, start: float, end: float) -> dict:
    way = "'" if part.direction else ""
    return {"ph": "X", "name": f"{part.kind}{part.micro_batch}{way}", "cat": WORDS[part.kind], "pid": rank, "tid": track,
            "ts": start, "dur": end - start, "cname": COLOURS[part.kind],
            "args": {"stage": part.stage, "micro_batch": part.micro_batch, "direction": part.direction}}


def counter_event(rank: int, moment: float, live: int) -> dict:
    return {"ph": "C", "name": "activations", "pid": rank, "tid": 0, "ts": moment, "args": {"live": live}}


def flow_events(senders: dict, arrivals: list) -> list[dict]:
    """An arrow from the end of the action that made an output to the start of the one on another rank that needs it."""
    events = []
    for number, (key, rank, track, start) in enumerate(arrivals):
        from_rank, from_track, moment = senders[key]
        if from_rank == rank:
            continue
        flow = {"name": "gradient" if key[0] else "activation", "cat": "hand-over", "id": number}
        events.append({"ph": "s", **flow, "pid": from_rank, "tid": from_track, "ts": moment})
        events.append({"ph": "f", "bp": "e", **flow, "pid": rank, "tid": track, "ts": start})
    return events


def write_trace(timeline: Timeline, path: str | Path) -> Path:
    """Writes the trace whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(trace_events(timeline), separators=(",", ":")), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
