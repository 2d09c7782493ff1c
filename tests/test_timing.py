"""The clock of the benchmarks: quantiles, turns, rounds that count, sets of inputs, the peak of tensors."""

import pytest
import torch


def test_quantiles_are_those_of_the_samples(bench):
    timing = bench("timing").Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (timing.p20, timing.p50, timing.p80) == (2.0, 3.5, 5.0)
    assert bench("timing").Timing.of([2.0]).p80 == 2.0
    with pytest.raises(ValueError, match="at least one sample"):
        bench("timing").Timing.of([])


def test_contestants_are_timed_in_turn_over_all_sets(bench, monkeypatch):
    timing = bench("timing")
    now, seen = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name, at, seconds):
        def run():
            seen.append((name, at))
            now[0] += seconds

        return run

    calls = {name: [call(name, at, s) for at in range(3)] for name, s in (("slow", 2.0), ("fast", 1.0))}
    found = timing.in_turn(calls, "cpu", seconds=1.0)
    assert (found["slow"].p50, found["fast"].p50) == (2.0, 1.0)
    for name in calls:
        assert {at for n, at in seen if n == name} == {0, 1, 2}
    rounds = [name for name, _ in seen[-2 * timing._LEAST_ROUNDS :]]
    assert rounds[:4] == ["slow", "fast", "fast", "slow"]


def test_rounds_beside_other_processes_are_taken_again_while_there_is_time(bench, monkeypatch, capsys):
    timing = bench("timing")
    now, busy, seen = [0.0], iter([True, False, False, True, *[False] * 9]), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "_elsewhere", lambda: (0.0, now[0]))
    monkeypatch.setattr(timing, "_busy_since", lambda before: float(next(busy)))

    def call():
        now[0] += 1.0
        seen.append(1)

    assert timing.in_turn({"one": [call]}, "cpu", seconds=10.0)["one"].p50 == 1.0
    assert len(seen) == 4 + 10 + 2  # to warm up, that count, that do not
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(timing, "_busy_since", lambda before: 1.0)
    seen.clear()
    timing.in_turn({"one": [call]}, "cpu", seconds=1.0)
    assert len(seen) == 4 + 7 + 5
    assert "other processes ran during 7 of 7 rounds that count" in capsys.readouterr().err


def test_what_others_take_of_the_cores_is_seen(bench):
    timing = bench("timing")
    took, now = timing._elsewhere()
    assert timing._busy_since((took, timing.time.perf_counter())) == 0.0  # too short to tell
    assert 0.9 < timing._busy_since((took - 10 * timing.os.cpu_count(), now - 10)) < 2.1


def test_short_calls_are_repeated_within_a_sample(bench):
    seen = []
    found = bench("timing").in_turn({"nothing": [lambda: seen.append(1)]}, "cpu", seconds=0.0)["nothing"]
    assert len(seen) > 100 * bench("timing")._LEAST_ROUNDS
    assert 0 < found.p20 <= found.p50 <= found.p80 < 1e-4


def test_sets_together_exceed_the_cache(bench, monkeypatch):
    timing = bench("timing")
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    assert timing.sets_needed(100, "cpu") == 20
    assert timing.sets_needed(10**9, "cpu") == 2
    assert timing.sets_needed(1, "cpu") == 32


def test_the_peak_counts_what_is_held_at_once(bench):
    def call():
        first = torch.empty(1 << 18)
        second = first + 1
        del first
        return second * 2

    assert (2 << 20) <= bench("timing").peak_bytes(call, "cpu") < (2 << 20) + 4096
