"""What this machine can do for dualkv, what is really in force, and the cure for what is not."""

from dualkv.doctor.check import Check
from dualkv.doctor.report import Report, default_path, examine

__all__ = ["Check", "Report", "default_path", "examine"]
