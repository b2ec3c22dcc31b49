// A device that moves what is written and reuses the places at once: the hardest case for readers that mapped before.
public import Block
import LinuxIO
import Synchronization

/// A writable disk in memory of `size` bytes, all zeros, in 4 KiB chunks. A written chunk moves to another slot, and
/// its old slot is the first to be reused, after `mapVersion` has changed. Every seventh chunk's place is "not in
/// memory" for `.resident`.
public func makeRelocatingDevice(size: UInt64) throws -> any BlockDevice { try RelocatingDevice(size: size) }

private final class RelocatingDevice: BlockDevice {
    /// Bytes that move together.
    static let chunkSize: UInt64 = 4096

    let info: DeviceInfo
    private let store: RawFileDevice
    private let version = Atomic<UInt64>(1)
    private let state: Locked<State>

    private struct State {
        /// The slot of each chunk, nil for zeros.
        var slots: [Int?]
        var free: [Int]
        /// Slots from here on have never been used, so nobody can have mapped them.
        var fresh = 0
    }

    init(size: UInt64) throws {
        let chunks = Int((size + Self.chunkSize - 1) / Self.chunkSize)
        store = try NamelessFile.memory(size: UInt64(chunks + 4) * Self.chunkSize)
        var info = DeviceInfo(size: size, format: "relocating", name: "relocating:\(size)")
        info.isReadOnly = false
        info.canDiscard = true
        self.info = info
        state = Locked(State(slots: Array(repeating: nil, count: chunks), free: []))
    }

    var mapVersion: UInt64 { version.load(ordering: .sequentiallyConsistent) }

    func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        try state.withLock { (state) throws(BlockError) -> UInt64 in
            var position = range.lowerBound
            while position < range.upperBound {
                let chunk = Int(position / Self.chunkSize)
                if patience == .resident && chunk % 7 == 3 { break }
                let start = UInt64(chunk) * Self.chunkSize
                let end = min(start + Self.chunkSize, range.upperBound)
                if let slot = state.slots[chunk] {
                    let from = UInt64(slot) * Self.chunkSize + position - start
                    let mapped = try store.map(from..<(from + end - position), patience, into: &extents)
                    if mapped < from + end - position { break }
                } else if !extents.append(end - position, .zeros(allocated: false)) {
                    break
                }
                position = end
            }
            return position
        }
    }

    /// Replaces part of each chunk of a range.
    private func change(
        _ range: Range<UInt64>, _ apply: (Range<UInt64>, UnsafeMutableRawBufferPointer) -> Void
    ) throws(BlockError) {
        try state.withLock { (state) throws(BlockError) in
            var position = range.lowerBound
            while position < range.upperBound {
                let chunk = Int(position / Self.chunkSize)
                let start = UInt64(chunk) * Self.chunkSize
                let end = min(start + Self.chunkSize, range.upperBound)
                let copy = Buffer(count: Int(Self.chunkSize))
                copy.bytes.initializeMemory(as: UInt8.self, repeating: 0)
                if let slot = state.slots[chunk] { try store.read(into: copy.bytes, at: UInt64(slot) * Self.chunkSize) }
                let part = copy.bytes[Int(position - start)..<Int(end - start)]
                apply(position..<end, UnsafeMutableRawBufferPointer(rebasing: part))
                try place(copy, chunk, &state)
                position = end
            }
        }
    }

    private func place(_ copy: borrowing Buffer, _ chunk: Int, _ state: inout State) throws(BlockError) {
        let slot: Int
        if let reused = state.free.popLast() {
            // Somebody may have mapped this slot when it was another chunk's.
            version.add(1, ordering: .sequentiallyConsistent)
            slot = reused
        } else {
            slot = state.fresh
            state.fresh += 1
        }
        try store.write(copy.readable, at: UInt64(slot) * Self.chunkSize, durable: false)
        if let old = state.slots[chunk] { state.free.append(old) }
        state.slots[chunk] = slot
    }

    func write(_ bytes: UnsafeRawBufferPointer, at offset: UInt64, durable: Bool) throws(BlockError) {
        try change(offset..<(offset + UInt64(bytes.count))) { part, memory in
            let from = Int(part.lowerBound - offset)
            memory.copyMemory(from: UnsafeRawBufferPointer(rebasing: bytes[from..<(from + memory.count)]))
        }
    }

    func zero(_ range: Range<UInt64>, _ options: ZeroOptions) throws(BlockError) {
        try change(range) { _, memory in memory.initializeMemory(as: UInt8.self, repeating: 0) }
    }

    func discard(_ range: Range<UInt64>, durable: Bool) throws(BlockError) {
        let first = Int((range.lowerBound + Self.chunkSize - 1) / Self.chunkSize)
        let end = Int(range.upperBound / Self.chunkSize)
        if first >= end { return }
        state.withLock { state in
            for chunk in first..<end {
                if let old = state.slots[chunk] { state.free.append(old) }
                state.slots[chunk] = nil
            }
        }
    }
}
