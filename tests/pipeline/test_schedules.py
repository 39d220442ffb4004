"""Every schedule over the grid of sizes: valid, equal to independent constructions, and refused where it cannot exist."""

from dataclasses import replace

import pytest

from minids.pipeline import NAMES, Action, build_schedule
from minids.pipeline.dualpipe import EIGHT_STEPS, dualpipe_steps
from minids.pipeline.schedules import FAMILIES, fewest_micro_batches
from minids.pipeline.validate import ScheduleError, most_activations, validate

SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)


def allowed(name):
    """(ranks, micro-batches) of a grid: the fewest, a few more, and many."""
    family = FAMILIES[name]
    for ranks in SIZES:
        if family.even_ranks and ranks % 2:
            continue
        step, few = family.multiple(ranks), family.fewest(ranks)
        for n in sorted({few, few + step, few + 3 * step, few + 4 * ranks}):
            if n % step == 0:
                yield ranks, n


@pytest.mark.parametrize("name", NAMES)
def test_valid_on_the_whole_grid(name):
    """Placement, every action once, order, no deadlock, and memory equal to the formula."""
    for ranks, n in allowed(name):
        for chunks in (1, 2, 3) if name == "interleaved_1f1b" else (None,):
            schedule = build_schedule(name, ranks=ranks, micro_batches=n, chunks=chunks)
            validate(schedule)
            assert sum(len(a.parts()) for row in schedule.actions for a in row if a.kind != "W") == 2 * n * schedule.stages


def test_memory_formulas_are_the_papers():
    """In units of 1/ranks of the model: 1F1B PP, ZB1P PP, DualPipe PP + 1 [V3 Table 2]; GPipe all n."""
    n = 32
    for name, most in (("gpipe", n), ("1f1b", 8), ("zb1p", 8), ("zbv", 8), ("dualpipe", 9), ("dualpipe_v", 8.5)):
        timeline = build_schedule(name, ranks=8, micro_batches=n).simulate()
        assert max(timeline.peak_shares) == most
        assert set(timeline.parameter_shares) == {2 if name == "dualpipe" else 1}
    # Table 2 counts DualPipeV on PP/2 devices, of which each has PP + 1 of PP stages
    assert build_schedule("dualpipe_v", ranks=4, micro_batches=n).simulate().peak_activations == [9] * 4


def test_1f1b_by_hand():
    schedule = build_schedule("1f1b", ranks=3, micro_batches=4)
    assert [" ".join(f"{a.kind}{a.micro_batch}" for a in row) for row in schedule.actions] == [
        "F0 F1 F2 B0 F3 B1 B2 B3", "F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]  # fmt: skip


def test_the_eight_steps_have_the_papers_lengths():
    """Step counts written out again from the spec, for every rank of the paper's figure: 8 ranks, 20 micro-batches."""
    assert [step.__name__[:6] for step in EIGHT_STEPS] == [f"step_{k}" for k in range(1, 9)]
    h, n = 4, 10
    for rank in range(8):
        i = min(rank, 7 - rank)
        kinds = [[a.kind for a in step] for step in dualpipe_steps(rank, 8, 20)]
        pairs = ["FB", "FB"] * (n - 8 + i + 1)
        assert kinds[0] == ["F"] * 2 * (h - i - 1)
        assert kinds[1] == ["F", "F"] * (i + 1)
        assert kinds[2] == ["I", "W", "F"] * (h - i - 1)
        assert kinds[3] == (["F", "B", *pairs[1:]] if i == h - 1 else pairs)
        assert kinds[4] == ["B", "FB"] * (h - i - 1)
        assert kinds[5] == ["B"] * (i + 1) + ["I"] * (i + 1)
        assert kinds[6] == ["W", "I"] * (h - i - 1)
        assert kinds[7] == ["W"] * (i + 1)


def test_the_papers_figure_rank_0():
    """Row 0 of Figure 5: seven forwards before the other direction's first, which has gone through all ranks."""
    row = build_schedule("dualpipe", ranks=8, micro_batches=20).actions[0]
    assert [a.micro_batch for a in row[:8]] == [0, 1, 2, 3, 4, 5, 6, 10]
    assert " ".join(f"{a.kind}{a.micro_batch}" for a in row[8:17]) == "I10 W10 F11 I11 W11 F12 I12 W12 F13"
    assert row[17] == Action("FB", 0, 7, 0, Action("B", 7, 13, 1))


@pytest.mark.parametrize("ranks,n", [(2, 4), (4, 8), (4, 14), (8, 20), (16, 64)])
def test_dualpipe_is_its_own_mirror_image(ranks, n):
    """Rank r and rank PP-1-r do the same with directions exchanged."""

    def mirrored(action):
        half = n // 2
        other = Action(action.kind, action.stage, (action.micro_batch + half) % n, 1 - action.direction)
        return replace(other, with_=mirrored(action.with_)) if action.with_ else other

    actions = build_schedule("dualpipe", ranks=ranks, micro_batches=n).actions
    for rank in range(ranks):
        assert tuple(map(mirrored, actions[rank])) == actions[ranks - 1 - rank]


@pytest.mark.parametrize("ranks,n", [(1, 2), (2, 4), (4, 10), (8, 32)])
def test_dualpipe_v_is_half_of_dualpipe(ranks, n):
    """The lower half of DualPipe's ranks, the other direction's micro-batches taken for the same ones coming back."""

    def folded(action):
        other = Action(action.kind, action.stage, action.micro_batch % n)
        return replace(other, with_=folded(action.with_)) if action.with_ else other

    whole = build_schedule("dualpipe", ranks=2 * ranks, micro_batches=2 * n)
    half = build_schedule("dualpipe_v", ranks=ranks, micro_batches=n)
    assert tuple(tuple(map(folded, row)) for row in whole.actions[:ranks]) == half.actions


# ---- torch's own generators, where it has the schedule ---------------------------------------------------------------


TORCH_KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def torch_order(kind: str, ranks: int, n: int, chunks: int = 2):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    maker = object.__new__(getattr(schedules, kind))  # the order of actions needs sizes alone, no stages
    maker.pp_group_size, maker._n_microbatches, maker.n_local_stages = ranks, n, chunks
    maker.microbatches_per_round = ranks
    maker.num_stages = maker._num_stages = ranks * chunks
    return [maker._calculate_single_rank_operations(rank) for rank in range(ranks)]


def in_torch_words(action: Action) -> str:
    if action.kind == "FB":
        return "+".join(in_torch_words(part) for part in action.parts())
    return f"{action.stage}{action.kind}{action.micro_batch}"


def torch_words(action) -> str:
    if action.sub_actions:
        return "+".join(torch_words(part) for part in action.sub_actions)
    return f"{action.stage_index}{TORCH_KINDS[action.computation_type.name]}{action.microbatch_index}"


@pytest.mark.parametrize("name,kind,ranks,n", [
    ("zbv", "ScheduleZBVZeroBubble", 1, 3), ("zbv", "ScheduleZBVZeroBubble", 4, 7), ("zbv", "ScheduleZBVZeroBubble", 8, 40),
    ("dualpipe_v", "ScheduleDualPipeV", 1, 2), ("dualpipe_v", "ScheduleDualPipeV", 3, 7),
    ("dualpipe_v", "ScheduleDualPipeV", 8, 20), ("interleaved_1f1b", "ScheduleInterleaved1F1B", 4, 8),
    ("interleaved_1f1b", "ScheduleInterleaved1F1B", 4, 16),
])  # fmt: skip
def test_same_order_as_torch(name, kind, ranks, n):
    """Action for action, micro-batch for micro-batch."""
    ours = [list(map(in_torch_words, row)) for row in build_schedule(name, ranks=ranks, micro_batches=n).actions]
    theirs = [[torch_words(a) for a in row if a is not None] for row in torch_order(kind, ranks, n)]
    assert ours == theirs


# ---- what cannot exist -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong,message", [
    (dict(name="dualpip"), "'dualpip' is unknown; allowed: gpipe, 1f1b"),
    (dict(ranks=7), "ranks must be even for dualpipe, got 7"),
    (dict(ranks=0), "ranks must be a whole number of at least 1, got 0"),
    (dict(ranks=2.0), "ranks must be a whole number"),
    (dict(micro_batches=14), "must be an even number of at least 16, got 14"),
    (dict(micro_batches=21), "must be an even number of at least 16, got 21"),
    (dict(micro_batches=True), "micro_batches must be a whole number"),
    (dict(chunks=2), "chunks is for interleaved_1f1b alone, got 2 for dualpipe"),
    (dict(name="interleaved_1f1b", micro_batches=20), "must be a multiple of 8 of at least 8, got 20"),
    (dict(name="interleaved_1f1b", micro_batches=16, chunks=0), "chunks must be a whole number of at least 1, got 0"),
    (dict(name="zbv", micro_batches=14), "must be any number of at least 15, got 14"),
    (dict(name="dualpipe_v", micro_batches=15), "must be any number of at least 16, got 15"),
])  # fmt: skip
def test_refused_with_what_is_allowed(wrong, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(**{"name": "dualpipe", "ranks": 8, "micro_batches": 20, **wrong})


@pytest.mark.parametrize("name", NAMES)
def test_the_fewest_micro_batches_are_accepted_and_one_less_is_not(name):
    few = fewest_micro_batches(name, 4)
    build_schedule(name, ranks=4, micro_batches=few).validate()
    if few > 1:
        with pytest.raises(ValueError, match="micro_batches"):
            build_schedule(name, ranks=4, micro_batches=few - 1)


# ---- the validator finds what is wrong -------------------------------------------------------------------------------


def edited(schedule, rank, edit):
    rows = [list(row) for row in schedule.actions]
    edit(rows[rank])
    return replace(schedule, actions=tuple(map(tuple, rows)))


@pytest.mark.parametrize("name", NAMES)
def test_a_lost_or_doubled_action_is_found_wherever_it_is(name):
    schedule = build_schedule(name, ranks=4, micro_batches=8)
    for rank, row in enumerate(schedule.actions):
        for k in range(len(row)):
            with pytest.raises(ScheduleError, match="has .* F, "):
                validate(edited(schedule, rank, lambda row, k=k: row.pop(k)))
            with pytest.raises(ScheduleError, match="has .* F, "):
                validate(edited(schedule, rank, lambda row, k=k: row.insert(k, row[k])))


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_before_its_forward_is_found(name):
    """A micro-batch's backward moved to the front of its rank, or its forward to the end."""
    schedule = build_schedule(name, ranks=4, micro_batches=8)
    for rank, row in enumerate(schedule.actions):
        for k, action in enumerate(row):
            if action.kind in ("B", "I", "W"):
                with pytest.raises(ScheduleError, match="comes before its|deadlock"):
                    validate(edited(schedule, rank, lambda row, k=k: row.insert(0, row.pop(k))))
            elif action.kind == "F":
                with pytest.raises(ScheduleError, match="comes before its|deadlock"):
                    validate(edited(schedule, rank, lambda row, k=k: row.append(row.pop(k))))


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_swapped_with_its_backward_is_found(name):
    """And an input gradient with its W: every pair of actions of one micro-batch that must keep their order."""
    schedule = build_schedule(name, ranks=4, micro_batches=8)
    swaps = 0
    for rank, row in enumerate(schedule.actions):
        place = {(a.kind, a.stage, a.micro_batch): k for k, a in enumerate(row)}
        for (kind, stage, m), k in place.items():
            for after in ("B", "I") if kind == "F" else ("W",) if kind == "I" else ():
                other = place.get((after, stage, m))
                if other is None:
                    continue
                swaps += 1

                def swap(row, k=k, other=other):
                    row[k], row[other] = row[other], row[k]

                with pytest.raises(ScheduleError, match="comes before its|deadlock"):
                    validate(edited(schedule, rank, swap))
    assert swaps >= 8


def test_a_deadlock_between_ranks_is_found_and_explained():
    """Rank 0 insists on B0 before F1, rank 1 on F1 before B0: each rank's own order is fine."""
    schedule = build_schedule("gpipe", ranks=2, micro_batches=2)
    turned = edited(schedule, 0, lambda row: row.insert(1, row.pop(2)))
    with pytest.raises(ScheduleError) as caught:
        validate(turned, memory=False)
    text = str(caught.value)
    assert "rank 0, action 1, B0@stage0 waits for the gradient of micro-batch 0 from stage 1 on rank 1" in text
    assert "rank 1, action 1, F1@stage1 waits for the output of micro-batch 1 from stage 0 on rank 0" in text
    with pytest.raises(ValueError, match="stands still: rank 0"):
        turned.simulate()


def test_wrong_rank_wrong_direction_wrong_pair_and_unknown_micro_batch_are_found():
    schedule = build_schedule("dualpipe", ranks=4, micro_batches=8)
    first = schedule.actions[0][0]

    def with_first(action):
        return edited(schedule, 0, lambda row: row.__setitem__(0, action))

    with pytest.raises(ScheduleError, match="stage 1 of direction 0 belongs to rank 1, not to rank 0"):
        validate(with_first(replace(first, stage=1)))
    with pytest.raises(ScheduleError, match="belongs to rank 3"):
        validate(with_first(replace(first, direction=1)))
    with pytest.raises(ScheduleError, match="runs in both directions"):
        validate(with_first(replace(first, direction=1, stage=3)))
    with pytest.raises(ScheduleError, match="missing or unknown: .9"):
        validate(with_first(replace(first, micro_batch=9)))
    with pytest.raises(ScheduleError, match="with_ is for FB alone"):
        validate(with_first(replace(first, kind="FB")))
    with pytest.raises(ScheduleError, match="kind must be one of"):
        validate(with_first(replace(first, kind="X")))
    with pytest.raises(ScheduleError, match="must hold a B, got F"):
        validate(with_first(replace(first, kind="FB", with_=Action("F", 3, 4, 1))))
    with pytest.raises(ScheduleError, match="3 lists of actions for 4 ranks"):
        validate(replace(schedule, actions=schedule.actions[:3]))


def test_more_memory_than_the_formula_is_found():
    """1F1B with one more warm-up forward on rank 0 is valid otherwise."""
    schedule = build_schedule("1f1b", ranks=4, micro_batches=8)
    greedy = edited(schedule, 0, lambda row: row.insert(4, row.pop(5)))
    assert [a.kind for a in greedy.actions[0][:6]] == ["F", "F", "F", "F", "F", "B"]
    with pytest.raises(ScheduleError, match="rank 0 remembers 5 activations at once, the formula says 4"):
        validate(greedy)
    validate(greedy, memory=False)
    validate(replace(greedy, name="mine"))  # has no formula
    assert most_activations(schedule, 0) == 4
