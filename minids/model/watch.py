"""Whether weights are still what something was made from: the guard of all that decoding prepares from weights.

An object made from weights must never outlive them. torch counts a tensor's in-place writes, so a weight is unchanged
when it is the same Parameter, with the same count, over the same memory. (A write through a parameter's ``.data`` is
hidden from that count by torch. What decoding prepares therefore belongs to one cache, and the next cache's is new.)
"""

from collections.abc import Sequence

from torch import Tensor


class Watch:
    """Remembers ``weights``; `unchanged` compares. They must not be inference tensors, which count nothing."""

    def __init__(self, weights: Sequence[Tensor]):
        self.weights, self.stamps = list(weights), stamps(weights)
        self.storages = [weight.detach() for weight in weights]  # held, so that no new tensor takes their place in memory

    def unchanged(self, weights: Sequence[Tensor]) -> bool:
        """Whether ``weights`` are the same tensors, in the same order, with the same contents."""
        return stamps(weights) == self.stamps


def stamps(weights: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """What differs as soon as a weight is another object, was written to, or lies elsewhere."""
    return [(id(weight), weight._version, weight.data_ptr()) for weight in weights]
