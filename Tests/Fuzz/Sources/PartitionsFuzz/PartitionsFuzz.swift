// Fuzzes partition tables: whatever a disk says of its parts, those that can be used lie inside it.
import Block
import Formats
import FuzzSupport

@main
struct PartitionsFuzz {
    static func main() {
        fuzz { input in
            var choices = Choices(input)
            let shape = choices.byte()
            var bytes = Array(choices.rest())
            let sectorSize = shape & 1 != 0 ? 4096 : 512
            // A backup table has its header in the last sector and its entries before it.
            let tail = shape & 2 != 0 ? min(2 * sectorSize, bytes.count / 512 * 512) : 0
            let sizes: [UInt64?] = [nil, 1 << 20, 3 << 40, UInt64(Int64.max)]
            let size = sizes[Int(shape >> 2 & 3)].map { max($0, UInt64(bytes.count)) }
            if shape & 0x10 != 0 { repair(&bytes, sectorSize, tail: tail) }
            let disk = ImageDevice(
                bytes, name: "disk", size: size, tail: tail, minimumBlock: shape & 1 != 0 ? 4096 : 1)
            guard let table = try? PartitionTable.read(from: disk) else { return }
            check(table, of: disk)
        }
    }

    private static func check(_ table: PartitionTable, of disk: ImageDevice) {
        require(table.partitions.count <= 1 << 17, "\(table.partitions.count) partitions")
        require(table.sectorSize == 512 || table.sectorSize == 4096, "sectors of \(table.sectorSize) bytes")
        var numbers: Set<Int> = []
        for partition in table.partitions {
            require(numbers.insert(partition.number).inserted, "two partitions \(partition.number)")
            let slice = try? table.open(partition.number, of: disk)
            require(
                (slice != nil) == (partition.problem == nil), "partition \(partition.number) opens against its word")
            guard let slice else { continue }
            require(partition.range.upperBound <= disk.info.size, "partition \(partition.number) ends past the disk")
            require(slice.info.size == partition.range.count64, "partition \(partition.number) has another size")
            if numbers.count <= 8 {
                checkMap(slice, 0..<slice.info.size, .blocking)
                checkRead(slice, (slice.info.size - min(slice.info.size, 600))..<slice.info.size)
            }
        }
        require((try? table.open(0, of: disk)) == nil || numbers.contains(0), "a partition that is not there opens")
    }

    /// Puts right checksums into the headers of a GPT in the second sector and in the last one, as far as they are
    /// there, so that mutations get past them.
    private static func repair(_ bytes: inout [UInt8], _ sectorSize: Int, tail: Int) {
        for header in [sectorSize, bytes.count - sectorSize] where header >= 0 && header + 92 <= bytes.count {
            guard bytes[header..<(header + 8)].elementsEqual("EFI PART".utf8) else { continue }
            func field(_ offset: Int) -> Int {
                (0..<4).reduce(0) { $0 | Int(bytes[header + offset + $1]) << (8 * $1) }
            }
            // The entries of the first copy where it says; those of the backup in the sector before it.
            let entries = header == sectorSize ? field(72) * sectorSize : header - sectorSize
            let (length, isTooLong) = field(80).multipliedReportingOverflow(by: field(84))
            if entries >= 0, !isTooLong, length <= bytes.count, entries + length <= bytes.count {
                put(checksum(bytes[entries..<(entries + length)]), at: header + 88, of: &bytes)
            }
            let headerLength = field(12)
            put(0, at: header + 16, of: &bytes)
            if headerLength <= bytes.count - header {
                put(checksum(bytes[header..<(header + headerLength)]), at: header + 16, of: &bytes)
            }
        }
    }

    private static func put(_ value: UInt32, at offset: Int, of bytes: inout [UInt8]) {
        for index in 0..<4 { bytes[offset + index] = UInt8(truncatingIfNeeded: value >> UInt32(8 * index)) }
    }

    private static let checksumTable: [UInt32] = (0..<256).map { value in
        (0..<8).reduce(UInt32(value)) { rest, _ in rest & 1 != 0 ? rest >> 1 ^ 0xEDB8_8320 : rest >> 1 }
    }

    /// The CRC-32 of some bytes.
    private static func checksum(_ bytes: ArraySlice<UInt8>) -> UInt32 {
        ~bytes.reduce(~0 as UInt32) { checksumTable[Int(($0 ^ UInt32($1)) & 0xFF)] ^ $0 >> 8 }
    }
}
