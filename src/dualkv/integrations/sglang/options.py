"""The options of SGLang's extra config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dualkv.errors import invalid
from dualkv.storage import check_options, root_of

# Names in the same dictionary that SGLang reads itself, or takes out before it makes the backend.
_SGLANG_OPTIONS = {
    "allocator",
    "backend_name",
    "class_name",
    "hicache_storage_pass_prefix_keys",
    "interface_v1",
    "module_path",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "tp_lcm_size",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What stands in the extra config; docs/engines/sglang.md has the table."""

    store: str
    staging: int | str = "256MiB"
    namespace: str = ""
    deadline_s: float = 10
    forget_failed_s: float = 30
    clear_removes: bool = False
    name: str = "sglang"
    store_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    staging_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def options_of(extra_config: Mapping[str, Any] | None) -> Options:
    """The options in SGLang's dictionary. Raises Error naming one that is unknown, missing or out of range."""
    given = {name: value for name, value in (extra_config or {}).items() if name not in _SGLANG_OPTIONS}
    check_options(given, {field.name for field in dataclasses.fields(Options)}, "sglang")
    if "store" not in given:
        raise invalid("sglang: option store is missing: give file:///directory")
    options = Options(**given)
    root_of(options.store)
    for name in ("deadline_s", "forget_failed_s"):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86400:
            raise invalid(f"sglang: {name} = {value!r}: must be more than 0 and at most a day, in seconds")
    return options
