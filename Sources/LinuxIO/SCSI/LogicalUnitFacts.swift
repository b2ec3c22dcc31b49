// What a logical unit says of itself: who it is, how large, and whether it gives storage back.
public import Block

/// Facts of a logical unit, as it tells them.
public struct LogicalUnitFacts: Sendable, Equatable {
    /// Whether and how a unit is thin (SBC-3 4.7).
    public struct Provisioning: Sendable, Equatable {
        /// Blocks may have no storage (LBPME).
        public var isThin = false
        /// Blocks without storage read as zeros (LBPRZ), by all that the unit says of it.
        public var readsZeros = false
    }

    public var vendor = ""
    public var model = ""
    public var revision = ""
    /// Its worldwide names, best first, as `VitalProductData.names` has them.
    public var names: [String] = []
    public var serial: String?
    /// Bytes in a logical block, 512 to 65536.
    public var blockSize: UInt32 = 512
    /// Logical blocks, at least 1.
    public var blockCount: UInt64 = 0
    /// Bytes in a physical block.
    public var physicalBlock: UInt32 = 512
    /// The most blocks of one transfer; nil where it does not say.
    public var transferMax: UInt32?
    public var provisioning = Provisioning()

    /// Bytes on the unit.
    public var size: UInt64 { blockCount * UInt64(blockSize) }

    /// Asks a unit.
    ///
    /// - Throws: `.notFound` when there is no unit of this number, `.unsupported` when it is no disk, or has blocks
    ///   that no disk has here; `.inputOutput`.
    public init(of path: some SCSICommandPath) throws(BlockError) {
        try readInquiry(path)
        _ = try path.ask(.testUnitReady, count: 0)
        try readCapacity(path)
        let pages = try Self.told { () throws(BlockError) in try path.ask(.inquiry(page: 0, length: 255), count: 255) }
        let known = pages.count > 4 && pages[1] == 0 ? pages[4...].prefix(Int(pages[2]) << 8 | Int(pages[3])) : []
        func page(_ code: UInt8, count: Int) throws(BlockError) -> [UInt8] {
            known.contains(code) ? try path.ask(.inquiry(page: code, length: UInt16(count)), count: count) : []
        }
        names = VitalProductData.names(try page(0x83, count: 4096))
        serial = VitalProductData.serial(try page(0x80, count: 255))
        readLimits(try page(0xB0, count: 64))
        if provisioning.isThin { readProvisioning(try page(0xB2, count: 64)) }
    }

    /// What a unit answers to READ CAPACITY(16) and the page B2, for tests and for nodes whose identity the kernel has.
    ///
    /// - Throws: as `init(of:)`.
    init(capacityOf path: some SCSICommandPath) throws(BlockError) {
        try readCapacity(path)
        if provisioning.isThin {
            let page = try Self.told { () throws(BlockError) in
                try path.ask(.inquiry(page: 0xB2, length: 64), count: 64)
            }
            readProvisioning(page)
        }
    }

    /// An answer; none from a unit that does not know the question. What only went wrong is no answer.
    private static func told(_ asking: () throws(BlockError) -> [UInt8]) throws(BlockError) -> [UInt8] {
        do throws(BlockError) {
            return try asking()
        } catch  where error.kind == .unsupported {
            return []
        }
    }

    private mutating func readInquiry(_ path: some SCSICommandPath) throws(BlockError) {
        let data = try path.ask(.inquiry(length: 96), count: 96)
        guard data.count >= 36 else {
            throw BlockError(.inputOutput, "INQUIRY on \(path.unitName): an answer of \(data.count) bytes")
        }
        let qualifier = data[0] >> 5
        let type = data[0] & 31
        if qualifier != 0 || type == 31 {
            throw BlockError(.notFound, "opening \(path.unitName): the target has no such logical unit")
        }
        // 0 is a disk, 7 and 14 are simpler kinds of it.
        guard [0, 7, 14].contains(type) else {
            throw BlockError(.unsupported, "opening \(path.unitName): it is no disk, but a device of the type \(type)")
        }
        vendor = VitalProductData.text(data[8..<16])
        model = VitalProductData.text(data[16..<32])
        revision = VitalProductData.text(data[32..<36])
    }

    private mutating func readCapacity(_ path: some SCSICommandPath) throws(BlockError) {
        var last: UInt64
        do throws(BlockError) {
            let data = try path.ask(.readCapacity16(length: 32), count: 32)
            guard data.count >= 12 else {
                throw BlockError(.inputOutput, "READ CAPACITY(16) on \(path.unitName): \(data.count) bytes")
            }
            last = UInt64(bigEndian: data, at: 0)
            blockSize = UInt32(truncatingIfNeeded: UInt64(bigEndian: data, at: 4))
            physicalBlock = blockSize
            if data.count >= 15 {
                let exponent = UInt32(data[13] & 15)
                if exponent < 12, blockSize <= 65536 { physicalBlock = blockSize << exponent }
                provisioning.isThin = data[14] & 0x80 != 0
                provisioning.readsZeros = data[14] & 0x40 != 0
            }
        } catch  where error.kind == .unsupported {
            let data = try path.ask(.readCapacity10, count: 8)
            guard data.count == 8 else {
                throw BlockError(.inputOutput, "READ CAPACITY(10) on \(path.unitName): \(data.count) bytes")
            }
            let both = UInt64(bigEndian: data, at: 0)
            (last, blockSize) = (both >> 32, UInt32(truncatingIfNeeded: both))
            physicalBlock = blockSize
        }
        guard blockSize.nonzeroBitCount == 1, (512...65536).contains(blockSize) else {
            throw BlockError(.unsupported, "opening \(path.unitName): it has blocks of \(blockSize) bytes")
        }
        guard last < UInt64(Int64.max) / UInt64(blockSize) else {
            throw BlockError(.tooLarge, "opening \(path.unitName): it claims \(last) blocks of \(blockSize) bytes")
        }
        blockCount = last + 1
    }

    /// Block limits (SBC-3 6.6.4).
    private mutating func readLimits(_ page: [UInt8]) {
        guard page.count >= 16, page[1] == 0xB0 else { return }
        func number(_ offset: Int) -> UInt32? {
            guard page.count >= offset + 4 else { return nil }
            let value = page[offset..<(offset + 4)].reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
            return value == 0 ? nil : value
        }
        transferMax = number(8)
    }

    /// Logical block provisioning (SBC-3 6.6.6). Its word on zeros has to agree with that of READ CAPACITY(16).
    private mutating func readProvisioning(_ page: [UInt8]) {
        guard page.count >= 6, page[1] == 0xB2 else { return }
        if page[5] & 0x04 == 0 { provisioning.readsZeros = false }
    }

    /// Whether the unit tells by what to know it again.
    public var hasIdentity: Bool { !names.isEmpty || serial?.isEmpty == false }

    /// How another look at what should be the same unit differs; nil where it does not.
    public func difference(from earlier: LogicalUnitFacts) -> String? {
        if names != earlier.names {
            return
                "its names are \(names.joined(separator: ", ")) now, and were \(earlier.names.joined(separator: ", "))"
        }
        if serial != earlier.serial {
            return "its serial number is \(serial ?? "none") now, and was \(earlier.serial ?? "none")"
        }
        if (blockSize, blockCount) != (earlier.blockSize, earlier.blockCount) {
            return "it has \(size) bytes now, and had \(earlier.size)"
        }
        return nil
    }
}

extension UInt64 {
    /// The number whose most significant byte is at an offset, with 8 bytes from there.
    fileprivate init(bigEndian bytes: [UInt8], at offset: Int) {
        self = bytes[offset..<(offset + 8)].reduce(0) { $0 << 8 | UInt64($1) }
    }
}
