"""From a schedule to what one engine can execute: the same list, with the sends and receives written between the actions.

A schedule says what each rank computes. Between ranks, the result of a forward goes up to the next stage and that of a
backward (B or I) down to the one before. A rank's transfers must be posted in an order that its partners share: two ranks
that each wait for the other's message first would wait for ever, since a send may block until it is received.

The order comes from one clock. All ranks run their lists against assumed durations; each time an action ends, its send is
written into the sender's list and the receive into the receiver's at the same moment. Every rank's list is then a part of
one common sequence, in which each transfer stands behind the action that made it: nothing can wait in a circle, whatever
the real durations are. A receive is posted early and waited for by the action that needs it.

Nothing here knows torch; torch_engine.py turns the result into its actions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from minids.pipeline.action import Action, Schedule

DURATIONS = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0, "FB": 3.0}


@dataclass(frozen=True)
class Transfer:
    """``kind`` "send F", "receive F", "send B" or "receive B", by the stage that posts it."""

    kind: str
    stage: int
    micro_batch: int
    direction: int


def needs(action: Action, stages: int) -> list[tuple]:
    """Results, (kind, direction, stage, micro-batch), that must lie on the rank before the action can run."""
    found = []
    for part in action.parts():
        d, s, m = part.direction, part.stage, part.micro_batch
        if part.kind == "F" and s > 0:
            found.append(("F", d, s - 1, m))
        elif part.kind in ("B", "I") and s < stages - 1:
            found.append(("B", d, s + 1, m))
    return found


def transfers(action: Action, schedule: Schedule) -> list[tuple[int, Transfer, int, Transfer]]:
    """(sending rank, send, receiving rank, receive) for each result of the action that another rank needs."""
    found = []
    for part in action.parts():
        if part.kind == "W":
            continue
        kind, step = ("F", 1) if part.kind == "F" else ("B", -1)
        d, s, m = part.direction, part.stage, part.micro_batch
        if not 0 <= s + step < schedule.stages:
            continue
        here, there = schedule.rank_of[d, s], schedule.rank_of[d, s + step]
        if here != there:
            found.append((here, Transfer(f"send {kind}", s, m, d), there, Transfer(f"receive {kind}", s + step, m, d)))
    return found


def lower(schedule: Schedule, durations: Mapping[str, float] = DURATIONS) -> list[list[Action | Transfer]]:
    """One list a rank: the schedule's actions in its order, transfers between them.

    Raises ValueError, with the actions that wait, for a schedule in which ranks wait for each other in a circle.
    """
    lists: list[list[Action | Transfer]] = [[] for _ in range(schedule.ranks)]
    place, clock, done = [0] * schedule.ranks, [0.0] * schedule.ranks, {}
    left = sum(map(len, schedule.actions))
    while left:
        ready = []
        for rank, actions in enumerate(schedule.actions):
            if place[rank] < len(actions):
                action = actions[place[rank]]
                waits = [done.get(result) for result in needs(action, schedule.stages)]
                if None not in waits:
                    ready.append((max([clock[rank], *waits]) + durations[action.kind], rank))
        if not ready:
            stuck = [f"rank {r}: {a[place[r]]}" for r, a in enumerate(schedule.actions) if place[r] < len(a)]
            raise ValueError(f"{schedule.name}: no rank can go on: {'; '.join(stuck)}")
        end, rank = min(ready)  # actions are taken in the order in which they end
        action = schedule.actions[rank][place[rank]]
        lists[rank].append(action)
        for part in action.parts():
            if part.kind != "W":
                done["F" if part.kind == "F" else "B", part.direction, part.stage, part.micro_batch] = end
        for sender, send, receiver, receive in transfers(action, schedule):
            lists[sender].append(send)
            lists[receiver].append(receive)
        clock[rank], place[rank], left = end, place[rank] + 1, left - 1
    return lists
