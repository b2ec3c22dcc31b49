// Looks at every client from time to time: tells of requests that are stuck, and ends clients that have stopped.
import Block
import LinuxIO
import Glibc
import LinuxIO

/// What the watcher remembers of the clients between two looks. Used by one thread.
struct Watcher {
    /// Something that does not get on.
    private enum Trouble: Equatable {
        /// A request in a slot.
        case slot(Activity.Work)
        /// A request that the connection's own thread answers, at this step.
        case inline(Activity.Work, step: UInt64)
        /// Replies that the client does not take, at this step.
        case replies(step: UInt64)
    }

    /// A trouble, since when, and after which time it is told of next; times are in nanoseconds.
    private struct Report {
        let trouble: Trouble
        /// What messages call it; the export may be gone when it ends.
        let name: String
        let since: UInt64
        var next: UInt64
    }

    private struct Seen {
        var client: ClientRecord
        var position: UInt64 = 0
        var phase = Activity.Phase.idle
        /// The earliest moment at which position and phase can have become what they are.
        var since: UInt64
        var thread: Report?
        var slot: Report?
        var wasEnded = false
    }

    /// Seconds for which a client that asks for nothing keeps the memory of its slots.
    private static let keepSeconds = 5.0

    private let limits: ServerLimits
    private var seen: [Int: Seen] = [:]
    private var lastLook: UInt64 = 0

    init(_ limits: ServerLimits) { self.limits = limits }

    /// Seconds between two looks: a quarter of the shortest limit, so that none is overrun by much.
    static func interval(_ limits: ServerLimits) -> Double {
        let shortest = min(limits.stuckSeconds, Double(limits.stallSeconds), limits.idleSeconds.map(Double.init) ?? 20)
        return min(max(shortest / 4, 0.02), 5)
    }

    /// Looks at the clients of this moment.
    mutating func look(_ clients: [ClientRecord], now: UInt64 = monotonicNanoseconds()) {
        let present = Set(clients.map(\.id))
        for (id, entry) in seen where !present.contains(id) {
            var entry = entry
            end(&entry.thread, entry.client, now, "it went")
            end(&entry.slot, entry.client, now, "it went")
            seen[id] = nil
        }
        for client in clients where client.export == nil {
            // Its own thread looks at the clock between messages; this is for what goes on inside of one.
            let limit = UInt64(limits.handshakeSeconds + 2) * 1_000_000_000
            if now > client.began, now - client.began > limit { client.abort() }
        }
        for client in clients where client.export != nil {
            var entry = seen[client.id] ?? Seen(client: client, since: now)
            let (phase, position) = (client.activity.phase, client.activity.position)
            if phase != entry.phase || position != entry.position {
                entry.phase = phase
                entry.position = position
                entry.since = min(max(client.activity.lastArrival, lastLook), now)
            }
            lookAtThread(&entry, now)
            lookAtSlots(&entry, now)
            endIfStopped(&entry, now)
            seen[client.id] = entry
        }
        lastLook = now
    }

    // MARK: - What is stuck

    private func lookAtThread(_ entry: inout Seen, _ now: UInt64) {
        let trouble: Trouble? =
            switch entry.phase {
            case .working: .inline(entry.client.activity.current, step: entry.position)
            case .sending: .replies(step: entry.position)
            case .idle, .receiving, .throttled, .waiting: nil
            }
        update(&entry.thread, trouble, since: entry.since, entry.client, now)
    }

    /// Requests in slots are only judged while the thread waits for them: otherwise they may be done and not yet
    /// looked at.
    private func lookAtSlots(_ entry: inout Seen, _ now: UInt64) {
        let oldest = entry.client.activity.oldest
        let isKnown = entry.slot?.trouble == .slot(oldest)
        let trouble = oldest.arrival != 0 && (entry.phase == .waiting || isKnown) ? Trouble.slot(oldest) : nil
        if trouble == nil && entry.phase != .waiting && oldest.arrival != 0 { return }
        update(&entry.slot, trouble, since: oldest.arrival, entry.client, now)
    }

    private func update(
        _ report: inout Report?, _ trouble: Trouble?, since: UInt64, _ client: ClientRecord, _ now: UInt64
    ) {
        if let known = report, known.trouble != trouble { end(&report, client, now, nil) }
        guard let trouble else { return }
        let threshold = UInt64(limits.stuckSeconds * 1e9)
        var current =
            report ?? Report(trouble: trouble, name: name(trouble, client), since: since, next: threshold)
        let lasted = now > current.since ? now - current.since : 0
        if lasted < current.next { return }
        client.note("\(current.name) for \(seconds(lasted)); requests in flight: \(client.inFlight)")
        current.next = lasted &+ lasted
        report = current
    }

    private func end(_ report: inout Report?, _ client: ClientRecord, _ now: UInt64, _ how: String?) {
        guard let known = report else { return }
        report = nil
        client.note("\(known.name) until \(how ?? "now"), for \(seconds(now > known.since ? now - known.since : 0))")
    }

    /// What messages say of a trouble, to be followed by its duration.
    private func name(_ trouble: Trouble, _ client: ClientRecord) -> String {
        let export = client.disk.map { "export \"\($0.name)\"" } ?? "no export"
        switch trouble {
        case .replies: return "takes nothing of its replies from \(export)"
        case .slot(let work), .inline(let work, _):
            let disk = client.disk?.info.name ?? ""
            let what =
                work.operation == .flush
                ? "a flush of" : "a \(work.operation.name) of \(work.length) bytes at \(work.offset) of"
            return "\(what) \(disk) (\(export)) has waited for storage"
        }
    }

    private func seconds(_ nanoseconds: UInt64) -> String {
        let tenths = nanoseconds / 100_000_000
        return tenths < 100 ? "\(tenths / 10).\(tenths % 10) s" : "\(tenths / 10) s"
    }

    // MARK: - Who has stopped

    private func endIfStopped(_ entry: inout Seen, _ now: UInt64) {
        let lasted = now > entry.since ? Double(now - entry.since) / 1e9 : 0
        let client = entry.client
        switch entry.phase {
        case .idle:
            if lasted >= Self.keepSeconds && client.activity.memoryHeld > 0 {
                client.activity.askForMemory(true)
                client.wake()
            }
            guard let limit = limits.idleSeconds, lasted >= Double(limit) else { return }
            if !entry.wasEnded { client.note("has asked for nothing for \(limit) s: closing its connection") }
        case .receiving:
            guard lasted >= Double(limits.stallSeconds) else { return }
            if !entry.wasEnded {
                client.note(
                    "stopped in the middle of a request \(limits.stallSeconds) s ago: closing its connection")
            }
        case .working, .sending, .throttled, .waiting: return
        }
        entry.wasEnded = true
        // Again at every look while it is there: a thread that was just about to wait misses a single wake-up.
        client.close()
    }
}
