// Which process a QEMU is, so that after a crash nobody has to guess whether it still runs.
import Block
import Glibc
import LinuxIO

/// A process, told from later ones of the same number by when it began.
struct QEMUIdentity: Sendable, Equatable {
    let process: Int32
    /// Clock ticks from boot to its beginning (proc_pid_stat(5), field 22).
    let began: String

    /// The process that listens on a monitor's socket; nil where that cannot be told.
    init?(_ monitor: QMPClient) {
        guard let peer = monitor.peer, peer.process > 0, let found = Self.look(at: peer.process) else { return nil }
        process = peer.process
        began = found.began
    }

    /// Reads `details`; nil where they name none.
    init?(_ details: [String: String]) {
        guard let process = details["process"].flatMap({ Int32($0) }), process > 0, let began = details["began"] else {
            return nil
        }
        self.process = process
        self.began = began
    }

    /// What an obligation has to say of it.
    var details: [String: String] { ["process": "\(process)", "began": began] }

    /// Whether it still runs; true when that cannot be seen.
    var lives: Bool {
        if kill(process, 0) < 0 && errno == ESRCH { return false }
        guard let found = Self.look(at: process) else { return true }
        return found.began == began && !["Z", "X"].contains(found.state)
    }

    /// State and beginning of a process. Its name stands in parentheses, and may have any characters.
    private static func look(at process: Int32) -> (state: String, began: String)? {
        guard let bytes = try? readSmallFile("/proc/\(process)/stat"),
            let end = bytes.lastIndex(of: UInt8(ascii: ")"))
        else { return nil }
        let words = String(decoding: bytes[(end + 1)...], as: UTF8.self).split { $0.isWhitespace }
        // The first of them is field 3.
        return words.count > 19 ? (String(words[0]), String(words[19])) : nil
    }
}
