"""Lanes in the network: how to set them up, and whether they are real. ``dualkv fabric``; docs/lanes.md."""

from dualkv.fabric.measure import LaneReport, measure_lanes
from dualkv.fabric.plan import FABRICS, Line, Section, plan_fabric

__all__ = ["FABRICS", "LaneReport", "Line", "Section", "measure_lanes", "plan_fabric"]
