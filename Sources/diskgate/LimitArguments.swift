// What clients of `diskgate serve` may use at most: connections, time, bytes per second, memory.
import ArgumentParser
import NBD

struct LimitArguments: ParsableArguments {
    @Option(help: "The most clients at once.")
    var maxConnections = 1024

    @Option(help: "The most clients of one export.")
    var maxPerExport = 1024

    @Option(help: "The most clients of one address, user (at Unix sockets) or virtual machine.")
    var maxPerPeer = 1024

    @Option(help: ArgumentHelp("Bytes per second for all clients of an export together.", valueName: "bytes"))
    var limitRate: ByteArgument?

    @Option(
        help: ArgumentHelp(
            "Bytes per second for all connections of one client (certificate, key, address, user or virtual machine) "
                + "together.", valueName: "bytes"))
    var limitRatePerClient: ByteArgument?

    @Option(help: ArgumentHelp("Time for the whole handshake.", valueName: "seconds"))
    var handshakeTimeout = 10

    @Option(help: ArgumentHelp("Disconnect clients that ask for nothing for so long.", valueName: "seconds"))
    var idleTimeout: Int?

    @Option(
        help: ArgumentHelp(
            "Disconnect clients that take none of their replies, or stop in the middle of a request, for so long.",
            valueName: "seconds"))
    var stallTimeout = 600

    @Option(help: ArgumentHelp("Tell of requests that are not answered after so long.", valueName: "seconds"))
    var stuckAfter = 30

    @Option(
        help: ArgumentHelp(
            "Memory for requests that wait for storage, of all clients together; beyond it each has one piece of "
                + "256 KiB at a time.", valueName: "bytes"))
    var requestMemory: ByteArgument?

    func validate() throws {
        for limit in [maxConnections, maxPerExport, maxPerPeer] where !(1...65536).contains(limit) {
            throw ValidationError("A number of clients is 1 to 65536.")
        }
        if limitRate?.bytes == 0 { throw ValidationError("--limit-rate is at least 1 byte per second.") }
        if limitRatePerClient?.bytes == 0 {
            throw ValidationError("--limit-rate-per-client is at least 1 byte per second.")
        }
        if !(1...3600).contains(handshakeTimeout) { throw ValidationError("--handshake-timeout is 1 to 3600 seconds.") }
        for (name, seconds) in [
            ("idle-timeout", idleTimeout ?? 1), ("stall-timeout", stallTimeout), ("stuck-after", stuckAfter),
        ] where !(1...1_000_000).contains(seconds) {
            throw ValidationError("--\(name) is 1 to 1000000 seconds.")
        }
        if let bytes = requestMemory?.bytes, !(1 << 20...1 << 40).contains(bytes) {
            throw ValidationError("--request-memory is 1M to 1T.")
        }
    }

    /// The limits of a server; those of exports are in their options.
    var limits: ServerLimits {
        var limits = ServerLimits()
        limits.connectionsMax = maxConnections
        limits.connectionsPerPeerMax = maxPerPeer
        limits.handshakeSeconds = handshakeTimeout
        limits.idleSeconds = idleTimeout
        limits.stallSeconds = stallTimeout
        limits.stuckSeconds = Double(stuckAfter)
        limits.bytesPerSecondPerPeerMax = limitRatePerClient?.bytes
        if let bytes = requestMemory.flatMap({ Int(exactly: $0.bytes) }) { limits.slotBytesMax = bytes }
        return limits
    }
}
