"""The HTML report and its plots."""

from sdjax.report.page import final_table, write_report

__all__ = ["final_table", "write_report"]
