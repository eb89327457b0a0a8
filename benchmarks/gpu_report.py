"""Runner for cases that may crash or hang: runs them in a process, stores results in a file, prints tables.

It does not import torch.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BEGUN = {"error": "did not come back: it ran too long, or its process died"}
Row = dict[str, Any]
Results = dict[str, dict[str, Any]]  # part: {case: {"rows": [...], "seconds": ...} or {"error": ...}}


def work(file: Path, part: str, todo: dict[str, Callable[[], list[Row]]], alive: Callable[[], bool]) -> bool:
    """Run the cases that `file` does not have, and write each before it starts and when it is done.

    False if the device was not `alive` after a case, so that another process has to continue.
    """
    results = read(file)
    done = results.setdefault(part, {})
    for name, case in todo.items():
        if name in done:
            continue
        done[name] = BEGUN
        write(file, results)
        start = time.perf_counter()
        try:
            rows = case()
            done[name] = {"rows": rows, "seconds": time.perf_counter() - start}
            print(f"\n## {part}: {name}\n\n{shown(rows)}", flush=True)
        except Exception as error:
            done[name] = {"error": failure(error), "seconds": time.perf_counter() - start}
            print(f"\n## {part}: {name}\n\n**{failure(error)}**", flush=True)
        write(file, results)
        if not alive():
            return False
    return True


def supervise(command: list[str], file: Path, part: str, deadline: float, case_limit: float) -> None:
    """Run `command` again and again until it has done all cases of a part, if each run starts at least one case.

    It is killed at the deadline, or when it has written nothing for `case_limit` seconds.
    """
    while time.monotonic() < deadline:
        begun = set(read(file).get(part, {}))
        with subprocess.Popen(command) as child:
            written, since = None, time.monotonic()
            while child.poll() is None:
                time.sleep(0.1)
                last = file.stat().st_mtime_ns if file.exists() else None
                if last != written:
                    written, since = last, time.monotonic()
                if time.monotonic() > min(deadline, since + case_limit):
                    child.kill()
            code = child.wait()
        if code == 0:
            return None
        results = read(file)
        for name in set(results.get(part, {})) - begun:
            if results[part][name] == BEGUN:
                print(f"\n## {part}: {name}\n\n**{BEGUN['error']}**", flush=True)
        if not set(results.get(part, {})) - begun:
            results.setdefault(part, {})["start"] = {"error": f"its process ended with {code} before any case began"}
            return write(file, results)
    results = read(file)
    results.setdefault(part, {})["rest"] = {"error": "no time was left"}
    return write(file, results)


def read(file: Path) -> Results:
    return json.loads(file.read_text())["results"] if file.exists() else {}


def write(file: Path, results: Results) -> None:
    """Write results and verdicts. An atomic replace, since the process may be killed while it writes."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"results": results, "verdicts": list(judge(results))}, indent=1))
    new.replace(file)


def failure(error: BaseException) -> str:
    """One line of text for an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def shown(rows: list[Row]) -> str:
    """Table of results. Of the hundreds of checks it shows failures only."""
    if not all("ok" in row for row in rows):
        return table(rows)
    wrong = [row for row in rows if not row["ok"]]
    share = max((row["error"] / row["tolerance"] for row in rows if row.get("tolerance")), default=0.0)
    passed = f"{len(rows) - len(wrong)} of {len(rows)} passed; the largest error is {share:.2g} of its tolerance."
    return f"{passed}\n\n{table(wrong)}" if wrong else passed


def judge(results: Results) -> list[Row]:
    """Verdicts: the number of checks that passed, and a row for each failed check, error and target."""
    verdicts, passed = [], 0
    for part, named in results.items():
        for name, case in named.items():
            if "error" in case:
                verdicts.append({"case": f"{part}: {name}", "what": case["error"], "reached": False})
            for row in case.get("rows", []):
                label = row.get("check") or row.get("operation") or row.get("what")
                failed = row.get("error")  # a text, or the numerical error of a check
                if isinstance(failed, str) and failed != "not installed":
                    verdicts.append({"case": f"{part}: {name}", "what": f"{label}: {failed}", "reached": False})
                for target, value in row.items():
                    if not isinstance(value, bool) or target == "pad":
                        continue
                    if target == "ok" and value:
                        passed += 1
                    else:
                        verdicts.append({"case": f"{part}: {name}", "what": label, "target": target, "reached": value})
    return [{"case": "checks that passed", "what": passed}, *verdicts]


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table, with columns in the order of their first appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/")
