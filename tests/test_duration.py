"""`Duration`: lengths of training in epochs, steps and percent, turned into steps in one place."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.duration import Duration, check_durations


@pytest.mark.parametrize(
    ("text", "steps_per_epoch", "total_steps", "steps"),
    [
        ("90ep", 1251, None, 112590),
        ("2000it", 1251, None, 2000),
        ("5%", 1251, 112590, 5630),  # 5629.5 rounds up
        ("init", 1251, None, 0),
        ("init", 1251, 112590, 0),
        ("0ep", 391, None, 0),
        ("0it", 391, None, 0),
        ("0%", 391, 1000, 0),
        ("100%", 391, 1000, 1000),
        ("0.5ep", 391, None, 196),  # 195.5 rounds up
        ("0.25ep", 391, None, 98),  # 97.75
        ("1.25ep", 391, None, 489),  # 488.75
        ("0.1ep", 4, None, 0),  # 0.4
        ("33.3%", 10, 100, 33),
        ("12.5%", 10, 4, 1),  # 0.5 rounds up
        ("12.5%", 10, 3, 0),  # 0.375
        ("2.0it", 10, None, 2),
        (" 15ep ", 20, None, 300),
    ],
)
def test_a_duration_is_this_many_steps(
    text: str, steps_per_epoch: int, total_steps: int | None, steps: int
) -> None:
    """Rounded to the nearest step, halves up."""
    found = Duration.parse(text).steps(steps_per_epoch, total_steps)
    assert found == steps
    assert isinstance(found, int)


def test_epochs_and_steps_ignore_the_total() -> None:
    """Only a percentage is relative to it."""
    assert Duration.parse("3ep").steps(10, total_steps=7) == 30
    assert Duration.parse("3it").steps(10, total_steps=1) == 3


@pytest.mark.parametrize(
    "text", ["", "90", "ep", "90 ep", "-1ep", "+1ep", "1e3it", "90epochs", ".5ep", "5.ep", "nan%"]
)
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    """The message quotes the value and shows all four forms."""
    with pytest.raises(ValueError, match="is not a duration") as caught:
        Duration.parse(text)
    message = str(caught.value)
    assert message.startswith(repr(text))
    assert all(form in message for form in ("'90ep'", "'2000it'", "'5%'", "'init'"))


def test_a_fraction_of_a_step_is_refused() -> None:
    """Steps are whole."""
    with pytest.raises(ValueError, match=r"'2\.5it' is not a duration: steps are whole"):
        Duration.parse("2.5it")


def test_a_percentage_cannot_define_the_length_of_the_training() -> None:
    """`5%` of an unknown total is refused, by its own name."""
    with pytest.raises(ValueError, match=r"'5%' is a share of the training"):
        Duration.parse("5%").steps(100)


@pytest.mark.parametrize("text", ["90ep", "2000it", "5%", "0.5ep", "33.3%", "0it", "112590it"])
def test_a_duration_prints_as_it_was_written(text: str) -> None:
    """What a log shows can be pasted back into a config."""
    assert str(Duration.parse(text)) == text


@given(amount=st.integers(0, 10**9), unit=st.sampled_from(["ep", "it", "%"]))
@settings(max_examples=100)
def test_a_printed_duration_reads_back_as_itself(amount: int, unit: str) -> None:
    """No digit is lost, however long the training."""
    duration = Duration(float(amount), unit)
    assert Duration.parse(str(duration)) == duration


@given(steps_per_epoch=st.integers(1, 10**6), tenths=st.integers(0, 10**4))
@settings(max_examples=100)
def test_epochs_round_to_the_nearest_step(steps_per_epoch: int, tenths: int) -> None:
    """Never more than half a step from the exact product, up to floating-point error."""
    steps = Duration.parse(f"{tenths // 10}.{tenths % 10}ep").steps(steps_per_epoch)
    assert abs(10 * steps - tenths * steps_per_epoch) <= 5


@dataclass(frozen=True)
class _Config:
    total: str = "90ep"
    rewind: str | None = None
    milestones: tuple[str, ...] = ()


def test_checking_accepts_durations_none_and_tuples() -> None:
    """Every form a config field takes."""
    check_durations(_Config(), "total", "rewind", "milestones")
    check_durations(_Config("1it", "init", ("30ep", "5%")), "total", "rewind", "milestones")


@pytest.mark.parametrize(
    ("config", "start"),
    [
        (_Config(total="90"), "total = '90' is not a duration"),
        (_Config(rewind="soon"), "rewind = 'soon' is not a duration"),
        (_Config(milestones=("30ep", "60")), "milestones = '60' is not a duration"),
        (_Config(total="x", rewind="y"), "total = 'x' is not a duration"),
    ],
)
def test_checking_names_the_first_bad_field_and_its_value(config: _Config, start: str) -> None:
    """In the order in which the fields were given."""
    with pytest.raises(ValueError, match="is not a duration") as caught:
        check_durations(config, "total", "rewind", "milestones")
    assert str(caught.value).startswith(start)
