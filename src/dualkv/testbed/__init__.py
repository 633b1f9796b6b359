"""Nodes on one machine: namespaces, a switch, lanes on every link, a storage NIC each. Needs root and iproute2."""

from dualkv.testbed.collectives import AllToAll
from dualkv.testbed.network import Testbed, remove_leftovers

__all__ = ["AllToAll", "Testbed", "remove_leftovers"]
