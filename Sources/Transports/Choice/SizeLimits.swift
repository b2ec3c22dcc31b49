// How large a disk may be where it is hot-added: the block sizes of VMFS-3, and what ends at 2 TiB.

/// Limits of file sizes.
enum SizeLimits {
    /// The largest file on VMFS-3 for each size of its blocks, in bytes. (VMFS-5 and VMFS-6 hold 62 TiB.)
    private static let vmfs3: [UInt64: UInt64] = [
        1 << 20: 256 << 30, 2 << 20: 512 << 30, 4 << 20: 1 << 40, 8 << 20: 2 << 40,
    ]

    /// The largest file on a VMFS-3 datastore, in bytes; nil for a size of blocks that VMFS-3 does not have.
    static func largestFileOnVMFS3(blockSize: UInt64) -> UInt64? { vmfs3[blockSize].map { $0 - 512 } }

    /// The largest disk before hosts and adapters had to learn more, in bytes: 32 bits of sectors, less one.
    static let twoTebibytes: UInt64 = (2 << 40) - 512

    /// The first version of ESXi with disks above `twoTebibytes`.
    static let largeDiskVersion = [5, 5]
}

/// A version as a host tells it, for example 7.0.3 or ESXi 6.7.
struct HostVersion: Comparable {
    let parts: [Int]

    /// Takes the first number with points in it; nil where there is none.
    init?(_ text: String) {
        guard let start = text.firstIndex(where: { $0.isASCII && $0.isNumber }) else { return nil }
        let number = text[start...].prefix { $0.isASCII && ($0.isNumber || $0 == ".") }
        parts = number.split(separator: ".").prefix(4).map { Int($0) ?? Int.max }
    }

    init(_ parts: [Int]) { self.parts = parts }

    static func < (left: Self, right: Self) -> Bool { left.parts.lexicographicallyPrecedes(right.parts) }
    static func == (left: Self, right: Self) -> Bool { left.parts == right.parts }
}
