"""The HTML report and its plots."""

from sdjax.report.page import write_report
from sdjax.report.terminal import TABLE_WIDTH, final_table

__all__ = ["TABLE_WIDTH", "final_table", "write_report"]
