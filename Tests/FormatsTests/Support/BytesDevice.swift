// Disks for tests that live in memory, or look over the shoulder of another disk.
import Block
import Synchronization

/// A disk of bytes in memory. Its map is a source, as a remote disk's is, so nothing of it is ever resident.
final class BytesDevice: BlockDevice {
    let info: DeviceInfo
    private let handle: SourceHandle

    private final class Source: ByteSource {
        let isPrompt = true
        let bytes: [UInt8]
        init(_ bytes: [UInt8]) { self.bytes = bytes }
        func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws(BlockError) {
            guard offset <= UInt64(bytes.count), buffer.count <= bytes.count - Int(offset) else {
                throw BlockError(.outOfRange, "the map pointed outside")
            }
            bytes.withUnsafeBytes { all in
                buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: all[Int(offset)..<Int(offset) + buffer.count]))
            }
        }
    }

    init(_ bytes: [UInt8], name: String = "image in memory", minimumBlock: UInt32 = 1) {
        var info = DeviceInfo(size: UInt64(bytes.count), format: "raw", name: name)
        info.minimumBlock = minimumBlock
        self.info = info
        handle = SourceHandle(Source(bytes))
    }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        precondition(!range.isEmpty && range.upperBound <= info.size, "a map was asked for \(range)")
        let added = extents.append(range.count64, .source(handle.reference, offset: range.lowerBound))
        return added ? range.upperBound : range.lowerBound
    }
}

/// Another disk, with a count of the reads that have to wait for it; maps are never resident unless allowed.
final class WatchedDevice: BlockDevice {
    let lower: any BlockDevice
    let isResident: Bool
    let blockingMaps = Atomic<Int>(0)
    let prefetched = Locked<[Range<UInt64>]>([])

    init(_ lower: any BlockDevice, isResident: Bool = false) {
        self.lower = lower
        self.isResident = isResident
    }

    var info: DeviceInfo { lower.info }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        precondition(!range.isEmpty && range.upperBound <= info.size, "a map was asked for \(range)")
        switch patience {
        case .resident: if !isResident { return range.lowerBound }
        case .blocking: blockingMaps.add(1, ordering: .relaxed)
        }
        return try lower.map(range, patience, into: &extents)
    }

    func prefetch(_ range: Range<UInt64>) { prefetched.withLock { $0.append(range) } }
}
