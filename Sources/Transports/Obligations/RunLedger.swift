// The file that remembers what a run has to give back: written before anything is made, worked off after a crash.
public import Block
import FoundationEssentials
import Glibc
import LinuxIO

/// The obligations of one run, in a file of the state directory that the run holds a lock on.
///
/// The file has one JSON object in a line: the run's identity, then what was made, learned and given back. A line that
/// a crash has cut off was not acted on yet, and does not count.
public final class RunLedger: Sendable {
    /// Whose ledger it is.
    public let run: RunIdentity
    /// The file.
    public let path: String
    private let lock: FileLock
    private let state: Locked<State>

    /// The largest number of an obligation that is believed: what JSON's readers agree on (RFC 8259, section 6).
    private static let maximumNumber = 1 << 53

    private struct State {
        var open: [Obligation] = []
        var next = 1
        /// Whether lines in the middle of the file make no sense: what they stood for is not known.
        var isDamaged = false
    }

    /// A line of the file.
    private struct Entry: Codable {
        var run: RunIdentity?
        var made: Obligation?
        var learned: Obligation?
        var settled: Int?
    }

    private init(run: RunIdentity, path: String, lock: FileLock, state: State) {
        self.run = run
        self.path = path
        self.lock = lock
        self.state = Locked(state)
    }

    /// The directory of the ledgers in a state directory.
    public static func directory(in stateDirectory: String) -> String { "\(stateDirectory)/obligations" }

    /// Begins a run's ledger.
    ///
    /// - Throws: `BlockError` when the state directory cannot be written: nothing may be made then.
    public static func begin(
        stateDirectory: String, machine: String, repository: String?, runID: String? = nil
    ) throws(BlockError) -> RunLedger {
        let directory = directory(in: stateDirectory)
        try makeDirectories(directory)
        let run = RunIdentity(
            id: runID ?? UUID().uuidString.lowercased(), machine: machine, repository: repository,
            started: Date().timeIntervalSince1970,
            host: systemText("/proc/sys/kernel/hostname"), boot: systemText("/proc/sys/kernel/random/boot_id"),
            process: getpid())
        let path = "\(directory)/\(run.id).run"
        // Locked before it has the name under which others look for it.
        let aside = "\(directory)/.\(run.id).new"
        let file = try Descriptor.open(aside, O_RDWR | O_CREAT | O_EXCL | O_APPEND)
        guard let lock = try FileLock.take(file, path: path) else {
            throw BlockError(.denied, "beginning the run's ledger \(path): somebody else holds it")
        }
        let ledger = RunLedger(run: run, path: path, lock: lock, state: State())
        do throws(BlockError) {
            try ledger.append([Entry(run: run)])
            try renameDurably(aside, to: path)
        } catch {
            unlink(aside)
            throw error
        }
        return ledger
    }

    /// Takes over the ledgers of runs that are over: those whose lock is free. The latest run comes first.
    ///
    /// - Parameter isMeant: whether a run is meant; all are by default.
    /// - Returns: the ledgers, and why files could not be taken over; one bad file does not keep the others.
    /// - Throws: `BlockError` when the directory cannot be read.
    public static func takeAbandoned(
        stateDirectory: String, where isMeant: (RunIdentity) -> Bool = { _ in true }
    ) throws(BlockError) -> (ledgers: [RunLedger], problems: [String]) {
        var ledgers: [RunLedger] = []
        var problems: [String] = []
        for path in try files(in: stateDirectory, ending: ".run") {
            do throws(BlockError) {
                guard let (lock, run, state) = try load(path, .exclusive), let lock else { continue }
                if isMeant(run) { ledgers.append(RunLedger(run: run, path: path, lock: lock, state: state)) }
            } catch { problems.append(error.message) }
        }
        removeUnborn(in: stateDirectory)
        return (ledgers.sorted { $0.run.started > $1.run.started }, problems)
    }

    /// Removes files of runs that a crash has ended before they had a ledger, and so before they made anything.
    private static func removeUnborn(in stateDirectory: String) {
        for path in (try? files(in: stateDirectory, ending: ".new")) ?? [] {
            guard let file = try? Descriptor.open(path, O_RDWR), let lock = try? FileLock.take(file, path: path) else {
                continue
            }
            // Between its making and its locking it is a moment old; nobody waits for one that is a day old.
            if let status = try? file.status(), status.st_mtim.tv_sec < time(nil) - 86400 { unlink(path) }
            withExtendedLifetime(lock) {}
        }
    }

    /// What all runs have to give back, those that are going on among them.
    ///
    /// - Returns: the runs, and why files could not be read.
    /// - Throws: `BlockError` when the directory cannot be read.
    public static func list(stateDirectory: String) throws(BlockError) -> (
        runs: [(run: RunIdentity, isGoingOn: Bool, obligations: [Obligation])], problems: [String]
    ) {
        var runs: [(run: RunIdentity, isGoingOn: Bool, obligations: [Obligation])] = []
        var problems: [String] = []
        for path in try files(in: stateDirectory, ending: ".run") {
            do throws(BlockError) {
                guard let (lock, run, state) = try load(path, .shared) else { continue }
                runs.append((run, lock == nil, state.open))
            } catch { problems.append(error.message) }
        }
        return (runs, problems)
    }

    /// What is not given back yet, in the order of making.
    public var obligations: [Obligation] { state.withLock { $0.open } }

    /// Notes, durably, that something is about to be made.
    ///
    /// - Throws: `BlockError` when that cannot be written: then it must not be made.
    public func intend(_ kind: String, _ details: [String: String]) throws(BlockError) -> Obligation {
        let made = try intend([(kind, details)])
        return made[0]
    }

    /// Notes, durably, that several things are about to be made, at the cost of one.
    ///
    /// - Returns: the obligations, in order.
    /// - Throws: `BlockError` when that cannot be written: then none of them may be made.
    public func intend(_ things: [(kind: String, details: [String: String])]) throws(BlockError) -> [Obligation] {
        try state.withLock { (state) throws(BlockError) in
            let made = things.enumerated().map { index, thing in
                Obligation(id: state.next + index, kind: thing.kind, details: thing.details)
            }
            try append(made.map { Entry(made: $0) })
            state.next += made.count
            state.open += made
            return made
        }
    }

    /// Notes more about what was made: its id, once the maker has told it.
    ///
    /// - Throws: `BlockError` when that cannot be written.
    public func learn(_ obligation: Obligation, _ details: [String: String]) throws(BlockError) {
        try state.withLock { (state) throws(BlockError) in
            guard let index = state.open.firstIndex(where: { $0.id == obligation.id }) else { return }
            var more = state.open[index]
            more.details.merge(details) { $1 }
            try append([Entry(learned: more)])
            state.open[index] = more
        }
    }

    /// Strikes out what was given back.
    ///
    /// - Throws: `BlockError` when that cannot be written: it will be given back again, which does no harm.
    public func settle(_ obligation: Obligation) throws(BlockError) {
        try state.withLock { (state) throws(BlockError) in
            guard state.open.contains(where: { $0.id == obligation.id }) else { return }
            // Not synced: what a power cut makes forgotten is given back again.
            try append([Entry(settled: obligation.id)], isDurable: false)
            state.open.removeAll { $0.id == obligation.id }
        }
    }

    /// Ends the ledger: it is removed when everything is given back, and stays for `diskgate doctor` otherwise.
    ///
    /// - Parameter forgettingDamage: whether what lines that make no sense stood for is given up.
    /// - Throws: `BlockError` when the file cannot be removed.
    public func end(forgettingDamage: Bool = false) throws(BlockError) {
        guard state.withLock({ $0.open.isEmpty && (forgettingDamage || !$0.isDamaged) }) else { return }
        if unlink(path) < 0 && errno != ENOENT { throw BlockError(errno: errno, "removing the run's ledger \(path)") }
        try syncDirectory(directoryName(path))
    }

    private func append(_ entries: [Entry], isDurable: Bool = true) throws(BlockError) {
        var lines = Data()
        do {
            for entry in entries { lines += try JSONEncoder().encode(entry) + [UInt8(ascii: "\n")] }
        } catch {
            throw BlockError(.invalid, "writing the run's ledger \(path): \(error)")
        }
        let number = lock.descriptor.number
        let before = try lock.descriptor.status().st_size
        let written = lines.withUnsafeBytes { write(number, $0.baseAddress, $0.count) }
        guard written == lines.count else {
            let reason = written < 0 ? errno : ENOSPC
            // What comes next must not be glued to half a line.
            ftruncate(number, before)
            throw BlockError(errno: reason, "writing the run's ledger \(path)")
        }
        if isDurable, fdatasync(number) < 0 { throw BlockError(errno: errno, "syncing the run's ledger \(path)") }
    }

    /// Why not all of the ledger can be worked off; nil when it can.
    public var damage: String? {
        state.withLock { $0.isDamaged }
            ? "reading the run's ledger \(path): lines of it make no sense, and what they stood for may be left" : nil
    }

    private static func files(in stateDirectory: String, ending: String) throws(BlockError) -> [String] {
        let directory = directory(in: stateDirectory)
        if access(directory, F_OK) < 0 && errno == ENOENT { return [] }
        return try namesInDirectory(directory).filter { $0.hasSuffix(ending) }.map { "\(directory)/\($0)" }
    }

    /// Reads a ledger.
    ///
    /// - Parameter kind: exclusive to take it over, shared to look.
    /// - Returns: nil when it is gone, or held and to be taken over; the lock is nil when somebody holds it.
    private static func load(_ path: String, _ kind: FileLock.Kind) throws(BlockError) -> (
        FileLock?, RunIdentity, State
    )? {
        let file: Descriptor
        do throws(BlockError) { file = try Descriptor.open(path, O_RDWR | O_APPEND) } catch {
            if error.kind == .notFound { return nil }
            throw error
        }
        let lock = try FileLock.take(file, path: path, kind)
        if kind == .exclusive && lock == nil { return nil }
        // A run that has ended between listing and locking has removed it.
        if access(path, F_OK) < 0 { return nil }
        let bytes = try readSmallFile(path, limit: 64 << 20)
        // What is written next begins a line, even behind one that a crash has cut off.
        if kind == .exclusive, let last = bytes.last, last != UInt8(ascii: "\n") { _ = write(file.number, "\n", 1) }
        var run: RunIdentity?
        var state = State()
        let lines = bytes.split(separator: UInt8(ascii: "\n"))
        for (index, line) in lines.enumerated() {
            guard let entry = try? JSONDecoder().decode(Entry.self, from: Data(line)) else {
                // The last line may be one that a crash has cut off; so may one that another line begins behind.
                if index + 1 < lines.count && line.last == UInt8(ascii: "}") { state.isDamaged = true }
                continue
            }
            run = entry.run ?? run
            if let made = entry.made {
                // Numbers that no ledger gets to; behind them there would be none left for what comes next.
                guard (1...maximumNumber).contains(made.id) else {
                    state.isDamaged = true
                    continue
                }
                state.open.append(made)
                state.next = max(state.next, made.id + 1)
            }
            if let more = entry.learned, let index = state.open.firstIndex(where: { $0.id == more.id }) {
                state.open[index] = more
            }
            if let id = entry.settled { state.open.removeAll { $0.id == id } }
        }
        guard let run else {
            throw BlockError(.corrupt, "reading the run's ledger \(path): it does not say whose it is")
        }
        return (lock, run, state)
    }
}

/// The first line of a file of /proc; empty where there is none.
private func systemText(_ path: String) -> String {
    guard let bytes = try? readSmallFile(path) else { return "" }
    return String(decoding: bytes.prefix { $0 != UInt8(ascii: "\n") }, as: UTF8.self)
}

/// Where diskgate keeps what has to survive it: `DISKGATE_STATE_DIRECTORY`, systemd's `STATE_DIRECTORY`, for root
/// /var/lib/diskgate, for others what the XDG base directory specification says.
public func defaultStateDirectory() -> String {
    if let given = getenv("DISKGATE_STATE_DIRECTORY").map({ String(cString: $0) }), !given.isEmpty { return given }
    // systemd names all directories of a unit there, with colons between them.
    if let unit = getenv("STATE_DIRECTORY").map({ String(cString: $0) }), let first = unit.split(separator: ":").first {
        return String(first)
    }
    if geteuid() == 0 { return "/var/lib/diskgate" }
    if let state = getenv("XDG_STATE_HOME").map({ String(cString: $0) }), state.hasPrefix("/") {
        return "\(state)/diskgate"
    }
    return "\(getenv("HOME").map { String(cString: $0) } ?? "/tmp")/.local/state/diskgate"
}
