"""Signals that stop a run: the first SIGTERM or Ctrl-C asks it to end soon, the second ends it at once.

A signal only sets a flag. Code that waits for work which may be thrown away calls `check`; code that waits for work
which must be finished (an update, a weight sync) does not. So a run is always stopped between two steps.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from ppo_ray.errors import Interrupted

_SHOW_CURSOR = b"\x1b[?25h"  # the view of a run's progress hides it, and has no time to end
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_requested: int | None = None


@contextlib.contextmanager
def handle_signals(limit_s: float, end_at_once: Callable[[int], None]) -> Iterator[None]:
    """Treat SIGINT and SIGTERM as requests to stop while the block runs.

    Args:
        limit_s: seconds from the first signal until the process is ended at once, if it has not ended by then.
        end_at_once: ends this process and what it started; called with the exit code, from any thread; does not return.
    """
    global _requested
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    timer: threading.Timer | None = None

    def end(code: int) -> None:
        with contextlib.suppress(OSError):
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
        end_at_once(code)

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal timer
        global _requested
        if _requested is not None:
            end(128 + number)
        _requested = number
        timer = threading.Timer(limit_s, end, (128 + number,))
        timer.daemon = True
        timer.start()

    previous = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    _requested = None
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if timer is not None:
            timer.cancel()
        _requested = None


def check() -> None:
    """Raise if the run was asked to stop.

    Raises:
        Interrupted: a signal has come.
    """
    if _requested is not None:
        raise Interrupted(_requested)
