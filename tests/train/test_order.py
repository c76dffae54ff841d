"""The order of rows."""

from __future__ import annotations

from inlay.train.order import Order, seed_of


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own():
    order = Order(rows=23, per_step=4, seed=1)
    epochs = []
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        steps = [order.indices(first + s) for s in range(order.steps_per_epoch)]
        assert [len(step) for step in steps] == [4, 4, 4, 4, 4, 3]
        epochs.append([i for step in steps for i in step])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(23))
    assert epochs[0] != epochs[1]
    assert Order(23, 4, seed=2).indices(0) != order.indices(0) == epochs[0][:4]


def test_the_cut_of_steps_does_not_change_the_order():
    one = [i for s in range(12) for i in Order(24, 2, 5).indices(s)]
    assert one == [i for s in range(3) for i in Order(24, 8, 5).indices(s)]


def test_seeds_of_near_numbers_differ():
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900
