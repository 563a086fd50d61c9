"""The plan: noise, budget, time and memory of a run, printed before anything is spent."""

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from securetune.config.schema import Recipe
from securetune.files import write_atomic
from securetune.privacy.accounting import PrivacyPlan, plan_privacy
from securetune.privacy.ledger import LedgerHeader
from securetune.privacy.statements import noise_statement, sampling_statement
from securetune.training.folder import NOT_COVERED, RunFolder
from securetune.training.mechanism import gradient_noise_multiplier, planned_header, privacy_spec
from securetune.training.memory import Distribution, distribute, measure_size, rank_memory
from securetune.training.stopping import num_checks

if TYPE_CHECKING:
    from rich.console import Group

    from securetune.models.base import BaseModel

_MODELS_EVALUATED = 3  # base, plain, hardened
_PROBE_ROWS = 16


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of a run on this machine.

    Attributes:
        seconds: Predicted wall-clock seconds by stage.
        memory_bytes: Predicted peak memory of the process, if it is the only one.
        tokens_per_record: Mean length assumed.
        forward_ms_per_token: Measured, milliseconds.
        training_ms_per_token: Measured forward and backward, milliseconds.
    """

    seconds: dict[str, float]
    memory_bytes: int
    tokens_per_record: float
    forward_ms_per_token: float
    training_ms_per_token: float


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
        rows = [("task", f"{self.recipe.task}, base model {self.recipe.model.name}")]
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
        base: The loaded base model; None loads it.
        tokens_per_record: Mean record length; None assumes half of ``data.max_length``.
        num_processes: Predict the memory of each of so many processes, under every strategy.
        memory_bytes: Memory that each of them has; None takes what this machine has.

    Returns:
        The plan.

    Raises:
        PrivacyError: If no noise reaches the target.
        MachineError: If the model is not here.
    """
    privacy = plan_privacy(privacy_spec(recipe)) if recipe.privacy.enabled else None
    if privacy is not None:
        gradient_noise_multiplier(recipe, noise_multiplier=privacy.noise_multiplier)  # refuses early
    if base is None:
        from securetune.models.base import load_base

        base = load_base(recipe.model)
    tokens = tokens_per_record or recipe.data.max_length / 2
    size = measure_size(recipe, base, num_trained=_adapter_parameters(recipe, base), tokens_per_record=tokens)
    distribution = None
    if num_processes is not None:
        distribution = distribute(size, base, num_processes=num_processes, memory_bytes=memory_bytes)
    memory = rank_memory("single", 1, size).total
    return Plan(recipe, privacy, _estimate(recipe, base, tokens, memory), distribution)


def _estimate(recipe: Recipe, base: "BaseModel", tokens: float, memory_bytes: int) -> Estimate:
    forward, training = _measure(base, max(8, round(tokens)))
    most = recipe.privacy.max_records_per_user or 1  # records of one unit
    drawn = recipe.privacy.steps * recipe.privacy.expected_batch_size * most * tokens
    passes = 1 if recipe.adversarial.method == "none" else 1 + recipe.adversarial.steps
    settings = recipe.evaluation
    judged = (settings.num_texts + settings.num_membership) * tokens * forward
    if recipe.task == "classify":
        pgd = settings.num_attacked * len(settings.pgd_radii) * settings.pgd_steps * tokens * training
        judged += pgd + settings.num_attacked * settings.character_queries * tokens * forward
    return Estimate(
        seconds={
            "plain fine-tune": drawn * training,
            "hardened training": drawn * passes * training,
            "evaluation of three models": judged * _MODELS_EVALUATED,
        },
        memory_bytes=memory_bytes,
        tokens_per_record=tokens,
        forward_ms_per_token=forward * 1e3,
        training_ms_per_token=training * 1e3,
    )


def _measure(base: "BaseModel", tokens: int) -> tuple[float, float]:
    """Time the decoder on one small batch: seconds per token forward, and forward with backward."""
    decoder = base.model.get_decoder()
    width = base.model.config.get_text_config().hidden_size
    embeds = torch.zeros((_PROBE_ROWS, tokens, width), dtype=base.dtype, device=base.device)

    def once(with_backward: bool) -> float:
        started = time.perf_counter()
        with torch.set_grad_enabled(with_backward):
            hidden = decoder(
                inputs_embeds=embeds.requires_grad_(with_backward), use_cache=False
            ).last_hidden_state
            if with_backward:
                torch.autograd.grad(hidden.float().sum(), embeds)
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        return (time.perf_counter() - started) / embeds.shape[:2].numel()

    for with_backward in (True, False):
        once(with_backward)
    return min(once(False) for _ in range(2)), min(once(True) for _ in range(2))


def _adapter_parameters(recipe: Recipe, base: "BaseModel") -> int:
    lora = recipe.training.lora
    total = 0
    output = base.model.get_output_embeddings()
    for name, module in base.model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            continue
        if module is output or isinstance(module, torch.nn.Embedding):
            continue
        if lora.target_modules == "all-linear" or name.rpartition(".")[2] in lora.target_modules:
            total += lora.rank * sum(weight.shape)
    return total


def write_plan(plan: Plan, run: RunFolder) -> None:
    """Write ``plan.json`` into the run folder; once steps are charged it stays as it is.

    Args:
        plan: The plan.
        run: The run's folder.
    """
    if not run.ledger.exists():
        write_atomic(run.plan, json.dumps(plan.to_dict(), indent=2) + "\n")
