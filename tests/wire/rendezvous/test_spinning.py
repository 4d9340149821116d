"""When a wait looks again and again, and when it sleeps at once."""

from __future__ import annotations

from grafter.wire.rendezvous.spinning import Spinning


def waits_without_spin(spinning: Spinning) -> int:
    """How many waits sleep at once before one spins again."""
    count = 0
    while not spinning.until():
        count += 1
    return count


def test_ranks_without_a_core_of_their_own_never_spin() -> None:
    assert Spinning(worthwhile=False).until() == 0.0


def test_spins_that_do_not_pay_become_rare_and_one_that_pays_brings_them_back() -> None:
    spinning = Spinning(worthwhile=True)
    assert waits_without_spin(spinning) == 0
    pauses = []
    for _ in range(10):
        spinning.record(paid=False)
        pauses.append(waits_without_spin(spinning))
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 256]
    spinning.record(paid=True)
    assert waits_without_spin(spinning) == 0
