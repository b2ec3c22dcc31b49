// Makes requests of an input's bytes: five for each, which choose among the values where limits and errors are.
import Block
import FuzzSupport
import NBD

/// Offsets and lengths at which something changes: blocks, buffers, pieces, payload limits, number formats.
private let landmarks: [UInt64] = [
    0, 1, 28, 511, 512, 4096, 32768, 65535, 65536, 131_072, 262_143, 262_144, 262_145, 524_288, 1 << 20, 1 << 25,
    (1 << 26) - 1, 1 << 26, (1 << 26) + 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, 1 << 63, UInt64.max,
]

/// The most payload bytes of a script. A write that asks for more is cut off, and with it the script.
private let payloadBudget = 1 << 20

/// The stream of requests that the rest of the input stands for.
func makeRequests(_ choices: inout Choices, _ shape: Shape) -> [UInt8] {
    let size = shape.export.info.size
    let places = landmarks + [size / 2, size - min(size, 4096), size - 1, size]
    let commands: [UInt16] = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 7, 0, 8, 0xFFFF]
    var stream: [UInt8] = []
    var cookie: UInt64 = 0x6469_736b_0000_0000
    var readLeft = shape.readBudget
    var payloadLeft = payloadBudget
    while !choices.isEmpty && cookie & 0xFF < 200 {
        let kind = choices.byte()
        let flags = NBD.CommandFlags(rawValue: UInt16(choices.byte() & 0x3F))
        var offset = choices.pick(places)
        var length = choices.pick(places)
        let nudge = choices.byte()
        // -8 to 7 each; blocks of 512 bytes as well as bytes.
        offset = offset &+ UInt64(truncatingIfNeeded: Int8(bitPattern: nudge) >> 4) &* (kind & 0x80 != 0 ? 512 : 1)
        length = length &+ UInt64(truncatingIfNeeded: Int8(bitPattern: nudge << 4) >> 4)
        if shape.mode != .extended { length = min(length, UInt64(UInt32.max)) }
        cookie += 1
        if kind & 15 == 14 {
            stream += [0x25, 0x60, 0x95, kind]
            continue
        }
        let isFilter = kind & 15 == 15
        let command = isFilter ? NBD.Command.blockStatus : commands[Int(kind & 15)]
        if command == NBD.Command.read && shape.export.info.size > offset && length <= Export.payloadMax {
            // What is in bounds and not too long will be sent.
            if length > readLeft { length = min(length, 700) }
            readLeft -= min(length, readLeft)
        }
        var request = Request(command, flags: flags, cookie: cookie, offset: offset, length: length)
        if isFilter {
            let payload = makeFilter(kind, shape, length: length)
            request.flags.insert(.payloadLength)
            request.length = UInt64(payload.count)
            request.encode(shape.mode, into: &stream)
            if shape.mode == .extended { stream += payload }
            continue
        }
        request.encode(shape.mode, into: &stream)
        let payload = request.payloadLength(shape.mode)
        let given = min(payload, UInt64(payloadLeft))
        stream += repeatElement(kind, count: Int(given))
        payloadLeft -= Int(given)
        if given < payload { break }
    }
    return stream
}

/// The payload of a filtered block status: the effect length and some ids, most of the time well formed.
private func makeFilter(_ kind: UInt8, _ shape: Shape, length: UInt64) -> [UInt8] {
    var payload: [UInt8] = []
    payload.appendBigEndian(length)
    for bit in 4..<8 as Range<UInt8> where kind & (1 << bit) != 0 { payload.appendBigEndian(UInt32(bit - 4)) }
    return kind & 0xF0 == 0xF0 ? Array(payload.dropLast()) : payload
}
