"""How a run is stopped: the first SIGTERM or Ctrl-C asks it to end soon, the second ends it at once.

A signal only sets a flag. Whoever waits for work that may be thrown away looks at the flag; work that must be finished
(an update, a weight sync) is waited for without. So a run is always stopped between two steps.
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
def stoppable(limit_s: float, end_at_once: Callable[[int], None]) -> Iterator[None]:
    """Take SIGINT and SIGTERM for requests to stop while the block runs.

    Args:
        limit_s: seconds from the first signal to the end; whoever is not done by then is ended at once.
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
    """Return if nobody asked to stop.

    Raises:
        Interrupted: somebody did.
    """
    if _requested is not None:
        raise Interrupted(_requested)
