import threading

import numpy as np
import pytest

from trimtab.errors import ConfigError
from trimtab.training.data.prefetch import Prefetched
from trimtab.training.data.segments import all_trained
from trimtab.training.data.sources.base import Source


class Counting(Source):
    """Segments of the lengths 1, 2, 3, ... up to `most`; then an error."""

    def __init__(self, most=10_000):
        self.given, self.most = 0, most

    def next(self):
        if self.given == self.most:
            raise ConfigError("the data is broken")
        self.given += 1
        return all_trained(np.full(self.given, self.given))

    def state(self):
        return {"given": self.given}

    def restore(self, state):
        self.given = state["given"]


def lengths(batch):
    return [len(s) for s in batch[0]]


def test_batches_and_their_states_are_those_of_the_source_alone():
    with Prefetched(Counting(), 10) as batches:
        assert lengths(batches.next_batch()) == [1, 2, 3, 4]
        segments, state = batches.next_batch()
        assert [len(s) for s in segments] == [5, 6] and state == {"given": 6}
        following = [lengths(batches.next_batch()) for _ in range(5)]
    source = Counting()
    source.restore(state)
    with Prefetched(source, 10) as resumed:
        assert [lengths(resumed.next_batch()) for _ in range(5)] == following


def test_what_the_source_raises_comes_in_its_turn_and_again():
    with Prefetched(Counting(most=4), 3) as batches:
        assert lengths(batches.next_batch()) == [1, 2]
        assert lengths(batches.next_batch()) == [3]
        assert lengths(batches.next_batch()) == [4]
        for _ in range(2):
            with pytest.raises(ConfigError, match="the data is broken"):
                batches.next_batch()


def test_no_thread_is_left_and_none_is_started_for_nothing():
    before = threading.active_count()
    unused = Prefetched(Counting(), 10)
    assert threading.active_count() == before
    unused.close()
    batches = Prefetched(Counting(), 10)
    batches.next_batch()
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
