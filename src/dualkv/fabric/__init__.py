"""Lanes in the network: how to set them up, and whether they are real. ``dualkv fabric``; docs/lanes.md."""

from dualkv.fabric.local import Setting, local_settings
from dualkv.fabric.measure import LaneReport, measure_lanes
from dualkv.fabric.plan import FABRICS, Line, Section, plan_fabric

__all__ = ["FABRICS", "LaneReport", "Line", "Section", "Setting", "local_settings", "measure_lanes", "plan_fabric"]
