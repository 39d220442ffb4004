"""Replicas onto GPUs so that the busiest GPU has little to do: the packing inside EPLB [V3 section 3.4].

An expert with r_e replicas gives each of them load_e / r_e. GPU g holds a set of S experts, held[g, e] in {0, 1}:

    minimise  max_g  sum_e held[g, e] * load_e / r_e,      r_e = sum_g held[g, e] >= 1,      sum_e held[g, e] = S

As a set holds nothing twice, neither does a GPU: two replicas of one expert on one GPU would split no work and waste a
slot. Such a placement exists if and only if S <= E, so replication stops at r_e = G. With S >= E there is a perfect one:
all GPUs alike.

The problem is NP-hard, so:

1. *Replicate* the expert whose replicas are heaviest, load / r, until the slots are full.
2. *Pack* replicas, heaviest first, each onto the emptiest GPU with a free slot that lacks this expert. Where every GPU
   with a free slot has it, one step of repair makes room: let g have a free slot and hold e, and h be full without e
   (h exists while fewer than G replicas of e are placed). h has more experts than g, so some y is on h and not on g: y
   moves to g, e takes its place.
3. *Improve* by the best single move until none helps: two GPUs swap experts, or a GPU replaces one replica by another
   expert's. Progress is measured by sum_g load_g^16, close to the maximum but still moving when several GPUs share it.
4. *Shake* by a few random moves and improve again, a fixed number of times with a fixed seed: same input, same placement.
   Longer while the plain greedy, without the ban, would still be better; where it doubles replicas that can remain so:
   with loads 12, 5, 1, 0 on two GPUs of three slots it reaches 9, and no placement without doubles less than 9.5.

Greedy alone is the well-known part (1 and 2, without the ban). Steps 3 and 4 are ours: the ban costs balance, since a
greedy packer that doubles replicas dodges hard choices; searching wins that back and more.

Simplification: a replica's share is load_e / r_e exactly; in service a dispatcher spreads tokens only nearly evenly.

Shapes: E experts, G GPUs, S slots a GPU. Loads are float64 in any unit.
"""

import numpy as np

Move = list[tuple[int, int, int]]  # (GPU, expert that leaves, expert that comes): one entry, or two for a swap

CLOSE = 5e-3  # near enough to a bound that no placement beats
SHAKES = 24  # at most, and fewer where a step is expensive:
SHAKE_WORK = 400_000  # G * S * E of all shakes together
PATIENCE = 10  # times as many while the plain greedy is better


def replicate(load_E: np.ndarray, n_slots: int, most: int | None = None) -> np.ndarray:
    """(E,) int64 replicas, ``n_slots`` together, at most ``most`` each: one more for the heaviest load / replicas until
    the slots are full, the lowest number on ties. Needs E <= n_slots <= E * most."""
    replicas_E = np.ones(len(load_E), dtype=np.int64)
    for _ in range(n_slots - len(load_E)):
        share_E = load_E / replicas_E
        if most is not None:
            share_E[replicas_E >= most] = -1.0
        replicas_E[share_E.argmax()] += 1
    return replicas_E


def heaviest_first(share_E: np.ndarray, replicas_E: np.ndarray) -> np.ndarray:
    """(n_slots,) the expert of each replica, heaviest replicas first."""
    order_E = np.argsort(-share_E, kind="stable")
    return np.repeat(order_E, replicas_E[order_E])


def pack_greedily(load_E: np.ndarray, n_gpus: int, slots: int) -> np.ndarray:
    """(G, S) int64, experts by the plain greedy: replicate without limit, then heaviest first onto the emptiest GPU with
    a free slot, whatever it holds. It may put two replicas of an expert on a GPU; here it is the mark to beat."""
    replicas_E = replicate(load_E, n_gpus * slots)
    share_E = load_E / replicas_E
    loads_G, held = np.zeros(n_gpus), [[] for _ in range(n_gpus)]
    for expert in heaviest_first(share_E, replicas_E):
        gpu = min((g for g in range(n_gpus) if len(held[g]) < slots), key=loads_G.__getitem__)
        held[gpu].append(expert)
        loads_G[gpu] += share_E[expert]
    return np.array(held)


def busiest_load(load_E: np.ndarray, expert_GS: np.ndarray) -> float:
    """The load of the busiest GPU, given the experts on each."""
    return float((load_E / np.bincount(expert_GS.ravel(), minlength=len(load_E)))[expert_GS].sum(1).max())


def pack(load_E: np.ndarray, replicas_E: np.ndarray, n_gpus: int, slots: int) -> np.ndarray:
    """(G, E) bool: which GPU holds which expert. Needs replicas of at most G, G * S together."""
    share_E = load_E / replicas_E
    held_GE = np.zeros((n_gpus, len(load_E)), dtype=bool)
    for expert in heaviest_first(share_E, replicas_E):
        free_G = held_GE.sum(1) < slots
        loads_G = held_GE @ share_E
        fits_G = free_G & ~held_GE[:, expert]
        if fits_G.any():
            gpu = np.where(fits_G, loads_G, np.inf).argmin()
        else:
            gpu = _make_room(held_GE, share_E, expert, np.where(free_G, loads_G, np.inf).argmin())
        held_GE[gpu, expert] = True
    return held_GE


def _make_room(held_GE: np.ndarray, share_E: np.ndarray, expert: int, open_gpu: int) -> int:
    """Moves an expert from a full GPU without ``expert`` to ``open_gpu``, which has it, and returns the full GPU: the
    pair whose heavier GPU ends lightest."""
    loads_G = held_GE @ share_E
    there_GE = loads_G[:, None] - share_E + share_E[expert]
    here_E = loads_G[open_gpu] + share_E
    movable_GE = held_GE & ~held_GE[open_gpu] & ~held_GE[:, [expert]]
    worst_GE = np.where(movable_GE, np.maximum(there_GE, here_E), np.inf)
    full_gpu, moved = np.unravel_index(worst_GE.argmin(), worst_GE.shape)
    held_GE[full_gpu, moved], held_GE[open_gpu, moved] = False, True
    return int(full_gpu)


def busiest(held_GE: np.ndarray, load_E: np.ndarray) -> float:
    """The load of the busiest GPU."""
    return float((held_GE @ (load_E / held_GE.sum(0))).max())


def _cost(loads: np.ndarray) -> np.ndarray:
    for _ in range(4):  # to the power 16
        loads = loads * loads
    return loads


def best_swap(held_GE: np.ndarray, load_E: np.ndarray) -> tuple[float, Move]:
    """The best exchange of experts between the busiest GPU and another, and the change of sum load^16 it brings, in
    units of the busiest GPU's."""
    share_E = load_E / held_GE.sum(0)
    loads_G = held_GE @ share_E
    a = loads_G.argmax()
    share_E, loads_G = share_E / loads_G[a], loads_G / loads_G[a]
    mine_S = np.flatnonzero(held_GE[a])
    moved_SE = share_E[mine_S, None] - share_E  # what leaves a for the other GPU
    other_SGE = _cost(loads_G[None, :, None] + moved_SE[:, None, :])
    change_SGE = _cost(1 - moved_SE)[:, None, :] - 1 + other_SGE - _cost(loads_G)[None, :, None]
    allowed_SGE = (held_GE & ~held_GE[a])[None] & ~held_GE[:, mine_S].T[:, :, None]
    change_SGE[~allowed_SGE] = np.inf
    s, b, z = np.unravel_index(change_SGE.argmin(), change_SGE.shape)
    return float(change_SGE[s, b, z]), [(a, mine_S[s], z), (b, z, mine_S[s])]


def best_replacement(held_GE: np.ndarray, load_E: np.ndarray) -> tuple[float, Move]:
    """The best replacement of one replica by one of another expert, and the change of sum load^16 as above. To relieve
    the busiest GPU, either one of its experts gives a replica up or one of them gains a replica elsewhere."""
    replicas_E = held_GE.sum(0)
    loads_G = held_GE @ (load_E / replicas_E)
    mine_E, spare_E, absent_E = held_GE[loads_G.argmax()], replicas_E > 1, replicas_E < len(held_GE)
    pairs = ((spare_E & mine_E, absent_E), (spare_E, absent_E & mine_E))
    found = [_best_of(held_GE, load_E, np.flatnonzero(give), np.flatnonzero(take)) for give, take in pairs]
    return min(found, key=lambda one: one[0])


def _best_of(held_GE: np.ndarray, load_E: np.ndarray, give_Y: np.ndarray, take_Z: np.ndarray) -> tuple[float, Move]:
    """The best replacement of one of the experts ``give`` by one of ``take`` on any GPU: all replicas of the first grow
    heavier, all of the second lighter."""
    if not len(give_Y) or not len(take_Z):
        return np.inf, []
    replicas_E = held_GE.sum(0)
    share_E = load_E / replicas_E
    loads_G = held_GE @ share_E
    top = loads_G.max()
    share_E, loads_G, load_E = share_E / top, loads_G / top, load_E / top
    after_Y, after_Z = load_E[give_Y] / (replicas_E[give_Y] - 1), load_E[take_Z] / (replicas_E[take_Z] + 1)
    more_GY = held_GE[:, give_Y] * (after_Y - share_E[give_Y])
    less_GZ = held_GE[:, take_Z] * (share_E[take_Z] - after_Z)
    rest_GYZ = _cost(loads_G[:, None, None] + more_GY[:, :, None] - less_GZ[:, None, :])
    here_GYZ = _cost((loads_G[:, None] - share_E[give_Y])[:, :, None] + after_Z)
    change_GYZ = rest_GYZ.sum(0) - rest_GYZ + here_GYZ - _cost(loads_G).sum()
    change_GYZ[~(held_GE[:, give_Y, None] & ~held_GE[:, None, take_Z])] = np.inf
    g, y, z = np.unravel_index(change_GYZ.argmin(), change_GYZ.shape)
    return float(change_GYZ[g, y, z]), [(g, give_Y[y], take_Z[z])]


def _apply(held_GE: np.ndarray, move: Move) -> None:
    for gpu, out, new in move:
        held_GE[gpu, out], held_GE[gpu, new] = False, True


def improve(held_GE: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """The placement with the lightest busiest GPU met while the best move is made again and again. Every move lowers
    sum load^16, so it ends."""
    held_GE = held_GE.copy()
    best_GE, least = held_GE.copy(), busiest(held_GE, load_E)
    while True:
        change, move = min(best_swap(held_GE, load_E), best_replacement(held_GE, load_E), key=lambda found: found[0])
        if change > -1e-9:
            return best_GE
        _apply(held_GE, move)
        if (load := busiest(held_GE, load_E)) < least:
            best_GE, least = held_GE.copy(), load


def shake(held_GE: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``held`` after one to eight random swaps and replacements, which keep it a placement."""
    held_GE = held_GE.copy()
    for _ in range(rng.integers(1, 9)):
        a, b = rng.permutation(len(held_GE))[:2]
        only_a, only_b = np.flatnonzero(held_GE[a] & ~held_GE[b]), np.flatnonzero(held_GE[b] & ~held_GE[a])
        spare, absent = np.flatnonzero(held_GE[a] & (held_GE.sum(0) > 1)), np.flatnonzero(~held_GE[a])
        if rng.integers(2) and len(only_a):
            y, z = rng.choice(only_a), rng.choice(only_b)
            _apply(held_GE, [(a, y, z), (b, z, y)])
        elif len(spare):
            _apply(held_GE, [(a, rng.choice(spare), rng.choice(absent))])
    return held_GE


def search(held_GE: np.ndarray, load_E: np.ndarray, mark: float) -> np.ndarray:
    """Improves and shakes until the busiest GPU is within ``CLOSE`` of a lower bound and not above ``mark``, or the
    budget is spent; above the mark, ``PATIENCE`` times as long."""
    n_gpus, n_experts = held_GE.shape
    budget = int(np.clip(SHAKE_WORK // (held_GE.sum() * n_experts), 4, SHAKES))
    enough = max(load_E.sum(), load_E.max()) / n_gpus * (1 + CLOSE)
    rng = np.random.default_rng(0)
    best_GE = improve(held_GE, load_E)
    least = busiest(best_GE, load_E)
    for shakes in range(PATIENCE * budget):
        above = least > mark * (1 + 1e-12)
        if not above and (least <= enough or shakes >= budget):
            break
        found_GE = improve(shake(best_GE, rng), load_E)
        if (load := busiest(found_GE, load_E)) <= least:  # equal ones too: they lead off a plateau
            best_GE, least = found_GE, load
    return best_GE


def place(load_E: np.ndarray, n_gpus: int, slots: int) -> np.ndarray:
    """(G, S) int64: the experts on each GPU, in ascending order; no expert twice on a GPU unless S > E."""
    if not load_E.any():
        load_E = np.ones_like(load_E)
    load_E = load_E / load_E.max()
    if slots >= len(load_E):
        row_S = np.repeat(np.arange(len(load_E)), replicate(load_E, slots))
        return np.tile(row_S, (n_gpus, 1))
    replicas_E = replicate(load_E, n_gpus * slots, most=n_gpus)
    mark = busiest_load(load_E, pack_greedily(load_E, n_gpus, slots))
    held_GE = search(pack(load_E, replicas_E, n_gpus, slots), load_E, mark)
    return np.nonzero(held_GE)[1].reshape(n_gpus, slots)
