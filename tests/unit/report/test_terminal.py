"""The table on the terminal holds the numbers of report.json."""

import io

from rich.console import Console

from securetune.report.terminal import results_table
from tests.sample_report import sample_report


def test_every_model_and_interval_is_shown():
    report = sample_report()
    console = Console(width=220, file=io.StringIO())
    console.print(results_table(report))
    text = console.file.getvalue()
    shown = [
        item
        for item in report.evidence
        if item.metric in ("accuracy", "accuracy_pgd", "accuracy_char") and item.value is not None
    ]
    assert len(shown) >= 3
    for item in shown:
        assert f"{item.value:.3f} [{item.interval.low:.3f}, {item.interval.high:.3f}]" in text
