"""``d2scale report``: runs side by side, as a page, as pictures and as Markdown."""

from d2scale.report.output import ReportFiles
from d2scale.report.write import write_report

__all__ = ["ReportFiles", "write_report"]
