"""A lab VM: QEMU (TCG, no KVM) that boots an initramfs, spoken to over QMP and through a small agent inside.

Not a command; proxy-vm is.  Python's standard library only, and no root.
Debian packages: qemu-system-x86 qemu-utils busybox-static, and the kernel that `install` gets.
"""
import base64
import json
import os
import secrets
import select
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid

from initramfs import AGENT_PORT, LabError

# Where Debian has the tools for disks and networks, which an ordinary user's PATH leaves out.
os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"

POLL_S = 0.02
BLOCK_BYTES = 1 << 18
# What a guest command's own time limit may be late, under TCG on a busy machine.
LIMIT_GRACE_S = 15

now = time.monotonic


class QMP:
    """A QMP client on a Unix socket whose path may be longer than the 107 bytes that connect() takes."""

    def __init__(self, path, timeout=30):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_PATH)
        try:
            self.socket.connect("/proc/self/fd/%d/%s" % (directory, os.path.basename(path)))
        finally:
            os.close(directory)
        self.buffer, self.events = b"", []
        self._line()
        self.command("qmp_capabilities")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def request(self, request):
        """Sends a request (a dictionary) and returns the answer, which may be an error."""
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._line()
            if "event" not in answer:
                return answer
            self.events.append(answer)

    def command(self, name, /, **arguments):
        """Runs a command; `_` in an argument's name stands for `-`."""
        arguments = {k.replace("_", "-"): v for k, v in arguments.items()}
        answer = self.request({"execute": name, "arguments": arguments})
        if "error" in answer:
            raise LabError("QMP command %s %s: %s" % (name, json.dumps(arguments), answer["error"].get("desc")))
        return answer["return"]

    def event(self, name, matches, timeout=30):
        """Waits for an event of this name whose data `matches`."""
        end = now() + timeout
        while True:
            for event in self.events:
                if event["event"] == name and matches(event.get("data", {})):
                    self.events.remove(event)
                    return event
            left = end - now()
            if left <= 0:
                raise LabError("QMP event %s did not come within %d s" % (name, timeout))
            if b"\n" in self.buffer or select.select([self.socket], [], [], left)[0]:
                self.events.append(self._line())

    def _line(self):
        while b"\n" not in self.buffer:
            part = self.socket.recv(65536)
            if not part:
                raise LabError("QMP: QEMU closed the connection")
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)


def free_port():
    """A TCP port of the loopback that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class VM:
    """One QEMU, whose files are in WORK/NAME: state.json, qmp.sock, console.log, qemu.log."""

    def __init__(self, work, name):
        self.work = os.path.abspath(work)
        self.directory = os.path.join(self.work, name)
        self.name = name
        self.state = None
        if os.path.exists(self.path("state.json")):
            with open(self.path("state.json")) as f:
                self.state = json.load(f)

    def path(self, name):
        return os.path.join(self.directory, name)

    def save(self):
        part = self.path("state.json.part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            json.dump(self.state, f, indent=1)
        os.replace(part, self.path("state.json"))

    def running(self):
        """Whether the process with the recorded id is still the QEMU that was started."""
        if not self.state:
            return False
        try:
            with open("/proc/%d/cmdline" % self.state["pid"], "rb") as f:
                return self.state["uuid"].encode() in f.read()
        except OSError:
            return False

    def need(self):
        if not self.running():
            raise LabError("the VM %s does not run (work directory %s): start it first" % (self.name, self.work))

    def qmp(self):
        return QMP(self.path("qmp.sock"))

    # Starting and stopping

    def start(self, kernel, initramfs, memory_mib, cpus, forwards, qemu_arguments, timeout=120):
        """Boots and waits for the agent; forwards: [(host port or 0, guest port)]. Returns the seconds it took."""
        if self.running():
            raise LabError("the VM %s runs already (pid %d): stop it first" % (self.name, self.state["pid"]))
        os.makedirs(self.directory, exist_ok=True)
        for name in ("qmp.sock", "console.log"):
            unlink(self.path(name))
        ports = {AGENT_PORT: free_port()}
        for host, guest in forwards:
            ports[guest] = host or free_port()
        token, identity = secrets.token_hex(16), str(uuid.uuid4())
        network = "user,id=net0" + "".join(",hostfwd=tcp:127.0.0.1:%d-:%d" % (h, g) for g, h in ports.items())
        command = ["qemu-system-x86_64", "-name", "lab-" + self.name, "-uuid", identity,
                   "-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "q35",
                   "-m", str(memory_mib), "-smp", str(cpus), "-nodefaults", "-display", "none", "-no-reboot",
                   "-kernel", kernel, "-initrd", initramfs,
                   "-append", "console=ttyS0 quiet panic=-1 mitigations=off net.ifnames=0 lab.token=" + token,
                   "-serial", "file:console.log", "-qmp", "unix:qmp.sock,server=on,wait=off",
                   "-netdev", network, "-device", "virtio-net-pci,netdev=net0,romfile=",
                   "-device", "virtio-rng-pci"] + qemu_arguments
        begin = now()
        with open(self.path("qemu.log"), "wb") as log:
            process = subprocess.Popen(command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       start_new_session=True)
        self.state = {"pid": process.pid, "uuid": identity, "token": token, "disks": {},
                      "ports": {str(g): h for g, h in ports.items()}}
        try:
            self.save()
            self._wait_for_agent(process, begin, timeout)
            self.state["boot_s"] = round(now() - begin, 3)
            self.save()
        except BaseException:
            self.stop()
            raise
        return self.state["boot_s"]

    def _wait_for_agent(self, process, begin, timeout):
        while b"LAB-READY" not in (console := tail(self.path("console.log"))):
            if process.poll() is not None:
                raise LabError("booting the VM %s: QEMU ended with status %d: %s"
                               % (self.name, process.returncode, tail(self.path("qemu.log")).decode(errors="replace")))
            if now() - begin > timeout:
                raise LabError("booting the VM %s: the guest was not ready after %d s; its console says:\n%s"
                               % (self.name, timeout, console.decode(errors="replace")))
            time.sleep(POLL_S)

    def stop(self, timeout=10):
        """Ends QEMU: QMP quit, and after `timeout` seconds SIGKILL to the process that was started."""
        if self.running():
            pid = self.state["pid"]
            try:
                with self.qmp() as qmp:
                    qmp.command("quit")
            except (LabError, OSError):
                pass                    # it is killed below
            end = now() + timeout
            while self._lives(pid) and now() < end:
                time.sleep(POLL_S)
            if self._lives(pid):
                os.kill(pid, signal.SIGKILL)
                while self._lives(pid):
                    time.sleep(POLL_S)
        unlink(self.path("state.json"))
        unlink(self.path("qmp.sock"))
        self.state = None

    def _lives(self, pid):
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass                        # another process started it
        return self.running()

    # Commands in the guest

    def run(self, command, stdin=None, timeout=0, stdout=None):
        """Runs a shell command in the guest and returns (exit status, standard output, standard error).

        stdin: bytes or a binary file. stdout: a binary file that gets standard output as it comes; what is returned
        as standard output is empty then. timeout: seconds after which the command is killed; 0 is none.
        """
        self.need()
        nonce = secrets.token_hex(8)
        request = "%s %s %d %s\n" % (self.state["token"], nonce, timeout, base64.b64encode(command.encode()).decode())
        with socket.create_connection(("127.0.0.1", self.state["ports"][str(AGENT_PORT)])) as s:
            s.settimeout(timeout + LIMIT_GRACE_S if timeout else None)
            s.sendall(request.encode())
            # From a thread of its own: a command that answers while it reads must not find us still writing.
            threading.Thread(target=feed, args=(s, stdin), daemon=True).start()
            try:
                return receive_answer(s, b"\n--lab-%s " % nonce.encode(), stdout)
            except TimeoutError:
                raise LabError("in the guest: %s: nothing heard for %d s" % (command, timeout + LIMIT_GRACE_S))

    def check(self, command, **options):
        """Runs a shell command in the guest, which must succeed, and returns its standard output as text."""
        status, output, errors = self.run(command, **options)
        if status:
            raise LabError("in the guest: %s: exit status %d: %s"
                           % (command, status, (output + errors).decode(errors="replace").strip()))
        return output.decode(errors="replace")

    def push(self, source, destination):
        """Copies a file into the guest, with its mode."""
        name = shlex.quote(destination)
        with open(source, "rb") as f:
            mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
            self.check('mkdir -p "$(dirname %s)" && cat >%s && chmod %o %s' % (name, name, mode, name), stdin=f)


def receive_answer(s, mark, stdout):
    """Takes the agent's answer apart; see initramfs.AGENT."""
    data, output, trailer = b"", [], False
    while True:
        part = s.recv(BLOCK_BYTES)
        if not part:
            raise LabError("the guest's agent hung up before the command's end; see console.log")
        data += part
        if not trailer:
            at = data.find(mark)
            # The last bytes may be the beginning of the mark.
            cut = at if at >= 0 else max(0, len(data) - len(mark))
            if stdout is None:
                output.append(data[:cut])
            elif cut:
                stdout.write(data[:cut])
                stdout.flush()
            data = data[cut:]
            if at < 0:
                continue
            trailer = True
        line, newline, errors = data[1:].partition(b"\n")
        if newline:
            status, size = (int(word) for word in line.split()[1:])
            if len(errors) >= size:
                return status, b"".join(output), errors[:size]


def feed(s, stdin):
    try:
        if isinstance(stdin, bytes):
            s.sendall(stdin)
        elif stdin is not None:
            while block := stdin.read(BLOCK_BYTES):
                s.sendall(block)
        s.shutdown(socket.SHUT_WR)
    except OSError:
        pass                            # the command ended before it had read all


def tail(path, size=8000):
    """The end of a file, or nothing where there is no such file."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - size))
            return f.read()
    except FileNotFoundError:
        return b""


def unlink(path):
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def main(run):
    """Runs a script's main function and exits with what it returns."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(run())
    except KeyboardInterrupt:
        sys.exit(130)
    except (LabError, OSError) as e:
        print("%s: %s" % (os.path.basename(sys.argv[0]), e), file=sys.stderr)
        sys.exit(1)
