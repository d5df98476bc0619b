import pytest

from m1.config.schema import (
    CurriculumConfig,
    CurriculumSourceConfig,
    DifficultyConfig,
    GateConfig,
    LengthStageConfig,
)


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        (LengthStageConfig, {"max_new_tokens": 9, "min_steps": 3, "max_steps": 2}, "raise max_st"),
        (
            LengthStageConfig,
            {
                "max_new_tokens": 9,
                "min_steps": 1,
                "max_steps": 1,
                "min_pass_rate": 0.5,
                "max_pass_rate": 0.4,
            },
            "no task that was sampled stays",
        ),
        (GateConfig, {"perplexity_release": 0.01}, "must not be below perplexity_tolerance"),
        (GateConfig, {"length_release": 0.95}, "must not exceed length_fraction"),
        (DifficultyConfig, {"lower_at": 0.7}, "the level would never rest"),
        (
            CurriculumSourceConfig,
            {"source": "a", "weights": [{"step": 3, "weight": 1}, {"step": 3, "weight": 2}]},
            "each step once",
        ),
        (
            CurriculumSourceConfig,
            {"source": "a", "weights": [{"step": 0, "weight": 0}]},
            "never be used",
        ),
        (CurriculumConfig, {"sources": [{"source": "a"}, {"source": "a"}]}, "keep one"),
        (
            CurriculumConfig,
            {
                "sources": [
                    {
                        "source": "a",
                        "weights": [{"step": 0, "weight": 0}, {"step": 1, "weight": 1}],
                    }
                ]
            },
            "weight 0 at the first step",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(table, values, message):
    with pytest.raises(ValueError, match=message):
        table.model_validate(values)


def test_one_source_may_start_at_0_beside_another():
    late = {"source": "b", "weights": [{"step": 0, "weight": 0}, {"step": 9, "weight": 1}]}
    assert len(CurriculumConfig.model_validate({"sources": [{"source": "a"}, late]}).sources) == 2
