// The LUNs of a volume one behind the other: volume offsets become places on LUNs.
import Block

/// The bytes of a volume, read-only. Its map consists of what the LUNs say of the ranges that lie on them.
final class VMFSSpan: BlockDevice {
    private struct Run {
        let start: UInt64
        let end: UInt64
        let physical: UInt64
        let device: any BlockDevice
    }

    let info: DeviceInfo
    private let runs: [Run]

    /// The volume that consists of these LUNs; their runs must follow each other from the volume's start.
    ///
    /// - Throws: `.corrupt` when they leave a gap or overlap.
    init(_ members: [VMFSMember], name: String) throws(BlockError) {
        var runs: [Run] = []
        for member in members {
            for segment in member.segments {
                runs.append(
                    Run(
                        start: segment.logical, end: segment.logical + segment.length, physical: segment.physical,
                        device: member.device))
            }
        }
        runs.sort { $0.start < $1.start }
        var end: UInt64 = 0
        for run in runs {
            guard run.start == end else {
                throw BlockError(
                    .corrupt, "opening \(name): its LUNs do not follow each other: \(run.start) comes after \(end)")
            }
            end = run.end
        }
        guard end > 0 else { throw BlockError(.corrupt, "opening \(name): none of its bytes is on any LUN") }
        self.runs = runs
        var info = DeviceInfo(size: end, format: "vmfs", name: name)
        info.isRotational = members.contains { $0.device.info.isRotational }
        self.info = info
    }

    /// The run with the byte at an offset below the size.
    @inline(__always)
    private func index(at offset: UInt64) -> Int {
        var low = 0
        var high = runs.count &- 1
        while low < high {
            let middle = (low + high) / 2
            if runs[middle].end <= offset { low = middle + 1 } else { high = middle }
        }
        return low
    }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError) -> UInt64
    {
        var position = range.lowerBound
        var index = index(at: position)
        while position < range.upperBound {
            let run = runs[index]
            let from = run.physical &+ (position &- run.start)
            let to = from &+ (min(range.upperBound, run.end) &- position)
            let mapped = try run.device.map(from..<to, patience, into: &extents)
            position = position &+ (mapped &- from)
            if mapped < to { break }
            index += 1
        }
        return position
    }

    func prefetch(_ range: Range<UInt64>) {
        var position = range.lowerBound
        var index = index(at: position)
        while position < range.upperBound {
            let run = runs[index]
            let end = min(range.upperBound, run.end)
            let from = run.physical + (position - run.start)
            run.device.prefetch(from..<(from + (end - position)))
            position = end
            index += 1
        }
    }

    var mapVersion: UInt64 {
        var version: UInt64 = 0
        for run in runs { version &+= run.device.mapVersion }
        return version
    }
}
