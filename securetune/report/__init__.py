"""The report of a run: what ``report.json`` holds, the part that may be shared, and the page people read."""

from securetune.report.html import render_html
from securetune.report.summary import Report, load_report, report_json, shareable

__all__ = ["Report", "load_report", "render_html", "report_json", "shareable"]
