// A whole copy from the user's words to a complete destination: opened, copied, verified, given its name.
public import Block
import Glibc
import LinuxIO
import NBD
public import Transports

/// What a user wants copied.
public struct CopyRequest: Sendable {
    /// The disk to copy.
    public var source: DiskSpecification
    /// Where to.
    public var destination: CopyDestination
    /// The dirty bitmap that tells what to copy; nil for everything.
    public var changed: String?
    /// What is written, and whether compressed (qcow2 only).
    public var format = CopyFormat.raw
    public var compresses = false
    /// Whether everything copied is read again and compared.
    public var verifies = false
    /// Whether an interrupted copy goes on.
    public var resumes = false
    /// Whether what is at the destination may be lost.
    public var forces = false
    /// Where the journal is kept; nil for beside the destination, where that is a file.
    public var journal: String?
    /// How to copy.
    public var options = CopyOptions()

    /// A whole copy.
    public init(_ source: DiskSpecification, to destination: CopyDestination) {
        self.source = source
        self.destination = destination
    }
}

/// What a copy did, for people and programs.
public struct CopyReport: Sendable, Encodable {
    public var source: String
    public var destination: String
    /// "full", or the dirty bitmap's context.
    public var scope: String
    public var size: UInt64
    public var bytesRead: UInt64
    public var bytesWritten: UInt64
    public var bytesZeroed: UInt64
    /// Zeros that were there already.
    public var bytesSkipped: UInt64
    /// Bytes that share their blocks with the source.
    public var bytesCloned: UInt64
    /// Bytes that an earlier copy had done.
    public var bytesResumed: UInt64
    /// Bytes compared; nil where nothing was.
    public var bytesVerified: UInt64?
    public var retries: Int
    /// Connections to the source that were made in place of lost ones.
    public var reconnects: Int
    /// What makes the copy less than what was asked for.
    public var downgrades: [String]
    public var workers: Int
    public var seconds: Double
    /// Which of its sources it came from, and why not those before it.
    public var transport: TransportChoice
}

/// Runs a copy.
public enum CopyJob {
    /// Opens everything, copies, verifies, and completes the destination.
    ///
    /// - Throws: `BlockError`. The destination is then as it was, or recognisable as incomplete, and the message says
    ///   how to go on.
    public static func run(
        _ request: CopyRequest, reporter: ProgressReporter, cancellation: Cancellation = Cancellation()
    ) throws(BlockError) -> CopyReport {
        if request.destination == .stream && (request.verifies || request.changed != nil) {
            throw BlockError(
                .invalid, "copying to standard output: --verify and --changed need a destination that can be read")
        }
        if request.verifies && !request.options.isDurable {
            throw BlockError(
                .invalid,
                "copying without flushing: --verify tells what the storage has, where the copy may not be yet; leave "
                    + "out one of both")
        }
        try request.options.check()
        let chosen = try request.source.openFirst(
            { (disk) throws(BlockError) in try CopySource.open(disk, reconnects: request.options.retries > 0) },
            device: \.device)
        var request = request
        request.source = chosen.disk
        let (source, device) = (chosen.opened, chosen.opened.device)
        let scope = request.changed ?? "everything"
        // Before anything is made.
        if let changed = request.changed { _ = try source.changedContext(changed) }
        let rules = DestinationRules(
            isChange: request.changed != nil, resumes: request.resumes, forces: request.forces,
            journal: request.journal, format: request.format, compresses: request.compresses,
            isDurable: request.options.isDurable)
        let destination = try OpenDestination(
            request.destination, size: device.info.size, source: source.identity, scope: scope, rules)
        defer { reporter.finish() }
        do throws(BlockError) {
            if request.resumes, let copy = destination.device, let done = destination.finished.ranges.first {
                try CopySamples.check(
                    copy, done, against: source, changed: request.changed,
                    granularity: destination.target.granularity, doing: "resuming")
            }
            var options = request.options
            options.finished = destination.finished
            let copier = try Copier(
                source: source, changed: request.changed, target: destination.target, options: options,
                cancellation: cancellation)
            let before = reconnections(request)
            let result = try copier.run(
                progress: { reporter.update($0) },
                checkpoint: { (end) throws(BlockError) in try destination.journal?.note(settledEnd: end) })
            try destination.seal()
            let reconnects = reconnections(request) - before
            let compared = try request.verifies ? verify(request, source, destination, reporter, cancellation) : nil
            let doubt = try request.verifies || reconnects == 0 ? nil : doubt(request, source, destination)
            let downgrades = [doubt, request.verifies ? nil : Self.doubtOfResumption(request)].compactMap { $0 }
            try destination.complete()
            return CopyReport(
                source: request.source.source.description, destination: destination.name,
                scope: request.changed ?? "full", size: device.info.size, bytesRead: result.readBytes,
                bytesWritten: result.writtenBytes, bytesZeroed: result.zeroedBytes, bytesSkipped: result.skippedBytes,
                bytesCloned: result.clonedBytes, bytesResumed: result.resumedBytes, bytesVerified: compared,
                retries: result.retries, reconnects: reconnects,
                downgrades: chosen.choice.reasons.map { "not over \($0)" } + downgrades,
                workers: result.workers, seconds: result.seconds, transport: chosen.choice)
        } catch {
            destination.abandon()
            guard let advice = destination.advice else { throw error }
            throw BlockError(error.kind, "\(error.message); \(advice)")
        }
    }

    /// Whether a copy that went on from a disk which was added anew may be of two moments.
    private static func doubtOfResumption(_ request: CopyRequest) -> String? {
        guard request.resumes, case .hotAdd(.image) = request.source.source.kind else { return nil }
        return "the copy went on from a disk that was added anew, and nobody tells whether its image was written "
            + "meanwhile: only --verify tells whether all of the copy is of one moment"
    }

    private static func reconnections(_ request: CopyRequest) -> Int {
        guard case .nbd(let uri) = request.source.source.kind else { return 0 }
        return Reconnections.count(of: uri)
    }

    /// Whether a copy whose source was connected to again may be of two disks.
    ///
    /// - Returns: why; nil when the server has named the same disk each time.
    /// - Throws: `.denied` when samples show that it is of two.
    private static func doubt(_ request: CopyRequest, _ source: CopySource, _ destination: OpenDestination)
        throws(BlockError) -> String?
    {
        if let copy = destination.device {
            (destination.target as? DeviceTarget)?.dropCache()
            do throws(BlockError) {
                try CopySamples.check(
                    copy, 0..<source.device.info.size, against: source, changed: request.changed,
                    granularity: destination.target.granularity, doing: "after connecting to the source again")
            } catch {
                if error.kind == .denied { destination.reject() }
                throw error
            }
        }
        // Where the server describes the disk, another connection has led to one of the same description.
        if source.device.info.identity.contains(where: { $0.key == "description" }) { return nil }
        return "the connection to the source was lost on the way, and the server says nothing that names the disk: "
            + "only --verify tells whether all of the copy is of one"
    }

    /// Reads source and copy again and compares them: all of them, also where only what changed was copied, since the
    /// source may not have told all of that.
    ///
    /// - Returns: bytes compared.
    private static func verify(
        _ request: CopyRequest, _ source: CopySource, _ destination: OpenDestination, _ reporter: ProgressReporter,
        _ cancellation: Cancellation
    ) throws(BlockError) -> UInt64 {
        guard let copy = destination.device else { return 0 }
        reporter.begin("verify")
        (destination.target as? DeviceTarget)?.dropCache()
        let target = VerifyTarget(copy)
        var options = request.options
        options.detectsZeros = false
        options.observer = nil
        let copier = try Copier(
            source: source, target: target, options: options, cancellation: cancellation)
        _ = try copier.run(progress: { reporter.update($0) })
        let result = target.result
        guard let first = result.firstDifference else { return result.bytes }
        destination.reject()
        let more = request.changed.map {
            ", or \($0) does not tell all that has changed, or the copy was no copy of what it counts from: make a "
                + "whole copy, without --changed"
        }
        throw BlockError(
            .corrupt,
            "verifying \(copy.info.name): it differs from \(source.device.info.name) in \(result.differences) pieces "
                + "of 64 KiB, first at offset \(first); the source may be changing, or the storage of one of them is "
                + "defective\(more ?? "")")
    }
}
