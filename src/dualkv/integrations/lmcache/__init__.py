"""LMCache: a connector for its remote backend, and an L2 adapter for its MP server (docs/engines/lmcache.md)."""

from dualkv.integrations.lmcache.l2 import DualKVL2Adapter
from dualkv.integrations.lmcache.remote import DualKVAdapter, DualKVConnector

__all__ = ["DualKVAdapter", "DualKVConnector", "DualKVL2Adapter"]
