"""Keys that processes share touch neither the disk nor the output."""

import base64

import pytest

from tests.distributed.launching import torchrun
from tests.distributed.marked_keys_worker import MARKED
from tests.sample_run import make_workshop, write_recipe


@pytest.mark.slow
def test_shared_keys_are_in_no_file_and_no_output(tmp_path):
    workshop = make_workshop(tmp_path)
    recipe = write_recipe(workshop, "marked", training__save_every=1)
    found = torchrun(2, "-m", "tests.distributed.marked_keys_worker", str(recipe))
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    seen = [found.stdout.encode(), found.stderr.encode()]
    seen += [path.read_bytes() for path in workshop.rglob("*") if path.is_file()]
    assert len(seen) > 20
    part = MARKED[3:27]  # whatever stands around it
    signs = [
        part,
        part.hex().encode(),
        base64.b64encode(part),
        str(list(part))[1:-1].encode(),
        repr(part).encode(),
    ]
    for content in seen:
        assert not any(sign in content for sign in signs)
