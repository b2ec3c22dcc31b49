// Answers GET /metrics: a small HTTP/1.1 responder that takes little from whoever connects and waits for nobody long.
import Block
import CLinux
import Glibc
import LinuxIO
import Logging
import NBD
import Synchronization

/// Serves metrics over HTTP. Each connection is answered once and closed.
final class MetricsServer: Sendable {
    /// The longest request head in bytes: a scraper's is a few hundred.
    static let headMax = 8192
    /// The most connections at once: one for each scraper that a server can have in earnest, and some to spare.
    static let connectionsMax = 8
    /// Seconds that a connection may take in all, sending among it: scrapers themselves give up after 10.
    static let seconds = 10.0

    private let sockets: [ListeningSocket]
    private let log: Logger
    private let content: @Sendable () -> String
    private let connections = Atomic<Int>(0)
    private let isStopping = Atomic<Bool>(false)

    /// Listens from now on.
    ///
    /// - Parameter content: makes the text of a scrape.
    /// - Throws: `BlockError` when it cannot listen there.
    init(_ address: ListenAddress, log: Logger, content: @escaping @Sendable () -> String) throws(BlockError) {
        sockets = try ListeningSocket.listen(on: address)
        self.log = log
        self.content = content
        for socket in sockets { try startThread(name: "metrics") { self.acceptLoop(socket) } }
    }

    /// Where it listens.
    var addresses: [ListenAddress] { sockets.map(\.address) }

    /// Answers nobody any more.
    func stop() {
        isStopping.store(true, ordering: .relaxed)
        for socket in sockets { shutdown(socket.descriptor.number, Int32(SHUT_RDWR)) }
    }

    private func acceptLoop(_ socket: ListeningSocket) {
        while !isStopping.load(ordering: .relaxed) {
            let number = dg_accept(socket.descriptor.number)
            if number < 0 {
                usleep(10_000)
                continue
            }
            let client = Descriptor(owning: number)
            if connections.wrappingAdd(1, ordering: .relaxed).newValue > Self.connectionsMax {
                connections.wrappingSubtract(1, ordering: .relaxed)
                continue
            }
            do throws(BlockError) {
                try startThread(name: "metrics client") {
                    self.converse(client)
                    self.connections.wrappingSubtract(1, ordering: .relaxed)
                }
            } catch {
                connections.wrappingSubtract(1, ordering: .relaxed)
                log.error("answering a scrape of metrics: \(error)")
            }
        }
    }

    private func converse(_ client: Descriptor) {
        let deadline = monotonicSeconds() + Self.seconds
        guard let head = receiveHead(client, until: deadline) else { return }
        let reply = Self.reply(to: head, content)
        guard send(reply, to: client, until: deadline) else { return }
        shutdown(client.number, Int32(SHUT_WR))
        // Closing with unread bytes would reset the connection and could destroy the reply on its way.
        var dropped = [UInt8](repeating: 0, count: 4096)
        let lingering = min(deadline, monotonicSeconds() + 1)
        while wait(client, POLLIN, until: lingering), recv(client.number, &dropped, dropped.count, 0) > 0 {}
    }

    /// Receives until the empty line that ends a head; what there is when it is longer than allowed; nil when the
    /// client is gone or too slow.
    private func receiveHead(_ client: Descriptor, until deadline: Double) -> [UInt8]? {
        var head: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: 2048)
        while head.count <= Self.headMax {
            guard wait(client, POLLIN, until: deadline) else { return nil }
            let got = recv(client.number, &piece, piece.count, Int32(MSG_DONTWAIT))
            if got < 0 && (errno == EINTR || errno == EAGAIN) { continue }
            if got <= 0 { return nil }
            head += piece[..<got]
            if Self.isComplete(head) { break }
        }
        return head
    }

    private static func isComplete(_ head: [UInt8]) -> Bool {
        let lines = head.filter { $0 != UInt8(ascii: "\r") }
        return zip(lines, lines.dropFirst()).contains { $0 == UInt8(ascii: "\n") && $1 == UInt8(ascii: "\n") }
    }

    private func send(_ bytes: [UInt8], to client: Descriptor, until deadline: Double) -> Bool {
        var done = 0
        while done < bytes.count {
            guard wait(client, POLLOUT, until: deadline) else { return false }
            let sent = bytes.withUnsafeBytes {
                Glibc.send(
                    client.number, $0.baseAddress?.advanced(by: done), bytes.count - done,
                    Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
            }
            if sent < 0 && (errno == EINTR || errno == EAGAIN) { continue }
            if sent <= 0 { return false }
            done += sent
        }
        return true
    }

    private func wait(_ client: Descriptor, _ events: Int32, until deadline: Double) -> Bool {
        while !isStopping.load(ordering: .relaxed) {
            let left = deadline - monotonicSeconds()
            if left <= 0 { return false }
            var ready = pollfd(fd: client.number, events: Int16(events), revents: 0)
            let result = poll(&ready, 1, Int32(left * 1000) + 1)
            if result > 0 { return true }
            if result < 0 && errno != EINTR { return false }
        }
        return false
    }

    // MARK: - HTTP

    /// The whole reply to a request head (RFC 9112).
    static func reply(to head: [UInt8], _ content: () -> String) -> [UInt8] {
        guard head.count <= headMax else { return reply(400, "Bad Request", "the request head is too long\n") }
        let line = head.prefix { $0 != UInt8(ascii: "\n") && $0 != UInt8(ascii: "\r") }
        let words = String(decoding: line, as: UTF8.self).split(separator: " ", omittingEmptySubsequences: false)
        guard words.count == 3, words[2].hasPrefix("HTTP/1."), words[1].hasPrefix("/"), !words[0].isEmpty else {
            return reply(400, "Bad Request", "this is no HTTP/1.1 request\n")
        }
        guard words[0] == "GET" || words[0] == "HEAD" else {
            return reply(405, "Method Not Allowed", "only GET and HEAD\n", header: "Allow: GET, HEAD\r\n")
        }
        let path = words[1].prefix { $0 != "?" }
        let withBody = words[0] == "GET"
        guard path == "/metrics" else {
            return reply(404, "Not Found", "there is only /metrics\n", withBody: withBody)
        }
        return reply(
            200, "OK", content(), type: "text/plain; version=0.0.4; charset=utf-8", withBody: withBody)
    }

    private static func reply(
        _ status: Int, _ reason: String, _ body: String, type: String = "text/plain; charset=utf-8",
        header: String = "", withBody: Bool = true
    ) -> [UInt8] {
        let head =
            "HTTP/1.1 \(status) \(reason)\r\nContent-Type: \(type)\r\nContent-Length: \(body.utf8.count)\r\n"
            + "\(header)Connection: close\r\n\r\n"
        return Array(head.utf8) + (withBody ? Array(body.utf8) : [])
    }
}
