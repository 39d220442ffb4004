"""A timeline as Trace Event JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

The schedule is one process, whose group Perfetto opens at once. Each rank is a thread of it, and a second one where there
are overlapped pairs, since slices of one track must not overlap: `rank 3`, and `rank 3, pair`, where the backward of a pair
stands beside its forward. Arrows are the hand-overs between ranks, counters show the activations that each rank holds. One
unit of simulated time is written as one millisecond.

Source: Trace Event Format (Google, 2016), phases M, X, C, s and f.
"""

import json
import os
from pathlib import Path

from minids.pipeline.action import Schedule
from minids.pipeline.draw import TITLES, WORDS
from minids.pipeline.simulate import Timeline, gives, needs

PROCESS = 1
MICROSECONDS = 1000  # of trace time for one unit of simulated time
COLOURS = {"F": "thread_state_runnable", "B": "good", "I": "thread_state_running", "W": "thread_state_iowait"}


def trace_events(timeline: Timeline) -> dict:
    """The whole trace as what json.dump writes: metadata, complete slices (X), counters (C), flows (s, f)."""
    schedule = timeline.schedule
    events: list[dict] = []
    senders: dict[tuple, tuple[int, int, float]] = {}  # output -> rank, track, moment of its slice's end
    arrivals: list[tuple[tuple, int, int, float]] = []
    events.append(metadata("process_name", 0, name=process_name(schedule)))
    for rank, cells in enumerate(timeline.cells):
        tracks = 1 + any(cell.action.kind == "FB" for cell in cells)
        for track, name in enumerate((f"rank {rank}", f"rank {rank}, pair")[:tracks]):
            events.append(metadata("thread_name", thread(rank, track), name=name))
            events.append(metadata("thread_sort_index", thread(rank, track), sort_index=thread(rank, track)))
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


def process_name(schedule: Schedule) -> str:
    return f"{TITLES.get(schedule.name, schedule.name)}, {schedule.micro_batches} micro-batches"


def thread(rank: int, track: int) -> int:
    """A number for the track: tens are ranks, so that the numbers tell where a track belongs. 0 is left to the process."""
    return 10 * (rank + 1) + track


def metadata(name: str, tid: int, /, **values) -> dict:
    return {"ph": "M", "name": name, "ts": 0, "pid": PROCESS, "tid": tid, "args": values}


def slice_event(part, rank: int, track: int, start: float, end: float) -> dict:
    way = "'" if part.direction else ""
    return {"ph": "X", "name": f"{part.kind}{part.micro_batch}{way}", "cat": WORDS[part.kind], "pid": PROCESS,
            "tid": thread(rank, track),
            "ts": start, "dur": end - start, "cname": COLOURS[part.kind],
            "args": {"stage": part.stage, "micro_batch": part.micro_batch, "direction": part.direction}}


def counter_event(rank: int, moment: float, live: int) -> dict:
    return {"ph": "C", "name": f"activations of rank {rank}", "pid": PROCESS, "tid": thread(rank, 0), "ts": moment,
            "args": {"live": live}}


def flow_events(senders: dict, arrivals: list) -> list[dict]:
    """An arrow from the end of the action that made an output to the start of the one on another rank that needs it."""
    events = []
    for number, (key, rank, track, start) in enumerate(arrivals):
        from_rank, from_track, moment = senders[key]
        if from_rank == rank:
            continue
        flow = {"name": "gradient" if key[0] else "activation", "cat": "hand-over", "id": number}
        events.append({"ph": "s", **flow, "pid": PROCESS, "tid": thread(from_rank, from_track), "ts": moment})
        events.append({"ph": "f", "bp": "e", **flow, "pid": PROCESS, "tid": thread(rank, track), "ts": start})
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
