"""The example of the README runs and freezes."""

from examples.own_loop import STEPS, main


def test_own_loop():
    active = main()
    assert len(active) == STEPS
    assert max(active) == 8
    assert min(active) <= 5
