// Figures in one line for people: for the log, on SIGUSR1 and at the end.
import Block
import LinuxIO
import NBD

extension FigureSums {
    /// What was done, operation by operation, for people; "nothing done" when that is so.
    var summary: String {
        let parts = Operation.allCases.compactMap { operation -> String? in
            let figures = self[operation]
            return figures.count == 0 ? nil : "\(operation.name) \(figures.summary)"
        }
        return parts.isEmpty ? "nothing done" : parts.joined(separator: "; ")
    }
}

extension OperationFigures {
    /// Requests, bytes, errors, and the times within which half and 99 % of the requests were answered.
    var summary: String {
        var text = "\(count)"
        if bytes > 0 { text += ", \(bytes) bytes" }
        if errors > 0 { text += ", \(errors) errors" }
        return text + ", half within \(Self.time(quantile(0.5))), 99 % within \(Self.time(quantile(0.99)))"
    }

    /// A time as exact as the buckets are.
    static func time(_ seconds: Double?) -> String {
        guard let seconds else { return "more than a minute" }
        if seconds < 1e-3 { return "\(Int((seconds * 1e6).rounded())) us" }
        if seconds < 1 { return "\(Int((seconds * 1e3).rounded())) ms" }
        return "\(Int(seconds.rounded())) s"
    }
}

extension Export {
    /// One line about the export.
    var summary: String {
        "export \"\(name)\": \(connections) clients, \(connectionsEver) so far, \(inFlight) requests in flight; "
            + sums.summary
    }
}

extension ClientRecord {
    /// One line about the client.
    var summary: String {
        let place = export.map { "export \"\($0)\"" } ?? "handshake"
        let oldest = oldestRequestSeconds.map { ", the oldest for \(Int($0)) s" } ?? ""
        return "client \(id) (\(peer)): \(place), \(inFlight) requests in flight\(oldest); \(sums.summary)"
    }
}
