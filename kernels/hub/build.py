"""Build the package for Hugging Face's kernel hub: ``python kernels/hub/build.py [FOLDER]``.

``build.toml`` says for which backends. Nothing is compiled: each variant ``FOLDER/build/torch-<backend>`` is
a copy of the package with the ``metadata.json`` that the hub's loader reads. Without ``FOLDER`` it is
``kernels/``.
"""

import base64
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def build(folder: Path) -> list[Path]:
    """Write all variants, in the place of earlier ones.

    Args:
        folder: The hub's project folder: variants go into its ``build``.

    Returns:
        The variants' folders.
    """
    config = tomllib.loads((PROJECT / "build.toml").read_text())
    general, endings = config["general"], config["torch-noarch"]["pyext"]
    module = general["name"].replace("-", "_")
    sources = {
        path.relative_to(PROJECT / module): path.read_bytes()
        for path in sorted((PROJECT / module).rglob("*"))
        if path.is_file() and path.suffix.lstrip(".") in endings
    }
    variants = []
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for path, content in sources.items():
            target = variant / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        metadata = {
            "name": general["name"],
            # the module's name in a process, where versions may be side by side, and beside an installation
            "id": f"_{module}_{backend}_{_digest_of(sources)[:12]}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {
                    path.as_posix(): base64.b64encode(hashlib.sha256(content).digest()).decode()
                    for path, content in sources.items()
                },
            },
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


def _digest_of(sources: dict[Path, bytes]) -> str:
    total = hashlib.sha256()
    for path, content in sources.items():
        name = path.as_posix().encode()
        total.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return total.hexdigest()


if __name__ == "__main__":
    for built in build(Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT):
        print(built)
