"""What the lab's tests share: the VM with material for it, diskgate here and there, and a line for each check.

Not a command; kernel-nbd-test and tls-test are.  Needs what Scripts/lab/install installs.
"""
import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import labvm
from labvm import LabError, free_port, now

HERE = os.path.dirname(os.path.realpath(__file__))
MIB = 1 << 20
FILE_SYSTEM_MIB = 48
PORT = 10809                # of diskgate in the guest, TCP and vsock
HOST = "10.0.2.2"           # this machine's loopback, as seen from the guest
COPY_DIGEST = "set -o pipefail; nbdcopy '%s' - | sha256sum"
# Looked up when diskgate first needs TLS or a hash, so ldd does not name them.
OPENSSL = tuple("/usr/lib/x86_64-linux-gnu/lib%s.so.3" % name for name in ("ssl", "crypto"))
# Limits after which something hangs: a command in the guest, a request of the kernel's client, diskgate starting
# or ending, and everything together.
COMMAND_S, REQUEST_S, SERVER_S, ALL_S = 60, 30, 10, 300


class Failed(Exception):
    """A check that did not find what it should."""


def expect(condition, why):
    if not condition:
        raise Failed(why)


def tool(*command):
    """Runs a command of this machine, which must succeed, and returns its standard output."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(timeout=ALL_S)
    except BaseException:
        process.terminate()         # not SIGKILL: proxy-vm has a VM to end
        process.wait()
        raise
    if process.returncode:
        raise Failed("%s: exit status %d: %s" % (" ".join(command), process.returncode,
                                                 (errors + output).decode(errors="replace").strip()))
    return output.decode()


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def make_files(directory):
    """Files of all kinds in a tree; returns {path from there: SHA-256}."""
    source = random.Random(1)       # the same files in every run
    contents = {"empty": b"", "large": source.randbytes(12 * MIB + 4711), "a/b/c/d/e/deep": b"deep\n",
                "sparse": b"begin" + bytes(5 * MIB) + b"end"}
    contents.update({"many/%03d" % n: source.randbytes(source.randrange(20000)) for n in range(200)})
    for name, content in contents.items():
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def make_file_system(path, files):
    with open(path, "wb") as f:
        f.truncate(FILE_SYSTEM_MIB * MIB)
    tool("mkfs.ext4", "-q", "-F", "-d", files, path)


class Lab:
    """The VM, the material, and diskgate here and there. Each test has its own kind of it."""

    # Programs of this machine that the guest needs, besides diskgate; and files, as proxy-vm's --file takes them.
    programs = ("nbd-client",)
    files_carried = ()
    # More words for proxy-vm start.
    start_options = ()

    def __init__(self, binary, work):
        self.binary = binary
        self.in_guest = shlex.quote(os.path.basename(binary))
        self.work = work
        self.ports = {}
        self.vm = None

    def path(self, name):
        return os.path.join(self.work, name)

    def prepare(self):
        """Makes the material and boots the VM."""
        self.files = make_files(self.path("files"))
        make_file_system(self.path("fs.img"), self.path("files"))
        carried = [word for path in (self.binary, *map(shutil.which, self.programs)) for word in ("--bin", path)]
        carried += [word for file in self.files_carried for word in ("--file", file)]
        # The guest's way to the monitor of its own QEMU, which adds disks to it.
        self.monitor_port = free_port()
        own = "tcp:127.0.0.1:%d,server=on,wait=off" % self.monitor_port
        self.ports = self.proxy_vm("start", "--forward", str(PORT), "--qemu-arg=-qmp", "--qemu-arg=" + own,
                                   *self.start_options, *carried)["ports"]
        self.vm = labvm.VM(self.work, "proxy")
        self.guest("modprobe nbd")

    def close(self):
        labvm.VM(self.work, "proxy").stop()

    def proxy_vm(self, *arguments):
        return json.loads(tool(sys.executable, os.path.join(HERE, "proxy-vm"), "-w", self.work, *arguments))

    def guest(self, command, stdin=None):
        return self.vm.check(command, stdin=stdin, timeout=COMMAND_S)

    # diskgate here, its client in the guest

    @contextlib.contextmanager
    def serving(self, *arguments):
        """diskgate on this machine's loopback; at the end SIGTERM must end it with exit status 0."""
        server = Server(self.binary, arguments, self.path("server.log"))
        try:
            server.wait_until_listening()
            yield server
            server.terminate()
        except (Failed, LabError) as e:
            log = labvm.tail(server.log, 2000).decode(errors="replace").strip()
            raise Failed("%s; `%s` says: %s" % (e, server.command, log or "nothing"))
        finally:
            server.kill()

    @contextlib.contextmanager
    def attached(self, server, *options, device="/dev/nbd0", request_s=REQUEST_S):
        self.guest(" ".join(["nbd-client", HOST, str(server.port), device, "-N", "''", "-t", str(request_s), *options]))
        with self.undoing("nbd-client -d " + device):
            yield device

    @contextlib.contextmanager
    def mounted(self, device, options):
        point = "/mnt/" + os.path.basename(device)
        self.guest("mkdir -p %s && mount -t ext4 -o %s %s %s" % (point, options, device, point))
        with self.undoing("umount " + point):
            yield point

    @contextlib.contextmanager
    def undoing(self, command):
        """Runs a command in the guest at the end, which must succeed unless something failed before."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(LabError, OSError):
                self.vm.run(command, timeout=COMMAND_S)
            raise
        self.guest(command)

    def compare_files(self, directory):
        """The files in the guest's directory are those that the file system was made of."""
        listing = self.guest("cd %s && find . -type f | xargs sha256sum" % directory)
        found = {line[66:].removeprefix("./"): line[:64] for line in listing.splitlines()}
        wrong = sorted(name for name in found.keys() | self.files.keys() if found.get(name) != self.files.get(name))
        expect(not wrong, "%d of %d files in the guest are missing, surplus or have other content, %s first"
               % (len(wrong), len(self.files), wrong[:1]))

    # diskgate in the guest

    @contextlib.contextmanager
    def hot_added(self, image):
        disk = self.proxy_vm("hot-add", image, "--read-only")
        try:
            yield disk["device"]
        finally:
            self.proxy_vm("hot-remove", disk["id"])

    @contextlib.contextmanager
    def serving_in_guest(self, arguments):
        """diskgate in the guest; at the end SIGTERM must end it with exit status 0."""
        command = "%s serve %s" % (self.in_guest, arguments)
        self.guest("cd /tmp; rm -f server.*; (%s >server.log 2>&1 & echo $! >server.pid; wait $!; "
                   "echo $? >server.status) >/dev/null 2>&1 &" % command)
        try:
            yield
            self.guest("cd /tmp; kill $(cat server.pid)")
            self.guest_until("[ -e /tmp/server.status ]", "`%s` ends after SIGTERM" % command)
            status = self.guest("cat /tmp/server.status").strip()
            expect(status == "0", "`%s` ended with status %s after SIGTERM" % (command, status))
        except (Failed, LabError) as e:
            log = self.vm.run("tail -c 2000 /tmp/server.log", timeout=COMMAND_S)[1].decode(errors="replace").strip()
            raise Failed("%s; `%s` in the guest says: %s" % (e, command, log or "nothing"))
        finally:
            self.vm.run("[ -e /tmp/server.status ] || kill -9 $(cat /tmp/server.pid)", timeout=COMMAND_S)

    def guest_until(self, condition, what):
        """Waits until a condition holds in the guest."""
        status, _, _ = self.vm.run("i=0; until %s; do i=$((i+1)); [ $i -lt %d ] || exit 1; usleep 100000; done"
                                   % (condition, SERVER_S * 10), timeout=COMMAND_S)
        expect(status == 0, "it is not so after %d s that %s" % (SERVER_S, what))


class Server:
    """diskgate on a loopback port of this machine."""

    def __init__(self, binary, arguments, log):
        self.port = free_port()
        self.log = log
        arguments = [binary, "serve", *arguments, "--listen", "tcp://127.0.0.1:%d" % self.port]
        self.command = " ".join(arguments)
        with open(log, "wb") as f:
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=f, stderr=f)

    def wait_until_listening(self):
        # Looked up rather than tried: a connection that is given up is a client's fault in the server's log.
        listening = re.compile(r":%04X [0-9A-F]+:0000 0A " % self.port)
        end = now() + SERVER_S
        while True:
            for table in ("/proc/net/tcp", "/proc/net/tcp6"):
                if os.path.exists(table) and listening.search(labvm.tail(table, MIB).decode()):
                    return
            expect(self.process.poll() is None, "it ended with status %s at its start" % self.process.returncode)
            expect(now() < end, "it does not listen after %d s" % SERVER_S)
            time.sleep(labvm.POLL_S)

    def terminate(self):
        """Ends it with SIGTERM, unless that was done already."""
        if self.process.returncode is None:
            expect(self.process.poll() is None, "it ended by itself with status %s" % self.process.returncode)
            self.process.terminate()
        try:
            status = self.process.wait(SERVER_S)
        except subprocess.TimeoutExpired:
            raise Failed("it still runs %d s after SIGTERM" % SERVER_S)
        expect(status == 0, "it ended with status %d after SIGTERM" % status)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def attempt(name, function, *arguments):
    """Runs one step and says how it went."""
    begin = now()
    try:
        function(*arguments)
    except (Failed, LabError, OSError, subprocess.SubprocessError, ValueError) as e:
        print("not ok %s: %s" % (name, " ".join(str(e).split())), flush=True)
        return False
    print("ok %s # %.1f s" % (name, now() - begin), flush=True)
    return True


def interrupt(number, _):
    if number == signal.SIGALRM:
        print("not ok: not done after %d s" % ALL_S, flush=True)
    sys.exit(128 + number)


def main(document, checks, tools, make_lab):
    """Runs the checks that the command line names, or all, in one lab; returns the exit status."""
    name = os.path.basename(sys.argv[0])
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(document + "\nChecks: " + " ".join(checks), file=sys.stdout if len(sys.argv) > 1 else sys.stderr)
        return 0 if len(sys.argv) > 1 else 2
    binary, chosen = os.path.abspath(sys.argv[1]), sys.argv[2:] or list(checks)
    unknown = [check for check in chosen if check not in checks]
    if unknown or not os.access(binary, os.X_OK):
        why = "no check %s; there are: %s" % (unknown[0], " ".join(checks)) if unknown else binary + " is no program"
        print("%s: %s" % (name, why), file=sys.stderr)
        return 2
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        print("%s: missing: %s; run %s/install" % (name, " ".join(missing), HERE), file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, interrupt)
    signal.alarm(ALL_S)
    with tempfile.TemporaryDirectory(prefix=name + "-") as work:
        lab = make_lab(binary, work)
        try:
            if not attempt("boot", lab.prepare):
                return 1
            return 0 if all([attempt(check, checks[check], lab) for check in chosen]) else 1
        finally:
            lab.close()

