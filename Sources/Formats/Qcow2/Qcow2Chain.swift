// The images of a backing chain side by side, and the walk over them that finds which one has which bytes.
import Block

/// One image as the walk sees it. It owns nothing: the devices of the chain keep their images alive.
struct ChainLayer: BitwiseCopyable {
    private let unmanaged: Unmanaged<Qcow2Image>
    let compressed: SourceRef
    /// Whether something is below it.
    let hasBacking: Bool
    /// Bytes of the disk below it; past them are zeros. 0 when there is none.
    let backingSize: UInt64

    init(_ image: Qcow2Image, compressed: SourceRef, backing: (any BlockDevice)?) {
        unmanaged = .passUnretained(image)
        self.compressed = compressed
        hasBacking = backing != nil
        backingSize = backing?.info.size ?? 0
    }

    /// Runs the body with the image, without counting references: every connection of an export comes by here, and they
    /// would all write to the same count.
    @inline(__always)
    func withImage<R, E: Error>(_ body: (Qcow2Image) throws(E) -> R) throws(E) -> R {
        try unmanaged._withUnsafeGuaranteedRef { image in
            Result { () throws(E) in try body(image) }
        }.get()
    }
}

/// A chain from its top image down to its last one; what is below that is not part of it.
///
/// Walking is a loop, not images calling each other, so the length of a chain costs no stack.
struct Qcow2Chain: ~Copyable, @unchecked Sendable {
    // Sendable because nothing of it changes after init.

    let layers: UnsafeMutablePointer<ChainLayer>
    let count: Int

    /// The chain that starts with an image and goes on with that of the device below, if that has one.
    init(_ top: ChainLayer, above lower: borrowing Qcow2Chain) {
        count = lower.count + 1
        layers = .allocate(capacity: count)
        layers.initialize(to: top)
        (layers + 1).initialize(from: lower.layers, count: lower.count)
    }

    /// The chain of one image alone.
    init(_ only: ChainLayer) {
        count = 1
        layers = .allocate(capacity: 1)
        layers.initialize(to: only)
    }

    deinit { layers.deallocate() }

    /// Calls the body for each run of a range, in order, with the number of the layer that has it, 0 for the top. A run
    /// of kind `.unallocated` is in no layer: the body decides what is below.
    ///
    /// - Parameters:
    ///   - missing: set to the layer whose tables are not in memory when that ends the walk.
    ///   - body: returns the end of what it took; when that is less than the end of the run, the walk ends there.
    /// - Returns: the end of what the body took; less than the range's end also with `.resident`, where tables are not
    ///   in memory, and before a fault, which is thrown only when nothing comes before it.
    @inline(__always)
    func forEachRun(
        _ range: Range<UInt64>, _ patience: Patience, missing: inout Int,
        _ body: (ClusterRun, UInt64, Int) throws(BlockError) -> UInt64
    ) throws(BlockError) -> UInt64 {
        var limits = LimitStack(depth: count)
        var position = range.lowerBound
        var layer = 0
        // All layers above this one have nothing from `position` to here.
        var limit = range.upperBound
        while true {
            let run: ClusterRun
            do throws(BlockError) {
                let found = try layers[layer].withImage { image throws(BlockError) in
                    try image.run(at: position, limit: limit, patience)
                }
                guard let found else {
                    missing = layer
                    return position
                }
                run = found
            } catch {
                if position > range.lowerBound { return position }
                throw error
            }
            let end = position &+ run.length
            if run.kind == .unallocated && layer &+ 1 < count && position < layers[layer].backingSize {
                limits[layer] = limit
                limit = min(end, layers[layer].backingSize)
                layer &+= 1
                continue
            }
            let done = try body(run, position, layer)
            if done < end { return done }
            position = end
            while position == limit {
                if layer == 0 { return position }
                layer &-= 1
                limit = limits[layer]
            }
        }
    }
}

/// Where the walk goes on in the layers above; of usual chains on the stack.
private struct LimitStack: ~Copyable {
    private static let fewCount = 8
    private var few = InlineArray<8, UInt64>(repeating: 0)
    private let more: UnsafeMutablePointer<UInt64>?

    init(depth: Int) { more = depth > Self.fewCount ? .allocate(capacity: depth - Self.fewCount) : nil }

    deinit { more?.deallocate() }

    subscript(layer: Int) -> UInt64 {
        @inline(__always) get {
            if layer < Self.fewCount { return few[layer] }
            return more?[layer - Self.fewCount] ?? 0
        }
        @inline(__always) set {
            if layer < Self.fewCount { few[layer] = newValue } else { more?[layer - Self.fewCount] = newValue }
        }
    }
}
