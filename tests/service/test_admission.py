"""Room by number and by rate, on a clock of its own."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from core.errors import TooManyRequests
from service.admission import Admission


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def work(admission, clock, *, images: int, each_s: float) -> None:
    """One image after the other."""
    for _ in range(images):
        with admission.admit(1):
            clock.now_s += each_s


def test_no_more_than_the_limit_at_a_time(clock):
    refused = []
    admission = Admission(3, on_refusal=refused.append, now=clock)
    with admission.admit(1):
        with pytest.raises(TooManyRequests), admission.admit(3):
            pass
        with admission.admit(2):
            assert admission.in_flight == 3
        assert admission.in_flight == 1
    assert admission.in_flight == 0
    assert refused == [3]


def test_a_place_is_free_again_whatever_happened(clock):
    admission = Admission(1, now=clock)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.admit(1):
            raise ZeroDivisionError
    assert admission.in_flight == 0


def test_who_could_not_be_answered_within_the_deadline_is_refused(clock):
    admission = Admission(256, always=4, deadline_s=10.0, now=clock)
    assert admission.room == 256  # nothing is known yet
    work(admission, clock, images=30, each_s=0.1)
    assert admission.room == 70  # 0.7 of what leaves in 10 s
    work(admission, clock, images=200, each_s=0.01)
    assert admission.room == 256
    work(admission, clock, images=12, each_s=1.0)
    assert admission.room == 7
    work(admission, clock, images=3, each_s=5.0)
    assert admission.room == 4  # as many as always


def test_time_without_images_makes_nobody_slow(clock):
    admission = Admission(256, always=4, deadline_s=10.0, now=clock)
    for _ in range(60):
        work(admission, clock, images=1, each_s=0.01)
        clock.now_s += 0.1
    assert admission.room == 256


def test_what_was_slow_long_ago_is_forgotten(clock):
    admission = Admission(256, always=4, deadline_s=10.0, now=clock)
    work(admission, clock, images=5, each_s=2.0)
    assert admission.room == 4
    clock.now_s += 11
    assert admission.room == 256


def test_retry_after_is_when_there_is_room_at_the_rate_of_late(clock):
    admission = Admission(10, now=clock)
    assert admission.retry_after_s(1) == 1
    work(admission, clock, images=20, each_s=0.5)
    with ExitStack() as held:
        held.enter_context(admission.admit(10))
        assert admission.retry_after_s(1) == 1
        assert admission.retry_after_s(8) == 4  # two a second
        assert admission.retry_after_s(1000) == 60
