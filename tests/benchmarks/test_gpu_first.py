"""The first look at a GPU: floors by arithmetic, and kernels that are late or wrong are named."""

from __future__ import annotations

from pathlib import Path

import gpu
import gpu_first
import gpu_floors
import pytest
import torch
from gpu_clock import Clock
from gpu_floors import DEVICES, FIRST, Work
from gpu_report import judge, table
from turnout.cuda import tune
from turnout.moe.experts import first_use

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_floors_of_a_kernel():
    H200 = DEVICES["H200"]
    assert Work(4.8).floor(H200) == pytest.approx(1.0)
    assert Work(4.8, tflop=1.978).floor(H200) == pytest.approx(2.0)
    assert Work(4.8).expected(H200) == pytest.approx(0.005 + 1 / 0.85)
    assert Work(0.1, tflop=0.989).expected(H200) == pytest.approx(0.005 + 1 / 0.65)


def test_the_work_of_a_step():
    T, D, H, E, k = FIRST
    works = gpu_floors.works(FIRST)
    experts = sum(work.tflop for name, work in works.items() if not name.startswith("router"))
    assert experts == pytest.approx(18 * T * k * D * H / 1e12)
    assert works["decode"].gb == pytest.approx((1 + k) * T * D * 2 / 1e9, rel=0.01)
    assert works["up"].gb == pytest.approx((T * D + 2 * E * D * H + 3 * T * k * H) * 2 / 1e9)


@pytest.mark.parametrize(
    ("name", "rates"), [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe")]
)
def test_rates_are_found_by_name(name, rates):
    assert gpu_floors.device(name) == DEVICES[rates]
    assert gpu_floors.device("some other GPU") is None


def test_the_record_has_the_table():
    record = (ROOT / "docs/records/gpu.md").read_text()
    assert table(gpu_floors.rows(FIRST)) in record
    assert table(gpu_floors.rows(FIRST, float8=True)) in record


def test_the_work_of_a_step_in_float8():
    step, plain = gpu_floors.float8_step(FIRST), gpu_floors.works(FIRST)
    assert gpu_floors.total(step).tflop == pytest.approx(gpu_floors.total(plain).tflop)
    in_float8 = sum(work.tflop for work in step.values() if work.float8)
    T, D, H, _, k = FIRST
    assert in_float8 == pytest.approx(12 * T * k * D * H / 1e12), "all but the gradients of the weights"
    H200 = DEVICES["H200"]
    assert step["up, float8"].floor(H200) == pytest.approx(plain["up"].floor(H200) / 2, rel=1e-3)


def test_each_kernel_in_float8_has_a_floor(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "runs", lambda sizes, device: [(sizes, lambda size: None)] * 6)
    made = gpu_first.float8_products(CPU, (32, 16, 32, 4, 2))
    assert made.keys() == gpu_floors.float8_works(FIRST).keys()


def test_a_late_kernel_is_named(monkeypatch):
    works = gpu_floors.works(FIRST)
    expected = {name: work.expected(DEVICES["H200"]) / 1e3 for name, work in works.items()}
    measured = {"up": 1.2 * expected["up"], "down": 1.3 * expected["down"], "plan": "RuntimeError: no"}
    monkeypatch.setattr(gpu_floors, "device", lambda _: DEVICES["H200"])
    monkeypatch.setattr(Clock, "measure", lambda *_, **__: measured)
    rows = gpu_first.times(Clock(CPU, 0.01), FIRST, lambda *_: {})
    late = [row for row in judge({"first": {"times": {"rows": rows}}}) if row.get("reached") is False]
    assert [row["what"] for row in late] == ["down", "plan: RuntimeError: no"]
    up = rows[0]
    assert up["of the floor"] == pytest.approx(up["floor ms"] / up["ms"])
    assert up["TFLOP/s"] == pytest.approx(works["up"].tflop / measured["up"])


def test_wrong_experts_are_named(monkeypatch):
    monkeypatch.setattr(first_use, "differences", lambda kind: {"output": 0.01, "of w_up": float("nan")})
    rows = gpu_first.experts(CPU, FIRST)
    assert [row["ok"] for row in rows] == [True, False] * 4
    assert len(gpu_first.experts(CPU, FIRST, "fp8")) == 4


def test_first_runs_two_parts(monkeypatch):
    ran = []
    monkeypatch.setattr(gpu, "work", lambda file, part, todo, alive: ran.append((part, list(todo))))
    monkeypatch.setattr("sys.argv", ["gpu.py", "--first", "--device", "cpu", "--small"])
    assert gpu.main() == 0
    assert [part for part, _ in ran] == ["machine", "first"]
    assert ran[1][1][-1] == "times of routing"
