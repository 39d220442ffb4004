"""Our schedules on torch.distributed's own pipelining runtime. What minids uses of torch's private pipelining is here.

`_PipelineScheduleRuntime` executes any list of actions, with receive buffers, waits, the split backward (I and W by walking
the autograd graph) and FSDP's unshard, reshard and reduce. It knows one direction only: stage 0 is first, the last is last.
DualPipe has two, so both are laid on one line of 2 S torch stages, direction 0 at 0 ... S-1 and direction 1 at S ... 2S-1:

    rank            0      1     ...    PP-1            a V: S-1 and S are neighbours on one rank
    direction 0     0      1     ...    S-1
    direction 1    2S-1   2S-2   ...     S

At the seam between S-1 and S nothing may pass. ``DirectedStage`` therefore counts first and last within its direction,
drops the local hand-over there, and keeps losses by stage and micro-batch. Micro-batches are numbered within a direction.
Stages get static metadata: torch would otherwise run one extra forward to find shapes, which the load counters would see.

Works with torch 2.11 to 2.13; where they differ the feature is looked for, not the version. The W of 2.11 is right only for
weights that enter at nodes with one output, and not twice one behind the other: true of this model, but for what
``submod.splits`` (stages.py) leaves out.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from minids.pipeline.action import Action, Schedule
from minids.pipeline.lower import Transfer, lower
from minids.pipeline.messages import route

KINDS = {
    "F": _ComputationType.FORWARD, "B": _ComputationType.FULL_BACKWARD, "I": _ComputationType.BACKWARD_INPUT,
    "W": _ComputationType.BACKWARD_WEIGHT, "FB": _ComputationType.OVERLAP_F_B,
    "send F": _ComputationType.SEND_F, "receive F": _ComputationType.RECV_F,
    "send B": _ComputationType.SEND_B, "receive B": _ComputationType.RECV_B,
}  # fmt: skip


class DirectedStage(PipelineStage):
    """A torch stage that is first and last within its own direction of ``period`` stages.

    ``module`` has ``current``, which is set to the micro-batch (numbered within the direction) before its forward, and
    ``feed``, whose entries' ``tokens`` the first stage reads; ``splits`` is False where torch cannot part I from W.
    ``after_gradients`` is called when weights got gradients.
    """

    def __init__(self, module: nn.Module, index: int, period: int, count: int, device: torch.device, inputs: Tensor,
                 outputs: Tensor, group: dist.ProcessGroup | None, after_gradients: Callable[[], None]):  # fmt: skip
        self.period = period
        super().__init__(module, index, count, device, input_args=inputs, output_args=outputs, group=group)
        self.after_gradients = after_gradients
        self.kept_graphs: dict[int, list[GradientEdge]] = {}  # micro-batches between their I and their W

    @property
    def is_first(self) -> bool:
        return self.stage_index % self.period == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index % self.period == self.period - 1

    def forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, **options):
        self.submod.current = fwd_chunk_id
        args = (self.submod.feed[fwd_chunk_id].tokens,) if self.is_first else args
        # Not None: torch 2.11 compares a first stage's inputs with its metadata, and asks how many kwargs there are.
        return super().forward_one_chunk(fwd_chunk_id, args, kwargs or {}, **options)

    def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
        full_backward = full_backward or not self.submod.splits
        if not full_backward and not self.is_first:
            # I cuts the graph off its output, and W starts at nodes inside. In torch 2.11 a node of a Python
            # autograd.Function (the losses, norms) is owned by the nodes above it alone: what torch's split holds of it
            # would be an empty shell by then. An edge at the output owns all that is below, in any version.
            outputs = [loss] if self.is_last else self.fwd_cache[bwd_chunk_id][0]
            self.kept_graphs[bwd_chunk_id] = [get_gradient_edge(t) for t in outputs if t.requires_grad]
        super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)
        if full_backward:
            self.after_gradients()

    def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):
        if not self.submod.splits:
            return  # its I was the whole backward
        if self.is_first and self.stage_index:
            # A first stage has no input to differentiate: its I did nothing, its W is the whole backward. torch knows that
            # of stage 0 alone.
            self.dw_runner.pop(bwd_chunk_id)
            inputs, _, output, gradients = self.backward_state.pop(bwd_chunk_id)
            values = {"stage_output": output, "output_grads": gradients, "input_values": inputs}
            self.backward_maybe_with_nosync("full", values, last_backward=last_backward)
        else:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
            self.kept_graphs.pop(bwd_chunk_id, None)
        self.after_gradients()

    def clear_runtime_states(self):
        super().clear_runtime_states()
        self.kept_graphs.clear()

    def _get_init_p2p_neighbors_ops(self):
        # Before torch 2.13: a first message to each neighbour. One on the same rank needs none, and gloo refuses it.
        return [route(op) for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def get_fwd_send_ops(self, fwd_chunk_id):
        return list(map(route, super().get_fwd_send_ops(fwd_chunk_id)))

    def get_fwd_recv_ops(self, fwd_chunk_id):
        return list(map(route, super().get_fwd_recv_ops(fwd_chunk_id)))

    def get_bwd_send_ops(self, bwd_chunk_id):
        return list(map(route, super().get_bwd_send_ops(bwd_chunk_id)))

    def get_bwd_recv_ops(self, bwd_chunk_id):
        return list(map(route, super().get_bwd_recv_ops(bwd_chunk_id)))

    # The hand-over between neighbours on one rank: none across the seam.
    def set_local_fwd_input(self, prev_stage_outputs, mb_index):
        if not self.is_first:
            super().set_local_fwd_input(prev_stage_outputs, mb_index)

    def get_local_bwd_output(self, mb_index):
        return self.bwd_cache.pop(mb_index) if self.is_first else super().get_local_bwd_output(mb_index)

    def set_local_bwd_input(self, next_stage_bwd_outputs, mb_index):
        if not self.is_last:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class Engine(_PipelineScheduleRuntime):
    """Executes one of our schedules on this rank's stages. ``run`` once a step; losses are what the last stages return."""

    def __init__(self, schedule: Schedule, stages: list[DirectedStage], overlap: Callable | None = None):
        self.schedule, self.numbers = schedule, local_numbers(schedule)
        per_direction = schedule.micro_batches // schedule.directions
        super().__init__(stages, per_direction, loss_fn=_is_loss, scale_grads=False)
        self._loss_of: dict[tuple[int, int], Tensor] = {}
        self._prepare_schedule_with_comms(torch_actions(schedule), format="compute_comms")
        if overlap is not None:
            self.register_custom_function(_ComputationType.OVERLAP_F_B, overlap)
        known = inspect.signature(_PipelineScheduleRuntime._step_microbatches).parameters
        self._options = {"return_outputs": False} if "return_outputs" in known else {}

    def run(self) -> None:
        """One step: every action of this rank's list. Gradients add up in the parameters."""
        self._loss_of.clear()
        for stage in self._stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        self._step_microbatches(**self._options)

    # Losses by stage and micro-batch; torch keeps one list, in the order in which the one last stage made them.
    def _maybe_compute_loss(self, stage, output, target_mbs, mb_index, loss_kwargs=None):
        if stage.is_last:
            self._loss_of[stage.stage_index, mb_index] = output

    def _maybe_get_loss(self, stage, mb_index):
        return self._loss_of.pop((stage.stage_index, mb_index)) if stage.is_last else None

    def _update_losses(self, stages, losses):
        pass

    # For bodies of the overlapped pair: what torch itself does for a forward and for a backward.
    def forward(self, action: _Action) -> None:
        """Runs the forward part of a pair."""
        index, m = action.stage_index, action.microbatch_index
        stage, here = self._stage(index), self._here()
        if not stage.is_first and index - 1 not in here:
            schedules._wait_batch_p2p(self.fwd_recv_ops.pop((index, m)))
        output = stage.forward_one_chunk(m, ())
        self._maybe_compute_loss(stage, output, None, m)
        if index + 1 in here:
            here[index + 1].set_local_fwd_input(output, m)

    def backward(self, action: _Action) -> None:
        """Runs the full backward of a pair."""
        index, m = action.stage_index, action.microbatch_index
        stage, here = self._stage(index), self._here()
        if not stage.is_last and index + 1 not in here:
            schedules._wait_batch_p2p(self.bwd_recv_ops.pop((index, m)))
        self.backward_counter[index] += 1
        last = self.backward_counter[index] == self._n_microbatches
        stage.backward_one_chunk(m, loss=self._maybe_get_loss(stage, m), full_backward=True, last_backward=last)
        if index - 1 in here:
            here[index - 1].set_local_bwd_input(stage.get_local_bwd_output(m), m)

    def _here(self) -> dict[int, DirectedStage]:
        return {stage.stage_index: stage for stage in self._stages}

    def _stage(self, index: int) -> DirectedStage:
        return self._here()[index]


def _is_loss(output: Tensor, *_: object) -> Tensor:
    """torch wants a loss function to know that there is a backward; the last stage's output is the loss already."""
    return output


def forward_then_backward(action: _Action, context: object) -> None:
    """The plainest body of an overlapped pair, and the place of a better one: ``Engine(..., overlap=body)``.

    V3's body lets two threads, or two streams, take turns at the four parts of a chunk (attention, dispatch, MLP, combine),
    so that one's all-to-all hides behind the other's products [V3 figure 4]. Without expert parallelism that is worth
    nothing: a chunk has no all-to-all, and two streams of products only share the multiprocessors. So a pair costs F + B,
    which is what the simulator assumes unless told otherwise. With it (minids/parallel/expert_pipeline.py) the body would
    go here; two threads need an expert group of their own each, or the ranks' calls are no longer in one order.
    """
    forward, backward = action.sub_actions
    context.schedule_ref.forward(forward)
    context.schedule_ref.backward(backward)


def local_numbers(schedule: Schedule) -> dict[int, tuple[int, int]]:
    """micro-batch -> (direction, number within its direction)."""
    of = {m.micro_batch: m.direction for actions in schedule.actions for a in actions for m in a.parts()}
    counts: Counter[int] = Counter()
    numbers = {}
    for micro_batch, direction in sorted(of.items()):
        numbers[micro_batch] = (direction, counts[direction])
        counts[direction] += 1
    return numbers


def torch_actions(schedule: Schedule) -> dict[int, list[_Action]]:
    """The schedule in torch's own terms, rank -> list, transfers and FSDP's passes included."""
    numbers = local_numbers(schedule)

    def convert(item: Action | Transfer) -> _Action:
        stage = item.direction * schedule.stages + item.stage
        if item.kind == "FB":
            return _Action(-1, KINDS["FB"], None, tuple(map(convert, item.parts())))
        return _Action(stage, KINDS[item.kind], numbers[item.micro_batch][1])

    per_direction = schedule.micro_batches // schedule.directions
    lists = {rank: [convert(item) for item in items] for rank, items in enumerate(lower(schedule))}
    return {rank: _fsdp_passes(actions, per_direction) for rank, actions in lists.items()}


def _fsdp_passes(actions: Sequence[_Action], micro_batches: int) -> list[_Action]:
    """torch's passes that gather sharded weights before a stage computes, and reduce gradients after its last backward.
    Without FSDP the runtime passes over these actions."""
    actions = list(actions)
    compute = [action for action in actions if action.is_compute_op]
    with_passes = schedules._add_reduce_grad(schedules._add_unshard_reshard(compute), micro_batches)
    merged, transfers = [], iter(actions)
    for action in with_passes:  # transfers go back to where they stood: behind the same computation
        if action.is_compute_op:
            for item in transfers:
                merged.append(item)
                if item is action:
                    break
        else:
            merged.append(action)
    return [*merged, *transfers]
