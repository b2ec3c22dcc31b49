// Options of the handshake that are well formed, made from an input: what lies behind their headers is reached sooner.
import Block
import NBD

/// A client's flags, if `flagged`, and options with a right magic number and length each, made from short records:
/// kind, length, payload. A kind with bit 7 has one of the names in front of its payload, with its length.
public func framedOptions(_ choices: inout Choices, names: [String], flagged: Bool = true) -> [UInt8] {
    var stream: [UInt8] = []
    if flagged { stream.appendBigEndian(UInt32(choices.byte())) }
    while !choices.isEmpty {
        let kind = choices.byte()
        var payload = Array(choices.take(Int(choices.byte()) | (kind & 0x40 != 0 ? 1 << 8 : 0)))
        if kind & 0x80 != 0 {
            let name = choices.pick(names)
            var named: [UInt8] = []
            named.appendBigEndian(UInt32(name.utf8.count))
            payload = named + Array(name.utf8) + payload
        }
        stream.appendBigEndian(NBD.optionMagic)
        stream.appendBigEndian(UInt32(kind & 15))
        stream.appendBigEndian(UInt32(payload.count))
        stream += payload
    }
    return stream
}
