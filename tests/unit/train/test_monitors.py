import math

import pytest
from pydantic import ValidationError

from m1.config.schema import AlarmConfig
from m1.train.monitors import Alarms, Patience
from m1.types import M1Error


def alarms(*configs):
    told = []
    return Alarms(configs, told.append), told


def test_a_warning_names_the_monitor_its_value_and_its_bound():
    watch, told = alarms(AlarmConfig(monitor="entropy_nats", below=0.1))
    assert not watch.check({"rl/entropy_nats": 0.2})
    assert not watch.check({"rl/entropy_nats": 0.05})
    assert told == ["rl/entropy_nats is 0.05, below 0.1 (action: warn)"]
    assert watch.num_raised == 1


def test_skip_leaves_the_updates_out_and_stop_ends_the_stage():
    watch, told = alarms(
        AlarmConfig(monitor="mismatch_kl_nats", above=0.1, action="skip"),
        AlarmConfig(monitor="accuracy", below=0.5, action="stop"),
    )
    assert watch.check({"rl/mismatch_kl_nats": 0.2, "rl/accuracy": 0.6})
    assert not watch.check({"rl/mismatch_kl_nats": 0.1, "rl/accuracy": 0.5})
    with pytest.raises(M1Error, match=r"rl/accuracy is 0.4, below 0.5 .*checkpoint is intact"):
        watch.check({"rl/accuracy": 0.4})
    assert len(told) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_out_of_bounds(value):
    watch, told = alarms(AlarmConfig(monitor="mismatch_kl_nats", above=0.1, action="skip"))
    assert watch.check({"rl/mismatch_kl_nats": value}) and len(told) == 1


def test_patience_counts_steps_in_a_row_and_survives_a_checkpoint():
    config = AlarmConfig(monitor="perplexity", above=2.0, action="skip", patience=3)
    watch, _ = alarms(config)
    seen = [watch.check({"rl/perplexity": x}) for x in (3, 3, 1, 3, 3)]
    assert seen == [False] * 5
    resumed, told = alarms(config)
    resumed.restore(watch.state())
    assert resumed.check({"rl/perplexity": 3}) and "for 3 steps" in told[0]


def test_a_metric_that_a_step_lacks_is_no_alarm():
    watch, told = alarms(AlarmConfig(monitor="perplexity", above=2.0))
    assert not watch.check({}) and not told


def test_an_alarm_without_bounds_or_with_a_late_skip_is_refused():
    with pytest.raises(ValidationError, match="no bound"):
        AlarmConfig(monitor="perplexity")
    with pytest.raises(ValidationError, match="only after the updates"):
        AlarmConfig(monitor="clip_fraction", above=0.1, action="skip")


def test_bad_steps_in_a_row_end_the_stage_with_the_last_reason():
    told = []
    patience = Patience(3, told.append)
    patience.bad("one")
    patience.good()
    patience.bad("two")
    patience.bad("three")
    with pytest.raises(M1Error, match=r"3 steps in a row .* four"):
        patience.bad("four")
    assert len(told) == 3 and told[0] == "no update in this step: one"
