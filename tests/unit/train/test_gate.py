import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.config.schema import GateConfig, LengthStageConfig
from m1.train.gate import GateEvidence, GateState, LengthGate, advance
from m1.types import Completion, Reward, Rollout, RolloutGroup, Task

LENGTH = LengthStageConfig(max_new_tokens=1000, min_steps=1, max_steps=10_000)
CONFIG = GateConfig(
    window_steps=5,
    perplexity_tolerance=0.02,
    perplexity_release=0.04,
    length_fraction=0.9,
    length_release=0.85,
    hold_steps=3,
)


def replay(trace, config=CONFIG, length=LENGTH):
    """Decisions for (log_perplexity, p99) pairs."""
    state, decisions = GateState(), []
    for log_perplexity, p99 in trace:
        state, decision = advance(state, GateEvidence(log_perplexity, p99), config, length)
        decisions.append(decision)
    return decisions


def verdicts(trace, **given):
    return [decision.verdict for decision in replay(trace, **given)]


def completion(logprobs):
    n = len(logprobs)
    return Completion((1,), (2,) * n, tuple(logprobs), (0.0,) * n, "stop", (0,) * n)


def group(logprobs, *, is_failed=False):
    task = Task("t", "s", "p", "r", "v")
    rollout = Rollout(task, completion(logprobs), Reward(1.0, 1.0, {}, is_failed))
    return RolloutGroup(task, (rollout,))


def test_without_a_length_no_gate_ends_a_stage():
    gate = LengthGate(CONFIG, None)
    assert [gate.step([group([-1.0] * 999)]) for _ in range(50)] == [{}] * 50
    assert not gate.is_done
    assert gate.facts() == {}


def test_evidence_is_the_mean_over_tokens_and_the_99th_percentile_of_lengths():
    evidence = GateEvidence.of([completion([-1.0]), completion([-2.0, -3.0, -4.0])])
    assert evidence.log_perplexity == 2.5
    assert evidence.length_p99 == pytest.approx(1 + 0.99 * 2)


def test_a_step_without_tokens_says_nothing_and_holds_it_shut():
    evidence = GateEvidence.of([completion([]), completion([])])
    assert math.isnan(evidence.log_perplexity)
    assert math.isnan(evidence.length_p99)
    gate = LengthGate(CONFIG, LENGTH)
    for _ in range(9):
        gate.step([group([-1.0] * 950)])
    gate.step([])
    for _ in range(8):
        gate.step([group([-1.0] * 950)])
    assert gate.last is not None
    assert gate.last.verdict == "stay"


def test_failed_rollouts_are_no_evidence():
    gate = LengthGate(CONFIG, LENGTH)
    for _ in range(12):
        gate.step([group([-1.0] * 950), group([-9.0], is_failed=True)])
    assert gate.is_done


def test_it_opens_on_the_step_at_which_both_have_held_long_enough():
    # Ten steps fill both windows; the tenth is the first to hold, the twelfth the third in a row.
    found = verdicts([(1.0, 950)] * 12)
    assert found == ["stay"] * 11 + ["open"]


@pytest.mark.parametrize(
    "trace",
    [
        [(1.0, 800)] * 200,  # converged, but completions are short
        [(2.0 - 0.01 * i, 990) for i in range(200)],  # long, but still falling
        [(1.0 + 0.01 * i, 990) for i in range(200)],  # long, but rising
    ],
    ids=["short", "falling", "rising"],
)
def test_one_condition_alone_never_opens_it(trace):
    assert set(verdicts(trace)) == {"stay"}


def test_it_opens_when_the_second_condition_arrives():
    trace = [(2.0 - 0.01 * min(i, 60), 990) for i in range(100)]
    opened = verdicts(trace).index("open")
    decisions = replay(trace)
    # A slope of 0.01 a step puts medians of neighbouring windows of 5 steps 0.05 apart.
    assert decisions[opened - 2].is_converged
    assert not decisions[opened - 3].is_converged
    assert all(d.is_near_limit for d in decisions[9 : opened + 1])


@pytest.mark.parametrize("spike", [(1.0, 1000), (-5.0, 1000), (50.0, 1000)])
def test_spikes_of_length_never_open_it(spike):
    trace = [(1.0, 700)] * 60
    for start in range(12, 60, 7):
        trace[start : start + 2] = [spike] * 2
    assert set(verdicts(trace)) == {"stay"}


def test_a_spike_neither_closes_what_holds_nor_moves_the_decision():
    calm = [(1.0, 950)] * 12
    spiked = [*calm[:10], (30.0, 3), *calm[11:]]
    assert verdicts(spiked) == verdicts(calm)


def test_hysteresis_keeps_what_hovers_at_the_threshold():
    config = CONFIG.model_copy(update={"hold_steps": 20})
    hovering = [(1.0, 950)] * 10 + [(1.0, 895 if i % 10 < 5 else 905) for i in range(40)]
    assert "open" in verdicts(hovering, config=config)
    strict = config.model_copy(update={"length_release": 0.9})
    assert "open" not in verdicts(hovering, config=strict)


def test_below_the_release_value_the_count_starts_anew():
    config = CONFIG.model_copy(update={"hold_steps": 12})
    trace = [(1.0, 950)] * 15 + [(1.0, 800)] * 5 + [(1.0, 950)] * 30
    decisions = replay(trace, config=config)
    lost = next(i for i, d in enumerate(decisions) if i > 10 and not d.num_held)
    opened = [d.verdict for d in decisions].index("open")
    assert 15 < lost < 20
    assert decisions[opened].num_held == 12
    assert opened > lost + 12


def test_minimum_and_maximum_steps_bound_the_stage():
    late = LENGTH.model_copy(update={"min_steps": 30})
    assert verdicts([(1.0, 950)] * 40, length=late).index("open") == 29
    short = LENGTH.model_copy(update={"max_steps": 8})
    assert verdicts([(1.0, 950)] * 8, length=short) == ["stay"] * 7 + ["out_of_steps"]


def test_at_the_last_step_an_open_gate_is_called_open():
    exact = LENGTH.model_copy(update={"max_steps": 12})
    assert verdicts([(1.0, 950)] * 12, length=exact)[-1] == "open"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_holds_it_shut_while_in_a_window(bad):
    trace = [(1.0, 950)] * 9 + [(bad, 950)] + [(1.0, 950)] * 20
    found = verdicts(trace)
    assert found.index("open") == 9 + 10 + 2  # until it has left both windows, then three steps


def test_a_decision_carries_its_evidence():
    decision = replay([(math.log(4.0), 920)] * 5 + [(math.log(4.0) + 0.01, 940)] * 7)[-1]
    metrics = decision.metrics()
    assert decision.verdict == "open"
    assert metrics["rl/gate_perplexity"] == pytest.approx(4.0 * math.exp(0.01))
    assert metrics["rl/gate_length_p99_tokens"] == 940
    assert metrics["rl/gate_held_steps"] == 3
    assert "rl/gate_perplexity" not in replay([(1.0, 950)])[0].metrics()


evidence = st.tuples(
    st.floats(0.0, 3.0), st.sampled_from([10.0, 600.0, 860.0, 899.0, 901.0, 1000.0])
)
steady = st.tuples(st.floats(0.99, 1.01), st.sampled_from([899.0, 901.0, 1000.0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(evidence, steady, steady), max_size=60), st.integers(0, 59))
def test_resumed_anywhere_it_decides_the_same(trace, cut):
    whole = LengthGate(CONFIG, LENGTH)
    first, second = LengthGate(CONFIG, LENGTH), LengthGate(CONFIG, LENGTH)
    decisions = []
    for number, (log_perplexity, tokens) in enumerate(trace):
        batch = [group([-log_perplexity] * int(tokens))]
        if number == cut:
            second.restore(json.loads(json.dumps(first.state())))
        here = second if number >= cut else first
        decisions.append((whole.step(batch), here.step(batch)))
    assert all(a == b for a, b in decisions)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(evidence, steady, steady, steady), max_size=80))
def test_open_means_that_the_definitions_hold_over_the_windows(trace):
    """Against the definitions, computed anew: no step opens without both conditions."""
    w = CONFIG.window_steps
    for number, decision in enumerate(replay(trace)):
        if decision.verdict != "open":
            continue
        for end in range(number + 2 - CONFIG.hold_steps, number + 2):
            newer, older = trace[end - w : end], trace[end - 2 * w : end - w]
            change = sorted(p for p, _ in newer)[w // 2] - sorted(p for p, _ in older)[w // 2]
            assert abs(change) <= CONFIG.perplexity_release
            p99 = sorted(t for _, t in newer)[w // 2]
            assert p99 >= CONFIG.length_release * LENGTH.max_new_tokens


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.booleans(), min_size=40, max_size=80),
    st.floats(0, 100),
    st.sampled_from([1000.0, 5000.0]),
)
def test_fewer_spikes_than_half_a_window_change_nothing(places, log_perplexity, tokens):
    """Two spiked steps in any five leave medians of five where they were."""
    trace, base = [], (1.0, 700.0)
    for is_spike in places:
        spikes = sum(one != base for one in trace[-4:])
        trace.append((log_perplexity, tokens) if is_spike and spikes < 2 else base)
    assert set(verdicts(trace)) == {"stay"}


def test_state_stays_small():
    gate = LengthGate(CONFIG, LENGTH)
    for _ in range(500):
        gate.step([group([-1.0] * 10)])
    assert len(gate.state()["recent"]) == 2 * CONFIG.window_steps
    assert gate.state()["step"] == 500
    assert gate.facts()["gate"]["verdict"] == "stay"
