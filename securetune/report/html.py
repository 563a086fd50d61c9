"""The report as one self-contained page: no script, no font, no image and no request to anywhere."""

import importlib.resources
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from markupsafe import Markup

from securetune.evidence import Evidence, describe_metric
from securetune.report import plots
from securetune.report.figures import FORMATS, figure, metric_format, threshold_format
from securetune.report.summary import Report
from securetune.report.verdict import Comparison, compare_all, headline

__all__ = ["render_html"]

_SUBJECTS: Final = {
    "base": "Base model",
    "plain": "Plain fine-tune",
    "hardened": "Hardened model",
    "hardened - base": "Hardened against base",
    "hardened - plain": "Hardened against plain",
    "plain - base": "Plain against base",
}
_STYLES: Final = ("base", "plain", "hardened")


class _Group(NamedTuple):
    """Evidence of one metric, measured one way, for one table heading."""

    title: str
    method: str
    indices: list[int]


class _Card(NamedTuple):
    """One headline card: which evidence it shows and how."""

    title: str
    hint: str
    indices: list[int]
    reference: float | None


def render_html(report: Report) -> str:
    """Render a report as a page to read, print or file.

    Guarantees:
        Every measured number on the page is taken from ``report.json`` and carries its place there. All text
        is escaped. The page loads nothing: its content policy forbids it.

    Args:
        report: The report of a run, internal or shareable.

    Returns:
        The HTML document.
    """
    import jinja2  # only needed here: the command line starts faster without it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("securetune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["view"] = _View(report)
    environment.globals["report"] = report
    return environment.get_template("report.html.j2").render()


class _View:
    """What the template asks for."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.document = report.model_dump(mode="json")
        self.headline = headline(report)
        self.comparisons = compare_all(report)
        styles = importlib.resources.files("securetune.report") / "templates" / "report.css"
        self.css = Markup(styles.read_text(encoding="utf-8"))  # a file of this package

    def fig(self, path: str, kind: str) -> Markup:
        return figure(self.document, path, kind)

    def kind(self, metric: str) -> str:
        return metric_format(metric)

    def bound(self, place: str, metric: str) -> Markup:
        return self.fig(place, threshold_format(metric))

    def value(self, index: int) -> Markup:
        return self.fig(f"evidence.{index}.value", metric_format(self.report.evidence[index].metric))

    def interval(self, place: str, metric: str) -> Markup:
        kind = metric_format(metric)
        low_kind = f"{kind}_low" if f"{kind}_low" in FORMATS else kind
        low, high = self.fig(f"{place}.interval.low", low_kind), self.fig(f"{place}.interval.high", kind)
        return Markup("{} to {}").format(low, high)

    def subject(self, subject: str) -> str:
        return _SUBJECTS.get(subject, subject)

    def describe(self, metric: str) -> str:
        name = describe_metric(metric)
        return name[0].upper() + name[1:]

    def settings(self, item: Evidence) -> str:
        parts = [f"{key.replace('_', ' ')} {value}" for key, value in item.params.items() if key != "radius"]
        if item.seed is not None:
            parts.append(f"seed {item.seed}")
        return ", ".join(parts)

    def groups(self) -> list[_Group]:
        """Group the evidence by metric and method, in the order it was measured."""
        groups: dict[tuple[str, str], _Group] = {}
        for index, item in enumerate(self.report.evidence):
            settings = self.settings(item)
            method = f"{item.method}; {settings}" if settings else item.method
            title = self.describe(item.metric)
            groups.setdefault((item.metric, method), _Group(title, method, [])).indices.append(index)
        return list(groups.values())

    def find(self, metric: str, subject: str) -> int | None:
        return next(
            (
                index
                for index, item in enumerate(self.report.evidence)
                if item.metric == metric and item.subject == subject and item.value is not None
            ),
            None,
        )

    def compared(self, metric: str, subject: str) -> list[Comparison]:
        return [
            item
            for item in self.comparisons
            if item.evidence.metric == metric and item.evidence.subject == subject
        ]

    def best(self, comparisons: Sequence[Comparison]) -> Comparison:
        return max(comparisons, key=lambda item: item.evidence.value or 0.0)

    def membership_problem(self) -> Evidence | None:
        """Return the hardened model's membership evidence if it is missing or invalid."""
        found = [
            item
            for item in self.report.evidence
            if item.metric == "membership_auc" and item.subject == "hardened" and item.status != "pass"
        ]
        return found[0] if found else None

    def cards(self) -> list[_Card]:
        radius = self._card_radius()
        hint = "" if radius is None else f"radius {radius:g} times the mean embedding norm"
        candidates = [
            _Card("Accuracy", "on held-out texts", self._indices("accuracy"), None),
            _Card("Held-out loss", "nats per token, lower is better", self._indices("heldout_loss"), None),
            _Card("Accuracy, embeddings attacked", hint, self._indices("accuracy_pgd", radius), None),
            _Card(
                "Accuracy, characters attacked",
                "black-box character attack",
                self._indices("accuracy_char"),
                None,
            ),
            _Card("Membership inference AUC", "0.5 is guessing", self._indices("membership_auc"), 0.5),
        ]
        return [card for card in candidates if card.indices]

    def whiskers(self, card: _Card) -> Markup:
        bands: list[plots.Band] = []
        for index in card.indices:
            item = self.report.evidence[index]
            if item.value is not None and item.interval is not None:
                name = self.subject(item.subject)
                bands.append(
                    plots.Band(
                        name,
                        item.subject,
                        _marker(item.subject),
                        item.value,
                        item.interval.low,
                        item.interval.high,
                    )
                )
        described = f"{card.title}: " + ", ".join(f"{band.name} {band.value:.3f}" for band in bands)
        return plots.plot_whiskers(bands, reference=card.reference, description=described)

    def training_plot(self) -> Markup | None:
        curves = self.report.curves.training
        if not curves:
            return None
        loss = [
            plots.Series(
                self.subject(curve.subject),
                self._style(curve.subject),
                [
                    plots.Point(x, y, y, y)
                    for x, y in zip(curve.steps, curve.loss, strict=True)
                    if y is not None
                ],
                _marker(curve.subject),
            )
            for curve in curves
            if curve.loss is not None
        ]
        spent = next((curve for curve in curves if curve.epsilon is not None), None)
        epsilon = None
        if spent is not None and spent.epsilon is not None:
            points = [plots.Point(x, y, y, y) for x, y in zip(spent.steps, spent.epsilon, strict=True)]
            epsilon = plots.Series("epsilon", "epsilon", points, -1)
        return plots.plot_training(
            [series for series in loss if series.points],
            epsilon,
            target_epsilon=self.report.privacy.epsilon_target if self.report.privacy and epsilon else None,
            description="Training loss and epsilon spent over the training steps.",
        )

    def robustness_plot(self) -> Markup | None:
        series: list[plots.Series] = []
        for subject in _STYLES:
            points = [
                plots.Point(float(item.params["radius"]), item.value, item.interval.low, item.interval.high)
                for item in self.report.evidence
                if item.metric == "accuracy_pgd"
                and item.subject == subject
                and item.value is not None
                and item.interval is not None
                and "radius" in item.params
            ]
            if points:
                series.append(plots.Series(self.subject(subject), subject, sorted(points), _marker(subject)))
        if not series or len({point.x for line in series for point in line.points}) < 2:
            return None
        return plots.plot_robustness(series, description="Accuracy over attack radius, one line per model.")

    def roc_plot(self) -> Markup | None:
        curves = self.report.curves.roc
        if not curves:
            return None
        fewest = min(min(curve.n_members, curve.n_non_members) for curve in curves)
        lowest = 10.0 ** -max(1, math.ceil(math.log10(fewest) - 1e-9))
        privacy = self.report.privacy
        return plots.plot_roc(
            [
                plots.Series(
                    self.subject(curve.subject),
                    self._style(curve.subject),
                    [
                        plots.Point(x, y, y, y)
                        for x, y in zip(curve.false_positive_rate, curve.true_positive_rate, strict=True)
                    ],
                )
                for curve in curves
            ],
            epsilon=privacy.epsilon_spent if privacy else None,
            delta=privacy.delta if privacy else None,
            lowest_rate=max(lowest, 1e-4),
            description="True- over false-positive rate of the membership attack, on log axes.",
        )

    def legend(self, subjects: Sequence[str]) -> list[tuple[str, str]]:
        present = [subject for subject in _STYLES if subject in subjects]
        return [(subject, self.subject(subject)) for subject in present]

    def _style(self, subject: str) -> str:
        return subject if subject in _STYLES else "other"

    def _indices(self, metric: str, radius: float | None = None) -> list[int]:
        found: list[int] = []
        for subject in _STYLES:
            for index, item in enumerate(self.report.evidence):
                if (
                    item.metric == metric
                    and item.subject == subject
                    and item.value is not None
                    and (radius is None or item.params.get("radius") == radius)
                ):
                    found.append(index)
                    break
        return found

    def _card_radius(self) -> float | None:
        """Choose the measured radius nearest to the one trained against, else the middle one."""
        radii = sorted(
            {
                float(item.params["radius"])
                for item in self.report.evidence
                if item.metric == "accuracy_pgd" and item.value is not None and "radius" in item.params
            }
        )
        if not radii:
            return None
        trained = self.report.adversarial
        if trained is None:
            return radii[len(radii) // 2]
        return min(radii, key=lambda radius: abs(radius - trained.radius))


def _marker(subject: str) -> int:
    return _STYLES.index(subject) if subject in _STYLES else 0
