// Ways into a server over TLS, as the usual clients take them: libnbd's URIs and QEMU's objects.
import Glibc

/// How a client shows who it is.
enum Access: CustomStringConvertible, Sendable {
    /// In clear text.
    case plain
    /// Over TLS with the certificates of a directory of `Certificates`; one without a client's shows none.
    case certificate(String)
    /// Over TLS with a pre-shared key: an identity, and a file of `Certificates`.
    case key(String, file: String = "keys")

    var description: String {
        switch self {
        case .plain: "clear text"
        case .certificate(let directory): "certificate \(directory)"
        case .key(let identity, let file): "key of \(identity) in \(file)"
        }
    }

    /// Whether it is in clear text.
    var isPlain: Bool { if case .plain = self { true } else { false } }

    /// The URI of an export for libnbd's programs.
    func uri(socket: String, export: String = "") throws -> String {
        switch self {
        case .plain: "nbd+unix:///\(export)?socket=\(socket)"
        case .certificate(let directory):
            "nbds+unix:///\(export)?socket=\(socket)&tls-certificates=\(try Certificates.made()[directory])"
        case .key(let identity, let file):
            "nbds+unix://\(identity)@/\(export)?socket=\(socket)&tls-psk-file=\(try Certificates.made().psk(file))"
        }
    }

    /// The same over TCP.
    func uri(port: String, export: String = "") throws -> String {
        switch self {
        case .plain: "nbd://localhost:\(port)/\(export)"
        case .certificate(let directory):
            "nbds://localhost:\(port)/\(export)?tls-certificates=\(try Certificates.made()[directory])"
        case .key(let identity, let file):
            "nbds://\(identity)@localhost:\(port)/\(export)?tls-psk-file=\(try Certificates.made().psk(file))"
        }
    }

    /// Arguments of QEMU's programs that define the object `tls`; `priority` is GnuTLS's.
    func qemuObject(_ folder: Folder, priority: String? = nil) throws -> [String] {
        let more = priority.map { ",priority=\($0)" } ?? ""
        switch self {
        case .plain: return []
        case .certificate(let directory):
            // Its own look at the certificates would keep bad ones from the server.
            let path = try Certificates.made()[directory]
            return [
                "--object", "tls-creds-x509,id=tls,endpoint=client,dir=\(path),verify-peer=yes,sanity-check=no\(more)",
            ]
        case .key(let identity, let file):
            // QEMU wants the file to be called keys.psk.
            let directory = folder.file("psk-\(file)")
            try run("mkdir", "-p", directory)
            try run("cp", try Certificates.made().psk(file), "\(directory)/keys.psk")
            return ["--object", "tls-creds-psk,id=tls,endpoint=client,dir=\(directory),username=\(identity)\(more)"]
        }
    }

    /// The image option of QEMU's programs for an export at a Unix socket.
    func qemuImage(socket: String, export: String = "") -> String {
        let target = "driver=nbd,server.type=unix,server.path=\(socket),export=\(export)"
        return switch self {
        case .plain: target
        case .certificate: "\(target),tls-creds=tls,tls-hostname=localhost"
        case .key: "\(target),tls-creds=tls"
        }
    }
}

extension Gateway {
    /// The port of the first TCP address that it serves.
    var port: String? {
        addresses.first { !$0.contains("+unix") }?.split(separator: ":").last.map {
            String($0.prefix { $0 != "/" })
        }
    }

    /// Options that make a server take certificates and pre-shared keys.
    static func tls(certificates: String? = "server", keys: Bool = true) throws -> [String] {
        let made = try Certificates.made()
        return (certificates.map { ["--tls-certificates", made[$0]] } ?? []) + (keys ? ["--tls-psk", made.psk()] : [])
    }
}

/// The directory of the programs in Python that belong to the tests.
let pythonPath = #filePath.split(separator: "/").dropLast(3).reduce("") { "\($0)/\($1)" } + "/Faults"

/// Runs a script with the client of Tests/Faults/wire.py, which it has as `wire`.
@discardableResult
func wire(_ script: String, _ arguments: String...) throws -> Outcome {
    let outcome = try Tool("python3").run(
        ["-c", "import sys, os, time, ssl, struct, wire\nfrom wire import Client, Closed\n" + script] + arguments,
        environment: ["PYTHONPATH=\(pythonPath)", "PYTHONDONTWRITEBYTECODE=1"])
    if outcome.status != 0 {
        throw Trouble("the script failed with \(outcome.status):\n\(outcome.text)\(outcome.errors)")
    }
    return outcome
}
