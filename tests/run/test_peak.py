"""The memory of a stretch of a run."""

from __future__ import annotations

import time

import torch

from inlay.run.peak import Peak


def test_the_peak_is_what_was_taken_at_most_and_not_what_is_left():
    peak = Peak(torch.device("cpu"))
    assert peak.stop() == 0.0
    peak.start()
    held = torch.ones(40 << 18)  # 40 MiB
    time.sleep(0.05)
    del held
    assert 35 < peak.stop() < 120
    peak.start()
    assert peak.stop() < 35
