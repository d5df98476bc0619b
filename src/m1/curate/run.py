"""The steps of curation in order, each task's fate recorded."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

from m1.curate import overlap
from m1.curate.embeddings import Encoder, open_encoder
from m1.curate.filters import FILTERS, opened, options
from m1.curate.pass_rate import Judge, PassRate, Sampler, decide, measure
from m1.curate.settings import CurateConfig
from m1.types import M1Error, Task


@dataclass(frozen=True)
class Dropped:
    """One task that went, where and why."""

    task: Task
    step: str
    reason: str
    because_of: str | None = None
    """Id of the task it repeats or overlaps with."""


@dataclass
class Curated:
    """What stays, what went, and how many were left after every step."""

    tasks: list[Task]
    dropped: list[Dropped] = field(default_factory=list)
    funnel: list[tuple[str, int]] = field(default_factory=list)
    num_opened: int = 0
    """Multiple-choice tasks that became open ones."""


def curate(
    tasks: Sequence[Task],
    config: CurateConfig,
    *,
    sft: Sequence[Task] = (),
    benchmarks: Sequence[Task] = (),
    encoder: Encoder | None = None,
    sampler: Sampler | None = None,
    judge: Judge | None = None,
    known_rates: MutableMapping[str, PassRate] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Curated:
    """Run all steps of `config` on tasks that are in memory already.

    Raises:
        M1Error: Pass rates are asked for without a sampler and a judge, or no encoder is there.
    """
    if config.pass_rate is not None and (sampler is None or judge is None):
        raise M1Error(
            "pass_rate needs a model to sample; name one in pass_rate.model, or leave pass_rate out"
        )
    state = Curated(list(tasks), funnel=[("input", len(tasks))])
    report("filters")
    if config.open_choices:
        _open_choices(state)
    for name in config.drop:
        _drop(state, name, {i: (FILTERS[name](t), None) for i, t in enumerate(state.tasks)})
    vectors = _Vectors(config, encoder)
    if config.duplicates is not None:
        report("duplicates")
        _deduplicate(state, config, vectors)
    for step, others in (("sft", sft), ("benchmarks", benchmarks)):
        if config.contamination is not None and others:
            report(f"separation from {step}")
            _separate(state, config, step, others, vectors)
    if config.pass_rate is not None and sampler is not None and judge is not None:
        report("pass rates")
        rates = measure(
            state.tasks,
            sampler,
            judge,
            config.pass_rate.num_samples,
            known=known_rates,
            report=report,
        )
        state.tasks = [
            replace(t, metadata={**t.metadata, "pass_rate": rate.share})
            for t, rate in zip(state.tasks, rates, strict=True)
        ]
        reasons = {i: (decide(rate, config.pass_rate), None) for i, rate in enumerate(rates)}
        _drop(state, "pass_rate", reasons)
    return state


class _Vectors:
    """Vectors of prompts, computed once a text and only when a threshold asks for them."""

    def __init__(self, config: CurateConfig, encoder: Encoder | None) -> None:
        self._config, self._encoder = config, encoder
        self._known: dict[str, overlap.Vectors] = {}

    def of(self, tasks: Sequence[Task]) -> overlap.Vectors:
        import numpy as np

        new = list(dict.fromkeys(t.prompt for t in tasks if t.prompt not in self._known))
        if new:
            if self._encoder is None:
                self._encoder = open_encoder(self._config.encoder)
            self._known.update(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._known[task.prompt] for task in tasks])


def _open_choices(state: Curated) -> None:
    for number, task in enumerate(state.tasks):
        if task.domain in ("maths", "") and len(options(task.prompt)) >= 3:
            rewritten = opened(task)
            if rewritten is not None:
                state.tasks[number] = rewritten
                state.num_opened += 1


def _deduplicate(state: Curated, config: CurateConfig, vectors: _Vectors) -> None:
    assert config.duplicates is not None
    settings = config.duplicates
    _drop_pairs(state, "exact_duplicate", overlap.exact_duplicates(state.tasks), state.tasks)
    near = overlap.near_duplicates(
        state.tasks, num_words=settings.ngram_words, threshold=settings.ngram_threshold
    )
    _drop_pairs(state, "ngram_duplicate", near, state.tasks)
    if settings.embedding_threshold is not None and state.tasks:
        prompts = [task.prompt for task in state.tasks]
        similar = overlap.similar_within(
            vectors.of(state.tasks),
            settings.embedding_threshold,
            agree=lambda a, b: overlap.same_numbers(prompts[a], prompts[b]),
        )
        _drop_pairs(state, "embedding_duplicate", similar, state.tasks)


def _separate(
    state: Curated, config: CurateConfig, step: str, others: Sequence[Task], vectors: _Vectors
) -> None:
    assert config.contamination is not None
    settings = config.contamination
    found = overlap.contaminated(
        state.tasks, others, num_words=settings.ngram_words, share=settings.ngram_share
    )
    _drop_pairs(state, f"{step}_ngram", found, others)
    if settings.embedding_threshold is not None and state.tasks:
        prompts, known = [t.prompt for t in state.tasks], [t.prompt for t in others]
        similar = overlap.similar_to(
            vectors.of(state.tasks),
            vectors.of(others),
            settings.embedding_threshold,
            agree=lambda a, b: overlap.numbers_within(prompts[a], known[b]),
        )
        _drop_pairs(state, f"{step}_embedding", similar, others)


def _drop_pairs(state: Curated, step: str, pairs: dict[int, int], others: Sequence[Task]) -> None:
    reasons = {i: ("overlaps", others[other].task_id) for i, other in pairs.items()}
    _drop(state, step, reasons)


def _drop(state: Curated, step: str, reasons: Mapping[int, tuple[str | None, str | None]]) -> None:
    kept = []
    for number, task in enumerate(state.tasks):
        reason, other = reasons.get(number, (None, None))
        if reason is None:
            kept.append(task)
        else:
            state.dropped.append(Dropped(task, step, reason, other))
    state.tasks = kept
    state.funnel.append((step, len(kept)))
