"""What benchmarks/gpu.sh has measured: a line of JSON each, and the table of them.

Commands:  gpu_results.py add RESULTS NAME EXIT_CODE JSON LOG   appends a line; EXIT_CODE 124: over its time limit
           gpu_results.py right RESULTS                         exit code 1 if attention by cuDNN is wrong
           gpu_results.py table RESULTS
"""

import json
import pathlib
import sys

TIMED_OUT = 124
# A kernel rounds at other places than the reference in the same dtype does, which sets the scale of what is right.
TOLERANCE = 3.0


def add(results: str, name: str, code: str, figures: str, log: str) -> None:
    row: dict = {"name": name}
    if int(code) == 0:
        row |= summary(json.loads(pathlib.Path(figures).read_text()))
    else:
        lines = [line for line in pathlib.Path(log).read_text(errors="replace").splitlines() if line.strip()]
        row["failed"] = "over its time limit" if int(code) == TIMED_OUT else (lines or ["no output"])[-1][:300]
    with open(results, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name}: {shown(row)}")


def summary(found: dict) -> dict:
    if "kernels" in found:
        return {"attention": [kernel(row) for row in found["kernels"]], "machine": found["machine"]}
    row = found["variants"][0]
    return {
        "tokens_per_second": row["tokens/s"],
        "step_seconds": row["step"]["median"],
        "mfu": row["MFU of the published peak"],
        "mfu_of_measured": row["MFU"],
        "memory": row["memory"],
        "compile_seconds": row["compile"],
        "loss": row["loss"],
        "device": row["device"],
        "ceilings": found["ceilings"],
        "machine": found["machine"],
    }


def kernel(row: dict) -> dict:
    return {
        "implementation": row["implementation"],
        "dtype": row["dtype"],
        "sizes": row["sizes"],
        "errors": [row["error of the output"], row["error of the worst gradient"]],
        "seconds": {which: times["median"] for which, times in row["seconds"].items()},
    }


def wrong(row: dict) -> str | None:
    """Why the kernel of this line is wrong; None: it is right, or was not there."""
    reference = {one["dtype"]: one["errors"] for one in row["attention"] if one["implementation"] == "reference"}
    for one in row["attention"]:
        for what, error, allowed in zip(("output", "gradient"), one["errors"], reference[one["dtype"]], strict=True):
            if not error <= TOLERANCE * allowed + 1e-5:  # nor NaN
                return f"{one['implementation']} in {one['dtype']}: {what} off by {error:.1e}, reference {allowed:.1e}"
    return None


def shown(row: dict) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    if "attention" in row:
        times = [
            f"{one['implementation']} {one['dtype']} {1e3 * one['seconds']['forward and backward']:.2f} ms"
            for one in row["attention"]
        ]
        return f"{wrong(row) or 'right'}; {', '.join(times)}"
    peak = f"{row['mfu']['causal']:.1%}" if row["mfu"] else "-"
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s, MFU {peak} of the published peak and "
        f"{row['mfu_of_measured']['causal']:.1%} of the measured, {row['memory'] / 1e9:.1f} GB, "
        f"compiled in {row['compile_seconds']:.0f} s, loss {row['loss']:.3f}"
    )


def read(results: str) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(results).read_text().splitlines()]


def right(results: str) -> int:
    rows = [row for row in read(results) if row["name"].startswith("attention-")]
    bad = [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]
    bad += [f"{row['name']}: {reason}" for row in rows if "attention" in row and (reason := wrong(row))]
    print("\n".join(f"gpu.sh: attention is wrong: {line}" for line in bad) or "attention is right", flush=True)
    return 1 if bad else 0


def table(results: str) -> None:
    rows = read(results)
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:{width}}  {shown(row)}")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    sys.exit({"add": add, "right": right, "table": table}[command](*arguments))
