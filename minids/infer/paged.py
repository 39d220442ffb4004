"""The latent cache in pages: rows of any length share one pool, as processes share memory (PagedAttention, 2309.06180).

The problem: one block a row must be as long as the longest text may become, and most of it stays empty. Here the pool is
cut into pages of P slots, and a row owns a list of pages, in any order:

    row's slot j  ->  page table[row, j // P], place j % P

A request takes the pages that its prompt and its new tokens can fill when it is admitted, and gives them back when it
ends. Page 0 belongs to nobody: table entries without a page point to it, so that padding and rejected drafts behind a row's
last page have somewhere to go; no mask ever shows it to a token that counts.

The model does not know of pages: `PagedRows` has the interface of `LatentCache` (minids/model/cache.py) for the rows of one
pass. Simplifications: pages are taken for the whole request beforehand, so that no row is ever evicted; attention
reads a copy of the row's pages, except in decoding on CUDA, where a kernel follows the table (attention_pages.py).

Shapes: L layers, B rows of a pass, P slots a page, T new tokens, S slots shown, C latent, R rope dims, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.model.cache import Slots, draft_slots
from minids.model.rope import rope_table

NOBODY = 0  # the page that is never handed out


class PagedCache:
    """A pool ``data`` (L, pages + 1, P, C + R) and who owns what; row numbers are 0 to ``max_rows`` - 1.

    ``free``: pages nobody owns. ``owned[row]``: its pages, in the order of its slots. ``lengths[row]``: its tokens.
    """

    def __init__(self, cfg: ModelConfig, max_rows: int, pages: int, page_size: int = 64, device=None, dtype=None,
                 mtp: bool = False):  # fmt: skip
        for name, value in (("max_rows", max_rows), ("pages", pages), ("page_size", page_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: allowed is a positive integer")
        self.depths = cfg.num_nextn_predict_layers if mtp else 0
        self.page_size, self.pages, self.max_rows = page_size, pages, max_rows
        self.capacity = min(pages * page_size, cfg.max_position_embeddings) + draft_slots(self.depths)
        layers = cfg.num_hidden_layers + self.depths
        self.data = torch.zeros(layers, pages + 1, page_size, cfg.latent_dim, device=device, dtype=dtype)
        self.rope = rope_table(cfg, torch.arange(self.capacity, device=device).unsqueeze(0))
        self.table = torch.full((max_rows, -(-self.capacity // page_size)), NOBODY, device=device)
        self.carry = [torch.zeros(max_rows, cfg.hidden_size, device=device, dtype=dtype) for _ in range(self.depths)]
        self.free = list(range(pages, 0, -1))
        self.owned: list[list[int]] = [[] for _ in range(max_rows)]
        self.lengths = [0] * max_rows
        self.folded: dict[tuple[int, bool], Any] = {}  # see LatentCache
        self.turned: dict[int, Any] = {}

    def pages_for(self, slots: int) -> int:
        """How many pages hold so many slots."""
        return -(-slots // self.page_size)

    def take(self, row: int, slots: int) -> bool:
        """Give an empty row the pages for ``slots`` slots; False, and nothing happens, when too few are free."""
        need = self.pages_for(slots)
        if self.owned[row]:
            raise ValueError(f"row={row} owns pages already: allowed is a row that was given back")
        if need > len(self.free):
            return False
        self.owned[row] = [self.free.pop() for _ in range(need)]
        self.table[row, :need] = torch.tensor(self.owned[row], device=self.table.device)
        self.lengths[row] = 0
        for carry in self.carry:
            carry[row] = 0
        return True

    def give_back(self, row: int, clean: bool = False) -> None:
        """The row's pages are free again. clean: zero them, and nobody's page, since a NaN would outlive any mask."""
        if clean:
            self.data[:, [NOBODY, *self.owned[row]]] = 0
        self.free += self.owned[row][::-1]
        self.owned[row], self.lengths[row] = [], 0
        self.table[row] = NOBODY

    def view(self, rows: Sequence[int]) -> "PagedRows":
        """The cache of one pass over these rows; `PagedRows.keep` stores what it counted."""
        return PagedRows(self, list(rows))


class PagedRows(Slots):
    """Some rows of a `PagedCache` as a cache of their own."""

    ragged = True

    def __init__(self, pool: PagedCache, members: list[int]):
        self.pool, self.members = pool, members
        self.rows, self.capacity, self.depths, self.rope = len(members), pool.capacity, pool.depths, pool.rope
        self.folded, self.turned = pool.folded, pool.turned
        index = torch.tensor(members, device=pool.table.device)
        self.index, self.table = index, pool.table[index]
        self.carry = [carry[index] for carry in pool.carry]
        self.lengths = index
        self.set_lengths([pool.lengths[row] for row in members])

    def set_lengths(self, lengths: list[int]) -> None:
        super().set_lengths(lengths)
        self.ragged = True  # always by positions: rows lie in pages

    def place(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `Slots.place`. Padding may reach behind all slots; that no token does is checked when they are kept."""
        positions = self.lengths.unsqueeze(1) + torch.arange(length, device=self.lengths.device)
        self.end, self.placed, self.listed = min(self.filled + length, self.capacity), length, None
        self.flat_BT = self._flat(positions)
        seen = torch.arange(self.end, device=positions.device) <= positions.unsqueeze(-1)
        return positions, self.rope[0, positions.clamp_max(self.capacity - 1)], seen.unsqueeze(1)

    def place_mtp(self, depth: int, start_B: Tensor, length: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        positions, rope, mask = super().place_mtp(depth, start_B, length, min(end, self.capacity))
        self.flat_BT = self._flat(positions)
        return positions, rope, mask

    def _flat(self, positions_BT: Tensor) -> Tensor:
        """Where the slots lie in the pool, its pages laid end to end."""
        size, inside = self.pool.page_size, positions_BT < self.capacity
        places = self.table.gather(1, (positions_BT // size).clamp_max(self.table.shape[1] - 1)) * size
        return torch.where(inside, places + positions_BT % size, NOBODY)

    def write(self, layer: int, positions: Tensor | None, latent_BTc: Tensor) -> Tensor:
        """As `LatentCache.write`, for the slots placed last; returns a copy of the row's pages, (B, S, C + R)."""
        self.store(layer, positions, latent_BTc)
        pages = self.pool.data[layer]
        return pages[self.table[:, : self.pool.pages_for(self.end)]].flatten(1, 2)[:, : self.end]

    def store(self, layer: int, positions: Tensor | None, latent_BTc: Tensor) -> None:
        pages = self.pool.data[layer]
        pages.view(-1, pages.shape[-1])[self.flat_BT] = latent_BTc.to(pages.dtype)

    def pages(self, layer: int) -> Tensor:
        return self.pool.data[layer]

    def pages_of(self, count: int) -> Tensor:
        return self.table[:, :count]

    def keep(self) -> None:
        """Store lengths and carries in the pool. Raises ValueError for a row of more tokens than its pages hold."""
        for row, length in zip(self.members, self.lengths.tolist(), strict=True):
            if length > (room := len(self.pool.owned[row]) * self.pool.page_size):
                raise ValueError(f"row {row} counts {length} tokens, its pages hold {room}")
            self.pool.lengths[row] = length
        for mine, pool in zip(self.carry, self.pool.carry, strict=True):
            pool[self.index] = mine
