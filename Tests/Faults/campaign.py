"""campaign: harms conversations at every point of the protocol and looks at what clients make of it.

  python3 campaign.py DISKGATE WAY READ_PORT WRITE_PORT IMAGE DIRECTORY KEYS TARGETS [SHARE]

  DISKGATE    the program, which is one of the clients, too
  WAY         plain, x509 or psk
  READ_PORT   of a server with the export disk, which is IMAGE
  WRITE_PORT  of a server with the exports w0, w1, ..., which are the files of that name in the directory TARGETS
  DIRECTORY   a client's certificates
  KEYS        a file of pre-shared keys with the identity backup
  SHARE       try so many of a thousand cases (default: 1000)

Each case is one run of a client through a proxy that does harm once. A client may fail; it must not hang, and must not
succeed with wrong data, or at all where TLS has to notice what was changed. Prints a line for each case that goes wrong
and a summary; exits with 1 if there was one.
"""
import collections
import concurrent.futures
import os
import resource
import subprocess
import sys
import tempfile
import threading
import zlib

import proxy

LIMIT_SECONDS = 30
WORKERS = 16
# The first two of messages that repeat; the rest are like them.
COUNT_MAX = 2
# So many messages at the end of each direction may be lost on clients that have what they came for.
LATE = {"c": 3, "s": 3}
CLIENTS = ("read", "map", "convert", "write", "own", "persistent")

Case = collections.namedtuple("Case", "client side name position kind is_late")


class Campaign:
    def __init__(self, diskgate, way, read_port, write_port, image, directory, keys, targets, share="1000"):
        self.diskgate, self.way, self.directory, self.keys, self.targets = diskgate, way, directory, keys, targets
        self.ports = {"write": int(write_port)}
        self.read_port, self.share = int(read_port), int(share)
        with open(image, "rb") as file:
            self.content = file.read()
        self.image = image
        self.work = tempfile.mkdtemp(dir=os.path.dirname(image))
        self.target_count = len(os.listdir(targets))
        self.next_target = 0
        self.lock = threading.Lock()
        self.references = {}

    # ---- clients: a command, and whether what it did is right ----

    def uri(self, port, export):
        if self.way == "plain":
            return f"nbd://127.0.0.1:{port}/{export}"
        if self.way == "x509":
            return f"nbds://127.0.0.1:{port}/{export}?tls-certificates={self.directory}"
        return f"nbds://backup@127.0.0.1:{port}/{export}?tls-psk-file={self.keys}"

    def command(self, client, port, output, export):
        if client == "read":
            return ["nbdcopy", "-C", "1", "--request-size=65536", self.uri(port, export), output]
        if client == "write":
            return ["nbdcopy", "-C", "1", "--flush", "--request-size=65536", self.image, self.uri(port, export)]
        if client in ("own", "persistent"):
            # Without reconnect=0 the next connection, which nobody harms, goes on.
            more = "&connections=1&timeout=10" + ("&reconnect=0" if client == "own" else "")
            uri = self.uri(port, export)
            return [self.diskgate, "cat", uri + (more if "?" in uri else "?" + more[1:])]
        if client == "map":
            return ["nbdinfo", "--map", self.uri(port, export)]
        keys = os.path.dirname(self.keys)
        objects = {"plain": [], "x509": ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={self.directory}"],
                   "psk": ["--object", f"tls-creds-psk,id=t,endpoint=client,dir={keys},username=backup"]}[self.way]
        secure = ",tls-creds=t" if objects else ""
        source = f"driver=nbd,host=127.0.0.1,port={port},export={export}{secure}"
        return ["qemu-img", "convert", *objects, "--image-opts", "-O", "raw", source, output]

    def run(self, client, fault=None, keeps=False, wanted=None):
        """Runs a client through a proxy; what went wrong or None, and the proxy's log."""
        export, output = "disk", ""
        if client == "write":
            with self.lock:
                export = f"w{self.next_target}"
                self.next_target += 1
        else:
            descriptor, output = tempfile.mkstemp(dir=self.work)
            os.close(descriptor)
        middle = proxy.Proxy(("127.0.0.1", self.ports.get(client, self.read_port)), fault, keeps=keeps)
        try:
            command = self.command(client, middle.port, output, export)
            try:
                done = subprocess.run(command, capture_output=True, timeout=LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                return "it hangs", middle.log
            problem = self.judge(client, fault, done, output, export)
            if wanted is False and fault.has_struck and done.returncode == 0:
                problem = "it succeeds, and TLS has not noticed"
            if wanted is True and done.returncode != 0:
                problem = "it fails"
            return problem and f"{problem}; it says: {done.stderr.decode(errors='replace').strip()}", middle.log
        finally:
            middle.close()
            if output:
                os.unlink(output)

    def judge(self, client, fault, done, output, export):
        # In clear text nobody can notice bytes that are other, too few or too many.
        if self.way == "plain" and fault and fault.kind in ("flip", "drop", "double"):
            return None
        if client == "write":
            with open(f"{self.targets}/{export}", "rb") as file:
                written = file.read()
            if done.returncode == 0 and written != self.content:
                return "it succeeds, and the target is wrong"
            if any(byte not in (0x5A, new) for byte, new in zip(written, self.content)):
                return "the target has bytes that nobody wrote"
        elif done.returncode == 0:
            if client in ("own", "persistent"):
                if done.stdout != self.content:
                    return "it succeeds with wrong data"
            elif client == "map":
                if self.references.setdefault(client, done.stdout) != done.stdout:
                    return "it succeeds with a wrong map"
            else:
                with open(output, "rb") as file:
                    if file.read() != self.content:
                        return "it succeeds with a wrong copy"
        return None

    # ---- cases ----

    def points(self, client):
        """Every message of an undisturbed run, as side, name and whether it is one of the last."""
        problem, log = self.run(client, keeps=True, wanted=True)
        if problem:
            raise SystemExit(f"{client} without any fault: {problem}")
        found = []
        for side in "cs":
            names = [name for said_by, name, _ in log if said_by == side]
            if not names:
                raise SystemExit(f"{client}: the proxy has seen nothing")
            found += [(side, name, index >= len(names) - LATE[side]) for index, name in enumerate(names)
                      if int(name.split("#")[1]) < COUNT_MAX or index >= len(names) - 1]
        return found

    def cases(self, client):
        every = []
        for side, name, is_late in self.points(client):
            for kind in proxy.KINDS:
                for position in [0.5] if kind == "delay" else [0, 0.5, 1]:
                    every.append(Case(client, side, name, position, kind, is_late))
        # Which ones are left out is the same in every run.
        return [case for case in every
                if zlib.crc32(f"{self.way} {case}".encode()) % 1000 < self.share or case.kind == "delay"]

    def wanted(self, case):
        """Whether a case has to succeed, or to fail; None where both are right.

        TLS has to notice bytes that are changed in a record which the client cannot do without. libnbd 1.14 is at times
        at odds with an end of the connection that is late.
        """
        if case.is_late:
            return None
        if case.kind == "delay":
            return True
        if self.way == "plain" or case.client == "persistent" or case.kind not in ("flip", "drop", "double"):
            return None
        return False if case.name.startswith(("tls:handshake", "tls:application")) else None

    def attempt(self, case):
        """Runs one case; what went wrong or None, and whether the fault struck."""
        fault = proxy.Fault(case.side, case.name, case.position, case.kind)
        problem, _ = self.run(case.client, fault, wanted=self.wanted(case))
        return problem, fault.has_struck

    def run_all(self):
        cases = [case for client in CLIENTS for case in self.cases(client)]
        writes = [case for case in cases if case.client == "write"]
        room = self.target_count - self.next_target
        if len(writes) > room:
            keep = set(writes[:: -(-len(writes) // room)])
            cases = [case for case in cases if case.client != "write" or case in keep]
        failures = missed = 0
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            for case, (problem, has_struck) in zip(cases, pool.map(self.attempt, cases)):
                missed += not has_struck
                if problem:
                    failures += 1
                    where = f"{case.kind} at {case.position} of {case.side} {case.name}"
                    print(f"not ok {self.way} {case.client}: {where}: {problem}")
        if missed * 10 > len(cases):
            failures += 1
            print(f"not ok {self.way}: {missed} of {len(cases)} faults had nothing to strike")
        print(f"{self.way}: {len(cases)} cases, {missed} without effect, {failures} wrong")
        return failures == 0


if __name__ == "__main__":
    if len(sys.argv) not in (9, 10):
        raise SystemExit(__doc__)
    # nbdcopy 1.14 ends with an assertion when its server vanishes.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raise SystemExit(0 if Campaign(*sys.argv[1:]).run_all() else 1)
