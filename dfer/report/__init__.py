"""Read back what runs have left, draw it, and write it as pages."""

from dfer.report.records import read_run

__all__ = ["read_run"]
