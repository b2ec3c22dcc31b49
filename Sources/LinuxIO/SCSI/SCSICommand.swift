// SCSI commands to logical units, and what they answer: the same over iSCSI and through the kernel's nodes.
public import Block

/// A command descriptor block.
public struct SCSICommand: Sendable, Equatable {
    /// The block's bytes, 6 to 16.
    public let block: [UInt8]
    /// What it does, for messages.
    public let name: String

    private init(_ name: String, _ block: [UInt8]) {
        self.name = name
        self.block = block
    }

    private static func bytes(_ value: some FixedWidthInteger) -> [UInt8] {
        withUnsafeBytes(of: value.bigEndian, Array.init)
    }

    /// Asks whether the unit is ready (SPC-4 6.37).
    public static let testUnitReady = SCSICommand("TEST UNIT READY", [UInt8](repeating: 0, count: 6))

    /// What the unit is, or a page of its vital product data (SPC-4 6.6).
    public static func inquiry(page: UInt8? = nil, length: UInt16) -> SCSICommand {
        SCSICommand("INQUIRY", [0x12, page == nil ? 0 : 1, page ?? 0] + bytes(length) + [0])
    }

    /// The unit's size (SBC-3 5.15), for units up to 2^32 blocks.
    public static let readCapacity10 = SCSICommand("READ CAPACITY(10)", [0x25] + [UInt8](repeating: 0, count: 9))

    /// The unit's size, and whether it is thin (SBC-3 5.16).
    public static func readCapacity16(length: UInt32) -> SCSICommand {
        SCSICommand("READ CAPACITY(16)", [0x9E, 0x10] + bytes(UInt64(0)) + bytes(length) + [0, 0])
    }

    /// Which blocks from one on have storage (SBC-3 5.4).
    public static func getLBAStatus(at block: UInt64, length: UInt32) -> SCSICommand {
        SCSICommand("GET LBA STATUS", [0x9E, 0x12] + bytes(block) + bytes(length) + [0, 0])
    }

    /// Reads blocks (SBC-3 5.11).
    public static func read(at block: UInt64, count: UInt32) -> SCSICommand {
        SCSICommand("READ(16)", [0x88, 0] + bytes(block) + bytes(count) + [0, 0])
    }

}

/// How a command ended.
public struct SCSIOutcome: Sendable, Equatable {
    /// The status (SAM-5 5.3): 0 is good.
    public var status: UInt8
    /// With CHECK CONDITION: the sense key, and the additional sense code with its qualifier.
    public var sense: SCSISense?
    /// Bytes that were transferred.
    public var transferred: Int

    /// An end.
    public init(status: UInt8, sense: SCSISense? = nil, transferred: Int) {
        self.status = status
        self.sense = sense
        self.transferred = transferred
    }

    /// Whether the same command, sent again, may well succeed: after a reset or another event that the unit reports
    /// once, while it is busy, or when it has aborted the command.
    public var isWorthRepeating: Bool {
        switch status {
        case 0x08, 0x28: true
        case 0x02: sense?.key == 6 || sense?.key == 0xB || sense?.isBecomingReady == true
        default: false
        }
    }

    /// Whether the unit has to be looked at anew: it says that it is another, or its size is.
    public var isAboutIdentity: Bool {
        guard let sense, sense.key == 6 else { return false }
        return sense.code == 0x3F || sense.code == 0x2A && sense.qualifier == 9
    }

    /// Why the command failed; nil when it did not.
    public func failure(of command: SCSICommand, on name: String) -> BlockError? {
        let doing = "\(command.name) on \(name)"
        switch status {
        case 0: return nil
        case 0x02:
            guard let sense else {
                return BlockError(.inputOutput, "\(doing): it failed, and the unit does not say why")
            }
            return BlockError(sense.kind, "\(doing): \(sense)")
        case 0x08, 0x28: return BlockError(.inputOutput, "\(doing): the unit is too busy")
        case 0x18: return BlockError(.denied, "\(doing): another machine has reserved the unit")
        default:
            return BlockError(.inputOutput, "\(doing): it ended with the status 0x\(String(status, radix: 16))")
        }
    }
}

/// What a unit says of a failure (SPC-4 4.5).
public struct SCSISense: Sendable, Equatable, CustomStringConvertible {
    public var key: UInt8
    public var code: UInt8
    public var qualifier: UInt8

    /// A sense key with its additional code.
    public init(key: UInt8, code: UInt8, qualifier: UInt8) {
        self.key = key
        self.code = code
        self.qualifier = qualifier
    }

    /// Takes sense data apart, of fixed or descriptor format; nil for anything else.
    public init?(_ data: [UInt8]) {
        switch data.first.map({ $0 & 0x7F }) {
        case 0x70 where data.count >= 14, 0x71 where data.count >= 14:
            self.init(key: data[2] & 15, code: data[12], qualifier: data[13])
        case 0x72 where data.count >= 4, 0x73 where data.count >= 4:
            self.init(key: data[1] & 15, code: data[2], qualifier: data[3])
        default: return nil
        }
    }

    var isBecomingReady: Bool { key == 2 && code == 4 && qualifier == 1 }

    var kind: BlockError.Kind {
        switch (key, code, qualifier) {
        case (7, 0x27, 7): .noSpace
        case (7, _, _): .readOnly
        case (5, 0x20, _), (5, 0x24, _), (5, 0x26, _): .unsupported
        case (5, 0x21, _): .outOfRange
        case (5, 0x25, _): .notFound
        default: .inputOutput
        }
    }

    private static let keys = [
        "no sense", "recovered error", "not ready", "medium error", "hardware error", "illegal request",
        "unit attention", "write-protected", "blank check", "vendor specific", "copy aborted", "command aborted",
        "reserved", "volume overflow", "miscompare", "completed",
    ]

    private static let codes: [UInt16: String] = [
        0x0401: "it is becoming ready", 0x0403: "somebody has to do something to it", 0x040B: "the path is in standby",
        0x040C: "the path is unavailable", 0x0C00: "writing failed", 0x1100: "the block cannot be read",
        0x2000: "it does not know the command", 0x2100: "there is no such block",
        0x2400: "a field of the command means nothing to it", 0x2500: "there is no such logical unit",
        0x2600: "a field of the data means nothing to it", 0x2700: "it is write-protected",
        0x2707: "no storage is left for it", 0x2900: "it was reset", 0x2A09: "its size has changed",
        0x3A00: "it has no medium", 0x3F03: "its inquiry data has changed", 0x3F0E: "the target's units have changed",
        0x4400: "an internal failure",
    ]

    public var description: String {
        let text = Self.codes[UInt16(code) << 8 | UInt16(qualifier)].map { ", \($0)" } ?? ""
        let digits = String(UInt16(code) << 8 | UInt16(qualifier), radix: 16)
        let number = String(repeating: "0", count: 4 - digits.count) + digits
        return
            "\(Self.keys[Int(key & 15)])\(text) (sense \(key)/\(number))"
    }
}

/// Who carries commands to one logical unit.
public protocol SCSICommandPath: Sendable {
    /// The unit, for messages.
    var unitName: String { get }

    /// Carries out a command that asks for data, or for nothing. Waits for its end.
    ///
    /// - Parameter buffer: for the data; empty for none.
    /// - Throws: `BlockError` when it could not be carried out at all.
    func execute(_ command: SCSICommand, into buffer: UnsafeMutableRawBufferPointer) throws(BlockError) -> SCSIOutcome
}

extension SCSICommandPath {
    /// Carries out a command, again where that is worth it.
    ///
    /// - Returns: the data that came, at most `count` bytes.
    /// - Throws: why it failed.
    func ask(_ command: SCSICommand, count: Int) throws(BlockError) -> [UInt8] {
        let buffer = Buffer(count: max(count, 1))
        let wanted = UnsafeMutableRawBufferPointer(rebasing: buffer.bytes[..<count])
        wanted.initializeMemory(as: UInt8.self, repeating: 0)
        var patience = SCSIPatience()
        while true {
            let outcome = try execute(command, into: wanted)
            guard let failure = outcome.failure(of: command, on: unitName) else {
                return Array(wanted[..<min(max(outcome.transferred, 0), count)])
            }
            if !patience.allowsAnother(outcome) { throw failure }
        }
    }
}
