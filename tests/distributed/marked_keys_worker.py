"""Runs a recipe with shared keys that can be recognised.

torchrun --nproc_per_node N -m tests.distributed.marked_keys_worker RECIPE
"""

import runpy
from types import SimpleNamespace

from securetune.privacy.distributed import collectives
from tests.distributed.launching import ROOT

MARKED = bytes(range(101, 133))

if __name__ == "__main__":
    collectives.os = SimpleNamespace(urandom=lambda _: MARKED)  # pyright: ignore[reportAttributeAccessIssue]
    runpy.run_path(str(ROOT / "recipes" / "harden.py"), run_name="__main__")
