import os
import signal
import subprocess
import sys
import threading

import pytest

from ppo_ray import stopping
from ppo_ray.errors import Interrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_only_asks(number: signal.Signals, code: int) -> None:
    ended = []
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with stopping.handle_signals(60, ended.append):
        stopping.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=number.name) as caught:
            stopping.check()
        assert caught.value.exit_code == code
        assert ended == []
        os.kill(os.getpid(), number)
        assert ended == [code]
    stopping.check()  # forgotten, and the handlers are those before
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_who_does_not_end_in_time_is_ended() -> None:
    over = threading.Event()
    with stopping.handle_signals(0.05, lambda code: over.set()):
        os.kill(os.getpid(), signal.SIGTERM)
        assert over.wait(30)


def test_other_threads_leave_the_signals_alone() -> None:
    def body() -> None:
        with stopping.handle_signals(1, lambda code: None):
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_a_process_that_is_stuck_is_ended_by_the_timer() -> None:
    script = (
        "import os, signal, time\n"
        "from ppo_ray.stopping import handle_signals\n"
        "with handle_signals(0.2, os._exit):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == 143
