"""Entries of the curves: means over the steps since the last entry, and samples a second of all of them."""

from training._runs import curves

from onepeace_fast.training import logs
from onepeace_fast.training.logs import Logs


def test_an_entry_is_of_the_steps_since_the_last_one_also_where_the_run_ends_between_two(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(logs.time, "perf_counter", lambda: float(next(clock)))
    with Logs(tmp_path, 0, 5, every=2, pairs=12) as written:
        for step in range(1, 6):
            written.add(step, {"loss": float(step**2), "learning_rate": 0.1})
    assert written.summary() == "Loss: 2.5 (mean of 2 steps) at first, 25 (mean of 1 step) at the end"
    seen = curves(tmp_path)
    assert seen["loss"] == {2: 2.5, 4: 12.5, 5: 25.0}
    # A second passes from one look at the clock to the next, and there is one at the beginning and one at the end.
    assert seen["samples_per_second"] == {2: 24.0, 4: 24.0, 5: 12.0}
