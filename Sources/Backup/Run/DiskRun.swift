// One disk of a run: opened at its snapshot, with what has changed on it, and what is said to be unchanged checked.
import Block
import Hypervisors
import LinuxIO
import NBD
import Transports

/// A disk that is open at its point in time, its level decided.
struct DiskRun {
    let id: String
    let size: UInt64
    /// The disk.
    let source: CopySource
    /// The context that tells what has changed; nil where all of the disk is read.
    let changed: String?
    /// Why all of it is.
    let reason: String?
    /// What has made the level another than was planned.
    let downgrade: String?
    /// Bytes that have to be looked at: those that have changed, or that are allocated.
    let planned: UInt64
    /// The check of what is said to be unchanged; nil where everything is read.
    let sample: SampleResult?
    /// Earlier points that miss changes, and why.
    let suspects: [(point: RestorePoint, reason: String)]
    /// Why the disk is read from there, where there were several sources.
    let choice: TransportChoice?
    private let reference: SourceReference
    private let checkpoint: String?

    /// Opens a disk, learns what has changed, and checks a part of what has not.
    ///
    /// - Throws: `BlockError` when the disk cannot be read, or is not the one that was planned for.
    static func open(
        _ disk: SnapshotDisk, _ plan: BackupPlan.Disk, _ context: RunContext, _ request: BackupRequest,
        _ cancellation: Cancellation
    ) throws(BlockError) -> DiskRun {
        let source = try open(disk)
        let device = source.device
        if device.info.size != disk.size {
            throw BlockError(
                .inputOutput,
                "reading the disk \(disk.id) at \(disk.source): it has \(device.info.size) bytes there, "
                    + "not \(disk.size)")
        }
        guard plan.since != nil, let changed = disk.changedContext, let last = context.last else {
            let downgrade =
                plan.since == nil ? nil : disk.downgrade ?? "the hypervisor does not tell what has changed"
            return DiskRun(
                disk, source, changed: nil, reason: plan.reason ?? downgrade, downgrade: downgrade,
                planned: try allocated(device))
        }
        let dirty = try changes(device, try source.changedContext(changed))
        let bytes = UInt64(dirty.setCount) * ChunkHashes.chunkSize
        let check = try ChangeSample(
            device: device, dirty: dirty, disk: disk.id, point: last, repository: context.repository)
        let result = try check.take(budget: request.sampling.budget(copied: bytes), cancellation)
        guard let first = result.mismatches.first else {
            return DiskRun(disk, source, changed: changed, reason: nil, downgrade: nil, planned: bytes, sample: result)
        }
        // Said at once: it is true whatever becomes of this run.
        let suspects = try check.suspects(of: result)
        for suspect in suspects { try context.repository.mark(suspect.point, .suspect, reason: suspect.reason) }
        let lost =
            "\(result.mismatches.count) chunks that are said to be unchanged had changed, the first at "
            + "\(first * ChunkHashes.chunkSize): the change tracking has lost changes"
        return DiskRun(
            disk, source, changed: nil, reason: lost, downgrade: lost, planned: try allocated(device), sample: result,
            suspects: suspects)
    }

    private init(
        _ disk: SnapshotDisk, _ source: CopySource, changed: String?, reason: String?, downgrade: String?,
        planned: UInt64, sample: SampleResult? = nil, suspects: [(point: RestorePoint, reason: String)] = []
    ) {
        id = disk.id
        size = disk.size
        choice = disk.choice
        reference = disk.source
        checkpoint = disk.checkpoint
        self.source = source
        self.changed = changed
        self.reason = reason
        self.downgrade = downgrade
        self.planned = planned
        self.sample = sample
        self.suspects = suspects
    }

    private static func open(_ disk: SnapshotDisk) throws(BlockError) -> CopySource {
        if let device = disk.device { return CopySource(device, identity: disk.source.description) }
        guard case .nbd(var uri) = disk.source.kind else { return try CopySource.open(DiskSpecification(disk.source)) }
        if let seconds = disk.answerSeconds { uri.timeoutSeconds = seconds }
        // Nothing but its server's end breaks a Unix socket: waiting for another one is of no use.
        if case .unix = uri.address { uri.reconnectSeconds = 1 }
        return try CopySource.open(uri)
    }

    /// Bytes of the restore point at most: what is looked at, in whole chunks.
    var bytesAtMost: UInt64 { planned }

    /// What the repository is to make room for.
    var request: PointRequest.Disk { PointRequest.Disk(id: id, size: size, isIncremental: changed != nil) }

    /// How the disk was reached.
    var transport: String { (reference.transport ?? .file).rawValue }

    /// What the run knows of the disk before it is copied.
    var facts: PointFacts.Disk {
        var facts = PointFacts.Disk()
        facts.reason = reason ?? ""
        facts.source = reference.description
        facts.transport = transport
        facts.checkpoint = checkpoint
        facts.bytesVerified = (sample?.chunks ?? 0) * ChunkHashes.chunkSize
        facts.checked = sample?.places
        return facts
    }

    // MARK: - What there is to do

    /// Calls `body` for the runs of a context, a few thousand at a time.
    private static func forEachRun(
        _ device: any BlockDevice, _ context: StatusContext, _ body: (Range<UInt64>, UInt32) -> Void
    ) throws(BlockError) {
        var list = StatusList(capacity: 4096)
        var position: UInt64 = 0
        while position < device.info.size {
            list.removeAll()
            let end = try device.status(context, of: position..<device.info.size, into: &list)
            if end <= position || end > device.info.size || list.length != end - position {
                throw BlockError(
                    .inputOutput, "asking \(device.info.name) about \(position): its answer makes no sense")
            }
            for extent in list.extents {
                body(position..<(position + extent.length), extent.value)
                position += extent.length
            }
        }
    }

    private static func allocated(_ device: any BlockDevice) throws(BlockError) -> UInt64 {
        var bytes: UInt64 = 0
        try forEachRun(device, .allocation) { range, flags in
            if flags & AllocationFlags.zero == 0 { bytes += range.count64 }
        }
        return bytes
    }

    private static func changes(_ device: any BlockDevice, _ context: StatusContext) throws(BlockError) -> DirtyBitmap {
        let dirty = try DirtyBitmap(size: device.info.size, granularity: ChunkHashes.chunkSize)
        try forEachRun(device, context) { range, value in
            if value & 1 != 0 { dirty.set(range) }
        }
        return dirty
    }
}

extension RunReport {
    /// Notes a disk that is about to be copied.
    mutating func note(_ run: DiskRun) {
        var disk = Disk(
            id: run.id, size: run.size, level: run.changed == nil ? "full" : "incremental", reason: run.reason,
            transport: run.transport)
        disk.planned = run.planned
        disk.choice = run.choice
        noteChoice(run.choice, of: run.id)
        if let sample = run.sample {
            disk.sample = Sample(
                chunks: sample.chunks, clean: sample.clean, mismatches: UInt64(sample.mismatches.count))
        }
        disks.append(disk)
        if let downgrade = run.downgrade { downgrades.append("disk \(run.id) is read whole: \(downgrade)") }
        for (point, reason) in run.suspects { warnings.append("point \(point.sequence) is suspect: \(reason)") }
    }

    /// Notes why a disk does not come as it was wanted most.
    mutating func noteChoice(_ choice: TransportChoice?, of disk: String) {
        for reason in choice?.reasons ?? [] { downgrades.append("disk \(disk): not over \(reason)") }
    }
}

extension RunReport.Disk {
    /// A disk of a plan.
    init(_ plan: BackupPlan.Disk) {
        self.init(
            id: plan.disk.id, size: plan.disk.size, level: plan.since == nil ? "full" : "incremental",
            reason: plan.reason, transport: plan.disk.choice?.chosen?.rawValue ?? "nbd")
        choice = plan.disk.choice
    }

    /// Notes what a copy did.
    mutating func note(_ result: CopyResult) {
        read = result.readBytes
        written = result.writtenBytes
        zeroed = result.zeroedBytes
        seconds = result.seconds
    }
}
