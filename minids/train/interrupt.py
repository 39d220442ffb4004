"""A polite end on SIGINT and SIGTERM: finish the step, save, leave with the signal's exit code.

The handler only sets a flag, since a step that is half done has nothing worth saving. A second signal acts at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Context manager; `received` is the signal number or None. Does nothing outside the main thread. `quiet`: says
    nothing when a signal comes, as one of many ranks."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.received: int | None = None
        self._before: dict = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            # None: the handler before ours was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        if not self.quiet:
            print(f"\n{signal.Signals(number).name}: finishing this step and saving (again to stop at once)",
                  file=sys.stderr, flush=True)
