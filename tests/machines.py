"""Two machines made of network namespaces on one, with a cable between them; needs Linux and its superuser."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

needs_namespaces = pytest.mark.skipif(
    not (shutil.which("ip") and hasattr(os, "geteuid") and os.geteuid() == 0),
    reason="network namespaces need the command ip and the superuser",
)


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Machine:
    """A network namespace with one interface.

    Attributes:
        rank: of the machine.
        address: of its interface.
    """

    def __init__(self, rank):
        self.rank, self.address = rank, f"10.77.0.{rank + 1}"
        self._name, self._interface = f"kt{os.getpid()}-{rank}", f"kt{rank}"

    def start(self, command, log, **environment):
        """A process on this machine, whose output goes to a file."""
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": self._interface, **environment}
        with Path(log).open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._name, *command], env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def kill(self):
        """End all its processes at once, as a power failure does."""
        for process in ip("netns", "pids", self._name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), 9)


@contextlib.contextmanager
def two_machines():
    """Both, until the end of the block."""
    first, second = machines = Machine(0), Machine(1)
    try:
        for machine in machines:
            ip("netns", "add", machine._name)
        ends = ("type", "veth", "peer", "name", second._interface, "netns", second._name)
        ip("link", "add", first._interface, "netns", first._name, *ends)
        for machine in machines:
            ip("-n", machine._name, "addr", "add", f"{machine.address}/24", "dev", machine._interface)
            for interface in ("lo", machine._interface):
                ip("-n", machine._name, "link", "set", interface, "up")
        yield machines
    finally:
        for machine in machines:
            with contextlib.suppress(subprocess.CalledProcessError):
                machine.kill()
                ip("netns", "del", machine._name)
