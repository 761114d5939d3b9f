"""Signals: what can be made again stops at once, the rest is finished; the second Ctrl-C wins."""

import os
import signal
import threading

import pytest

from opcd_fast.training import Interrupted
from opcd_fast.training.interruption import Interruption


def send(number):
    os.kill(os.getpid(), number)
    for _ in range(1000):  # give the interpreter the bytecodes that it runs handlers between
        pass


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_at_once_where_nothing_is_lost_and_later_where_something_would_be(number, status):
    reached = []
    with Interruption() as interruption, pytest.raises(Interrupted) as stop, interruption.abandonable():
        send(number)
        reached.append("not abandoned")
    assert stop.value.status == status and isinstance(stop.value, KeyboardInterrupt)
    with Interruption() as interruption:
        with interruption.abandonable():
            pass
        send(number)
        reached.append("saved")
        with pytest.raises(Interrupted), interruption.abandonable():
            reached.append("begun")
    assert reached == ["saved"]


def test_the_second_ctrl_c_does_not_wait():
    with Interruption():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as stop:
            send(signal.SIGINT)
        assert not isinstance(stop.value, Interrupted)
        send(signal.SIGTERM)  # a second SIGTERM is ignored


def test_handlers_are_given_back_and_other_threads_left_alone():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    found = []

    def inside():
        with Interruption() as interruption, interruption.abandonable():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before[1]]
