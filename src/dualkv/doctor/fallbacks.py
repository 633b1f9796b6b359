"""The last check: opens a real node, and lists what it had to fall back on."""

from collections.abc import Iterator

import dualkv
from dualkv.doctor.check import GEOMETRY, STAGING_BYTES, Check, Context
from dualkv.doctor.cures import FALLBACKS, Fallback

_UNKNOWN = Fallback("not in the doctor's table", "see the Fallbacks table of docs/settings.md", "")


def check_fallbacks(context: Context) -> Iterator[Check]:
    """One warning a fallback in force. The cure is that of the check which looked at the cause, if it has one."""
    if context.store_root is None:
        yield Check("fallbacks", "absent", "not known: no store can be made here")
        return
    with dualkv.Node("doctor", GEOMETRY, store=f"file://{context.store_root}/node", staging=STAGING_BYTES) as node:
        context.fallbacks = {name: int(count) for name, count in node.stats()["fallbacks"].items()}
    if not context.fallbacks:
        yield Check("fallbacks", "ok", "none in force")
    for name, count in context.fallbacks.items():
        fallback = FALLBACKS.get(name, _UNKNOWN)
        cure = context.cure_of(fallback.check) or fallback.cure
        yield Check(f"fallback {name}", "warn", f"{fallback.what} (counted {count})", cure)
