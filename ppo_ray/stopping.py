"""Signals that stop a run: the first SIGTERM or Ctrl-C asks it to end soon, the second ends it at once.

A signal only sets a flag. Code that waits for work which may be thrown away calls `check`; code that waits for work
which must be finished (an update, a weight sync) does not. So a run is always stopped between two steps.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from ppo_ray.errors import Interrupted

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

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal timer
        global _requested
        if _requested is not None:
            end_at_once(128 + number)
        _requested = number
        timer = threading.Timer(limit_s, end_at_once, (128 + number,))
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
