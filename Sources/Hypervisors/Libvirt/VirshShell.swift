// A virsh that stays: it loads its libraries and connects once, and is told one command after the other.
import Block
import Glibc
import LinuxIO

/// A virsh that reads commands from a socket. Used by one thread at a time.
///
/// virsh echoes what it reads and says nothing of a command's success but by what it writes to standard error. So
/// echoes of marks stand around each command, on whose line virsh gives up when it does not understand it, and one more
/// on a line of its own. A command is good when both marks around it have come, and no error.
final class VirshShell {
    private let uri: String
    let process: pid_t
    /// What it is told, and its standard output.
    private let talk: Descriptor
    private let errors: Descriptor
    /// What nobody else can write: the output of a command may have any text.
    private let mark = String(UInt32.random(in: .min ... .max), radix: 16)
    private var count = 0
    private var isBroken = false

    /// Seconds that it has for its good-bye.
    private static let endSeconds = 2.0
    /// Bytes that are taken of what it says to one command.
    private static let outputMax = 64 << 20

    /// Starts virsh. Whether it can connect is seen by the first command.
    ///
    /// - Throws: `.notFound` when it is not installed.
    init(_ uri: String) throws(BlockError) {
        self.uri = uri
        let (talk, theirs) = try Self.pair()
        let (errors, theirErrors) = try Self.pair()
        process = try Virsh.starting { () throws(BlockError) in
            try ChildProgram.start(
                ["virsh", "-c", uri], input: theirs.number, output: theirs.number, errors: theirErrors.number,
                environment: Virsh.environment)
        }
        self.talk = talk
        self.errors = errors
    }

    deinit {
        if !isBroken {
            // It leaves the daemon in peace: one that vanishes is an error in the daemon's log. It is not let come to
            // its own end, where it would write these commands into the user's history of virsh.
            _ = try? attempt(["connect", "test:///default"], seconds: Self.endSeconds)
        }
        kill(-process, SIGKILL)
        ChildProgram.reap(process)
    }

    private static func pair() throws(BlockError) -> (Descriptor, Descriptor) {
        var pair: [Int32] = [-1, -1]
        guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0, &pair) == 0 else {
            throw BlockError(errno: errno, "making a socket for virsh")
        }
        return (Descriptor(owning: pair[0]), Descriptor(owning: pair[1]))
    }

    /// Whether words come through as they are: virsh reads them as from a keyboard, where other characters are keys.
    static func canSay(_ words: [String]) -> Bool {
        words.reduce(0) { $0 + $1.utf8.count } < 700 && words.allSatisfy { $0.utf8.allSatisfy { 32..<127 ~= $0 } }
    }

    /// Whether it can be told another command: it runs, has said nothing by itself and has not lost its connection.
    var isFit: Bool {
        if isBroken { return false }
        var ready = [
            pollfd(fd: talk.number, events: 0, revents: 0),
            pollfd(fd: errors.number, events: Int16(POLLIN), revents: 0),
        ]
        return poll(&ready, 2, 0) == 0
    }

    /// Runs a command that may fail.
    ///
    /// - Throws: `BlockError` when virsh does not answer, or not as virsh does: it is of no use any more then.
    func attempt(_ words: [String], seconds: Double) throws(BlockError) -> Virsh.Answer {
        let deadline = monotonicSeconds() + seconds
        count += 1
        // The quotes keep what is echoed of a line from being taken for the mark itself.
        let marks = ["b", "e", "l"].map { (tell: "echo 'dg'\(mark)\($0)\(count)", read: "dg\(mark)\($0)\(count)") }
        let command = words.map {
            "'\($0.split(separator: "'", omittingEmptySubsequences: false).joined(separator: "'\\''"))'"
        }
        let line = "\(marks[0].tell); \(command.joined(separator: " ")); \(marks[1].tell)\n\(marks[2].tell)\n"
        do throws(BlockError) {
            try send(Array(line.utf8))
            let (said, complaint) = try read(until: Array(marks[2].read.utf8), deadline: deadline)
            let failure = Virsh.text(of: complaint)
            // It connects again by itself when it is told the next command, but complains of it then.
            if complaint.firstRange(of: "onnect".utf8) != nil { isBroken = true }
            guard let begin = said.firstRange(of: marks[0].read.utf8),
                let end = said.firstRange(of: marks[1].read.utf8),
                begin.upperBound <= end.lowerBound, !Virsh.isError(complaint)
            else {
                if failure.isEmpty { throw BlockError(.corrupt, "it says nothing of the command's end, nor an error") }
                return Virsh.Answer(isGood: false, output: "", errors: failure)
            }
            return Virsh.Answer(
                isGood: true, output: Virsh.output(said[begin.upperBound..<end.lowerBound]), errors: failure)
        } catch {
            isBroken = true
            throw error.during("virsh \(words.prefix(2).joined(separator: " ")) at \(uri)")
        }
    }

    private func send(_ bytes: [UInt8]) throws(BlockError) {
        // One line is far smaller than what a socket takes at once, and each was read before the next is written.
        let sent = bytes.withUnsafeBytes {
            Glibc.send(talk.number, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
        }
        if sent != bytes.count { throw BlockError(.shutdown, "it takes no commands") }
    }

    /// What it says until a mark, or until it ends; and what it complains of meanwhile.
    private func read(until mark: [UInt8], deadline: Double) throws(BlockError) -> (said: [UInt8], complaint: [UInt8]) {
        var (said, complaint): ([UInt8], [UInt8]) = ([], [])
        while true {
            let left = deadline - monotonicSeconds()
            if left <= 0 { throw BlockError(.inputOutput, "it does not answer") }
            var ready = [talk, errors].map { pollfd(fd: $0.number, events: Int16(POLLIN), revents: 0) }
            if poll(&ready, 2, Int32(min(left, 3600) * 1000) + 1) <= 0 { continue }
            let searched = max(0, said.count - mark.count)
            let isOpen = take(from: talk, into: &said)
            let hasMark = said[searched...].firstRange(of: mark) != nil
            // virsh writes an error before it reads the next line, and so before the last mark.
            _ = take(from: errors, into: &complaint)
            if said.count + complaint.count > Self.outputMax { throw BlockError(.tooLarge, "its answer has no end") }
            if hasMark { return (said, complaint) }
            if !isOpen {
                isBroken = true
                if complaint.isEmpty { throw BlockError(.shutdown, "it has ended by itself") }
                return (said, complaint)
            }
        }
    }

    /// Takes what has come.
    ///
    /// - Returns: whether more may come.
    private func take(from socket: Descriptor, into bytes: inout [UInt8]) -> Bool {
        var buffer = [UInt8](repeating: 0, count: 32768)
        while bytes.count <= Self.outputMax {
            let got = recv(socket.number, &buffer, buffer.count, Int32(MSG_DONTWAIT))
            if got <= 0 { return got < 0 && [EAGAIN, EINTR].contains(errno) }
            bytes += buffer[..<got]
        }
        return true
    }
}
