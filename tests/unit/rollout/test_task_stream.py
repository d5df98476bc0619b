import pytest

from m1.types import M1Error
from tests.unit.rollout.making import names, stream


def test_a_task_stream_takes_every_task_once_an_epoch():
    tasks = stream(5)
    taken = [name for _ in range(5) for name in names(tasks.take(3))]
    for epoch in range(3):
        assert sorted(taken[5 * epoch : 5 * epoch + 5]) == ["0", "1", "2", "3", "4"]
    assert tasks.cursor == 15


def test_a_task_stream_resumes_from_its_cursor():
    tasks = stream(7)
    tasks.take(9)
    resumed = stream(7)
    resumed.restore(tasks.state())
    assert names(resumed.take(11)) == names(tasks.take(11))


def test_a_task_stream_without_tasks_is_refused():
    with pytest.raises(M1Error, match="num_rl"):
        stream(0)
