"""Which TLS version and cipher suite a server agrees to with libnbd's clients: the ServerHello is not encrypted."""

import socket
import subprocess
import threading

from .process import BenchError
from .servers import Export, RunningServer

GREETING_BYTES = 18
OPTION_REPLY_BYTES = 20  # the acknowledgement of STARTTLS
RECORD_HANDSHAKE, SERVER_HELLO, EXTENSION_SUPPORTED_VERSIONS = 22, 2, 43
TIMEOUT_SECONDS = 20

VERSIONS = {0x0303: "TLS 1.2", 0x0304: "TLS 1.3"}
SUITES = {
    0x1301: "AES-128-GCM-SHA256", 0x1302: "AES-256-GCM-SHA384", 0x1303: "CHACHA20-POLY1305-SHA256",
    0x1304: "AES-128-CCM-SHA256",
    0xC02B: "ECDHE-ECDSA-AES-128-GCM-SHA256", 0xC02C: "ECDHE-ECDSA-AES-256-GCM-SHA384",
    0xCCA9: "ECDHE-ECDSA-CHACHA20-POLY1305", 0xC02F: "ECDHE-RSA-AES-128-GCM-SHA256",
    0xC030: "ECDHE-RSA-AES-256-GCM-SHA384", 0xCCA8: "ECDHE-RSA-CHACHA20-POLY1305",
    0xCCAC: "ECDHE-PSK-CHACHA20-POLY1305", 0x00A8: "PSK-AES-128-GCM-SHA256", 0x00A9: "PSK-AES-256-GCM-SHA384",
}


def chosen_cipher(running: RunningServer) -> str:
    """Lets nbdinfo, whose TLS is nbdcopy's, talk to the server through a relay that reads along."""
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_SECONDS)
        relay = threading.Thread(target=_relay, args=(listener, running.export, heard))
        relay.start()
        through = Export(running.export.path, running.export.format, False, None, listener.getsockname()[1],
                         running.export.tls)
        try:
            subprocess.run(["nbdinfo", "--size", through.uri(running.server.export_name)], check=True,
                           capture_output=True, timeout=TIMEOUT_SECONDS)
        except subprocess.SubprocessError as error:
            raise BenchError(f"nbdinfo to find the cipher: {error}") from None
        finally:
            relay.join()
    return _describe(bytes(heard))


def _relay(listener: socket.socket, export: Export, heard: bytearray):
    """One client's bytes to the server and back, until either hangs up."""
    try:
        client, _ = listener.accept()
    except TimeoutError:
        return
    where = ("127.0.0.1", export.port) if export.socket_path is None else str(export.socket_path)
    server = socket.socket(socket.AF_INET if export.socket_path is None else socket.AF_UNIX)
    with client, server:
        server.connect(where)
        forth = threading.Thread(target=_forward, args=(client, server, None))
        forth.start()
        _forward(server, client, heard)
        forth.join()


def _forward(source: socket.socket, sink: socket.socket, heard: bytearray | None):
    source.settimeout(TIMEOUT_SECONDS)
    try:
        while data := source.recv(1 << 16):
            if heard is not None:
                heard += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other side is gone; what was heard is enough


def _describe(heard: bytes) -> str:
    """Takes apart the ServerHello (RFC 8446, section 4.1.3)."""
    record = heard[GREETING_BYTES + OPTION_REPLY_BYTES:]
    hello = record[5:]
    try:
        if record[0] != RECORD_HANDSHAKE or hello[0] != SERVER_HELLO:
            return "unknown (no ServerHello after STARTTLS)"
        version = int.from_bytes(hello[4:6], "big")
        at = 4 + 2 + 32  # header, version, random
        at += 1 + hello[at]  # session id
        suite = int.from_bytes(hello[at:at + 2], "big")
        at += 3  # and the compression
        end = at + 2 + int.from_bytes(hello[at:at + 2], "big")
        at += 2
        while at < end:
            kind, length = int.from_bytes(hello[at:at + 2], "big"), int.from_bytes(hello[at + 2:at + 4], "big")
            if kind == EXTENSION_SUPPORTED_VERSIONS:
                version = int.from_bytes(hello[at + 4:at + 6], "big")
            at += 4 + length
    except IndexError:
        return "unknown (the ServerHello is cut)"
    return f"{VERSIONS.get(version, f'version {version:#x}')}, {SUITES.get(suite, f'suite {suite:#06x}')}"
