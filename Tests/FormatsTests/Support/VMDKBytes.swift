// VMDK files made byte by byte: the kinds that no tool here makes, and descriptors of every sort.
import Block
import Formats
import Foundation
import Support

/// Little-endian numbers in an array that grows.
struct FileBytes {
    var bytes: [UInt8] = []

    mutating func put<T: FixedWidthInteger>(_ value: T, at offset: Int) {
        if bytes.count < offset + T.bitWidth / 8 {
            bytes += [UInt8](repeating: 0, count: offset + T.bitWidth / 8 - bytes.count)
        }
        withUnsafeBytes(of: value.littleEndian) { bytes.replaceSubrange(offset..<(offset + $0.count), with: $0) }
    }

    mutating func put(_ content: [UInt8], at offset: Int) {
        if bytes.count < offset + content.count {
            bytes += [UInt8](repeating: 0, count: offset + content.count - bytes.count)
        }
        bytes.replaceSubrange(offset..<(offset + content.count), with: content)
    }

    /// Zeros up to a whole number of units.
    mutating func pad(to unit: Int) {
        bytes += [UInt8](repeating: 0, count: (unit - bytes.count % unit) % unit)
    }
}

enum VMDKBytes {
    /// A descriptor's text.
    static func descriptor(
        _ extents: [String], type: String = "monolithicSparse", contentID: String = "11111111",
        parentID: String = "ffffffff", parent: String? = nil, more: String = ""
    ) -> [UInt8] {
        let hint = parent.map { "parentFileNameHint=\"\($0)\"\n" } ?? ""
        return Array(
            """
            # Disk DescriptorFile
            version=1
            encoding="UTF-8"
            CID=\(contentID)
            parentCID=\(parentID)
            isNativeSnapshot="no"
            createType="\(type)"
            \(hint)
            # Extent description
            \(extents.joined(separator: "\n"))

            # The Disk Data Base
            #DDB
            ddb.adapterType = "lsilogic"
            \(more)
            """.utf8)
    }

    /// What a grain of a hand-made file is.
    enum Grain {
        case data([UInt8])
        case zero
        /// seSparse: the guest has given it up.
        case unmapped
        /// An entry as it stands in the table.
        case entry(UInt64)
    }

    /// A COWD file.
    ///
    /// - Parameter grains: by their numbers.
    static func cow(sectors: Int, grainSectors: Int, _ grains: [Int: Grain]) -> [UInt8] {
        let tableReach = 4096 * grainSectors
        let tables = (sectors + tableReach - 1) / tableReach
        var file = FileBytes()
        file.put(Array("COWD".utf8), at: 0)
        for (index, value) in [1, 3, sectors, grainSectors, 4, tables].enumerated() {
            file.put(UInt32(value), at: 4 + index * 4)
        }
        file.put([UInt8](repeating: 0, count: tables * 4), at: 2048)
        file.pad(to: 512)
        for table in Set(grains.keys.map { $0 / 4096 }).sorted() {
            file.put(UInt32(file.bytes.count / 512), at: 2048 + table * 4)
            let start = file.bytes.count
            file.put([UInt8](repeating: 0, count: 4096 * 4), at: start)
            for (number, grain) in grains.sorted(by: { $0.key < $1.key }) where number / 4096 == table {
                var entry: UInt32 = 0
                switch grain {
                case .data(let bytes):
                    entry = UInt32(file.bytes.count / 512)
                    file.put(bytes, at: file.bytes.count)
                    file.pad(to: grainSectors * 512)
                case .entry(let value): entry = UInt32(value)
                case .zero, .unmapped: break
                }
                file.put(entry, at: start + number % 4096 * 4)
            }
        }
        file.put(UInt32(file.bytes.count / 512), at: 28)
        return file.bytes
    }

    /// Where things are in a hand-made seSparse file, in sectors.
    static let seSparseDirectory = 16
    static let seSparseTables = 24

    /// An seSparse file. Its tables are in the opposite order of the disk, its grains from the second one on.
    static func seSparse(sectors: Int, replaysJournal: Bool = false, _ grains: [Int: Grain]) -> [UInt8] {
        let tableReach = 4096 * 8
        let tables = (sectors + tableReach - 1) / tableReach
        let used = Set(grains.keys.map { $0 / 4096 }).sorted(by: >)
        let grainsStart = seSparseTables + 64 * max(used.count, 1)
        var file = FileBytes()
        let header: [(Int, Int)] = [
            (0, 0xCAFE_BABE), (8, 0x2_0000_0001), (16, sectors), (24, 8), (32, 64), (80, 1), (88, 1), (96, 2), (104, 1),
            (112, 3), (120, 8), (128, seSparseDirectory), (136, (tables * 8 + 511) / 512), (144, seSparseTables),
            (152, 64 * used.count), (160, 12), (168, 1), (176, 13), (184, 1), (192, grainsStart), (200, sectors),
        ]
        for (offset, value) in header { file.put(UInt64(value), at: offset) }
        file.put(UInt64(0xCAFE_CAFE), at: 512)
        file.put(UInt64(replaysJournal ? 1 : 0), at: 512 + 24)
        file.put([UInt8](repeating: 0, count: tables * 8), at: seSparseDirectory * 512)
        file.put([UInt8](repeating: 0, count: 64 * 512 * used.count), at: seSparseTables * 512)
        var next: UInt64 = 1
        for (index, table) in used.enumerated() {
            file.put(UInt64(index) | 0x1000_0000 << 32, at: seSparseDirectory * 512 + table * 8)
            for (number, grain) in grains.sorted(by: { $0.key < $1.key }) where number / 4096 == table {
                var entry: UInt64 = 0
                switch grain {
                case .data(let bytes):
                    entry = 3 << 60 | (next & 0xFFF) << 48 | next >> 12
                    file.put(bytes, at: (grainsStart + Int(next) * 8) * 512)
                    file.pad(to: 4096)
                    next += 1
                case .zero: entry = 2 << 60
                case .unmapped: entry = 1 << 60
                case .entry(let value): entry = value
                }
                file.put(entry, at: (seSparseTables + 64 * index) * 512 + number % 4096 * 8)
            }
        }
        return file.bytes
    }

    /// A hosted sparse file without a descriptor in it: header, directory, tables, grains of 4 KiB.
    static func hosted(sectors: Int, flags: UInt32 = 3, redundant: Bool = false, _ grains: [Int: Grain]) -> [UInt8] {
        let grainSectors = 8
        let tableReach = 512 * grainSectors
        let tables = (sectors + tableReach - 1) / tableReach
        let directory = 1
        let tablesStart = directory + (tables * 4 + 511) / 512
        var file = FileBytes()
        file.put(Array("KDMV".utf8), at: 0)
        file.put(UInt32(2), at: 4)
        file.put(flags, at: 8)
        file.put(UInt64(sectors), at: 0x0C)
        file.put(UInt64(grainSectors), at: 0x14)
        file.put(UInt32(512), at: 0x2C)
        file.put(UInt64(redundant ? directory : 0), at: 0x30)
        file.put(UInt64(redundant ? 1 << 40 : directory), at: 0x38)
        file.put(UInt64(tablesStart + 4 * tables), at: 0x40)
        file.put([0x0A, 0x20, 0x0D, 0x0A], at: 0x49)
        file.put([UInt8](repeating: 0, count: 4 * tables * 512), at: tablesStart * 512)
        file.pad(to: 4096)
        for table in 0..<tables { file.put(UInt32(tablesStart + 4 * table), at: directory * 512 + table * 4) }
        for (number, grain) in grains.sorted(by: { $0.key < $1.key }) {
            var entry: UInt32 = 0
            switch grain {
            case .data(let bytes):
                entry = UInt32(file.bytes.count / 512)
                file.put(bytes, at: file.bytes.count)
                file.pad(to: grainSectors * 512)
            case .zero: entry = 1
            case .unmapped: break
            case .entry(let value): entry = UInt32(value)
            }
            file.put(entry, at: tablesStart * 512 + number * 4)
        }
        return file.bytes
    }
}

/// Files by their names, and LUNs by the names of their mapping files.
struct FilesInMemory: FileResolver {
    var files: [String: [UInt8]]
    var mapped: [String: [UInt8]] = [:]

    func open(_ name: String) throws(BlockError) -> ResolvedFile {
        guard let bytes = files[name] else { throw BlockError(.notFound, "there is no \(name)") }
        return ResolvedFile(device: BytesDevice(bytes, name: name), identity: name, resolver: self)
    }

    func openMappedDevice(_ name: String) throws(BlockError) -> ResolvedFile {
        guard let bytes = mapped[name] else { throw BlockError(.unsupported, "there is no LUN for \(name)") }
        return ResolvedFile(device: BytesDevice(bytes, name: "LUN"), identity: "LUN", resolver: nil)
    }

    /// Opens the VMDK of a name.
    func disk(_ name: String, _ options: VMDKOptions = VMDKOptions()) throws -> any BlockDevice {
        try openDisk(try open(name), .guess(name: name, isNodeOrRemote: false), vmdk: options)
    }
}

/// A disk's content that is easy to make: every sector has its own number and that of the layer that wrote it.
struct LayeredModel {
    var bytes: [UInt8]

    init(sectors: Int) { bytes = [UInt8](repeating: 0, count: sectors * 512) }

    /// What a layer writes to a range of sectors.
    static func sectors(_ range: Range<Int>, layer: UInt8) -> [UInt8] {
        range.flatMap { number -> [UInt8] in
            var sector = [UInt8](repeating: layer, count: 512)
            for byte in 0..<4 { sector[byte] = UInt8(truncatingIfNeeded: number >> (8 * byte)) }
            return sector
        }
    }

    mutating func write(_ range: Range<Int>, layer: UInt8) {
        let range = range.clamped(to: 0..<(bytes.count / 512))
        bytes.replaceSubrange(
            (range.lowerBound * 512)..<(range.upperBound * 512), with: Self.sectors(range, layer: layer))
    }

    mutating func zero(_ range: Range<Int>) {
        let range = range.clamped(to: 0..<(bytes.count / 512))
        bytes.replaceSubrange(
            (range.lowerBound * 512)..<(range.upperBound * 512), with: repeatElement(0, count: range.count * 512))
    }
}
