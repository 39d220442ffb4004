"""The latent cache: what decoding remembers of each token, 576 numbers a layer in V3 [section 2.1.1].

The problem: new tokens must see all earlier ones without running them again. ``data`` (L, B, S, C + R) holds each token's
normed latent and its rotated shared key, one slot a token: row b's token j lies in slot j of every layer. Rows of one batch
may have different lengths; slots from ``lengths[b]`` on hold padding or rejected drafts, which no mask ever shows and the
next tokens overwrite.

MTP modules have caches of their own: layer L + k - 1 belongs to depth k [section 2.2]. Depth k at position i reads token
i+k and the hidden state h^(k-1) at i. Here its entry lies in the slot of the *token* that completes it, j = i + k:

    slot         0     1     2     3     4    ...      main layers: token j, position j
    depth 1      -    i=0   i=1   i=2   i=3   ...      token j, h^0 at j - 1
    depth 2      -     -    i=0   i=1   i=2   ...      token j, h^1 at j - 2, the output of depth 1 in slot j - 1

so every layer takes the same tokens into the same slots, reading the depth before one slot to the left. Only RoPE (position
j - k) and the mask (slots below k hold nothing) know of the shift. ``carry`` keeps that left neighbour between two calls.

Shapes: L layers, B rows, S slots, C latent, R rope dims, T new tokens, D hidden.
"""

from typing import Any

import torch
from torch import Tensor

from minids.config import ModelConfig
from minids.kernels import uses_kernels
from minids.model.rope import rope_table

PAGE = 64  # slots


class Slots:
    """Where new tokens go and what they see, for any storage whose rows count their tokens in ``lengths`` (B,) int64.

    ``filled``: an upper bound of the lengths, known without asking the device. ``ragged``: rows differ in length.
    ``capacity``: slots a row. ``rows``: B. ``end``: slots shown to the tokens placed last.
    """

    rope: Tensor  # (1, capacity, R/2) complex64, once for all steps
    lengths: Tensor
    rows: int
    capacity: int
    filled = 0
    ragged = False
    end = 0
    placed = 0  # tokens a row placed last, each seeing all slots up to its own; 0 for MTP, whose first slots are empty
    listed: tuple[Tensor, Tensor] | None = None

    def place(self, length: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Where the next ``length`` tokens of each row go, how they are rotated and what they see: positions (B, T)
        int64, RoPE table (B or 1, T, R/2), mask (B, 1, T, S). Rows of equal length go to one slice of slots and need
        neither positions nor mask: both None. Raises when the tokens do not fit."""
        end = self.filled + length
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row, {self.filled} are filled:"
                             f" {length} more do not fit")  # fmt: skip
        self.end, self.placed, self.listed = end, length, None
        if not self.ragged:
            return None, self.rope[:, self.filled : end], None
        positions = self.lengths.unsqueeze(1) + torch.arange(length, device=self.lengths.device)
        seen = torch.arange(end, device=positions.device) <= positions.unsqueeze(-1)  # a row's own slots, 0 to p
        return positions, self.rope[0, positions], seen.unsqueeze(1)

    def place_mtp(self, depth: int, start_B: Tensor, length: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same for MTP depth ``depth`` and the tokens in slots ``start[b]`` ... ``start[b] + length - 1``, all of them
        below ``end``. A slot below ``depth`` has no entry: it sees itself alone, so that no row of scores is empty."""
        self.placed, self.end, key_S = 0, end, torch.arange(max(end, length), device=start_B.device)
        slots_BT = start_B.unsqueeze(1) + key_S[:length]
        key_S, query_BT1 = key_S[:end], slots_BT.unsqueeze(-1)
        seen = ((key_S >= depth) & (key_S <= query_BT1)) | (key_S == query_BT1)
        return slots_BT, self.rope[0, (slots_BT - depth).clamp(0, self.capacity - 1)], seen.unsqueeze(1)

    def pages_of(self, count: int) -> Tensor:
        """(B, count) integers: the rows' first pages of PAGE slots."""
        raise NotImplementedError

    def page_list(self) -> tuple[Tensor, Tensor]:
        """For each of the B T tokens placed last, as a kernel wants them: its row's pages (B T, pages) int32, and how many
        slots it sees (B T,) int32. Made once for all layers."""
        if self.listed is None:
            table = self.pages_of(-(-self.end // PAGE)).int().repeat_interleave(self.placed, 0)
            behind = torch.arange(1, self.placed + 1, device=table.device)
            seen = (self.lengths.unsqueeze(1) + behind).clamp_max(self.end).int().flatten()
            self.listed = table.contiguous(), seen
        return self.listed

    def advance(self, length: int, n_valid: Tensor | None) -> None:
        """Counts the tokens just written: all of them, or the first ``n_valid[b]`` of each row."""
        self.lengths = self.lengths + (length if n_valid is None else n_valid)
        self.ragged = self.ragged or n_valid is not None
        self.filled += length

    def set_lengths(self, lengths: list[int]) -> None:
        """Counts ``lengths[b]`` tokens in row b: what lies behind, rejected drafts, is forgotten."""
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self.filled, self.ragged = max(lengths), min(lengths) < max(lengths)


class LatentCache(Slots):
    """One block of slots a row: ``data`` (L, B, S, C + R).

    ``mtp``: hold the MTP modules' layers too, their ``carry`` (depth k: (B, D), h^(k-1) of each row's last token), and
    more slots for drafts that are written before they are rejected.
    """

    def __init__(self, cfg: ModelConfig, batch: int, max_length: int, device=None, dtype=None, mtp: bool = False):
        if not 1 <= max_length <= cfg.max_position_embeddings:
            raise ValueError(f"max_length={max_length}: allowed is 1 to "
                             f"max_position_embeddings={cfg.max_position_embeddings}")  # fmt: skip
        self.depths = cfg.num_nextn_predict_layers if mtp else 0
        layers = cfg.num_hidden_layers + self.depths
        self.rows, self.capacity = batch, max_length + draft_slots(self.depths)
        # Kernels read whole pages: attention_pages.py.
        slots = -(-self.capacity // PAGE) * PAGE if uses_kernels(torch.empty(0, device=device)) else self.capacity
        self.data = torch.zeros(layers, batch, slots, cfg.latent_dim, device=device, dtype=dtype)
        self.rope = rope_table(cfg, torch.arange(self.capacity, device=device).unsqueeze(0))
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.carry = [torch.zeros(batch, cfg.hidden_size, device=device, dtype=dtype) for _ in range(self.depths)]
        # Each layer's weights as decoding wants them; attention_decode.py, moe_decode.py and block_decode.py say how.
        self.folded: dict[tuple[int, bool | str], Any] = {}
        self.turned: dict[int, Any] = {}

    def write(self, layer: int, positions: Tensor | None, latent_BTc: Tensor) -> Tensor:
        """Stores ``latent`` (B, T, C + R) in the slots ``positions``, None being the next ones of every row; returns the
        slots shown to them, (B, S, C + R)."""
        self.store(layer, positions, latent_BTc)
        return self.data[layer][:, : self.end]

    def store(self, layer: int, positions: Tensor | None, latent_BTc: Tensor) -> None:
        """`write` without reading."""
        rows = self.data[layer]
        if positions is None:
            rows[:, self.filled : self.filled + latent_BTc.shape[1]] = latent_BTc
        else:
            rows.scatter_(1, positions.unsqueeze(-1).expand_as(latent_BTc), latent_BTc.to(rows.dtype))

    def pages(self, layer: int) -> Tensor | None:
        """The layer's slots as pages (B S / PAGE, PAGE, C + R); None where rows do not end with a page."""
        rows = self.data[layer]
        return None if rows.shape[1] % PAGE else rows.view(-1, PAGE, rows.shape[-1])

    def pages_of(self, count: int) -> Tensor:
        each = self.data.shape[2] // PAGE
        return torch.arange(self.rows * each, device=self.data.device).view(self.rows, each)[:, :count]

    def select(self, rows: Tensor) -> None:
        """Keeps only ``rows`` (n,) int64, in this order: the others have finished."""
        self.data, self.rows = self.data[:, rows], len(rows)
        self.carry = [carry[rows] for carry in self.carry]
        self.set_lengths(self.lengths[rows].tolist())


def draft_slots(depths: int) -> int:
    """Slots that a row needs beyond its text: drafts behind the last token, and the padding of rows that accept fewer."""
    return 2 * depths + 2 if depths else 0
