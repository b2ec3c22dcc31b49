// Stands between an initiator and a target, and spoils reads of one block: a target that is broken in one way.
import Block
import Glibc
import LinuxIO
import Support
import Synchronization

/// Passes iSCSI connections to a target on, one at a time. Reads (READ(16)) that begin at one block are spoiled.
final class ISCSIRelay: Sendable {
    enum Fault: Sendable {
        /// The connection is closed on both sides instead.
        case closes
        /// The target is asked for half as much, so that its answer is shorter, without a residual count.
        case shortens
        /// The target is not asked; pieces of an answer come without end.
        case floods
        /// As `closes`; and the unit tells none of its pages, so that nothing names it.
        case closesNameless
    }

    /// Bytes of a flood, where nobody ends it: far more than is asked for, and few enough for any machine's memory.
    private static let floodMax = 128 << 20
    /// Bytes of it that come without a pause: more than any answer may have.
    private static let burst = 4 << 20

    let port: UInt16
    /// Reads that were spoiled.
    let spoiled = Atomic<Int>(0)
    private let isStopped = Atomic<Bool>(false)
    private let socket: ListeningSocket
    private let target: UInt16
    private let block: UInt64
    private let fault: Fault

    init(to target: UInt16, spoiling block: UInt64, _ fault: Fault) throws {
        guard let socket = try ListeningSocket.listen(on: .tcp(host: "127.0.0.1", port: 0)).first,
            case .tcp(_, let port) = socket.address
        else { throw CheckFailure("no socket") }
        (self.socket, self.port, self.target, self.block, self.fault) = (socket, port, target, block, fault)
        try startThread(name: "relay") { self.run() }
    }

    func stop() { isStopped.store(true, ordering: .relaxed) }

    private func run() {
        while !isStopped.load(ordering: .relaxed) {
            guard hasInput([socket.descriptor.number])[0] else { continue }
            let number = accept(socket.descriptor.number, __SOCKADDR_ARG(), nil)
            if number < 0 { continue }
            let client = Descriptor(owning: number)
            let address = ServerAddress.tcp(host: "127.0.0.1", port: target)
            guard let server = try? connect(to: address, deadline: monotonicSeconds() + 10) else { continue }
            for end in [client.number, server.number] {
                _ = fcntl(end, F_SETFL, fcntl(end, F_GETFL) & ~O_NONBLOCK)
            }
            pass(client.number, server.number)
        }
    }

    /// Which of some sockets have something to read, after at most 50 ms.
    private func hasInput(_ sockets: [Int32]) -> [Bool] {
        var polled = sockets.map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
        _ = poll(&polled, nfds_t(polled.count), 50)
        return polled.map { $0.revents != 0 }
    }

    private func pass(_ client: Int32, _ server: Int32) {
        var asked: [UInt8] = []
        while !isStopped.load(ordering: .relaxed) {
            let ready = hasInput([client, server])
            if ready[1] {
                guard let bytes = receive(server), sendAll(client, bytes) else { return }
            }
            if ready[0] {
                guard let bytes = receive(client) else { return }
                asked += bytes
                while asked.count >= 48 {
                    let data = Int(asked[5]) << 16 | Int(asked[6]) << 8 | Int(asked[7])
                    let length = 48 + Int(asked[4]) * 4 + (data + 3) / 4 * 4
                    if asked.count < length { break }
                    guard let message = spoil(Array(asked[..<length]), client), sendAll(server, message) else { return }
                    asked.removeFirst(length)
                }
            }
        }
    }

    /// The message to pass on; nil to close.
    private func spoil(_ message: [UInt8], _ client: Int32) -> [UInt8]? {
        if fault == .closesNameless, message[0] & 0x3F == 1, message[32] == 0x12, message[33] == 1 {
            // A page that no unit has.
            return Array(message[..<34]) + [0xFE] + message[35...]
        }
        let first = message[34..<42].reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        guard message[0] & 0x3F == 1, message[32] == 0x88, first == block else { return message }
        spoiled.add(1, ordering: .relaxed)
        if fault == .floods { flood(client, answering: message) }
        if fault != .shortens { return nil }
        // Both the expected length and the command's number of blocks.
        var message = message
        for offset in [20, 42] {
            let half = message[offset..<(offset + 4)].reduce(UInt32(0)) { $0 << 8 | UInt32($1) } / 2
            for index in 0..<4 { message[offset + index] = UInt8(truncatingIfNeeded: half >> (24 - 8 * index)) }
        }
        return message
    }

    /// Sends pieces of data of a command, none of which is the last (RFC 7143, 11.7).
    private func flood(_ client: Int32, answering message: [UInt8]) {
        let length = 65536
        var piece: [UInt8] = [0x25, 0, 0, 0, 0, UInt8(length >> 16), UInt8(length >> 8 & 255), UInt8(length & 255)]
        piece += [UInt8](repeating: 0, count: 8) + message[16..<20] + [UInt8](repeating: 0xFF, count: 4)
        piece += [UInt8](repeating: 0, count: 24 + length)
        var sent = 0
        while sent < Self.floodMax, !isStopped.load(ordering: .relaxed), sendAll(client, piece) {
            sent += piece.count
            // libiscsi reads until there is nothing, and only then can be counted what it has read.
            if sent / Self.burst > (sent - piece.count) / Self.burst { usleep(50_000) }
        }
    }

    private func receive(_ socket: Int32) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: 65536)
        let count = recv(socket, &bytes, bytes.count, 0)
        return count > 0 ? Array(bytes[..<count]) : nil
    }

    private func sendAll(_ socket: Int32, _ bytes: [UInt8]) -> Bool {
        var rest = bytes[...]
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes { send(socket, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL)) }
            if count <= 0 { return false }
            rest = rest.dropFirst(count)
        }
        return true
    }
}
