from m1.config.schema import SamplingConfig
from m1.rollout.dialogue import EnginePolicy
from m1.types import Completion


class EchoEngine:
    """An engine whose completions are given, and which records what it is asked."""

    policy_version = 7

    def __init__(self, tokenizer, texts, *, is_cut=False):
        self.tokenizer, self.texts, self.is_cut, self.requests = tokenizer, list(texts), is_cut, []

    def generate(self, requests, sampling):
        found = []
        for request in requests:
            self.requests.append(request)
            tokens = self.tokenizer.encode(self.texts.pop(0))
            tokens += [] if self.is_cut else [self.tokenizer.end]
            numbers = tuple(-0.5 - i for i in range(len(tokens)))
            reason = "length" if self.is_cut else "stop"
            versions = (self.policy_version,) * len(tokens)
            found.append(
                [
                    Completion(
                        request.prompt_tokens, tuple(tokens), numbers, numbers, reason, versions
                    )
                ]
            )
        return found

    def load_weights(self, uri, version):
        raise NotImplementedError


def test_every_prompt_is_the_last_one_its_completion_and_the_observation(tiny_tokenizer):
    t = tiny_tokenizer
    engine = EchoEngine(t, ["one and", "two is", "three"])
    policy = EnginePolicy(engine, t, SamplingConfig())
    dialogue = policy.begin("what is one", key="a")
    for text in ("and two", "<|end|> is"):
        policy.reply([dialogue])
        dialogue.observe(text)
    policy.reply([dialogue])
    first, second, third = (list(r.prompt_tokens) for r in engine.requests)
    assert first == [t.user, *t.encode("what is one"), t.end, t.assistant]
    assert second == [
        *first,
        *t.encode("one and"),
        t.end,
        t.user,
        *t.encode("and two"),
        t.end,
        t.assistant,
    ]
    assert third == [
        *second,
        *t.encode("two is"),
        t.end,
        t.user,
        *t.encode("<|end|> is"),
        t.end,
        t.assistant,
    ]
    assert third.count(t.end) == 5  # the observation's spelling of it is text


def test_the_mask_covers_exactly_what_was_sampled(tiny_tokenizer):
    t = tiny_tokenizer
    engine = EchoEngine(t, ["one and", "two is"])
    policy = EnginePolicy(engine, t, SamplingConfig())
    dialogue = policy.begin("what", key="a")
    policy.reply([dialogue])
    dialogue.observe("and")
    policy.reply([dialogue])
    dialogue.observe("never answered")
    found = dialogue.trajectory()
    sampled = [token for token, ours in zip(found.tokens, found.loss_mask, strict=True) if ours]
    assert sampled == [*t.encode("one and"), t.end, *t.encode("two is"), t.end]
    assert all((lp < 0) == ours for lp, ours in zip(found.logprobs, found.loss_mask, strict=True))
    assert all(
        (v == 7) == ours for v, ours in zip(found.policy_versions, found.loss_mask, strict=True)
    )
    assert found.loss_mask[-1]  # what no reply follows is left out


def test_a_reply_that_was_cut_gets_its_end_from_us_outside_the_mask(tiny_tokenizer):
    t = tiny_tokenizer
    policy = EnginePolicy(EchoEngine(t, ["one and"], is_cut=True), t, SamplingConfig())
    dialogue = policy.begin("what", key="a")
    (reply,) = policy.reply([dialogue])
    dialogue.observe("shorter")
    assert reply.is_cut and reply.text == "one and"
    cut = dialogue.tokens.index(t.assistant) + 1 + len(t.encode("one and"))
    assert dialogue.tokens[cut] == t.end and not dialogue.loss_mask[cut]


def test_random_streams_differ_by_episode_and_turn_and_not_by_neighbours(tiny_tokenizer):
    t = tiny_tokenizer
    engine = EchoEngine(t, ["one"] * 5)
    policy = EnginePolicy(engine, t, SamplingConfig(), seed=3)
    a, b = policy.begin("what", key="a"), policy.begin("what", key="b")
    policy.reply([a, b])
    a.observe("x")
    policy.reply([a])
    again = policy.begin("what", key="a")
    policy.reply([again])
    seeds = [r.seeds[0] for r in engine.requests]
    assert len({*seeds[:3]}) == 3 and seeds[3] == seeds[0]
