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
    /// The longest backing chain, this image included. Maps go down the chain by calling each other; at this length
    /// they need a fraction of a connection thread's stack even in debug builds.
    public static let chainLengthMax = 200

    /// The disk in the image: its own size, the file's name.
    public let info: DeviceInfo
    /// The image's header.
    public var header: Qcow2Header { image.header }
    /// The disk below, which has what this image does not; nil at the end of a chain.
    public let backing: (any BlockDevice)?
    /// Images in the chain, this one included; a raw disk at the end is not counted.
    public let chainLength: Int
    /// The image's own dirty bitmaps, also those that cannot be served.
    public let bitmaps: [Qcow2Bitmap]
    private let image: Qcow2Image
    private let backingSize: UInt64
    private let backingImage: Qcow2Device?
    private let compressed: SourceHandle
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
        backingImage = backing as? Qcow2Device
        chainLength = 1 + (backingImage?.chainLength ?? 0)
        if chainLength > Self.chainLengthMax {
            throw BlockError(
                .tooLarge,
                "opening \(file.name): its backing chain is longer than \(Self.chainLengthMax) images; shorten it with "
                    + "qemu-img commit or rebase")
        }
        image = try Qcow2Image(
            lower, header, dataFile: header.hasDataFile ? dataFile : nil, cacheBytes: options.cacheBytes)
        self.backing = backing
        backingSize = backing?.info.size ?? 0
        compressed = SourceHandle(Qcow2Decompressor(image))
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
        var version = image.lower.mapVersion
        if image.header.hasDataFile { version &+= image.data.mapVersion }
        if let backing { version &+= backing.mapVersion }
        return version
    }

    /// Says where the bytes of a range live: in the files of the chain, nowhere, or with the decompressor.
    public func map(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList) throws(BlockError)
        -> UInt64
    {
        var position = range.lowerBound
        while position < range.upperBound {
            let run: ClusterRun
            do throws(BlockError) {
                let found = try image.run(at: position, limit: range.upperBound, patience)
                guard let found else { return position }
                run = found
            } catch {
                // What lies before the fault can be read; whoever asks for the rest is told.
                if position > range.lowerBound { return position }
                throw error
            }
            let runEnd = position &+ run.length
            let end: UInt64
            switch run.kind {
            case .data:
                let host = run.host..<(run.host &+ run.length)
                end = position &+ (try image.data.map(host, patience, into: &extents) &- run.host)
            case .unallocated:
                end = try mapBacking(position..<runEnd, patience, into: &extents)
            case .zeroPlain: end = extents.append(run.length, .zeros(allocated: false)) ? runEnd : position
            case .zeroAllocated: end = extents.append(run.length, .zeros(allocated: true)) ? runEnd : position
            case .compressed, .corrupt:
                let place = Place.source(compressed.reference, offset: position)
                end = extents.append(run.length, place) ? runEnd : position
            }
            if end < runEnd { return end }
            position = runEnd
        }
        return position
    }

    private func mapBacking(_ range: Range<UInt64>, _ patience: Patience, into extents: inout ExtentList)
        throws(BlockError) -> UInt64
    {
        var position = range.lowerBound
        if let backing, position < backingSize {
            let part = position..<min(range.upperBound, backingSize)
            position = try backing.map(part, patience, into: &extents)
            if position < part.upperBound { return position }
        }
        let added = extents.append(range.upperBound &- position, .zeros(allocated: false))
        return added ? range.upperBound : position
    }

    /// Starts reading the clusters of a range, or the table that maps them where it is not in memory.
    public func prefetch(_ range: Range<UInt64>) {
        var position = range.lowerBound
        while position < range.upperBound {
            let found = try? image.run(at: position, limit: range.upperBound, .resident)
            guard let run = found else { return image.prefetchTable(at: position) }
            let end = position &+ run.length
            if run.kind == .data { image.data.prefetch(run.host..<(run.host &+ run.length)) }
            if run.kind == .unallocated, let backing, position < backingSize {
                backing.prefetch(position..<min(end, backingSize))
            }
            position = end
        }
    }
}

// MARK: - Status

extension Qcow2Device {
    /// Runs of data at least this long are looked at in the file below: a preallocated image has large ones that were
    /// never written. Shorter ones are not worth a system call each.
    private static let dataLookedAtMin: UInt64 = 256 << 10

    /// Allocation, depth in the backing chain (this image is 1), or one of the bitmaps in `info.dirtyBitmaps`.
    public func status(_ context: StatusContext, of range: Range<UInt64>, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        switch context {
        case .allocation:
            return try forEachRun(range) { (part, run) throws(BlockError) in
                try allocation(of: part, run, into: &list)
            }
        case .depth: return try depth(of: range, level: 1, into: &list)
        case .dirtyBitmap(let index):
            guard served.indices.contains(index) else {
                throw BlockError(.invalid, "asking \(info.name) for its dirty bitmap \(index): it has no such bitmap")
            }
            return try served[index].status(in: image, of: range, into: &list)
        }
    }

    /// Calls the body for each run, until it takes less than a whole run.
    ///
    /// - Returns: the end of what the body took.
    private func forEachRun(_ range: Range<UInt64>, _ body: (Range<UInt64>, ClusterRun) throws(BlockError) -> UInt64)
        throws(BlockError) -> UInt64
    {
        var position = range.lowerBound
        while position < range.upperBound {
            let run: ClusterRun
            do throws(BlockError) {
                let found = try image.run(at: position, limit: range.upperBound, .blocking)
                guard let found else { return position }
                run = found
            } catch {
                if position > range.lowerBound { return position }
                throw error
            }
            let end = position + run.length
            let done = try body(position..<end, run)
            if done < end { return done }
            position = end
        }
        return position
    }

    private func allocation(of range: Range<UInt64>, _ run: ClusterRun, into list: inout StatusList)
        throws(BlockError) -> UInt64
    {
        let hole = AllocationFlags.hole | AllocationFlags.zero
        switch run.kind {
        case .data where run.length >= Self.dataLookedAtMin:
            return try Self.translated(
                .allocation, of: image.data, run.host..<(run.host + run.length), to: range.lowerBound, into: &list
            ) { $0 & AllocationFlags.zero }
        case .data, .compressed, .corrupt:
            return list.append(run.length, AllocationFlags.data) ? range.upperBound : range.lowerBound
        case .zeroAllocated:
            return list.append(run.length, AllocationFlags.zero) ? range.upperBound : range.lowerBound
        case .zeroPlain: return list.append(run.length, hole) ? range.upperBound : range.lowerBound
        case .unallocated:
            var position = range.lowerBound
            if let backing, position < backingSize {
                let part = position..<min(range.upperBound, backingSize)
                position = try backing.status(.allocation, of: part, into: &list)
                if position < part.upperBound { return position }
            }
            return list.append(range.upperBound - position, hole) ? range.upperBound : position
        }
    }

    /// Depths, this image being `level`. Where a backing file ends before its overlay, the zeros that follow count as
    /// the backing file's, as they do in qemu.
    private func depth(of range: Range<UInt64>, level: UInt32, into list: inout StatusList) throws(BlockError)
        -> UInt64
    {
        try forEachRun(range) { (part, run) throws(BlockError) in
            var position = part.lowerBound
            guard run.kind == .unallocated, let backing else {
                let value = run.kind == .unallocated ? 0 : level
                return list.append(run.length, value) ? part.upperBound : position
            }
            if position < backingSize {
                let inside = position..<min(part.upperBound, backingSize)
                if let backingImage {
                    position = try backingImage.depth(of: inside, level: level + 1, into: &list)
                } else {
                    position = try Self.translated(.depth, of: backing, inside, to: position, into: &list) {
                        $0 == 0 ? 0 : $0 + level
                    }
                }
                if position < inside.upperBound { return position }
            }
            return list.append(part.upperBound - position, level + 1) ? part.upperBound : position
        }
    }

    /// Appends what another device says of a range, with its values changed.
    ///
    /// - Parameter start: the offset here that the range's start stands for.
    /// - Returns: the end, here, of what was appended; short when the list is full.
    private static func translated(
        _ context: StatusContext, of device: any BlockDevice, _ range: Range<UInt64>, to start: UInt64,
        into list: inout StatusList, _ value: (UInt32) -> UInt32
    ) throws(BlockError) -> UInt64 {
        var below = StatusList(capacity: 256)
        var done: UInt64 = 0
        while done < range.count64 {
            below.removeAll()
            _ = try device.status(context, of: (range.lowerBound + done)..<range.upperBound, into: &below)
            for extent in below.extents {
                if !list.append(extent.length, value(extent.value)) { return start + done }
                done += extent.length
            }
            if below.length == 0 { break }
        }
        return start + done
    }
}
