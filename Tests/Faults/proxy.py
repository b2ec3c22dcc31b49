"""proxy: stands between an NBD client and a server, knows the protocol's messages, and does harm at a chosen one.

  python3 proxy.py record SOCKET TARGET FILE     passes on what is said between SOCKET and TARGET, and keeps it in
                                                 FILE.client and FILE.server

A fault strikes the first message of a name in one direction, so it hits the same point in every run, however the bytes
arrive. Names: greeting, flags, option:GO#0, reply:GO#1, tls:handshake#0, tls:application#3,
request:READ#0, payload:WRITE#0, simple#0, chunk:DATA#0, data#0; `#N` counts the messages of a name and direction.
"""
import os
import select
import socket
import struct
import sys
import threading
import time

OPTIONS = {1: "EXPORT_NAME", 2: "ABORT", 3: "LIST", 5: "STARTTLS", 6: "INFO", 7: "GO", 8: "STRUCTURED_REPLY",
           9: "LIST_META_CONTEXT", 10: "SET_META_CONTEXT", 11: "EXTENDED_HEADERS"}
COMMANDS = {0: "READ", 1: "WRITE", 2: "DISC", 3: "FLUSH", 4: "TRIM", 5: "CACHE", 6: "WRITE_ZEROES", 7: "BLOCK_STATUS"}
CHUNKS = {0: "NONE", 1: "DATA", 2: "HOLE", 5: "STATUS", 6: "STATUS_EXT", 0x8001: "ERROR", 0x8002: "ERROR_OFFSET"}
RECORDS = {20: "change", 21: "alert", 22: "handshake", 23: "application"}
KINDS = ("fin", "reset", "truncate", "delay", "flip", "drop", "double")
# After a fault that takes bytes away both sides may wait for ever; the proxy then ends what is still open.
QUIET_SECONDS = 0.5


class Fault:
    """What is done to one message.

    side: c for the client's messages, s for the server's. name: the message's. position: 0 to 1 within it; 1 is behind
    it. kind: fin and reset end both connections, truncate this direction only, delay waits, flip changes a bit,
    drop takes bytes out, double sends them twice.
    """

    def __init__(self, side, name, position, kind):
        self.side, self.name, self.position, self.kind = side, name, position, kind
        self.has_struck = False

    def __str__(self):
        return f"{self.kind} at {self.position} of {self.side} {self.name}"


class Dissector:
    """Cuts both directions of one conversation into messages with names."""

    def __init__(self):
        self.phase = "handshake"
        self.is_extended = False
        self.buffers = {"c": bytearray(), "s": bytearray()}
        self.counts = {}
        self.expected = {"c": "flags", "s": "greeting"}
        # Transmission: lengths of reads by cookie, and payloads that follow a header.
        self.reads = {}
        self.pending = {"c": 0, "s": 0}

    def split(self, side, data):
        """The messages that are complete now, as pairs of name and bytes."""
        buffer = self.buffers[side]
        buffer += data
        messages = []
        while buffer:
            found = self.next(side, buffer)
            if not found:
                break
            name, length = found
            if len(buffer) < length:
                break
            message = bytes(buffer[:length])
            del buffer[:length]
            self.taken(side, name, message)
            count = self.counts[side, name] = self.counts.get((side, name), -1) + 1
            messages.append((f"{name}#{count}", message))
        return messages

    def rest(self, side):
        rest = bytes(self.buffers[side])
        self.buffers[side].clear()
        return rest

    def next(self, side, buffer):
        """Name and length of the message that begins a buffer; None while that is not known."""
        if self.pending[side]:
            return "data" if side == "s" else "payload:WRITE", self.pending[side]
        if self.expected[side] == "greeting":
            return "greeting", 18
        if self.expected[side] == "flags":
            return "flags", 4
        if self.phase == "tls":
            if len(buffer) < 5:
                return None
            return "tls:" + RECORDS.get(buffer[0], "other"), 5 + struct.unpack(">H", buffer[3:5])[0]
        if self.phase == "handshake":
            header = 16 if side == "c" else 20
            if len(buffer) < header:
                return None
            option, length = struct.unpack(">I", buffer[8:12])[0], struct.unpack(">I", buffer[header - 4 : header])[0]
            kind = "option:" if side == "c" else "reply:"
            return kind + OPTIONS.get(option, "other"), header + length
        if side == "c" or self.is_extended:
            length = 32 if self.is_extended else 28
            if len(buffer) < length:
                return None
            prefix, kinds = ("request:", COMMANDS) if side == "c" else ("chunk:", CHUNKS)
            return prefix + kinds.get(struct.unpack(">H", buffer[6:8])[0], "other"), length
        if len(buffer) < 20 and (len(buffer) < 4 or buffer[:4] == b"\x66\x8e\x33\xef"):
            return None
        if buffer[:4] == b"\x67\x44\x66\x98":
            return "simple", 16
        if buffer[:4] == b"\x66\x8e\x33\xef":
            return "chunk:" + CHUNKS.get(struct.unpack(">H", buffer[6:8])[0], "other"), 20
        return "other", len(buffer)

    def taken(self, side, name, message):
        """Goes on behind a message."""
        if name in ("greeting", "flags"):
            self.expected[side] = None
        elif self.pending[side]:
            self.pending[side] = 0
        elif self.phase == "handshake" and side == "s" and struct.unpack(">I", message[12:16])[0] == 1:
            if name == "reply:STARTTLS":
                self.phase = "tls"
            elif name == "reply:GO":
                self.phase = "transmission"
            elif name == "reply:EXTENDED_HEADERS":
                self.is_extended = True
        elif self.phase == "transmission":
            if self.is_extended:
                # Only what is said to have a payload has one; the flag is NBD_CMD_FLAG_PAYLOAD_LEN.
                if side == "s" or struct.unpack(">H", message[4:6])[0] & 32:
                    self.pending[side] = struct.unpack(">Q", message[24:32])[0]
            elif side == "c":
                command, cookie, _, length = struct.unpack(">HQQI", message[6:28])
                if command == 1:
                    self.pending["c"] = length
                elif command == 0:
                    self.reads[cookie] = length
            elif name == "simple":
                error, cookie = struct.unpack(">IQ", message[4:16])
                self.pending["s"] = self.reads.pop(cookie, 0) if error == 0 else 0
            elif name.startswith("chunk:"):
                self.pending["s"] = struct.unpack(">I", message[16:20])[0]


class Link:
    """One client's conversation through the proxy."""

    def __init__(self, proxy, client):
        self.proxy = proxy
        self.sockets = {"c": client}
        self.dissector = Dissector()
        self.lock = threading.Lock()
        self.is_open = True
        self.last_traffic = time.monotonic()

    def run(self):
        try:
            self.sockets["s"] = open_socket(self.proxy.target)
        except OSError:
            self.sockets["c"].close()
            return
        other = threading.Thread(target=self.pump, args=("s",), daemon=True)
        other.start()
        self.pump("c")
        other.join()
        for end in self.sockets.values():
            end.close()

    def pump(self, side):
        """Passes on what one side says, until it has said everything or the proxy ends the link."""
        source, sink = self.sockets[side], self.sockets["s" if side == "c" else "c"]
        try:
            while data := self.wait_for(source):
                with self.lock:
                    messages = self.dissector.split(side, data)
                self.pass_on(side, messages, sink)
            with self.lock:
                rest = self.dissector.rest(side)
            self.pass_on(side, [("rest#0", rest)] if rest else [], sink)
            sink.shutdown(socket.SHUT_WR)
        except (OSError, ValueError, Truncated):
            # What this side says has nowhere to go any more; the other side is heard to its end.
            while self.wait_for(source):
                pass

    def wait_for(self, source):
        """What a side says next; nothing when it, or the link, is at its end."""
        try:
            while self.is_open:
                if select.select([source], [], [], 0.1)[0]:
                    data = source.recv(1 << 18)
                    self.last_traffic = time.monotonic()
                    return data
                if self.proxy.waits_in_vain and time.monotonic() - self.last_traffic > QUIET_SECONDS:
                    self.end()
        except (OSError, ValueError):
            pass
        return b""

    def pass_on(self, side, messages, sink):
        for name, message in messages:
            if self.proxy.log is not None:
                self.proxy.log.append((side, name, message))
            if self.proxy.strikes(side, name):
                self.harm(message, sink)
            elif self.is_open:
                sink.sendall(message)

    def harm(self, message, sink):
        fault = self.proxy.fault
        at = min(len(message), int(len(message) * fault.position))
        if fault.kind in ("fin", "reset", "truncate", "delay"):
            sink.sendall(message[:at])
            if fault.kind == "delay":
                time.sleep(0.3)
                sink.sendall(message[at:])
            elif fault.kind == "truncate":
                sink.shutdown(socket.SHUT_WR)
                raise Truncated()
            else:
                self.end(resets=fault.kind == "reset")
            return
        at = min(at, len(message) - 1)
        some = message[at : at + 7]
        if fault.kind == "flip":
            sink.sendall(message[:at] + bytes([message[at] ^ 4]) + message[at + 1 :])
        elif fault.kind == "drop":
            sink.sendall(message[:at] + message[at + 7 :])
        else:
            sink.sendall(message[: at + len(some)] + some + message[at + len(some) :])

    def end(self, resets=False):
        """Ends both connections."""
        self.is_open = False
        for end in self.sockets.values():
            try:
                if resets:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.close()
                else:
                    end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Truncated(Exception):
    """A direction was ended on purpose."""


class Proxy:
    """Listens and passes on; with a fault, does harm once. `log` has all messages if they are kept."""

    def __init__(self, target, fault=None, path=None, keeps=False):
        self.target, self.fault, self.log = target, fault, [] if keeps else None
        self.lock = threading.Lock()
        if path:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(path)
            self.listener.listen(128)
        else:
            self.listener = socket.create_server(("127.0.0.1", 0))
            self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def waits_in_vain(self):
        """Whether bytes were changed, so that both sides may wait for the other."""
        return self.fault is not None and self.fault.has_struck and self.fault.kind != "delay"

    def strikes(self, side, name):
        """Whether the fault is for this message, which is true once."""
        fault = self.fault
        if not fault or fault.has_struck or (side, name) != (fault.side, fault.name):
            return False
        with self.lock:
            struck, fault.has_struck = fault.has_struck, True
            return not struck

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=Link(self, client).run, daemon=True).start()

    def close(self):
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()


def open_socket(address):
    if isinstance(address, str):
        made = socket.socket(socket.AF_UNIX)
        made.connect(address)
        return made
    made = socket.create_connection(address)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def record(path, target, file):
    """Passes on, and appends everything that is said to a file of its side before the other side hears of it."""
    logs = [open(f"{file}.{side}", "ab", buffering=0) for side in ("client", "server")]
    listener = socket.socket(socket.AF_UNIX)
    # Under another name until it listens: who finds the socket can connect.
    listener.bind(path + ".new")
    listener.listen(128)
    os.rename(path + ".new", path)

    def pump(source, sink, log):
        is_heard = True
        while True:
            try:
                data = source.recv(1 << 18)
            except OSError:
                data = b""
            log.write(data)
            try:
                if not data:
                    return sink.shutdown(socket.SHUT_WR)
                if is_heard:
                    sink.sendall(data)
            except OSError:
                # The other side has gone; what it said last may still be on its way.
                is_heard = False
                if not data:
                    return

    while True:
        client, _ = listener.accept()
        server = open_socket(target)
        for ends in ((client, server, logs[0]), (server, client, logs[1])):
            threading.Thread(target=pump, args=ends, daemon=True).start()


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] != "record":
        raise SystemExit(__doc__)
    record(*sys.argv[2:])
