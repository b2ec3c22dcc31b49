// The figures of a server as text for Prometheus (exposition format 0.0.4).
import Block
import CLinux
import Glibc
import LinuxIO
import NBD

/// The lines of a scrape, family by family.
struct MetricsText {
    private(set) var text = ""

    private mutating func family(_ name: String, _ type: String, _ help: String) {
        text += "# HELP \(name) \(help)\n# TYPE \(name) \(type)\n"
    }

    private mutating func sample(_ name: String, _ labels: [(String, String)], _ value: some CustomStringConvertible) {
        text += name
        if !labels.isEmpty {
            text += "{"
            for (index, (label, value)) in labels.enumerated() {
                text += "\(index > 0 ? "," : "")\(label)=\"\(Self.escaped(value))\""
            }
            text += "}"
        }
        text += " \(value)\n"
    }

    /// A label's value as the format has it: backslash, quote and line feed are escaped.
    static func escaped(_ value: String) -> String {
        var escaped = ""
        for character in value.unicodeScalars {
            switch character {
            case "\\": escaped += "\\\\"
            case "\"": escaped += "\\\""
            case "\n": escaped += "\\n"
            default: escaped.unicodeScalars.append(character)
            }
        }
        return escaped
    }

    // MARK: - The process

    /// What holds for the whole server.
    mutating func add(_ server: Server, version: String, startTime: Double) {
        family("diskgate_build_info", "gauge", "Always 1; the version is in the label.")
        sample("diskgate_build_info", [("version", version)], 1)
        family("process_start_time_seconds", "gauge", "When the server started, in seconds since 1970.")
        sample("process_start_time_seconds", [], startTime)
        var usage = rusage()
        if getrusage(RUSAGE_SELF, &usage) == 0 {
            let seconds = { (time: timeval) in Double(time.tv_sec) + Double(time.tv_usec) / 1e6 }
            family("process_cpu_seconds_total", "counter", "Processor time that the server has used.")
            sample("process_cpu_seconds_total", [], seconds(usage.ru_utime) + seconds(usage.ru_stime))
        }
        family("diskgate_connections", "gauge", "Connections at this time, those in their handshake among them.")
        sample("diskgate_connections", [], server.connections)
        family("diskgate_refused_connections_total", "counter", "Connections that were turned away, by reason.")
        for reason in RefusalReason.allCases {
            sample("diskgate_refused_connections_total", [("reason", reason.name)], server.refusals.count(reason))
        }
        let memory = server.slotBytes
        family("diskgate_request_memory_bytes", "gauge", "Memory that requests in flight hold.")
        sample("diskgate_request_memory_bytes", [], memory.held)
        family("diskgate_request_memory_limit_bytes", "gauge", "Memory beyond which clients get one piece at a time.")
        sample("diskgate_request_memory_limit_bytes", [], memory.max)
    }

    // MARK: - Snapshots

    /// What snapshots have copied, and whether they can still be read.
    mutating func add(_ snapshots: [SnapshotStatus]) {
        family("diskgate_snapshot_copied_bytes", "gauge", "Bytes that were copied to scratch space for a snapshot.")
        for one in snapshots { sample("diskgate_snapshot_copied_bytes", [("export", one.export)], one.copiedBytes) }
        family("diskgate_snapshot_broken", "gauge", "1 when a snapshot lacks something and can be read no more.")
        for one in snapshots {
            sample("diskgate_snapshot_broken", [("export", one.export)], one.failure == nil ? 0 : 1)
        }
    }

    // MARK: - Exports

    /// What was done on each export.
    mutating func add(_ exports: [Export]) {
        let all = exports.map { (label: ("export", $0.name), export: $0, sums: $0.sums) }
        family("diskgate_export_size_bytes", "gauge", "Size of the disk.")
        for one in all { sample("diskgate_export_size_bytes", [one.label], one.export.info.size) }
        family("diskgate_export_connections", "gauge", "Connections to the export at this time.")
        for one in all { sample("diskgate_export_connections", [one.label], one.export.connections) }
        family("diskgate_export_accepted_connections_total", "counter", "Connections to the export so far.")
        for one in all {
            sample("diskgate_export_accepted_connections_total", [one.label], one.export.connectionsEver)
        }
        family("diskgate_export_in_flight", "gauge", "Requests received and not yet answered.")
        for one in all { sample("diskgate_export_in_flight", [one.label], one.export.inFlight) }
        let bytes: [(String, Operation, String)] = [
            ("read", .read, "read"), ("written", .write, "written"), ("zeroed", .zero, "zeroed"),
            ("discarded", .trim, "discarded"),
        ]
        for (word, operation, verb) in bytes {
            let name = "diskgate_export_\(word)_bytes_total"
            family(name, "counter", "Bytes of the disk that requests have \(verb) without an error.")
            for one in all { sample(name, [one.label], one.sums[operation].bytes) }
        }
        let counts: [(String, String, KeyPath<OperationFigures, UInt64>)] = [
            ("operations", "Requests answered, errors among them.", \.count),
            ("errors", "Requests answered with an error.", \.errors),
        ]
        for (word, help, count) in counts {
            family("diskgate_export_\(word)_total", "counter", help)
            for one in all {
                for operation in Operation.allCases {
                    sample(
                        "diskgate_export_\(word)_total", [one.label, ("operation", operation.name)],
                        one.sums[operation][keyPath: count])
                }
            }
        }
        let name = "diskgate_request_duration_seconds"
        family(name, "histogram", "Time from the arrival of a request until its reply was sent.")
        for one in all {
            for operation in Operation.allCases where one.sums[operation].count > 0 {
                addHistogram(name, [one.label, ("operation", operation.name)], one.sums[operation])
            }
        }
    }

    private mutating func addHistogram(_ name: String, _ labels: [(String, String)], _ figures: OperationFigures) {
        var count: UInt64 = 0
        for (bucket, requests) in figures.buckets.enumerated() {
            count &+= requests
            let limit = LatencyBuckets.limit(bucket).map { "\($0)" } ?? "+Inf"
            sample("\(name)_bucket", labels + [("le", limit)], count)
        }
        sample("\(name)_sum", labels, Double(figures.nanoseconds) / 1e9)
        sample("\(name)_count", labels, count)
    }

    // MARK: - Clients

    /// What was done for each client that uses an export.
    mutating func add(_ clients: [ClientRecord]) {
        let all = clients.compactMap { client in
            client.export.map { export in
                (
                    labels: [("client", String(client.id)), ("peer", client.peer.description), ("export", export)],
                    client: client, sums: client.sums
                )
            }
        }
        func each(_ name: String, _ type: String, _ help: String, _ value: (Int) -> any CustomStringConvertible) {
            family(name, type, help)
            for index in all.indices { sample(name, all[index].labels, value(index).description) }
        }
        each("diskgate_client_read_bytes_total", "counter", "Bytes that the client has read.") {
            all[$0].sums.bytesRead
        }
        each("diskgate_client_written_bytes_total", "counter", "Bytes that the client has written.") {
            all[$0].sums.bytesWritten
        }
        each("diskgate_client_operations_total", "counter", "Requests of the client that were answered.") {
            all[$0].sums.count
        }
        each("diskgate_client_errors_total", "counter", "Requests of the client that were answered with an error.") {
            all[$0].sums.errors
        }
        each("diskgate_client_in_flight", "gauge", "Requests of the client that are not yet answered.") {
            all[$0].client.inFlight
        }
        each("diskgate_client_oldest_request_seconds", "gauge", "Age of the oldest of them; 0 when there is none.") {
            all[$0].client.oldestRequestSeconds ?? 0
        }
    }
}
