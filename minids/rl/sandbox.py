"""Running programs that a model wrote, to see whether they pass tests: limited in time, memory and reach [R1 2.2].

The problem: the reward for code is the outcome of running it, and what a policy writes in RL is whatever pays, or noise: an
endless loop, a fork bomb, ``9**9**9``, a walk through the file system. So a program runs in a process of its own that the
kernel has closed off (sandbox_child.py says how), with limits on CPU time, wall time, memory and output, without network,
files or processes. Starting Python costs 20 ms; a server that has started already forks a jail in one or two.

Simplification: Linux alone, on x86-64 or ARM; elsewhere programs are refused rather than run unprotected.
"""

from __future__ import annotations

import json
import platform
import select
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
GRACE = 5.0  # seconds that the server may take beyond a job's own limit before it is taken for dead


@dataclass(frozen=True)
class Limits:
    """What one program may use, for all its calls together."""

    cpu_seconds: float = 1.0
    """Rounded up to whole seconds, as the kernel counts them."""
    wall_seconds: float = 2.0
    memory_bytes: int = 256 * 2**20
    output_bytes: int = 64 * 2**10
    source_bytes: int = 16 * 2**10

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} = {value!r}: must be above 0")


@dataclass(frozen=True)
class Outcome:
    """Either the results, one a call, or why there are none."""

    results: list | None = None
    error: str | None = None


class Sandbox:
    """Runs programs one after the other. Use as a context manager, or ``close``."""

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.server: subprocess.Popen | None = None
        self.restarts = 0  # how often the server had to be started again
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
            raise RuntimeError(f"programs can be run safely on Linux on x86_64 or aarch64, not on {sys.platform} on "
                               f"{platform.machine()}: there is no seccomp filter for it here")  # fmt: skip
        probe = self.run("f = lambda: 1", "f", [[]])  # or every program of a whole run would quietly fail
        if probe.results != [1]:
            self.close()
            raise RuntimeError(f"programs cannot be run safely here: {probe.error}")

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, source: str, function: str, calls: list[list]) -> Outcome:
        """Define ``source``, call ``function`` with each list of arguments (JSON values), return all results.

        A program that fails, hangs or is too long gives an Outcome with an error, never an exception. Raises ValueError
        for calls that are no JSON, which is the caller's fault.
        """
        try:
            size = len(source.encode())
        except UnicodeEncodeError:
            return Outcome(error="source is no valid text")
        if size > self.limits.source_bytes:
            return Outcome(error=f"source of {size} bytes, allowed are {self.limits.source_bytes}")
        try:
            what = {"source": source, "function": function, "calls": calls}
            job = json.dumps(what | asdict(self.limits), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"calls must be JSON values: {error}") from None
        try:
            answer = self._ask(job)
        except BaseException:  # a deadline, Ctrl-C: the answer to this program would be taken for the next one's
            self.close()
            raise
        if answer is None:  # the server itself is gone: nothing is known of this program, the next gets a new one
            self.close()
            self.restarts += 1
            return Outcome(error="the sandbox did not answer")
        return Outcome(**answer)

    def passed(self, source: str, function: str, tests: list[tuple[list, object]]) -> float:
        """The share of tests whose result is the wanted one, of the same JSON type: True is not 1, nor is 1.0."""
        outcome = self.run(source, function, [arguments for arguments, _ in tests])
        if outcome.results is None or len(outcome.results) != len(tests):
            return 0.0
        try:
            found = [json.dumps(result) for result in outcome.results]
        except RecursionError:  # lists in lists: deeper than this stack is free
            return 0.0
        right = [result == json.dumps(wanted) for result, (_, wanted) in zip(found, tests, strict=True)]
        return sum(right) / len(right)

    def close(self) -> None:
        """Ends the server; ``run`` would start another."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()
            self.server.stdin.close()
            self.server.stdout.close()
            self.server = None

    def _ask(self, job: str) -> dict | None:
        if self.server is None or self.server.poll() is not None:
            self._start()
        try:
            self.server.stdin.write(job.encode() + b"\n")
            self.server.stdin.flush()
            line = self._read_line(time.monotonic() + self.limits.wall_seconds + GRACE)
            return None if line is None else json.loads(line)
        except (BrokenPipeError, ValueError, RecursionError):
            return None

    def _start(self) -> None:
        self.close()
        # -I -S: no environment, no site packages; a session of its own, so that signals of a terminal do not reach it
        command = [sys.executable, "-I", "-S", str(CHILD)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       env={}, cwd="/", start_new_session=True)  # fmt: skip

    def _read_line(self, deadline: float) -> bytes | None:
        """One answer, or None when the server is dead or silent."""
        data = b""
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([self.server.stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = self.server.stdout.read1(65536) if ready else b""
            if not chunk:
                return None
            data += chunk
        return data
