"""Values of options in the form NAME=VALUE."""

from __future__ import annotations

from collections.abc import Iterable

from sdjax.core.errors import UserError


def parse_experts(texts: Iterable[str]) -> dict[str, str]:
    """Return slot to model of NAME=MODEL texts, in their order.

    Raises:
        UserError: not of this form, or a name that occurs twice.
    """
    return parse_named(texts, "--expert", "expert_1=zoo:reader", "MODEL")


def parse_named(
    texts: Iterable[str], option: str, example: str, value: str = "DIR"
) -> dict[str, str]:
    """Return name to value of texts with an equals sign, in their order.

    Args:
        texts: the values of an option.
        option: its name.
        example: a value for the error message.
        value: what follows the equals sign.

    Raises:
        UserError: not of this form, or a name that occurs twice.
    """
    named: dict[str, str] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not (name and equals and rest):
            raise UserError(f"{option} {text}: write NAME={value}, such as {example}")
        if name in named:
            raise UserError(f"{option} {text}: duplicate name; {name} is already {named[name]}")
        named[name] = rest
    return named
