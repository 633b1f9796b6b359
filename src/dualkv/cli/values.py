"""Values of options: sizes with units, lists of them, and whether one was given at all."""

from collections.abc import Callable

import click

from dualkv.sizes import parse_size


def given(name: str) -> bool:
    """Whether the running command's option was given, and is not its default."""
    return click.get_current_context().get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def size(_: click.Context, __: click.Parameter, value: str) -> int:
    """``64MiB`` in bytes."""
    return parse_size(value)


def sizes(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """``64KiB,1MiB``, each once, in order."""
    return tuple(dict.fromkeys(parse_size(item) for item in value.split(",")))


def numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """``1,2,4``, each once, in order."""
    if not all(item.strip().isdecimal() for item in value.split(",")):
        raise click.BadParameter(f"{value!r}: give whole numbers, like 1,2,4")
    return tuple(dict.fromkeys(int(item) for item in value.split(",")))


def names(*known: str) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """A callback for ``tcp,shm`` out of ``known``."""

    def parse(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(value.split(",")))
        unknown = [name for name in found if name not in known]
        if unknown:
            raise click.BadParameter(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
        return found

    return parse
