// The memory that requests in flight may hold, all connections together: bounded whatever clients do.
import Block
import Glibc
import Synchronization

/// A budget of bytes that the slots of all connections share.
///
/// Each connection gets its first slot in any case, so that nobody waits for somebody else; beyond the budget it gets a
/// second one only when its own are free again.
final class SlotBudget: Sendable {
    /// The most bytes, but for the first slots.
    let bytesMax: Int
    private let used = Atomic<Int>(0)

    init(bytesMax: Int) { self.bytesMax = bytesMax }

    /// Bytes that slots hold.
    var bytes: Int { used.load(ordering: .relaxed) }

    /// Whether so much is in use that slots keep no memory they do not need.
    var isTight: Bool { bytes > bytesMax / 4 * 3 }

    /// Takes bytes; beyond the budget only for a connection's first slot.
    func take(_ count: Int, isFirst: Bool) -> Bool {
        let after = used.wrappingAdd(count, ordering: .relaxed).newValue
        if after <= bytesMax || isFirst { return true }
        used.wrappingSubtract(count, ordering: .relaxed)
        return false
    }

    func giveBack(_ count: Int) { used.wrappingSubtract(count, ordering: .relaxed) }
}

/// Memory of a slot, in whole pages; whoever makes it deallocates it.
struct SlotPages {
    /// From this size on, memory is mapped and unmapped by itself: the allocator would keep what is freed. Smaller
    /// pieces come from the allocator, since a process may have some 65,000 mappings only (vm.max_map_count).
    private static let mappedMin = 128 * 1024

    /// The memory.
    let bytes: UnsafeMutableRawBufferPointer
    private let isMapped: Bool

    /// The bytes that a piece of memory for `count` bytes has.
    static func size(_ count: Int) -> Int { (count + Buffer.alignment - 1) / Buffer.alignment * Buffer.alignment }

    /// Memory of `size(count)` bytes.
    init(_ count: Int) {
        let size = Self.size(count)
        if size >= Self.mappedMin,
            let start = mmap(nil, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), start != MAP_FAILED
        {
            bytes = UnsafeMutableRawBufferPointer(start: start, count: size)
            isMapped = true
        } else {
            bytes = .allocate(byteCount: size, alignment: Buffer.alignment)
            isMapped = false
        }
    }

    func deallocate() {
        if isMapped { munmap(bytes.baseAddress, bytes.count) } else { bytes.deallocate() }
    }

    /// Gives pages of memory back whose content is not needed any more; the memory itself stays.
    static func forget(_ memory: UnsafeMutableRawBufferPointer) {
        madvise(memory.baseAddress, memory.count, MADV_DONTNEED)
    }
}
