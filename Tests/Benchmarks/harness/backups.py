"""Backups of a running machine: each program has a domain of its own, and all domains change in the same way."""

import json
import os
import pathlib
import random
import signal
import subprocess
import time
from dataclasses import dataclass

from .process import GIB, MIB, BenchError, cpu_seconds, last_lines, machine_busy_seconds, run_client

ROOT = pathlib.Path(__file__).resolve().parents[3]
LAB = ROOT / "Scripts" / "lab" / "libvirt-domain"
DISK_SIZE = 10 * GIB
PIECE = 64 * 1024  # one cluster of the disk, one bit of its bitmap
TILE = 64 * MIB

FULL_COPY = "nbdcopy, all of it"
BACKERS = ("diskgate", "virtnbdbackup", FULL_COPY)


class Domain:
    """A libvirt domain whose processor stands still, over a fully allocated disk; QEMU writes to it on command."""

    def __init__(self, directory: pathlib.Path, base: pathlib.Path):
        self.directory, self.base = directory, base
        self.lab = directory / "libvirt"
        self.target = directory / "backup"
        self.scratch = directory / "scratch"
        self.disk = self.lab / "vda.qcow2"
        self.machine = self.uri = ""
        self.pid = 0

    def run(self, *arguments: object, text: str | None = None) -> str:
        result = subprocess.run([str(LAB), "-w", str(self.directory), *map(str, arguments)], capture_output=True,
                                text=True, input=text)
        if result.returncode != 0:
            raise BenchError(f"libvirt-domain {arguments[0]}: {last_lines(result.stderr)}")
        return result.stdout

    def start(self):
        for directory in (self.lab, self.scratch):
            directory.mkdir(parents=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", self.base, "-F", "raw", self.disk], check=True)
        started = json.loads(self.run("start", "--no-guest", "--size", DISK_SIZE))
        self.machine, self.uri = started["machine"], started["uri"]
        self.pid = json.loads(self.run("status"))["pid"]

    def stop(self):
        stopping = subprocess.Popen([str(LAB), "-w", str(self.directory), "stop"])
        while stopping.poll() is None:
            # QEMU is an orphan that this program has adopted: libvirt waits until somebody has reaped it.
            try:
                if self.pid:
                    os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pass
            time.sleep(0.05)

    def change(self, pieces: int, seed: int):
        """Writes so many pieces at random places; the seed decides where."""
        places = random.Random(seed).sample(range(DISK_SIZE // PIECE), pieces)
        lines = [f"write -P {seed % 255 + 1} {place * PIECE} {PIECE}" for place in places]
        self.run("io", "-", text="\n".join([*lines, "flush"]) + "\n")

    @property
    def as_session_user(self) -> list[str]:
        """virtnbdbackup asks for a password when a URI names a socket: it gets the session's place instead."""
        names = [f"XDG_{kind}_HOME={self.lab}/{kind.lower()}" for kind in ("CONFIG", "CACHE", "DATA", "STATE")]
        user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
        return ["env", f"HOME={self.lab}", f"XDG_RUNTIME_DIR={self.lab}/run", *names, *user]


class Domains:
    """One domain for each program, made when first asked for, with a first full backup."""

    def __init__(self, directory: pathlib.Path, diskgate: str):
        self.directory, self.diskgate = directory / "d", diskgate
        self._domains: dict[str, Domain] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for domain in self._domains.values():
            domain.stop()

    def domain(self, program: str) -> Domain:
        if program not in self._domains:
            self.directory.mkdir(exist_ok=True)
            domain = Domain(self.directory / str(len(self._domains)), self._base())
            self._domains[program] = domain  # before its start: whatever that leaves behind is stopped
            domain.start()
            if program != FULL_COPY:
                run_client(self.command(program, domain, full=True))
        return self._domains[program]

    def _base(self) -> pathlib.Path:
        path = self.directory / "base.raw"
        if not path.exists():
            tile = os.urandom(TILE)
            with open(path, "wb", buffering=0) as disk:
                for _ in range(DISK_SIZE // TILE):
                    disk.write(tile)
        return path

    def command(self, program: str, domain: Domain, full: bool) -> list[str]:
        if program == "diskgate":
            return [self.diskgate, "backup", "--vm", domain.machine, "--repository", str(domain.target), "--scratch",
                    str(domain.scratch), "--state-directory", str(domain.directory / "state"), "--quiesce", "never"]
        return [*domain.as_session_user, "virtnbdbackup", "-U", "qemu:///session", "-d", "lab", "-n",
                "-l", "full" if full else "inc", "-o", str(domain.target), "-S", str(domain.scratch),
                "-f", str(domain.directory / "vnb.sock")]


def newest(domain: Domain, ending: str) -> pathlib.Path:
    files = sorted(domain.target.rglob(f"*{ending}"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        raise BenchError(f"the backup has left no *{ending}")
    return files[-1]


def incremental(domains: Domains, program: str, pieces: int, round: int, check: bool) -> dict[str, float]:
    """Changes the program's domain, runs an incremental backup, and says what it took."""
    domain = domains.domain(program)
    domain.change(pieces, seed=1000 * pieces + round)
    os.sync()
    changed = pieces * PIECE
    command = domains.command(program, domain, full=False)
    if program == FULL_COPY:
        return full_copy(domain)
    cpu, busy = cpu_seconds(domain.pid), machine_busy_seconds()
    run = run_client(command)
    cpu, busy = cpu_seconds(domain.pid) - cpu, machine_busy_seconds() - busy
    stored = newest(domain, ".qcow2" if program == "diskgate" else ".data")
    if check and program == "diskgate":
        compare(domain.disk, stored)
    return {"seconds": run.seconds, "client_cpu_per_gib": run.cpu_seconds / (changed / GIB),
            "server_cpu_per_gib": cpu / (changed / GIB), "stored_per_changed": stored.stat().st_size / changed,
            "client_rss_mib": run.peak_rss_mib, "other_cores": max(0.0, busy - cpu - run.cpu_seconds) / run.seconds}


def read_through(path: pathlib.Path):
    """So that nbdcopy does not pay for what the backups have driven out of memory."""
    buffer = bytearray(MIB)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def compare(disk: pathlib.Path, point: pathlib.Path):
    result = subprocess.run(["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2", disk, point],
                            capture_output=True, text=True)
    if result.returncode != 0:
        raise BenchError(f"the restore point is not the disk: {last_lines(result.stdout + result.stderr)}")


def full_copy(domain: Domain) -> dict[str, float]:
    """nbdcopy of the whole disk from a pull backup; only the copy counts, not the making of the snapshot."""
    socket, copy, request = (domain.directory / name for name in ("nbd.sock", "copy.raw", "backup.xml"))
    request.write_text(f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>"
                       "<disk name='vda' backup='yes' type='file' exportname='vda'><driver type='qcow2'/>"
                       f"<scratch file='{domain.scratch}/copy.qcow2'/></disk></disks></domainbackup>")
    read_through(domain.base)
    domain.run("virsh", "--", "backup-begin", "lab", request)
    try:
        cpu, busy = cpu_seconds(domain.pid), machine_busy_seconds()
        run = run_client(["nbdcopy", f"nbd+unix:///vda?socket={socket}", str(copy)])
        cpu, busy = cpu_seconds(domain.pid) - cpu, machine_busy_seconds() - busy
    finally:
        domain.run("virsh", "--", "domjobabort", "lab")
        copy.unlink(missing_ok=True)
    return {"seconds": run.seconds, "client_rss_mib": run.peak_rss_mib,
            "other_cores": max(0.0, busy - cpu - run.cpu_seconds) / run.seconds}


@dataclass
class Stretch:
    """What a copy that was stopped had done."""

    seconds: float
    early_rss_mib: float  # at a quarter
    rss_mib: float
    stored: int


def copy_stretch(diskgate: str, directory: pathlib.Path, planned: str, length: int) -> Stretch:
    """Copies a compressible, fully allocated disk to qcow2, and stops after `length` bytes."""
    target, socket = directory / "stretch.qcow2", directory / "pattern.sock"
    partial = pathlib.Path(f"{target}.partial")
    server = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", "--", "nbdkit", "-f", "-r", "-U", str(socket),
                               "pattern", planned], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return follow([diskgate, "copy", f"nbd+unix:///?socket={socket}", str(target), "--to-format", "qcow2",
                       "--compress", "--json"], partial, length)
    finally:
        server.terminate()
        server.wait()
        for path in directory.glob("stretch.qcow2*"):
            path.unlink()


def follow(command: list[str], partial: pathlib.Path, length: int) -> Stretch:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    started, early, now, done = time.monotonic(), 0.0, 0.0, 0
    peak = pathlib.Path(f"/proc/{process.pid}/status")
    for line in process.stderr:
        if not line.startswith("{"):
            continue
        done = json.loads(line).get("written", done)
        now = next(int(text.split()[1]) / 1024 for text in peak.read_text().splitlines() if text.startswith("VmHWM"))
        early = early if early or done < length / 4 else now
        if done >= length:
            break
    seconds, stored = time.monotonic() - started, partial.stat().st_blocks * 512
    process.send_signal(signal.SIGINT)
    process.stderr.read()
    process.stderr.close()
    process.wait()
    if done < length:
        raise BenchError(f"the copy ended after {done} bytes")
    return Stretch(seconds, early, now, stored)


def room_needed() -> int:
    """For the base, two full backups, a full copy, and what changes."""
    return 5 * DISK_SIZE


def programs_needed() -> dict[str, str]:
    return {"virtnbdbackup": "virtnbdbackup", "libvirtd": "libvirt-daemon-system", "virsh": "libvirt-clients",
            "qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "nbdcopy": "libnbd-bin",
            "nbdkit": "nbdkit"}
