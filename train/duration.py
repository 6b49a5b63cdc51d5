"""A length of training, `"90ep"`, `"2000it"`, `"5%"`, `"init"`, and the way to steps."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

_PATTERN = re.compile(r"(\d+(?:\.\d+)?)(ep|it|%)")


@dataclass(frozen=True)
class Duration:
    """`amount` epochs (`ep`), optimizer steps (`it`) or percent of the whole training (`%`)."""

    amount: Fraction | float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Reads `"90ep"`, `"2000it"`, `"5%"`, or `"init"` for step 0. Raises `ValueError`."""
        if text.strip() == "init":
            return cls(0, "it")
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a duration: write epochs as '90ep', steps as '2000it', a share "
                "of the training as '5%', or 'init'"
            )
        amount, unit = Fraction(match[1]), match[2]
        if unit == "it" and amount.denominator != 1:
            raise ValueError(f"{text!r} is not a duration: steps are whole")
        return cls(amount, unit)

    def steps(self, steps_per_epoch: int, total_steps: int | None = None) -> int:
        """The number of optimizer steps, rounded to the nearest; `%` needs `total_steps`."""
        if self.unit == "it":
            return int(self.amount)
        if self.unit == "ep":
            return math.floor(self.amount * steps_per_epoch + Fraction(1, 2))
        if total_steps is None:
            raise ValueError(f"'{self}' is a share of the training, and cannot define its length")
        return math.floor(self.amount * total_steps / 100 + Fraction(1, 2))

    def __str__(self) -> str:
        whole = int(self.amount)
        return f"{whole if whole == self.amount else float(self.amount)}{self.unit}"


def check_durations(config: object, *names: str) -> None:
    """For `__post_init__`: raises `ValueError` naming the first field that is no duration."""
    for name in names:
        value = getattr(config, name)
        for text in value if isinstance(value, tuple) else (value,):
            try:
                if text is not None:
                    Duration.parse(text)
            except ValueError as error:
                raise ValueError(f"{name} = {error}") from None


def check_lengths(config: object, *names: str) -> None:
    """As `check_durations`; a length of nothing is refused as well."""
    check_durations(config, *names)
    for name in names:
        text = getattr(config, name)
        if text is not None and not Duration.parse(text).amount:
            raise ValueError(f"{name} = {text!r}: must be at least one step")
