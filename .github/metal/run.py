"""Run tests on Metal, a process and a time limit for each file, and say what only Metal can say.

python run.py shard 1 4 metal     the first quarter of the files; logs and a record in metal/
python run.py table metal         one table of all records below metal/: metal.md, kernels.txt

`shard` exits with 1 if a test failed and with 3 if the canary did: the machine, not a kernel.
Durations are not kept: on a virtual GPU they mean nothing.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).parent
CANARY = sys.executable, HERE / "canary.py"
FAILED, MACHINE = 1, 3
SECONDS = 900  # of a file
TYPES = "Float16", "BFloat16", "Float32"
STATES = "passed", "failed", "did not compile"


def files_of_tests():
    """Return the files of tests that use MLX, but not those of benchmarks and their results."""
    others = re.compile(r"^\s*(from|import) (benchmarks|tracking|tools|website)\b", re.M)
    files = {file: file.read_text() for file in sorted(HERE.parents[1].glob("tests/test_*.py"))}
    return [f for f, text in files.items() if "import mlx.core" in text and not others.search(text)]


def happened(command, log, seconds, **settings):
    """Run a command for so many seconds at most; return "ok" or what went wrong."""
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with log.open("wb") as file:  # a session of its own, so that its children end with it
        process = subprocess.Popen(
            command, stdout=file, **pipes, start_new_session=True, env={**os.environ, **settings}
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds} s"
        finally:
            with contextlib.suppress(OSError):  # none is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status < 0:
        return f"ended by signal {-status} ({signal.strsignal(-status)})"
    return f"failed (exit status {status})" if status else "ok"


def pytest(file):
    """Return the command that runs a file of tests."""
    return sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", file


def run(files, out, seconds=SECONDS, command=pytest, canary=CANARY):
    """Run files of tests one after the other, print a line for each, return the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    record, log, status = out / "record.jsonl", out / "canary.log", 0
    settings = {"METAL_RECORD": str(record), "PYTEST_ADDOPTS": "-p record"}
    settings["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])

    def note(file, what):
        print(f"{what:24} {file.name}", flush=True)
        with record.open("a") as lines:
            lines.write(json.dumps({"file": file.name, "what": what}) + "\n")

    def is_dead(when, left):
        what = happened(canary, log, min(seconds, 120))
        said = log.read_text(errors="replace").strip()
        if what == "ok":
            return False
        print(f"::error::the machine, not a kernel: {when} the canary {what}\n{said}")
        for file in left:
            note(file, "not run")
        return True

    if is_dead("before all tests", files):
        return MACHINE
    print(log.read_text())
    for place, file in enumerate(files, 1):
        what = happened(command(file), of_file := out / f"{file.stem}.log", seconds, **settings)
        note(file, what)
        if what != "ok":
            status = FAILED
            print(*of_file.read_text(errors="replace").splitlines()[-30:], sep="\n")
            if is_dead(f"after {file.name}", files[place:]):
                return MACHINE
    return status


def table(folder):
    """Write metal.md and kernels.txt of what all shards below a folder have recorded."""
    records = sorted(folder.rglob("record.jsonl"))
    lines = [json.loads(line) for file in records for line in file.read_text().splitlines()]
    seen, rows = defaultdict(set), defaultdict(Counter)
    for line in lines:
        for kernel in line.get("kernels", ()):
            seen[kernel].add(line["outcome"])
        for dim in line.get("head_dims", ()):  # rows also of what no test has launched
            rows.update({("split", dim, "0/0", dtype): Counter() for dtype in TYPES})
    listed = []
    for kernel, outcomes in sorted(seen.items()):
        # A test that launches several fails to compile because of one: others pass elsewhere.
        found = outcomes & {"failed"} or outcomes & {"passed"} or outcomes & {"did not compile"}
        state = next(iter(found), "skipped")
        listed.append(f"{state}: {kernel}\n")
        of = dict(constant.split("=") for constant in kernel.split()[1:])
        bits = "/".join(of.get(name, "0") for name in ("KEY_BITS", "VALUE_BITS"))
        where = kernel.split()[0], int(of.get("D", 0)), bits, of.get("T") or of["OUT"]
        rows[where][state] += 1
    (folder / "kernels.txt").write_text("".join(listed))
    head = "kernel", "head dim", "bits of K/V (0: none)", "dtype", *STATES
    text = ["Variants of each kernel on Metal, by how the tests that launch them end.\n"]
    text += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for where, counts in sorted(rows.items()):
        cells = *where, *(counts[state] for state in STATES)
        text.append("| " + " | ".join(map(str, cells)) + " |")
    text += ["\n| test file | what happened |", "| --- | --- |"]
    text += [f"| {line['file']} | {line['what']} |" for line in lines if "file" in line]
    (folder / "metal.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["shard", number, count, out] if 1 <= int(number) <= int(count):
            sys.exit(run(files_of_tests()[int(number) - 1 :: int(count)], Path(out)))
        case ["table", folder]:
            table(Path(folder))
        case _:
            sys.exit(f"{__doc__}\nexpected one of these, got {sys.argv[1:]}")
