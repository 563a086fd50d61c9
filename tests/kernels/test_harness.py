"""The benchmark harness: its rules about comparisons, and the shape of a result line."""

import json
import math

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import bench_kernels
from benchmarks._harness import (
    Context,
    DoesNotFit,
    OutputsDiffer,
    Quantiles,
    Result,
    Timing,
    check_agreement,
    compare_memory,
    compare_times,
    peak_memory_bytes,
    plain_result,
    time_paired,
)
from benchmarks._plots import draw
from benchmarks._roofline import H100, least_seconds
from benchmarks._tables import print_kernels, with_unit

CONTEXT = Context(device=torch.device("cpu"), quick=True)
SCHEMA = {
    "benchmark", "metric", "unit", "value", "baseline", "baseline_value", "ratio", "quantiles", "shape",
    "dtype", "device", "versions", "commit", "date",
}  # fmt: skip


def some_result(candidate=(2.0, 2.0, 2.0), baseline=(4.0, 8.0, 4.0)):
    agreement = check_agreement("sum", torch.ones(3), torch.ones(3), tolerance=0.0)
    return compare_times(
        "demo", Timing(candidate), Timing(baseline), agreement, CONTEXT,
        baseline_name="other 1.0", shape="N=3", dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, math.nan]), torch.ones(3)])
def test_different_outputs_are_refused(wrong):
    with pytest.raises(OutputsDiffer, match="gradients"):
        check_agreement("gradients", wrong, torch.tensor([1.0, 2.0]), tolerance=1e-3)


def test_agreement_keeps_the_error_and_the_tolerance():
    agreement = check_agreement("x", torch.tensor([1.01]), torch.tensor([1.0]), tolerance=0.1)
    assert agreement.error == pytest.approx(0.01, rel=1e-3)
    assert agreement.tolerance == 0.1


def test_line_has_the_schema_and_ratio_is_value_over_baseline():
    line = json.loads(some_result().to_json())
    assert set(line) >= SCHEMA
    assert line["ratio"] == line["value"] / line["baseline_value"] == 0.5
    assert set(line["quantiles"]) >= {"q20", "q50", "q80", "ratio_q20", "ratio_q50", "ratio_q80"}
    assert "torch" in line["versions"]


def test_ratio_is_paired_round_by_round():
    assert Timing((2.0, 30.0)).ratio_to(Timing((1.0, 10.0))) == Quantiles.of([2.0, 3.0])


def test_memory_result_has_no_paired_ratio():
    agreement = check_agreement("x", torch.ones(1), torch.ones(1), tolerance=0.0)
    result = compare_memory(
        "demo", 100, 200, agreement, CONTEXT, baseline_name="other 1.0", shape="N=3", dtype="float32"
    )
    assert result.ratio == 0.5
    assert "ratio_q50" not in result.quantiles


def test_quantiles_of_one_sample():
    assert Quantiles.of([3.0]) == Quantiles(3.0, 3.0, 3.0)


def test_rounds_are_interleaved_and_rotated():
    calls = []
    time_paired({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CONTEXT, rounds=4, warmup=1)
    assert calls == ["a", "b"] + ["a", "b", "b", "a"] * 2


def test_reset_runs_before_every_call():
    state = []
    time_paired(
        {"a": lambda: state.append("work")}, CONTEXT, rounds=2, warmup=1, reset=lambda: state.append("reset")
    )
    assert state == ["reset", "work"] * 3


def test_peak_memory_sees_a_large_temporary():
    size = 64 * 2**20
    peak = peak_memory_bytes(lambda: torch.ones(size // 4).sum(), CONTEXT.device)
    if peak is None:
        pytest.skip("only Linux lets a process reset its peak memory")
    assert 0.9 * size <= peak <= 1.5 * size


@pytest.fixture
def only_benchmark(monkeypatch):
    """Make ``demo`` the only benchmark, with a given body."""

    def install(run):
        monkeypatch.setattr(cli, "available", lambda: ["demo"])
        monkeypatch.setattr(
            cli.importlib, "import_module", lambda name: type("Module", (), {"run": staticmethod(run)})
        )

    return install


def test_results_are_appended_as_they_come(only_benchmark, tmp_path, capsys):
    def run(context):
        yield some_result()
        raise DoesNotFit("memory ran out")

    only_benchmark(run)
    file = tmp_path / "results" / "out.jsonl"
    assert cli.main(["demo", "--device", "cpu", "--json", str(file)]) == cli.EXIT_DOES_NOT_FIT
    assert Result(**json.loads(file.read_text())).benchmark == "demo"
    assert cli.main(["--show", str(file)]) == 0
    assert "other 1.0" in capsys.readouterr().out


def test_what_does_not_fit_is_skipped_when_all_run(only_benchmark, capsys):
    def run(context):
        raise DoesNotFit("needs a GPU")

    only_benchmark(run)
    assert cli.main(["--device", "cpu"]) == 0
    assert "does not fit this machine: needs a GPU" in capsys.readouterr().out


def test_outputs_that_differ_print_no_ratio_and_fail(only_benchmark, capsys):
    def run(context):
        check_agreement("x", torch.zeros(1), torch.ones(1), tolerance=0.1)
        return [some_result()]

    only_benchmark(run)
    assert cli.main(["demo", "--device", "cpu"]) == cli.EXIT_FAILED
    captured = capsys.readouterr()
    assert "outputs differ" in captured.err
    assert "other 1.0" not in captured.out


def test_unknown_name_lists_what_there_is(capsys):
    assert cli.main(["clip"]) == cli.EXIT_USAGE
    assert "clip_and_accumulate" in capsys.readouterr().err


def test_plain_result_has_no_ratio():
    result = plain_result("demo", "rate", "GB/s", Quantiles(1, 2, 3), CONTEXT, shape="N=1", dtype="float32")
    assert result.ratio is None
    assert result.baseline is None


@pytest.mark.parametrize("name", ["clip_and_accumulate", "pgd_step"])
def test_benchmarks_of_the_ops_run(name, capsys):
    assert cli.main([name, "--quick", "--device", "cpu"]) == 0
    assert "ratio" in capsys.readouterr().out


def line_of(work, seconds, device, metric="step_time"):
    quantiles = dict.fromkeys(("q20", "q50", "q80"), seconds)
    return Result(
        work.op, metric, "s", seconds, None, None, None, quantiles, work.shape, work.dtype, device, {}, "", ""
    )


def test_every_op_has_predictions():
    assert {work.op for work in bench_kernels.works()} == set(bench_kernels.OPS)


def test_committed_plots_are_drawn_from_the_predictions(tmp_path):
    files = draw(list(bench_kernels.works()), [], tmp_path)
    assert [path.name for path in files] == [
        "kernels_nvidia_h100_sxm_roofline.svg", "kernels_nvidia_h100_sxm_times.svg"
    ]  # fmt: skip
    for path in files:
        text = path.read_text()
        assert "predicted from the data sheet, nothing measured" in text
        assert "(measured)" not in text
        assert (cli.RESULTS / path.name).exists()
    names = [f"{op} (predicted)" for op in bench_kernels.OPS]
    assert all(name in files[0].read_text() for name in names)


def test_plots_of_the_same_lines_are_the_same_bytes(tmp_path):
    works = list(bench_kernels.works())[:3]
    first, second = (draw(works, [], tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_measured_times_stand_beside_the_predictions(tmp_path):
    works = list(bench_kernels.works())[:2]
    lines = [
        line_of(works[0], 5 * least_seconds(works[0], H100), "NVIDIA H100 80GB HBM3"),
        line_of(works[1], 1.0, "some CPU"),
    ]
    roofline, times = (path.read_text() for path in draw(works, lines, tmp_path))
    assert f"{works[0].op} (measured)" in roofline
    assert f"{works[1].op} (measured)" not in roofline
    assert "measured, median" in times


def test_prediction_stands_beside_what_was_measured(capsys):
    works = list(bench_kernels.works())[:2]
    measured = line_of(works[0], 4 * least_seconds(works[0], H100), "NVIDIA H100 80GB HBM3")
    print_kernels([measured], works, with_rest=True)
    header, first, second = capsys.readouterr().out.splitlines()
    place = header.index("predicted")
    assert "25 %" in first
    assert first[place:].startswith(with_unit(least_seconds(works[0], H100), "s"))
    assert works[1].op in second
    assert "not measured" in second
    assert "NVIDIA H100 SXM" in second[place:]


def test_prediction_for_another_chip_stands_beside_nothing(capsys):
    work = next(bench_kernels.works())
    print_kernels([line_of(work, 1.0, "some CPU")], [work])
    assert "%" not in capsys.readouterr().out


def test_kernels_draw_into_the_folder_that_plots_names(only_benchmark, monkeypatch, tmp_path, capsys):
    result = line_of(
        next(bench_kernels.works()), 1.0, "NVIDIA H100 SXM (data sheet)", "least time (predicted)"
    )
    only_benchmark(lambda context: [result.__class__(**{**vars(result), "benchmark": "kernels"})])
    assert cli.main(["demo", "--device", "cpu", "--quick", "--plots", str(tmp_path / "plots")]) == 0
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 2
    assert "drawn: " in capsys.readouterr().out
