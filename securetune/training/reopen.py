"""Open a published checkpoint as its receiver would, in a fresh process, and compare what the model says."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from securetune.config.schema import Recipe
from securetune.errors import CheckpointError
from securetune.models.base import load_base
from securetune.training.access import Access
from securetune.training.prepare import PROBES
from securetune.training.subjects import holds_weights, restore

_TOLERANCE = 1e-3  # logits, float32, same operations in two processes
_READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, probes = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = [model(**tokenizer(probe, return_tensors="pt")).logits[0, -1] for probe in probes]
print(json.dumps([row.tolist() for row in logits]))
"""


def check_reopens(recipe: Recipe, access: Access, checkpoint: Path, public_key: Path) -> float:
    """Open a checkpoint with ``securetune checkpoint open`` and plain transformers in fresh processes.

    Args:
        recipe: The recipe; names the base model.
        access: The run's keys: the demo recipient's private key, or the passphrase, opens the checkpoint.
        checkpoint: The published folder.
        public_key: The publisher's public key file.

    Returns:
        The largest difference between its logits and those of the model in this process.

    Raises:
        CheckpointError: If it does not open, or says something else.
    """
    base = load_base(recipe.model.model_copy(update={"dtype": "float32", "device": "cpu"}))
    with access.open(checkpoint) as vault:
        model = restore(base, vault)
        compartment = "weights" if holds_weights(vault) else "adapter"
    with torch.no_grad():
        expected = [model(**base.tokenizer(probe, return_tensors="pt")).logits[0, -1] for probe in PROBES]
    key = ["--identity", str(access.identity_file)] if access.identity_file else []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "opened"
        if not key:
            assert access.passphrase is not None  # access.open would have refused
            passphrase = Path(folder) / "passphrase"
            passphrase.touch(mode=0o600)
            passphrase.write_bytes(bytes(access.passphrase))
            key = ["--passphrase-file", str(passphrase)]
        arguments = ["checkpoint", "open", str(checkpoint), str(target), "--public-key", str(public_key)]
        arguments += key if compartment == "weights" else [*key, "--base", recipe.model.name]
        _run([sys.executable, "-m", "securetune", *arguments])
        output = _run([sys.executable, "-c", _READER, str(target / compartment), json.dumps(PROBES)])
    actual = torch.tensor(json.loads(output.strip().rpartition("\n")[2]))
    difference = float((actual - torch.stack(expected)).abs().max())
    if not difference <= _TOLERANCE:
        raise CheckpointError(
            f"{checkpoint}, opened in a fresh process, answers differently: its logits differ by "
            f"{difference:.2e} (allowed "
            f"{_TOLERANCE:.0e}). Do not hand it over."
        )
    return difference


def _run(command: list[str]) -> str:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise CheckpointError(
            f"opening the published checkpoint in a fresh process failed: {process.stderr.strip()[-600:]}"
        )
    return process.stdout
