"""Decoding from cached states against the full forward pass over the same tokens."""

import pytest
import torch

from m1.config.schema import RepetitionStopConfig, RewardConfig, SamplingConfig
from m1.data.chat import render_prompt
from m1.inference.engine import LocalEngine, Request
from m1.model.packing import pack
from m1.rollout.groups import completion_seed, sample_groups
from m1.types import Task

NUM_TOKENS = 60  # of 64 rows: the last four are padding
NEVER = 63  # padding is never sampled, so this stop token never comes
GENERATOR = torch.Generator().manual_seed(0)
# Lengths around the chunk of 32 tokens.
PROMPTS = [
    tuple(torch.randint(NUM_TOKENS, (length,), generator=GENERATOR).tolist())
    for length in (1, 3, 31, 32, 33, 50, 70)
]


def make_engine(model, *, stop_token=NEVER, **options):
    return LocalEngine(model, stop_token=stop_token, num_tokens=NUM_TOKENS, **options)


def one_each(prompts, seed=0):
    return [Request(prompt, (seed + i,)) for i, prompt in enumerate(prompts)]


def generate(engine, requests, **sampling):
    """Completions of all requests in one list."""
    groups = engine.generate(requests, SamplingConfig(**sampling))
    return [completion for group in groups for completion in group]


@torch.no_grad()
def forward_logprobs(model, completion):
    """Log-softmax [n, V] at the positions that predict the completion's tokens."""
    tokens = torch.tensor(completion.prompt_tokens + completion.tokens)[None, :-1]
    packing = pack(torch.tensor([tokens.shape[1]]))
    logits = model(tokens, packing.positions[None], None, packed_seq_params=packing)[0]
    return logits[len(completion.prompt_tokens) - 1 :].log_softmax(-1)


def test_greedy_tokens_are_the_argmax_of_the_full_forward(tiny_model):
    completions = generate(
        make_engine(tiny_model), one_each(PROMPTS), temperature=0, max_new_tokens=30
    )
    for completion in completions:
        expected = forward_logprobs(tiny_model, completion)[:, :NUM_TOKENS].argmax(-1)
        assert completion.tokens == tuple(expected.tolist())


@pytest.fixture(scope="module")
def long_model(make_model, tiny_config):
    return make_model(tiny_config.model_copy(update={"max_position": 1100}))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_thousand_tokens_are_those_of_the_full_forward(long_model, temperature):
    requests = one_each([PROMPTS[1], PROMPTS[-1]])
    completions = generate(
        make_engine(long_model), requests, temperature=temperature, max_new_tokens=1000
    )
    for completion in completions:
        logprobs = forward_logprobs(long_model, completion)
        if temperature == 0:
            assert completion.tokens == tuple(logprobs[:, :NUM_TOKENS].argmax(-1).tolist())
        chosen = logprobs.gather(1, torch.tensor(completion.tokens)[:, None]).squeeze(1)
        # Measured: 3e-6, no more at the end than at the start.
        assert (torch.tensor(completion.logprobs) - chosen).abs().max() < 2e-5


def test_logprobs_and_entropies_are_those_of_the_full_forward(tiny_model):
    completions = generate(make_engine(tiny_model), one_each(PROMPTS), max_new_tokens=30)
    for completion in completions:
        expected = forward_logprobs(tiny_model, completion)
        chosen = expected.gather(1, torch.tensor(completion.tokens)[:, None]).squeeze(1)
        entropies = -(expected.exp() * expected).sum(-1)
        # Measured: 1e-6 on log-probabilities down to -7, and on entropies.
        assert (torch.tensor(completion.logprobs) - chosen).abs().max() < 1e-5
        assert (torch.tensor(completion.entropies) - entropies).abs().max() < 1e-5


def test_logprobs_stay_right_while_finished_rows_leave_the_batch(tiny_model):
    engine = make_engine(tiny_model, stop_token=7)
    requests = [Request(p, tuple(range(3 * i, 3 * i + 3))) for i, p in enumerate(PROMPTS)]
    completions = generate(engine, requests, temperature=1.5, max_new_tokens=60)
    lengths = sorted(len(completion.tokens) for completion in completions)
    assert len(set(lengths)) > 8 and lengths[0] < 10 and lengths[-1] == 60
    for completion in completions:
        expected = forward_logprobs(tiny_model, completion)
        chosen = expected.gather(1, torch.tensor(completion.tokens)[:, None]).squeeze(1)
        assert (torch.tensor(completion.logprobs) - chosen).abs().max() < 1e-5


def test_a_group_shares_its_prompt_and_every_seed_has_its_own_tokens(tiny_model):
    requests = [Request(PROMPTS[2], (1, 2, 3, 2)), Request(PROMPTS[0], (4,))]
    groups = make_engine(tiny_model).generate(requests, SamplingConfig(max_new_tokens=20))
    assert [len(group) for group in groups] == [4, 1]
    assert {completion.prompt_tokens for completion in groups[0]} == {PROMPTS[2]}
    tokens = [completion.tokens for completion in groups[0]]
    assert tokens[1] == tokens[3]
    assert len(set(tokens)) == 3


def test_a_completion_does_not_depend_on_its_batch(tiny_model):
    engine = make_engine(tiny_model, stop_token=7)
    together = generate(engine, one_each(PROMPTS), top_p=0.95, max_new_tokens=12)
    for request, completion in zip(one_each(PROMPTS), together, strict=True):
        (alone,) = generate(engine, [request], top_p=0.95, max_new_tokens=12)
        assert alone.tokens == completion.tokens
        assert alone.finish_reason == completion.finish_reason
        assert alone.logprobs == pytest.approx(completion.logprobs, abs=1e-5)


@pytest.mark.parametrize("max_sequences", [1, 3])
def test_batches_of_bounded_size_give_the_same_completions(tiny_model, max_sequences):
    requests = one_each(PROMPTS)
    bounded = make_engine(tiny_model, max_sequences=max_sequences)
    expected = [c.tokens for c in generate(make_engine(tiny_model), requests, max_new_tokens=8)]
    assert [c.tokens for c in generate(bounded, requests, max_new_tokens=8)] == expected


def test_padded_ids_are_never_sampled(tiny_model):
    engine = LocalEngine(tiny_model, stop_token=NEVER, num_tokens=5)
    completions = generate(engine, one_each(PROMPTS), temperature=3.0, max_new_tokens=30)
    assert {token for c in completions for token in c.tokens} == set(range(5))


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"min_p": 1.0}], ids=str)
def test_the_recipes_filters_reach_the_sampler(tiny_model, filters):
    """Each of these leaves the likeliest token only."""
    engine, requests = make_engine(tiny_model), one_each(PROMPTS[:3])
    greedy = generate(engine, requests, temperature=0, max_new_tokens=12)
    filtered = generate(engine, requests, max_new_tokens=12, **filters)
    assert [c.tokens for c in filtered] == [c.tokens for c in greedy]


def test_a_completion_ends_with_its_first_stop_token(tiny_model):
    (free,) = generate(make_engine(tiny_model), [Request(PROMPTS[3], (5,))], max_new_tokens=12)
    stop = free.tokens[9]
    engine = make_engine(tiny_model, stop_token=stop)
    (stopped,) = generate(engine, [Request(PROMPTS[3], (5,))], max_new_tokens=12)
    end = free.tokens.index(stop) + 1
    assert stopped.tokens == free.tokens[:end]
    assert stopped.finish_reason == "stop"
    assert len(stopped.logprobs) == len(stopped.entropies) == end


def test_the_length_limit_truncates(tiny_model):
    (completion,) = generate(make_engine(tiny_model), one_each(PROMPTS[:1]), max_new_tokens=9)
    assert (len(completion.tokens), completion.finish_reason) == (9, "length")


def test_a_stop_token_at_the_length_limit_counts_as_stopped(tiny_model):
    (free,) = generate(make_engine(tiny_model), [Request(PROMPTS[3], (5,))], max_new_tokens=12)
    stop = free.tokens[9]
    limit = free.tokens.index(stop) + 1
    engine = make_engine(tiny_model, stop_token=stop)
    (completion,) = generate(engine, [Request(PROMPTS[3], (5,))], max_new_tokens=limit)
    assert (len(completion.tokens), completion.finish_reason) == (limit, "stop")


def first_streak_end(logprobs, *, count, probability):
    """Tokens up to the first `count` in a row whose probability is above the threshold."""
    streak = 0
    for number, logprob in enumerate(logprobs, start=1):
        streak = streak + 1 if logprob > torch.tensor(probability).log() else 0
        if streak == count:
            return number
    return None


@pytest.fixture(scope="module")
def unruled(tiny_model):
    return generate(make_engine(tiny_model), one_each(PROMPTS), max_new_tokens=25)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_repetition_ends_a_completion_at_exactly_its_count_of_confident_tokens(
    tiny_model, unruled, count
):
    rule = RepetitionStopConfig(num_tokens=count, probability=0.04)
    engine = make_engine(tiny_model, repetition_stop=rule)
    ruled = generate(engine, one_each(PROMPTS), max_new_tokens=25)
    ends = [first_streak_end(c.logprobs, count=count, probability=0.04) for c in unruled]
    assert len(set(ends)) > 1
    for before, after, end in zip(unruled, ruled, ends, strict=True):
        assert after.tokens == before.tokens[:end]
        assert after.finish_reason == ("repetition" if end else "length")


def test_completions_carry_the_policy_version_of_every_token(tiny_model):
    engine = make_engine(tiny_model)
    engine.policy_version = 12
    (completion,) = generate(engine, one_each(PROMPTS[:1]), max_new_tokens=3)
    assert completion.policy_versions == (12, 12, 12)


def test_sampling_leaves_the_models_mode_as_it_was(make_model, tiny_config):
    model = make_model(tiny_config)
    for mode in (True, False):
        model.train(mode)
        generate(make_engine(model), one_each(PROMPTS[:1]), max_new_tokens=2)
        assert model.training is mode


def test_groups_answer_the_rendered_prompt_and_depend_on_seed_task_and_number_alone(
    make_model, tiny_config, tiny_tokenizer
):
    model = make_model(tiny_config, vocab_size=320)
    engine = LocalEngine(model, stop_token=tiny_tokenizer.end, num_tokens=tiny_tokenizer.vocab_size)
    verifier = "reasoning_gym:chain_sum"
    tasks = [Task(name, "s", f"{name} and two is", "3", verifier) for name in ("one", "three")]

    def sampled(tasks, *, seed=1, group_size=3):
        groups = sample_groups(
            engine,
            tasks,
            tokenizer=tiny_tokenizer,
            group_size=group_size,
            sampling=SamplingConfig(max_new_tokens=6),
            reward=RewardConfig(),
            seed=seed,
        )
        return {g.task.task_id: [r.completion for r in g.rollouts] for g in groups}

    both = sampled(tasks)
    prompts = {name: {c.prompt_tokens for c in group} for name, group in both.items()}
    assert prompts == {t.task_id: {tuple(render_prompt(tiny_tokenizer, t.prompt))} for t in tasks}
    alone = sampled(tasks[1:], group_size=2)
    assert [c.tokens for c in alone["three"]] == [c.tokens for c in both["three"][:2]]
    assert [c.tokens for c in sampled(tasks[1:], seed=2)["three"]] != [
        c.tokens for c in both["three"]
    ]
    twice = sample_groups(
        engine,
        [tasks[0], tasks[0]],
        tokenizer=tiny_tokenizer,
        group_size=3,
        sampling=SamplingConfig(max_new_tokens=6),
        reward=RewardConfig(),
        seed=1,
    )
    first, second = ([r.completion.tokens for r in g.rollouts] for g in twice)
    assert first != second  # a task drawn twice in a batch is sampled anew
    seeds = {completion_seed(s, t, i) for s in (0, 1) for t in tasks for i in range(50)}
    assert len(seeds) == 200
