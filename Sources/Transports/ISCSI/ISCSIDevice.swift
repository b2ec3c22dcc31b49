// A logical unit of an iSCSI target as a read-only disk: one source run, read on a session of its own.
public import Block
import LinuxIO

/// A logical unit of an iSCSI target as a disk that is never written.
public final class ISCSIDevice: BlockDevice {
    public let info: DeviceInfo
    private let unit: ISCSIUnit
    private let handle: SourceHandle
    private let provisioning: ProvisioningMap

    /// Reaches the unit that a reference names.
    ///
    /// - Throws: `BlockError`: libiscsi is not there, the target cannot be reached, lets nobody in, or has no such
    ///   unit.
    public init(_ reference: ISCSIReference) throws(BlockError) {
        unit = try ISCSIUnit(reference)
        let facts = unit.facts
        var info = DeviceInfo(size: facts.size, format: "raw", name: reference.description)
        info.preferredBlock = min(max(facts.physicalBlock, 4096), 1 << 20)
        info.isReadOnly = true
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

    private func refuse(_ doing: String) throws(BlockError) {
        throw BlockError(.readOnly, "\(doing) \(info.name): it is open for reading only")
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        if !bytes.isEmpty { try refuse("writing to") }
    }

    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try refuse("zeroing a range of")
    }

    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        try refuse("discarding a range of")
    }

    public func flush() throws(BlockError) {}
}
