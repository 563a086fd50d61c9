"""Robust accuracy: which texts a model still gets right when its input is attacked.

A text the model gets wrong without an attack counts as not robust. A text for which the model gives a
number that is not finite counts as an error and not as robust.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from securetune.adversarial.characters import character_attack
from securetune.adversarial.embedding import Norm, attack_mode, perturb_until, sample_seeds, surface_noise
from securetune.adversarial.margins import label_margins
from securetune.data.collate import Batch
from securetune.data.encode import Example, encode_texts
from securetune.evaluation.batches import Progress, for_each_batch
from securetune.models.task import ClassifyHead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# a pass with a gradient keeps the activations of every layer
_GRADIENT_SHARE = 4


@dataclasses.dataclass(frozen=True)
class AttackOutcome:
    """What an attack left of ``N`` texts.

    Attributes:
        is_robust: ``N`` flags: right without the attack and still right under it.
        errors: Texts for which the model gave a number that is not finite; they are not robust.
        mean_queries: Forward passes per attacked text, on average.
    """

    is_robust: list[bool]
    errors: int
    mean_queries: float


def attack_embeddings(
    head: ClassifyHead,
    examples: Sequence[Example],
    *,
    is_correct: Sequence[bool],
    radii: Sequence[float],
    norm: Norm,
    steps: int,
    step_size: float | None,
    seed: int,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[AttackOutcome]:
    """Attack the embeddings with PGD on the margin, from the smallest radius to the largest.

    A text broken at one radius is broken at every larger one, as the smaller perturbation is allowed there
    too, so only survivors are attacked again: robust accuracy never rises with the radius. Within a radius
    a text leaves the batch once it is broken. The margin is used because the cross-entropy of a confident
    model has no gradient left.

    Guarantees:
        Whether a text survives does not depend on the other texts, up to rounding that depends on the batch's
        shape. The model's parameters, gradients and mode and the global random state are left as they were.

    Args:
        head: The model under test.
        examples: ``N`` labelled examples.
        is_correct: ``N`` flags: the model is right without an attack.
        radii: Budgets > 0, in embedding units, in any order.
        norm: See ``perturb``.
        steps: Gradient steps per radius >= 1.
        step_size: Step in embedding units; None: in proportion to each radius.
        seed: Seed of the random starts.
        batch_tokens: Most tokens of a batch without a gradient; attacked batches hold a quarter.
        progress: See ``Progress``; one stage over all radii, done texts counted per radius.

    Returns:
        One outcome per radius, in the order of ``radii``.
    """
    outcomes: dict[float, AttackOutcome] = {}
    survivors = [row for row, correct in enumerate(is_correct) if correct]
    done, total = 0, len(radii) * len(examples)

    def report(stage: str, count: int, attacked: int) -> None:
        if progress is not None:
            progress(stage, done + len(examples) - attacked + count, total)

    def attack(number: int, radius: float) -> AttackOutcome:
        attacked, victims = list(survivors), list[_Victim]()
        is_robust = [False] * len(examples)

        def attack_batch(rows: list[int], batch: Batch) -> None:
            victim = _Victim(head, batch)
            victims.append(victim)
            loss = perturb_until(
                victim.losses,
                victim.embeds,
                victim.attack_mask,
                threshold=0.0,
                norm=norm,
                radius=radius,
                steps=steps,
                step_size=step_size,
                random_start=sample_seeds(batch.unit_ids, seed=seed, step=number),
            ).best_loss
            stands = (loss < 0) & ~victim.is_error
            for row, robust in zip(rows, stands.tolist(), strict=True):
                is_robust[attacked[row]] = robust

        with attack_mode(head.model):
            for_each_batch(
                attack_batch,
                [examples[row] for row in attacked],
                max(1, batch_tokens // _GRADIENT_SHARE),
                device=head.device,
                stage="embedding attack",
                progress=report,
            )
        errors = sum(int(victim.is_error.sum()) for victim in victims)
        queries = sum(victim.queries for victim in victims)
        return AttackOutcome(is_robust, errors, queries / max(1, len(attacked)))

    for number, radius in enumerate(sorted(radii)):
        outcomes[radius] = attack(number, radius)
        survivors = [row for row in survivors if outcomes[radius].is_robust[row]]
        done += len(examples)
        report("embedding attack", 0, len(examples))
    return [outcomes[radius] for radius in radii]


def add_noise(
    head: ClassifyHead,
    examples: Sequence[Example],
    *,
    is_correct: Sequence[bool],
    radius: float,
    norm: Norm,
    seed: int,
    batch_tokens: int,
) -> AttackOutcome:
    """Perturb the embeddings by random noise of the full radius, once: the control of the embedding attack.

    An attack that breaks fewer texts than this has failed, and its robust accuracy means nothing.

    Args:
        head: The model under test.
        examples: ``N`` labelled examples.
        is_correct: ``N`` flags: the model is right without noise.
        radius: Length of the noise > 0, in embedding units.
        norm: See ``surface_noise``.
        seed: Seed of the noise.
        batch_tokens: Most tokens of a batch, padding included.

    Returns:
        The outcome.
    """
    is_robust, victims = [False] * len(examples), list[_Victim]()
    tested = [row for row, correct in enumerate(is_correct) if correct]

    @torch.no_grad()
    def perturb(rows: list[int], batch: Batch) -> None:
        victim = _Victim(head, batch)
        victims.append(victim)
        noise = surface_noise(
            sample_seeds(batch.unit_ids, seed=seed, step=-1),
            victim.attack_mask,
            victim.embeds.shape[-1],
            norm=norm,
            radius=radius,
        )
        everyone = torch.arange(len(rows), device=noise.device)
        loss = victim.losses(victim.embeds + noise.to(victim.embeds.dtype), everyone)
        for row, robust in zip(rows, (loss < 0).tolist(), strict=True):
            is_robust[tested[row]] = robust

    with attack_mode(head.model):
        for_each_batch(perturb, [examples[row] for row in tested], batch_tokens, device=head.device)
    return AttackOutcome(is_robust, sum(int(victim.is_error.sum()) for victim in victims), 1.0)


def attack_characters(
    predict: Callable[[list[str]], Tensor],
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    is_correct: Sequence[bool],
    max_edits: int,
    max_queries: int,
    seed: int,
    progress: Progress | None = None,
) -> AttackOutcome:
    """Attack the texts with the black-box character attack; texts that are wrong already cost nothing.

    Args:
        predict: The model under test (see ``text_predictor``).
        texts: ``N`` texts.
        labels: ``N`` right labels.
        is_correct: ``N`` flags: the model is right without an attack.
        max_edits: Edited characters per text >= 1.
        max_queries: Queries per text >= 3.
        seed: Seed of the attack.
        progress: See ``Progress``.

    Returns:
        The outcome.
    """
    attacked = [row for row, correct in enumerate(is_correct) if correct]
    wrong = len(texts) - len(attacked)
    results = character_attack(
        [texts[row] for row in attacked],
        [labels[row] for row in attacked],
        predict,
        max_edits=max_edits,
        max_queries=max_queries,
        seed=seed,
        progress=progress and (lambda done, _: progress("character attack", wrong + done, len(texts))),
    )
    is_robust = [False] * len(texts)
    for row, result in zip(attacked, results, strict=True):
        is_robust[row] = not result.success and not result.error
    queries = sum(result.queries for result in results)
    return AttackOutcome(is_robust, sum(result.error for result in results), queries / max(1, len(attacked)))


def text_predictor(
    head: ClassifyHead,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompt: str,
    max_length: int,
    batch_tokens: int,
) -> Callable[[list[str]], Tensor]:
    """Make a function from texts to label scores: what an attacker without access to the model sees.

    Args:
        head: The model under test.
        tokenizer: Its tokenizer.
        prompt: The prompt of the task; must contain ``{text}``.
        max_length: Token limit of the recipe. Misspelt words take more tokens, so twice as many are let
            through before a text is cut.
        batch_tokens: Most tokens of a batch, padding included.

    Returns:
        A function from ``N`` texts to logits ``[N, C]``, float32 on the CPU.
    """

    def predict(texts: list[str]) -> Tensor:
        examples = encode_texts(
            texts, tokenizer, prompt=prompt, max_length=2 * max_length, on_overlong="truncate"
        )
        scores = torch.empty(len(texts), len(head.label_words))

        @torch.inference_mode()
        def score(rows: list[int], batch: Batch) -> None:
            scores[rows] = head.logits(head.embed(batch), batch).float().cpu()

        with attack_mode(head.model):
            for_each_batch(score, examples, batch_tokens, device=head.device)
        return scores

    return predict


class _Victim:
    """A model on one batch, as the attack sees it; remembers numbers that were not finite."""

    def __init__(self, head: ClassifyHead, batch: Batch) -> None:
        if batch.labels is None:
            raise ValueError("robust accuracy needs labelled examples, got some without a label.")
        self._head = head
        with torch.no_grad():
            self.embeds = head.embed(batch)
        self._batch = batch.to(self.embeds.device)
        self._labels = batch.labels.to(self.embeds.device)
        self.attack_mask = self._batch.attack_mask
        self.is_error = torch.zeros(len(batch.unit_ids), dtype=torch.bool, device=self.embeds.device)
        self.queries = 0

    def losses(self, embeds: Tensor, rows: Tensor) -> Tensor:
        """Return the negative margins of some rows: positive where the model is wrong."""
        self.queries += len(rows)
        batch = dataclasses.replace(
            self._batch,
            input_ids=self._batch.input_ids[rows],
            lengths=self._batch.lengths[rows],
            labels=self._labels[rows],
            attack_mask=self._batch.attack_mask[rows],
            supervised=self._batch.supervised[rows],
            unit_ids=tuple(self._batch.unit_ids[row] for row in rows.tolist()),
        )
        margins = label_margins(self._head.logits(embeds, batch), self._labels[rows])
        self.is_error[rows] |= margins.detach().isnan()
        return -margins
