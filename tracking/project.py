"""The asv project: its settings, environments, machines and commands."""

import math
import platform
import signal
import subprocess
import sys
from pathlib import Path

from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.environment import get_environments
from asv.machine import Machine, MachineCollection
from asv.util import UserError, load_json, write_json

from tracking import valid
from tracking.repository import ROOT, check_history, check_suite


def asv(*args, config="asv.conf.json"):
    """Run an asv command in the project's root and return its exit status.

    If this process is interrupted or terminated, asv and its benchmark end first.

    Raises
    ------
    UserError
        If a signal ended it: nothing is known of what it had to do.
    """
    command = [sys.executable, "-m", "asv", args[0], "--config", config, *args[1:]]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # once more is harmless: `tracking.safeguards`
            raise
    if status < 0:
        raise UserError(f"asv {args[0]} was ended by signal {-status}")
    return status


def asv_settings():
    """Return what asv.conf.json says."""
    return load_json(str(ROOT / "asv.conf.json"), js_comments=True)


def derive_config(name, **overrides):
    """Write asv.NAME.conf.json: asv.conf.json with some settings replaced. Return its name.

    asv runs in the directory of its config, so that is where it has to be.
    """
    derived = ROOT / f"asv.{name}.conf.json"
    write_json(str(derived), {**asv_settings(), **overrides})
    return derived.name


def backend_settings(backend):
    """Return what a config for this MLX backend replaces: environments of its own, its MLX."""
    if backend == "cpu":
        return {}
    commands = asv_settings()["install_command"]
    installs = [command.replace("mlx[cpu]", f"mlx[{backend}]") for command in commands]
    return {"env_dir": f".asv/env-{backend}", "install_command": installs}


def config_for(backend):
    """Return the name of the config that measures this MLX backend."""
    settings = backend_settings(backend)
    return derive_config(backend, **settings) if settings else "asv.conf.json"


def environment_name(config):
    """Return asv's name of the environment (Python, MLX) that a config measures in."""
    [environment] = get_environments(Config.load(str(ROOT / config)), None)
    return environment.name


def known_machines():
    """Return what asv knows of machines on this host: {name: record}."""
    path = Path(MachineCollection.get_machine_file_path())
    known = valid.load(path) if path.exists() else {}
    return {name: record for name, record in known.items() if name != "version"}


def host_cpu():
    """Return what asv calls this host's CPU."""
    return Machine.get_defaults()["cpu"] or platform.processor() or platform.machine()


def own_machines():
    """Return the names under which this host measures.

    asv also knows machines whose results were adopted here: those have another CPU.
    """
    return {name for name, record in known_machines().items() if record["cpu"] == host_cpu()}


def machine_name(backend):
    """Return the name asv has for this host, marked with the backend unless it is the default."""
    known_machines()  # what is broken is no reason for another name
    try:
        name = MachineCollection.load(platform.node())["machine"]
    except UserError:  # asv knows no machine, or several and none by the host's name
        name = platform.node() or "unnamed"
    return name if backend == "cpu" else f"{name}-{backend}"


def machine_options(parser):
    """Let a command line say on which machine, over which backend of MLX, it measures."""
    parser.add_argument("--backend", choices=["cpu", "cuda12", "cuda13"], default="cpu")
    parser.add_argument("--machine", help="name in results/ (default: this host's name)")


def begin(args, *, records=True):
    """Check that the clone can be measured in, and record the machine; return both of the options.

    Parameters
    ----------
    args : argparse.Namespace
        With `machine_options`.
    records : bool
        Whether the project's results will have what is measured: benchmarks are committed then.

    Raises
    ------
    UserError
        With what to do, if it cannot be.
    """
    machine = args.machine or machine_name(args.backend)
    check_history()
    if records:
        check_suite()
    record_machine(machine)
    return {"machine": machine, "backend": args.backend}


def record_machine(name):
    """Write the machine's record for asv unless there is one: a changed record splits series.

    Its broken results are set aside.
    """
    valid.check_machine_name(name)
    valid.set_aside(ROOT / "results" / name)
    if name in known_machines():
        return
    macos = platform.mac_ver()[0]
    kernel = ".".join(platform.release().split(".")[:2])
    record = Machine.get_defaults()
    record["os"] = f"macOS {macos}" if macos else f"{platform.system()} {kernel}"
    record["cpu"] = host_cpu()
    record["ram"] = f"{math.ceil(int(record['ram']) / 2**30)} GB"
    path = ROOT / "results" / name / "machine.json"
    if path.exists():
        recorded = valid.load(path)
        if recorded["cpu"] != record["cpu"]:
            raise UserError(
                f"results/{name} was measured on {recorded['cpu']}, this is {record['cpu']}: "
                "give it a name of its own, MACHINE=name"
            )
        record = recorded
    record = {**record, "machine": name, "version": Machine.api_version}
    valid.check(path, record, state="would be")
    del record["version"]
    MachineCollection.save(name, record)


def discover(machine, config):
    """Have asv list the suite as it is now, and return the list: {name: description}."""
    if asv("run", "--machine", machine, "--bench", "just-discover", "HEAD^!", config=config):
        raise UserError("asv could not list the benchmarks, see above")
    return Benchmarks.load(Config.load(str(ROOT / config)))
