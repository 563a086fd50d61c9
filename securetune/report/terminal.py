"""The main figures of a report as a table for a terminal."""

from rich.table import Table

from securetune.evidence import Evidence
from securetune.report.summary import Report

_METRICS = {
    "accuracy": "accuracy",
    "heldout_loss": "held-out loss",
    "accuracy_pgd": "accuracy, PGD",
    "accuracy_char": "accuracy, misspelt",
    "membership_auc": "membership AUC",
    "memorisation_gap": "memorisation gap",
}
_SUBJECTS = ("base", "plain", "hardened")


def results_table(report: Report) -> Table:
    """Show every model's main figures side by side, each with its 95 % interval.

    The plain fine-tune is the result without privacy and hardening at the same steps and batches.

    Args:
        report: The report of a run.

    Returns:
        The table.
    """
    table = Table(title="Results, with 95 % intervals (not covered by epsilon)", title_justify="left")
    for heading in ("", *_SUBJECTS):
        table.add_column(heading)
    rows: dict[tuple[str, float | None], dict[str, Evidence]] = {}
    for item in report.evidence:
        if item.metric in _METRICS and item.subject in _SUBJECTS:
            radius = item.params.get("radius")
            key = (item.metric, radius if isinstance(radius, float) else None)
            rows.setdefault(key, {})[item.subject] = item
    order = list(_METRICS)
    for metric, radius in sorted(rows, key=lambda key: (order.index(key[0]), key[1] or 0.0)):
        name = _METRICS[metric] if radius is None else f"{_METRICS[metric]} {radius:g}"
        figures = rows[metric, radius]
        table.add_row(name, *(_figure(figures.get(subject)) for subject in _SUBJECTS))
    return table


def _figure(item: Evidence | None) -> str:
    if item is None or item.value is None or item.interval is None:
        return "-"
    mark = "" if item.status == "pass" else f" {item.status}"
    return f"{item.value:.3f} [{item.interval.low:.3f}, {item.interval.high:.3f}]{mark}"
