"""User-level privacy: all records of one user are one unit, sampled together and clipped together."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from securetune.privacy.loss_distribution import Phase, Sampling
from securetune.privacy.noise import SecretKey, refuse_to_copy, secret_key
from securetune.privacy.sampling import Sampler, SamplingStatement

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from securetune.privacy.participation import Participation

__all__ = ["DrawnRecord", "UserSampler"]


class DrawnRecord(NamedTuple):
    """One record of a step.

    Attributes:
        position: Its position among the records.
        unit_id: The user it belongs to: the gradients of one ``unit_id`` are summed before one clip.
    """

    position: int
    unit_id: str


class UserSampler:
    """Sample users, and take up to ``max_records_per_user`` records of each.

    Epsilon then speaks of users: the guarantee needs the gradients of all drawn records of one user to be
    summed and clipped **once** (by ``unit_id``); clipping each record would multiply the sensitivity. Any
    sampler may choose the users, and its accounting holds with "user" for "record".

    Which of a user's records are taken at a step follows from a keyed hash of the user's id, the step and the
    record's number among this user's records alone. So no user's records depend on the other users.

    Guarantees:
        A drawn user comes with ``min(max_records_per_user, all)`` different records, each subset with the
        same probability, new at each step. The key is not shown by ``repr`` and cannot be pickled or copied.

    Args:
        user_ids: The user of each record, in the order of the records.
        sampler: Draws users: its ``num_records`` must be the number of different ``user_ids``. Where that
            number is public it may be larger: the positions behind the users are empty places.
        max_records_per_user: Most records of one user in one step, >= 1, a public constant.
        key: 32 bytes, for tests only: a run with a fixed key reports no epsilon.

    Raises:
        ValueError: If an argument is out of range, an id is no string, or the sampler's size is not the
            number of users.
    """

    def __init__(
        self,
        user_ids: Sequence[str],
        sampler: Sampler,
        *,
        max_records_per_user: int,
        key: bytes | SecretKey | None = None,
    ) -> None:
        if max_records_per_user < 1:
            raise ValueError(f"max_records_per_user must be >= 1, got {max_records_per_user}.")
        records: dict[str, list[int]] = {}
        for index, user_id in enumerate(user_ids):
            if not isinstance(user_id, str):
                raise ValueError(
                    f"user_ids must be strings, got {user_id!r} for record {index}. Give [str(user) for user "
                    "in user_ids]."
                )
            records.setdefault(user_id, []).append(index)
        places, is_public = sampler.num_records, sampler.sampling.num_records is not None
        if places < len(records) or (places > len(records) and not is_public):
            raise ValueError(
                f"the sampler draws from {sampler.num_records} users, but user_ids has {len(records)} "
                "different ones. Give the sampler len(set(user_ids)) as num_records."
            )
        self._users = list(records.items())
        self._num_records = len(user_ids)
        self._sampler = sampler
        self._max_records_per_user = max_records_per_user
        self._key = secret_key(key)
        self._has_secret_key = not isinstance(key, bytes)

    def __repr__(self) -> str:
        key = "<secret>" if self._has_secret_key else "<fixed, for tests>"
        return f"UserSampler({self._sampler!r}, max_records_per_user={self._max_records_per_user}, key={key})"

    def __reduce__(self) -> NoReturn:
        raise refuse_to_copy("UserSampler")

    @property
    def num_records(self) -> int:
        """Number of records of all users."""
        return self._num_records

    @property
    def sample_rate(self) -> float:
        """Probability of each user at each step, before truncation."""
        return self._sampler.sample_rate

    @property
    def sampling(self) -> Sampling:
        """How the users are chosen, as the accountant must know it."""
        return self._sampler.sampling

    @property
    def max_batch_size(self) -> int | None:
        """Most records in one step: the size to pad to; ``None`` without a limit."""
        max_users = self._sampler.max_batch_size
        return None if max_users is None else max_users * self._max_records_per_user

    @property
    def reportable_epsilon(self) -> bool:
        """Whether an epsilon may be reported for these samples: false for a fixed test key."""
        return self._has_secret_key and self._sampler.reportable_epsilon

    @property
    def participation(self) -> "Participation | None":
        """How often, and how far apart, a user is taken; ``None`` where chance decides at each step."""
        return self._sampler.participation

    def draw(self, step: int) -> list[DrawnRecord]:
        """Draw the records of one step; the same step of the same sampler gives the same records.

        Args:
            step: Logical step of the run, from 0.

        Returns:
            The records, those of one user side by side; may be empty.

        Raises:
            ValueError: If ``step`` is out of range.
        """
        drawn: list[DrawnRecord] = []
        for position in self._sampler.draw(step):
            if position >= len(self._users):
                continue
            user_id, indices = self._users[position]
            drawn += [
                DrawnRecord(indices[number], user_id) for number in self._choose(user_id, indices, step)
            ]
        return drawn

    def draw_next(self) -> list[DrawnRecord]:
        """Draw records of a sample of users that no run drew before; see :meth:`Sampler.draw_next`.

        Returns:
            As :meth:`draw`.
        """
        return self.draw(self._sampler.begin_step())

    def phase(self, noise_multiplier: float, steps: int) -> Phase:
        """Describe steps on these samples to the accountant, with users as units.

        Args:
            noise_multiplier: Noise standard deviation over the clipping threshold of one user.
            steps: Number of steps.

        Returns:
            See :meth:`securetune.privacy.sampling.Sampler.phase`.
        """
        return self._sampler.phase(noise_multiplier, steps)

    def event(self, noise_multiplier: float) -> "DpEvent":
        """Describe one step on these samples as a ``dp-accounting`` event.

        Args:
            noise_multiplier: Noise standard deviation over the clipping threshold of one user.

        Returns:
            The event; compose it once per step.
        """
        return self._sampler.event(noise_multiplier)

    def describe(self) -> SamplingStatement:
        """Say how users are sampled, under which neighbouring relation, and what that makes public.

        Returns:
            The statement; it holds nothing private.
        """
        return self._sampler.describe()._replace(unit="user", max_records_per_unit=self._max_records_per_user)

    def _choose(self, user_id: str, indices: list[int], step: int) -> list[int]:
        """Choose which of a user's records are taken, by their number within the user."""
        numbers = range(len(indices))
        if len(indices) <= self._max_records_per_user:
            return list(numbers)
        ranks = {number: self._rank(user_id, step, number) for number in numbers}
        return sorted(sorted(numbers, key=ranks.__getitem__)[: self._max_records_per_user])

    def _rank(self, user_id: str, step: int, number: int) -> bytes:
        address = step.to_bytes(8, "little") + number.to_bytes(8, "little") + user_id.encode()
        return hashlib.blake2b(address, key=self._key, digest_size=16).digest()
