"""What `make doctor` makes of a machine, told what its commands would print."""

import itertools
import platform

import pytest

from tracking import doctor

MAC = {
    ("pmset", "-g", "batt"): "Now drawing from 'AC Power'\n",
    ("pmset", "-g"): " lowpowermode         0\n",
    doctor.THERMAL: f"{doctor.THERMAL[2]} 0\n",
}


@pytest.fixture
def mac(monkeypatch):
    """A Mac whose commands print what the test says."""
    said = dict(MAC)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(doctor, "output", lambda *command: said[command])
    return said


@pytest.mark.parametrize(
    ("check", "command", "text", "seen", "remedy"),
    [
        ("power", ("pmset", "-g", "batt"), "from 'Battery Power'", "runs on battery", "plug it in"),
        ("power", ("pmset", "-g"), " lowpowermode   1", "low power mode is on", "sudo pmset"),
        ("heat", doctor.THERMAL, f"{doctor.THERMAL[2]} 2\n", "thermal pressure 2", "let it cool"),
    ],
)
def test_a_mac_with_something_wrong(check, command, text, seen, remedy, mac):
    assert getattr(doctor, check)()[1] == ""
    mac[command] = text
    said, what_to_do = getattr(doctor, check)()
    assert said == seen
    assert what_to_do.startswith(remedy)


def test_what_is_not_known_is_not_bad(mac):
    mac[doctor.THERMAL] = "Failed\n"
    assert doctor.heat() == ("thermal pressure is not known here", "")


def test_the_gpu_of_a_virtual_machine(mac, monkeypatch):
    """It is Metal, and not the Mac's: MLX chooses kernels by what it reports."""
    monkeypatch.setattr(doctor.mx, "default_device", lambda: doctor.mx.Device(doctor.mx.gpu))
    names = iter(["Apple M1 Ultra", "Apple Paravirtual device"])
    monkeypatch.setattr(doctor.mx, "device_info", lambda: {"device_name": next(names)})
    assert doctor.device() == ("Apple M1 Ultra", "")
    assert "outside of a virtual machine" in doctor.device()[1]


@pytest.mark.parametrize(
    ("loads", "status", "bad"), [([0, 0], 0, 0), ([1.1, 1.1, 0.9, 0.9], 0, 2), ([1.1] * 99, 1, 4)]
)
def test_it_waits_for_an_idle_machine(loads, status, bad, monkeypatch, capsys):
    loads, times = iter(loads), itertools.count(step=30)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (next(loads), 0, 0))
    monkeypatch.setattr(doctor.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(doctor.time, "monotonic", lambda: next(times))
    monkeypatch.setattr("sys.argv", ["doctor", "--wait", "100"])
    assert doctor.main() == status
    out = capsys.readouterr().out
    assert out.count(" BAD  load: 1.10 on 4 cores\n      -> stop what runs") == bad
