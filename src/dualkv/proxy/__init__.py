"""An OpenAI-compatible router for prefill and decode servers that share KV through dualkv (docs/proxy.md)."""

from dualkv.proxy.app import make_app
from dualkv.proxy.fleet import Fleet, Server

__all__ = ["Fleet", "Server", "make_app"]
