"""Guards the layout: ``kernels/`` must never shadow Hugging Face's package, and triton stays optional."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Python's names for modules that must not be found; the finder stands before all others.
HIDE_TRITON = """
import sys

class HideTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, HideTriton())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
"""

# Any name can be imported from it, and is a class whose instances can be called or used as decorators.
FAKE_HUB_PACKAGE = """
__version__ = "0.18.2"

class Anything:
    def __init__(self, *arguments, **options): pass
    def __call__(self, *arguments, **options): return arguments[0] if arguments else self

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Anything,), {})
"""


def run_python(code, *, search_path=(), directory=ROOT, **environment):
    paths = [str(path) for path in search_path]
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.strip()


def test_kernels_folder_is_not_a_package_and_holds_no_modules():
    assert list((ROOT / "kernels").glob("*.py")) == []


def test_import_kernels_never_resolves_to_our_code():
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_transformers_imports_from_the_root_of_the_repository():
    # `python -c` puts the root first on sys.path, where kernels/ is a namespace package
    code = "from transformers.utils import is_kernels_available as f; import transformers; print(f())"
    assert run_python(code) in ("True", "False")


def test_transformers_imports_from_the_root_with_the_hub_package_installed(tmp_path):
    # The version that transformers wants, faked: the newest on PyPI may be older, so no other test would
    # notice.
    wanted = run_python("from transformers.utils.import_utils import KERNELS_MIN_VERSION as v; print(v)")
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_HUB_PACKAGE)
    metadata = tmp_path / f"kernels-{wanted}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {wanted}\n")
    (metadata / "top_level.txt").write_text("kernels\n")
    (metadata / "RECORD").write_text(f"kernels/__init__.py,,\nkernels-{wanted}.dist-info/METADATA,,\n")
    code = (
        "import kernels, transformers\n"
        "from transformers.utils import is_kernels_available\n"
        "from transformers import LlamaForCausalLM\n"
        "print(is_kernels_available(), kernels.__file__)"
    )
    answer = run_python(code, search_path=[ROOT, tmp_path])
    assert answer == f"True {package / '__init__.py'}"


def test_our_benchmarks_win_over_an_installed_package_of_that_name():
    # opacus installs a top-level package called benchmarks
    origin = run_python("import benchmarks; print(benchmarks.__file__)", search_path=[ROOT])
    assert Path(origin) == ROOT / "benchmarks" / "__init__.py"


def test_ops_run_in_torch_without_triton(tmp_path):
    code = HIDE_TRITON + (
        "import torch\n"
        "from securetune_kernels import clip_and_accumulate, pgd_step\n"
        "total = torch.zeros(3)\n"
        "clip_and_accumulate(torch.ones(2, 3), total, 10.0)\n"
        "mask = torch.ones(1, 2, dtype=torch.bool)\n"
        "step = pgd_step(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), mask, step_size=1.0, radius=0.5,\n"
        "                norm='linf', direction='sign')\n"
        "print(total.tolist(), step.unique().tolist(), 'triton' in sys.modules)\n"
    )
    answer = run_python(code, search_path=[ROOT / "kernels"], directory=tmp_path)
    assert answer == "[2.0, 2.0, 2.0] [0.5] False"


def test_importing_the_ops_does_not_import_triton(tmp_path):
    # triton alone takes longer to import than the command line may take to print its help
    # torch may have imported it by itself
    code = (
        "import sys, torch\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'triton']:\n"
        "    del sys.modules[name]\n"
        "import securetune_kernels\n"
        "print('triton' in sys.modules)"
    )
    assert run_python(code, search_path=[ROOT / "kernels"], directory=tmp_path) == "False"


def test_kernels_carry_the_marker_of_typed_packages():
    assert (ROOT / "kernels" / "securetune_kernels" / "py.typed").exists()
