"""Files of results, checked before anything reads, merges or publishes them.

`results.schema.json` says what they may hold: numbers where numbers belong, and no text that a page
would take for HTML. Here is what a schema cannot say: where a file belongs, and which of its parts
belong together. A broken file is named and left out; nothing stops for it.
"""

import itertools
import json
import math
import sys
from functools import cache
from pathlib import Path

from asv.results import get_filename
from asv.util import UserError
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import extend

from tracking.files import shown, write_text

SCHEMA = Path(__file__).with_name("results.schema.json")
LARGEST = 1e100  # of a result
KINDS = {
    "machine.json": "machine",
    "benchmarks.json": "benchmarks",
    ".asv-machine.json": "machines",  # in the user's home
}
PER_CELL = ("result", "samples", "stats_")  # columns with a value for each cell


class BrokenFileError(UserError):
    """A file of results that is not what asv writes."""


def _is_statistics(_, column):
    return isinstance(column, list) and {*map(type, column)} <= {int, float, type(None)}


def _is_values(_, column):  # NaN is a value, infinity is none
    finite = _is_statistics(_, column)
    return finite and not any(abs(value) > LARGEST for value in column if value is not None)


def _is_samples(_, column):
    return isinstance(column, list) and all(
        one is None or (_is_values(_, one) and None not in one) for one in column
    )


# A column has a value for each cell; as a type, one call checks it whole.
TYPES = {"values": _is_values, "statistics": _is_statistics, "samples": _is_samples}


@cache
def _validator(kind):
    """Return the validator of a kind of file, or of part of one: a key of the schema's `$defs`."""
    types = Draft202012Validator.TYPE_CHECKER.redefine_many(TYPES)
    schema = json.loads(SCHEMA.read_text()) | {"$ref": f"#/$defs/{kind}"}
    return extend(Draft202012Validator, type_checker=types)(schema)


def _violation(kind, data):
    """Return how data violates the schema, None if it does not."""
    error = best_match(itertools.islice(_validator(kind).iter_errors(data), 1))
    if not error:
        return None
    where = "/".join(ascii(key)[1:-1] for key in map(str, error.absolute_path))
    said = ascii(error.message)[1:-1]
    said = said if len(said) < 120 else f"{said[:60]} ... {said[-60:]}"
    return f"{said}, at {where}" if where else said


def check_machine_name(name):
    """Raise UserError unless a machine, and its folder of results, may have this name."""
    if _violation("machine name", name):
        raise UserError(
            f"expected a machine's name of letters, digits, spaces and any of _.()+-, got {name!a}"
        )


def load(file):
    """Return what a file holds; raise BrokenFileError unless asv would write that there."""
    try:
        data = json.loads(Path(file).read_bytes())
        check(file, data)
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenFileError(f"{shown(file)} is broken: {error}") from None
    return data


def check(file, data, state="is"):
    """Raise BrokenFileError if a file must not hold some data."""
    file = Path(file)
    kind = KINDS.get(file.name, "results")
    reason = _violation(kind, data)
    if not reason and kind in ("machine", "results"):
        machine = data["machine"] if kind == "machine" else data["params"]["machine"]
        if machine != file.parent.name:
            reason = f"expected results of machine {file.parent.name!a}, got {machine!a}"
    if not reason and kind == "results":
        reason = _disagreement(data)
        name = Path(get_filename("", data["commit_hash"], data["env_name"])).name
        if not reason and file.name != name:
            reason = f"expected the name {name!a} for its commit and environment"
    if reason:
        raise BrokenFileError(f"{shown(file)} {state} broken: {reason}")


def _disagreement(data):
    """Return which parts of results contradict each other, None if none do."""
    for name, row in data["results"].items():
        columns = dict(zip(data["result_columns"], row, strict=False))
        cells = math.prod(map(len, columns["params"]))
        per_cell = {c: v for c, v in columns.items() if c.startswith(PER_CELL) and v is not None}
        if any(len(values) != cells for values in per_cell.values()):
            return f"expected {cells} values of {name} in each column"
        statistics = [per_cell.get(c, ()) for c in data["result_columns"] if c[:6] == "stats_"]
        if len({tuple(x is None for x in values) for values in statistics}) > 1:
            return f"expected all statistics of a cell of {name} or none"
    return None


def write_json(file, data, **layout):
    """Write a file as `write_text` does, if it may hold this; `layout` is json's."""
    text = json.dumps(data, **layout)
    check(file, json.loads(text), state="would be")
    write_text(file, text)


def set_aside(results):
    """Rename every broken file under a folder of results to NAME.broken, and say so.

    asv reads all there are, at any depth, and one that is broken ends it with a traceback.
    """
    for file in sorted(Path(results).rglob("*.json")):
        try:
            load(file)
        except BrokenFileError as error:
            aside = file.with_name(f"{file.name}.broken")
            for number in itertools.count(2):
                if not aside.exists():
                    break
                aside = file.with_name(f"{file.name}.broken-{number}")
            file.rename(aside)
            print(f"{error}; set aside as {shown(aside.name)}", file=sys.stderr)
