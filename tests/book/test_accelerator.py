"""The kit that checks and measures an accelerator: it runs anywhere, and finds what is wrong."""

import json
import sys
import time

import numpy as np
import pytest

import mamba.scan
from mamba.scan import FASTEST, METHODS, method_for
from mamba_book import accelerators
from tests.helpers.book import ROOT, load_script

RECORDED = sorted((ROOT / "benchmarks" / "results" / "accelerator").glob("*.json"))


@pytest.fixture(scope="module")
def kit():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield load_script("benchmarks/accelerator.py")
    sys.path.remove(str(ROOT / "benchmarks"))


def test_the_kit_checks_measures_and_writes(kit, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kit, "LONGEST_ROW", 0.002)
    monkeypatch.setattr(sys.modules["_measure"], "SECONDS", 0.02)
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--quick", "--out", f"{tmp_path}/a/b.json"])
    assert kit.main() == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "a" / "b.json").read_text("utf-8"))
    rows = report["results"]
    assert (
        report["correct"]
        and not report["does_not_run"]
        and report["platform"] == "cpu"
        and "CPU only" not in report["device"]
    )
    kinds = {row["of"] for row in rows}
    assert kinds == {"check", "limits", "scan", "model"}
    scans = [row for row in rows if row["of"] == "scan"]
    assert {(r["method"], r["pass"]) for r in scans} == {
        (m, p) for m in METHODS for p in kit.PASSES
    }
    for row in scans:
        assert row["ms"] > 0 and row["of_limit"] > 0 and row["faster_than_associative"] > 0, row
        assert f"| {row['method']} |" in printed
    assert report["fastest"] in METHODS and report["auto"] == list(FASTEST["cpu"])
    assert "WRONG" not in printed


def test_without_an_accelerator_it_says_so(kit, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accelerator.py"])
    assert kit.main() == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_wrong_scan_is_found_and_not_measured(kit, monkeypatch):
    correct = sys.modules["_correct"]
    original = correct.selective_scan

    def wrong(**arguments):
        y, h = original(**arguments)
        return (y * 1.001, h) if arguments["method"] == "chunked" else (y, h)

    monkeypatch.setattr(correct, "selective_scan", wrong)
    name = "selective_scan chunked b=2 l=37 d=5 n=3"
    monkeypatch.setattr(correct, "QUICK", [name])
    rows = [{"of": "check"} | row for row in correct.checks(quick=True)]
    assert [row["correct"] for row in rows] == [False] and rows[0]["values"] > 1e-4
    assert kit.wrong_methods(rows) == {"chunked"}
    points = kit.Points(1e9, None, time.monotonic() + 60, wrong={"chunked"})
    skipped = points.measure({"of": "scan", "method": "chunked", "pass": "forward"}, {}, 1)
    assert skipped["skipped"] == "wrong"


def test_what_does_not_compile_is_wrong_too(kit, monkeypatch):
    correct = sys.modules["_correct"]

    def broken(**arguments):
        raise NotImplementedError("no such kernel here")

    monkeypatch.setattr(correct, "ssd", broken)
    monkeypatch.setattr(correct, "QUICK", ["ssd chunked"])
    (row,) = correct.checks(quick=True)
    assert not row["correct"] and row["error"] == "NotImplementedError: no such kernel here"
    assert kit.wrong_methods([{"of": "check"} | row]) == {"ssd"}


def test_what_is_left_out_and_why(kit):
    what = {"of": "scan", "method": "associative", "pass": "forward+backward", "dtype": "float32"}
    what |= {"b": 8, "l": 65536, "d": 1536, "n": 16}
    least = 11 * 4 * 8 * 65536 * 1536
    points = kit.Points(1e12, 80e9, time.monotonic() + 60)
    assert points.why_not(what, least) == "memory"
    assert points.why_not(what | {"method": "pallas"}, least) is None
    shorter = what | {"method": "sequential", "l": 8192}
    points.known[points.series(shorter)] = 8192, 400.0  # ms: 3.2 s at 65,536
    assert points.why_not(what | {"method": "sequential"}, least) == "two seconds"
    assert points.why_not(shorter, least) is None
    assert kit.Points(1e12, None, time.monotonic() - 1).why_not(what, least) == "time is up"


def test_the_bytes_that_no_scan_can_save(kit):
    """Inputs once, outputs once; with gradients again, and a gradient for each input."""
    for what, shapes, least in kit.scan_points(quick=False):
        inputs = sum(np.prod(s) for name, s in shapes.items() if name not in ("A", "D"))
        y = np.prod(shapes["x"])
        numbers = inputs + y if what["pass"] == "forward" else 3 * inputs + 2 * y
        size = 4 if what["dtype"] == "float32" else 2
        assert least == size * numbers, what
    lengths = {what["l"] for what, _, _ in kit.scan_points(quick=False)}
    assert min(lengths) == 512 and max(lengths) == 65536


def test_the_points_of_the_other_scans_can_be_computed(kit, monkeypatch):
    import jax

    monkeypatch.setattr(kit, "HEADS", {"h": 2, "p": 4, "n": 8})
    monkeypatch.setattr(kit, "LENGTHS", [8, 12, 16])
    points = list(kit.head_points(quick=False))
    assert {(what["of"], what["r"]) for what, _, _ in points} == {
        ("ssd", 1),
        ("trapezoidal_scan", 1),
        ("trapezoidal_scan", 4),
    }
    for what, shapes, least in points:
        numbers = sum(np.prod(shape) for shape in shapes.values())
        assert least >= 4 * numbers
        arrays = {k: jax.ShapeDtypeStruct(s, what["dtype"]) for k, s in shapes.items()}
        out = jax.eval_shape(lambda v, what=what: kit.function_of(what)(**v), arrays)
        assert out.shape == shapes["x"]


def test_the_fastest_is_that_of_most_points(kit):
    point = {"of": "scan", "pass": "forward", "dtype": "float32", "b": 1}
    rows = [
        point | {"l": l, "method": method, "ms": ms}
        for l, times in ((1, (3, 2)), (2, (3, 2)), (3, (1, 2)))
        for method, ms in zip(("pallas", "chunked"), times, strict=True)
    ]
    assert kit.fastest(rows) == "chunked"
    assert (
        kit.fastest([*rows, point | {"l": 4, "method": "pallas", "skipped": "memory"}]) is not None
    )
    assert kit.fastest([]) is None


# --- the rule of method="auto" ------------------------------------------------------------------


def test_auto_follows_the_records():
    """A platform that was measured takes the method that its record found the fastest."""
    reports = {path: json.loads(path.read_text("utf-8")) for path in RECORDED}
    for platform, (method, record) in FASTEST.items():
        assert method in METHODS and (ROOT / record).exists(), platform
        if platform != "cpu":
            report = reports[ROOT / record]
            assert (report["platform"], report["fastest"]) == (platform, method)
    for path, report in reports.items():
        assert report["correct"], path
        assert report["platform"] in FASTEST, f"{path.name} backs no choice of mamba.scan.FASTEST"


def test_auto_takes_what_the_rule_says(monkeypatch):
    assert method_for("cpu") == ("sequential", "benchmarks/results/scan.json")
    assert method_for("an accelerator without a record") == ("chunked", None)
    monkeypatch.setattr(mamba.scan, "FASTEST", {"cpu": ("associative", None)})
    one = np.ones((1, 3, 2), np.float32)
    with pytest.raises(ValueError, match="'associative' takes no chunk"):
        mamba.scan.selective_scan(one, one, -one[0, :2], one, one, one[0, 0], chunk=2)


# --- what the pages make of a report ------------------------------------------------------------


def report_of_two_methods():
    point = {"of": "scan", "pass": "forward", "dtype": "float32", "b": 1, "d": 256, "n": 16}
    rows = [{"of": "limits", "read": 1e12, "copy": 2e12, "exponentials": 3e12}]
    for l in (512, 2048):
        rows.append(point | {"l": l, "method": "pallas", "ms": 0.02, "of_limit": 0.5})
        rows.append(point | {"l": l, "method": "associative", "ms": 2.0, "of_limit": 0.005})
    rows.append(point | {"l": 8192, "method": "associative", "skipped": "memory"})
    return {"device": "a GPU (gpu)", "results": rows}


def test_the_roofline_has_the_measured_points():
    from matplotlib.figure import Figure  # not of pyplot, which would keep it

    ax = Figure().subplots()
    accelerators.draw_roofline(ax, report_of_two_methods())
    roof, *dots = ax.lines
    assert max(roof.get_ydata()) == 3000 and min(roof.get_ydata()) == pytest.approx(2.0)
    assert len(dots) == 2 and len(ax.texts) == 2
    kernel, tree = ((dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots)
    assert kernel[0] == pytest.approx(1.0, rel=0.05)  # 16 exponentials for 16 bytes
    assert tree[0] < kernel[0] / 50 and kernel[1] == pytest.approx(100 * tree[1])
    assert kernel[1] == pytest.approx(2048 * 256 * 16 / 0.02e-3 / 1e9)


def test_the_table_has_a_line_for_each_length():
    lines = accelerators.table(report_of_two_methods()).splitlines()
    assert lines[0] == "| tokens | pass | pallas | associative |"
    assert lines[2:] == [
        "| 512 | forward | 0.0200 ms (50%) | 2.00 ms (0%) |",
        "| 2,048 | forward | 0.0200 ms (50%) | 2.00 ms (0%) |",
        "| 8,192 | forward |  | memory |",
    ]


def test_the_record_of_the_cpu_has_the_same_form():
    report = accelerators.cpu_report()
    assert {r["method"] for r in accelerators.points(report)} >= set(METHODS) - {"pallas"}
    assert "| 2,048 | forward |" in accelerators.table(report)


def test_the_records_that_a_page_reads_are_those_of_the_benchmarks():
    copies = ROOT / "mamba_book" / "data" / "accelerator"
    assert [p.name for p in sorted(copies.glob("*.json"))] == [p.name for p in RECORDED]
    assert accelerators.recorded() == [json.loads(p.read_text("utf-8")) for p in RECORDED]
