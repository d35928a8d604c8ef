"""Files of results, checked before anything reads, merges or publishes them.

`results.schema.json` says what they may hold: numbers where numbers belong, and no text that a
page would take for HTML. No file takes long to read: its bytes and values are limited, and so are
the cells that its parameters stand for. What is broken is named and left out; nothing stops for it.
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
INTEGERS = 2**63  # from minus this on, up to below it
LONGEST_INTEGER = 20  # digits, read at all
LATEST = 253_402_300_799_999  # milliseconds: the end of the year 9999

# The largest file that is recorded has 32,000 bytes, 6,000 values and 566 cells.
MOST_BYTES = 2 * 2**20
MOST_VALUES = 200_000
MOST_CELLS = 10_000  # of all benchmarks in a file
MOST_PARAMETERS = 10
MOST_SAMPLES = 1000  # of a cell; asv compares those of two commits pair by pair
LONGEST_TEXT = 2**18  # the code of a benchmark, or its profile
DEEPEST = 8
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


def _is_value(_, value):
    """Return whether a number is NaN or one that can be reckoned with."""
    return type(value) in (int, float) and (value != value or -LARGEST <= value <= LARGEST)


def _is_values(_, value):
    return isinstance(value, list) and all(one is None or _is_value(_, one) for one in value)


def _is_milliseconds(_, value):
    return type(value) is int and 0 <= value <= LATEST


def _is_samples(checker, value):
    return isinstance(value, list) and all(
        one is None
        or (
            isinstance(one, list)
            and len(one) <= MOST_SAMPLES
            and all(_is_value(checker, sample) for sample in one)
        )
        for one in value
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
    "milliseconds": _is_milliseconds,
    "numbers": _is_numbers,
    "value": _is_value,
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
        with Path(file).open("rb") as there:
            content = there.read(MOST_BYTES + 1)
    except OSError as error:
        raise BrokenFileError(f"{shown(file)} is broken: {error}") from None
    return parse(file, content, anywhere)


def parse(file, content, anywhere=False):
    """Return what `load` does of a file that holds some bytes."""
    _check_size(file, content)
    try:
        data = json.loads(content.decode(), parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(f"{shown(file)} is broken: {error}") from None
    check(file, data, anywhere)
    return data


def _check_size(file, content, state="is"):
    if len(content) > MOST_BYTES:
        raise BrokenFileError(
            f"{shown(file)} {state} broken: expected up to {MOST_BYTES} bytes, got more"
        )


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
    reason = _excess(data) or _violation(kind, data) or _many_cells(kind, data)
    if not (reason or anywhere) and kind in ("machine", "results"):
        machine = data["machine"] if kind == "machine" else data["params"]["machine"]
        if machine != file.parent.name:
            reason = f"expected results of machine {file.parent.name!a}, got {machine!a}"
    if not reason and kind == "results":
        reason = _mismatch(data) or (not anywhere and _misplaced(file, data))
    if reason:
        raise BrokenFileError(f"{shown(file)} {state} broken: {reason}")


def _excess(data):
    """Return what of data is more than any file needs, None if nothing is; one level at a time."""
    level, values = [data], 0
    for _ in range(DEEPEST):
        inner = []
        for one in level:
            if isinstance(one, str) and len(one) > LONGEST_TEXT:
                return f"expected texts of up to {LONGEST_TEXT} characters, got {len(one)}"
            if isinstance(one, int) and not -INTEGERS <= one < INTEGERS:
                return f"expected integers of 64 bits, got {one}"
            if isinstance(one, dict):
                inner += [*one, *one.values()]
            elif isinstance(one, list):
                inner += one
        level, values = inner, values + len(inner)
        if values > MOST_VALUES:
            return f"expected up to {MOST_VALUES} values, got more"
        if not level:
            return None
    return f"expected up to {DEEPEST} levels, got more"


def _many_cells(kind, data):
    """Return which parameters stand for more cells than any file needs, None if none do."""
    if kind not in ("results", "benchmarks"):
        return None
    cells = 0
    found = data["results"] if kind == "results" else data
    for benchmark, about in found.items():
        if benchmark == "version":  # of asv's list
            continue
        params = about[1] if kind == "results" else about["params"]
        if len(params) > MOST_PARAMETERS:
            return f"expected up to {MOST_PARAMETERS} parameters of {benchmark}, got {len(params)}"
        cells += math.prod(map(len, params))
        if cells > MOST_CELLS:
            return f"expected up to {MOST_CELLS} cells, got {cells} up to {benchmark}"
    return None


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


def write_json(file, data, **layout):
    """Write a file of results as `write_text` does, if it may hold this; `layout` is json's.

    Raises
    ------
    BrokenFileError
        As `load`.
    OSError
        As `write_text`.
    """
    check(file, data, state="would be")
    text = json.dumps(data, **layout)
    _check_size(file, text.encode(), state="would be")
    write_text(file, text)


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
