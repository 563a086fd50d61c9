"""The private step over several processes: torch's DDP and FSDP2, DeepSpeed's ZeRO-1, 2 and 3.

Each strategy fills in :class:`securetune.privacy.reduction.Reduction`. Noise is addressed by the canonical
index of each entry, so the released gradient is the same for any number of processes and any strategy, up to
the rounding of the sum.
"""

from securetune.privacy.distributed.collectives import Processes
from securetune.privacy.distributed.data_parallel import DataParallel
from securetune.privacy.distributed.fully_sharded import FullySharded
from securetune.privacy.distributed.shared_ledger import SharedLedger
from securetune.privacy.distributed.zero import Zero

__all__ = ["DataParallel", "FullySharded", "Processes", "SharedLedger", "Zero"]
