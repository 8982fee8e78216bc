"""SIGTERM where nothing trains."""

import os
import signal

import pytest

from jaxcompress.training.preemption import Preempted, Preemption, preemptible


def work():
    with preemptible("out"):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 1)
    pytest.fail("the signal was ignored")


def load():
    with preemptible("out"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)
        except Exception:
            pytest.fail("taken for an error of a library")


def train():
    with preemptible("out"):
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.requested()
        pytest.fail("a request that came too late for the training was lost")


def test_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="out: stopped on request"):
        work()
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_library_takes_it_for_an_error():
    with pytest.raises(Preempted):
        load()


def test_training_within_is_asked_instead():
    with pytest.raises(Preempted):
        train()
