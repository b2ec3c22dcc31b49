// Removes points that no rule keeps: decides, locks, marks; PointRemoval does the work and can be taken up again.
public import Block
import Glibc
public import LinuxIO

/// What pruning has decided on a point.
public struct PruneDecision: Sendable {
    /// The point.
    public var point: RestorePoint
    /// Why it stays; empty when it goes.
    public var reasons: [String]
    /// Whether it goes.
    public var isRemoved: Bool { reasons.isEmpty }
    /// The number of the point that takes over what it holds; nil when nobody needs it, or it stays.
    public var into: Int?
    /// Bytes of free space that this may take while it is going on.
    public var spaceNeeded: UInt64 = 0
}

extension Repository {
    /// Finishes removals that a crash has interrupted, of one machine.
    ///
    /// - Parameter lock: of `lockMachine`.
    /// - Returns: the points that are removed now.
    /// - Throws: `BlockError` when one cannot be finished; it stays begun.
    public func finishRemovals(
        of machine: RepositoryMachine, holding lock: FileLock, cancellation: Cancellation = Cancellation()
    ) throws(BlockError) -> [RestorePoint] {
        try check(lock, machine)
        let doomed = try doomed(of: machine)
        for point in doomed {
            // Nobody can open it any more; whoever tries holds the lock for a moment only.
            let own = try FileLock.take(layout(machine).pointLock(point.sequence), wait: true)
            defer { withExtendedLifetime(own) {} }
            try PointRemoval(self, point, cancellation).run()
        }
        return doomed
    }

    /// Points that somebody has begun to remove and not finished with, the oldest first. Pruning, verifying and
    /// `finishInterruptedRemovals` finish them.
    ///
    /// - Throws: `BlockError` when the repository cannot be read.
    public func unfinishedRemovals(of machine: RepositoryMachine? = nil) throws(BlockError) -> [RestorePoint] {
        var points: [RestorePoint] = []
        for machine in try chosen(machine) { points += try doomed(of: machine) }
        return points
    }

    /// Whether removals of a machine were begun and not finished.
    ///
    /// - Throws: `BlockError` when the repository cannot be read.
    public func hasUnfinishedRemovals(of machine: RepositoryMachine) throws(BlockError) -> Bool {
        try !doomed(of: machine).isEmpty
    }

    /// Removes the points of a machine that no rule keeps, the oldest first. Points that are pinned or open somewhere
    /// stay, and so does the newest.
    ///
    /// - Parameters:
    ///   - lock: of `lockMachine`.
    ///   - isDryRun: whether only to tell what would be done.
    ///   - cancellation: ends it between two removals or within one, which is finished by the next backup or pruning.
    ///   - willRemove: called before each removal.
    /// - Returns: what became of each point, in order.
    /// - Throws: `.invalid` for a rule that keeps nothing, `.shutdown` when it was cancelled, or `BlockError` when a
    ///   removal fails; it can be finished later.
    public func prune(
        _ machine: RepositoryMachine, keeping rule: RetentionRule, holding lock: FileLock, isDryRun: Bool = false,
        cancellation: Cancellation = Cancellation(), willRemove: (PruneDecision) -> Void = { _ in }
    ) throws(BlockError) -> [PruneDecision] {
        try rule.check()
        try check(lock, machine)
        if !isDryRun { _ = try finishRemovals(of: machine, holding: lock, cancellation: cancellation) }
        let points = try points(of: machine)
        var reasons = rule.reasons(for: points)
        if let newest = points.last, reasons[newest.sequence] == nil { reasons[newest.sequence] = ["newest"] }
        var decisions: [PruneDecision] = []
        for point in points {
            var decision = PruneDecision(point: point, reasons: reasons[point.sequence] ?? [])
            if try marks(of: point).contains(where: { $0.kind == .pinned }) { decision.reasons.append("pinned") }
            decisions.append(decision)
        }
        // Merging is not undone: all that comes after the first point that goes has to be whole before it goes.
        if let first = decisions.firstIndex(where: \.isRemoved) {
            var preflight = PrunePreflight(self, machine, points)
            for point in points[first...] {
                try cancellation.check("pruning \(machine.name)")
                try preflight.check(point)
            }
        }
        for index in decisions.indices where decisions[index].isRemoved {
            try cancellation.check("pruning \(machine.name)")
            try remove(&decisions[index], isDryRun: isDryRun, cancellation, willRemove)
        }
        return decisions
    }

    private func check(_ lock: FileLock, _ machine: RepositoryMachine) throws(BlockError) {
        guard lock.path == layout(machine).machineLock else {
            throw BlockError(.invalid, "pruning \(machine.name): \(lock.path) is not its lock")
        }
    }

    private func remove(
        _ decision: inout PruneDecision, isDryRun: Bool, _ cancellation: Cancellation,
        _ willRemove: (PruneDecision) -> Void
    ) throws(BlockError) {
        let point = decision.point
        guard let own = try FileLock.take(layout(point.machine).pointLock(point.sequence)) else {
            decision.reasons = ["in use"]
            return
        }
        defer { withExtendedLifetime(own) {} }
        // Between the decision and the lock it may have been pinned.
        if try marks(of: point).contains(where: { $0.kind == .pinned }) {
            decision.reasons = ["pinned"]
            return
        }
        // What the removal of earlier points has changed counts.
        let now = try self.point(inManifest: point.path, of: point.machine)
        let next = try points(of: point.machine).filter { next in
            next.manifest.disks.contains { $0.base == point.sequence }
        }
        decision.into = next.first?.sequence
        let preflight = PrunePreflight(self, point.machine, [])
        for next in next {
            let needed = try preflight.checkSpace(toMerge: next, into: point.sequence)
            decision.spaceNeeded = max(decision.spaceNeeded, needed)
        }
        let files = next.flatMap { next in
            next.manifest.disks.map { "\(layout(point.machine).disk($0.directory))/\($0.file)" }
        }
        try PrunePreflight.requireUnused(now, except: Set(files), in: self)
        if isDryRun { return }
        willRemove(decision)
        let doomed = "\(point.path)\(Self.doomedEnding)"
        try renameDurably(point.path, to: doomed)
        Step.reached("prune.marked")
        try PointRemoval(self, RestorePoint(manifest: now.manifest, machine: point.machine, path: doomed), cancellation)
            .run()
    }
}
