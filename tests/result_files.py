"""Files of results as asv writes them."""

import json

COLUMNS = ["result", "params", "version", "started_at", "duration"]


def write_result(folder, commit, rows, environment="env", **more):
    """Add rows, {benchmark: values by column}, to the results of a commit; return the file."""
    file = folder / f"{commit[:8]}-{environment}.json"
    before = json.loads(file.read_text())["results"] if file.exists() else {}
    content = {"commit_hash": commit, "env_name": environment, "date": 0, "python": "3"}
    content |= {"params": {"machine": folder.name, "mlx": "1"}, "requirements": {}, "version": 2}
    content |= {"result_columns": COLUMNS, "results": before | rows}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content | more))
    return file
