// Asks everything of a disk that a parser has made of an input, in a bounded share of it.
public import Block

/// Looks at the disk from its start, at its end, and in between: maps, status, prefetching, reads.
///
/// - Parameter step: bytes that are looked at in one place.
public func exerciseDisk(_ device: any BlockDevice, step: UInt64 = 1 << 20) {
    let size = device.info.size
    if size == 0 { return }
    for turn in 0..<8 as Range<UInt64> {
        // The first turns lie at the start, one after the other; the others are spread to the end.
        let start = turn < 4 ? turn * step : max(size / 4 * (turn - 3), 1) - 1
        guard start < size else { continue }
        let range = start..<min(size, start + step)
        checkMap(device, range, .resident)
        checkMap(device, range, .blocking)
        checkStatus(device, .allocation, range)
        checkStatus(device, .depth, range)
        device.prefetch(range)
        checkRead(device, start..<min(range.upperBound, start + 3000))
    }
    checkRead(device, (size - min(size, 70_000))..<size)
}
