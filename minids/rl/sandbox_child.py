"""The other side of sandbox.py: a small server, run as a script by a bare interpreter, that forks a jail for every program.

The jail is built in this order, so that nothing of it can be undone: limits on CPU time, memory, files and open files; all
file descriptors closed but one pipe; then a seccomp filter, in the kernel, which knows only what a calculating program
needs (memory, the pipe, the clock, exit). Opening a file, a socket, a process, a signal to another process: each fails
with EPERM, whatever Python names it goes by.

The jail is given a program and the arguments to call its function with. It is not given the results that are wanted: it
returns what it found, and the comparison is made outside. A program that reads its own frames or writes to the pipe by
itself can therefore forge nothing but results, which are right or wrong.

Only modules of Python's own library are imported here, and none of them later: programs find these few in ``sys.modules``.
"""

import bisect  # noqa: F401 - here and below: what programs may import
import collections  # noqa: F401
import ctypes
import fractions  # noqa: F401
import functools  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math
import os
import platform
import re  # noqa: F401
import resource
import select
import signal
import string  # noqa: F401
import struct
import sys
import time

# All that a calculating program needs: read, write, close, fstat, lseek, mmap, mprotect, munmap, brk, mremap, madvise,
# rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack, futex, clock_gettime, getrandom, getpid, exit, exit_group.
CALLS = {
    "x86_64": (0xC000003E,
               (0, 1, 3, 5, 8, 9, 10, 11, 12, 25, 28, 13, 14, 15, 131, 202, 228, 318, 39, 60, 231)),
    "aarch64": (0xC00000B7,
                (63, 64, 57, 80, 62, 222, 226, 215, 214, 216, 233, 134, 135, 139, 132, 98, 113, 278, 172, 93, 94)),
}
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
ALLOW, EPERM, KILL = 0x7FFF0000, 0x00050001, 0x80000000


def filter_program(arch: int, calls: tuple[int, ...]) -> bytes:
    """BPF: another architecture's call numbers kill; a known call passes; any other fails with EPERM."""
    known = [(EQUAL, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    rows = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0), *known,
            (RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]  # fmt: skip
    return b"".join(struct.pack("HBBI", *row) for row in rows)


class FilterHeader(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]


def install_filter() -> None:
    """No way back for this process. Raises OSError where the kernel refuses."""
    program = ctypes.create_string_buffer(filter_program(*CALLS[platform.machine()]))
    header = FilterHeader((len(program) - 1) // 8, ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses a seccomp filter")


def enter_jail(job: dict, pipe: int) -> None:
    """Limits, closed files, filter; see the head of this file. ``pipe`` stays open."""
    seconds = max(1, math.ceil(job["cpu_seconds"]))
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: job["memory_bytes"], resource.RLIMIT_FSIZE: 0,
              resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: pipe + 1}  # fmt: skip
    os.closerange(0, pipe)
    os.closerange(pipe + 1, 4096)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    install_filter()


def run_program(job: dict) -> dict:
    """Inside the jail: define the program, call its function with each list of arguments."""
    names: dict = {"__name__": "__program__"}
    exec(compile(job["source"], "<program>", "exec"), names)  # the jail is what makes this safe
    function = names[job["function"]]
    return {"results": [function(*arguments) for arguments in job["calls"]]}


def jailed(job: dict, pipe: int) -> None:
    """The forked process, to its end. Whatever goes wrong becomes an error text."""
    try:
        enter_jail(job, pipe)
        answer = json.dumps(run_program(job), allow_nan=False)
    except BaseException as error:  # SystemExit and KeyboardInterrupt of the program among them
        answer = json.dumps({"error": f"{type(error).__name__}: {str(error)[:200]}"})
    data = memoryview(answer.encode())
    while data:
        data = data[os.write(pipe, data) :]
    os._exit(0)


def supervise(job: dict) -> dict:
    """Fork a jail, wait for its answer no longer than the job allows, and leave nothing of it behind."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        jailed(job, writer)
    os.close(writer)
    deadline, data, verdict = time.monotonic() + job["wall_seconds"], b"", None
    while verdict is None:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(reader, 65536) if ready else None
        data += chunk or b""
        if not ready:
            verdict = {"error": "timeout"}
        elif len(data) > job["output_bytes"]:
            verdict = {"error": "too much output"}
        elif not chunk:
            verdict = decode(data)
    os.close(reader)
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and verdict.get("error") == "no answer":
        verdict = {"error": f"killed by {signal.Signals(os.WTERMSIG(status)).name}"}
    return verdict


def decode(data: bytes) -> dict:
    """What the jail has written, or the program in it: results in a list, or an error text, and nothing else."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return {"error": "no answer"}
    for name, kind in (("results", list), ("error", str)):
        if isinstance(answer, dict) and answer.keys() == {name} and isinstance(answer[name], kind):
            return answer
    return {"error": "forged answer"}


def serve() -> None:
    """Jobs in, verdicts out, a line of JSON each, until stdin closes."""
    jobs = os.fdopen(os.dup(0), "rb")
    for line in jobs:
        sys.stdout.write(json.dumps(supervise(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
