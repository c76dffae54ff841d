"""What a run's fast paths do to the process they run in."""

from __future__ import annotations

import gc

from inlay.train.fast import settled_heap


def test_what_is_there_is_passed_by_for_the_run_alone():
    assert not gc.get_freeze_count()
    with settled_heap():
        assert gc.get_freeze_count() > 1000
    assert not gc.get_freeze_count()


def test_what_somebody_froze_stays_frozen():
    gc.freeze()
    try:
        with settled_heap():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
