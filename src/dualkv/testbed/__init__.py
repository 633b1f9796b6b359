"""Nodes on one machine: network namespaces, a switch between them, and lanes on every link. Needs root and iproute2."""

from dualkv.testbed.network import Testbed, remove_leftovers

__all__ = ["Testbed", "remove_leftovers"]
