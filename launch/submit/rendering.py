"""Templates with quoting that cannot be forgotten to matter: shell words, YAML scalars."""

import json
import shlex
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2


def render(template: str, **facts: Any) -> str:
    """The text of a template in `launch/submit/templates`; a fact that it lacks is an error."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the filters quote, for shells and for YAML
    )
    environment.filters |= {"word": shlex.quote, "words": words, "yaml": json.dumps}
    folder = resources.files("launch.submit") / "templates"
    text = (folder / template).read_text()
    return environment.from_string(text).render(**facts)


def words(found: Sequence[str]) -> str:
    """Words as a shell reads them back."""
    return " ".join(map(shlex.quote, found))
