"""How many steps go into one dispatch."""

from eqxmeta._loop.pace import Pace


def test_the_pace_aims_at_half_a_second_and_grows_with_care():
    pace = Pace("auto", 1024)
    limits = [pace.limit]
    for _ in range(5):
        pace.measured(pace.limit, pace.limit * 0.01)
        limits.append(pace.limit)
    assert limits == [1, 4, 16, 50, 50, 50]
    pace.measured(50, 50 * 0.1)
    assert pace.limit == 5
    pace.measured(5, 5 * 100.0)  # a step longer than the aim
    assert pace.limit == 1
    pace.measured(1, 0.0)
    assert pace.limit == 4
    fixed = Pace(7, 5)
    fixed.measured(1, 1.0)
    assert fixed.limit == 5


def test_the_pace_does_not_starve_behind_a_frequent_callback():
    # Chunks of one step say little; the limit must still grow beyond them for those who gain.
    pace = Pace("auto", 1024)
    for _ in range(20):
        pace.measured(1, 1e-5)
        assert pace.limit == 4
