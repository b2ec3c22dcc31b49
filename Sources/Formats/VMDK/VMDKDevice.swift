// A VMDK as a disk: its map points into the files of its extents; what none of them has is the parent's.
public import Block

/// A VMDK, read-only, with its parent below it.
///
/// Its map consists of the places that the devices its files are in give for their bytes, so a disk in flat files or in
/// grains is served like a plain file, on a datastore's LUN as well. Compressed grains come from a source that
/// decompresses them.
public final class VMDKDevice: BlockDevice {
    /// The longest chain, this disk included. VMware's products make 32 snapshots of a machine at most.
    public static let chainLengthMax = 64

    /// The disk: its size by the descriptor, the name of the descriptor's file.
    public let info: DeviceInfo
    /// What the descriptor says.
    public let descriptor: VMDKDescriptor
    /// The disk below, which has what this one does not; nil at the end of a chain.
    public let parent: VMDKDevice?
    /// Disks in the chain, this one included.
    public let chainLength: Int
    private let source: VMDKDescriptorPlace
    private let extents: [VMDKExtent]
    /// The same, in memory that is read without counting references.
    private let parts: VMDKParts
    /// The parent, for walks that count no references.
    private let below: Unmanaged<VMDKDevice>?

    /// A disk whose files are open.
    ///
    /// - Parameters:
    ///   - source: its descriptor, and what that is in.
    ///   - extents: at least one, each where the one before it ends.
    ///   - parent: of the same size.
    init(_ source: VMDKDescriptorPlace, _ extents: [VMDKExtent], parent: VMDKDevice?) {
        let (file, descriptor) = (source.device.info, source.descriptor)
        self.source = source
        self.descriptor = descriptor
        self.extents = extents
        self.parent = parent
        chainLength = (parent?.chainLength ?? 0) + 1
        parts = VMDKParts(extents)
        below = parent.map { .passUnretained($0) }
        var info = DeviceInfo(size: descriptor.sectors * VMDK.sectorBytes, format: "vmdk", name: file.name)
        info.preferredBlock = Self.preferredBlock(extents)
        info.isRotational = extents.contains { $0.lower.info.isRotational }
        info.hasLayers = parent != nil || extents.contains { $0.kind == .sparse }
        info.identity = Self.identity(file, descriptor, extents, parent)
        self.info = info
    }

    private static func preferredBlock(_ extents: [VMDKExtent]) -> UInt32 {
        var block: UInt32 = 4096
        for extent in extents {
            block = max(block, UInt32(clamping: extent.tables?.unitSize ?? UInt64(extent.lower.info.preferredBlock)))
        }
        return min(block, 65536)
    }

    private static func identity(
        _ file: DeviceInfo, _ descriptor: VMDKDescriptor, _ extents: [VMDKExtent], _ parent: VMDKDevice?
    ) -> [(key: String, value: String)] {
        var identity = file.identity.filter { $0.key != "version" }
        identity.append(("vmdk type", descriptor.createType))
        identity.append(("content id", hexadecimal(descriptor.contentID, 8)))
        if let uuid = descriptor.database["uuid"] { identity.append(("disk uuid", uuid)) }
        if let adapter = descriptor.database["adaptertype"] { identity.append(("adapter", adapter)) }
        if let parent { identity.append(("parent", parent.info.name)) }
        if let name = descriptor.changeTrackName { identity.append(("change track", name)) }
        var remarks: [String] = []
        for extent in extents {
            guard let tables = extent.tables, let remark = tables.layout.remark else { continue }
            remarks.append("\(tables.name): \(remark)")
        }
        if !remarks.isEmpty { identity.append(("remark", remarks.joined(separator: ", "))) }
        // What files are there now: whoever goes on with a copy has to know when they become others.
        let devices = [file] + extents.filter { $0.kind == .flat || $0.kind == .sparse }.map(\.lower.info)
        var versions = devices.flatMap { $0.identity.filter { $0.key == "version" }.map(\.value) }
        versions += parent?.info.identity.filter { $0.key == "version" }.map(\.value) ?? []
        if !versions.isEmpty { identity.append(("version", versions.joined(separator: " "))) }
        return identity
    }

    /// Moves when any file below is changed through this process.
    public var mapVersion: UInt64 {
        // Each part only grows, so the sum changes when any of them does.
        (parent?.mapVersion ?? 0) &+ parts.mapVersion
    }

    /// Says where the bytes of a range live: in the files of the chain, nowhere, or with a decompressor.
    public func map(_ range: Range<UInt64>, _ patience: Patience, into list: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        let listed = list.length
        return try parts.forEach(in: range) { (part, range) throws(BlockError) -> UInt64 in
            let before = list.length
            do throws(BlockError) {
                return try map(part, range, patience, into: &list)
            } catch {
                // What comes before it is right, unless something of this part was appended already.
                if before > listed, list.length == before { return range.lowerBound }
                throw error
            }
        }
    }

    @inline(__always)
    private func map(
        _ part: VMDKPart, _ range: Range<UInt64>, _ patience: Patience, into list: inout ExtentList
    ) throws(BlockError) -> UInt64 {
        switch part.kind {
        case .flat:
            return try part.withExtent { extent throws(BlockError) in
                try extent.lower.map(part.place(range), patience, into: &list) &- part.offset &+ part.start
            }
        case .zeros: return list.append(range.count64, .zeros(allocated: false)) ? range.upperBound : range.lowerBound
        case .noAccess: throw noAccess(range)
        case .sparse:
            let end = try part.withTables { tables throws(BlockError) in
                try forEachRun(tables, part.start, range, patience) { (run, position) throws(BlockError) -> UInt64 in
                    let before = list.length
                    do throws(BlockError) {
                        return try map(run, of: tables, at: position, part, patience, into: &list)
                    } catch {
                        if position > range.lowerBound, list.length == before { return position }
                        throw error
                    }
                }
            }
            return end ?? range.lowerBound
        }
    }

    @inline(__always)
    private func map(
        _ run: GrainRun, of tables: GrainTables, at position: UInt64, _ part: VMDKPart, _ patience: Patience,
        into list: inout ExtentList
    ) throws(BlockError) -> UInt64 {
        let end = position &+ run.length
        var place = Place.zeros(allocated: false)
        switch run.kind {
        case .data:
            let host = run.host..<(run.host &+ run.length)
            return try tables.lower.map(host, patience, into: &list) &- run.host &+ position
        case .absent:
            if let below {
                return try below._withUnsafeGuaranteedRef { parent in
                    Result { () throws(BlockError) in try parent.map(position..<end, patience, into: &list) }
                }.get()
            }
        case .zero: break
        case .compressed, .corrupt:
            guard let source = part.compressed else { throw noAccess(position..<end) }
            place = .source(source, offset: position &- part.start)
        }
        return list.append(run.length, place) ? end : position
    }

    /// Calls the body for each run of grains in a range.
    ///
    /// - Returns: the end of what the body took; less than the range's end also with `.resident`, where tables are not
    ///   in memory, and before a fault, which is thrown only when nothing comes before it.
    @inline(__always)
    private func forEachRun(
        _ tables: GrainTables, _ start: UInt64, _ range: Range<UInt64>, _ patience: Patience,
        _ body: (GrainRun, UInt64) throws(BlockError) -> UInt64
    ) throws(BlockError) -> UInt64 {
        var position = range.lowerBound
        while position < range.upperBound {
            let run: GrainRun
            do throws(BlockError) {
                let limit = range.upperBound &- start
                guard let found = try tables.run(at: position &- start, limit: limit, patience) else { return position }
                run = found
            } catch {
                if position > range.lowerBound { return position }
                throw error
            }
            let end = position &+ run.length
            let done = try body(run, position)
            if done < end { return done }
            position = end
        }
        return position
    }

    private func noAccess(_ range: Range<UInt64>) -> BlockError {
        BlockError(
            .denied, "reading \(info.name) at \(range.lowerBound): its descriptor says that nobody may (NOACCESS)")
    }

    /// Asks all files of the chain, and compares the descriptors with what they were, also where other files have taken
    /// their names.
    ///
    /// - Throws: `.changed` also when a content id is another: then somebody has written to that disk, wherever its
    ///   bytes are.
    public func confirm() throws(BlockError) {
        for extent in extents where extent.lower !== source.device { try extent.lower.confirm() }
        try source.confirm()
        try parent?.confirm()
    }

    /// Starts reading the data of a range, or the table that maps it where it is not in memory.
    public func prefetch(_ range: Range<UInt64>) {
        _ = try? parts.forEach(in: range) { (part, range) throws(BlockError) -> UInt64 in
            if part.kind == .flat { part.withExtent { $0.lower.prefetch(part.place(range)) } }
            _ = try part.withTables { tables throws(BlockError) in try prefetch(tables, part.start, range) }
            return range.upperBound
        }
    }

    private func prefetch(_ tables: GrainTables, _ start: UInt64, _ range: Range<UInt64>) throws(BlockError) {
        let end = try forEachRun(tables, start, range, .resident) { (run, position) throws(BlockError) -> UInt64 in
            switch run.kind {
            case .data: tables.lower.prefetch(run.host..<(run.host &+ run.length))
            case .absent: parent?.prefetch(position..<(position &+ run.length))
            case .zero, .compressed, .corrupt: break
            }
            return position &+ run.length
        }
        if end < range.upperBound { tables.prefetchTable(at: end &- start) }
    }
}

// MARK: - Status

extension VMDKDevice {
    /// Allocation, or depth in the chain (this disk is 1).
    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        if case .dirtyBitmap(let index) = context {
            throw BlockError(.invalid, "asking \(info.name) for its dirty bitmap \(index): it has no such bitmap")
        }
        let listed = list.length
        return try parts.forEach(in: range) { (part, range) throws(BlockError) -> UInt64 in
            let before = list.length
            do throws(BlockError) {
                return try status(context, part, range, into: &list)
            } catch {
                if before > listed, list.length == before { return range.lowerBound }
                throw error
            }
        }
    }

    private func status(
        _ context: StatusContext, _ part: VMDKPart, _ range: Range<UInt64>, into list: inout StatusList
    ) throws(BlockError) -> UInt64 {
        let hole = AllocationFlags.zero | AllocationFlags.hole
        switch part.kind {
        case .zeros, .noAccess:
            let flags = part.kind == .zeros ? hole : AllocationFlags.data
            let value = context == .depth ? 1 : flags
            return list.append(range.count64, value) ? range.upperBound : range.lowerBound
        case .flat:
            if context == .depth { return list.append(range.count64, 1) ? range.upperBound : range.lowerBound }
            return try part.withExtent { extent throws(BlockError) in
                try extent.lower.status(context, of: part.place(range), to: range.lowerBound, into: &list) { $0 }
            }
        case .sparse:
            let end = try part.withTables { tables throws(BlockError) in
                try forEachRun(tables, part.start, range, .blocking) { (run, position) throws(BlockError) -> UInt64 in
                    let before = list.length
                    do throws(BlockError) {
                        return try status(context, run, of: tables, at: position, into: &list)
                    } catch {
                        if position > range.lowerBound, list.length == before { return position }
                        throw error
                    }
                }
            }
            return end ?? range.lowerBound
        }
    }

    private func status(
        _ context: StatusContext, _ run: GrainRun, of tables: GrainTables, at position: UInt64,
        into list: inout StatusList
    ) throws(BlockError) -> UInt64 {
        let end = position + run.length
        let hole = AllocationFlags.zero | AllocationFlags.hole
        if run.kind == .absent, let parent {
            return try parent.status(context, of: position..<end, to: position, into: &list) { value in
                context == .depth && value > 0 ? value + 1 : value
            }
        }
        if context == .depth { return list.append(run.length, run.kind == .absent ? 0 : 1) ? end : position }
        if run.kind == .data, run.length >= Self.dataLookedAtMin {
            let host = run.host..<(run.host + run.length)
            return try tables.lower.status(context, of: host, to: position, into: &list) { $0 & AllocationFlags.zero }
        }
        let isHole = run.kind == .zero || run.kind == .absent
        return list.append(run.length, isHole ? hole : AllocationFlags.data) ? end : position
    }
}
