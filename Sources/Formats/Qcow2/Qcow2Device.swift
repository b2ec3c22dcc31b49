// A qcow2 image as a disk: its map points into the file it lies in, its backing chain's maps fill the gaps.
public import Block

/// How a qcow2 image is opened.
public struct Qcow2Options: Sendable {
    /// Whether an image that is marked corrupt is read all the same.
    public var allowCorrupt = false
    /// Memory for mapping tables in bytes, for each image of a chain; 4 MiB map 32 GiB at 64 KiB clusters.
    public var cacheBytes = 4 << 20

    /// Refusing corrupt images, with 4 MiB of tables.
    public init() {}
}

/// A qcow2 image, read-only, with its backing chain below it.
///
/// Its map consists of the places that the device it lies in gives for the host ranges of its clusters, so clusters in
/// a plain file are served like a plain file. Compressed clusters come from a source that decompresses them.
public final class Qcow2Device: BlockDevice {
    /// The longest backing chain, this image included: more than half a year of daily restore points. A map may have to
    /// look into each image, and each may keep 4 MiB of tables.
    public static let chainLengthMax = 200

    /// The disk in the image: its own size, the file's name.
    public let info: DeviceInfo
    /// The image's header.
    public var header: Qcow2Header { image.header }
    /// The disk below, which has what this image does not; nil at the end of a chain.
    public let backing: (any BlockDevice)?
    /// Images in the chain, this one included; a raw disk at the end is not counted.
    public var chainLength: Int { chain.count }
    /// The image's own dirty bitmaps, also those that cannot be served.
    public let bitmaps: [Qcow2Bitmap]
    private let image: Qcow2Image
    private let compressed: SourceHandle
    private let chain: Qcow2Chain
    /// What is below the last image of the chain.
    private let base: (any BlockDevice)?
    private let served: [Qcow2Bitmap]

    /// Opens an image that lies in a device.
    ///
    /// - Parameters:
    ///   - lower: what the image lies in: a file, a logical unit, a remote disk.
    ///   - header: its header, where it is known already; otherwise it is read.
    ///   - backing: the disk that the header names as the backing file. Bytes past its end are zeros.
    ///   - dataFile: the disk that the header names as the external data file.
    /// - Throws: what `Qcow2Header.read` throws, `.notFound` when the image needs a backing or data file and none is
    ///   given, `.tooLarge` for a chain longer than `chainLengthMax`.
    public init(
        lower: any BlockDevice, header: Qcow2Header? = nil, backing: (any BlockDevice)? = nil,
        dataFile: (any BlockDevice)? = nil, _ options: Qcow2Options = Qcow2Options()
    ) throws(BlockError) {
        let file = lower.info
        let header =
            if let header { header } else {
                try Qcow2Header.read(from: lower, allowCorrupt: options.allowCorrupt)
            }
        if let name = header.backingName, backing == nil {
            throw BlockError(.notFound, "opening \(file.name): its backing file \"\(name)\" is not open")
        }
        if header.hasDataFile, dataFile == nil {
            throw BlockError(
                .notFound, "opening \(file.name): its data file \"\(header.dataFileName ?? "")\" is not open")
        }
        let backingImage = backing as? Qcow2Device
        if backingImage?.chainLength ?? 0 >= Self.chainLengthMax {
            throw BlockError(
                .tooLarge,
                "opening \(file.name): its backing chain is longer than \(Self.chainLengthMax) images; shorten it with "
                    + "qemu-img commit or rebase")
        }
        image = try Qcow2Image(
            lower, header, dataFile: header.hasDataFile ? dataFile : nil, cacheBytes: options.cacheBytes)
        self.backing = backing
        compressed = SourceHandle(UnitDecompressor(image))
        let layer = ChainLayer(image, compressed: compressed.reference, backing: backing)
        if let backingImage {
            chain = Qcow2Chain(layer, above: backingImage.chain)
            base = backingImage.base
        } else {
            chain = Qcow2Chain(layer)
            base = backing
        }
        bitmaps = try Qcow2Bitmap.directory(of: image)
        served = bitmaps.filter { $0.problem == nil }
        var info = DeviceInfo(size: header.size, format: "qcow2", name: file.name)
        info.preferredBlock = UInt32(clamping: min(max(header.clusterSize, 4096), 65536))
        info.isRotational = file.isRotational
        info.identity = file.identity
        info.dirtyBitmaps = served.map(\.name)
        info.hasLayers = true
        self.info = info
    }

    /// Moves when any file below is changed through this process.
    public var mapVersion: UInt64 {
        // Each part only grows, so the sum changes when any of them does.
        var version = base?.mapVersion ?? 0
        for layer in 0..<chain.count {
            version &+= chain.layers[layer].withImage { $0.mapVersion }
        }
        return version
    }

    /// Says where the bytes of a range live: in the files of the chain, nowhere, or with the decompressor.
    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        var missing = 0
        return try chain.forEachRun(range, patience, missing: &missing) {
            (run, position, layer) throws(BlockError) -> UInt64 in
            let end = position &+ run.length
            switch run.kind {
            case .data:
                let host = run.host..<(run.host &+ run.length)
                let mapped = try chain.layers[layer].withImage { image throws(BlockError) in
                    try image.data.map(host, patience, into: &extents)
                }
                return position &+ (mapped &- run.host)
            case .unallocated: return try mapBase(position..<end, layer, patience, into: &extents)
            case .zeroPlain: return extents.append(run.length, .zeros(allocated: false)) ? end : position
            case .zeroAllocated: return extents.append(run.length, .zeros(allocated: true)) ? end : position
            case .compressed, .corrupt:
                let place = Place.source(chain.layers[layer].compressed, offset: position)
                return extents.append(run.length, place) ? end : position
            }
        }
    }

    /// The part of a range that is in the base; the walk ends in the last layer only there, otherwise where a backing
    /// image ends before its overlay.
    private func inBase(_ range: Range<UInt64>, _ layer: Int) -> Range<UInt64>? {
        let size = chain.layers[layer].backingSize
        guard layer == chain.count &- 1, range.lowerBound < size else { return nil }
        return range.lowerBound..<min(range.upperBound, size)
    }

    private func mapBase(
        _ range: Range<UInt64>, _ layer: Int, _ patience: Patience, into extents: inout ExtentList
    ) throws(BlockError) -> UInt64 {
        var position = range.lowerBound
        if let base, let part = inBase(range, layer) {
            position = try base.map(part, patience, into: &extents)
            if position < part.upperBound { return position }
        }
        let added = extents.append(range.upperBound &- position, .zeros(allocated: false))
        return added ? range.upperBound : position
    }

    /// Asks all files of the chain.
    public func confirm() throws(BlockError) {
        for index in 0..<chain.count {
            let (lower, data) = chain.layers[index].withImage { ($0.lower, $0.data) }
            try lower.confirm()
            if data !== lower { try data.confirm() }
        }
        try base?.confirm()
    }

    /// Starts reading the clusters of a range, or the table that maps them where it is not in memory.
    public func prefetch(_ range: Range<UInt64>) {
        var missing = -1
        let end = try? chain.forEachRun(range, .resident, missing: &missing) {
            (run, position, layer) throws(BlockError) -> UInt64 in
            let end = position &+ run.length
            if run.kind == .data {
                let host = run.host..<(run.host &+ run.length)
                chain.layers[layer].withImage { $0.data.prefetch(host) }
            }
            if run.kind == .unallocated, let part = inBase(position..<end, layer) { base?.prefetch(part) }
            return end
        }
        guard let end, missing >= 0 else { return }
        chain.layers[missing].withImage { $0.prefetchTable(at: end) }
    }
}

// MARK: - Status

extension Qcow2Device {
    /// Allocation, depth in the backing chain (this image is 1), or one of the bitmaps in `info.dirtyBitmaps`.
    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        if case .dirtyBitmap(let index) = context {
            guard served.indices.contains(index) else {
                throw BlockError(.invalid, "asking \(info.name) for its dirty bitmap \(index): it has no such bitmap")
            }
            return try served[index].status(in: image, of: range, into: &list)
        }
        var missing = 0
        return try chain.forEachRun(range, .blocking, missing: &missing) {
            (run, position, layer) throws(BlockError) -> UInt64 in
            let part = position..<(position + run.length)
            if run.kind == .unallocated { return try baseStatus(context, of: part, layer, into: &list) }
            if context == .depth { return list.append(run.length, UInt32(layer + 1)) ? part.upperBound : position }
            return try allocation(of: part, run, layer, into: &list)
        }
    }

    private func allocation(of range: Range<UInt64>, _ run: ClusterRun, _ layer: Int, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        let flags: UInt32
        switch run.kind {
        case .data where run.length >= Self.dataLookedAtMin:
            let data = chain.layers[layer].withImage { $0.data }
            return try data.status(
                .allocation, of: run.host..<(run.host + run.length), to: range.lowerBound, into: &list
            ) { $0 & AllocationFlags.zero }
        case .data, .compressed, .corrupt: flags = AllocationFlags.data
        case .zeroAllocated: flags = AllocationFlags.zero
        case .zeroPlain, .unallocated: flags = AllocationFlags.hole | AllocationFlags.zero
        }
        return list.append(run.length, flags) ? range.upperBound : range.lowerBound
    }

    /// What is said of a range that no image has: what the base says, then zeros. Where a backing file ends before its
    /// overlay, the zeros that follow count as the backing file's layer, as they do in qemu.
    private func baseStatus(
        _ context: StatusContext, of range: Range<UInt64>, _ layer: Int, into list: inout StatusList
    ) throws(BlockError) -> UInt64 {
        let above = UInt32(layer + 1)
        var position = range.lowerBound
        if let base, let part = inBase(range, layer) {
            position = try base.status(context, of: part, to: position, into: &list) { value in
                context == .depth ? (value == 0 ? 0 : value + above) : value
            }
            if position < part.upperBound { return position }
        }
        let depth = chain.layers[layer].hasBacking ? above + 1 : 0
        let value = context == .depth ? depth : AllocationFlags.hole | AllocationFlags.zero
        return list.append(range.upperBound - position, value) ? range.upperBound : position
    }
}
