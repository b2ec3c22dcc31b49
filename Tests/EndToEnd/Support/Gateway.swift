// `diskgate serve` for one test: started, waited for, stopped by its process id, and expected to end well.
import Glibc

/// A running server.
final class Gateway {
    let folder: Folder
    private let errors: Int32
    let pid: pid_t
    private var status: Int32?

    /// The path of its Unix socket; `uri` and `log` tell of others.
    var socket: String { folder.file("socket") }

    /// Starts a server and waits until it listens. Without `--listen` among the arguments it is a Unix socket.
    init(_ arguments: [String], in folder: Folder, environment: [String] = []) throws {
        self.folder = folder
        errors = try namelessFile()
        let listen = arguments.contains("--listen") ? [] : ["--listen", "unix:\(folder.file("socket"))"]
        pid = try Tool.diskgate.start(
            ["serve"] + listen + arguments, output: errors, errors: errors, environment: environment)
        // One line for each address, written one after the other.
        let addressCount = max(1, arguments.count { $0 == "--listen" })
        for _ in 0..<10_000 {
            if addresses.count >= addressCount { return }
            var state: Int32 = 0
            if waitpid(pid, &state, WNOHANG) == pid {
                status = (state >> 8) & 0xFF
                throw Trouble("the server ended with \(status ?? -1): \(log)")
            }
            usleep(2000)
        }
        throw Trouble("the server does not listen: \(log)")
    }

    deinit {
        if status == nil {
            kill(pid, SIGKILL)
            var state: Int32 = 0
            waitpid(pid, &state, 0)
        }
        close(errors)
    }

    /// What it has said.
    var log: String { (try? content(of: errors)).map { String(decoding: $0, as: UTF8.self) } ?? "" }

    /// Addresses that it says it serves, as URIs without an export's name.
    var addresses: [String] {
        log.split(separator: "\n").filter { $0.contains("serving ") }.compactMap {
            $0.split(separator: " ").last.map(String.init)
        }
    }

    /// The URI of an export on its Unix socket.
    func uri(_ export: String = "") -> String { "nbd+unix:///\(export)?socket=\(socket)" }

    func signal(_ number: Int32) { kill(pid, number) }

    /// Waits for its end.
    func end() throws -> Int32 {
        if let status { return status }
        let ended = try waitForEnd(of: pid, what: "the server")
        status = ended
        return ended
    }

    /// Stops it.
    func stop() throws -> Int32 {
        signal(SIGTERM)
        return try end()
    }
}

/// Runs a body while `diskgate serve` runs, which must then stop with status 0.
func serving(_ arguments: [String], in folder: Folder, _ body: (Gateway) throws -> Void) throws {
    let gateway = try Gateway(arguments, in: folder)
    try body(gateway)
    let status = try gateway.stop()
    if status != 0 { throw Trouble("the server ended with \(status): \(gateway.log)") }
}

/// Waits until something is true, at most 20 s.
func eventually(_ isTrue: () throws -> Bool) rethrows -> Bool {
    for _ in 0..<1000 {
        if try isTrue() { return true }
        usleep(20_000)
    }
    return try isTrue()
}
