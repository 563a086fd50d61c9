"""The model card: README.md of a published model, with released figures only."""

import html
import re
from typing import Any, Final

import yaml

from securetune.errors import PrivacyError
from securetune.evidence import Evidence, describe_metric
from securetune.report.figures import FORMATS, metric_format, threshold_format
from securetune.report.summary import Report

__all__ = ["render_card"]

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_TASKS: Final = {
    "classify": ("text-classification", "Text classification"),
    "generate": ("text-generation", "Text generation"),
}


def render_card(report: Report, *, signer: str) -> str:
    """Write the model card of a published model.

    Guarantees:
        The card is made from a shareable report alone, so it holds no un-noised statistic of private data.
        Its front matter is valid YAML with a ``model-index``; text from outside cannot break out of it or of
        a table.

    Args:
        report: A shareable report.
        signer: Fingerprint of the publisher's public key, for people to compare.

    Returns:
        Markdown with YAML front matter.

    Raises:
        PrivacyError: If ``report`` is not a shareable one.
    """
    if report.audience != "shareable":
        raise PrivacyError("a model card is made from a shareable report. Call shareable(report) first.")
    import jinja2  # only needed here: the command line starts faster without it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("securetune.publishing"),
        autoescape=False,  # Markdown: what comes from outside goes through the filter plain_text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain_text"] = _plain_text
    environment.filters["figure"] = lambda value, kind: FORMATS[kind](value)
    return environment.get_template("card.md.j2").render(
        front_matter=_front_matter(report),
        report=report,
        signer=signer,
        released=[item for item in report.evidence if item.release_epsilon is not None],
        describe=lambda metric: _plain_text(_capitalised(describe_metric(metric))),
        format_value=_format_value,
        format_interval=_format_interval,
        format_bound=lambda metric, value: FORMATS[threshold_format(metric)](value),
    )


def _front_matter(report: Report) -> str:
    task, task_name = _TASKS[report.recipe.task]
    tags = ["securetune", "encrypted"]
    tags += ["differential-privacy"] if report.privacy else []
    tags += ["adversarial-training"] if report.adversarial else []
    library = "transformers" if report.recipe.method == "full" else "peft"
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": task, "tags": tags}
    if _HUB_ID.fullmatch(report.base_model.name):
        fields["base_model"] = report.base_model.name
    metrics = [_metric(item) for item in report.evidence if item.value is not None and item.status == "pass"]
    if metrics:
        fields["model-index"] = [
            {
                "name": report.recipe.name,
                "results": [
                    {
                        "task": {"type": task, "name": task_name},
                        "dataset": {"type": "private", "name": "held-out private records"},
                        "metrics": metrics,
                    }
                ],
            }
        ]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip("\n")


def _metric(item: Evidence) -> dict[str, Any]:
    args: dict[str, Any] = {"n": item.n, "subject": item.subject, **item.params}
    if item.interval is not None:
        args |= {"low": item.interval.low, "high": item.interval.high, "level": item.interval.level}
    if item.release_epsilon is not None:
        args["release_epsilon"] = item.release_epsilon
    name = f"{_capitalised(describe_metric(item.metric))} ({item.subject})"
    return {"type": item.metric, "name": name, "value": item.value, "args": args}


def _format_value(item: Evidence) -> str:
    return "" if item.value is None else FORMATS[metric_format(item.metric)](item.value)


def _format_interval(item: Evidence) -> str:
    if item.interval is None:
        return ""
    kind = metric_format(item.metric)
    low_kind = f"{kind}_low" if f"{kind}_low" in FORMATS else kind
    return f"{FORMATS[low_kind](item.interval.low)} to {FORMATS[kind](item.interval.high)}"


def _plain_text(text: object) -> str:
    """Make outside text harmless in Markdown: one line, no HTML, no table, code or link syntax."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(line, quote=False))


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
