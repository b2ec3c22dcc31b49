// A logical unit of an iSCSI target as a disk: one source run, read by SCSI commands on a session of its own.
public import Block
import LinuxIO

/// A logical unit of an iSCSI target as a disk.
public final class ISCSIDevice: BlockDevice {
    public let info: DeviceInfo
    private let unit: ISCSIUnit
    private let handle: SourceHandle
    private let provisioning: ProvisioningMap

    /// Reaches the unit that a reference names.
    ///
    /// - Parameter isWritable: whether it is to be changed; if not, nothing is ever written.
    /// - Throws: `BlockError`: libiscsi is not there, the target cannot be reached or lets nobody in, has no such unit,
    ///   or `.readOnly` when the unit is to be changed and is write-protected.
    public init(_ reference: ISCSIReference, isWritable: Bool = false) throws(BlockError) {
        unit = try ISCSIUnit(reference)
        let facts = unit.facts
        if isWritable && unit.isWriteProtected {
            throw BlockError(.readOnly, "opening \(reference) for writing: the unit is write-protected")
        }
        var info = DeviceInfo(size: facts.size, format: "raw", name: reference.description)
        info.preferredBlock = min(max(facts.physicalBlock, 4096), 1 << 20)
        info.isReadOnly = !isWritable
        info.canDiscard = isWritable && facts.provisioning.isThin && facts.provisioning.unmaps
        let thin = facts.provisioning.isThin ? (facts.provisioning.readsZeros ? "yes" : "yes, without zeros") : "no"
        let about: [(String, String?)] = [
            ("vendor", facts.vendor), ("model", facts.model), ("wwn", facts.names.first), ("serial", facts.serial),
            ("block", "\(facts.blockSize)"), ("thin", thin),
        ]
        info.identity = about.compactMap { key, value in value.flatMap { $0.isEmpty ? nil : (key, $0) } }
        self.info = info
        handle = SourceHandle(unit)
        provisioning = ProvisioningMap(unit, facts)
    }

    /// The unit's worldwide names, best first.
    var names: [String] { unit.facts.names }

    /// Its serial number.
    var serial: String? { unit.facts.serial }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        extents.append(range.count64, .source(handle.reference, offset: range.lowerBound))
            ? range.upperBound : range.lowerBound
    }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        switch context {
        case .depth: return list.append(range.count64, 1) ? range.upperBound : range.lowerBound
        case .dirtyBitmap:
            throw BlockError(.invalid, "asking \(info.name) for a dirty bitmap: a logical unit has none")
        case .allocation: return try provisioning.status(of: range, into: &list)
        }
    }

    private func requireWritable(_ doing: String) throws(BlockError) {
        if info.isReadOnly { throw BlockError(.readOnly, "\(doing) \(info.name): it is open for reading only") }
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        if bytes.isEmpty { return }
        try requireWritable("writing to")
        try unit.write(bytes, at: offset)
        if durable { try unit.flush() }
    }

    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try requireWritable("zeroing a range of")
        if options.contains(.fastOnly) {
            throw BlockError(.unsupported, "zeroing a range of \(info.name) fast: a logical unit cannot promise it")
        }
        let done = try unit.zeroBlocks(range, unmaps: options.contains(.mayPunch))
        let before = range.lowerBound..<(done.isEmpty ? range.upperBound : done.lowerBound)
        let behind = (done.isEmpty ? range.upperBound : done.upperBound)..<range.upperBound
        for part in [before, behind] {
            var position = part.lowerBound
            while position < part.upperBound {
                let count = Int(min(UInt64(ZeroPage.count), part.upperBound - position))
                try unit.write(UnsafeRawBufferPointer(rebasing: ZeroPage.bytes[..<count]), at: position)
                position += UInt64(count)
            }
        }
        if options.contains(.durable) { try unit.flush() }
    }

    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        try requireWritable("discarding a range of")
        try unit.discardBlocks(range)
        if durable { try unit.flush() }
    }

    public func flush() throws(BlockError) {
        if !info.isReadOnly { try unit.flush() }
    }
}
