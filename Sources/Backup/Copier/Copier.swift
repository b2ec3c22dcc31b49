// The copier: plans, lets workers read and write side by side, and watches over them until all is done.
public import Block
import Glibc
import LinuxIO
import NBD

/// How far a copy is.
public struct CopyProgress: Sendable {
    /// Bytes on the source.
    public var size: UInt64 = 0
    /// Bytes of data and of zeros that are planned so far.
    public var planDataBytes: UInt64 = 0
    public var planZeroBytes: UInt64 = 0
    /// Whether everything is planned, so that the plan's bytes are those of the whole copy.
    public var isPlanned = false
    /// Bytes of the plan that are done.
    public var doneBytes: UInt64 = 0
    /// Bytes of them that were done before, by the copy that this one continues.
    public var resumedBytes: UInt64 = 0
    /// Bytes read from the source.
    public var readBytes: UInt64 = 0
    /// Bytes written to the target.
    public var writtenBytes: UInt64 = 0
    /// Bytes made zero on the target.
    public var zeroedBytes: UInt64 = 0
    /// Bytes of zeros that the target had already.
    public var skippedBytes: UInt64 = 0
    /// Bytes that share their blocks with the source (reflinks).
    public var clonedBytes: UInt64 = 0
    /// Requests that were sent once more.
    public var retries = 0
    /// Connections that were made in place of lost ones.
    public var reconnects = 0
    /// The most workers at once.
    public var workers = 0
    /// Seconds since the copy began.
    public var seconds = 0.0

    /// Bytes of the plan, as far as it goes.
    public var planBytes: UInt64 { planDataBytes + planZeroBytes }
}

/// What a copy did: its progress at the end.
public typealias CopyResult = CopyProgress

/// Somebody who wants to know what has reached the target.
public protocol CopyObserver: AnyObject, Sendable {
    /// A range is on the target, not yet durable. Called by the workers, several at a time.
    func finished(_ range: Range<UInt64>, _ kind: CopyItem.Kind)
}

/// How a copy is to be done.
public struct CopyOptions: Sendable {
    /// Workers, 1 to 16; nil for what suits the source.
    public var workers: Int?
    /// How often a failed read is tried again; with 0, a lost connection is final, too.
    public var retries = 5
    /// Whether zeros among the data become zeros on the target as those that the source tells of.
    public var detectsZeros = true
    /// Bytes to read per second at most; nil for as fast as it goes.
    public var bytesPerSecondMax: UInt64?
    /// Whether the copy ends only when all of it is on stable storage. Otherwise the system writes it when it likes.
    public var isDurable = true
    /// Ranges that are on the target already.
    public var finished = FinishedRanges()
    /// Told what has reached the target.
    public var observer: (any CopyObserver)?
    /// Bytes, and seconds, after which what is done is made durable and `checkpoint` called.
    public var checkpointBytes: UInt64 = 1 << 30
    public var checkpointSeconds = 10.0

    /// The defaults.
    public init() {}

    /// Throws `.invalid` for options that cannot be.
    func check() throws(BlockError) {
        if let workers, !(1...16).contains(workers) {
            throw BlockError(.invalid, "copying with \(workers) workers: give a number from 1 to 16")
        }
    }
}

/// Copies a disk, or what changed of it, to a target.
public final class Copier: Sendable {
    private let crew: CopyCrew
    private let source: CopySource
    private let target: any CopyTarget
    private let options: CopyOptions
    private let cancellation: Cancellation

    /// A copy of a source onto a target of at least its size.
    ///
    /// - Parameters:
    ///   - changed: the dirty bitmap that tells what to copy, as `CopySource.changedContext`; nil for everything.
    ///   - cancellation: ends the copy when it is told to.
    /// - Throws: `.notFound` when there is no such bitmap, `.noSpace` when the target is smaller than the source,
    ///   `.invalid` for options that cannot be.
    public init(
        source: CopySource, changed: String? = nil, target: any CopyTarget, options: CopyOptions = CopyOptions(),
        cancellation: Cancellation = Cancellation()
    ) throws(BlockError) {
        let size = source.device.info.size
        let doing = "copying \(source.device.info.name) to \(target.name)"
        if target.size < size {
            throw BlockError(.noSpace, "\(doing): the target has \(target.size) bytes, the source \(size)")
        }
        try options.check()
        if changed != nil && target.isSequential {
            throw BlockError(.invalid, "\(doing): a stream cannot take only what changed")
        }
        let context = try changed.map { (name) throws(BlockError) in try source.changedContext(name) }
        self.source = source
        self.target = target
        self.options = options
        self.cancellation = cancellation
        crew = CopyCrew(source, context, target, options)
    }

    /// Copies. Blocks until everything is on the target, and durable where that is asked for, or something went wrong.
    ///
    /// - Parameters:
    ///   - progress: called about ten times a second on this thread.
    ///   - checkpoint: called on this thread when all work below an offset is durable, at times and when the copy ends
    ///     early; what it throws ends the copy.
    /// - Returns: what was done.
    /// - Throws: the first error of source or target, or `.shutdown` when the copy was cancelled. No worker touches the
    ///   target afterwards.
    public func run(
        progress: (CopyProgress) -> Void = { _ in },
        checkpoint: (_ settledEnd: UInt64) throws(BlockError) -> Void = { _ in }
    ) throws(BlockError) -> CopyResult {
        let start = monotonicSeconds()
        let crew = crew
        let hook = cancellation.whenCancelled { crew.stop.cancel() }
        defer { cancellation.forget(hook) }
        try startWorkers()
        var last = (seconds: start, bytes: UInt64(0))
        var failure: BlockError?
        var hasLost = false
        while !crew.wait(seconds: 0.1) && !crew.stop.isCancelled {
            var current = crew.current
            current.seconds = monotonicSeconds() - start
            progress(current)
            if options.isDurable { target.startFlushing() }
            let isDue =
                current.doneBytes - current.resumedBytes - last.bytes >= options.checkpointBytes
                || monotonicSeconds() - last.seconds >= options.checkpointSeconds
            if isDue {
                do throws(BlockError) { try makeDurable(&hasLost, checkpoint) } catch { crew.fail(error) }
                last = (monotonicSeconds(), current.doneBytes - current.resumedBytes)
            }
        }
        if crew.stop.isCancelled {
            // Those that wait for their source are of no more use.
            _ = crew.wait(seconds: 2)
            crew.abandonWorkers()
        }
        // Whoever takes the source's server down next must find no handshake under way: QEMU 7.2 waits for ever for
        // the end of one over TLS, and its guest with it.
        crew.waitForHelpers()
        failure = crew.error
        if failure == nil && cancellation.isCancelled {
            failure = BlockError(
                .shutdown, "copying \(source.device.info.name) to \(target.name): it was told to stop")
        }
        if let failure {
            // What was read of a disk that has gone elsewhere is in doubt, and is not to be gone on with.
            if failure.kind == .changed { throw failure }
            // As much as possible is kept for going on later; what went wrong first is what counts.
            do throws(BlockError) { try makeDurable(&hasLost, checkpoint) } catch { throw failure }
            throw failure
        }
        try source.device.confirm()
        if options.isDurable { try target.flush() }
        var result = crew.current
        result.seconds = monotonicSeconds() - start
        progress(result)
        return result
    }

    /// - Parameter hasLost: set when a flush fails: writes may be lost then, of which the next flush tells nothing, so
    ///   that nothing may be called durable any more.
    private func makeDurable(_ hasLost: inout Bool, _ checkpoint: (UInt64) throws(BlockError) -> Void)
        throws(BlockError)
    {
        if target.isSequential || hasLost || !options.isDurable { return }
        let end = crew.settledEnd
        do throws(BlockError) {
            try target.flush()
        } catch {
            hasLost = true
            throw error
        }
        try checkpoint(end)
    }

    private func startWorkers() throws(BlockError) {
        let wanted = options.workers ?? source.workersByDefault(for: target)
        let count = target.isSequential ? 1 : min(wanted, source.workersMax)
        let (crew, source) = (crew, source)
        guard crew.join() else { return }
        do throws(BlockError) {
            try startThread(name: "copy-0") { Self.work(crew, source.remote) }
        } catch {
            crew.leave()
            throw error
        }
        for index in stride(from: 1, to: count, by: 1) {
            // Fewer are enough.
            do throws(BlockError) { try startThread(name: "copy-\(index)") { Self.helpOut(crew, source) } } catch {
                break
            }
        }
    }

    /// One more worker, with a connection of its own where the source is a server. A server may allow fewer than it
    /// says: the copy does not depend on it.
    private static func helpOut(_ crew: CopyCrew, _ source: CopySource) {
        var remote: NBDConnection?
        if let first = source.remote {
            guard crew.beginHelping() else { return }
            defer { crew.endHelping() }
            guard let another = try? first.another(seconds: 5) else { return }
            remote = another
        }
        if crew.join() { work(crew, remote) }
    }

    private static func work(_ crew: CopyCrew, _ remote: NBDConnection?) {
        defer { crew.leave() }
        do throws(BlockError) {
            // Blocks larger than what the server gives at once have to be put together.
            if let remote, crew.target.granularity <= UInt64(remote.agreement.blockSizes.maximum) {
                try PipelinedReader(crew, remote).run()
            } else {
                try PlainReader(crew).run()
            }
        } catch { crew.fail(error) }
    }
}
