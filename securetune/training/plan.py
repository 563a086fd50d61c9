"""The plan: noise, budget, time and memory of a run, printed before anything is spent."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from securetune.config.schema import Recipe
from securetune.files import write_atomic
from securetune.privacy.accounting import PrivacyPlan, plan_privacy
from securetune.privacy.ledger import LedgerHeader
from securetune.privacy.statements import noise_statement, sampling_statement
from securetune.training.estimate import Estimate, estimate_cost
from securetune.training.folder import NOT_COVERED, RunFolder
from securetune.training.mechanism import gradient_noise_multiplier, planned_header, privacy_spec
from securetune.training.memory import Distribution, distribute, measure_size, rank_memory
from securetune.training.stopping import num_checks

if TYPE_CHECKING:
    from rich.console import Group

    from securetune.models.base import BaseModel


@dataclass(frozen=True)
class Plan:
    """What a run will do and cost.

    Attributes:
        recipe: The recipe.
        privacy: The calibrated mechanism; None for a run without privacy.
        estimate: Time and memory on this machine.
        distribution: Memory of each process under every strategy; None where nobody asked.
    """

    recipe: Recipe
    privacy: PrivacyPlan | None
    estimate: Estimate
    distribution: Distribution | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        privacy = None
        if self.privacy is not None:
            spec = asdict(self.privacy.spec)
            header = self._header()
            privacy = {
                **spec,
                "clipping": {"mode": header.clipping, **header.clipping_settings},
                "clipping_statement": header.clipping_statement,
                "sensitivity": spec["max_grad_norm"],
                "gradient_noise_multiplier": self._gradient_noise_multiplier(),
                "unit": header.unit_statement,
                "neighbouring_relation": f"{header.neighbouring_relation} {header.unit}",
                "steps": self.recipe.privacy.steps,
                "charges": spec["steps"],
                "noise_statement": noise_statement(header),
                "sampling_statement": sampling_statement(header),
                "accountant": self.privacy.accountant,
                "noise_multiplier": self.privacy.noise_multiplier,
                "epsilon": self.privacy.epsilon,
                "rdp_epsilon": self.privacy.rdp_epsilon,
                "gdp_mu": self.privacy.gdp_mu,
                "max_tpr_at_1pct_fpr": self.privacy.max_tpr_at_1pct_fpr,
                "max_tpr_at_1pct_fpr_pld": self.privacy.max_tpr_at_1pct_fpr_pld,
                "curve": {"steps": self.privacy.curve.steps, "epsilon": self.privacy.curve.epsilons},
                "uncounted": "settings tuned on the private data are not counted in epsilon",
            }
        return {
            "name": self.recipe.name,
            "task": self.recipe.task,
            "model": self.recipe.model.name,
            "method": self.recipe.training.method,
            "privacy": privacy,
            "early_stopping": self._early_stopping(),
            "estimate": {**asdict(self.estimate), "privacy": NOT_COVERED},
            **({} if self.distribution is None else {"distribution": self.distribution.to_dict()}),
        }

    def render(self) -> "Group":
        """Return the plan as rich tables for a terminal."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"Plan of {self.recipe.name}", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column()
        for label, text in self._rows():
            table.add_row(label, text)
        return Group(table) if self.distribution is None else Group(table, self.distribution.render())

    def _header(self) -> LedgerHeader:
        """What the ledger will say."""
        assert self.privacy is not None
        return planned_header(self.recipe, self.privacy)

    def _gradient_noise_multiplier(self) -> float:
        assert self.privacy is not None
        return gradient_noise_multiplier(self.recipe, noise_multiplier=self.privacy.noise_multiplier)

    def _noise(self) -> str:
        assert self.privacy is not None
        text = (
            f"sigma {self.privacy.noise_multiplier:.4f} x clipping norm {self.privacy.spec.max_grad_norm:g}"
        )
        if self.recipe.privacy.noise != "gaussian":
            return f"{text}; {noise_statement(self._header())}"
        if self.recipe.privacy.clipping.mode != "adaptive":
            return text
        return (
            f"{text} is charged for each step; learning the threshold takes its part, so the gradient's "
            f"sigma is {self._gradient_noise_multiplier():.4f}"
        )

    def _early_stopping(self) -> str | None:
        settings = self.recipe.training.early_stopping
        if settings.method == "none":
            return None
        text = f"{settings.method}, up to {num_checks(self.recipe)} checks"
        if settings.epsilon is not None:
            text += f", which cost held-out records epsilon {settings.epsilon:g} together"
        return text + ("" if self.privacy is None else "; a run that stops early costs its whole epsilon")

    def _rows(self) -> list[tuple[str, str]]:
        lora = self.recipe.training.lora
        rows = [
            ("task", f"{self.recipe.task}, base model {self.recipe.model.name}"),
            ("trained", "all weights" if lora is None else f"LoRA adapters of rank {lora.rank}"),
        ]
        if self.privacy is None:
            rows.append(("privacy", "OFF: nothing is promised about any record"))
        else:
            spec, plan = self.privacy.spec, self.privacy
            rows += [
                ("privacy unit", self._header().unit_statement),
                ("sampling", f"{sampling_statement(self._header())}; {plan.accountant}"),
                (
                    "epsilon",
                    f"{plan.epsilon:.3f} of {spec.target_epsilon:g} at delta = {spec.delta:g}"
                    + ("" if plan.rdp_epsilon is None else f" (RDP cross-check {plan.rdp_epsilon:.2f})"),
                ),
                ("Gaussian DP", f"mu at most {plan.gdp_mu:.3f}, from the whole privacy curve"),
                ("clipping", self._header().clipping_statement),
                ("noise", self._noise()),
                (
                    "steps",
                    f"{self.recipe.privacy.steps}, expected batch {spec.expected_batch_size}, sample rate "
                    f"{self.recipe.privacy.sample_rate:g}",
                ),
                (
                    "what that means",
                    "no membership attack can find more than "
                    f"{plan.max_tpr_at_1pct_fpr_pld:.1%} of the members at 1 % false alarms (by (epsilon, "
                    f"delta) alone: {plan.max_tpr_at_1pct_fpr:.1%})",
                ),
                ("not counted", "settings tuned on the private data, and the decision to publish"),
            ]
        if (stopping := self._early_stopping()) is not None:
            rows.append(("early stopping", stopping))
        total = sum(self.estimate.seconds.values())
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.estimate.seconds.items())
        rows += [
            ("time", f"about {total / 60:.1f} min on this machine ({stages})"),
            ("memory", f"about {self.estimate.memory_bytes / 2**30:.1f} GiB"),
        ]
        return rows


def make_plan(
    recipe: Recipe,
    *,
    base: "BaseModel | None" = None,
    tokens_per_record: float | None = None,
    num_processes: int | None = None,
    memory_bytes: int | None = None,
) -> Plan:
    """Calibrate the noise and predict time and memory.

    Args:
        recipe: The recipe.
        base: The loaded base model, in the weights the recipe trains; None loads it.
        tokens_per_record: Mean record length; None assumes half of ``data.max_length``.
        num_processes: Predict the memory of each of so many processes, under every strategy.
        memory_bytes: Memory that each of them has; None takes what this machine has.

    Returns:
        The plan.

    Raises:
        PrivacyError: If no noise reaches the target.
        ConfigError: If adapters cannot be put where the recipe wants them.
        MachineError: If the model is not here.
    """
    privacy = plan_privacy(privacy_spec(recipe)) if recipe.privacy.enabled else None
    if privacy is not None:
        gradient_noise_multiplier(recipe, noise_multiplier=privacy.noise_multiplier)  # refuses early
    if base is None:
        from securetune.training.subjects import load_recipe_base

        base = load_recipe_base(recipe)
    if recipe.training.lora is not None:
        from securetune.models.adapters import check_targets

        check_targets(base.model, recipe.training.lora.target_modules)
    tokens = tokens_per_record or recipe.data.max_length / 2
    size = measure_size(recipe, base, tokens_per_record=tokens)
    distribution = None
    if num_processes is not None:
        distribution = distribute(size, base, num_processes=num_processes, memory_bytes=memory_bytes)
    memory = rank_memory("single", 1, size).total
    return Plan(recipe, privacy, estimate_cost(recipe, base, tokens, memory_bytes=memory), distribution)


def write_plan(plan: Plan, run: RunFolder) -> None:
    """Write ``plan.json`` into the run folder; once steps are charged it stays as it is.

    Args:
        plan: The plan.
        run: The run's folder.
    """
    if not run.ledger.exists():
        write_atomic(run.plan, json.dumps(plan.to_dict(), indent=2) + "\n")
