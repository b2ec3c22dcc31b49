"""Running clients and reading what processes cost: CPU time and memory."""

import os
import pathlib
import select
import shlex
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30

# No run of a case comes near this; a client that does is waiting for a
# server that has stopped answering.
CLIENT_TIMEOUT_SECONDS = 300


class BenchError(Exception):
    """Something that the person at the keyboard can understand and act on."""


@dataclass(frozen=True)
class ClientRun:
    """One client program from start to end."""

    seconds: float
    cpu_seconds: float
    output: str
    peak_rss_mib: float


def run_client(argv: list[str]) -> ClientRun:
    """Runs a client; its CPU time comes from wait4 and so covers its children too."""
    with tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        watchdog = threading.Timer(CLIENT_TIMEOUT_SECONDS, process.kill)
        watchdog.start()
        # Not wait4's peak: it begins with that of this program, from which the client was forked.
        memory = MemoryWatch(process.pid, forks=False, proportional=False)
        try:
            with memory:
                output = process.stdout.read().decode()
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.monotonic() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            watchdog.cancel()
            process.stdout.close()
            if process.returncode is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            errors.seek(0)
            raise BenchError(f"{shlex.join(argv)}\nended with status {process.returncode}: "
                             f"{last_lines(errors.read().decode(errors='replace'))}")
    return ClientRun(seconds, usage.ru_utime + usage.ru_stime, output, memory.peak_rss_mib)


def last_lines(text: str, count: int = 5) -> str:
    return "\n".join(text.strip().splitlines()[-count:]) or "(no message)"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process: all its threads, those that have ended included, but no children.

    The process CPU clock counts nanoseconds where /proc/PID/stat counts
    ticks of 10 ms; the formula is clock_getcpuclockid(3)'s. It also works
    for a process that has ended and was not waited for yet.
    """
    cpu_clock = (~pid << 3) | 2
    return time.clock_gettime_ns(cpu_clock) * 1e-9


def children(pid: int) -> list[int]:
    """The living children of a process, started by whichever of its threads."""
    found = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in path.read_text().split()]
        except OSError:
            pass  # the thread has ended since
    return found


def wants_to_run(pid: int) -> bool:
    """Whether any thread is running or waiting for a processor."""
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            if path.read_text().rpartition(")")[2].split()[0] == "R":
                return True
        except OSError:
            pass  # the thread has ended since
    return False


def has_ended(pid: int, within_seconds: float = 0) -> bool:
    """Whether a child of this process ends in time; it stays to be waited for."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], within_seconds)[0])
    finally:
        os.close(descriptor)


def machine_busy_seconds() -> float:
    """CPU time that all processors together have spent on anything, or lost to the hypervisor."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def status_fields(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status") as status:
        return dict(line.split(":", 1) for line in status)


def proportional_set_kib(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))


class MemoryWatch:
    """Follows a process tree's memory and threads while a client runs.

    The kernel keeps each process's own peak (VmHWM), so one look at the end
    is enough for a server of one process. Servers that fork per connection
    are looked at again and again: their children take their peaks with them.
    """

    INTERVAL_SECONDS = 0.05  # a look costs well under 1 ms of one core

    def __init__(self, pid: int, forks: bool, proportional: bool):
        self.pid, self.forks, self.proportional = pid, forks, proportional
        self.peak_rss_mib = self.peak_pss_mib = 0.0
        self.peak_threads = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._look()

    def _run(self):
        while not self._stop.wait(self.INTERVAL_SECONDS):
            self._look()

    def _look(self):
        rss = pss = threads = 0
        for pid in [self.pid] + (children(self.pid) if self.forks else []):
            try:
                fields = status_fields(pid)
                rss += int(fields["VmHWM"].split()[0])
                threads += int(fields["Threads"])
                pss += proportional_set_kib(pid) if self.proportional else 0
            except (OSError, KeyError):
                pass  # it has just ended
        self.peak_rss_mib = max(self.peak_rss_mib, rss / 1024)
        self.peak_pss_mib = max(self.peak_pss_mib, pss / 1024)
        self.peak_threads = max(self.peak_threads, threads)
