// What the kernel tells of devices that come and go, with or without udev.
public import Block
import CLinux
import Glibc

/// An event of a device (kernel: lib/kobject_uevent.c).
public struct KernelEvent: Sendable, Equatable {
    /// What happened: add, remove, change.
    public var action: String
    /// The device's place in sysfs, below its mount point.
    public var path: String
    /// SUBSYSTEM, DEVNAME, DEVTYPE, DISKSEQ and others.
    public var values: [String: String]

    /// Takes a message apart: ACTION@PATH, then KEY=VALUE, each with a zero behind it; nil for anything else.
    public init?(_ message: some Collection<UInt8>) {
        var lines = message.split(separator: 0).map { String(decoding: $0, as: UTF8.self) }[...]
        guard let head = lines.popFirst()?.split(separator: "@", maxSplits: 1), head.count == 2 else { return nil }
        (action, path) = (String(head[0]), String(head[1]))
        values = [:]
        for line in lines {
            let parts = line.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            if parts.count == 2 { values[String(parts[0])] = String(parts[1]) }
        }
    }
}

/// Listens to the kernel's events.
public final class KernelEvents {
    /// What was heard.
    public enum Answer: Sendable, Equatable {
        case event(KernelEvent)
        /// Events were lost: whatever was known has to be asked anew.
        case overrun
        /// Nothing came in time.
        case nothing
    }

    private let socket: Descriptor
    private let buffer = Buffer(count: 65536)

    /// Begins to listen.
    ///
    /// - Parameter bufferBytes: room for events that were not read yet; nil for what the system gives.
    /// - Throws: the system's reason; some containers have no such events.
    public init(bufferBytes: Int32? = nil) throws(BlockError) {
        let number = dg_uevent_open()
        if number < 0 { throw BlockError(errno: -number, "listening to the kernel's events") }
        socket = Descriptor(owning: number)
        guard var bytes = bufferBytes else { return }
        if setsockopt(number, SOL_SOCKET, SO_RCVBUF, &bytes, socklen_t(MemoryLayout<Int32>.size)) < 0 {
            throw BlockError(errno: errno, "limiting the room for the kernel's events to \(bytes) bytes")
        }
    }

    /// The next event.
    ///
    /// - Parameter seconds: how long to wait for it.
    /// - Throws: the system's reason.
    public func next(seconds: Double) throws(BlockError) -> Answer {
        let end = monotonicSeconds() + seconds
        while true {
            let left = end - monotonicSeconds()
            var wanted = pollfd(fd: socket.number, events: Int16(POLLIN), revents: 0)
            let ready = poll(&wanted, 1, Int32(max(0, min(left, 3600)) * 1000))
            if ready < 0 && errno != EINTR { throw BlockError(errno: errno, "waiting for the kernel's events") }
            if ready <= 0 {
                if left <= 0 { return .nothing }
                continue
            }
            let count = dg_uevent_read(socket.number, buffer.bytes.baseAddress, UInt(buffer.bytes.count))
            if count == -ENOBUFS { return .overrun }
            if count == -EINTR || count == -EAGAIN { continue }
            if count < 0 { throw BlockError(errno: Int32(-count), "reading the kernel's events") }
            if let event = KernelEvent(buffer.readable[..<Int(count)]) { return .event(event) }
        }
    }
}
