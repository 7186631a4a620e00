"""Says what works on this machine, and why not."""

from craken.doctor.report import show_report

__all__ = ["show_report"]
