// What the options of the client's handshake say, and what their replies mean.
import Block

extension ClientHandshake {
    /// The export that is asked for.
    var exportName: String {
        if case .enter(let name, _) = goal { name } else { "" }
    }

    // MARK: - Options

    /// After the framing is settled: asks which contexts there are, or for those that are wanted.
    mutating func askForContexts(into output: inout [UInt8]) {
        guard case .enter(_, let names) = goal else { return }
        if let names {
            wantedContexts = names
            if names.isEmpty { return sendGo(into: &output) }
            sendContexts(NBD.Option.setMetaContext, names, into: &output)
        } else {
            let queries = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:"]
            sendContexts(NBD.Option.listMetaContext, queries, into: &output)
        }
    }

    /// Chooses among the contexts that the server listed: as many as servers give, the dirty bitmaps last.
    mutating func chooseContexts(into output: inout [UInt8]) {
        let listed = contexts.map(\.name)
        contexts = []
        let first = ["base:allocation", "qemu:allocation-depth"].filter(listed.contains)
        let bitmaps = listed.filter { $0.hasPrefix(MetaContext.dirtyBitmapPrefix) }
        wantedContexts = Array((first + bitmaps).prefix(ServerHandshake.sessionContextsMax))
        if wantedContexts.isEmpty { return sendGo(into: &output) }
        sendContexts(NBD.Option.setMetaContext, wantedContexts, into: &output)
    }

    mutating func sendContexts(_ option: UInt32, _ queries: [String], into output: inout [UInt8]) {
        var payload: [UInt8] = []
        payload.appendCounted(exportName)
        payload.appendBigEndian(UInt32(truncatingIfNeeded: queries.count))
        for query in queries { payload.appendCounted(query) }
        send(option, payload, into: &output)
    }

    mutating func sendGo(into output: inout [UInt8]) {
        var payload: [UInt8] = []
        payload.appendCounted(exportName)
        let wanted = [NBD.Info.blockSize, NBD.Info.name, NBD.Info.description]
        payload.appendBigEndian(UInt16(wanted.count))
        for info in wanted { payload.appendBigEndian(info) }
        send(NBD.Option.go, payload, into: &output)
    }

    // MARK: - Replies that carry something

    /// Takes one reply that is neither the end nor a refusal.
    mutating func take(_ option: UInt32, _ type: UInt32, _ payload: UnsafeRawBufferPointer) throws(BlockError) {
        switch (option, type) {
        case (NBD.Option.list, NBD.OptionReply.server): try takeListing(payload)
        case (NBD.Option.listMetaContext, NBD.OptionReply.metaContext): try takeContext(payload, listing: true)
        case (NBD.Option.setMetaContext, NBD.OptionReply.metaContext): try takeContext(payload, listing: false)
        case (NBD.Option.go, NBD.OptionReply.info): try takeInfo(payload)
        default: throw BlockError(.corrupt, "a reply of type \(type) to \(optionName(option)) makes no sense")
        }
    }

    private mutating func takeListing(_ payload: UnsafeRawBufferPointer) throws(BlockError) {
        let length = payload.count >= 4 ? payload.bigEndian(0, as: UInt32.self) : .max
        guard length <= UInt32(NBD.stringLengthMax), payload.count >= 4 + Int(length) else {
            throw BlockError(.corrupt, "an entry in its list of exports is malformed")
        }
        let end = 4 + Int(length)
        guard let name = String(validating: payload[4..<end], as: UTF8.self) else {
            throw BlockError(.corrupt, "an export in its list has a name that is no UTF-8")
        }
        listings.append(ExportListing(name: name, exportDescription: cleaned(payload[end...])))
    }

    private mutating func takeContext(_ payload: UnsafeRawBufferPointer, listing: Bool) throws(BlockError) {
        guard payload.count > 4, payload.count <= 4 + NBD.stringLengthMax,
            let name = String(validating: payload[4...], as: UTF8.self)
        else { throw BlockError(.corrupt, "a meta context has no name, or a malformed one") }
        let id = payload.bigEndian(0, as: UInt32.self)
        if listing {
            if !contexts.contains(where: { $0.name == name }) { contexts.append(NegotiatedContext(name: name, id: 0)) }
            return
        }
        guard wantedContexts.contains(name) else {
            throw BlockError(.corrupt, "it chose the meta context \(printable(name, max: 64)), which nobody asked for")
        }
        guard !contexts.contains(where: { $0.name == name || $0.id == id }) else {
            throw BlockError(.corrupt, "it chose a meta context twice, or gave two the same number")
        }
        contexts.append(NegotiatedContext(name: name, id: id))
    }

    private mutating func takeInfo(_ payload: UnsafeRawBufferPointer) throws(BlockError) {
        guard payload.count >= 2 else { throw BlockError(.corrupt, "an information about the export is empty") }
        switch payload.bigEndian(0, as: UInt16.self) {
        case NBD.Info.export:
            guard payload.count == 12, facts == nil else {
                throw BlockError(.corrupt, "it told the export's size in a malformed way, or twice")
            }
            facts = (
                try checkedSize(payload.bigEndian(2)), NBD.TransmissionFlags(rawValue: payload.bigEndian(10))
            )
        case NBD.Info.blockSize:
            guard payload.count == 14 else { throw BlockError(.corrupt, "its block sizes are malformed") }
            blockSizes = try BlockSizes(
                minimum: payload.bigEndian(2), preferred: payload.bigEndian(6), maximum: payload.bigEndian(10))
        case NBD.Info.name: exportTitle = cleaned(payload[2...])
        case NBD.Info.description: exportDescription = cleaned(payload[2...])
        default: break
        }
    }

    /// A size that numbers of disks can have.
    func checkedSize(_ size: UInt64) throws(BlockError) -> UInt64 {
        guard size <= UInt64(Int64.max) else {
            throw BlockError(.corrupt, "it says the export has \(size) bytes, which no disk has")
        }
        return size
    }

    // MARK: - Errors

    /// The error that a refusal of an option stands for.
    func refusal(_ option: UInt32, _ type: UInt32, _ payload: UnsafeRawBufferPointer) -> BlockError {
        let said = said(payload)
        if option == NBD.Option.startTLS {
            return BlockError(
                .denied,
                "it offers no TLS, and nothing is sent in clear text where the URI says nbds\(said)")
        }
        let shown = printable(exportName, max: 128)
        switch type {
        case NBD.OptionReply.errorUnknown:
            return BlockError(.notFound, "it has no export named \"\(shown)\"\(said)")
        case NBD.OptionReply.errorPolicy: return BlockError(.denied, "it does not allow \(optionName(option))\(said)")
        case NBD.OptionReply.errorShutdown: return BlockError(.shutdown, "it is about to stop\(said)")
        case NBD.OptionReply.errorUnsupported:
            return BlockError(.unsupported, "it does not know \(optionName(option))\(said)")
        case NBD.OptionReply.errorTLSRequired: return BlockError(.denied, "it wants TLS again, inside TLS\(said)")
        default:
            return BlockError(.invalid, "it refused \(optionName(option)) with error \(type & ~(1 << 31))\(said)")
        }
    }

    /// What a server's text adds to a message.
    func said(_ payload: UnsafeRawBufferPointer) -> String {
        let text = cleaned(payload[...])
        return text.isEmpty ? "" : " (it says: \(text))"
    }

    func optionName(_ option: UInt32) -> String {
        switch option {
        case NBD.Option.exportName: "NBD_OPT_EXPORT_NAME"
        case NBD.Option.abort: "NBD_OPT_ABORT"
        case NBD.Option.list: "NBD_OPT_LIST"
        case NBD.Option.startTLS: "NBD_OPT_STARTTLS"
        case NBD.Option.go: "NBD_OPT_GO"
        case NBD.Option.structuredReply: "NBD_OPT_STRUCTURED_REPLY"
        case NBD.Option.listMetaContext: "NBD_OPT_LIST_META_CONTEXT"
        case NBD.Option.setMetaContext: "NBD_OPT_SET_META_CONTEXT"
        case NBD.Option.extendedHeaders: "NBD_OPT_EXTENDED_HEADERS"
        default: "option \(option)"
        }
    }
}

/// Text of a server as it may be shown: repaired, cut to 256 characters, without control characters.
func cleaned(_ bytes: Slice<UnsafeRawBufferPointer>) -> String {
    printable(String(decoding: bytes.prefix(NBD.stringLengthMax), as: UTF8.self), max: 256)
}

extension [UInt8] {
    /// Appends a string with its length in front, as options carry it.
    mutating func appendCounted(_ text: String) {
        appendBigEndian(UInt32(truncatingIfNeeded: text.utf8.count))
        append(contentsOf: text.utf8)
    }
}
