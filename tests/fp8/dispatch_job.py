"""Run by test_dispatch.py in a fresh process, FOLDER as its argument: dispatch and combine on 3 forked ranks over gloo,
with the rows and counts of FOLDER/given.safetensors; each rank writes what it received and the gradient of its rows."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from minids.fp8.dispatch import combine, dispatch
from minids.pipeline.launch import start_local


def rank_process(rank: int, folder: str) -> None:
    given = load_file(Path(folder) / "given.safetensors")
    counts = given["counts"].tolist()
    sent, received = counts[rank], [row[rank] for row in counts]

    def move(rows: torch.Tensor, out: list[int], into: list[int]) -> torch.Tensor:
        found = rows.new_empty(sum(into), rows.shape[1])
        dist.all_to_all_single(found, rows.contiguous(), into, out)
        return found

    def there(rows: torch.Tensor) -> torch.Tensor:
        return move(rows, sent, received)

    def back(rows: torch.Tensor) -> torch.Tensor:
        return move(rows, received, sent)

    first = sum(map(sum, counts[:rank]))
    part = slice(first, first + sum(sent))
    x = given["x"][part].requires_grad_()
    arrived = dispatch(x, there, back)
    home = combine(3 * arrived, there, back)
    home.backward(given["grad"][part])
    found = {"arrived": arrived.detach(), "home": home.detach(), "gradient": x.grad}
    save_file(found, Path(folder) / f"{rank}.safetensors")


if __name__ == "__main__":
    start_local(rank_process, 3, sys.argv[1])
