// Errors and corruption on purpose: for tests, and for users who want to see how their tools take them.
import Synchronization

/// What goes wrong in a device, and where.
public struct FaultPlan: Sendable {
    /// One kind of fault over a range of bytes.
    public struct Fault: Sendable {
        /// What happens.
        public enum Kind: Sendable, Equatable {
            /// Reads that touch the range fail with this kind.
            case readError(BlockError.Kind)
            /// Writes, zeroing and discards that touch the range fail with this kind.
            case writeError(BlockError.Kind)
            /// Flushes fail with this kind; the range does not matter.
            case flushError(BlockError.Kind)
            /// One bit is flipped in every 512 bytes that are read.
            case corruption
        }
        /// What happens.
        public var kind: Kind
        /// Where it happens, in bytes.
        public var range: Range<UInt64>
        /// How often, from 0 (never) to 1 (each time).
        public var probability: Double

        /// A fault of a kind on a range.
        public init(_ kind: Kind, range: Range<UInt64>, probability: Double = 1) {
            self.kind = kind
            self.range = range
            self.probability = probability
        }
    }

    /// The faults; the first that applies counts.
    public var faults: [Fault]
    /// Start of the pseudo-random sequence that decides by probability.
    public var seed: UInt64

    /// A plan of faults.
    public init(_ faults: [Fault], seed: UInt64 = 1) {
        self.faults = faults
        self.seed = seed
    }
}

/// Another device, with faults.
public final class FaultDevice: BlockDevice {
    public let info: DeviceInfo
    private let lower: any BlockDevice
    private let plan: FaultPlan
    private let dice: Atomic<UInt64>
    // Made on first use: it points back to this device, which must exist by then.
    private let handle = Locked<SourceHandle?>(nil)

    /// A device with faults planned.
    public init(_ lower: any BlockDevice, plan: FaultPlan) {
        var info = lower.info
        info.name += " (with faults)"
        info.writesArePrompt = false
        self.info = info
        self.lower = lower
        self.plan = plan
        dice = Atomic(plan.seed)
    }

    private final class Faulty: ByteSource {
        let isPrompt = false
        unowned let device: FaultDevice
        init(_ device: FaultDevice) { self.device = device }
        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
            try device.readWithFaults(into: buffer, at: offset)
        }
    }

    private var source: SourceRef {
        handle.withLock { handle in
            if let handle { return handle.reference }
            let made = SourceHandle(Faulty(self))
            handle = made
            return made.reference
        }
    }

    /// The fault of this chance, if one of the wanted kinds touches the range and its die says so.
    private func fault(_ range: Range<UInt64>, _ wanted: (FaultPlan.Fault.Kind) -> Bool) -> FaultPlan.Fault? {
        plan.faults.first { wanted($0.kind) && $0.range.overlaps(range) && roll() < $0.probability }
    }

    /// A pseudo-random number from 0 up to 1 (splitmix64).
    private func roll() -> Double {
        var z = dice.wrappingAdd(0x9E37_79B9_7F4A_7C15, ordering: .relaxed).newValue
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return Double((z ^ (z >> 31)) >> 11) / Double(UInt64(1) << 53)
    }

    private func readWithFaults(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
        let range = offset..<(offset + UInt64(buffer.count))
        let failing = fault(range) {
            if case .readError = $0 { true } else { false }
        }
        if case .readError(let kind)? = failing?.kind {
            throw BlockError(kind, "reading \(buffer.count) bytes at \(offset) of \(info.name): injected error")
        }
        try lower.read(into: buffer, at: offset)
        guard let corrupt = fault(range, { $0 == .corruption }) else { return }
        var position = max(corrupt.range.lowerBound, offset)
        while position < min(corrupt.range.upperBound, range.upperBound) {
            buffer[Int(position - offset)] ^= 1
            position += 512
        }
    }

    public var mapVersion: UInt64 { lower.mapVersion }

    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        let touched = plan.faults.contains { fault in
            switch fault.kind {
            case .readError, .corruption: fault.range.overlaps(range)
            case .writeError, .flushError: false
            }
        }
        if !touched { return try lower.map(range, patience, into: &extents) }
        // Everything of this range goes through `read`, which rolls the dice once for each piece it is asked for.
        let added = extents.append(range.count64, .source(source, offset: range.lowerBound))
        return added ? range.upperBound : range.lowerBound
    }

    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    { try lower.status(context, of: range, into: &list) }

    private func checkWrite(_ range: Range<UInt64>, _ doing: String) throws(BlockError) {
        let failing = fault(range) {
            if case .writeError = $0 { true } else { false }
        }
        if case .writeError(let kind)? = failing?.kind {
            throw BlockError(kind, "\(doing) at \(range.lowerBound) of \(info.name): injected error")
        }
    }

    public func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try checkWrite(offset..<(offset + UInt64(bytes.count)), "writing \(bytes.count) bytes")
        try lower.write(bytes, at: offset, durable: durable)
    }
    public func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try checkWrite(range, "zeroing \(range.count64) bytes")
        try lower.zero(range, options)
    }
    public func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        try checkWrite(range, "discarding \(range.count64) bytes")
        try lower.discard(range, durable: durable)
    }
    public func confirm() throws(BlockError) { try lower.confirm() }

    public func flush() throws(BlockError) {
        let failing = fault(0..<info.size) {
            if case .flushError = $0 { true } else { false }
        }
        if case .flushError(let kind)? = failing?.kind {
            throw BlockError(kind, "flushing \(info.name): injected error")
        }
        try lower.flush()
    }
    public func prefetch(_ range: Range<UInt64>) { lower.prefetch(range) }
}
