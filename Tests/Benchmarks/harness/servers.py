"""The servers under comparison: how each is started, found ready and stopped.

`SERVERS` is the table to adapt when a command line changes.
"""

import contextlib
import ctypes
import itertools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from .process import BenchError, children, cpu_seconds, has_ended, last_lines, wants_to_run

START_TIMEOUT_SECONDS = 30
STOP_TIMEOUT_SECONDS = 10
SIGNAL_INTERVAL_SECONDS = 0.5
IDLE_INTERVAL_SECONDS = 0.03
UNIX_PATH_LIMIT = 107  # sun_path, less its final zero


@dataclass(frozen=True)
class TLS:
    """How a server speaks TLS: with certificates or with pre-shared keys, from what make-certificates made."""

    kind: str  # "x509" or "psk"
    directory: pathlib.Path
    identity = "backup"

    @property
    def server_certificates(self) -> pathlib.Path:
        return self.directory / "server"

    @property
    def client_certificates(self) -> pathlib.Path:
        return self.directory / "client"

    @property
    def keys(self) -> pathlib.Path:
        return self.directory / "psk" / "keys.psk"


@dataclass(frozen=True)
class Export:
    """What is to be served, and how it can be reached."""

    path: pathlib.Path
    format: str  # "raw" or "qcow2"
    writable: bool
    socket_path: pathlib.Path | None  # None: TCP
    port: int  # 0: unix socket
    tls: TLS | None = None

    def uri(self, name: str) -> str:
        scheme, user, parameters = "nbd", "", []
        if self.tls is not None:
            scheme = "nbds"
            x509 = self.tls.kind == "x509"
            user = "" if x509 else f"{self.tls.identity}@"
            parameters.append(f"tls-certificates={self.tls.client_certificates}" if x509
                              else f"tls-psk-file={self.tls.keys}")
        if self.socket_path is not None:
            parameters.append(f"socket={self.socket_path}")
            return f"{scheme}+unix://{user}/{name}?{'&'.join(parameters)}"
        return f"{scheme}://{user}127.0.0.1:{self.port}/{name}" + (f"?{'&'.join(parameters)}" if parameters else "")

    def loadgen_address(self, name: str) -> list[str]:
        where = ["--unix", str(self.socket_path)] if self.socket_path else ["--tcp", f"127.0.0.1:{self.port}"]
        if self.tls is not None:
            where += (["--tls-certificates", str(self.tls.client_certificates)] if self.tls.kind == "x509"
                      else ["--tls-psk", str(self.tls.keys), "--tls-identity", self.tls.identity])
        return where + (["--export", name] if name else [])


@dataclass(frozen=True)
class Server:
    """One row of the table."""

    name: str
    program: str
    package: str  # the Debian package that has it
    command: Callable[["Server", Export], list[str]]
    export_name: str = ""
    formats: tuple[str, ...] = ("raw",)
    forks: bool = False     # goes to the background and forks per connection
    optional: bool = False  # left out, with a note, where it does not start


def diskgate(server: Server, export: Export) -> list[str]:
    listen = f"unix:{export.socket_path}" if export.socket_path else f"tcp://127.0.0.1:{export.port}"
    tls = []
    if export.tls is not None:
        # Without the CA, so that no client's certificate is asked for: the others do not ask either.
        tls = ["--tls", "require", *(["--tls-psk", str(export.tls.keys)] if export.tls.kind == "psk" else
                                     ["--tls-cert", str(export.tls.server_certificates / "server-cert.pem"),
                                      "--tls-key", str(export.tls.server_certificates / "server-key.pem")])]
    return [server.program, "serve", str(export.path), "--listen", listen, *tls] + ["--writable"] * export.writable


def nbdkit(server: Server, export: Export) -> list[str]:
    listen = ["-U", str(export.socket_path)] if export.socket_path else ["-i", "127.0.0.1", "-p", str(export.port)]
    tls = []
    if export.tls is not None:
        tls = ["--tls=require", f"--tls-psk={export.tls.keys}" if export.tls.kind == "psk" else
               f"--tls-certificates={export.tls.server_certificates}"]
    return [server.program, "-f", *["-r"] * (not export.writable), *listen, *tls, "file", str(export.path)]


def qemu_nbd(aio: str) -> Callable[[Server, Export], list[str]]:
    def command(server: Server, export: Export) -> list[str]:
        listen = ["-k", str(export.socket_path)] if export.socket_path else ["-b", "127.0.0.1", "-p", str(export.port)]
        tls = []
        if export.tls is not None:
            directory = export.tls.keys.parent if export.tls.kind == "psk" else export.tls.server_certificates
            tls = ["--tls-creds", "tls0", "--object",
                   f"tls-creds-{export.tls.kind},id=tls0,endpoint=server,dir={directory},verify-peer=off"]
        return [server.program, "-t", "-e", "64", "-f", export.format, "--cache=writeback", f"--aio={aio}",
                *["-r"] * (not export.writable), *listen, *tls, str(export.path)]
    return command


def nbd_server(server: Server, export: Export) -> list[str]:
    # Its -d stays in the foreground but then serves one connection and ends,
    # so it has to go to the background; RunningServer finds it by its pid file.
    tcp = f"listenaddr = 127.0.0.1\nport = {export.port}"
    listen = f"unixsock = {export.socket_path}" if export.socket_path else tcp
    configuration = pid_file(export).with_suffix(".conf")
    configuration.write_text(f"[generic]\n{listen}\n[{server.export_name}]\nexportname = {export.path}\n"
                             f"readonly = {'false' if export.writable else 'true'}\n")
    return [server.program, "-C", str(configuration), "-p", str(pid_file(export))]


def pid_file(export: Export) -> pathlib.Path:
    return export.path.parent / "nbd-server.pid"


SERVERS = {server.name: server for server in [
    Server("diskgate", "diskgate", "", diskgate, formats=("raw", "qcow2")),
    Server("nbdkit", "nbdkit", "nbdkit", nbdkit),
    Server("qemu-nbd", "qemu-nbd", "qemu-utils", qemu_nbd("threads"), formats=("raw", "qcow2")),
    Server("qemu-nbd-uring", "qemu-nbd", "qemu-utils", qemu_nbd("io_uring"), formats=("raw", "qcow2"), optional=True),
    Server("nbd-server", "nbd-server", "nbd-server", nbd_server, export_name="bench", forks=True),
]}

_export_numbers = itertools.count(1)


def make_export(path: pathlib.Path, *, writable: bool = False, tcp: bool = False, tls: TLS | None = None) -> Export:
    """An export at an address that nothing else uses."""
    format = "qcow2" if path.suffix == ".qcow2" else "raw"
    if tcp:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return Export(path, format, writable, None, probe.getsockname()[1], tls)
    socket_path = path.parent / f"{next(_export_numbers)}.sock"
    if len(str(socket_path)) > UNIX_PATH_LIMIT:
        raise BenchError(f"{socket_path} is too long for a socket's path: give a shorter --work-dir")
    return Export(path, format, writable, socket_path, 0, tls)


def adopt_orphans():
    """Makes servers that go to the background children of this process, so that they can be waited for."""
    PR_SET_CHILD_SUBREAPER = 36
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise BenchError(f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}")
    threading.Thread(target=_reap_probes, daemon=True).start()


def _reap_probes():
    """libvirtd asks QEMUs that go to the background what they can do, and waits until they are gone: as zombies of this
    process they would stay. It starts no QEMU itself."""
    while True:
        for pid in children(os.getpid()):
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/stat") as stat:
                    name, state = stat.read().partition("(")[2].rpartition(")")[::2]
                if name.startswith("qemu-system") and state.split()[0] == "Z":
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(0.1)


def is_listening(export: Export) -> bool:
    """Looks into the kernel's tables: connecting to find out would be a client that the server has to deal with."""
    if export.socket_path is not None:
        with open("/proc/net/unix") as table:
            end = f" {export.socket_path}\n"
            return any(line.endswith(end) and line.split()[3] == "00010000" for line in table)
    with open("/proc/net/tcp") as table:
        address = f"0100007F:{export.port:04X}" if sys.byteorder == "little" else f"7F000001:{export.port:04X}"
        return any(line.split()[1] == address and line.split()[3] == "0A" for line in table)


class RunningServer:
    """A server from start to stop, as a context; it never outlives the context.

    `reaped_cpu_seconds` is known after the stop: the CPU time of children
    that the server has waited for.
    """

    def __init__(self, server: Server, export: Export):
        self.server, self.export = server, export
        self.pid = 0
        self.reaped_cpu_seconds = 0.0
        self._log = export.path.parent / "server.log"

    @property
    def uri(self) -> str:
        return self.export.uri(self.server.export_name)

    @property
    def loadgen_address(self) -> list[str]:
        return self.export.loadgen_address(self.server.export_name)

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def __enter__(self):
        command = self.server.command(self.server, self.export)
        try:
            self._start(command)
            self._wait_until(lambda: is_listening(self.export), "is not listening")
            self._wait_until(self._is_idle, "is still busy with its start")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind, *_):
        died = has_ended(self.pid)
        self._stop()
        if died and kind is None:
            raise BenchError(f"{self.server.name} ended during the run: {self._message()}")

    def wait_for_children(self):
        """A server that forks is done with a client when the client's child has ended."""
        if self.server.forks:
            self._wait_until(lambda: not children(self.pid), "keeps its children")

    def _start(self, command: list[str]):
        pid_file(self.export).unlink(missing_ok=True)
        # setpriv replaces itself by the server, which then ends with this program even if that is killed.
        guard = [] if self.server.forks else ["setpriv", "--pdeathsig", "TERM", "--"]
        with open(self._log, "wb") as log:
            process = subprocess.Popen(guard + command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.pid = process.pid
        if self.server.forks:
            process.wait()
            self.pid = 0
            self._wait_until(lambda: pid_file(self.export).exists() and pid_file(self.export).read_text().strip(),
                             "wrote no pid file")
            self.pid = int(pid_file(self.export).read_text())
        else:
            process.returncode = 0  # _stop waits for it: without this, Popen would as well

    def _is_idle(self) -> bool:
        """nbd-server, for one, listens and then computes for half a second: no client's doing."""
        before = self.cpu_seconds()
        time.sleep(IDLE_INTERVAL_SECONDS)
        # On a crowded machine a busy process may get no CPU for so long: it still wants to run.
        return self.cpu_seconds() - before < IDLE_INTERVAL_SECONDS / 30 and not wants_to_run(self.pid)

    def _wait_until(self, condition: Callable[[], object], complaint: str):
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not condition():
            if self.pid and has_ended(self.pid):
                raise BenchError(f"{self.server.name} ended: {self._message()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.server.name} {complaint} after {START_TIMEOUT_SECONDS} s: {self._message()}")
            time.sleep(0.002)

    def _stop(self):
        if self.pid == 0:
            return
        # More than once: qemu-nbd listens a moment before it heeds the signal.
        for _ in range(int(STOP_TIMEOUT_SECONDS / SIGNAL_INTERVAL_SECONDS)):
            os.kill(self.pid, signal.SIGTERM)
            if has_ended(self.pid, SIGNAL_INTERVAL_SECONDS):
                break
        else:
            print(f"{self.server.name} ignored SIGTERM for {STOP_TIMEOUT_SECONDS} s and was killed", file=sys.stderr)
            os.kill(self.pid, signal.SIGKILL)
            has_ended(self.pid, STOP_TIMEOUT_SECONDS)
        own = cpu_seconds(self.pid)
        _, _, usage = os.wait4(self.pid, 0)
        self.reaped_cpu_seconds = max(0.0, usage.ru_utime + usage.ru_stime - own)
        self.pid = 0
        if self.export.socket_path is not None:
            self.export.socket_path.unlink(missing_ok=True)

    def _message(self) -> str:
        return last_lines(self._log.read_text(errors="replace")) if self._log.exists() else "(no message)"


def missing_packages(servers: list[Server], programs: dict[str, str]) -> list[str]:
    """Debian packages to install: for the peers and for other programs, given as program: package."""
    needed = {server.program: server.package for server in servers if server.package} | programs
    return sorted({package for program, package in needed.items() if shutil.which(program) is None})
