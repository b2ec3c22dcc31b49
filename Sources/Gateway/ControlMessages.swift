// What is said on the control socket: requests, and answers to them.
import NBD

/// A request on the control socket.
public struct ControlRequest: Codable, Sendable {
    /// What to do: exports, add, remove, clients, disconnect, snapshot, snapshots, release, checkpoints or
    /// drop-checkpoint.
    public var command: String
    /// add: the source. As for `serve`.
    public var source: String?
    /// add, remove, release: the export's name; snapshot: the name of the snapshot's export.
    public var name: String?
    /// snapshot, checkpoints, drop-checkpoint: the export whose snapshots and checkpoints are meant.
    public var export: String?
    /// snapshot, drop-checkpoint: the checkpoint's name.
    public var checkpoint: String?
    /// add: the description.
    public var description: String?
    /// add: read-only (default), writable or overlay.
    public var access: String?
    /// add: the number of the partition.
    public var partition: Int?
    /// add: bytes to leave out at the start.
    public var offset: UInt64?
    /// add: bytes to take.
    public var length: UInt64?
    /// add: rules for clients, instead of the server's.
    public var allow: [String]?
    /// disconnect: the client's id.
    public var client: Int?

    /// A request without arguments.
    public init(command: String) { self.command = command }
}

/// An export as the control socket tells of it.
public struct ExportStatus: Codable, Sendable {
    /// The export's name.
    public var name: String
    /// What the disk is.
    public var source: String
    /// Its format.
    public var format: String
    /// Its size in bytes.
    public var size: UInt64
    /// Whether writes are refused.
    public var readOnly: Bool
    /// Free text.
    public var description: String
    /// Clients at this time.
    public var clients: Int
    /// Bytes read since the export was added.
    public var bytesRead: UInt64
    /// Bytes written since the export was added.
    public var bytesWritten: UInt64
    /// Requests answered with an error since then.
    public var errors: UInt64
    /// Requests received and not yet answered.
    public var inFlight: Int
    /// What was done since then, by operation; those that nobody asked for are left out.
    public var operations: [OperationStatus]
}

/// What was done of one operation as the control socket tells of it.
public struct OperationStatus: Codable, Sendable {
    /// read, write, flush, trim, cache, zero, block_status, or other.
    public var operation: String
    /// Requests answered, errors among them.
    public var count: UInt64
    /// Requests answered with an error.
    public var errors: UInt64
    /// Bytes of the requests that succeeded.
    public var bytes: UInt64
    /// Seconds within which half of the requests were answered, as exactly as the buckets tell (powers of two of a
    /// microsecond); nil for more than 67 s.
    public var medianSeconds: Double?
    /// The same for 99 % of them.
    public var ninetyNinthSeconds: Double?

    /// The operations of which there was at least one.
    static func all(_ sums: FigureSums) -> [OperationStatus] {
        Operation.allCases.compactMap { operation in
            let figures = sums[operation]
            if figures.count == 0 { return nil }
            return OperationStatus(
                operation: operation.name, count: figures.count, errors: figures.errors, bytes: figures.bytes,
                medianSeconds: figures.quantile(0.5), ninetyNinthSeconds: figures.quantile(0.99))
        }
    }
}

/// A client as the control socket tells of it.
public struct ClientStatus: Codable, Sendable {
    /// Its id.
    public var id: Int
    /// Who it is.
    public var peer: String
    /// The export it uses; nil during the handshake.
    public var export: String?
    /// Bytes it has read.
    public var bytesRead: UInt64
    /// Bytes it has written.
    public var bytesWritten: UInt64
    /// Its requests that were answered with an error.
    public var errors: UInt64
    /// Its requests that are not yet answered.
    public var inFlight: Int
    /// Seconds since the oldest of them arrived; nil when there is none.
    public var oldestRequestSeconds: Double?
    /// What was done for it, by operation.
    public var operations: [OperationStatus]
}

/// An answer on the control socket.
public struct ControlReply: Codable, Sendable {
    /// What went wrong; nil when the request was done.
    public var error: String?
    /// For exports, and for add the new one.
    public var exports: [ExportStatus]?
    /// For clients.
    public var clients: [ClientStatus]?
    /// For snapshots, and for snapshot the new one.
    public var snapshots: [SnapshotStatus]?
    /// For checkpoints.
    public var checkpoints: [CheckpointStatus]?

    /// Done.
    public init() {}
}
