// Signals that end a command while it has a disk attached: the disk is given back first.
import Backup
import Block
import CLinux
import Glibc
import LinuxIO
import Transports

/// Lets SIGINT, SIGTERM and SIGHUP give back what the process holds before they end it, where a disk is to be added to
/// this machine, or guarded, for as long as it is open. Other sources leave nothing behind, and keep the system's ways.
///
/// The reader of a pipe that has enough ends writing with an error then, instead of the process with a signal.
func giveBackOnSignals(_ sources: [SourceReference]) throws {
    if sources.contains(where: \.isHotAdded) { try giveBackOnSignals() }
}

/// The same, for disks that are not known yet.
func giveBackOnSignals() throws {
    signal(SIGPIPE, SIG_IGN)
    let wanted = blockEndingSignals()
    let number = dg_signalfd(wanted, Int32(wanted.count))
    if number < 0 { throw BlockError(errno: -number, "waiting for signals") }
    try startThread(name: "signals") {
        let ending = dg_signal_read(number)
        ProcessLeases.releaseAll()
        guard ending > 0 else { Glibc._exit(1) }
        // Whoever waits for this process is told what ended it.
        var only = sigset_t()
        sigemptyset(&only)
        sigaddset(&only, ending)
        signal(ending, SIG_DFL)
        pthread_sigmask(SIG_UNBLOCK, &only, nil)
        raise(ending)
        Glibc._exit(1)
    }
}

/// Lets SIGINT, SIGTERM and SIGHUP end work cleanly; a second one ends the process at once, with what it has added to
/// this machine given back as far as that takes some seconds only.
func cancelOnSignal(_ cancellation: Cancellation) throws {
    let wanted = blockEndingSignals()
    let number = dg_signalfd(wanted, Int32(wanted.count))
    if number < 0 { throw BlockError(errno: -number, "waiting for signals") }
    try startThread(name: "signals") {
        _ = dg_signal_read(number)
        writeError("diskgate: stopping; once more ends it at once")
        cancellation.cancel()
        SiteSessions.endWaiting()
        _ = dg_signal_read(number)
        // A third one waits for nothing.
        try? startThread(name: "release") {
            ProcessLeases.releaseAll()
            Glibc._exit(1)
        }
        _ = dg_signal_read(number)
        Glibc._exit(1)
    }
}

/// Lets SIGINT and SIGTERM, which are blocked, end the waiting for sessions for as long as something is done. They are
/// not taken: they are there afterwards for whoever asks for them. SIGHUP is none that ends a server.
func endWaitingOnSignals(while body: () throws -> Void) throws {
    let wanted = [SIGINT, SIGTERM]
    let number = dg_signalfd(wanted, Int32(wanted.count))
    if number < 0 { throw BlockError(errno: -number, "waiting for signals") }
    let signals = Descriptor(owning: number)
    let stop = try makeEvent()
    let ended = try makeEvent()
    try startThread(name: "signals") {
        var ready = [
            pollfd(fd: signals.number, events: Int16(POLLIN), revents: 0),
            pollfd(fd: stop.number, events: Int16(POLLIN), revents: 0),
        ]
        // A signal is seen, and not read.
        while poll(&ready, 2, -1) < 0 && errno == EINTR {}
        if ready[0].revents != 0 { SiteSessions.endWaiting() }
        makeReadable(ended)
    }
    defer {
        makeReadable(stop)
        var ready = pollfd(fd: ended.number, events: Int16(POLLIN), revents: 0)
        while poll(&ready, 1, -1) < 0 && errno == EINTR {}
    }
    try body()
}

/// A descriptor that one thread makes readable for another.
private func makeEvent() throws(BlockError) -> Descriptor {
    let number = dg_eventfd()
    if number < 0 { throw BlockError(errno: -number, "waiting for signals") }
    return Descriptor(owning: number)
}

private func makeReadable(_ event: Descriptor) {
    var one: UInt64 = 1
    write(event.number, &one, 8)
}

/// Keeps SIGINT, SIGTERM and SIGHUP waiting for whoever asks for them.
///
/// - Returns: these signals.
@discardableResult
func blockEndingSignals() -> [Int32] {
    let wanted = [SIGINT, SIGTERM, SIGHUP]
    var signals = sigset_t()
    sigemptyset(&signals)
    for signal in wanted { sigaddset(&signals, signal) }
    pthread_sigmask(SIG_BLOCK, &signals, nil)
    return wanted
}

extension SourceReference {
    /// Whether opening it leaves something to give back.
    var isHotAdded: Bool {
        if case .hotAdd = kind { true } else { false }
    }
}
