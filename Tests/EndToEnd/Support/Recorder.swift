// What is on the wire between a client and a server: a proxy in between that keeps every byte of both directions.
import Glibc

/// A proxy in front of a server's Unix socket that records what is said.
final class Recorder {
    /// Where clients connect.
    let socket: String
    private let file: String
    private let pid: pid_t
    private let output: Int32

    init(in folder: Folder, before target: String, name: String = "recorder") throws {
        socket = folder.file(name)
        file = folder.file("\(name)-kept")
        output = try namelessFile()
        pid = try Tool("python3").start(
            ["\(pythonPath)/proxy.py", "record", socket, target, file], output: output, errors: output)
        let path = socket
        guard eventually({ access(path, F_OK) == 0 }) else { throw Trouble("the recorder does not listen") }
    }

    deinit {
        kill(pid, SIGKILL)
        var state: Int32 = 0
        waitpid(pid, &state, 0)
        close(output)
    }

    /// Who says something.
    enum Side: String, CaseIterable { case client, server }

    /// How often bytes occur in what one side said.
    func count(of bytes: [UInt8], from side: Side) throws -> Int {
        let script = "import sys; print(open(sys.argv[1], 'rb').read().count(bytes.fromhex(sys.argv[2])))"
        let hexadecimal = bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
        let outcome = try Tool("python3").run(["-c", script, "\(file).\(side)", hexadecimal])
        guard outcome.status == 0, let count = Int(outcome.text.filter(\.isNumber)) else {
            throw Trouble("reading a recording: \(outcome.errors)")
        }
        return count
    }
}
