"""Take results measured without asv's environments into `results/`, under an environment's name.

On a machine without network asv runs in the Python that is there (`asv run --environment
existing:python3 --set-commit-hash HASH`) and labels results with that Python's path. This names
them as asv names its own, so that they are series like any other.
"""

import argparse
import sys
from pathlib import Path

from asv.util import UserError

from tracking import valid
from tracking.results import RESULTS


def adopt(source, *, backend, python, mlx, results=RESULTS):
    """Copy a file of results, as asv named it, and its machine's record; return the new path.

    Parameters
    ----------
    source : Path
        A results file of an existing environment, in its machine's folder with machine.json.
    backend, python, mlx : str
        What it ran on: MLX's backend, Python's and MLX's version.
    results : Path
        Results folder.

    Raises
    ------
    UserError
        If one of them is broken, or the file not from an existing environment; nothing has been
        written then.
    """
    result, machine = valid.load(source), valid.load(source.with_name("machine.json"))
    if not result["env_name"].startswith("existing-"):
        raise UserError(f"expected an existing environment, got {result['env_name']}")
    environment = f"{backend}-py{python}-mlx{mlx}"
    result |= {"env_name": environment, "python": python, "requirements": {"mlx": mlx}}
    result["params"] |= {"python": python, "mlx": mlx}
    folder = results / machine["machine"]
    target = folder / f"{result['commit_hash'][:8]}-{environment}.json"
    valid.write_json(target, result)
    valid.write_json(folder / "machine.json", machine)
    return target


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.adopt", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--backend", required=True, help="cpu, metal, cuda12 or cuda13")
    parser.add_argument("--python", required=True, help="such as 3.12")
    parser.add_argument("--mlx", required=True, help="such as 0.32.4")
    args = parser.parse_args()
    try:
        print(adopt(args.source, backend=args.backend, python=args.python, mlx=args.mlx))
    except (UserError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
