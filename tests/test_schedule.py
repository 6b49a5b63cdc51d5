"""Schedules are pure functions of the step, checked against factors computed by hand."""

from typing import Any

import pytest

from train.schedule import ScheduleConfig, build_schedule, constant


def factors(config: ScheduleConfig, steps: list[int], total_steps: int = 100) -> list[float]:
    """The factors at `steps` of a training of `total_steps`, in epochs of ten steps."""
    schedule = build_schedule(config, steps_per_epoch=10, total_steps=total_steps)
    return [schedule(step) for step in steps]


def test_a_constant_schedule_is_one_everywhere() -> None:
    """Also beyond the end."""
    assert factors(ScheduleConfig("constant"), [0, 1, 50, 99, 100, 1000]) == [1.0] * 6


def test_a_step_schedule_drops_exactly_at_its_milestones() -> None:
    """The milestone's own step is the first with the lower rate."""
    config = ScheduleConfig("step", milestones=("3ep", "60it", "80%"), gamma=0.5)
    steps = [0, 29, 30, 59, 60, 79, 80, 99, 100, 500]
    expected = [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    assert factors(config, steps) == expected


def test_the_order_of_milestones_does_not_matter() -> None:
    """Three drops are three drops."""
    forward = ScheduleConfig("step", milestones=("3ep", "6ep", "8ep"), gamma=0.5)
    backward = ScheduleConfig("step", milestones=("8ep", "6ep", "3ep"), gamma=0.5)
    steps = list(range(101))
    assert factors(forward, steps) == factors(backward, steps)


def test_a_milestone_given_twice_drops_twice() -> None:
    """Two entries at one step multiply."""
    config = ScheduleConfig("step", milestones=("2ep", "20it"), gamma=0.5)
    assert factors(config, [19, 20]) == [1.0, 0.25]


def test_a_step_schedule_without_milestones_is_constant() -> None:
    """The default configuration does not decay."""
    assert factors(ScheduleConfig(), [0, 50, 99]) == [1.0, 1.0, 1.0]


def test_a_gamma_of_zero_stops_learning_at_the_milestone() -> None:
    """And not before."""
    assert factors(ScheduleConfig("step", ("1ep",), gamma=0.0), [9, 10]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("final", "expected"),
    [(0.0, [1.0, 0.75, 0.5, 0.25, 0.01, 0.0]), (0.2, [1.0, 0.8, 0.6, 0.4, 0.208, 0.2])],
)
def test_a_linear_schedule_falls_in_a_straight_line(final: float, expected: list[float]) -> None:
    """From 1 at step 0 to `final` at the end."""
    found = factors(ScheduleConfig("linear", final=final), [0, 25, 50, 75, 99, 100])
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (0.0, [1.0, 0.8535533905932737, 0.75, 0.5, 0.25, 0.1464466094067263, 0.0]),
        (0.5, [1.0, 0.9267766952966369, 0.875, 0.75, 0.625, 0.5732233047033631, 0.5]),
    ],
)
def test_a_cosine_schedule_is_half_a_cosine(final: float, expected: list[float]) -> None:
    """At 0, 1/4, 1/3, 1/2, 2/3, 3/4 and 1 of the training."""
    found = factors(ScheduleConfig("cosine", final=final), [0, 30, 40, 60, 80, 90, 120], 120)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_beyond_the_end_the_final_factor_stays(name: Any) -> None:
    """A cosine does not rise again."""
    assert factors(ScheduleConfig(name, final=0.1), [100, 150, 200]) == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("warmup", ["4it", "0.4ep", "4%"])
def test_the_warm_up_rises_linearly_to_the_base_rate(warmup: str) -> None:
    """Step i of 4 has (i + 1) / 4: the first step learns, the last has the whole rate."""
    config = ScheduleConfig("constant", warmup=warmup)
    assert factors(config, [0, 1, 2, 3, 4, 5]) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("warmup", ["0it", "1it", "init"])
def test_a_warm_up_of_at_most_one_step_changes_nothing(warmup: str) -> None:
    """Step 0 already has the base rate."""
    assert factors(ScheduleConfig("constant", warmup=warmup), [0, 1]) == [1.0, 1.0]


def test_the_decay_keeps_its_positions_under_a_warm_up() -> None:
    """The rise multiplies what the schedule without a warm-up gives."""
    config = ScheduleConfig("linear", warmup="20it")
    assert factors(config, [0, 9, 19, 20, 50]) == pytest.approx(
        [1.0 / 20, 0.91 * 10 / 20, 0.81, 0.8, 0.5]
    )
    early = ScheduleConfig("step", ("2it",), warmup="4it")
    assert factors(early, [1, 2, 3, 4]) == pytest.approx([0.5, 0.075, 0.1, 0.1])


def test_the_published_imagenet_recipe() -> None:
    """90 epochs at batch 1024, 5 epochs of warm-up, a tenth at 30, 60 and 80; base rate 0.4."""
    config = ScheduleConfig("step", milestones=("30ep", "60ep", "80ep"), gamma=0.1, warmup="5ep")
    schedule = build_schedule(config, steps_per_epoch=1251, total_steps=112590)
    by_hand = {
        0: 0.4 / 6255,
        1: 0.8 / 6255,
        6253: 0.4 * 6254 / 6255,
        6254: 0.4,  # the last step of epoch 4
        6255: 0.4,
        37529: 0.4,  # the last step of epoch 29
        37530: 0.04,
        75059: 0.04,
        75060: 0.004,
        100079: 0.004,
        100080: 0.0004,
        112589: 0.0004,
    }
    found = {step: 0.4 * schedule(step) for step in by_hand}
    assert found == pytest.approx(by_hand, rel=1e-9)


def test_the_published_cifar_recipe() -> None:
    """ResNet-20: 160 epochs of 391 steps, a tenth at 80 and 120, no warm-up."""
    config = ScheduleConfig("step", milestones=("80ep", "120ep"))
    schedule = build_schedule(config, steps_per_epoch=391, total_steps=62560)
    steps = [0, 31279, 31280, 46919, 46920, 62559]
    assert [schedule(s) for s in steps] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-9)


def test_the_constant_factor_is_what_was_given() -> None:
    """As fine-tuning at the final rate needs it."""
    assert [constant(0.001)(step) for step in (0, 10**6)] == [0.001, 0.001]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"milestones": ("30",)}, r"milestones = '30' is not a duration"),
        ({"warmup": "five"}, r"warmup = 'five' is not a duration"),
        (
            {"name": "cosine", "milestones": ("30ep",)},
            r"milestones = \('30ep',\): only the 'step' schedule has them",
        ),
        ({"gamma": 1.5}, r"gamma = 1\.5: must be between 0 and 1"),
        ({"gamma": -0.1}, r"gamma = -0\.1: must be between 0 and 1"),
        ({"gamma": float("nan")}, r"gamma = nan: must be between 0 and 1"),
        ({"final": 2.0}, r"final = 2\.0: must be between 0 and 1"),
    ],
)
def test_a_bad_field_is_named_with_its_value(arguments: dict[str, Any], message: str) -> None:
    """And with what it must be."""
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**arguments)


def test_an_unknown_name_is_refused() -> None:
    """A misspelt schedule must not silently be a constant one."""
    with pytest.raises(ValueError, match="cosin"):
        ScheduleConfig("cosin")  # type: ignore[arg-type]
