"""What this node's own settings say of its lanes. Reads, never changes; says what it could not read, and why."""

import json
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dualkv.lanes import LANES, Marks


@dataclass(frozen=True)
class Setting:
    """One thing that was looked at.

    Attributes:
        ok: does what two lanes need; None where it can't be said.
    """

    name: str
    found: str
    ok: bool | None


class _UnreadError(Exception):
    """Why something was not read."""


def local_settings(host: str, *, prefix: Sequence[str] = ()) -> list[Setting]:
    """Of the way to ``host``: its interface, the queues ``tc`` made, and the card's trust mode, PFC and SL2VL.

    Args:
        host: a name or an address.
        prefix: of commands that are to run on another node, such as ``ip netns exec NAME``.
    """

    def ask(*command: str) -> str:
        try:
            ran = subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=10, check=False)
        except FileNotFoundError:
            raise _UnreadError(f"there is no `{command[0]}` here") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _UnreadError(str(error)) from error
        if ran.returncode != 0:
            raise _UnreadError(f"`{' '.join(command)}`: {' '.join(ran.stderr.split()) or ran.returncode}")
        return ran.stdout

    def look(name: str, read: Callable[[], tuple[str, bool | None]]) -> Setting:
        try:
            return Setting(name, *read())
        except _UnreadError as why:
            return Setting(name, f"not read: {why}", None)
        except (ValueError, KeyError, IndexError) as error:
            return Setting(name, f"not read: unexpected answer ({error})", None)

    try:
        address = str(socket.getaddrinfo(host, None)[0][4][0])
        device = str(json.loads(ask("ip", "-j", "route", "get", address))[0]["dev"])
    except (_UnreadError, OSError, ValueError, KeyError, IndexError) as why:
        return [Setting("interface", f"not read: {why}", None)]
    out = [Setting("interface", device, None)]
    out.append(look("tc", lambda: _queues(ask, device)))
    out.append(look("trust", lambda: _trust(json.loads(ask("dcb", "-j", "app", "show", "dev", device)))))
    out.append(look("pfc", lambda: _pfc(json.loads(ask("dcb", "-j", "pfc", "show", "dev", device)))))
    if device.startswith("ib"):
        out.append(look("sl2vl", lambda: (" ".join(ask("smpquery", "sl2vl", "-D", "0").split()), None)))
    return out


def _queues(ask: Callable[..., str], device: str) -> tuple[str, bool | None]:
    root = next(q for q in json.loads(ask("tc", "-j", "qdisc", "show", "dev", device)) if q.get("root"))
    if root["kind"] != "htb":
        return f"{root['kind']}: tc makes no lanes here; the card may", None
    filters = json.loads(ask("tc", "-j", "filter", "show", "dev", device))
    rules = [rule["options"] for rule in filters if rule["kind"] == "u32" and "match" in rule.get("options", {})]
    default = f"1:{int(root['options']['default'], 16):x}"
    classes = {name: _class_of(lane, rules, default) for name, lane in LANES.items()}
    # iproute2 prints classes as text even where JSON is asked for.
    priorities = {
        words[2]: int(words[words.index("prio") + 1])
        for words in (line.split() for line in ask("tc", "class", "show", "dev", device).splitlines())
        if "prio" in words
    }
    said = ", ".join(f"{name} in {at} (prio {priorities.get(at, '?')})" for name, at in classes.items())
    high, low = (priorities.get(classes[name]) for name in ("high", "low"))
    return f"htb: {said}", high is not None and low is not None and high < low


def _class_of(lane: Marks, rules: Sequence[dict[str, Any]], default: str) -> str:
    """The first rule on the TOS byte, which is the second of the IPv4 header, that takes the lane's mark."""
    for rule in rules:
        match = rule["match"]
        mask = int(match["mask"], 16)
        on_tos = not match["off"] and mask & 0xFF0000 and not mask & ~0xFF0000
        if on_tos and (lane.tos << 16) & mask == int(match["value"], 16):
            return str(rule["flowid"])
    return default


def _trust(app: dict[str, Any]) -> tuple[str, bool | None]:
    """DSCP is trusted where the card has priorities for it."""
    entries = {int(dscp): int(priority) for dscp, priority in app.get("dscp_prio", [])}
    high, low = (entries.get(LANES[name].dscp) for name in ("high", "low"))
    if high is None or low is None:
        return "no priority of the card for both DSCPs: mlnx_qos --trust dscp", False
    return f"high to priority {high}, low to priority {low}", high != low


def _pfc(pfc: dict[str, Any]) -> tuple[str, bool | None]:
    on = [priority for priority, enabled in enumerate(pfc["prio_pfc"]) if enabled is True]
    return f"priorities without loss: {on or 'none'}", None
