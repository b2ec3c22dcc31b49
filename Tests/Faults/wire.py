"""wire: an NBD client that is in control of every byte, in clear text and over TLS.

Tests use it where libnbd and QEMU are too well behaved: to send in pieces, to stop half-way, to look at certificates
and alerts, and at everything that the server sent before TLS began.
"""
import hashlib
import os
import socket
import ssl
import struct
import time

INIT_MAGIC, OPTION_MAGIC, REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", struct.pack(">Q", 0x3E889045565A9)
REQUEST_MAGIC, SIMPLE_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY = 1, 2, 3, 5, 6, 7, 8
ACK, SERVER = 1, 2
ERR_POLICY, ERR_TLS_REQUIRED, ERR_UNKNOWN = 0x80000002, 0x80000005, 0x80000006
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3
LIMIT_SECONDS = 30


class Closed(Exception):
    """The server has closed the connection, or it broke."""


def connect(address):
    """A socket connected to a path or to a (host, port)."""
    if isinstance(address, str):
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(LIMIT_SECONDS)
        made.connect(address)
        return made
    made = socket.create_connection(address, LIMIT_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def client_context(directory, certificate=None, minimum=None, maximum=None):
    """A context that trusts a directory's authority and shows a client's certificate, by default of the same one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(f"{directory}/ca-cert.pem")
    shown = directory if certificate is None else certificate
    if shown and os.path.exists(f"{shown}/client-cert.pem"):
        context.load_cert_chain(f"{shown}/client-cert.pem", f"{shown}/client-key.pem")
    if minimum:
        context.minimum_version = minimum
    if maximum:
        context.maximum_version = maximum
    return context


def certificate_digest(path):
    """The SHA-256 of the first certificate in a file."""
    with open(path) as file:
        text = file.read()
    end = "-----END CERTIFICATE-----"
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN") : text.index(end)] + end)).hexdigest()


class Client:
    """A connection. `wire` is what arrived, as it was on the wire."""

    def __init__(self, address, flags=3, greets=True):
        self.socket = connect(address)
        self.tls = None
        self.wire = bytearray()
        self.plain = bytearray()
        self.cookie = 0
        if greets:
            greeting = self.receive(18)
            assert greeting[:16] == INIT_MAGIC + OPTION_MAGIC, greeting
            self.send(struct.pack(">I", flags))

    # ---- bytes ----

    def send(self, data, piece=None, pause=0):
        """Sends bytes; with `piece`, so many at a time on the wire."""
        if self.tls:
            view = memoryview(data)
            while view:
                view = view[self.tls.write(view) :]
            data = self.outgoing.read()
        self.send_raw(data, piece, pause)

    def send_raw(self, data, piece=None, pause=0):
        try:
            for start in range(0, len(data), piece or max(1, len(data))):
                self.socket.sendall(data[start : start + (piece or len(data))])
                if pause:
                    time.sleep(pause)
        except OSError as error:
            raise Closed(str(error)) from error

    def receive_raw(self):
        try:
            data = self.socket.recv(1 << 18)
        except OSError as error:
            raise Closed(str(error)) from error
        self.wire += data
        return data

    def receive(self, count):
        while len(self.plain) < count:
            data = self.receive_some()
            if not data:
                raise Closed("end of stream")
        data = bytes(self.plain[:count])
        del self.plain[:count]
        return data

    def receive_some(self):
        """More plain bytes, also appended to `plain`; nothing at the end of the stream."""
        if not self.tls:
            data = self.receive_raw()
            self.plain += data
            return data
        while True:
            try:
                data = self.tls.read(1 << 18)
                self.plain += data
                if not data:
                    self.saw_close_notify = True
                return data
            except ssl.SSLWantReadError:
                self.flush_tls()
                more = self.receive_raw()
                if not more:
                    return b""
                self.incoming.write(more)
            except ssl.SSLZeroReturnError:
                self.saw_close_notify = True
                return b""

    def flush_tls(self, piece=None, pause=0):
        data = self.outgoing.read()
        if data:
            self.send_raw(data, piece, pause)

    saw_close_notify = False

    def drain(self):
        """Receives until the end of the stream; everything that came."""
        try:
            while self.receive_some():
                pass
        except (Closed, ssl.SSLError):
            pass
        return bytes(self.plain)

    def close(self):
        self.socket.close()

    def reset(self):
        """Ends the connection with a reset, where the socket can."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # ---- the handshake ----

    def ask(self, option, data=b""):
        """Sends an option and returns its replies as pairs of type and data."""
        self.send(OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)
        replies = []
        while True:
            header = self.receive(20)
            assert header[:8] == REPLY_MAGIC, header
            answered, kind, length = struct.unpack(">III", header[8:])
            assert answered == option
            replies.append((kind, self.receive(length)))
            if kind == ACK or kind >> 31:
                return replies

    def start_tls(self, context, host="localhost", piece=None, pause=0, asks=True):
        """NBD_OPT_STARTTLS and the handshake of TLS."""
        if asks:
            replies = self.ask(STARTTLS)
            assert replies == [(ACK, b"")], replies
        assert not self.plain, "the server sent something between its acknowledgement and TLS"
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=host)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.flush_tls(piece, pause)
                data = self.receive_raw()
                if not data:
                    raise Closed("end of stream in the handshake of TLS")
                self.incoming.write(data)
        self.flush_tls(piece, pause)
        self.tls = tls
        return self

    @property
    def server_certificate(self):
        """The SHA-256 of the certificate that the server showed."""
        return hashlib.sha256(self.tls.getpeercert(binary_form=True)).hexdigest()

    def list(self):
        """Names of exports, or the type of the refusal."""
        replies = self.ask(LIST)
        if replies[-1][0] != ACK:
            return replies[-1][0]
        return [data[4 : 4 + struct.unpack(">I", data[:4])[0]].decode() for _, data in replies[:-1]]

    def go(self, name=""):
        """Chooses an export; its size, or the type of the refusal."""
        raw = name.encode()
        replies = self.ask(GO, struct.pack(">I", len(raw)) + raw + b"\0\0")
        if replies[-1][0] != ACK:
            return replies[-1][0]
        info = next(data for _, data in replies if data[:2] == b"\0\0")
        self.flags = struct.unpack(">H", info[10:12])[0]
        return struct.unpack(">Q", info[2:10])[0]

    # ---- transmission, with simple replies ----

    def request(self, command, offset=0, length=0, payload=b"", piece=None):
        self.cookie += 1
        header = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, self.cookie, offset, length)
        self.send(header + payload, piece)

    def reply(self, length=0):
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == SIMPLE_MAGIC
        return (error, self.receive(length) if error == 0 else b"")

    def read(self, offset, length):
        self.request(READ, offset, length)
        error, data = self.reply(length)
        assert error == 0, error
        return data

    def write(self, offset, data, piece=None):
        self.request(WRITE, offset, len(data), data, piece)
        error, _ = self.reply()
        assert error == 0, error

    def leave(self):
        """NBD_CMD_DISC, and whatever comes until the end of the stream."""
        self.request(DISC)
        rest = self.drain()
        self.close()
        return rest
