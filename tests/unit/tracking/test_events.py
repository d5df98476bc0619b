import multiprocessing

import pytest

from m1.tracking.events import EventLog, read_events


def _emit_many(path, stage):
    log = EventLog(path)
    for step in range(200):
        log.emit(stage, "progress", step=step, metrics={"x/loss": 1.0 / (step + 1)})


def test_events_come_back_in_order_with_their_fields(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.emit("data", "start")
    log.emit("data", "progress", step=3, total=9, phase="tokenizing", metrics={"data/rows": 5.0})
    events, _ = read_events(path)
    assert [event["event"] for event in events] == ["start", "progress"]
    assert events[1]["step"] == 3
    assert events[1]["metrics"] == {"data/rows": 5.0}
    assert events[0]["time"] <= events[1]["time"]


def test_reading_continues_where_it_stopped(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.emit("data", "start")
    _, offset = read_events(path)
    assert read_events(path, offset) == ([], offset)
    log.emit("data", "end")
    events, _ = read_events(path, offset)
    assert [event["event"] for event in events] == ["end"]


def test_torn_last_line_waits_for_its_rest(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"stage": "data", "event": "start"}\n{"stage": "data", "ev')
    events, offset = read_events(path)
    assert len(events) == 1
    with path.open("ab") as file:
        file.write(b'ent": "end"}\n')
    events, _ = read_events(path, offset)
    assert [event["event"] for event in events] == ["end"]


@pytest.mark.parametrize("junk", [b"{half", b"17", b"\xff\xfe", b'{"no": "stage"}', b""])
def test_line_that_is_no_event_is_skipped(tmp_path, junk):
    path = tmp_path / "events.jsonl"
    path.write_bytes(junk + b'\n{"stage": "data", "event": "end"}\n')
    events, offset = read_events(path)
    assert [event["event"] for event in events] == ["end"]
    assert offset == path.stat().st_size


def test_file_started_anew_is_read_from_its_beginning(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for _ in range(3):
        log.emit("data", "progress")
    _, offset = read_events(path)
    path.unlink()
    log.emit("data", "start")
    events, _ = read_events(path, offset)
    assert [event["event"] for event in events] == ["start"]


def test_missing_file_has_no_events(tmp_path):
    assert read_events(tmp_path / "absent", 5) == ([], 5)


def test_log_without_a_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    EventLog(None).emit("data", "start")
    assert list(tmp_path.iterdir()) == []


def test_lines_of_concurrent_processes_do_not_mix(tmp_path):
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_emit_many, args=(path, name)) for name in ("a", "b", "c")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    events, _ = read_events(path)
    assert len(events) == 600
    for name in ("a", "b", "c"):
        assert [event["step"] for event in events if event["stage"] == name] == list(range(200))
