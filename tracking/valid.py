"""Files of results, checked before anything reads, merges or publishes them.

`results.schema.json` says what they may hold: numbers where numbers belong, and no text that a
page would take for HTML. What is broken is named and left out; nothing stops for it.
"""

import json
import math
import re
import sys
from functools import cache
from pathlib import Path

from asv.results import get_filename
from asv.util import UserError
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError, best_match
from jsonschema.validators import extend

from tracking.files import shown, write_text

SCHEMA = Path(__file__).with_name("results.schema.json")
TEXT = re.compile('[^<>&"`\x00-\x1f\x7f-\x9f]{0,200}')
BASE64 = re.compile("[A-Za-z0-9+/=]*")
LARGEST = 1e100
LONGEST_INTEGER = 20  # digits
KINDS = {
    "machine.json": "machine",
    "benchmarks.json": "benchmarks",
    ".asv-machine.json": "machines",  # in the user's home
}
PER_CELL = ("result", "samples", "stats_")  # columns with a value for each cell


class BrokenFileError(UserError):
    """A file of results that is not what asv writes."""


def _is_text(_, value):
    return isinstance(value, str) and TEXT.fullmatch(value) is not None


def _is_numbers(_, value):
    return isinstance(value, list) and {*map(type, value)} <= {int, float, type(None)}


def _is_values(checker, value):
    """Return whether each number is NaN or one that can be reckoned with."""
    return _is_numbers(checker, value) and all(
        one is None or one != one or -LARGEST <= one <= LARGEST for one in value
    )


def _is_samples(checker, value):
    return isinstance(value, list) and all(
        one is None or _is_numbers(checker, one) for one in value
    )


def _is_params(checker, value):
    return isinstance(value, list) and all(
        isinstance(values, list) and all(_is_text(checker, one) for one in values)
        for values in value
    )


def _is_base64(_, value):
    return isinstance(value, str) and BASE64.fullmatch(value) is not None


TYPES = {
    "text": _is_text,
    "numbers": _is_numbers,
    "values": _is_values,
    "samples": _is_samples,
    "params": _is_params,
    "base64": _is_base64,
}


def _columns(validator, columns, row, _):
    """Yield what of a row is none of its columns' types, and whether its length is wrong.

    JSON schema's own prefixItems says the same in ten times as long.
    """
    if not (isinstance(row, list) and 2 <= len(row) <= len(columns)):
        yield ValidationError(f"expected 2 to {len(columns)} columns, got {row!r}")
        return
    for number, (types, value) in enumerate(zip(columns, row, strict=False)):
        if not any(validator.is_type(value, one) for one in types):
            said = f"{value!r} is not of type {' or '.join(types)}"
            yield ValidationError(said, path=[number])


@cache
def _validator(kind):
    """Return what tells whether data is of a kind, a key of the schema's `$defs`."""
    checker = Draft202012Validator.TYPE_CHECKER.redefine_many(TYPES)
    schema = json.loads(SCHEMA.read_text())
    return extend(Draft202012Validator, {"columns": _columns}, type_checker=checker)(
        {"$defs": schema["$defs"], "$ref": f"#/$defs/{kind}"}
    )


def _integer(digits):
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def load(file, anywhere=False):
    """Return what a file of results, a record of machines or asv's list of benchmarks holds.

    Raises
    ------
    BrokenFileError
        In one sentence, if it is not what asv writes, or not what asv would write there; the
        latter does not matter of a file that may lie anywhere.
    """
    try:
        data = json.loads(Path(file).read_bytes().decode(), parse_int=_integer)
    except (ValueError, RecursionError, OSError) as error:
        raise BrokenFileError(f"{shown(file)} is broken: {error}") from None
    check(file, data, anywhere)
    return data


def broken(file):
    """Return the error that `load` raises, None if a file is valid; one that stays is read once."""
    file = Path(file).absolute()
    try:
        there = file.stat()
    except OSError as error:
        return BrokenFileError(f"{shown(file)} is broken: {error}")
    return _broken(file, there.st_mtime_ns, there.st_size)


@cache
def _broken(file, *_):
    """Look into a file; what follows its path tells whether it has changed."""
    try:
        load(file)
    except BrokenFileError as error:
        return error
    return None


def check(file, data, anywhere=False, state="is"):
    """Raise what `load` does if a file must not hold this, which it does or would do."""
    file = Path(file)
    kind = KINDS.get(file.name, "results")
    reason = _violation(kind, data)
    if not (reason or anywhere) and kind in ("machine", "results"):
        machine = data["machine"] if kind == "machine" else data["params"]["machine"]
        if machine != file.parent.name:
            reason = f"expected results of machine {file.parent.name!a}, got {machine!a}"
    if not reason and kind == "results":
        reason = _mismatch(data) or (not anywhere and _misplaced(file, data))
    if reason:
        raise BrokenFileError(f"{shown(file)} {state} broken: {reason}")


def _violation(kind, data):
    """Return what of the schema data violates, None if nothing."""
    error = best_match(_validator(kind).iter_errors(data))
    if not error:
        return None
    where = "/".join(ascii(key)[1:-1] for key in map(str, error.absolute_path))
    said = ascii(error.message)[1:-1]
    said = said if len(said) < 120 else f"{said[:60]} ... {said[-60:]}"
    return f"{said}, at {where}" if where else said


def check_machine_name(name):
    """Raise UserError unless a machine, and its folder of results, may be called so."""
    if _violation("machine name", name):
        raise UserError(
            f"expected a machine's name of letters, digits, spaces and any of _.()+-, got {name!a}"
        )


def _misplaced(file, data):
    """Return where results belong if not in a file, else None: asv has one file for them."""
    name = Path(get_filename("", data["commit_hash"], data["env_name"])).name
    return None if file.name == name else f"its commit and environment belong into {name!a}"


def _mismatch(data):
    """Return which parts of results do not belong together, None if all do."""
    for benchmark, row in data["results"].items():
        columns = dict(zip(data["result_columns"], row, strict=False))
        cells = math.prod(map(len, columns["params"]))
        per_cell = {k: v for k, v in columns.items() if k.startswith(PER_CELL) and v is not None}
        if any(len(values) != cells for values in per_cell.values()):
            return f"expected {cells} values of {benchmark} in each column"
        stats = [values for key, values in per_cell.items() if key.startswith("stats_")]
        known = {tuple(value is None for value in values) for values in stats}
        if len(known) > 1 or (stats and len(stats) != 6):
            return f"expected all statistics of a cell of {benchmark} or none"
    return None


def write_json(file, data):
    """Write a file of results as `write_text` does, if it may hold this.

    Raises
    ------
    BrokenFileError
        As `load`.
    OSError
        As `write_text`.
    """
    check(file, data, state="would be")
    write_text(file, json.dumps(data))


def files(results):
    """Return what asv reads in a folder of results, at any depth."""
    return sorted(Path(results).rglob("*.json"))


def set_aside(results):
    """Rename every broken file under a folder of results to NAME.broken, and say so.

    asv reads all there are, and one that is broken ends it with a traceback.

    Raises
    ------
    UserError
        If one cannot be renamed.
    """
    for file in files(results):
        if not (error := broken(file)):
            continue
        aside = file.with_name(f"{file.name}.broken")
        number = 1
        while aside.exists():
            number += 1
            aside = file.with_name(f"{file.name}.broken-{number}")
        try:
            file.rename(aside)
        except OSError as refused:
            raise UserError(f"{error}; it cannot be set aside: {refused}") from None
        print(f"{error}; set aside as {shown(aside.name)}", file=sys.stderr)
