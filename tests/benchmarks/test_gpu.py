"""benchmarks/gpu.py: all of it runs, on tiny shapes on a CPU; what crashes or hangs is named, and the rest goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gpu
import gpu_checks
import gpu_layer
import gpu_peers
import pytest
import torch
from gpu_clock import Clock, Step
from gpu_report import BEGUN, judge, read, shown, supervise, table
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = [
        sys.executable,
        "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--small",
        "--seconds",
        "0.01",
        "--out",
        str(out),
    ]
    (tmp_path / "S").mkdir()
    (tmp_path / "S" / "turnout").symlink_to(ROOT)  # as on a machine where nothing is installed
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "S")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    said = json.loads(out.read_text())
    results, verdicts = said["results"], said["verdicts"]
    assert list(results) == ["machine", "first", "checks", "ops", "layer", "tune"]
    assert {"fact": "turnout is in", "value": str(tmp_path / "S" / "turnout")} in results["machine"]["machine"]["rows"]
    assert {"fact": "torch", "value": torch.__version__} in results["machine"]["machine"]["rows"]
    named = [*results["first"], *results["checks"], *results["ops"], *results["layer"], *results["tune"]]
    assert len(set(named)) == len(named), "a case runs twice"
    first = results["first"].pop("times of routing")
    assert [row["what"] for row in first["rows"]] == [
        "router, product",
        "router",
        "plan",
        "decode",
        "router, backward",
        "router, product, backward",
    ]
    assert all(row["ms"] > 0 for row in first["rows"])
    checks = [row for part in ("first", "checks") for case in results[part].values() for row in case["rows"]]
    assert len(checks) > 100
    assert [row for row in checks if not row["ok"]] == []
    moved = {row["operation"]: row for row in results["ops"]["move (64, 16, 4, 2)"]["rows"]}
    assert moved["encode"]["MB at least"] == pytest.approx((64 + 128) * 16 * 2 / 1e6)
    assert all(row["ms"] > 0 and row["GB/s"] > 0 for row in moved.values())
    routed = results["ops"]["route (64, 16, 4, 2)"]["rows"]
    assert all(row["device us"] > 0 and row["host us"] > 0 and row["launches"] > 0 for row in routed)
    layer = {row["what"]: row for row in results["layer"]["layer (48, 16, 24, 4, 2)"]["rows"]}
    assert list(layer) == ["dense", "indexed", "layer"]
    for row in layer.values():
        assert "error" not in row
        work = 6 * 48 * 2 * 16 * 24  # forward; three times that with the backward
        assert row["forward TFLOP/s"] * row["forward ms"] == pytest.approx(work / 1e9)
        assert row["fwd+bwd TFLOP/s"] * row["fwd+bwd ms"] == pytest.approx(3 * work / 1e9)
    assert {row["what"] for name, case in results["layer"].items() for row in case["rows"] if "Tutel" in name} == {
        "Tutel"
    }
    in_float8 = results["layer"]["layer (48, 16, 24, 4, 2), fp8"]["rows"]
    assert [(row["what"], "error" in row) for row in in_float8] == [("dense", False), ("layer, fp8", False)]
    tuned, in_float8 = results["tune"].values()
    assert [row["what"] for row in tuned["rows"]] == ["autotune", "dense", "layer, torch, tuned"]
    assert [row["what"] for row in in_float8["rows"]] == ["autotune", "dense", "layer, torch, fp8, tuned"]
    assert "CUDA devices" in tuned["rows"][0]["why"] or "needs Triton" in tuned["rows"][0]["why"]
    assert "aten::mm" in (tmp_path / "gpu.profile.txt").read_text()
    assert verdicts == [{"case": "checks that passed", "what": len(checks)}]  # times are not judged on a CPU
    assert "## Targets" in run.stdout


def test_a_wrong_operator_is_seen(monkeypatch):
    encode = gpu_checks.encode
    monkeypatch.setattr(gpu_checks, "encode", lambda x, plan: encode(x, plan) * (1 + 1e-4 * (x.dtype == torch.float32)))
    rows = gpu_checks.operators(CPU, torch.float32, 40, 16, 4, 2)
    assert {row["check"] for row in rows if not row["ok"]} == {"encode", "encode: backward"}
    report = shown(rows)
    assert report.startswith("30 of 42 passed")
    assert report.count("**no**") == 12
    verdicts = list(judge({"checks": {"ops": {"rows": rows}}}))
    assert verdicts[0] == {"case": "checks that passed", "what": 30}
    assert [row["reached"] for row in verdicts[1:]] == [False] * 12


def test_a_wrong_layer_is_seen(monkeypatch):
    reference = gpu_checks.reference
    monkeypatch.setattr(gpu_checks, "reference", lambda *args: reference(*args) * 1.05)
    rows = gpu_checks.layer(CPU, torch.bfloat16, None, 40, 16, 24, 4, 2)
    assert not any(row["ok"] for row in rows if row["check"] == "y")


def test_nan_is_never_near():
    assert gpu_checks.error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert gpu_checks.error(torch.ones(2), torch.ones(1)) == float("inf")


def test_a_contender_that_fails_does_not_take_the_others_along():
    def broken() -> None:
        raise ValueError("no\nkernel")

    times = Clock(CPU, 0.01).measure({"a": lambda: None, "broken": broken, "b": lambda: time.sleep(0.001)})
    assert list(times) == ["a", "broken", "b"]
    assert times["broken"] == "ValueError: no kernel"
    assert times["b"] >= 0.001 > times["a"] > 0


def test_a_contender_that_skips_its_parameters_is_refused():
    x, used, unused = (torch.ones(3, requires_grad=True) for _ in range(3))
    Step(lambda x: x * used, x, torch.ones(3), [used]).complete()
    with pytest.raises(RuntimeError, match="1 of 2 parameters got no gradient"):
        Step(lambda x: x * used, x, torch.ones(3), [used, unused]).complete()


def test_table():
    rows = [{"a": 1, "b": 0.12345}, {"a": "x|y", "c": False}]
    assert table(rows).splitlines() == ["| a | b | c |", "|---|---|---|", "| 1 | 0.123 |  |", "| x/y |  | **no** |"]


class PeerLayer(nn.Module):
    """With the outside of SonicMoE's layer."""

    def __init__(self, num_experts, num_experts_per_tok, hidden_size, intermediate_size, activation_function, **rest):
        super().__init__()
        self.router = nn.Linear(hidden_size, num_experts, bias=False)

    def forward(self, x, kernel_backend_moe):
        return self.router(x).sum(-1, keepdim=True) * x, None


def test_a_peer_that_is_installed_is_measured_beside_the_layer(monkeypatch):
    package, enums = ModuleType("sonicmoe"), ModuleType("sonicmoe.enums")
    package.MoE, package.KernelBackendMoE = PeerLayer, SimpleNamespace(sonicmoe=0)
    enums.ActivationType = SimpleNamespace(SWIGLU=0)
    monkeypatch.setitem(sys.modules, "sonicmoe", package)
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    monkeypatch.setattr(gpu_peers, "find_spec", lambda name: object())
    ours, theirs = gpu_layer.rival(Clock(CPU, 0.01), gpu_layer.SMALL[0], "SonicMoE")
    assert (ours["what"], theirs["what"]) == ("layer", "SonicMoE")
    assert theirs["fwd+bwd ms"] > 0
    assert ours["ahead"] is (ours["fwd+bwd ms"] < theirs["fwd+bwd ms"])
    del package.MoE  # its interface has changed
    ours, theirs = gpu_layer.rival(Clock(CPU, 0.01), gpu_layer.SMALL[0], "SonicMoE")
    assert theirs["error"].startswith("ImportError")
    assert ours["fwd+bwd ms"] > 0


def test_a_peer_that_is_not_installed_says_so():
    assert gpu_layer.rival(Clock(CPU, 0.01), gpu_layer.SMALL[0], "Tutel") == [
        {"what": "Tutel", "error": "not installed"}
    ]


# A part of four cases: one dies, one hangs, one raises.
WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from gpu_report import read, work
def raises(): raise ValueError("bad")
todo = {"dies": lambda: os._exit(7), "hangs": lambda: time.sleep(60), "raises": raises, "works": lambda: [{"a": 1}]}
file = Path(sys.argv[1])
before = len(read(file).get("ops", {}))
sys.exit(not work(file, "ops", todo, lambda: before == 3))  # the device dies of an error
"""


def test_cases_that_crash_or_hang_are_named_and_the_rest_goes_on(tmp_path, capfd):
    file = tmp_path / "results.json"
    command = [sys.executable, "-c", WORKER, str(file), str(ROOT / "benchmarks")]
    supervise(command, file, "ops", time.monotonic() + 120, case_limit=5)
    ops = read(file)["ops"]
    assert list(ops) == ["dies", "hangs", "raises", "works"]
    assert ops["dies"] == ops["hangs"] == BEGUN
    assert ops["raises"]["error"] == "ValueError: bad"
    assert ops["works"]["rows"] == [{"a": 1}]
    assert "## ops: hangs" in capfd.readouterr().out
    said = json.loads(file.read_text())  # whole after every case, should nobody live to see the end
    assert {row["case"] for row in said["verdicts"]} == {"checks that passed", "ops: dies", "ops: hangs", "ops: raises"}


def test_a_process_that_cannot_start_is_not_started_again_and_again(tmp_path):
    file = tmp_path / "results.json"
    supervise([sys.executable, "-c", "raise SystemExit(3)"], file, "ops", time.monotonic() + 60, case_limit=20)
    assert read(file) == {"ops": {"start": {"error": "its process ended with 3 before any case began"}}}


def test_no_part_takes_the_time_of_the_others(tmp_path, monkeypatch):
    """As on a GPU, where each part is a process: one that hangs leaves the next ones their shares."""
    out, now, limits = tmp_path / "new" / "gpu.json", [100.0], {}

    def hangs(command, file, part, deadline, case_limit):
        assert file == out
        limits[part], now[0] = deadline - now[0], deadline

    monkeypatch.setattr(gpu, "supervise", hangs)
    monkeypatch.setattr(gpu, "card", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cuda", "--limit", "250", "--out", str(out)])
    assert gpu.main() == 0
    assert limits == pytest.approx({"machine": 10, "first": 40, "checks": 40, "ops": 30, "layer": 70, "tune": 60})
    assert json.loads(out.read_text())["results"] == {"machine": {"afterwards": {"rows": []}}}


def test_the_deadline_ends_everything(tmp_path):
    file, start = tmp_path / "results.json", time.monotonic()
    supervise([sys.executable, "-c", "import time; time.sleep(60)"], file, "ops", start + 0.5, case_limit=20)
    assert time.monotonic() - start < 10
    supervise(["never"], file, "layer", start, case_limit=20)
    assert read(file)["layer"] == {"rest": {"error": "no time was left"}}
