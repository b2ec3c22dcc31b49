// A disk whose bytes are in memory and whose status is whatever a test says, true or not.
import Block
import LinuxIO
import Support

/// A disk in memory that tells what it was told to tell.
final class ToldDevice: BlockDevice {
    let info: DeviceInfo
    let storage: RawFileDevice
    private let allocation: [StatusExtent]
    private let dirty: [StatusExtent]
    /// What is added to the end that a status answer claims.
    private let lie: Int64

    init(size: UInt64, allocation: [StatusExtent], dirty: [StatusExtent] = [], lie: Int64 = 0) throws {
        storage = try NamelessFile.memory(size: size)
        self.allocation = allocation
        self.dirty = dirty
        self.lie = lie
        var info = DeviceInfo(size: size, format: "raw", name: "told")
        info.dirtyBitmaps = dirty.isEmpty ? [] : ["changes"]
        self.info = info
    }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    { try storage.map(range, patience, into: &extents) }

    func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList) throws(BlockError)
        -> UInt64
    {
        var position: UInt64 = 0
        var end = range.lowerBound
        for extent in context == .allocation ? allocation : dirty {
            let part = (position..<(position + extent.length)).clamped(to: range)
            position += extent.length
            if part.isEmpty { continue }
            if !list.append(part.count64, extent.value) { break }
            end = part.upperBound
        }
        return UInt64(Int64(end) + lie)
    }
}

/// A random disk: data, zeros that are told, zeros that are not, in runs of any alignment.
///
/// - Parameter hasDirty: whether it has a dirty bitmap, of some granularity.
func randomDisk(size: UInt64, hasDirty: Bool, _ generator: inout SeededGenerator) throws -> ToldDevice {
    let unit: UInt64 = [1, 512, 4096, 65536].randomElement(using: &generator) ?? 1
    var allocation: [StatusExtent] = []
    var data: [Range<UInt64>] = []
    var position: UInt64 = 0
    while position < size {
        let longest: UInt64 = generator.oneIn(4) ? 2 << 20 : 100_000
        let count = UInt64.random(in: 1...longest, using: &generator) / unit * unit + unit
        let end = min(size, position + count)
        let value = UInt32.random(in: 0...3, using: &generator)
        allocation.append(StatusExtent(length: end - position, value: value))
        if value & AllocationFlags.zero == 0 && !generator.oneIn(5) { data.append(position..<end) }
        position = end
    }
    var dirty: [StatusExtent] = []
    position = 0
    while hasDirty && position < size {
        let end = min(size, position + UInt64.random(in: 1...10, using: &generator) * 16384)
        dirty.append(StatusExtent(length: end - position, value: generator.oneIn(3) ? 1 : 0))
        position = end
    }
    let device = try ToldDevice(size: size, allocation: allocation, dirty: dirty)
    for range in data { try fill(device.storage, range, &generator) }
    return device
}

/// Writes pattern bytes to a range.
func fill(_ device: any BlockDevice, _ range: Range<UInt64>, _ generator: inout SeededGenerator) throws {
    let bytes = patternBytes(Int(range.count64), seed: generator.next())
    try bytes.withUnsafeBytes { try device.write($0, at: range.lowerBound, durable: false) }
}

/// All bytes of a disk.
func content(_ device: any BlockDevice) throws -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Int(device.info.size))
    try bytes.withUnsafeMutableBytes { try device.read(into: $0, at: 0) }
    return bytes
}
