"""What a program may do, and the many things it may not."""

import json
import os
import socket
import threading
import time

import pytest

from minids.rl.rewards import Overtime, deadline
from minids.rl.sandbox import Limits, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=1.5)) as box:
        yield box


def run(sandbox, body, calls=((),)):
    source = "def f(*a):\n" + "\n".join("    " + line for line in body.splitlines())
    return sandbox.run(source, "f", [list(c) for c in calls])


def test_right_programs_pass(sandbox):
    source = "import math, itertools\ndef f(x, y):\n    return [math.gcd(x, y), sum(itertools.accumulate(range(x)))]"
    assert sandbox.run(source, "f", [[12, 18], [4, 6]]).results == [[6, 286], [2, 10]]
    assert sandbox.passed("f = lambda x: x * x", "f", [([3], 9), ([4], 16), ([5], 0), ([-1], 1)]) == 0.75


@pytest.mark.parametrize(("result", "wanted"), [("True", 1), ("1.0", 1), ("'1'", 1), ("[1]", 1), ("None", 0)])
def test_types_count(sandbox, result, wanted):
    assert sandbox.passed(f"f = lambda: {result}", "f", [([], wanted)]) == 0.0


def test_what_equals_everything_equals_nothing(sandbox):
    source = "class All(int):\n    def __eq__(self, other): return True\nf = lambda: All(3)"
    assert sandbox.passed(source, "f", [([], 4)]) == 0.0


@pytest.mark.parametrize("body", [
    "while True: pass", "return 9**9**9", "return [0] * 10**10", "return 'x' * 10**8", "import time; time.sleep(60)",
    "return f()", "def g(): return g()\nreturn g()", "raise SystemExit(0)", "raise KeyboardInterrupt",
    "import os; os._exit(0)",
    "import os; os.abort()", "import ctypes; ctypes.string_at(0)", "return 1 +", "return f", "return float('nan')",
    "return {1, 2}",
    "return int('9' * 5000)", "import sys; sys.setrecursionlimit(10**9); g = lambda: g(); return g()",
    "import os; os.close(3); os.closerange(0, 99); return 1", "l = []\nl.append(l)\nreturn l",
    "import os\nfor fd in range(64):\n  try: os.write(fd, b'{\"results\": [1], \"x\": 1}')\n"
    "  except OSError: pass\nreturn 1",
])  # fmt: skip
def test_hostile_programs_fail_in_bounded_time(sandbox, body):
    started = time.monotonic()
    outcome = run(sandbox, body)
    assert outcome.results is None and outcome.error
    assert time.monotonic() - started < 4
    assert run(sandbox, "return 7").results == [7]  # the next program is not hurt


REACH = [
    "import os; return os.fork()", "import subprocess; return subprocess.run('true')", "return open('/etc/passwd').read()",
    "return open('{tmp}/made', 'w')", "import os; os.unlink('{tmp}/kept')", "import os; os.kill({pid}, 9)",
    "import os; return os.listdir('/')", "import os; os.mkdir('{tmp}/made')",
    "import os; os.rename('{tmp}/kept', '{tmp}/made')",
    "import os; os.execv('/bin/true', ['true'])",
    "import socket; return socket.create_connection(('127.0.0.1', {port}), 1) and 1",
    "import _socket; s = _socket.socket(2, 1); s.connect(('127.0.0.1', {port})); return 1",
    "import ctypes; return ctypes.CDLL(None).fork()", "import os; os.chmod('{tmp}/kept', 0)",
    "import os; os.symlink('/', '{tmp}/made')",
    "import threading; t = threading.Thread(target=print); t.start(); return 1",
    "import ctypes; return ctypes.CDLL(None).system(b'touch {tmp}/made')",
]  # fmt: skip


@pytest.mark.parametrize("body", REACH)
def test_programs_reach_nothing_outside(sandbox, body, tmp_path):
    (tmp_path / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        called = []
        listener = threading.Thread(target=lambda: called.append(_accept(server)))
        listener.start()
        filled = body.replace("{tmp}", str(tmp_path)).replace("{pid}", str(os.getpid()))
        outcome = run(sandbox, filled.replace("{port}", str(server.getsockname()[1])))
        listener.join()
    if outcome.results is not None:  # a C function reports its failure by its result
        assert outcome.results[0] in (-1, 32512)
    assert called == [False]
    assert sorted(os.listdir(tmp_path)) == ["kept"] and (tmp_path / "kept").read_text() == "kept"
    assert os.stat(tmp_path / "kept").st_mode & 0o777 != 0


def _accept(server):
    try:
        return bool(server.accept())
    except TimeoutError:
        return False


@pytest.mark.parametrize("payload", [
    '{"results": 5}', '{"results": null}', '{"results": "5"}', '{"results": {"0": 5}}', '{"error": 5}', '{"error": null}',
    '[5]', '5', '{"results": ', '{"results": "[[[[', "[" * 200, "deep",
])  # fmt: skip
def test_forged_answers_are_no_results_and_break_nothing(sandbox, payload):
    written = "b'{\"results\": ' + b'[' * 30000" if payload == "deep" else repr(payload.encode())
    body = f"import os\nfor fd in range(64):\n  try: os.write(fd, {written}); os._exit(0)\n  except OSError: pass"
    restarts = sandbox.restarts
    outcome = run(sandbox, body)
    assert outcome.results is None and outcome.error in ("forged answer", "no answer")
    source = "def f():\n" + "\n".join("    " + line for line in body.splitlines())
    assert sandbox.passed(source, "f", [([], 5)]) == 0.0
    assert sandbox.restarts == restarts  # the server has lived through it


def test_a_program_that_was_given_up_does_not_answer_for_the_next():
    """A deadline outside falls while the sandbox waits: what that program says later must not be read as another's."""
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=1.0)) as box:
        with pytest.raises(Overtime), deadline(0.2):
            run(box, "while True: pass")
        for number in range(3):
            assert run(box, f"return {number}").results == [number]
        assert run(box, "while True: pass").results is None
        assert run(box, "return 7").results == [7]


def test_the_parent_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("MINIDS_SECRET", "secret")
    with Sandbox() as box:
        assert set(run(box, "import os; return sorted(os.environ)").results[0]) <= {"LC_CTYPE"}  # Python's own


def test_wanted_results_are_not_in_the_jail(sandbox):
    """A program that looks through all objects in its memory for the wanted result finds it nowhere."""
    body = ("import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and any(k == 'tests' or v == 918273 "
            "for k, v in o.items() if isinstance(v, int) or k == 'tests')]\nreturn len(found)")  # fmt: skip
    source = "def f(*a):\n" + "\n".join("    " + line for line in body.splitlines())
    assert sandbox.passed(source, "f", [([], 918273)]) == 0.0
    assert sandbox.run(source, "f", [[]]).results == [0]


def test_a_dead_server_is_replaced():
    with Sandbox() as box:
        assert box.passed("f = lambda: 1", "f", [([], 1)]) == 1.0
        box.server.kill()
        box.server.wait()
        assert box.passed("f = lambda: 1", "f", [([], 1)]) == 1.0


def test_no_process_is_left_behind():
    box = Sandbox(Limits(cpu_seconds=1, wall_seconds=0.3))
    for _ in range(5):
        assert run(box, "while True: pass").error in ("timeout", "killed by SIGKILL", "killed by SIGXCPU")
    server = box.server.pid
    children = open(f"/proc/{server}/task/{server}/children").read().split()
    assert children == []
    box.close()
    assert not os.path.exists(f"/proc/{server}")


def test_long_and_broken_sources_never_reach_the_server(sandbox):
    assert "allowed are" in sandbox.run("#" * 10_000_000, "f", [[]]).error
    assert "no valid text" in sandbox.run("f = lambda: '\ud800'", "f", [[]]).error
    with pytest.raises(ValueError, match="JSON"):
        sandbox.run("f = 1", "f", [[object()]])
    with pytest.raises(ValueError, match="wall_seconds"):
        Limits(wall_seconds=0)
    assert json.dumps(run(sandbox, "return 'ü\\n'").results) == '["\\u00fc\\n"]'
