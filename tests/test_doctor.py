"""What `make doctor` makes of a machine, told what its commands would print."""

import platform
import time

import pytest
from asv.machine import Machine
from asv.util import UserError, write_json

from tracking import doctor
from tracking.doctor import BAD, GOOD, NOTE

MAC_GOOD = {
    ("pmset", "-g", "batt"): "Now drawing from 'AC Power'\n",
    ("pmset", "-g"): " lowpowermode         0\n",
    ("pmset", "-g", "therm"): "Note: No thermal warning level has been recorded\n",
    ("notifyutil", "-g", doctor.THERMAL): f"{doctor.THERMAL} 0\n",
    ("mdutil", "-s"): "/:\n\tIndexing disabled.\n",
    ("tmutil", "status"): "Backup session status:\n{\n    Running = 0;\n}\n",
    ("vm_stat",): "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
    "Pages free:                             1000000.\nPages active:    500.\n"
    "Pages inactive:                          500000.\n",
}


@pytest.fixture
def mac(monkeypatch):
    """A Mac whose commands print what the test says."""
    said = dict(MAC_GOOD)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(
        doctor,
        "output",
        lambda *command: next((said[c] for c in (command, command[:2]) if c in said), None),
    )
    return said


@pytest.mark.parametrize(
    ("check", "command", "text", "state", "seen"),
    [
        ("power", ("pmset", "-g", "batt"), "Now drawing from 'Battery Power'", BAD, "battery"),
        ("power", ("pmset", "-g"), " lowpowermode         1", BAD, "low power mode is on"),
        ("heat", ("pmset", "-g", "therm"), "CPU_Speed_Limit \t= 70", BAD, "throttled"),
        ("heat", ("pmset", "-g", "therm"), "Thermal Warning Level = 2", BAD, "throttled"),
        ("heat", ("notifyutil", "-g", doctor.THERMAL), f"{doctor.THERMAL} 2\n", BAD, "throttled"),
        ("heat", ("notifyutil", "-g", doctor.THERMAL), "Failed\n", NOTE, "does not say"),
        ("memory", ("vm_stat",), "", NOTE, "does not say"),
        ("indexing", ("mdutil", "-s"), "Indexing enabled.", NOTE, "Spotlight"),
        ("indexing", ("tmutil", "status"), "    Running = 1;", BAD, "Time Machine"),
    ],
)
def test_a_mac_with_something_wrong(check, command, text, state, seen, mac):
    assert doctor.CHECKS[check]("box").state == GOOD
    mac[command] = text
    found = doctor.CHECKS[check]("box")
    assert found.state == state
    assert seen in found.seen
    assert found.remedy


def test_the_gpu_of_a_virtual_machine(mac, monkeypatch):
    """It is Metal, and not the Mac's: MLX chooses kernels by what it reports."""
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(doctor.mx, "default_device", lambda: doctor.mx.Device(doctor.mx.gpu))
    monkeypatch.setattr(doctor.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(doctor.mx, "device_info", lambda: {"device_name": "Apple M1 Ultra"})
    assert doctor.check_device("box").state == GOOD
    monkeypatch.setattr(
        doctor.mx, "device_info", lambda: {"device_name": "Apple Paravirtual device"}
    )
    found = doctor.check_device("box")
    assert (found.state, found.seen) == (BAD, "MLX runs on Apple Paravirtual device")


def test_a_backup_is_worse_than_spotlight(mac):
    mac["mdutil", "-s"], mac["tmutil", "status"] = "Indexing enabled.", "    Running = 1;"
    assert doctor.check_indexing("box").state == BAD


def test_memory_of_a_mac(mac):
    assert doctor.free_memory() == 16384 * 1_500_000


def test_memory(monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda: 2**30)
    found = doctor.check_memory("box")
    assert found.state == NOTE
    assert "1 GiB free" in found.seen
    monkeypatch.setattr(doctor, "free_memory", lambda: 2**40)
    assert doctor.check_memory("box").state == GOOD


@pytest.fixture
def record(monkeypatch, tmp_path):
    """asv's record of this machine, and the one in its results."""
    file = tmp_path / ".asv-machine.json"
    here = {
        **Machine.get_defaults(),
        "machine": "box",
        "os": "Linux",
        "ram": "1 GB",
        "cpu": "abacus",
    }
    monkeypatch.setattr(doctor, "RESULTS", tmp_path)
    monkeypatch.setattr(doctor.MachineCollection, "get_machine_file_path", lambda: str(file))
    monkeypatch.setattr(Machine, "get_defaults", lambda: {**here, "ram": "17"})

    def write(**changes):
        write_json(str(file), {"box": {**here, **changes}}, Machine.api_version)

    write.results = lambda **changes: write_json(
        str(tmp_path / "box/machine.json"), {**here, **changes}, Machine.api_version
    )
    return write


def test_record(record):
    assert doctor.check_record("box").state == NOTE
    record()
    assert doctor.check_record("box").state == GOOD
    record.results()
    assert doctor.check_record("box").state == GOOD
    record.results(os="macOS 15")
    assert "os differ" in doctor.check_record("box").seen
    record(cpu="")
    assert "lacks cpu" in doctor.check_record("box").seen
    record(cpu="another")
    found = doctor.check_record("box")
    assert found.state == BAD
    assert "cpu is 'abacus', recorded 'another'" in found.seen


def test_load(monkeypatch):
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.9, 0, 0))
    assert doctor.check_load("box").state == GOOD
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (1.1, 0, 0))
    assert doctor.check_load("box").state == BAD


def test_git(monkeypatch):
    def shallow():
        raise UserError("this clone is shallow")

    monkeypatch.setattr(doctor, "check_history", shallow)
    assert doctor.check_git("box") == doctor.Finding(BAD, "this clone is shallow")


def test_clock(monkeypatch):
    monkeypatch.setattr(doctor, "output", lambda *command: None)
    assert doctor.check_clock("box").state == GOOD
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert doctor.check_clock("box").state == BAD


def test_a_second_run_is_refused(monkeypatch):
    def held():
        raise UserError("another run measures in this checkout")

    monkeypatch.setattr(doctor, "acquire", held)
    assert doctor.check_lock("box").state == BAD


def test_waits_for_load_and_heat(monkeypatch, capsys):
    states = iter([BAD, BAD, GOOD])
    monkeypatch.setitem(doctor.CHECKS, "load", lambda _: doctor.Finding(next(states), "load 2"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert doctor.wait("box", 100)
    assert capsys.readouterr().out.count("waiting: load 2") == 2
    monkeypatch.setitem(doctor.CHECKS, "load", lambda _: doctor.Finding(BAD, "load 2"))
    assert not doctor.wait("box", 0)


def test_what_is_wrong_is_said_with_its_remedy(monkeypatch, capsys):
    checks = {
        "one": lambda machine: doctor.Finding(GOOD, "fine"),
        "two": lambda machine: doctor.Finding(BAD, f"{machine} burns", "put it out"),
    }
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(doctor, "PASSING", ())
    monkeypatch.setattr("sys.argv", ["doctor", "--machine", "box"])
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert " BAD  two: box burns\n      -> put it out\nnot fit to measure: two" in out


def test_every_check_runs_here():
    for name, check in doctor.CHECKS.items():
        if name != "lock":  # it would hold it until the tests end
            assert check("no-such-machine").state in (GOOD, NOTE, BAD)
